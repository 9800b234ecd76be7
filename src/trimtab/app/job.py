"""What a recipe names, read and ready: the task with its rows, the tokenizer, the base model."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError
from . import models, trainer_settings
from .planning import horizon_of, model_spec, plan_recipe, with_layer_ratio
from .recipe import Recipe
from .report.words import count
from .rows import load_rows, rows_known
from .screen import Screen
from .trainer import training_arguments

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import nn

    from .tasks import Task


@dataclass(frozen=True)
class Job:
    """What every stage needs: the recipe's task with its rows, and the base model."""

    recipe: Recipe
    task: Task
    rows: DatasetDict
    tokenizer: Any
    model: nn.Module
    modules_to_save: tuple[str, ...]
    ready: DatasetDict
    """Tokenised rows."""
    has_other_head: bool = False
    """Whether the base's checkpoint has a head of another shape."""

    @property
    def training_rows(self) -> Dataset:
        """Those of ``ready`` that are learned from.

        Raises:
            DataError: there are none.
        """
        if "train" not in self.ready:
            raise DataError(f"task {self.task.name!r}: the data has no 'train' split; it has {', '.join(self.ready)}")
        return self.ready["train"]


def load(recipe: Recipe, screen: Screen, task: Task | None = None, *, with_rows: bool = True) -> Job:
    """Task, rows, tokenizer and base model.

    A dry run comes first: targets that match nothing, a schedule that does not fit and the like are refused
    before any weights are read.

    Args:
        task: the recipe's, with what is known of it from elsewhere.
        with_rows: else none are read, unless the task knows its classes by them alone.
    """
    trainer_settings.check_machine(recipe.train)
    from datasets import DatasetDict
    from transformers import set_seed

    from .tasks import get_task

    with screen.stage("load") as stage:
        task = task or get_task(recipe.require_task().model_dump())
        spec = model_spec(recipe)
        bar = stage.bar(None, "data")
        training_arguments(recipe, task, Path())  # before rows and weights are read
        rows = load_rows(recipe, task) if with_rows or not knows_classes(task) else DatasetDict()
        if (share := recipe.train.get("label_smoothing_factor")) and getattr(task, "label_names", ()) is None:
            raise ConfigError("train.label_smoothing_factor", share, "smooths classes, and these labels are numbers")
        if "train" in rows:
            plan_recipe(recipe, horizon_of(recipe, rows_known(task, rows)), task)
        bar.say("model")
        tokenizer = models.load_tokenizer(spec, task)
        set_seed(recipe.seed)  # a new head is drawn here
        loaded = models.load_model(spec, task, tokenizer)
        bar.say("tokens")
        ready = task.prepare(rows, tokenizer, loaded.model)
        if start_head := getattr(task, "start_head", None):  # a task of one's own need not have it
            start_head(loaded.model, loaded.modules_to_save, ready)
        counted = ", ".join(f"{count(len(split))} {name}" for name, split in ready.items())
        if "train" in rows:
            horizon = horizon_of(recipe, len(ready["train"]))
            recipe = with_layer_ratio(recipe, loaded.model, horizon, task.task_type, loaded.modules_to_save)
        stage.result = " · ".join(filter(None, (recipe.model.name_or_path, counted and f"{counted} rows")))
    for note in (*task.notes, *loaded.notes):
        screen.note(note)
    return Job(recipe, task, rows, tokenizer, loaded.model, loaded.modules_to_save, ready, loaded.has_other_head)


def knows_classes(task: Task) -> bool:
    """Whether a task can say its classes without the training rows."""
    try:
        task.model_kwargs()
    except ConfigError:  # before the training rows are read
        return False
    return True


def trained_on(job: Job) -> dict[str, Any]:
    """What the training rows hold, by which a later command knows them again: run.json keeps it."""
    if "train" not in job.rows:
        return {}
    names = getattr(job.task, "label_names", None)
    found = {"rows": len(job.rows["train"]), "fingerprint": fingerprint(job.rows["train"], whole=True)}
    return {**found, "classes": list(names)} if names else found


def data_of(job: Job) -> dict[str, Any]:
    """What was read: rows and classes of each split, and what was said of them."""
    names, column = getattr(job.task, "label_names", None), getattr(job.task, "label_column", "")
    classes = {}
    for split, part in job.rows.items():
        if names is not None and column in part.column_names:
            counts = Counter(part[column][:])
            classes[split] = {name: counts[i] for i, name in enumerate(names)}
    rows = {split: len(part) for split, part in job.ready.items()}
    return {"rows": rows, **({"classes": classes} if classes else {}), "notes": list(dict.fromkeys(job.task.notes))}


def fingerprint(rows: Dataset, *, whole: bool = False) -> str:
    """Of the content of raw rows, wherever they were read from. Unless it is ``whole``, only what is to be answered
    counts of a conversation: how it is asked may differ between runs that are compared."""
    found = hashlib.sha256()
    for batch in rows.iter(1000):  # a tenth of the time of one by one
        if "messages" in batch and not whole:
            answers = [[m["content"] for m in turns if m["role"] == "assistant"] for turns in batch["messages"]]
            batch["messages"] = answers
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            found.update(json.dumps(row, sort_keys=True, default=_digest).encode())
    return found.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)
