"""Rows of a user's files as columns, and how their files are to be read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Columns = dict[str, list[Any]]
"""A table: column name -> values, all of one length."""


class Table(Columns):
    """Columns, and what was found out while they were read."""

    def __init__(self, columns: Columns | None = None, notes: Iterable[str] = ()) -> None:
        super().__init__(columns or {})
        self.absent: dict[str, str] = {}
        """Columns that one of the files lacks (None in its rows), with that file's name."""
        self.nameless: list[int] = []
        """Places, from 1, of columns that hold something and have no name; they are not read."""
        self.separator: str | None = None
        """What stands between the columns, where that was found out and is not the usual."""
        self.notes = list(notes)

    def rows(self, chosen: Sequence[int]) -> Table:
        """Some of the rows."""
        part = Table({name: [values[i] for i in chosen] for name, values in self.items()}, self.notes)
        part.absent, part.nameless, part.separator = self.absent, self.nameless, self.separator
        return part


@dataclass(frozen=True)
class Reading:
    """How files are read, where the recipe says so; None: found out from each file."""

    separator: str | None = None
    encoding: str | None = None
    quotes: bool | None = None
    """Whether a quote around a cell is no part of it."""
    lines: str | None = None
    """What makes a text of a ``.txt`` file: line, paragraph or document. None: it is separated text."""


AS_FOUND = Reading()
