"""The rows of a recipe: the task's own or the user's, and of the training rows those that are held out."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import ConfigError
from .hub import offline_without_hub
from .recipe import FILES, Recipe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

    from .tasks import Task


def load_rows(recipe: Recipe, task: Task) -> DatasetDict:
    """The task's raw rows; with ``data.held_out`` the training rows alone, a part of them to be scored."""
    has_files = any(getattr(recipe.data, split) for split in FILES)
    with contextlib.nullcontext() if has_files else offline_without_hub():
        rows = task.load_data(recipe.data.to_load)
    if recipe.data.held_out is None or "train" not in rows:
        return rows
    from datasets import DatasetDict

    others = [split for split in rows if split != "train"]
    name = "validation" if "validation" in others or not others else others[0]  # one that the task scores
    train = rows["train"]
    column = getattr(task, "label_column", None)
    labels = train[column][:] if column in train.column_names else None
    held = held_rows(recipe.data.held_out, len(train), labels, recipe.data.held_out_seed or 0)
    rest = sorted(set(range(len(train))) - set(held))
    of_others = (*(f"{split}:" for split in others), "no data.")
    task.notes[:] = [note for note in task.notes if not note.startswith(of_others)]
    task.notes.append(
        f"data.held_out: {len(held)} of {len(train)} training rows are scored, in place of validation and test"
    )
    return DatasetDict({"train": train.select(rest), name: train.select(held)})


def by_length(ready: Dataset) -> tuple[Dataset, list[int]]:
    """Tokenised rows, the shortest first, so that a batch pads little; and the place that each row went to.

    Rows without tokens, as of images, stay as they are.
    """
    n = len(ready)
    if "input_ids" not in ready.column_names:
        return ready, list(range(n))
    batches = ready.select_columns("input_ids").iter(1000)  # all at once, as lists, may not fit into memory
    lengths = [len(ids) for batch in batches for ids in batch["input_ids"]]
    order = sorted(range(n), key=lengths.__getitem__)
    return ready.select(order), sorted(range(n), key=order.__getitem__)


def rows_known(task: Task, rows: DatasetDict) -> int | None:
    """Training rows; None of a task that makes other rows of them once it has a tokenizer."""
    return len(rows["train"]) if getattr(task, "counts_rows", True) else None


def rows_on_the_hub(recipe: Recipe, task: Task) -> int | None:
    """Training rows that the task will fetch, less what ``data.max_samples`` leaves out; None if that is unknown."""
    if recipe.data.hub or any(getattr(recipe.data, split) for split in FILES):
        return None
    rows = getattr(task, "train_rows", None)
    most = recipe.data.max_samples
    most = most.get("train") if isinstance(most, dict) else most
    rows = rows if rows is None or most is None else min(rows, most)
    return rows if rows is None or recipe.data.held_out is None else rows - _n_held(recipe.data.held_out, rows)


def _n_held(held_out: float | int, n: int) -> int:
    """How many of n training rows are held out."""
    held = held_out if isinstance(held_out, int) else max(1, round(held_out * n))
    if held >= n:
        raise ConfigError("data.held_out", held_out, f"leaves none of {n} training rows to learn from")
    return held


def held_rows(held_out: float | int, n: int, labels: Sequence[float] | None, seed: int) -> list[int]:
    """Which of n training rows are held out, in file order: of every class (or range of numbers) its share, and never
    all of a class."""
    from .tasks.data import drawn

    return drawn(n, _n_held(held_out, n), seed, labels, spare=1)
