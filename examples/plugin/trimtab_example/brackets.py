"""A task that makes its own rows: are these brackets balanced?

What a run asks of a task is written down in `trimtab.app.tasks.Task`. One that classifies texts gets most of it from
`SequenceClassification`, and says which columns there are, which classes, which scores, and how rows are read.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from trimtab.app.tasks.classification import SequenceClassification, accuracy
from trimtab.app.tasks.data import DataSpec
from trimtab.errors import ConfigError

PAIRS = ("()", "[]", "{}")


@dataclass(kw_only=True)
class Brackets(SequenceClassification):
    """The fields are the settings of the recipe's ``task:``."""

    pairs: int = 6
    """Pairs of brackets in a text."""
    rows: int = 2000
    """Training rows; a quarter as many are for validation."""
    max_length: int | None = None
    notes: list[str] = field(default_factory=list, init=False)

    name = "brackets"
    metric = "accuracy"
    text_columns = ("text",)
    label_column = "label"
    label_names = ("unbalanced", "balanced")
    scores = {"accuracy": accuracy}  # noqa: RUF012

    def __post_init__(self) -> None:
        self.check_settings()
        for key, least in (("pairs", 2), ("rows", 8)):
            value = getattr(self, key)
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"task.{key}", value, f"a whole number, at least {least}")
        self.train_rows = self.rows  # known without data, so that a plan has steps

    def load_data(self, data: Mapping[str, Any] | None = None) -> Any:
        from datasets import Dataset

        spec = DataSpec.read(data, ("train", "validation"))
        if spec.files:
            raise ConfigError("data", list(spec.files), "this task makes its own rows")
        sizes = {"train": self.rows, "validation": self.rows // 4}
        tables = {split: Dataset.from_list(self._rows(split, n)) for split, n in sizes.items()}
        return self.split_and_sample(tables, spec)

    def _rows(self, split: str, n: int) -> list[dict[str, Any]]:
        """Half of them balanced; the same rows whatever the run's seed is."""
        generator = random.Random(split)
        found = []
        for i in range(n):
            text = balanced(self.pairs, generator)
            while i % 2 == 0 and is_balanced(text):
                text = generator.sample(text, len(text))
            found.append({"text": " ".join(text), "label": i % 2})
        return found


def balanced(pairs: int, generator: random.Random) -> list[str]:
    """A random balanced text, one bracket an item."""
    text: list[str] = []
    still_open: list[str] = []
    left = pairs
    while left or still_open:
        if left and (not still_open or generator.random() < 0.5):
            opening, closing = generator.choice(PAIRS)
            text.append(opening)
            still_open.append(closing)
            left -= 1
        else:
            text.append(still_open.pop())
    return text


def is_balanced(text: list[str]) -> bool:
    """
    >>> is_balanced(list("([])")), is_balanced(list("([)]"))
    (True, False)
    """
    closing = dict(PAIRS)
    still_open: list[str] = []
    for bracket in text:
        if bracket in closing:
            still_open.append(closing[bracket])
        elif not still_open or still_open.pop() != bracket:
            return False
    return not still_open
