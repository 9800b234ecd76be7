"""Reads a run folder as it lies there: finished, aborted, or with pieces missing.

A missing file is normal (the run was stopped, or the method writes none) and reads as nothing. A damaged
one is an error that names file and line, because a report over half-read numbers would be a lie. The
one exception is the journal of a run that was killed: its last line may be half-written, and lines that
say nothing usable are skipped with a note that the page shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...budget import sum_over
from ...errors import ConfigError, DataError
from ...plans import Plan, Where

FILES = ("recipe.yaml", "where.json", "plan.json", "history.jsonl", "timing.jsonl", "metrics.json")
EVENTS = ("log", "eval", "params", "rank", "values", "freeze")
# What each event must carry to be of use: a name and the type that it must have.
NEEDED: dict[str, tuple[str, type | tuple[type, ...]]] = {
    "log": ("loss", (int, float)),
    "eval": ("metrics", dict),
    "params": ("trainable", (int, float)),
    "rank": ("ranks", dict),
    "values": ("values", dict),
    "freeze": ("frozen", list),
}


@dataclass(frozen=True)
class RunFolder:
    """The files of a run, parsed and checked, nothing computed."""

    path: Path
    recipe: dict[str, Any] = field(default_factory=dict)
    where: Where | None = None
    plan: Plan | None = None
    events: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By kind of event, in file order; each has ``step``."""
    timing: list[dict[str, Any]] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """When it began, by which command, with which versions."""
    base: dict[str, Any] = field(default_factory=dict)
    """Scores of the model without an adapter, when they were taken."""
    predictions: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By split, which rows were scored and what came out for each."""
    notes: tuple[str, ...] = ()
    is_at_work: bool = False
    """A process holds the folder's lock."""

    def of(self, kind: str) -> list[dict[str, Any]]:
        return self.events.get(kind, [])

    def measured_params(self, total_steps: int) -> dict[str, float]:
        """Trainable adapter parameters at the start, at the end, and averaged over the steps; empty without events."""
        curve = [(event["step"], event["trainable"]) for event in self.of("params")]
        if not curve:
            return {}
        average = sum_over(curve, total_steps) / total_steps if total_steps else curve[0][1]
        return {"initial": curve[0][1], "final": curve[-1][1], "average": round(average, 1)}

    @property
    def is_finished(self) -> bool:
        """Whether it was scored after its training had ended."""
        return bool(self.metrics) and "unfinished" not in self.metrics

    @property
    def last_step(self) -> int:
        """The last optimizer step that the history knows of; 0 for an empty one."""
        return max((event["step"] for events in self.events.values() for event in events), default=0)


def read(folder: str | Path) -> RunFolder:
    """Everything a run folder holds.

    Raises:
        DataError: if the folder is missing, is no run folder, or holds a damaged file.
    """
    path = Path(folder)
    if not path.is_dir():
        raise DataError(f"run folder {str(path)!r}: no such folder")
    if not any((path / name).is_file() for name in FILES):
        raise DataError(f"run folder {str(path)!r}: holds none of {', '.join(FILES)}; is it a run's output_dir?")
    notes: list[str] = []
    events: dict[str, list[dict[str, Any]]] = {}
    for event in _history(path / "history.jsonl", notes):
        events.setdefault(event["event"], []).append(event)
    timing = [row for _, row in _lines(path / "timing.jsonl", notes) if _is_count(row.get("step"))]
    where = _json(path / "where.json")
    plan = _json(path / "plan.json")
    return RunFolder(
        path=path,
        recipe=_yaml(path / "recipe.yaml"),
        where=None if where is None else _parsed(path / "where.json", _where, where),
        plan=None if plan is None else _parsed(path / "plan.json", Plan.from_json, plan),
        events=events,
        timing=timing,
        metrics=_json(path / "metrics.json") or {},
        about=_json(path / "run.json") or {},
        base=_json(path / "base.json") or {},
        predictions=_json(path / "predictions.json") or {},
        notes=tuple(notes),
        is_at_work=_is_locked(path / ".lock"),
    )


def runs_within(folder: str | Path) -> list[Path]:
    """The runs in a folder that is none itself, as `trimtab tune` and `demo` leave one; empty for a run."""
    path = Path(folder)
    if not path.is_dir() or any((path / name).is_file() for name in FILES):
        return []
    inside = [*path.glob("*/"), *path.glob("trials/*/")]
    return sorted(place for place in inside if any((place / name).is_file() for name in FILES))


def _is_locked(file: Path) -> bool:
    try:
        import fcntl

        with file.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (ImportError, OSError):  # Windows has no such locks; no file, no lock
        return False
    return False


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested settings as ``(dotted key, value)``, in order.

    >>> dict(flatten({"where": {"method": "cka", "ratio": 0.5}, "seed": 0}))
    {'where.method': 'cka', 'where.ratio': 0.5, 'seed': 0}
    """
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _history(path: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    for line, event in _lines(path, notes):
        kind = event.get("event")
        if kind not in EVENTS:
            continue  # a later version may know more kinds of events
        name, wanted = NEEDED[kind]
        if not _is_count(event.get("step")) or not isinstance(event.get(name), wanted):
            if kind != "log":  # Trainer also logs rows without a loss (its closing summary)
                notes.append(f"{path.name} line {line}: {kind} event without a usable step or {name}, skipped")
            continue
        yield event


def _lines(path: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers; NaN and Infinity are allowed."""
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if i < len(lines):
                raise DataError(f"{path}: line {i} is not JSON ({error.msg})") from None
            notes.append(f"{path.name}: the last line is half-written and was skipped (the run was killed)")
            return
        if isinstance(row, dict):
            yield i, row
        else:
            notes.append(f"{path.name} line {i}: not an object, skipped")


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise DataError(f"{path}: holds a {type(data).__name__}, expected an object")
    return data


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    if not isinstance(data, (dict, type(None))):
        raise DataError(f"{path}: holds a {type(data).__name__}, expected settings by name")
    return data or {}


def _parsed(path: Path, make: Any, data: dict[str, Any]) -> Any:
    try:
        return make(data)
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        what = f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{path}: {what}") from None


def _where(data: dict[str, Any]) -> Where:
    where = Where.from_json(data)
    for stack, scores in ((where.scores or {}).get("stacks") or {}).items():
        layers = len(where.stacks.get(stack, ""))
        for name in ("importance",) if "importance" in scores else ("cka", "undefined"):
            if layers and len(scores.get(name, [])) != layers:
                raise ValueError(f"stack {stack!r}: {len(scores.get(name, []))} values of {name!r}, mask of {layers}")
    return where


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
