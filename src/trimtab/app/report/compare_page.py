"""The page of a comparison: the table, then one chart for each thing that a reader weighs.

Rows are named inside the plot, above their bar, since a name of several settings is wider than any axis
margin that a phone could spare.
"""

from __future__ import annotations

import html
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from .charts import (
    LINES,
    Chart,
    Key,
    Scale,
    Section,
    Spec,
    Table,
    base_layout,
    grid_height,
    grid_layout,
    heat,
    keys,
    line,
    shortened,
    step_layout,
)
from .comparing import CompareRow, CompareTable, table_of_runs
from .data import Curve
from .html import page, save
from .modules import Grid
from .words import NOTHING, byte_size, count, duration, listing, number, plural, sentence, short_count

NAME_WIDTH = 44
"""Characters of a name in one line of a plot on a phone."""


def compare(
    run_folders: Iterable[str | Path], out_html: str | Path | None = None, baseline: str | None = None
) -> CompareTable:
    """The table of several runs, see `table_of_runs`; writes its page too when ``out_html`` is given."""
    table = table_of_runs(run_folders, baseline)
    if out_html is not None:
        save(Path(out_html), compare_page(table))
    return table


def compare_page(table: CompareTable) -> str:
    """The comparison as one self-contained HTML page."""
    runs = sum(len(row.folders) for row in table.rows)
    tasks = list(dict.fromkeys(row.task for row in table.rows if row.task))
    folders = [
        [row.name, NOTHING if seed is None else str(seed), folder]
        for row in table.rows
        for seed, folder in zip(row.seeds, row.folders)
    ]
    return page(
        "compare.html",
        " · ".join(tasks) or "Runs",
        sections(table),
        table=table,
        runs=[row.runs for row in table.rows],
        folders=folders,
        subtitle=f"{plural(len(table.rows), 'setting')}, {plural(runs, 'run')}",
    )


def sections(table: CompareTable) -> list[Section]:
    """Score, parameters, time, memory, and the curves over steps; what no run has is left out."""
    rows = table.rows
    made = (
        *(part for some in _sets(table) for part in (_score(some), _pareto(some))),
        _over_steps(rows, "loss", "training loss", [row.loss_curve for row in rows]),
        _layers(rows),
        _params(table),
        _cost(rows, "time", [row.seconds for row in rows], duration, "took the least time"),
        _cost(rows, "memory", [row.peak_memory_bytes for row in rows], byte_size, "had the lowest peak"),
        _over_steps(rows, "score", table.metric, [row.score_curve for row in rows]),
        _over_steps(rows, "params", "trainable parameters", [row.params_curve for row in rows]),
    )
    return [section for section in made if section]


def _sets(table: CompareTable) -> list[CompareTable]:
    """The rows that one axis can show: those scored on the same data by the same metric."""
    scored = [row for row in table.rows if row.score is not None]
    apart = sorted({row.scored_on for row in scored})
    sets = [[row for row in scored if row.scored_on == one] for one in apart]
    return [replace(table, rows=rows, metric=rows[0].metric, lower_is_better=rows[0].lower_is_better) for rows in sets]


def _score(table: CompareTable) -> Section | None:
    rows = [row for row in table.rows if row.score is not None]
    if not rows or table.metric is None:
        return None
    labels = [(row.name, row.score_text) for row in rows]
    at = _heights(labels)
    data: list[Spec] = []
    dots = [(y, score) for y, row in zip(at, rows) if len(row.scores) > 1 for score in row.scores if score is not None]
    if dots:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "one seed",
                "x": [x for _, x in dots],
                "y": [y for y, _ in dots],
                "marker": {"color": "--third", "size": 8, "symbol": "circle-open"},
                "hovertemplate": "%{x}<extra>one seed</extra>",
            }
        )
    mean: Spec = {
        "type": "scatter",
        "mode": "markers",
        "name": table.metric,
        "x": [row.score for row in rows],
        "y": at,
        "customdata": [row.score_text for row in rows],
        "marker": {"color": "--accent", "size": 11, "symbol": "diamond"},
        "hovertemplate": "%{customdata}<extra></extra>",
    }
    if dots:
        mean["error_x"] = {
            "type": "data",
            "array": [row.score_se or 0 for row in rows],
            "color": "--accent",
            "thickness": 2,
        }
    data.append(mean)
    layout = _named_layout(labels, at, table.metric)
    # A score has no natural zero; some room at both ends keeps the marks whole.
    ends = [(row.score or 0) + sign * (row.score_se or 0) for row in rows for sign in (-1, 1)] + [x for _, x in dots]
    room = 0.08 * (max(ends) - min(ends)) or 0.01 * (abs(ends[0]) or 1)
    layout["xaxis"]["range"] = [min(ends) - room, max(ends) + room]
    means = [row.score or 0.0 for row in rows]
    heading = f"{table.metric} " + (
        f"lies between {number(min(means))} and {number(max(means))}"
        if min(means) < max(means)
        else f"is {number(means[0])}" + (" for all" if len(means) > 1 else "")
    )
    cells = [[row.name, row.score_text, *([", ".join(map(number, row.scores))] if dots else [])] for row in rows]
    legend = [Key("mean ± standard error", "--accent", "dot"), Key("one seed", "--third", "ring")] if dots else []
    apart = table.has_differences
    cells = [[*cell, *([row.difference_text] if apart else [])] for cell, row in zip(cells, rows)]
    columns = ["run", table.metric, *(["each seed"] if dots else []), *(["difference"] if apart else [])]
    name = _numbered("score", table)
    return Section(
        name, "score", heading, [Chart(name, heading, data, layout, height=_height(at), legend=legend)],
        [Table(columns, cells)],
    )  # fmt: skip


