"""Numbers and lists as a reader wants them: what every heading, tile and table of the report is made of."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NOTHING = "–"


def finite(value: Any) -> float | None:
    """The number, or ``None`` for anything that is not one (NaN, infinity, text, a missing value).

    >>> finite(float("nan")), finite(2)
    (None, 2)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return value


def number(value: float | None, digits: int = 4) -> str:
    """A measured value with a fixed number of significant digits, trailing zeros dropped.

    >>> number(0.612345), number(0.5), number(1234567.0), number(None), number(2e-05), number(float("nan"))
    ('0.6123', '0.5', '1,234,567', '–', '2e-05', 'NaN')
    """
    if value is None:
        return NOTHING
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else f"{value}"
    if abs(value) >= 10 ** (digits - 1) or value == int(value):
        return count(value) if abs(value) < 1e15 else f"{value:.{digits}g}"
    return f"{value:.{digits}g}"


def count(value: float | None) -> str:
    """A whole number with thousands separated.

    >>> count(294912), count(123456.7)
    ('294,912', '123,457')
    """
    return NOTHING if value is None else f"{round(value):,}"


def short_count(value: float | None) -> str:
    """A count that fits a tile.

    >>> short_count(294912), short_count(319815680), short_count(1.2e10)
    ('294,912', '319.8 M', '12.0 B')
    """
    if value is None or abs(value) < 1e7:
        return count(value)
    return f"{value / 1e9:.1f} B" if abs(value) >= 1e9 else f"{value / 1e6:.1f} M"


def byte_size(value: float | None) -> str:
    """Bytes in binary units.

    >>> byte_size(512), byte_size(1536), byte_size(3 * 2**30), byte_size(None)
    ('512 B', '1.5 KiB', '3.0 GiB', '–')
    """
    if value is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def duration(seconds: float | None) -> str:
    """A length of time in the two largest units that matter.

    >>> duration(0.0312), duration(41.2), duration(134), duration(7265)
    ('31.2 ms', '41.2 s', '2 min 14 s', '2 h 01 min')
    """
    if seconds is None:
        return NOTHING
    if abs(seconds) < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def sentence(text: str) -> str:
    """The text with a capital in front; the rest is left as it is.

    >>> sentence("loss fell; SoRA won")
    'Loss fell; SoRA won'
    """
    return text[:1].upper() + text[1:]


def plural(n: float, noun: str, nouns: str | None = None) -> str:
    """A count with its noun.

    >>> plural(1, "prune"), plural(3, "matrix", "matrices")
    ('1 prune', '3 matrices')
    """
    return f"{count(n)} {noun if round(n) == 1 else nouns or noun + 's'}"


def change(before: float | None, after: float | None) -> str:
    """A relative change as a signed percentage; empty where there is none to speak of.

    >>> change(200, 50), change(1.0, 1.25), change(0, 3), change(5, 5)
    ('−75 %', '+25 %', '', '')
    """
    if not before or after is None or after == before:
        return ""
    percent = 100 * (after - before) / abs(before)
    digits = 1 if 0 < abs(percent) < 10 else 0
    return f"{'−' if percent < 0 else '+'}{abs(percent):.{digits}f} %"


def moved(before: float | None, after: float | None) -> str:
    """The verb for a change.

    >>> moved(2, 1), moved(1, 2), moved(1, 1)
    ('fell', 'rose', 'stayed')
    """
    if before is None or after is None or before == after:
        return "stayed"
    return "fell" if after < before else "rose"


def ranges(indices: Iterable[int]) -> str:
    """Indices with runs joined.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0–2, 5, 7, 8'
    """
    runs: list[list[int]] = []
    for i in sorted(indices):
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [f"{run[0]}–{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return ", ".join(parts) or "none"


def listing(words: Sequence[str]) -> str:
    """Words in a row, the last after "and".

    >>> listing(["a", "b", "c"])
    'a, b and c'
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def some(words: Sequence[str], limit: int = 12) -> str:
    """The first few of a list, as text.

    >>> some(["a", "b", "c"], 2), some(["a"], 2)
    ('a, b, …', 'a')
    """
    return ", ".join(words[:limit]) + (", …" if len(words) > limit else "")


def progress(metrics: Mapping[str, Any]) -> str:
    """``step 100 of 300`` for scores of a run that had not ended; empty for any other."""
    found = metrics.get("unfinished")
    return f"step {count(found['step'])} of {count(found['of'])}" if found else ""


def short_labels(names: Sequence[str]) -> list[str]:
    """The shortest tail of each dotted name that no other shares.

    >>> short_labels(["attention.self.query", "attention.output.dense", "output.dense", "intermediate.dense"])
    ['query', 'attention.output.dense', 'output.dense', 'intermediate.dense']
    """
    parts = [name.split(".") for name in names]
    kept = [1] * len(names)
    while True:
        labels = [".".join(p[-k:]) for p, k in zip(parts, kept)]
        clash = [i for i, label in enumerate(labels) if labels.count(label) > 1 and kept[i] < len(parts[i])]
        if not clash:
            return labels
        for i in clash:
            kept[i] += 1


def thin(n: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 … n−1, evenly spread, the first and the last among them.

    >>> thin(3, 5), thin(10, 4)
    ([0, 1, 2], [0, 3, 6, 9])
    """
    if n <= most:
        return list(range(n))
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})
