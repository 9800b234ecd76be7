"""Labels as files write them: classes by their spelling, numbers by their units, several in one.

What a label means does not hang on the file's format: 1, 1.0 and "1" are one class, 12% is a number.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ...errors import DataError

_UNIT = "[%‰$¢-¥฿₠-\u20cf﹪％＄￠￡￥￦]"
_WITH_UNIT = re.compile(rf"([-+]?)\s*({_UNIT}?)\s*([-+]?\d[\d.,]*)\s*({_UNIT}?)")


def class_key(value: Any, number: int, source: str) -> str:
    """The class that a label means, whatever the file's format made of it: 1, 1.0, "1" and "1.0" are one.

    >>> [class_key(value, 1, "x") for value in (1, 1.0, "1.0", " 1", True, "True", "1.5", "good")]
    ['1', '1', '1', '1', 'true', 'true', '1.5', 'good']
    """
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        hint = "; set task.regression=true to predict a number" if isinstance(value, float) else ""
        raise DataError(f"{source}: row {number} has label {value!r}, not a class name or whole number{hint}")
    text = str(value)
    if whole := re.fullmatch(r"(-?\d+)(\.0*)?", text.strip()):
        return whole[1]
    return text.lower() if text in ("True", "TRUE", "False", "FALSE") else text


def spelling(value: Any, fold: bool) -> str:
    """A class as it is named where most of its rows write it so."""
    key = class_key(value, 0, "")
    if isinstance(value, str) and key in ("true", "false"):
        return value
    return " ".join(key.split()) if fold else key


def folded(name: str) -> str:
    """The same for names that differ in blanks, case or what has no width.

    >>> folded(" Bad"), folded("bad\u200b")
    ('bad', 'bad')
    """
    seen = re.sub("[\u00ad\u200b-\u200d\u2060\ufeff]", "", unicodedata.normalize("NFKC", name))
    return " ".join(seen.split()).casefold()


def joined(classes: Iterable[str]) -> list[str]:
    """Classes that look like several in one: of their parts one is elsewhere, too.

    >>> joined(["a|b", "a", "c, d"])
    ['a|b']
    """
    parts = {key: re.split(r"\s*[,;|]\s*", key.strip()) for key in classes}
    times = Counter(part for several in parts.values() for part in several)
    return [key for key, several in parts.items() if len(several) > 1 and any(times[part] > 1 for part in several)]


def units(values: Iterable[Any]) -> set[str]:
    """The units (%, $, €) of numbers, ``""`` for one without; nothing where not every value is a number.

    >>> sorted(units(["$5", "5 €", "7"])), units(["5 stars", "5%"])
    (['', '$', '€'], set())
    """
    found = set()
    for value in values:
        if not (read := _WITH_UNIT.fullmatch(str(value).strip())):
            return set()
        found.add(read[2] + read[4])
    return found


def unit_of(values: Iterable[Any]) -> str:
    """The unit that all of some numbers have; none where they have several, or are none.

    >>> unit_of(["12%", "7,5 %"]), unit_of(["$5", "5 €"])
    ('%', '')
    """
    found = units(values)
    return found.pop() if len(found) == 1 else ""


def without_unit(values: Sequence[Any]) -> Sequence[Any]:
    """Numbers without the unit that all of them have; anything else stays.

    >>> without_unit(["12%", "7 %"]), without_unit(["-$5", "$10"]), without_unit(["$5", "5 €"])
    (['12', '7'], ['-5', '10'], ['$5', '5 €'])
    """
    unit = unit_of(values)
    return ["".join(str(value).replace(unit, "").split()) for value in values] if unit else values


def number(value: Any, row: int, source: str) -> float:
    """A label that is a number.

    Raises:
        DataError: it is no number, or not finite.
    """
    try:
        out = float(value)
    except (TypeError, ValueError):
        out = math.nan
    if not math.isfinite(out):
        raise DataError(f"{source}: row {row} has label {value!r}, not a finite number (task.regression)")
    return out