def _numbered(name: str, table: CompareTable) -> str:
    which = table.rows[0].scored_on
    return f"{name}-{which}" if which else name


def pareto_front(points: Sequence[tuple[float, float]], lower_is_better: bool = False) -> list[int]:
    """Positions of the (parameters, score) that no other beats with as few parameters, the smallest first.

    >>> pareto_front([(100, 0.8), (50, 0.7), (80, 0.6), (50, 0.65)])
    [1, 0]
    >>> pareto_front([(50, 0.7), (50, 0.7)])
    [0, 1]
    """
    sign = -1 if lower_is_better else 1
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -sign * points[i][1])):
        if not front or sign * points[i][1] > sign * points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


def _pareto(table: CompareTable) -> Section | None:
    """Score against average trainable parameters; a number beside a mark stands for its name in the legend."""
    rows = [row for row in table.rows if row.params["average"]]
    if len(rows) < 2 or table.metric is None:
        return None
    points = [(row.params["average"] or 0.0, row.score or 0.0) for row in rows]
    front = pareto_front(points, table.lower_is_better)
    steps = [points[i] for i in front]
    data: list[Spec] = [
        {
            "type": "scatter", "mode": "lines", "name": "front", "x": [x for x, _ in steps], "y": [y for _, y in steps],
            "line": {"color": "--third", "width": 1.5, "dash": "dot", "shape": "hv"}, "hoverinfo": "skip",
        }
    ]  # fmt: skip
    for i, (row, (x, y)) in enumerate(zip(rows, points)):
        color = LINES[i % len(LINES)]
        data.append(
            {
                "type": "scatter", "mode": "markers+text", "name": row.name, "x": [x], "y": [y], "text": [str(i + 1)],
                "textposition": "top right", "textfont": {"color": "--ink", "size": 12}, "cliponaxis": False,
                "marker": {"color": color, "size": 11, "symbol": "circle" if i in front else "circle-open",
                           "line": {"color": color, "width": 2}},
                "customdata": [[html.escape(row.name), row.score_text, count(x)]],
                "hovertemplate": "%{customdata[0]}<br>%{customdata[1]}, %{customdata[2]} parameters<extra></extra>",
                **({"error_y": {"type": "data", "array": [row.score_se], "color": color, "thickness": 1.5}}
                   if row.score_se else {}),
            }
        )  # fmt: skip
    layout = base_layout("trainable parameters, average over the run", table.metric)
    least, most = min(x for x, _ in points), max(x for x, _ in points)
    layout["xaxis"] |= {"tickformat": "~s", "nticks": 6}
    if most > 8 * least:  # the small ones would lie on each other
        layout["xaxis"] |= {"type": "log", "dtick": "D2" if most < 100 * least else 1}
    else:
        room = 0.1 * (most - least) or 0.1 * most
        layout["xaxis"]["range"] = [least - room, most + room]
    legend = [Key(f"{i + 1} {row.name}", LINES[i % len(LINES)], "dot" if i in front else "ring")
              for i, row in enumerate(rows)]  # fmt: skip
    on = [f"`{rows[i].name}`" for i in front]
    who = listing(on) if len(on) < 4 else f"{len(on)} of {len(rows)} settings"
    gives, its = ("gives", "its") if len(on) == 1 else ("give", "their")
    heading = f"{who} {gives} the best mean {table.metric} for {its} average parameters"
    cells = [[f"{i + 1} {row.name}", row.score_text, count(x), "on it" if i in front else ""]
             for i, (row, (x, _)) in enumerate(zip(rows, points))]  # fmt: skip
    name = _numbered("pareto", table)
    caption = "Filled marks are on the Pareto front (dotted): no other has a better mean with as few parameters."
    return Section(
        name, "params", heading, [Chart(name, heading, data, layout, height=320, legend=legend, caption=caption)],
        [Table(["run", table.metric, "average parameters", "Pareto front"], cells)],
    )  # fmt: skip


