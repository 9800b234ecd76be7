"""The JSON files, and what is read off them: which rate a row won with, its scores over seeds, its differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from trimtab.app.report.pairing import Difference, Scored, difference

from .matrix import ROWS, TASKS, TUNED, UNTUNED, Run, tuning_of

BASELINE = "lora-r8"


def is_done(run: Run, results: Path) -> bool:
    return (results / run.file).is_file()


def chosen_rates(results: Path) -> dict[tuple[str, str], str | None]:
    """The rate of each row of each task all of whose tuning runs are done.

    Where a whole run at that rate learns nothing, which the shorter ones that chose it do not show, the best of the
    lower ones is taken, as anybody would.
    """
    return {place: rates[-1] for place, rates in rates_in_turn(results).items()}


def rates_in_turn(results: Path) -> dict[tuple[str, str], list[str | None]]:
    """The same, after the rates that were chosen before it."""
    found: dict[tuple[str, str], list[str | None]] = {}
    for task in TASKS.values():
        for row in ROWS.values():
            files = [results / run.file for run in tuning_of(task, row)]
            if all(file.is_file() for file in files):
                tried = [one | one.get("chooses", {}) for one in (json.loads(file.read_text()) for file in files)]
                turn = found[task.name, row.name] = [best_rate(tried)]
                while (rate := turn[-1]) is not None and _fails(results / task.name / row.name, rate):
                    tried = [one for one in tried if float(one["rate"]) < float(rate)]
                    turn.append(best_rate(tried))
    return found


def _fails(folder: Path, rate: str) -> bool:
    return any(learned_nothing(json.loads(file.read_text())) for file in folder.glob(f"{rate}-seed*.json"))


def learned_nothing(record: dict[str, Any]) -> bool:
    """Whether a run gives the same answer for every row, or numbers with hardly a correlation to the labels."""
    if record.get("metric") in ("pearson", "matthews_correlation"):
        return bool(record["score"] < 0.1)
    return len(set(record.get("rows", {}).get("predicted", ()))) == 1


def best_rate(tried: Iterable[dict[str, Any]]) -> str | None:
    """The rate with the best mean score on the rows held out, the lower loss where scores are equal.

    A rate at which one seed ends without a number is out; None if none is left.

    >>> best_rate([{"rate": "1e-3", "score": .8, "loss": .5}, {"rate": "2e-3", "score": .8, "loss": .4}])
    '2e-3'
    >>> best_rate([{"rate": "1e-3", "score": .7, "loss": .5}, {"rate": "2e-3", "score": .9, "loss": .4},
    ...            {"rate": "2e-3", "score": .4, "loss": float("nan")}])
    '1e-3'
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for one in tried:
        runs.setdefault(one["rate"], []).append(one)
    means = {
        rate: (statistics.fmean(one["score"] for one in of), -statistics.fmean(one["loss"] for one in of))
        for rate, of in runs.items()
        if all(_is_number(one["score"]) and _is_number(one["loss"]) for one in of)
    }
    return max(means, key=means.__getitem__) if means else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


@dataclass(frozen=True)
class Cell:
    """A row on a task, at one rate: its runs over the seeds."""

    task: str
    row: str
    rate: str
    records: tuple[dict[str, Any], ...]

    @property
    def scored(self) -> list[Scored]:
        return [Scored(one["seed"], one["score"], one["rows"]) for one in self.records]

    @property
    def learning_rate(self) -> str:
        return f"{float(self.rate) * ROWS[self.row].rate_factor:g}"

    @property
    def mean(self) -> float:
        return self.of("score")

    @property
    def se(self) -> float | None:
        """Standard error of the mean over seeds."""
        scores = [one["score"] for one in self.records]
        return statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None

    def of(self, key: str, inner: str | None = None) -> float:
        """Mean over the seeds of a number in the records."""
        return statistics.fmean(one[key] if inner is None else one[key][inner] for one in self.records)

    def less(self, other: Cell) -> Difference | None:
        """This row's score less another's, in points."""
        if not {one["seed"] for one in self.records} & {one["seed"] for one in other.records}:
            return None
        return difference(self.scored, other.scored, self.records[0]["metric"], ROWS[other.row].title)


def seeds(cell: Cell | None) -> int:
    """How many a cell was run with."""
    return len(cell.records) if cell else 0


class Results:
    """All records of a folder."""

    def __init__(self, folder: Path) -> None:
        self.records = [json.loads(path.read_text()) for path in sorted(folder.glob("*/*/*.json"))]
        self.turns = rates_in_turn(folder)
        self.rates = {place: rates[-1] for place, rates in self.turns.items()}

    def cell(self, task: str, row: str, rate: str | None = None) -> Cell | None:
        """The row's runs at a rate, at the task's own (`UNTUNED`), or at the one that tuning chose if none is named;
        None where there is no run."""
        rate = TASKS[task].rate if rate == UNTUNED else rate or self.rates.get((task, row))
        found = tuple(
            one
            for one in self.records
            if not one["tuning"] and (one["task"], one["row"], one["rate"]) == (task, row, rate)
        )
        return Cell(task, row, rate, found) if rate and found else None

    @cache  # noqa: B019 (one object a page)
    def apart(self, task: str, ours: str, theirs: str, rate: str | None = None) -> Difference | None:
        """One row less another on a task, paired by seed and by scored row."""
        a, b = self.cell(task, ours, rate), self.cell(task, theirs, rate)
        return a.less(b) if a and b else None

    @cache  # noqa: B019 (one object a page)
    def pooled(self, tasks: tuple[str, ...], ours: str, theirs: str, rate: str | None = None) -> Difference | None:
        """The same over all tasks that have both: pairs of a task and a seed are what is drawn again."""
        left, right, n = [], [], 0
        for task in tasks:
            a, b = self.cell(task, ours, rate), self.cell(task, theirs, rate)
            if a is None or b is None:
                continue
            for one in a.records:
                for other in b.records:
                    if one["seed"] == other["seed"]:
                        left.append(Scored(n, one["score"], {}))
                        right.append(Scored(n, other["score"], {}))
                        n += 1
        return difference(left, right, "", ROWS[theirs].title) if left else None

    @property
    def measured(self) -> list[str]:
        """Tasks with a tuned row."""
        return [name for name, task in TASKS.items() if any(self.cell(name, row) for row in task.tuned)]

    @property
    def whole(self) -> list[str]:
        """Tasks on which every row that a user chooses between is to be tuned."""
        return [name for name in self.measured if set(TUNED) <= set(TASKS[name].tuned)]

    @property
    def swapped(self) -> list[str]:
        """Tasks with rows to compare at the one rate, on drawn rows."""
        return [name for name, task in TASKS.items() if not (task.is_variant or task.is_decoder)
                and self.cell(name, BASELINE, UNTUNED)
                and any(self.cell(name, row, UNTUNED) for row in task.swapped if row != BASELINE)]  # fmt: skip

    @property
    def cka_takes_the_last_half(self) -> str:
        """``in all of 9 runs`` where CKA's choice on the encoder never is another one; else empty."""
        masks = [mask for one in self.records if one["settings"].get("where", {}).get("method") == "cka"
                 and one["settings"]["where"].get("ratio") and not TASKS[one["task"]].is_decoder
                 for mask in one["layers"].values()]  # fmt: skip
        is_last = masks and all(mask == "".join(sorted(mask)) for mask in masks)
        return f"in all of {len(masks)} runs" if is_last else ""

    @property
    def cpu_hours(self) -> float:
        return sum(one["cpu_seconds"]["whole"] for one in self.records) / 3600
