"""How the scored rows were judged: against one answer for all of them, class by class, and the worst of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .runfolder import RunFolder
from .words import count, finite, number, plural

MOST_CLASSES = 30
"""A table of confusions is shown up to so many."""


@dataclass(frozen=True)
class OfClass:
    """One class; a share is ``None`` where it would be of nothing."""

    name: str
    rows: int
    precision: float | None
    recall: float | None
    f1: float | None


@dataclass(frozen=True)
class Judged:
    """The split that the headline score is of."""

    split: str
    finding: str
    worst_finding: str
    constant: str
    """``always 'good': 0.5``, empty where answers are written."""
    classes: list[OfClass]
    confusion: list[list[int]]
    """By right class, then given class; empty where there are too many."""
    worst: list[tuple[str, str]]
    """Text of a row, and how it was judged."""


def judged(run: RunFolder, metric: str | None) -> Judged | None:
    """What predictions.json tells of the headline split; None where it tells nothing."""
    split, kept = next(iter(run.predictions.items()), ("", {}))
    names, labels, given = (kept.get(key) or [] for key in ("classes", "label", "predicted"))
    worst = [_row_and_verdict(row) for row in kept.get("worst") or ()]
    constant = _constant(kept.get("constant") or {}, metric)
    counts = [[0] * len(names) for _ in names]
    if names:
        for label, answer in zip(labels, given):
            counts[int(label)][int(answer)] += 1
    if not (counts or worst or constant):
        return None
    classes = [_of_class(i, name, counts) for i, name in enumerate(names)]
    shown = counts if len(names) <= MOST_CLASSES else []
    of_what = {"probability": "furthest from the right class", "loss": "least expected"}
    kind = next((of_what[key] for key in of_what if any(key in row for row in kept.get("worst") or ())), "furthest off")
    return Judged(
        split=split,
        finding=_finding(split, names, counts, classes),
        worst_finding=f"{plural(len(worst), 'row')} of {split}, {kind}" if worst else "",
        constant=constant,
        classes=classes,
        confusion=shown,
        worst=worst,
    )


def _of_class(i: int, name: str, counts: list[list[int]]) -> OfClass:
    right, rows, given = counts[i][i], sum(counts[i]), sum(row[i] for row in counts)
    precision, recall = right / given if given else None, right / rows if rows else None
    return OfClass(name, rows, precision, recall, 2 * right / (rows + given) if rows + given else None)


def _finding(split: str, names: list[str], counts: list[list[int]], classes: list[OfClass]) -> str:
    rows = sum(map(sum, counts))
    right = sum(counts[i][i] for i in range(len(names)))
    if not rows:
        return ""
    told = f"{count(right)} of {plural(rows, split + ' row')} {'is' if right == 1 else 'are'} right"
    wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if i != j and n]
    if not wrong:
        return told
    least = min((one for one in classes if one.rows), key=lambda one: one.recall or 0.0)
    most, i, j = max(wrong)
    told += f"; fewest of {least.name!r} ({100 * (least.recall or 0):.0f} %)"
    return f"{told}; most often {names[i]!r} was taken for {names[j]!r} ({count(most)})" if len(names) > 2 else told


def _constant(found: Mapping[str, Any], metric: str | None) -> str:
    value = finite((found.get("metrics") or {}).get(metric))
    if value is None:
        return ""
    answer = found["answer"]
    return (
        f"always {answer!r}: {number(value)}"
        if isinstance(answer, str)
        else f"always {number(answer)}: {number(value)}"
    )


def _row_and_verdict(row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's text, and what was right and what was given."""
    place = f"row {count(row.get('row'))}"
    if "probability" in row:
        share = f"{row['label']!r} was given {100 * (finite(row['probability']) or 0):.3g} %"
        verdict = (
            f"given {row['predicted']!r}, right is {row['label']!r}" if row["predicted"] != row["label"] else "right"
        )
        return str(row["text"]), f"{place}: {verdict}; {share}"
    if "loss" in row:
        return str(row["text"]), f"{place}: loss {number(finite(row['loss']))} a token for “{row.get('label', '')}”"
    numbers = (number(finite(row.get(key))) for key in ("predicted", "label"))
    return str(row["text"]), "{}: given {}, right is {}".format(place, *numbers)