def _params(table: CompareTable) -> Section | None:
    rows = [row for row in table.rows if row.params["final"] is not None]
    if not rows:
        return None
    labels = [(row.name, _params_text(row)) for row in rows]
    at = _heights(labels)
    moving = [(row, y) for row, y in zip(rows, at) if row.params["initial"] not in (None, row.params["final"])]
    data: list[Spec] = []
    if moving:
        data.append(_bar([row.params["initial"] for row, _ in moving], [y for _, y in moving], "--band", "initial"))
    data.append(_bar([row.params["final"] for row in rows], at, "--accent", "final"))
    averaged = [(row.params["average"], y) for row, y in moving if row.params["average"] is not None]
    if averaged:
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "average",
                "x": [x for x, _ in averaged],
                "y": [y for _, y in averaged],
                "hovertemplate": "%{x}<extra>average</extra>",
                "marker": {"symbol": "line-ns", "size": 20, "line": {"width": 3, "color": "--ink"}},
            }
        )
    layout = _named_layout(labels, at, "trainable parameters") | {"barmode": "overlay"}
    layout["xaxis"] |= {"rangemode": "tozero", "tickformat": "~s"}
    legend = [
        Key("initial", "--band", "block"),
        Key("final", "--accent", "block"),
        Key("average", "--ink", "bar"),
    ]
    least, most = (pick(rows, key=lambda row: row.params["final"] or 0) for pick in (min, max))
    low, high = least.params["final"] or 0, most.params["final"] or 0
    heading = f"{count(low)} trainable parameters at the end"
    if low < high:
        heading = f"`{least.name}` ends with {count(low)} trainable parameters"
        heading += f", {100 * low / high:.3g} % of `{most.name}` ({count(high)})"
    cells = [[row.name, *(count(row.params[k]) for k in ("initial", "final", "average"))] for row in rows]
    return Section(
        "params-bars",
        "params",
        heading,
        [Chart("params-bars", heading, data, layout, height=_height(at), legend=legend if moving else [])],
        [Table(["run", "initial", "final", "average"], cells)],
    )


def _params_text(row: CompareRow) -> str:
    initial, final = row.params["initial"], row.params["final"]
    return short_count(final) if initial in (final, None) else f"{short_count(initial)} → {short_count(final)}"


def _cost(
    rows: list[CompareRow], what: str, costs: list[float | None], told: Callable[[float], str], wins: str
) -> Section | None:
    """Bars of time or memory; the text beside each bar has the unit, so the axis needs none."""
    known = [(row, cost) for row, cost in zip(rows, costs) if cost is not None]
    if not known:
        return None
    values = [cost for _, cost in known]
    labels = [(row.name, told(cost)) for row, cost in known]
    at = _heights(labels)
    layout = _named_layout(labels, at, "")
    layout["xaxis"] |= {"rangemode": "tozero", "showticklabels": False, "showgrid": False}
    layout["margin"]["b"] = 8
    heading = f"`{labels[0][0]}`: {labels[0][1]}"
    if len(known) > 1:
        least = values.index(min(values))
        heading = (
            f"All: {told(values[0])}"
            if min(values) == max(values)
            else f"`{labels[least][0]}` {wins}: {told(min(values))}, against {told(max(values))} at most"
        )
    data = [
        _bar(values, at, "--accent", what)
        | {"customdata": [told(v) for v in values], "hovertemplate": "%{customdata}<extra></extra>"}
    ]
    return Section(
        what,
        what,
        heading,
        [Chart(what, heading, data, layout, height=_height(at) - 36)],
        [Table(["run", what], [list(label) for label in labels])],
    )


def _over_steps(rows: list[CompareRow], axis: str, what: str | None, curves: list[Curve | None]) -> Section | None:
    known = [(row.name, curve) for row, curve in zip(rows, curves) if curve and curve.steps]
    is_count = axis == "params"
    if not known or what is None or (is_count and all(len(set(curve.values)) == 1 for _, curve in known)):
        return None  # constant counts are told by the bars
    form = count if is_count else number
    data = [
        line(name, curve.steps, curve.values, i, "hv" if is_count else "linear")
        for i, (name, curve) in enumerate(known)
    ]
    layout = step_layout(what, max(curve.steps[-1] for _, curve in known))
    if is_count:
        layout["yaxis"] |= {"rangemode": "tozero", "tickformat": "~s"}
    ends = [(curve.values[-1] or 0, name) for name, curve in known if curve.values[-1] is not None]
    heading = f"{what} over steps"
    if ends:
        (low, low_name), (high, high_name) = min(ends), max(ends)
        heading = f"{what} at the last {'evaluation' if axis == 'score' else 'step'}"
        heading += f": {form(low)} (`{low_name}`) to {form(high)} (`{high_name}`)" if low < high else f": {form(low)}"
    tables = [
        shortened(
            ["step", name],
            [[count(s), "not a number" if v is None else form(v)] for s, v in zip(curve.steps, curve.values)],
        )
        for name, curve in known
    ]
    heading = heading if axis == "score" else sentence(heading)  # a metric keeps its spelling
    return Section(
        f"{axis}-steps",
        axis,
        heading,
        [Chart(f"{axis}-steps", heading, data, layout, legend=keys(data))],
        tables,
    )


