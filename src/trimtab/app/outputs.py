"""Where a command may write what ``--out`` names: nothing is replaced but an earlier output of the same command.

Asked before the work, which may take hours; what can be known only while writing is `storage`'s to tell.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import ConfigError
from .session import names_in

_READ = 1 << 20
"""Characters of a file by which it is known."""


def check_file(out: Path, is_ours: Callable[[str], bool], what: str, *, but: Iterable[Path] = ()) -> None:
    """Raise `ConfigError` where a file cannot be written, or where another's would be lost.

    Args:
        is_ours: whether a file that begins with this text is such an output.
        what: it is, in words.
        but: files that the command reads.
    """
    _check_place(out)
    if any(path.exists() and out.exists() and out.samefile(path) for path in but):
        raise ConfigError("out", str(out), "is the file that is read; name another one")
    if not os.path.lexists(out):
        return
    if not out.is_file():
        raise ConfigError("out", str(out), "is no file; name one, or leave --out away: then it goes to stdout")
    with out.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_READ)
    if text.strip() and not is_ours(text):
        raise ConfigError("out", str(out), f"is there, and holds no {what}: name another file, or delete it first")


def check_folder(out: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """The same for a folder: what is in it must be such an output, or nothing."""
    _check_place(out)
    if not os.path.lexists(out):
        return
    if not out.is_dir():
        raise ConfigError("out", str(out), "is a file; name a folder")
    if names_in(out) and not is_ours(out):
        raise ConfigError(
            "out", str(out), f"is there, and holds no {what}: name a folder that is empty or not there yet"
        )


def _check_place(out: Path) -> None:
    above = next((path for path in out.absolute().parents if os.path.lexists(path)), out)
    if not above.is_dir():
        raise ConfigError("out", str(out), f"cannot be written: {above} is a file")
    if not os.access(above, os.W_OK):
        raise ConfigError("out", str(out), f"cannot be written: no permission to write to {above}")


def is_predictions(text: str) -> bool:
    """Rows of `trimtab predict`.

    >>> is_predictions('{"row": 1, "answer": "8"}\\n'), is_predictions('{"text": "a"}\\n')
    (True, False)
    """
    try:
        row = json.loads(text.partition("\n")[0])
    except ValueError:
        return False
    return isinstance(row, dict) and "row" in row and bool(row.keys() & {"prediction", "answer", "answers"})


def is_comparison(text: str) -> bool:
    """A page of `trimtab compare`."""
    return re.search(r"<title>[^<]* · Trimtab comparison</title>", text) is not None


def is_schema(text: str) -> bool:
    """What `trimtab schema` prints."""
    return '"title": "Trimtab recipe"' in text
