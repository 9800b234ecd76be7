"""What a column looks like: text or numbers, classes or a scale, by the values that stand in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .columns import Columns
from .data import is_missing
from .labels import without_unit
from .names import names_rows

_DATE = re.compile(r"\d{4}[-/.]\d{1,2}[-/.]\d{1,2}([T ].*)?|\d{1,2}[-/.]\d{1,2}[-/.](\d{2}|\d{4})( .*)?")
_MOST_CLASSES = 50
"""Of a column that is not called a label."""


@dataclass(frozen=True)
class Column:
    """A column's name, and the values in it that are there."""

    name: str
    values: list[Any]
    rows: int

    @property
    def is_text(self) -> bool:
        return all(isinstance(value, str) for value in self.values)

    @property
    def is_plain(self) -> bool:
        return all(isinstance(value, (str, int, float)) for value in self.values)

    @cached_property
    def numbers(self) -> list[float] | None:
        if any(isinstance(value, bool) for value in self.values):
            return None
        try:
            return [float(value) for value in without_unit(self.values)]
        except (TypeError, ValueError):
            return None

    @property
    def length(self) -> float:
        return sum(len(str(value)) for value in self.values) / len(self.values)

    @property
    def is_prose(self) -> bool:
        """Three words or more, in the mean."""
        return sum(len(str(value).split()) for value in self.values) >= 3 * len(self.values)

    @property
    def n_different(self) -> int:
        return len({re.sub(r"\.0+$", "", str(value).strip()) for value in self.values})  # 1.0 is 1

    @property
    def counts_rows(self) -> bool:
        return self.numbers is not None and self.numbers == [self.numbers[0] + i for i in range(self.rows)]

    @property
    def is_scale(self) -> bool:
        """Numbers that are more or less, rather than names of classes."""
        if self.numbers is None:
            return False
        return not all(n.is_integer() for n in self.numbers) or self.n_different > min(20, self.rows / 2)

    @property
    def repeats(self) -> bool:
        """Whether few short values come again and again, as those of classes do."""
        several = 2 <= self.n_different <= min(_MOST_CLASSES, self.rows / 3)
        return self.is_plain and several and self.length < 40 and not self.is_of_dates

    @property
    def is_of_dates(self) -> bool:
        return all(_DATE.fullmatch(str(value).strip()) for value in self.values)

    @property
    def is_free_text(self) -> bool:
        """Text that is neither numbers, nor classes, nor what tells rows apart."""
        return self.is_text and self.numbers is None and not self.repeats and not names_rows(self.name)


def filled(table: Columns) -> dict[str, Column]:
    """The columns of a table that hold something."""
    found = {}
    for name, values in table.items():
        if there := [value for value in values if not is_missing(value)]:
            found[name] = Column(name, there, len(values))
    return found
