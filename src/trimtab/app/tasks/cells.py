"""What a cell says that holds more than a text: JSON, or a list as Python prints it; a flag; a number."""

from __future__ import annotations

import ast
import contextlib
import json
from typing import Any

from ...errors import DataError
from .data import is_missing


def loads(value: Any) -> Any:
    """The list or object that a text is, in JSON or as Python prints it (pandas' to_csv); None for any other."""
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return read(value)
    return None


def from_json(value: Any, what: str, where: str) -> Any:
    """A list or object, also one that a cell holds as text, as in CSV files; None for none."""
    if is_missing(value):
        return None
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        if (read := loads(value)) is not None:
            return read
        try:
            json.loads(value)
        except ValueError as error:
            raise DataError(f"{where}: its {what} is not valid JSON: {error}") from error
    return value


def written_out(value: Any, what: str, where: str) -> str:
    """A text; a number or a truth as one."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if not isinstance(value, str):
        found = "is empty" if value is None else f"is a {type(value).__name__}"
        raise DataError(f"{where}: its {what} {found}, where a text is needed")
    return value


def flag(value: Any) -> bool | None:
    """What 0 and 1, false and true say, as text, too; None for anything else."""
    word = str(value).strip().lower().removesuffix(".0")
    return True if word in ("1", "true") else False if word in ("0", "false") else None


def is_texts(value: Any) -> bool:
    """Whether a cell is a text, or several."""
    return not isinstance(value, dict) and all(isinstance(t, str) for t in (value if isinstance(value, list) else ()))
