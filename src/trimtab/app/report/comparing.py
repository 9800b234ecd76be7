"""Several runs side by side: one table, one page.

Runs whose settings differ by nothing but the seed (and where they were written) become one row, with the mean
and its standard error. A row is named from what differs between the rows, in the recipe's own words:
``where=cka, ratio=0.5``.

Rows are told apart by paired differences (`pairing`): none is called best unless it leads every other by more than
chance. Rows that were not scored on the same data, by the same metric, stand in sets of their own and are not ranked
against each other.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, did_you_mean
from .data import Curve, Header, header_of, losses, lower_is_better, score_curve, trainable
from .pairing import LEVEL, Difference, Scored, difference
from .runfolder import RunFolder, flatten, read, runs_within
from .words import NOTHING, byte_size, count, duration, finite, listing, number, plural, sentence, short_labels

SAME_RUN = {
    "base_rows",
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
    unfinished: list[str]
    """One per folder: ``unfinished, step 100 of 300`` of a run that has not ended; empty for one that has."""
    score: float | None
    """Mean of the scores that are numbers."""
    score_se: float | None
    """Standard error of that mean over seeds; ``None`` for fewer than two scores."""
    params: dict[str, float | None]
    """Mean ``initial``, ``final`` and ``average`` trainable adapter parameters of the runs that have ended, as are the
    times, curves and layers below; of those that there are where none has."""
    seconds: float | None
    """Mean wall time."""
    peak_memory_bytes: float | None
    """Highest of the runs."""
    settings: dict[str, Any]
    """The settings that differ between rows."""
    lower_is_better: bool = False
    score_curve: Curve | None = None
    params_curve: Curve | None = None
    loss_curve: Curve | None = None
    """Of training."""
    layers: dict[str, list[float]] = field(default_factory=dict)
    """By stack, the total rank that is left in each layer; 0 where nothing is adapted."""
    scored_on: int = 0
    """Rows of the same number were scored on the same data by the same metric."""
    difference: Difference | None = None
    """To the baseline; without one to the row with the best mean."""

    @property
    def runs(self) -> str:
        """Names of the run folders."""
        return listing([Path(folder).resolve().name for folder in self.folders])

    @property
    def difference_text(self) -> str:
        """``−0.012 (−0.02 to −0.001)``"""
        if self.difference is None:
            return NOTHING
        mean = f"{'+' if self.difference.mean > 0 else ''}{number(self.difference.mean, 2)}"
        low, high = (number(end, 2) for end in (self.difference.low, self.difference.high))
        return (mean if self.difference.low is None else f"{mean} ({low} to {high})").replace("-", "−")

    @property
    def score_text(self) -> str:
        if self.score is None:
            is_nan = any(score is None and not told for score, told in zip(self.scores, self.unfinished))
            return "NaN" if is_nan and self.metric else NOTHING
        spread = "" if self.score_se is None else f" ± {number(self.score_se, 2)}"
        return f"{number(self.score)}{spread}"


@dataclass(frozen=True)
class CompareTable:
    """The comparison as data; `cells` is the table as shown, in Markdown, on the page and in a terminal."""

    rows: list[CompareRow]
    metric: str | None
    """The headline metric, if all rows share one."""
    best: int | None
    """Index of the row that leads every other by more than chance; ``None`` where none does."""
    finding: str
    """Names of rows stand in backticks."""
    notes: list[str]
    lower_is_better: bool = False
    baseline: str | None = None
    """Name of the row that the others are compared with, where one was asked for."""

    @property
    def has_differences(self) -> bool:
        """Whether there is more to say of them than the means do."""
        return any(row.difference and (self.baseline or row.difference.low is not None) for row in self.rows)

    @property
    def legend(self) -> str:
        """What the column of differences holds; empty where there is none."""
        if not self.has_differences:
            return ""
        to = f"`{self.baseline}`" if self.baseline else "the best mean"
        paired = "paired by seed and, where known, by scored row"
        return f"difference: to {to}, {paired}, with its {100 * LEVEL:g} % interval"

    @property
    def columns(self) -> list[str]:
        return [
            "run",
            self.metric or "score",
            *(["difference"] if self.has_differences else []),
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
                *([row.difference_text] if self.has_differences else []),
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
        below = [f"{self.finding}.", *([f"{sentence(self.legend)}."] if self.legend else []), *self.notes]
        return "\n".join([*lines, *(f"\n{text}" for text in below)])

    def to_json(self) -> dict[str, Any]:
        """Strict JSON: `None` stands for what is unknown or not a number."""
        return json.loads(json.dumps(asdict(self), allow_nan=False, default=str))  # a recipe may hold dates


def table_of_runs(run_folders: Iterable[str | Path], baseline: str | None = None) -> CompareTable:
    """One row per setting over a list of run folders.

    Args:
        baseline: the row that all others are compared with, by its name or by one of its run folders.
    Raises:
        DataError: if no folder is given, one is given twice, or one cannot be read.
        ConfigError: there is no such baseline.
    """
    folders = [Path(folder) for folder in run_folders]
    if not folders:
        raise DataError("compare: no run folder given; name at least one")
    twice = next((f for i, f in enumerate(folders) if f.resolve() in {g.resolve() for g in folders[:i]}), None)
    if twice is not None:
        raise DataError(f"compare: run folder {str(twice)!r} is given twice")
    left_out = {folder: inside for folder in folders if (inside := runs_within(folder))}  # `runs/*` holds them, too
    if len(left_out) == len(folders):
        names = sorted({str(run.parent / "*") for inside in left_out.values() for run in inside})
        raise DataError(f"compare: {str(folders[0])!r} is no run, but holds some: name {' '.join(names)}")
    runs = [read(folder) for folder in folders if folder not in left_out]
    groups: dict[str, list[RunFolder]] = {}
    for run in runs:
        key = json.dumps({k: v for k, v in settings_of(run).items() if k not in SAME_RUN}, sort_keys=True, default=str)
        groups.setdefault(key, []).append(run)
    groups = {f"{key} {i}": part for key, group in groups.items() for i, part in enumerate(_of_same_data(group))}
    again: dict[Path, Path] = {}
    for key, group in groups.items():
        groups[key], doubles = _one_a_seed(group)
        again |= doubles
    settings = [{k: v for k, v in settings_of(group[0]).items() if k not in SAME_RUN} for group in groups.values()]
    names = _unique(names_of(settings), [group[0].path for group in groups.values()])
    rows = [
        _row(name, group, differing) for name, group, differing in zip(names, groups.values(), _differing(settings))
    ]
    scored_on = _scored_on(list(groups.values()))
    rows = [replace(row, scored_on=which) for row, which in zip(rows, scored_on)]
    table = _table(rows, list(groups.values()), baseline)
    notes = [
        f"Left out: `{folder}` is no run, but holds {plural(len(inside), 'run')}."
        for folder, inside in left_out.items()
    ]
    notes += [f"Left out: `{run}` has settings and seed of `{other}`." for run, other in again.items()]
    return replace(table, notes=[*table.notes, *notes])


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
        names.append(", ".join(f"{short[key]}={_setting_text(value)}" for key, value in said.items()))
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
    told = [(run, h) for run, h in zip(group, headers) if h.is_finished] or list(zip(group, headers))
    metric = next((h.metric for _, h in told if h.metric), None)
    scores = [h.score if h.metric == metric and h.is_finished else None for h in headers]
    known = [score for score in scores if score is not None]
    return CompareRow(
        name=name,
        folders=[str(run.path) for run in group],
        seeds=[h.seed for h in headers],
        task=headers[0].task,
        metric=metric,
        scores=scores,
        unfinished=[_progress(run) for run in group],
        score=_mean(known),
        score_se=statistics.stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None,
        params={k: _mean(h.params[k] for _, h in told) for k in ("initial", "final", "average")},
        seconds=_mean(h.seconds for _, h in told),
        peak_memory_bytes=max((h.peak_memory_bytes for h in headers if h.peak_memory_bytes is not None), default=None),
        settings=settings,
        lower_is_better=metric is not None and lower_is_better(told[0][0], metric),
        score_curve=_mean_curve([c.curves[0] for run, _ in told if (c := score_curve(run, metric))], metric or "score"),
        params_curve=_mean_curve([_params_curve(*told[0])], "trainable parameters"),
        loss_curve=_mean_curve([_loss_curve(run) for run, _ in told], "training loss"),
        layers=_layers([run for run, _ in told]),
    )


def _progress(run: RunFolder) -> str:
    if run.is_finished:
        return ""
    total = run.plan.settings.get("total_steps") if run.plan else None
    if total and run.last_step >= total:
        return "trained, not scored yet"
    return f"unfinished, step {count(run.last_step)}" + (f" of {count(total)}" if total else "")


def _one_a_seed(group: list[RunFolder]) -> tuple[list[RunFolder], dict[Path, Path]]:
    """The runs without those that are another's again, which tell nothing of chance; each of these with the other."""
    kept: dict[Any, RunFolder] = {}
    doubles = {}
    for run in sorted(group, key=lambda run: not run.is_finished):
        seed = header_of(run).seed
        if seed is not None and seed in kept:
            doubles[run.path] = kept[seed].path
        else:
            kept[run.path if seed is None else seed] = run
    return [run for run in group if run.path not in doubles], doubles


