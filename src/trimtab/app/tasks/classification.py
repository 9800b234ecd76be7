"""What every task with one label (or one number) per row shares: scores, tokenising, padding.

`glue.py` and `text_classification.py` say which columns are read and how labels become numbers.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import ConfigError, DataError
from ..report.words import some
from . import Task
from .data import NO_VALIDATION, DataSpec, column, text_of

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import nn


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows whose class is right. Both (n,)."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1, for two classes (MRPC, QQP)."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, zero_division=0.0))


def f1_macro(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Unweighted mean of the classes' F1, over the classes that occur."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predicted, average="macro", zero_division=0.0))


def matthews_correlation(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation, in [-1, 1]; 0 when all predictions (or all labels) are one class."""
    from sklearn.metrics import matthews_corrcoef

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="A single label was found")
        return float(matthews_corrcoef(labels, predicted))


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 when either side is constant, as with `matthews_correlation`."""
    from scipy.stats import pearsonr

    return 0.0 if _is_constant(predicted, labels) else float(pearsonr(predicted, labels)[0])


def spearmanr(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Spearman rank correlation; 0 when either side is constant."""
    from scipy.stats import spearmanr as ranked

    return 0.0 if _is_constant(predicted, labels) else float(ranked(predicted, labels)[0])


def mse(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared error."""
    return float(np.mean((predicted - labels) ** 2))


def _is_constant(*arrays: np.ndarray) -> bool:
    return any(len(a) < 2 or bool(np.all(a == a[0])) for a in arrays)


Score = Callable[[np.ndarray, np.ndarray], float]


def score_all(scores: Mapping[str, Score], eval_pred: Any, regression: bool) -> dict[str, float]:
    """Every score by name; all NaN when the model's output is not finite, so that no such run looks good.

    Args:
        eval_pred: predictions (n, num_labels), or a tuple that starts with them, and labels (n,).
    """
    found = predicted_of(eval_pred, regression)
    return {name: float("nan") if found is None else score(*found) for name, score in scores.items()}


def predicted_of(eval_pred: Any, regression: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Predicted classes (or numbers) and labels, both (n,); None when the model's output is not finite."""
    logits = eval_pred[0][0] if isinstance(eval_pred[0], (tuple, list)) else eval_pred[0]
    logits, labels = np.asarray(logits, np.float64), np.asarray(eval_pred[1])
    if not np.all(np.isfinite(logits)):
        return None
    return logits.reshape(-1) if regression else logits.argmax(axis=-1), labels


def _of_label(eval_pred: Any, labels: np.ndarray) -> list[float]:
    """The probability that each row's own class was given."""
    logits = np.asarray(eval_pred[0][0] if isinstance(eval_pred[0], (tuple, list)) else eval_pred[0], np.float64)
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    given = (powers / powers.sum(axis=-1, keepdims=True))[np.arange(len(labels)), labels.astype(int)]
    return [round(float(p), 4) for p in given]


class SequenceClassification(Task):
    """Base of the tasks in which a model reads one text or two and answers with a class or a number.

    A subclass provides `columns`, `label_column`, `labels`, `scores` and `load_data`.
    """

    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    max_length: int | None = None
    validation_splits: tuple[str, ...] = ("validation",)
    scored_splits: tuple[str, ...] | None = None
    """Those that are scored where they have labels, the headline one first; None: those for validation."""

    @property
    def text_columns(self) -> tuple[str, ...]:
        """One column, or the two of a pair."""
        raise NotImplementedError

    @property
    def label_column(self) -> str:
        raise NotImplementedError

    @property
    def label_names(self) -> Sequence[str] | None:
        """Class names in the order of their ids; None for regression."""
        raise NotImplementedError

    @property
    def scores(self) -> Mapping[str, Score]:
        raise NotImplementedError

    def check_settings(self) -> None:
        """Raises `ConfigError` for what no data could make right."""
        length = self.max_length
        if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
            raise ConfigError("task.max_length", length, "a whole number of tokens, at least 2")

    def model_kwargs(self) -> dict[str, Any]:
        names = self.label_names
        if names is None:
            return {"num_labels": 1, "problem_type": "regression"}
        return {
            "num_labels": len(names),
            "problem_type": "single_label_classification",
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
        }

    def prepare(self, rows: DatasetDict, tokenizer: Any, model: Any = None) -> DatasetDict:
        from datasets import DatasetDict

        from ..model_facts import forward_names

        takes = forward_names(model) if model is not None else set(tokenizer.model_input_names)
        length = self._length(tokenizer, model)

        def encode(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
            pair = [batch[name] for name in self.text_columns]
            out = {
                key: value
                for key, value in tokenizer(*pair, truncation=length is not None, max_length=length).items()
                if key in takes
            }
            if self.label_column in batch:
                out["labels"] = batch[self.label_column]
            return out

        ready = {
            split: part.map(
                encode,
                batched=True,
                remove_columns=part.column_names,
                keep_in_memory=True,
                desc=f"Tokenising {split}",
            )
            for split, part in rows.items()
        }
        if length is None:
            return DatasetDict(ready)
        for split, part in ready.items():
            full = [i for i, ids in enumerate(part["input_ids"][:]) if len(ids) >= length]
            whole = [rows[split].select(full)[name][:] for name in self.text_columns]
            if full and (n := sum(len(ids) > length for ids in tokenizer(*whole)["input_ids"])):
                self.notes.append(f"{split}: {n} of {len(part)} rows cut to {length} tokens (task.max_length)")
        return DatasetDict(ready)

    def _length(self, tokenizer: Any, model: Any) -> int | None:
        """Tokens a row is cut to: the setting, else what tokenizer and model can take, if they say."""
        from ..model_facts import positions

        room = positions(model) if model is not None else None
        usual = room or getattr(getattr(model, "config", None), "max_position_embeddings", None)
        known = [n for n in (tokenizer.model_max_length, usual) if n and n < 10**9]  # "unlimited" is 1e30
        if self.max_length is None:
            return min(known, default=None)
        if room and self.max_length > min(known):
            raise ConfigError(
                "task.max_length", self.max_length, f"at most {min(known)}, the positions that this model has"
            )
        return self.max_length

    def ask(self, spec: DataSpec) -> tuple[int, Dataset, list[int]]:
        """Rows to be classified, labels or not: how many there are, those that have a text, and their places."""
        from datasets import Dataset

        _, source, raw = next(spec.tables())
        asked = f"task {self.name}"
        columns = {name: column(raw, name, asked, source) for name in self.text_columns}
        n = len(columns[self.text_columns[0]])
        places = [i for i in range(n) if not any(spec.is_missing(values[i]) for values in columns.values())]
        if not places:
            raise DataError(f"{source}: no row has a text in column {' and '.join(map(repr, columns))}")
        kept = {
            name: [text_of(values[i], name, f"{source}: row {i + 1}") for i in places]
            for name, values in columns.items()
        }
        return n, Dataset.from_dict(kept), places

    def start_head(self, model: nn.Module, new: Sequence[str], ready: DatasetDict) -> None:
        """A new head for numbers begins at the mean of the labels, in units of their spread.

        From about zero, as it is drawn, it would take thousands of steps to prices; on its way to the mean of STS-B
        alone, at a usual rate, it throws back what is learned. The checkpoint's own head is left as it is.

        Args:
            new: names of the modules that the checkpoint lacked.
            ready: tokenised rows, whose training labels are numbers.
        """
        import torch

        if self.label_names is not None or "train" not in ready:
            return
        labels = np.asarray(ready["train"]["labels"][:], dtype=np.float64)
        for head in (part for name in new for part in model.get_submodule(name).modules()):
            if isinstance(head, torch.nn.Linear) and head.out_features == 1:
                with torch.no_grad():
                    head.weight.mul_(float(labels.std()) or 1.0)
                    if head.bias is not None:
                        head.bias.fill_(float(labels.mean()))

    def selection_rows(self, ready: DatasetDict) -> Dataset:
        return ready["train"].remove_columns("labels")

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer)

    def eval_splits(self, ready: DatasetDict) -> list[str]:
        splits = self.scored_splits or self.validation_splits
        return [s for s in splits if s in ready and "labels" in ready[s].column_names]

    def compute_metrics(self, eval_pred: Any) -> dict[str, float]:
        return score_all(self.scores, eval_pred, regression=self.label_names is None)

    def row_scores(self, eval_pred: Any) -> dict[str, Any]:
        found = predicted_of(eval_pred, regression=self.label_names is None)
        if found is None:
            return {}
        kept = {"label": found[1].tolist(), "predicted": found[0].tolist()}
        if self.label_names is None:
            return kept
        return {**kept, "probability": _of_label(eval_pred, found[1]), "classes": list(self.label_names)}

    # What both kinds of loading end with.

    def without_unlabelled(self, split: str, table: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """Leaves out rows whose label is None; a test split without any label keeps its rows, not the column.

        Raises:
            DataError: a training or validation split without any label.
        """
        labels = table.get(self.label_column)
        n = len(table[self.text_columns[0]])
        known = [i for i in range(n) if labels is not None and labels[i] is not None]
        if not known:
            if not split.startswith("test"):
                raise DataError(f"data.{split}: no row has a label in column {self.label_column!r}")
            return {name: values for name, values in table.items() if name != self.label_column}
        if len(known) < n:
            self.notes.append(f"{split}: {n - len(known)} of {n} rows have no label and were left out")
            return {name: [values[i] for i in known] for name, values in table.items()}
        return table

    def split_and_sample(self, rows: dict[str, Dataset], spec: DataSpec) -> DatasetDict:
        """Makes a validation split where there is none, then keeps at most ``max_samples`` rows of each.

        Each class has its share in both. What is drawn depends on the rows alone, not on the run's seed, so that runs
        over several seeds are scored on the same rows.
        """
        from datasets import DatasetDict

        labels = {
            split: part[self.label_column][:] if self.label_column in part.column_names else None
            for split, part in rows.items()
        }
        if not any(split in rows for split in self.validation_splits):
            train = rows["train"]
            n = len(train)
            strata = spec.strata({name: train[name][:] for name in train.column_names}, labels["train"])
            held = spec.held_out(n, strata)
            rest = sorted(set(range(n)) - set(held))
            rows = {**rows, "train": train.select(rest), "validation": train.select(held)}
            by_class = self.label_names is not None and labels["train"] and spec.stratify in (None, True)
            how = ", of each class its share" if by_class else ""
            self.notes.append(f"{NO_VALIDATION} {len(held)} of {n} training rows were split off for it{how}")
            if whole := labels["train"]:
                if self.label_names is not None and len({whole[i] for i in rest}) < 2 <= len(set(whole)):
                    raise DataError(
                        "data.train: too few rows: one class is left to learn from where rows are split off; "
                        "give data.validation"
                    )
                trained, scored = [whole[i] for i in rest], [whole[i] for i in held]
                labels |= {"train": trained, "validation": scored}
                self._name_unscored(trained, scored)
        else:
            spec.refuse_split_settings()
        out = {}
        for split, part in rows.items():
            kept = spec.kept(split, len(part), labels.get(split))
            if kept is not None:
                how = "first" if spec.sample_seed == "first" else "drawn"
                self.notes.append(f"{split}: {len(kept)} of {len(part)} rows kept, {how} (data.max_samples)")
            out[split] = part if kept is None else part.select(kept)
        return DatasetDict(out)

    def _name_unscored(self, trained: Sequence[Any], scored: Sequence[Any]) -> None:
        """Says which classes are too rare to be in both parts of a split."""
        names = self.label_names
        if names is None:
            return
        counts = Counter(trained)
        unscored = [i for i in range(len(names)) if counts[i] and i not in set(scored)]
        if rare := [repr(names[i]) for i in unscored if counts[i] == 1]:
            self.notes.append(f"too rare to be split (one row, trained on and not scored): class {some(rare)}")
        if others := [f"{names[i]!r} ({counts[i]})" for i in unscored if counts[i] > 1]:
            self.notes.append(
                f"none of their rows is among the {len(scored)} split off (data.validation_share): class {some(others)}"
            )
