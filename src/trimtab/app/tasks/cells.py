"""What a cell says that holds more than a text: JSON, or a list as Python prints it; a flag; a number."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import tokenize
from typing import Any

from ...errors import DataError
from .data import is_missing


def loads(value: Any) -> Any:
    """The list or object that a text is, in JSON or as Python or numpy prints it (pandas' to_csv); None for any other.

    >>> loads('["a"]'), loads("['a' 'b']"), loads("{'text': array(['a', 'b'], dtype=object)}"), loads("a")
    (['a'], ['a', 'b'], {'text': ['a', 'b']}, None)
    """
    if not isinstance(value, str) or value.strip()[:1] not in ("[", "{"):
        return None
    for read in (json.loads, _printed):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            return read(value)
    return None


def _printed(text: str) -> Any:
    """What Python or numpy prints. The latter leaves out commas, without which Python makes one text of several."""
    found: list[str] = []
    tokens = [t for t in tokenize.generate_tokens(io.StringIO(text.strip()).readline) if t.string.strip()]
    words = [t.string for t in tokens]
    skip = 0
    for i, (word, token) in enumerate(zip(words, tokens)):
        if words[i : i + 2] == ["array", "("]:
            continue
        if words[i : i + 3] == [",", "dtype", "="]:  # and what follows
            skip = 4
        if skip:
            skip -= 1
            continue
        begins = word in ("[", "{", "(") or token.type in (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)
        if begins and found and found[-1] not in ("[", "{", "(", ",", ":", "-"):
            found.append(",")
        found.append(word)
    return ast.literal_eval(" ".join(found))


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


def whole(value: Any) -> int | None:
    """The whole number that a cell is, as a float or a text, too: 1, 1.0, "1"; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    found = re.fullmatch(r"\s*(-?\d+)(\.0*)?\s*", str(value))
    return int(found[1]) if found else None


def is_texts(value: Any) -> bool:
    """Whether a cell is a text, or several."""
    return not isinstance(value, dict) and all(isinstance(t, str) for t in (value if isinstance(value, list) else ()))