def _of_same_data(group: list[RunFolder]) -> list[list[RunFolder]]:
    """Runs of the same settings, apart where a file that they name held other rows; unfinished ones join the first."""
    parts: dict[Any, list[RunFolder]] = {}
    for run in group:
        kept = next(iter(run.predictions.values()), {})
        if kept:
            key = (kept.get("rows"), kept.get("fingerprint"), run.metrics.get("train_samples"))
            parts.setdefault(key, []).append(run)
    if len(parts) < 2:
        return [group]
    first = next(iter(parts.values()))
    first += [run for run in group if not run.predictions]
    return list(parts.values())


def _scored_on(groups: list[list[RunFolder]]) -> list[int]:
    """A number per group of runs: the same where scores can be ranked.

    That is told by what the scored rows hold, wherever they were read from. Where a finished run does not say, all
    are told by their recipes' data.
    """
    finished = [[run for run in group if run.is_finished] or group for group in groups]
    is_told = all(run.predictions for group in finished for run in group if run.is_finished)
    keys = []
    for group in finished:
        run = group[0]
        header = header_of(run)
        split, kept = next(iter(run.predictions.items()), ("", {}))
        data: Any = [kept.get("rows"), kept.get("fingerprint")]
        if not is_told or not run.is_finished:
            data = sorted((k, v) for k, v in settings_of(run).items() if k.startswith("data.") and not _is_of_train(k))
        elif header.metric and lower_is_better(run, header.metric):  # another tokenizer cuts into other tokens
            data.append(sum(kept.get("tokens", ())))
        keys.append(repr((header.task, header.metric, split, data)))
    found = list(dict.fromkeys(keys))
    return [found.index(key) for key in keys]


