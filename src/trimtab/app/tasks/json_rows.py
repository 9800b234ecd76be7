"""Rows in JSON's many shapes: a list, one object a line, objects one after the other, columns, lists by split."""

from __future__ import annotations

import json
import re
from typing import Any

from ...errors import DataError
from .columns import Columns

_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "parts")
"""What a message calls who says it, and what is said: OpenAI's, ShareGPT's, Gemini's."""
_SHAPES = "a list of objects, one object a line, or an object that holds one list of objects"


# What a row's own text is called; beside one, a list of objects belongs to the row.
_TEXTS = {
    "text", "sentence", "sentence1", "review", "instruction", "prompt", "question", "problem", "query", "input",
    "inputs", "output", "completion", "response", "answer", "document", "article", "dialogue", "premise", "label",
}  # fmt: skip


def read_json(where: str, text: str, split: str, by_line: bool = False) -> Columns:
    """Rows from JSON: whole, or object after object, on one line each or not.

    Args:
        by_line: an object on one line is a row, as in JSON Lines, whatever lists it holds.
    """
    try:
        value = json.loads(text)
    except ValueError as whole:
        numbered, unit = _one_after_the_other(where, text, whole), "line"
    else:
        is_row = by_line and isinstance(value, dict) and "\n" not in text.strip()
        rows = [value] if is_row else _rows_within(where, value, split)
        if isinstance(rows, dict):
            return rows
        numbered, unit = list(enumerate(rows, 1)), "entry"
    if _HALF.search(text):
        numbered = [(number, _without_halves(row)) for number, row in numbered]
    table: Columns = {}
    for n, (number, row) in enumerate(numbered):
        if not isinstance(row, dict):
            raise DataError(f"{where}: {unit} {number} is {type(row).__name__}, not an object {{…}}")
        for name, value in row.items():
            if name not in table:
                table[name] = [None] * n
            table[name].append(value)
        for values in table.values():
            if len(values) <= n:
                values.append(None)
    return table


def _without_halves(value: Any) -> Any:
    """Half of a pair of surrogates, as texts have it that were cut in mid-emoji, is no character: U+FFFD instead."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_halves(inner) for inner in value]
    return {_without_halves(k): _without_halves(v) for k, v in value.items()} if isinstance(value, dict) else value


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value) and not is_chat(value)
    )


def is_chat(value: Any) -> bool:
    """Whether a list of objects is one conversation."""
    return isinstance(value, list) and any(
        isinstance(m, dict) and not m.keys().isdisjoint(ROLE_KEYS) and not m.keys().isdisjoint(CONTENT_KEYS)
        for m in value
    )


def _one_after_the_other(where: str, text: str, whole: ValueError) -> list[tuple[int, Any]]:
    """The values of JSON Lines, or of objects that were written one after the other over several lines."""
    found = []
    problem: DataError | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                problem = DataError(f"{where}: line {number} is not valid JSON: {error}")
                break
    if problem is None:
        return found
    if not found:  # the first line is no value: then it is not one a line
        if text.lstrip()[:1] == "[":
            raise DataError(f"{where}: not valid JSON: {whole}") from whole
        decoder, at, several = json.JSONDecoder(), 0, []
        while at < len(text):
            space = re.compile(r"[\s,]*").match(text, at)
            at = space.end() if space else at
            if at >= len(text):
                break
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error}; expected is {_SHAPES}") from error
            several.append((text.count("\n", 0, at) + 1, value))
            at = end
        return several
    raise problem


def _rows_within(where: str, value: Any, split: str) -> list[Any] | Columns:
    """The list of rows that a whole JSON file is or holds; or its columns, where it is written by columns."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a {type(value).__name__}; expected is {_SHAPES}")
    lists = {name: inner for name, inner in value.items() if _is_rows(inner)}
    if lists and any(is_chat(v) or (isinstance(v, str) and k.strip().lower() in _TEXTS) for k, v in value.items()):
        return [value]
    if split in lists:
        return lists[split]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len(lists) > 1:
        raise DataError(f"{where}: holds {len(lists)} lists of objects ({', '.join(lists)}); expected is {_SHAPES}")
    if {"columns", "data"} <= value.keys() and all(isinstance(row, list) for row in value["data"]):  # pandas' "split"
        return [dict(zip(value["columns"], row)) for row in value["data"]]
    inner = list(value.values())
    if any(map(is_chat, inner)):
        return [value]
    if inner and all(isinstance(column, list) for column in inner) and len(set(map(len, inner))) == 1:
        return value
    if isinstance(value.get(split), dict):
        return _rows_within(where, value[split], split)
    if len(inner) > 1 and all(isinstance(part, dict) for part in inner):
        has_names, is_long = (any(n.strip().lower() in _TEXTS for n in names) for names in (inner[0], value))
        is_long = is_long or len(inner[0]) > len(value) or list(inner[0]) == [str(i) for i in range(len(inner[0]))]
        if not has_names and is_long and all(column.keys() == inner[0].keys() for column in inner):
            return {name: list(column.values()) for name, column in value.items()}  # pandas': column -> index -> value
        if set.intersection(*map(set, inner)):  # name of a row -> the row
            return inner
    if len(inner) == 1 and isinstance(inner[0], dict):
        return _rows_within(where, inner[0], split)
    if not all(isinstance(part, (list, dict)) for part in inner):
        return [value]
    raise DataError(f"{where}: an object with {', '.join(map(repr, list(value)[:6]))}; expected is {_SHAPES}")
