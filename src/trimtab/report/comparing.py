"""Several runs side by side: one table, one page.

Runs whose settings differ by nothing but the seed (and where they were written) become one row, with mean
and standard deviation. A row is named from what differs between the rows, in the recipe's own words:
``where=cka, ratio=0.5``.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .data import Curve, Header, header_of, lower_is_better, score_curve, trainable
from .runfolder import RunFolder, flatten, read
from .words import NOTHING, byte_size, count, duration, finite, number, plural, short_labels

SAME_RUN = {
    "output_dir",
    "seed",
    "train.seed",
    "train.data_seed",
    "train.output_dir",
    "train.logging_dir",
    "train.run_name",
}
"""Settings in which runs of one row may differ."""
AXES = {"adapter": "type", "where": "method", "rank": "method", "freeze": "method"}
"""Each axis with the key that names its method."""
ABSENT = {"adapter": "lora", "where": "all", "rank": "none", "freeze": "none"}
"""What an axis without an entry in the recipe does."""


@dataclass(frozen=True)
class CompareRow:
    """Runs that differ only by seed."""

    name: str
    folders: list[str]
    seeds: list[int | None]
    task: str | None
    metric: str | None
    scores: list[float | None]
    """One per folder; ``None`` for an unfinished run or a score that is not finite."""
    score: float | None
    """Mean of the scores that are numbers."""
    score_sd: float | None
    """Sample standard deviation (n − 1); ``None`` for fewer than two scores."""
    params: dict[str, float | None]
    """Mean ``initial``, ``final`` and ``average`` trainable adapter parameters."""
    seconds: float | None
    """Mean wall time."""
    peak_memory_bytes: float | None
    """Highest of the runs."""
    settings: dict[str, Any]
    """The settings that differ between rows."""
    score_curve: Curve | None = None
    params_curve: Curve | None = None

    @property
    def score_text(self) -> str:
        if self.score is None:
            return "NaN" if any(s is None for s in self.scores) and self.metric else NOTHING
        spread = "" if self.score_sd is None else f" ± {number(self.score_sd, 2)}"
        return f"{number(self.score)}{spread}"


@dataclass(frozen=True)
class CompareTable:
    """The comparison as data; `cells` is the table as shown, in Markdown, on the page and in a terminal."""

    rows: list[CompareRow]
    metric: str | None
    """The headline metric, if all rows share one."""
    best: int | None
    """Index of the row with the best score, if the rows can be ranked."""
    finding: str
    """Names of rows stand in backticks."""
    notes: list[str]

    @property
    def columns(self) -> list[str]:
        return [
            "run",
            self.metric or "score",
            "seeds",
            "params initial",
            "params final",
            "params average",
            "time",
            "peak memory",
        ]

    @property
    def cells(self) -> list[list[str]]:
        """One list of formatted texts per row, under `columns`."""
        return [
            [
                row.name,
                row.score_text if self.metric else f"{row.score_text} {row.metric or ''}".strip(),
                str(len(row.folders)),
                *(count(row.params[k]) for k in ("initial", "final", "average")),
                duration(row.seconds),
                byte_size(row.peak_memory_bytes),
            ]
            for row in self.rows
        ]

    def as_markdown(self) -> str:
        """A GitHub table, the finding under it; the best score is bold."""
        body = []
        for i, cells in enumerate(self.cells):
            cells = [cell.replace("|", "\\|") for cell in cells]
            cells[1] = f"**{cells[1]}**" if i == self.best else cells[1]
            body.append(cells)
        rule = ["---", *["---:"] * (len(self.columns) - 1)]
        lines = ["| " + " | ".join(row) + " |" for row in (self.columns, rule, *body)]
        return "\n".join([*lines, "", f"{self.finding}.", *(f"\n{note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: `None` stands for what is unknown or not a number."""
        return json.loads(json.dumps(asdict(self), allow_nan=False, default=str))  # a recipe may hold dates