def _is_of_train(key: str) -> bool:
    return key in ("data.train", "data.max_samples.train")


def _table(rows: list[CompareRow], groups: list[list[RunFolder]], baseline: str | None) -> CompareTable:
    ended = [row for row in rows if not all(row.unfinished)] or rows  # only those say what they are scored by
    metrics = {row.metric for row in ended if row.metric}
    metric = metrics.pop() if len(metrics) == 1 else None
    chosen = None if baseline is None else _baseline(rows, baseline)
    scored = [i for i, row in enumerate(rows) if row.score is not None]
    sets = {rows[i].scored_on for i in scored}
    # Mean, and of equal means the first: who leads, and whom the others are held against.
    tops = {one: max((i for i in scored if rows[i].scored_on == one), key=lambda i: _merit(rows[i])) for one in sets}
    runs = [_scores(row, group) for row, group in zip(rows, groups)]
    compared = []
    for i, row in enumerate(rows):
        to = chosen if chosen is not None else tops.get(row.scored_on)
        apart = None
        if to is not None and to != i and row.scored_on == rows[to].scored_on and runs[i] and runs[to]:
            apart = difference(runs[i], runs[to], row.metric or "", rows[to].name)
        compared.append(replace(row, difference=apart))
    top = next(iter(tops.values())) if len(sets) == 1 and len(scored) > 1 else None
    behind = (
        []
        if top is None
        else [
            difference(runs[i], runs[top], metric or "", rows[top].name)
            if chosen is not None
            else compared[i].difference
            for i in scored
            if i != top
        ]
    )
    lower = any(rows[i].lower_is_better for i in tops.values())
    best = top if behind and all(d and d.is_clear and (d.mean > 0) == lower for d in behind) else None
    notes = []
    for row in rows:
        missing = [
            f"{Path(folder).resolve().name} ({told or 'not a number'})"
            for folder, score, told in zip(row.folders, row.scores, row.unfinished)
            if score is None
        ]
        if missing:
            notes.append(f"`{row.name}`: no score from {', '.join(missing)}.")
    if len(sets) > 1:
        told = [listing([f"`{rows[i].name}`" for i in scored if rows[i].scored_on == one]) for one in sorted(sets)]
        notes.append(
            "Scores of different data, splits or metrics are not ranked against each other. "
            f"Apart stand: {'; '.join(told)}."
        )
    table = CompareTable(compared, metric, best, "", notes, lower, rows[chosen].name if chosen is not None else None)
    return replace(table, finding=_finding(table, top))


