"""The tables a command ends with: data in, rich renderables out."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

from ..plans import Plan, SitePlan, Where
from .catalogue import Entry
from .report.words import NOTHING, byte_size, count, duration, number, plural, progress, ranges, short_labels, thin
from .runfolder import RunFolder
from .screen import aside, table

if TYPE_CHECKING:
    from .latency import Latency
    from .tune import Candidate, Search

_MOST_SCHEDULE_ROWS = 12


def run_tables(folder: RunFolder) -> list[Any]:
    """What a finished run was and what came out."""
    found = folder.read(folder.metrics)
    where = folder.saved_where()
    params = found["params"]
    headline = found["metric"]
    metrics = sorted(found["metrics"].items(), key=lambda item: (item[0] != headline, "loss" in item[0]))
    rows = [
        [f"[bold]{escape(name)}[/]" if name == headline else escape(name), number(value)] for name, value in metrics
    ]
    if constant := _constant(folder, headline):
        rows.insert(1, constant)
    rows += [
        *_params(params, folder.read(folder.plan)["settings"].get("predicted_params") or {}),
        ["layers", " · ".join(_layers(where)) if where else "all"],
        *([["training", f"unfinished: {progress(found)}"]] if progress(found) else []),
        ["training time", duration(found["seconds"])],
        ["peak memory", byte_size(found["peak_memory_bytes"] or None)],
        *(
            [name, str(path)]
            for name, path in (("adapter", folder.adapter), ("report", folder.report))
            if path.exists()
        ),
    ]
    made = table(["", ""], [])
    made.show_header = False
    for name, value in rows:
        made.add_row(name if name.startswith("[") else f"[dim]{name}[/]", escape(value))
    load = found.get("load")
    use = Text(f"trimtab predict {shlex.quote(str(folder.path))} FILE")
    told = ["\n[dim]# To load it:[/]", Text(load)] if load else []
    if found["task"] != "vqa":  # its questions stand in files of their own form
        told += ["\n[dim]# To answer the rows of a file:[/]", use]
    return [made, *told]


def _constant(folder: RunFolder, metric: str) -> list[str] | None:
    """The headline score of one answer to every row, where it says something."""
    kept = folder.read(folder.predictions) if folder.predictions.is_file() else {}
    first: dict[str, Any] = next(iter(kept.values()), {})
    found = first.get("constant")
    if not found or metric not in found["metrics"]:
        return None
    answer = found["answer"] if isinstance(found["answer"], str) else number(found["answer"])
    return [f"[dim]{escape(f'… of always {answer}')}[/]", number(found["metrics"][metric])]


def plan_tables(plan: Plan) -> list[Any]:
    """Sites by kind, totals, and the schedule."""
    final = any(site.final_r is not None and site.final_r != site.r for site in plan.sites)
    columns = ["module", "layers", "shape", "r", *(["final r"] if final else []), "parameters"]
    rows = []
    for kind, sites in _by_kind(plan.sites).items():
        shapes = dict.fromkeys(f"{s.site.in_features} → {s.site.out_features}" for s in sites)
        layers = f"any {len(sites)}" if plan.settings.get("layers_undecided") else _blocks(sites)
        rows.append(
            [
                kind,
                layers,
                ", ".join(shapes),
                _span(s.r for s in sites),
                *([_span(s.final_r or 0 for s in sites)] if final else []),
                count(sum(s.trainable_params for s in sites)),
            ]
        )
    numeric = range(len(columns) - (3 if final else 2), len(columns))
    totals = [
        *_params(plan.params),
        ["modules", count(len(plan.sites))],
        ["optimizer memory", byte_size(plan.optimizer_bytes)],
    ]
    if plan.settings.get("total_steps"):
        totals.append(
            [
                "length",
                f"{plural(plan.settings['total_steps'], 'step')}, {count(plan.settings['steps_per_epoch'])} an epoch",
            ]
        )
    totals += [*_memory(plan.settings.get("memory")), *_processes(plan.settings.get("processes"))]
    totals += [*_time(plan.settings.get("measured"))]
    parts: list[Any] = [table(columns, rows, title=plan.model, right=numeric), "", table(["", ""], totals)]
    parts[-1].show_header = False
    changes = [row for row in plan.schedule if "trainable" in row]
    if len(changes) > 1:
        shown = [changes[i] for i in thin(len(changes), _MOST_SCHEDULE_ROWS)]
        told = {
            "from step": [count(row["step"]) for row in shown],
            "trainable parameters": [count(row["trainable"]) for row in shown],
            "total rank": [count(row["total_rank"]) for row in shown],
            "projections training": [f"{100 * row['training_ratio']:.1f} %" for row in shown],
        }
        told = {name: cells for name, cells in told.items() if len(set(cells)) > 1}
        parts += ["", table(list(told), list(zip(*told.values())), right=range(len(told)))]
    return parts + [f"[yellow]note[/] {escape(note)}" for note in plan.notes]


def _memory(found: Mapping[str, Any] | None) -> list[list[str]]:
    """Where a step's memory goes, and what checkpointing would make of it."""
    if found is None:
        return []
    shape = f"{found['batch']} rows of {count(found['tokens'])} tokens"
    parts = [f"{name} {byte_size(found[name])}" for name in ("weights", "adapter", "gradients", "optimizer")]
    key = "activations_with_checkpointing" if found["peak"] == found["peak_with_checkpointing"] else "activations"
    parts.append(f"activations {byte_size(found[key])}")
    rows = [["memory of a step", f"{byte_size(found['peak'])} of tensors, for {shape}"], ["", " · ".join(parts)]]
    others = {"with": found["peak_with_checkpointing"], "without": found["peak_without_checkpointing"]}
    for word, peak in others.items():
        if peak is not None and peak != found["peak"]:
            rows.append([f"{word} checkpointing", byte_size(peak)])
    return rows