def compare(run_folders: Iterable[str | Path], out_html: str | Path | None = None) -> CompareTable:
    """One row per setting over a list of run folders; writes the page too when ``out_html`` is given.

    Raises:
        DataError: if no folder is given, one is given twice, or one cannot be read.
    """
    folders = [Path(folder) for folder in run_folders]
    if not folders:
        raise DataError("compare: no run folder given; name at least one")
    twice = next((f for i, f in enumerate(folders) if f.resolve() in {g.resolve() for g in folders[:i]}), None)
    if twice is not None:
        raise DataError(f"compare: run folder {str(twice)!r} is given twice")
    runs = [read(folder) for folder in folders]
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in settings_of(run).items() if k not in SAME_RUN}, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    settings = [{k: v for k, v in settings_of(group[0]).items() if k not in SAME_RUN} for group in groups.values()]
    names = _unique(names_of(settings), [group[0].path for group in groups.values()])
    rows = [
        _row(name, group, differing) for name, group, differing in zip(names, groups.values(), _differing(settings))
    ]
    table = _table(rows)
    if out_html is not None:
        from .compare_page import compare_page
        from .html import save

        save(Path(out_html), compare_page(table))
    return table


def settings_of(run: RunFolder) -> dict[str, Any]:
    """A run's settings by dotted name, from its recipe or, lacking one, from metrics.json."""
    axes = ("model", "task", *AXES, "seed")
    source = run.recipe or {key: run.metrics.get(key) for key in axes if key in run.metrics}
    found: dict[str, Any] = {}
    for key, value in source.items():
        if key in AXES and not isinstance(value, dict):
            value = {AXES[key]: value} if value else {}
        for name, setting in flatten({key: value}):
            if setting is not None and setting != {}:
                found[name] = setting
    for axis, method in AXES.items():
        found[f"{axis}.{method}"] = found.get(f"{axis}.{method}") or ABSENT[axis]
    return found


def names_of(settings: Sequence[dict[str, Any]]) -> list[str]:
    """A name per row from what differs between the rows; empty where nothing does.

    >>> names_of([{"where.method": "all"}, {"where.method": "cka", "where.ratio": 0.5}])
    ['where=all', 'where=cka']
    """
    differing = _differing(settings)
    keys = list(dict.fromkeys(key for row in differing for key in row))
    short = dict(zip(keys, short_labels(keys)))
    short |= {f"{axis}.{method}": axis for axis, method in AXES.items()}
    short |= {key: key.split(".")[0] for key in ("model.name_or_path", "task.name")}
    names = []
    for row in differing:
        # What a row does without goes unsaid, unless nothing else tells it from the others.
        said = {key: value for key, value in row.items() if value != "none"} or row
        names.append(", ".join(f"{short[key]}={_told(value)}" for key, value in said.items()))
    return names