def _merit(row: CompareRow) -> float:
    """Its score, so that more is better."""
    return -(row.score or 0.0) if row.lower_is_better else row.score or 0.0


def _baseline(rows: list[CompareRow], asked: str) -> int:
    """The row of that name, or with that run folder."""
    for i, row in enumerate(rows):
        if asked == row.name or Path(asked).resolve() in [Path(folder).resolve() for folder in row.folders]:
            return i
    names = [row.name for row in rows]
    raise ConfigError(
        "baseline",
        asked,
        f"no such row.{did_you_mean(asked, names)} There is {'; '.join(names)}; or name one of the run folders",
    )


def _scores(row: CompareRow, group: list[RunFolder]) -> list[Scored]:
    return [
        Scored(seed, score, next(iter(run.predictions.values()), {}))
        for run, seed, score in zip(group, row.seeds, row.scores)
        if score is not None
    ]


def _finding(table: CompareTable, top: int | None) -> str:
    """Who scored best if any did, and what the smallest gave up for what it saved; or how all are to the baseline."""
    rows, metric = table.rows, table.metric
    if table.baseline is not None and len(rows) > 1:
        return _against(table)
    if top is None or len(rows) < 2:
        told = [
            f"`{row.name}` scored {row.score_text}" + (f" ({row.metric})" if row.metric else "")
            for row in rows
            if row.score is not None
        ]
        return told[0] if len(rows) == 1 and told else f"{plural(len(rows), 'setting')} side by side"
    first = rows[top]
    alike = [row for row in rows if row.score == first.score]
    if len(alike) == len(rows):
        same = f"All {len(rows)} settings have the same {metric}, {first.score_text}"
        if len({row.params["final"] for row in rows}) == 1:
            return f"{same}, and as many final parameters"
        counted = sorted((row for row in rows if row.params["final"]), key=lambda row: row.params["final"] or 0)
        if len(counted) < 2:
            return same
        least, *_, largest = counted
        whose = f"`{largest.name}`'s"
        return f"{same}; `{least.name}` with {_saved(least, largest, whose)}"
    if table.best is not None:
        finding = f"`{first.name}` scored best: {metric} {first.score_text}"
    else:
        most = "lowest" if table.lower_is_better else "highest"
        finding = f"`{first.name}` has the {most} {metric}, {first.score_text}{_unclear(table, top)}"
    sized = [row for row in rows if row.params["final"] and row.score is not None]
    if not first.params["final"] or not sized:
        return finding
    least = min(sized, key=lambda row: (row.params["final"] or 0, row is not first))
    if (least.params["final"] or 0) >= first.params["final"]:
        is_less = least is first and any((row.params["final"] or 0) > first.params["final"] for row in sized)
        return finding + (", with the fewest final parameters" if is_less else "")
    gap = abs((first.score or 0.0) - (least.score or 0.0))
    within = " (within chance)" if (d := least.difference) and d.low is not None and not d.is_clear else ""
    return f"{finding}; `{least.name}` is {number(gap, 2)} behind{within} with {_saved(least, first, 'its')}"


