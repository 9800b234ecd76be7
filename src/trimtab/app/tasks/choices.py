"""Answers to choose from: put under the question, and named by their letters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from .cells import loads, whole
from .columns import Columns
from .data import is_missing
from .forms import CHOICES, LETTERS


@dataclass(frozen=True)
class Choices:
    """Those of each row."""

    columns: tuple[str, ...]
    """Where they stand: one column of lists, or a column A, one B, …"""
    rows: list[dict[str, str]]
    """Letter -> text; nothing where a row has none."""

    def put_to(self, prompts: Sequence[Any]) -> list[Any]:
        """The prompts, each with its choices below it."""
        return [
            f"{prompt}\n\n" + "\n".join(f"{letter}. {text}" for letter, text in own.items())
            if own and isinstance(prompt, str)
            else prompt
            for prompt, own in zip(prompts, self.rows)
        ]

    def places(self, answers: Sequence[Any], missing: frozenset[str]) -> list[Any] | None:
        """Answers that are whole numbers, as the places of the right choices are; None where they are none.

        They are none where each is one of its row's choices, or its letter; those that are texts, as all are in CSV,
        must be places that there are.
        """
        found = [None if is_missing(value, missing) else whole(value) for value in answers]
        there = [i for i, value in enumerate(answers) if not is_missing(value, missing)]
        if all(str(answers[i]).strip() in {*self.rows[i], *self.rows[i].values()} for i in there):
            return None
        for i in there:
            place = found[i]
            if place is None or (isinstance(answers[i], str) and not 0 <= place < len(self.rows[i])):
                return None
        return found

    def letters(self, places: Sequence[Any], wheres: Sequence[str]) -> list[Any]:
        """The letters of answers that are places, counted from 0.

        Raises:
            DataError: a row has no choice in that place.
        """
        found = []
        for place, own, where in zip(places, self.rows, wheres):
            is_place = isinstance(place, int) and bool(own)
            if is_place and not 0 <= place < len(own):
                raise DataError(f"{where}: its answer {place} is none of its {len(own)} choices, counted from 0")
            found.append(list(own)[place] if is_place else place)
        return found


def choices_of(table: Columns, missing: frozenset[str]) -> Choices | None:
    """The choices that stand in a column, or in columns A, B, …; None where there are none."""
    for name in CHOICES:
        rows = [_read(value, missing) for value in table.get(name, ())]
        if rows and None not in rows:
            return Choices((name,), [own or {} for own in rows])
    letters = tuple(letter for letter in LETTERS if letter in table)
    if letters[:2] != ("A", "B"):
        return None
    each = zip(*(table[letter] for letter in letters))
    return Choices(letters, [{a: str(v) for a, v in zip(letters, row) if not is_missing(v, missing)} for row in each])


def _read(value: Any, missing: frozenset[str]) -> dict[str, str] | None:
    """A list of texts, or an object of letters or of lists ``label`` and ``text`` (ARC); None for no such thing."""
    if is_missing(value, missing):
        return {}
    read = loads(value) if isinstance(value, str) else value
    if isinstance(read, dict) and isinstance(read.get("text"), list):
        read = dict(zip(map(str, read.get("label") or LETTERS), read["text"]))
    if isinstance(read, list) and len(read) <= len(LETTERS):
        read = dict(zip(LETTERS, read))
    if not isinstance(read, dict) or not all(isinstance(text, (str, int, float)) for text in read.values()):
        return None
    return {str(letter): str(text) for letter, text in read.items()} if all(len(str(k)) == 1 for k in read) else None
