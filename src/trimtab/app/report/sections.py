"""The sections of a report: the finding as heading, the figures, the small tables behind them."""

from __future__ import annotations

from .charts import Chart, Key, Section, Spec, Table, base_layout, keys, line, shortened, step_layout, tick_step
from .data import Curve, Curves, Profile, Report, StackProfile, Trainable
from .judged_sections import judged_sections
from .module_sections import budget_section, freeze_section, prunes_section, ranks_section, values_section
from .words import NOTHING, count, number, sentence


def sections(report: Report) -> list[Section]:
    """Every section that the run has something for, in the order of the page."""
    end = report.header.steps
    made = (
        report.where and _where(report.where),
        report.loss and _curves("loss", "loss", report.loss, end, "loss"),
        report.penalty and _curves("penalty", "loss", report.penalty, end, "penalty"),
        report.score and _curves("score", "score", report.score, end, report.header.metric or "score"),
        *(judged_sections(report.judged) if report.judged else ()),
        report.trainable and _trainable(report.trainable, end),
        report.ranks and ranks_section(report.ranks),
        report.budget and budget_section(report.budget, end),
        report.values and values_section(report.values, end),
        report.prunes and prunes_section(report.prunes),
        report.freeze and freeze_section(report.freeze),
        report.step_times and _curves("step-times", "time", report.step_times, end, "seconds per step", from_zero=True),
    )
    return [section for section in made if section]


def _where(profile: Profile) -> Section:
    how = (
        f"CKA compares what enters a layer with what leaves it ({profile.how}). Near 1 it changes little."
        if profile.score == "CKA"
        else f"{sentence(profile.score)}, measured on {profile.how}; bars are shares of the highest."
    )
    notes = [how] if profile.score else []
    charts, rows = [], []
    several = len(profile.stacks) > 1
    for i, stack in enumerate(profile.stacks):
        data, layout, legend = _profile(stack, profile.score)
        charts.append(
            Chart(
                f"where-{i}",
                f"Layers of {stack.stack}",
                data,
                layout,
                stack.stack if several else "",
                220 if profile.score else 90,
                legend=legend,
            )
        )
        for layer, (score, undefined, chosen) in enumerate(zip(stack.scores, stack.undefined, stack.chosen)):
            name = f"{stack.stack} {layer}" if several else str(layer)
            value = f"{NOTHING} (undefined)" if undefined else number(score)
            rows.append([name, *([value] if profile.score else []), "yes" if chosen else "no"])
    columns = ["layer", *([profile.score] if profile.score else []), "chosen"]
    return Section("where", "where", profile.finding, charts, [Table(columns, rows)], notes + profile.warnings)


def _profile(stack: StackProfile, score: str) -> tuple[list[Spec], Spec, list[Key]]:
    """Bars per layer in up to four groups, so that the legend explains each look."""
    looks = {
        "chosen": Key("chosen", "--accent", "block"),
        "not chosen": Key("not chosen", "--faint", "block"),
        "undefined": Key("undefined", "--muted", "hatch"),
        "undefined, chosen": Key("undefined, chosen", "--accent", "hatch"),
    }
    groups: dict[str, list[int]] = {name: [] for name in looks}
    for layer, (undefined, chosen) in enumerate(zip(stack.undefined, stack.chosen)):
        name = ("undefined, chosen" if chosen else "undefined") if undefined else "chosen" if chosen else "not chosen"
        groups[name].append(layer)
    # CKA has a scale of its own; another score has none, and its highest fills the axis.
    top = 1.0 if score in ("", "CKA") else max((v for v in stack.scores if v is not None), default=1.0) or 1.0
    data: list[Spec] = []
    for name, layers in groups.items():
        color = looks[name].color
        marker: Spec = (
            {"color": color}
            if looks[name].mark == "block"
            else {
                "color": "--card",
                "line": {"color": color, "width": 1},
                "pattern": {"shape": "/", "fgcolor": color, "size": 6, "solidity": 0.3},
            }
        )
        # An undefined layer has no height of its own: it fills the axis, hatched.
        heights = [1 if stack.undefined[i] or not score else (stack.scores[i] or 0) / top for i in layers]
        shown = ["undefined" if stack.undefined[i] else number(stack.scores[i]) for i in layers]
        hover = f"layer %{{x}}: {score} %{{customdata}}" if score else "layer %{x}"
        if layers:
            data.append(
                {
                    "type": "bar",
                    "name": name,
                    "x": layers,
                    "y": heights,
                    "customdata": shown,
                    "marker": marker,
                    "width": 0.8,
                    "hovertemplate": f"{hover}<extra>{name}</extra>",
                }
            )
    layout = base_layout("layer", score) | {
        "barmode": "overlay",
        "meta": {"layers": len(stack.scores)},
    }
    layout["xaxis"] |= {
        "range": [-0.6, len(stack.scores) - 0.4],
        "dtick": tick_step(len(stack.scores)),
        "showgrid": False,
    }
    layout["yaxis"] |= {"range": [0, 1], "visible": score == "CKA"}
    return data, layout, [looks[name] for name in groups if groups[name]]


def _curves(id: str, axis: str, section: Curves, end: int, y: str, from_zero: bool = False) -> Section:
    data = [line(curve.name, curve.steps, curve.values, i) for i, curve in enumerate(section.curves)]
    layout = step_layout(y, end)
    layout["yaxis"]["rangemode"] = "tozero" if from_zero else "normal"
    seen = {value for curve in section.curves for value in curve.values if value is not None}
    if len(seen) == 1:  # around a single value Plotly would show one unit up and down, whatever its size
        layout["yaxis"]["range"] = sorted([0, 1.25 * (seen.pop() or 1)])
    tables = [_curve_table(curve) for curve in section.curves]
    return Section(id, axis, section.finding, [Chart(id, section.finding, data, layout, legend=keys(data))], tables)


def _curve_table(curve: Curve) -> Table:
    rows = [
        [count(step), "not a number" if value is None else number(value)]
        for step, value in zip(curve.steps, curve.values)
    ]
    return shortened(["step", curve.name], rows)


def _trainable(section: Trainable, end: int) -> Section:
    data = [line("trainable parameters", section.steps, section.params, 0, "hv")]
    if section.average is not None and min(section.params) != max(section.params):
        ends = [section.steps[0], section.steps[-1]]
        average = line("average over the run", ends, [section.average] * 2, 2)
        data.append(average | {"mode": "lines", "line": average["line"] | {"dash": "dash", "width": 1.5}})
    layout = step_layout("trainable parameters", end)
    layout["yaxis"] |= {"rangemode": "tozero", "tickformat": "~s"}
    rows = [[count(step), count(params)] for step, params in zip(section.steps, section.params)]
    return Section(
        "params",
        "params",
        section.finding,
        [Chart("params", section.finding, data, layout, legend=keys(data))],
        [shortened(["step", "trainable parameters"], rows)],
    )