def _saved(least: CompareRow, other: CompareRow, whose: str) -> str:
    """What one has of another's parameters and time. Args: whose: the other, where it is first spoken of."""
    saved = [f"{100 * least.params['final'] / other.params['final']:.3g} % of {whose} final parameters"]  # type: ignore[operator]
    if other.seconds and least.seconds:
        saved.append(f"{100 * least.seconds / other.seconds:.3g} % of its time")
    return " and ".join(saved)


def _unclear(table: CompareTable, top: int) -> str:
    """Why the highest mean is not called best."""
    others = [row for i, row in enumerate(table.rows) if i != top and row.score is not None]
    near = [row for row in others if row.difference and row.difference.low is not None and not row.difference.is_clear]
    if near:
        few = listing([f"`{row.name}`" for row in near]) if len(near) < 4 else plural(len(near), "other")
        return f", but no more than chance above {few}".replace("above", "below" if table.lower_is_better else "above")
    return (
        ", which one run alone cannot tell from chance"
        if all(len(row.scores) == 1 for row in others)
        else (", which so few seeds cannot tell from chance")
    )


def _against(table: CompareTable) -> str:
    """How the rows are to the baseline."""
    found: dict[str, list[CompareRow]] = {}
    for row in table.rows:
        if (d := row.difference) is not None:
            side = "better" if (d.mean < 0) == row.lower_is_better else "worse"
            kind = f"{side} than" if d.is_clear else "not told apart from" if d.low is not None else "unproven against"
            found.setdefault(kind, []).append(row)
    if not found:
        return f"Nothing was scored on the same rows as `{table.baseline}`"
    parts = []
    for kind in ("better than", "worse than", "not told apart from", "unproven against"):
        if some := found.get(kind):
            few = listing([f"`{row.name}` ({row.difference_text.replace(' (', ', ').rstrip(')')})" for row in some])
            who = few if len(some) < 4 else plural(len(some), "setting")
            parts.append(f"{who} {'is' if len(some) == 1 else 'are'} {kind} `{table.baseline}`")
    return "; ".join(parts) + ("" if "unproven against" not in found else " (too few seeds, and no rows to pair)")


def _params_curve(run: RunFolder, header: Header) -> Curve | None:
    found = trainable(run, header)
    return Curve("trainable parameters", found.steps, list(found.params)) if found else None


def _loss_curve(run: RunFolder) -> Curve | None:
    found = losses(run)
    return next((curve for curve in found.curves if curve.name == "training"), None) if found else None


def _layers(group: list[RunFolder]) -> dict[str, list[float]]:
    """Total rank in each layer at the end of a run, the mean over seeds; the plan's where none has ended."""
    found: dict[str, dict[int, float]] = {}
    plans = [run.plan for run in group if run.plan]
    for plan in plans:
        for one in plan.sites:
            if one.site.block is not None:
                ranks = found.setdefault(one.site.stack or "", {})
                ranks[one.site.block] = ranks.get(one.site.block, 0.0) + one.rank_left / len(plans)
    masks = {stack: len(mask) for plan in plans if plan.where for stack, mask in plan.where.stacks.items()}
    return {
        stack: [ranks.get(i, 0.0) for i in range(max(masks.get(stack, 0), max(ranks) + 1))]
        for stack, ranks in found.items()
    }


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


def _setting_text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
