"""A run's answers to rows of a file: the class and its probability, a number, or what is written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DataError
from . import model_facts, models, trainer_settings
from .job import Job, knows_classes
from .planning import model_spec
from .recipe import Recipe
from .report.words import plural
from .rows import by_length, load_rows
from .runfolder import RunFolder
from .screen import Screen
from .trained import class_names, give_template, task_of_run, with_adapter
from .trainer import make_trainer

if TYPE_CHECKING:
    from datasets import Dataset

_MOST_CLASSES = 20
"""With more of them, only the likeliest class's probability is told."""


def predict(recipe: Recipe, folder: RunFolder, file: Path, screen: Screen) -> list[dict[str, Any]]:
    """What the run says to each row of a file, in its order. Neither the training rows nor labels are needed.

    Returns:
        For each row ``row`` (from 1) and ``prediction`` with ``probability`` and ``probabilities``, or ``answer``
        (``answers`` where several are drawn). Rows without a text have None, and a ``reason``.
    """
    from datasets import DatasetDict

    from .tasks.data import DataSpec, existing_file

    existing_file("FILE", file)
    task = task_of_run(recipe, class_names(folder))
    with screen.stage("load") as stage:
        if not hasattr(task, "ask"):
            raise DataError(f"task {task.name!r}: has no predictions (a task needs `ask` for them)")
        reading = ("separator", "encoding", "quotes", "missing")
        given = {key: value for key, value in (recipe.data.to_load or {}).items() if key in reading}
        spec = DataSpec.read({**given, "test": str(file)}, ("test",), lines=getattr(task, "reads_lines", None))
        n, rows, places = task.ask(spec)
        tokenizer = models.load_tokenizer(model_spec(recipe), task)
        give_template(tokenizer, folder)
        if not knows_classes(task):
            load_rows(recipe, task)  # a run from before the names were kept
        loaded = models.load_model(model_spec(recipe), task, tokenizer)
        model = with_adapter(loaded.model, folder, screen)
        stage.result = f"{recipe.model.name_or_path} · {plural(n, 'row')}"
    key = "answer" if hasattr(task, "answers") else "prediction"
    reason = getattr(task, "unasked", "no text")
    out: list[dict[str, Any]] = [{"row": i + 1, key: None, "reason": reason} for i in range(n)]
    with screen.stage("predict") as stage:
        raw = DatasetDict({"test": rows})
        if hasattr(task, "answers"):
            found = _answers(task, model, tokenizer, raw, stage.bar)
        else:
            ready = task.prepare(raw, tokenizer, model)
            job = Job(_without_training(recipe), task, raw, tokenizer, model, (), ready)
            found = _classes(task, _outputs(job, folder, ready["test"]))
        for i, one in zip(places, found):
            out[i] = {"row": i + 1, **one}
        stage.result = f"{len(places)} of {n} rows"
    return out


def _without_training(recipe: Recipe) -> Recipe:
    """The recipe without what belongs to training and its evaluations."""
    gone = ("load_best_model_at_end", "metric_for_best_model", "eval_strategy", "save_strategy", "report_to")
    train = {key: value for key, value in recipe.train.items() if key not in gone}
    return recipe.model_copy(update={"train": train, "early_stopping": None, "rates": None})


def _outputs(job: Job, folder: RunFolder, rows: Dataset) -> np.ndarray:
    trainer = make_trainer(job, job.model, folder, callbacks=[])
    trainer_settings.score_every_row(trainer.args)
    rows, places = by_length(rows)
    predicted = trainer.predict(rows, ignore_keys=model_facts.unread_outputs(job.model)).predictions  # type: ignore[arg-type]
    return np.asarray(predicted[0] if isinstance(predicted, tuple) else predicted, np.float64)[places]


def _classes(task: Any, outputs: np.ndarray) -> list[dict[str, Any]]:
    """From outputs (rows, classes), or (rows,) numbers."""
    names: Sequence[str] | None = task.label_names
    if names is None:
        return [{"prediction": value} for value in outputs.reshape(-1).tolist()]
    shares = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    found = []
    for row in shares:
        best = int(row.argmax())
        one: dict[str, Any] = {"prediction": names[best], "probability": round(float(row[best]), 6)}
        if len(names) <= _MOST_CLASSES:
            one["probabilities"] = {name: round(float(share), 6) for name, share in zip(names, row)}
        found.append(one)
    return found


def _answers(task: Any, model: Any, tokenizer: Any, raw: Any, make_bar: Any) -> list[dict[str, Any]]:
    import torch

    model = model.to("cuda") if torch.cuda.is_available() and not getattr(model, "is_quantized", False) else model
    texts = task.answers(model, tokenizer, raw["test"], "test", make_bar=make_bar)
    return [{"answer": some[0]} if len(some) == 1 else {"answers": some} for some in texts]