def _processes(found: Mapping[str, Any] | None) -> list[list[str]]:
    """What each of several processes holds and sends."""
    if found is None:
        return []
    parts = [f"weights {byte_size(found['weights'])}"]
    parts += [f"gathered {byte_size(found['gathered'])}"] if found["gathered"] else []
    return [
        [f"each of {found['processes']} by {found['strategy']}", f"{byte_size(found['peak'])} of tensors"],
        ["", " · ".join(parts)],
        ["sent a step", f"{byte_size(found['sent'])} by each process"],
    ]


def _time(found: Mapping[str, Any] | None) -> list[list[str]]:
    if found is None:
        return []
    whole = found["training_seconds"]
    return [
        ["time of a step", f"{duration(found['step_seconds'])}, the median of {found['steps']} taken here"],
        *([["time of training", f"{duration(whole)}, evaluation apart"]] if whole is not None else []),
        ["memory taken", f"{byte_size(found['peak_memory_bytes'])} at the most, libraries and all"],
    ]


def tune_tables(search: Search) -> list[Any]:
    """What was tried, what was chosen and by what, and how clear the choice is."""
    best = search.best.settings if search.best else {}
    told = escape(", ".join(f"{key}={_setting_text(value)}" for key, value in best.items()))
    equal = sum(one.score == search.ranked[0].score for one in search.ranked) - 1
    tie = f", the lowest loss of {equal + 1} that are equal" if equal else ""
    chosen = f"Chosen by {search.chosen_by} on {search.held_out_rows} training rows held out{tie}: [bold]{told}[/]"
    use = f"trimtab run {shlex.quote(str(search.recipe))}"
    return [tune_table(search), chosen, *map(escape, search.notes), aside(use)]


def tune_table(search: Search) -> Any:
    """The candidates of a search, the best first, with how far each has come."""
    rows = []
    ranked = search.ranked
    for one in sorted(ranked, key=lambda one: all(trial.state == "waiting" for trial in one.trials)):
        found = [trial.found for trial in one.trials if trial.state == "done"]
        params = [some["params"].get("final") for some in found]
        seconds = [some["seconds"] for some in found]
        rows.append(
            [
                *(_setting_text(one.settings.get(key)) for key in search.keys if key != "seed"),
                number(one.score),
                count(params[0]) if params else NOTHING,
                duration(sum(seconds)) if seconds else NOTHING,
                _progress(one),
            ]
        )
    keys = short_labels([key for key in search.keys if key != "seed"])
    return table([*keys, search.metric, "parameters", "time", "state"], rows, right=range(len(keys), len(keys) + 3))


def _progress(one: Candidate) -> str:
    told = []
    for trial in one.trials:
        is_known = trial.state == "running" and trial.total_steps
        share = f" {100 * trial.step / trial.total_steps:.0f} %" if is_known else ""  # type: ignore[operator]
        told.append(f"{trial.state}{share}")
    if len(set(told)) == 1:
        return told[0]
    return ", ".join(f"seed {trial.recipe.seed} {text}" for trial, text in zip(one.trials, told))


def where_tables(where: Where) -> list[Any]:
    """Scores and choice, layer by layer."""
    parts: list[Any] = []
    scores = (where.scores or {}).get("stacks", {})
    form = "{:.4f}" if where.measure == "CKA" else "{:.4g}"
    for stack, mask in where.stacks.items():
        found = scores.get(stack, {})
        values = where.layer_scores.get(stack, [])
        undefined = found.get("undefined", [False] * len(values))
        rows = []
        for i, chosen in enumerate(mask):
            is_known = i < len(values) and not undefined[i] and values[i] is not None
            said = form.format(values[i]) if is_known else "undefined" if i < len(values) else NOTHING
            rows.append([str(i), said, "adapted" if chosen == "1" else ""])
        parts += [
            table(["layer", where.measure or where.method, ""], rows, title=stack, right=[0, 1]),
            f"mask {mask}",
            "",
        ]
    return parts


