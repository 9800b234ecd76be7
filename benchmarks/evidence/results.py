"""The JSON files, and what is read off them: which rate a row won with, its scores over seeds, its differences."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .matrix import RATES, ROWS, TASKS, Run


def is_done(run: Run, results: Path) -> bool:
    return (results / run.file).is_file()


def read(results: Path) -> list[dict[str, Any]]:
    """All records, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(results.glob("*/*/*.json"))]


def chosen_rates(results: Path) -> dict[tuple[str, str], str | None]:
    """The rate of each row of each task all of whose tuning runs are done."""
    found: dict[tuple[str, str], str | None] = {}
    for task in TASKS.values():
        for row in ROWS.values():
            files = [results / Run(task, row, rate, tuning=True).file for rate in RATES]
            if all(file.is_file() for file in files):
                found[task.name, row.name] = best_rate([json.loads(file.read_text()) for file in files])
    return found


def best_rate(tried: Iterable[dict[str, Any]]) -> str | None:
    """The rate with the best score on the rows held out, the lower loss where scores are equal. None if none learned."""
    known = [one for one in tried if _finite(one["score"]) and _finite(one["loss"])]
    return max(known, key=lambda one: (one["score"], -one["loss"]))["rate"] if known else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