def _layers(rows: list[CompareRow]) -> Section | None:
    """Where each run adapts and how much: total rank by layer, runs one under the other."""
    known = [(i, row) for i, row in enumerate(rows) if row.layers]
    stacks = list(dict.fromkeys(stack for _, row in known for stack in row.layers))
    if len(known) < 2 or len({repr(row.layers) for _, row in known}) == 1:
        return None
    charts, tables = [], []
    for s, stack in enumerate(stacks):
        some = [(i, row, row.layers[stack]) for i, row in known if stack in row.layers]
        n = max(len(ranks) for _, _, ranks in some)
        cells = [[round(r, 1) if r != int(r) else int(r) for r in ranks] + [None] * (n - len(ranks))
                 for _, _, ranks in some]  # fmt: skip
        most = max(r for _, _, ranks in some for r in ranks)
        characters = max(len(str(cell)) for row in cells for cell in row)
        labels = [f"{i + 1}" for i, _, _ in some]
        grid = Grid(stack, list(range(n)), labels, labels, [])
        charts.append(
            Chart(
                f"layers-{s}", f"Total rank in each layer of {stack}", [heat(grid, cells, "rank", 0, most, "--heat")],
                grid_layout(grid, characters), stack if len(stacks) > 1 else "", grid_height(grid),
                legend=[Key(f"{i + 1} {row.name}", "--muted", "dot") for i, row, _ in some],
                scale=Scale("total rank of a layer", "0", number(most), "--heat"),
            )
        )  # fmt: skip
        tables.append(Table(["layer", *(row.name for _, row, _ in some)],
                            [[str(layer), *(NOTHING if layer >= len(cells[k]) or cells[k][layer] is None
                                            else str(cells[k][layer]) for k in range(len(some)))]
                             for layer in range(n)]))  # fmt: skip
    total = [(sum(map(sum, row.layers.values())), row.name) for _, row in known]
    (low, least), (high, most_of) = min(total), max(total)
    heading = f"Total rank at the end: {number(low)} (`{least}`) to {number(high)} (`{most_of}`)"
    if low == high:
        heading = f"Total rank at the end: {number(low)} in all, in other places"
    return Section("layers", "where and rank", heading, charts, tables)


def _bar(x: Sequence[float | None], at: list[float], color: str, name: str) -> Spec:
    return {
        "type": "bar",
        "orientation": "h",
        "name": name,
        "x": list(x),
        "y": at,
        "width": 0.3,
        "marker": {"color": color},
        "hovertemplate": f"%{{x}}<extra>{name}</extra>",
    }


def _label(name: str, value: str) -> list[str]:
    """The lines over a row's mark: its name, and its value in bold where there is room."""
    lines = [html.escape(part, quote=False) for part in textwrap.wrap(name, NAME_WIDTH)]
    bold = f"<b>{html.escape(value, quote=False)}</b>"
    if len(lines[-1]) + len(value) + 2 <= NAME_WIDTH:
        return [*lines[:-1], f"{lines[-1]}  {bold}"]
    return [*lines, bold]


def _heights(labels: list[tuple[str, str]]) -> list[float]:
    """The place of each row's mark, the first on top; one unit is 60 pixels."""
    at, y = [], 0.0
    for label in labels:
        y -= 0.25 + 0.28 * len(_label(*label))
        at.append(round(y, 3))
        y -= 0.35
    return at


def _height(at: list[float]) -> int:
    return round(50 + 60 * (0.35 - at[-1]))


def _named_layout(labels: list[tuple[str, str]], at: list[float], x: str) -> Spec:
    layout = base_layout(x, "")
    layout["yaxis"] |= {"range": [at[-1] - 0.35, 0], "visible": False}
    layout["margin"] = {"l": 12, "r": 12, "t": 4, "b": 44}
    layout["xaxis"]["nticks"] = 6
    layout["annotations"] = [
        {
            "x": 0,
            "xref": "paper",
            "xanchor": "left",
            "y": y + 0.2,
            "yanchor": "bottom",
            "showarrow": False,
            "align": "left",
            "borderpad": 0,
            "text": "<br>".join(_label(*label)),
            "font": {"size": 12},
        }
        for label, y in zip(labels, at)
    ]
    return layout