def _differing(settings: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per row, the settings that tell it from others.

    A setting of an axis counts only among rows of the same method: that CKA has a ratio and "all" has none is
    said by the method already.
    """
    keys = list(dict.fromkeys(key for row in settings for key in row))
    order = ["model", "task", *AXES]
    keys.sort(key=lambda key: order.index(key.split(".")[0]) if key.split(".")[0] in order else len(order))
    rows: list[dict[str, Any]] = [{} for _ in settings]
    for key in keys:
        axis = key.split(".")[0]
        method = f"{axis}.{AXES[axis]}" if axis in AXES else ""
        for row, mine in zip(rows, settings):
            # ranks and layers of a stock adapter are told even where another run has another type
            peers = (
                settings
                if key == method or axis == "adapter"
                else [s for s in settings if s.get(method) == mine.get(method)]
            )
            if len({repr(peer.get(key)) for peer in peers}) > 1 and (key in mine or axis not in AXES):
                row[key] = mine.get(key, "default")
    return rows


def _unique(names: list[str], folders: list[Path]) -> list[str]:
    """The names, with the folder's own name where one is empty or taken."""
    return [
        name if name and names.count(name) == 1 else ", ".join(filter(None, (name, folder.resolve().name)))
        for name, folder in zip(names, folders)
    ]


def _row(name: str, group: list[RunFolder], settings: dict[str, Any]) -> CompareRow:
    headers = [header_of(run) for run in group]
    metric = next((h.metric for h in headers if h.metric), None)
    scores = [h.score if h.metric == metric and h.is_finished else None for h in headers]
    known = [score for score in scores if score is not None]
    return CompareRow(
        name=name,
        folders=[str(run.path) for run in group],
        seeds=[h.seed for h in headers],
        task=headers[0].task,
        metric=metric,
        scores=scores,
        score=_mean(known),
        score_sd=statistics.stdev(known) if len(known) > 1 else None,
        params={k: _mean(h.params[k] for h in headers) for k in ("initial", "final", "average")},
        seconds=_mean(h.seconds for h in headers),
        peak_memory_bytes=max((h.peak_memory_bytes for h in headers if h.peak_memory_bytes is not None), default=None),
        settings=settings,
        score_curve=_mean_curve([c.curves[0] for run in group if (c := score_curve(run, metric))], metric or "score"),
        params_curve=_mean_curve([_params_curve(run, h) for run, h in zip(group, headers)][:1], "trainable parameters"),
    )


def _table(rows: list[CompareRow]) -> CompareTable:
    metrics = {row.metric for row in rows if row.metric}
    metric = metrics.pop() if len(metrics) == 1 else None
    comparable = metric is not None and len({row.task for row in rows}) == 1
    scored = [i for i, row in enumerate(rows) if row.score is not None]
    sign = -1 if metric and lower_is_better(metric) else 1
    best = (
        max(scored, key=lambda i: sign * (rows[i].score or 0.0), default=None)
        if comparable and len(scored) > 1
        else None
    )
    notes = []
    for row in rows:
        missing = [Path(f).name for f, score in zip(row.folders, row.scores) if score is None]
        if missing and row.folders:
            notes.append(f"`{row.name}`: no score from {', '.join(missing)} (unfinished, or not a number).")
    if not comparable and len(rows) > 1 and scored:
        notes.append("The runs differ in task or metric, so their scores are not ranked.")
    return CompareTable(rows, metric, best, _finding(rows, metric, best), notes)


def _finding(rows: list[CompareRow], metric: str | None, best: int | None) -> str:
    """Who scored best, and what the smallest gave up for what it saved."""
    if best is None or len(rows) < 2:
        told = [
            f"`{row.name}` scored {row.score_text}" + (f" ({row.metric})" if row.metric else "")
            for row in rows
            if row.score is not None
        ]
        return told[0] if len(rows) == 1 and told else f"{plural(len(rows), 'setting')} side by side"
    top = rows[best]
    finding = f"`{top.name}` scored best: {metric} {top.score_text}"
    sized = [row for row in rows if row.params["final"] and row.score is not None]
    if not top.params["final"] or not sized:
        return finding
    least = min(sized, key=lambda row: (row.params["final"] or 0, row is not top))
    if (least.params["final"] or 0) >= top.params["final"]:
        return finding + (", with the fewest final parameters" if least is top else "")
    gap = abs((top.score or 0.0) - (least.score or 0.0))
    spread = max((row.score_sd for row in (top, least) if row.score_sd is not None), default=None)
    within = " (within one standard deviation)" if spread is not None and gap <= spread else ""
    saved = [f"{100 * least.params['final'] / top.params['final']:.3g} % of its final parameters"]  # type: ignore[operator]
    if top.seconds and least.seconds:
        saved.append(f"{100 * least.seconds / top.seconds:.3g} % of its time")
    return f"{finding}; `{least.name}` is {number(gap, 2)} behind{within} with {' and '.join(saved)}"


def _params_curve(run: RunFolder, header: Header) -> Curve | None:
    found = trainable(run, header)
    return Curve("trainable parameters", found.steps, list(found.params)) if found else None


def _mean_curve(curves: Iterable[Curve | None], name: str) -> Curve | None:
    """The mean over seeds at the steps that all of them have."""
    by_step = [dict(zip(curve.steps, curve.values)) for curve in curves if curve]
    if not by_step:
        return None
    steps = [step for step in by_step[0] if all(step in other for other in by_step)]
    values: list[float | None] = []
    for step in steps:
        known = [value for curve in by_step if (value := curve[step]) is not None]
        values.append(statistics.fmean(known) if len(known) == len(by_step) else None)
    return Curve(name, steps, values)


def _mean(values: Iterable[Any]) -> float | None:
    known = [value for value in values if finite(value) is not None]
    return statistics.fmean(known) if known else None


def _told(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