def selections_tables(found: Mapping[str, Where]) -> list[Any]:
    """Masks of several methods side by side, and how many layers each two of them share."""
    parts: list[Any] = []
    for stack in next(iter(found.values())).stacks:
        masks = {name: where.stacks[stack] for name, where in found.items()}
        rows = [
            [name, mask, *(str(sum(a == b == "1" for a, b in zip(mask, other))) for other in masks.values())]
            for name, mask in masks.items()
        ]
        columns = ["method", "mask", *(f"∩ {name}" for name in masks)]
        parts += [table(columns, rows, title=stack, right=range(2, len(columns))), ""]
    return parts[:-1]


def latency_tables(found: Latency) -> list[Any]:
    """Times and ratios, one table a batch size, and why an adapter is not among them."""
    parts: list[Any] = []
    for batch in dict.fromkeys(timing.batch for timing in found.timings):
        rows = []
        for timing in (timing for timing in found.timings if timing.batch == batch):
            low, middle, high = timing.spread
            spread = f"{low:.3f} to {high:.3f}" if timing.name != "base" else NOTHING
            rows.append(
                [timing.name, count(found.parameters[timing.name]), f"{timing.median_ms:.2f}", f"{middle:.3f}", spread]
            )
        title = f"batch {batch} × {found.tokens} tokens, {found.dtype}"
        parts += [
            table(
                ["model", "parameters added", "median ms", "times the base", "quartiles"],
                rows,
                title=title,
                right=range(1, 5),
            ),
            "",
        ]
    return parts[:-1] + [f"[yellow]note[/] {escape(f'{name}: {why}')}" for name, why in found.left_out.items()]


def method_tables(entries: Sequence[Entry]) -> list[Any]:
    """Axis by axis: name, what it does, its paper, its settings."""
    parts: list[Any] = []
    for axis in dict.fromkeys(entry.axis for entry in entries):
        of_axis = [entry for entry in entries if entry.axis == axis]
        if not any(entry.summary for entry in of_axis):  # tasks: their names say it
            parts += [f"[bold]{axis}[/]", ", ".join(entry.name for entry in of_axis), ""]
            continue
        made = table(["", ""], [], title=axis)
        made.show_header = False
        for entry in of_axis:
            settings = [
                *(f"{key}=(needed)" for key in entry.needed),
                *(f"{key}={_setting_text(value)}" for key, value in entry.defaults.items()),
            ]
            about = escape(entry.summary) + (f" [dim]({escape(entry.paper)})[/]" if entry.paper else "")
            made.add_row(entry.name, about + (f"\n[dim]{escape(', '.join(settings))}[/]" if settings else ""))
        parts += [made, ""]
    return parts


def _setting_text(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_setting_text, value))}]"
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _params(params: dict[str, float], planned: dict[str, float] | None = None) -> list[list[str]]:
    """Trainable parameters; measured ones with what was planned beside them, where it was another number."""
    initial, final, average = (params.get(key) for key in ("initial", "final", "average"))
    if initial == final == average:
        return [["trainable parameters", count(initial)]]
    closed = (planned or params).get("average_closed_form")
    asides: dict[str, list[str]] = {key: [] for key in ("initial", "final", "average")}
    for key, told in asides.items():
        if planned and planned.get(key) != params.get(key):
            told.append(f"{count(planned.get(key))} planned")
    if closed is not None:
        asides["average"].append(f"{count(closed)} in closed form")
    names = {"initial": "trainable at the start", "final": "trainable at the end", "average": "trainable on average"}
    return [
        [name, count(params.get(key)) + (f" ({', '.join(asides[key])})" if asides[key] else "")]
        for key, name in names.items()
    ]


def _layers(where: Where) -> list[str]:
    single = len(where.stacks) == 1
    return [
        f"{mask.count('1')} of {len(mask)} ({mask})" + ("" if single else f" in {stack}")
        for stack, mask in where.stacks.items()
    ]


def _by_kind(sites: Iterable[SitePlan]) -> dict[str, list[SitePlan]]:
    groups: dict[str, list[SitePlan]] = {}
    for site in sites:
        groups.setdefault(site.site.kind or site.site.name, []).append(site)
    return dict(zip(short_labels(list(groups)), groups.values()))


def _blocks(sites: Sequence[SitePlan]) -> str:
    blocks = sorted({site.site.block for site in sites if site.site.block is not None})
    return ranges(blocks) if blocks else NOTHING


def _span(values: Iterable[int]) -> str:
    found = sorted(values)
    return str(found[0]) if found[0] == found[-1] else f"{found[0]}–{found[-1]}"
