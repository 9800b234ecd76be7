"""The nine GLUE tasks, from the hub (`nyu-mll/glue`) or from local files with the hub's column names.

Wang et al. 2018. Scores are those of the benchmark; the headline is the one that the LoRA papers report
(accuracy for MRPC and QQP, Pearson for STS-B, the matched half for MNLI).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError, did_you_mean
from .classification import (
    Score,
    SequenceClassification,
    accuracy,
    f1,
    matthews_correlation,
    pearson,
    spearmanr,
)
from .data import Columns, DataSpec, column, texts

if TYPE_CHECKING:
    from datasets import DatasetDict

HUB_ID = "nyu-mll/glue"


@dataclass(frozen=True)
class _Kind:
    columns: tuple[str, ...]
    labels: tuple[str, ...] | None  # None: a number
    scores: Mapping[str, Score]  # headline first
    train_rows: int


_ACCURACY = {"accuracy": accuracy}
_ACCURACY_F1 = {"accuracy": accuracy, "f1": f1}

KINDS = {
    "cola": _Kind(("sentence",), ("unacceptable", "acceptable"), {"matthews_correlation": matthews_correlation}, 8_551),
    "mnli": _Kind(("premise", "hypothesis"), ("entailment", "neutral", "contradiction"), _ACCURACY, 392_702),
    "mrpc": _Kind(("sentence1", "sentence2"), ("not_equivalent", "equivalent"), _ACCURACY_F1, 3_668),
    "qnli": _Kind(("question", "sentence"), ("entailment", "not_entailment"), _ACCURACY, 104_743),
    "qqp": _Kind(("question1", "question2"), ("not_duplicate", "duplicate"), _ACCURACY_F1, 363_846),
    "rte": _Kind(("sentence1", "sentence2"), ("entailment", "not_entailment"), _ACCURACY, 2_490),
    "sst2": _Kind(("sentence",), ("negative", "positive"), _ACCURACY, 67_349),
    "stsb": _Kind(("sentence1", "sentence2"), None, {"pearson": pearson, "spearmanr": spearmanr}, 5_749),
    "wnli": _Kind(("sentence1", "sentence2"), ("not_entailment", "entailment"), _ACCURACY, 635),
}


@dataclass(kw_only=True)
class Glue(SequenceClassification):
    """One of the nine tasks."""

    name: str
    """``glue/cola``, ``glue/mnli``, …"""
    max_length: int | None = None
    """Tokens a row is cut to; without it, what the model can take."""
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        short = self.name.removeprefix("glue/")
        if short not in KINDS:
            raise ConfigError("task.name", self.name, f"no such GLUE task.{did_you_mean(short, KINDS)}")
        self.check_settings()
        self._kind = KINDS[short]
        self.metric = next(iter(self._kind.scores))
        self.train_rows = self._kind.train_rows
        halves = short == "mnli"
        self.validation_splits = (
            ("validation_matched", "validation", "validation_mismatched") if halves else ("validation",)
        )
        self.splits = (
            "train",
            *self.validation_splits,
            "test",
            *(("test_matched", "test_mismatched") if halves else ()),
        )

    @property
    def text_columns(self) -> tuple[str, ...]:
        return self._kind.columns

    @property
    def label_column(self) -> str:
        return "label"

    @property
    def label_names(self) -> Sequence[str] | None:
        return self._kind.labels

    @property
    def scores(self) -> Mapping[str, Score]:
        return self._kind.scores

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        spec = DataSpec.read(data, self.splits)
        if spec.files and "train" not in spec.files and not spec.hub:
            raise ConfigError("data.train", None, "a file with training rows is needed beside the others")
        self.notes.clear()
        tables = {
            split: self._from_table(split, raw, source) for split, source, raw in spec.tables()
        } or self._from_hub()
        return self.split_and_sample(tables, spec)

    def _from_table(self, split: str, raw: Columns, source: str) -> Any:
        from datasets import Dataset

        asked = f"task.name={self.name!r}"
        table: dict[str, list[Any]] = {
            name: texts(column(raw, name, asked, source), name, source) for name in self.text_columns
        }
        if "label" in raw or not split.startswith("test"):
            table["label"] = [
                self._label(value, number, source)
                for number, value in enumerate(column(raw, "label", asked, source), 1)
            ]
        return Dataset.from_dict(self.without_unlabelled(split, table))

    def _label(self, value: Any, number: int, source: str) -> float | None:
        """Id or number of a label; None where it is unknown (null, empty, or the hub's -1)."""
        if value is None or value == "":
            return None
        names = self.label_names
        if names is not None and value in names:
            return names.index(value)
        try:
            as_number = float(value)
        except (TypeError, ValueError):
            as_number = float("nan")
        if as_number == -1:
            return None
        if names is None and 0.0 <= as_number <= 5.0:
            return as_number
        if names is not None and as_number in range(len(names)):
            return int(as_number)
        allowed = (
            "a number from 0 to 5" if names is None else ", ".join(f"{i} ({name})" for i, name in enumerate(names))
        )
        raise DataError(f"{source}: row {number} has label {value!r}; {self.name} knows {allowed}")

    def _from_hub(self) -> dict[str, Any]:
        from datasets import Dataset, load_dataset

        short = self.name.removeprefix("glue/")
        try:
            hub = load_dataset(HUB_ID, short)
        except (OSError, ValueError) as error:
            raise DataError(
                f"task.name={self.name!r}: {HUB_ID} cannot be fetched from the hub "
                f"({str(error).splitlines()[0]}); give local files: data.train and data.validation"
            ) from error
        rows: dict[str, Dataset] = {}
        for split, part in hub.items():
            # The hub marks the hidden labels of its test splits by -1, in every row.
            if split.startswith("test") and all(value == -1 for value in part["label"]):
                part = part.remove_columns("label")
            rows[split] = part
        return rows
