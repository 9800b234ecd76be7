"""Tasks: which rows are read, what the model is asked for, and how its answers are scored.

The whole interface, in the order in which a run uses it::

    task  = get_task({"name": "glue/cola", "max_length": 64})   # ConfigError for what cannot work
    rows  = task.load_data(data)                      # DatasetDict of raw rows; `data:` may be None
    tok   = models.load_tokenizer(spec, task)
    got   = models.load_model(spec, task, tok)        # got.model, got.modules_to_save, got.notes
    ready = task.prepare(rows, tok, got.model)        # DatasetDict of tokenised rows, and `labels`

    task.selection_rows(ready)                        # what `where` reads, pooled as task.pool(config)
    splits = task.eval_splits(ready)                  # labelled ones, the headline one first
    Trainer(train_dataset=ready["train"],
            eval_dataset=ready[splits[0]] if len(splits) == 1 else {s: ready[s] for s in splits},
            data_collator=task.collator(tok),
            compute_metrics=task.compute_metrics,
            preprocess_logits_for_metrics=task.preprocess_logits_for_metrics)
    # models that read images: trainer.train(ignore_keys_for_eval=model_facts.unread_outputs(model)), evaluate likewise

A new head is initialised by `load_model`: set the seed before it. The data do not depend on the run's
seed, so that runs over several seeds are scored on the same rows.

`task.metric` is the headline name (without ``eval_``), taken on the first of `task.eval_splits`, and
`task.greater_is_better` says which way. `task.notes` collects one-line remarks made while loading (a
validation split made from train, unlabelled rows left out) for the caller to show once.

`task.model_kwargs()` is known without data where the task alone settles it (GLUE, or `labels:` in the
recipe); otherwise it needs `load_data` first and says so.

The recipe's ``data:`` is a mapping: a path (or a list of paths) for each split name, or a dataset of the
hub, and how they are read, split and sampled (`data.DataSpec`).

A task that is scored by generating text overrides `Task.evaluate`; the others leave it as it is, and
are scored by `compute_metrics` alone. Its headline score is not known while training: `training_metric`
is then the one that is.

A task that fits several kinds of model has `adjust_to(config)`: `load_config` and `load_model` call it, and
it settles `auto_class` and `task_type`.

A user's own task needs no registration: ``task: {name: "my_package.my_module:make_task", …}``, where
the callable takes the other keys as keyword arguments and returns something with these members. An
installed package can also announce tasks as entry points of the group ``trimtab.tasks``.

This module imports neither torch nor datasets.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ...errors import ConfigError, did_you_mean
from ...registry import announced, imported
from .. import foreign

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

GLUE_NAMES = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli")

TASKS: dict[str, str] = {
    **{f"glue/{name}": "trimtab.app.tasks.glue:Glue" for name in GLUE_NAMES},
    "text_classification": "trimtab.app.tasks.text_classification:TextClassification",
    "instruct": "trimtab.app.tasks.instruct:Instruct",
    "math": "trimtab.app.tasks.math:Math",
    "code": "trimtab.app.tasks.code:Code",
    "summarize": "trimtab.app.tasks.summarize:Summarize",
    "text": "trimtab.app.tasks.text:PlainText",
    "vqa": "trimtab.app.tasks.vqa:Vqa",
}
"""Name in the recipe -> where its maker is. Adding a task is one file and one line here."""


class Task(Protocol):
    """What a run asks of a task. Subclass it to inherit the defaults, or just have the members."""

    name: str
    """As in the recipe (``glue/cola``)."""
    auto_class: str
    """The class of `transformers` that makes the model (``AutoModelForSequenceClassification``)."""
    task_type: str
    """PEFT's word (``SEQ_CLS``, ``CAUSAL_LM``, ``SEQ_2_SEQ_LM``)."""
    tokenizer_class: str = "AutoTokenizer"
    """``AutoProcessor`` where rows hold images."""
    metric: str
    """Headline metric, without ``eval_``, taken on the first evaluated split."""
    greater_is_better: bool = True
    train_rows: int | None = None
    """Rows of the hub's train split, where they are known without loading it."""
    training_metric: str | None = None
    """The score that `compute_metrics` gives while training (lower is better), where it is not `metric`."""
    notes: list[str]
    """One-line remarks for the user, made while loading and preparing."""

    def model_kwargs(self) -> dict[str, Any]:
        """What goes into the model's config: ``num_labels``, ``id2label``, ``label2id``, ``problem_type``."""
        return {}

    def adjust_to(self, config: Any) -> None:
        """Settles `auto_class` and `task_type` by the model's config, where they depend on it."""

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        """Raw rows by split, from the recipe's ``data:`` or, without it, from the hub.

        Raises `DataError` or `ConfigError`, one line, for a missing file, column or value.
        """
        ...

    def prepare(self, rows: DatasetDict, tokenizer: Any, model: Any = None) -> DatasetDict:
        """Tokenised rows, not padded. Columns: what ``model.forward`` takes, and ``labels`` where known."""
        ...

    def selection_rows(self, ready: DatasetDict) -> Dataset:
        """The tokenised rows that layer selection reads (training rows, in file order)."""
        ...

    def pool(self, config: Any) -> str:
        """Which token stands for a row: ``cls``, ``last`` or ``mean``, from the model's config."""
        from ..model_facts import pool_of

        return pool_of(config)

    def collator(self, tokenizer: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Pads a list of rows to the longest of them."""
        ...

    def eval_splits(self, ready: DatasetDict) -> list[str]:
        """The labelled splits to evaluate, the headline one first (MNLI has two)."""
        ...

    def compute_metrics(self, eval_pred: Any) -> dict[str, float]:
        """Scores by name, from ``(predictions, labels)`` as the Trainer hands them over."""
        ...

    def row_scores(self, eval_pred: Any) -> dict[str, Any]:
        """What is kept of each row, in lists, so that runs can be compared row by row. Nothing by default."""
        return {}

    def preprocess_logits_for_metrics(self, logits: Any, labels: Any) -> Any:
        """What of each batch's output is kept for `compute_metrics`; the first tensor by default."""
        return logits[0] if isinstance(logits, (tuple, list)) else logits

    def evaluate(
        self,
        model: Any,
        tokenizer: Any,
        rows: DatasetDict,
        split: str,
        *,
        folder: str | Path | None = None,
        make_bar: Callable[[int, str], Any] | None = None,
    ) -> dict[str, float]:
        """Further scores that need generation, from *raw* rows. None by default.

        Args:
            folder: where generated answers are kept; an interrupted evaluation goes on from them.
            make_bar: from an amount of work and its name to something with `advance(steps)` and `close()`.
        """
        return {}


def known_tasks() -> dict[str, str]:
    """Every task by name, with where its maker is: built in, and announced by installed packages."""
    return {**{name: target for name, (target, _) in announced("trimtab.tasks").items()}, **TASKS}


def get_task(spec: Mapping[str, Any]) -> Task:
    """The task that the recipe's ``task:`` describes.

    Args:
        spec: ``{"name": …}`` and the task's own settings.
    Raises:
        ConfigError: for an unknown name or setting, naming the nearest one.

    >>> get_task({"name": "glue/cola"}).metric
    'matthews_correlation'
    """
    options = dict(spec)
    name = options.pop("name", None)
    known = known_tasks()
    if not isinstance(name, str):
        raise ConfigError("task.name", name, f"one of {', '.join(known)}, or your own 'module:function'")
    if name in known:
        maker = imported("task.name", name, known[name])
        if name in TASKS:
            options["name"] = name
    elif ":" in name:
        maker = imported("task.name", name, name)
    else:
        raise ConfigError(
            "task.name",
            name,
            f"no such task.{did_you_mean(name, known)} There is {', '.join(known)}, or your own 'module:function'",
        )
    if dataclasses.is_dataclass(maker):
        settings = [f.name for f in dataclasses.fields(maker) if f.init]
        for key in options:
            if key not in settings:
                others = [s for s in settings if s != "name"]
                told = foreign.ours(f"task.{key}", [f"task.{other}" for other in others])
                near = f" {told}" if told else did_you_mean(key, others)
                raise ConfigError(
                    f"task.{key}",
                    options[key],
                    f"task {name!r} has no such setting.{near} It has {', '.join(others)}",
                )
        if name in TASKS:
            _check_words(maker, options)
    try:  # bound first, so that a TypeError inside a user's function keeps its own traceback
        inspect.signature(maker).bind(**options)
    except TypeError as error:
        raise ConfigError("task.name", name, str(error)) from error
    return maker(**options)


_TEXTS = ("metric", "dataset", "benchmark", "instruction", "prefix")
"""Settings that are texts; names of columns are looked at where they are read."""


def _check_words(maker: Any, options: Mapping[str, Any]) -> None:
    """Raises `ConfigError` for a switch that is neither true nor false (``"no"`` would be true), and for no text."""
    kinds = {f.name: str(f.type).removesuffix(" | None") for f in dataclasses.fields(maker)}
    for key, value in options.items():
        if kinds[key] == "bool" and not isinstance(value, bool | None):
            raise ConfigError(f"task.{key}", value, "true or false")
        if key in _TEXTS and not isinstance(value, str | None):
            raise ConfigError(f"task.{key}", value, "a text")
