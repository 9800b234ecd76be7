"""The sections about single modules: ranks, budget, rank diagonals, prunes, freezes."""

from __future__ import annotations

from typing import Any

from .charts import (
    LINES,
    Chart,
    Control,
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
from .modules import Budget, Freezes, Grid, Prunes, Ranks, Values
from .words import NOTHING, byte_size, count, number, plural, sentence, thin


def ranks_section(section: Ranks) -> Section:
    charts = []
    several = len(section.grids) > 1
    for g, grid in enumerate(section.grids):
        subtitle = grid.stack if several else ""
        frames = [grid.cells(dict(ranks)) for ranks in section.ranks]
        cells_drawn = heat(grid, frames[-1], "rank", 0, section.highest, "--heat")
        labels = [f"step {count(s)} · {plural(t, 'rank')} kept" for s, t in zip(section.steps, section.totals)]
        control = Control("range", "Event", labels, [[{"z": cells}] for cells in frames], len(frames) - 1)
        scale = Scale("rank", "0", str(section.highest), "--heat")
        moves = len(frames) > 1
        charts.append(
            Chart(
                f"ranks-{g}",
                f"Rank of each module{' of ' + subtitle if subtitle else ''}",
                [cells_drawn],
                grid_layout(grid, len(str(section.highest))),
                subtitle,
                grid_height(grid),
                control if moves else None,
                "screen" if moves else "",
                scale=scale,
            )
        )
        if moves:
            charts.append(_multiples(g, grid, section, frames, subtitle, scale))
    first, last = section.ranks[0], section.ranks[-1]
    changed = {
        name: next(
            (
                s
                for s, before in zip(reversed(section.steps[1:]), reversed(section.ranks[:-1]))
                if before.get(name) != last.get(name)
            ),
            None,
        )
        for name in last
    }
    rows = [
        [
            name,
            count(first.get(name, 0)),
            count(r),
            NOTHING if changed[name] is None else count(changed[name]),
        ]
        for name, r in last.items()
    ]
    table = Table(["module", "first rank", "last rank", "at its last rank since step"], rows)
    return Section("rank", "rank", section.finding, charts, [table], [sentence(section.how)] if section.how else [])


def _multiples(g: int, grid: Grid, section: Ranks, frames: list[Any], subtitle: str, scale: Scale) -> Chart:
    """Up to six moments side by side: what a slider shows on a screen, for paper."""
    moments = thin(len(frames), 6)
    columns = min(3, len(moments))
    rows = -(-len(moments) // columns)
    data: list[Spec] = []
    layout = base_layout("", "") | {"annotations": [], "margin": {"l": 4, "r": 4, "t": 24, "b": 4}}
    for i, frame in enumerate(moments):
        row, column, n = i // columns, i % columns, "" if i == 0 else str(i + 1)
        left, top = column / columns, 1 - row / rows
        cells_drawn = heat(grid, frames[frame], "rank", 0, section.highest, "--heat")
        data.append(cells_drawn | {"xaxis": f"x{n}", "yaxis": f"y{n}", "texttemplate": ""})
        hidden: Spec = {"visible": False}
        layout[f"xaxis{n}"] = hidden | {"domain": [left + 0.01, left + 1 / columns - 0.01], "anchor": f"y{n}"}
        layout[f"yaxis{n}"] = hidden | {
            "domain": [top - 1 / rows + 0.02, top - 0.1],
            "anchor": f"x{n}",
            "autorange": "reversed",
        }
        layout["annotations"].append(
            {
                "text": f"step {count(section.steps[frame])} · {count(section.totals[frame])} ranks",
                "showarrow": False,
                "x": left + 0.01,
                "y": top - 0.09,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "font": {"size": 11, "color": "--muted"},
            }
        )
    label = f"Ranks at {len(moments)} moments, layers across, modules down"
    caption = f"Layers from left to right; from top to bottom {', '.join(grid.labels)}."
    id = f"ranks-{g}-print"
    return Chart(id, label, data, layout, subtitle, 150 * rows, media="print", scale=scale, caption=caption)


def budget_section(section: Budget, end: int) -> Section:
    data = [line("kept", section.steps, section.kept, 0, "hv")]
    if any(b is not None for b in section.budget):
        budget = line("budget", section.steps, section.budget, 1, "hv")
        data.insert(
            0,
            budget
            | {
                "line": budget["line"] | {"width": 5, "color": "--band"},
                "mode": "lines+markers",
                "marker": {"color": "--band", "size": 6},
            },
        )
    layout = step_layout("total rank", end)
    layout["yaxis"]["rangemode"] = "tozero"
    rows = [[count(step), count(b), count(kept)] for step, b, kept in zip(section.steps, section.budget, section.kept)]
    return Section(
        "budget",
        "rank",
        section.finding,
        [Chart("budget", section.finding, data, layout, legend=keys(data))],
        [shortened(["step", "budget (ranks)", "kept (ranks)"], rows)],
    )


def values_section(section: Values, end: int) -> Section:
    names = [name for name in section.bands if name != "zero_ratio"]
    everything = [line(name, section.steps, section.bands[name], i) for i, name in enumerate(names)]
    options, traces = ["all modules"], [everything]
    for site, frames in section.sites.items():
        width = max((len(frame) for frame in frames), default=0)
        options.append(site)
        traces.append(
            [
                {
                    "name": f"#{k + 1}",
                    "x": section.steps,
                    "y": [frame[k] if k < len(frame) else None for frame in frames],
                }
                for k in range(width)
            ]
        )
    # What the many lines of single modules share goes into a template, said once.
    style = {
        "mode": everything[0]["mode"],
        "line": {"width": 1.5},
        "marker": {"size": 4},
        "hovertemplate": "step %{x}: %{y}<extra>%{fullData.name}</extra>",
    }
    layout = step_layout("magnitude", end) | {
        "colorway": list(LINES),
        "template": {"data": {"scatter": [style]}},
    }
    layout["yaxis"]["rangemode"] = "tozero"
    control = Control("select", "Show", options, traces)
    rows = [
        [
            count(s),
            *(number(section.bands[n][i]) for n in names),
            f"{100 * section.bands['zero_ratio'][i]:.0f} %",
        ]
        for i, s in enumerate(section.steps)
    ]
    note = f"Magnitudes of the {section.nouns}, {section.size}; median and tenths are over those that are not zero."
    return Section(
        "values",
        "rank",
        section.finding,
        [Chart("values", section.finding, everything, layout, control=control, legend=keys(everything))],
        [Table(["step", *names, "zero"], rows)],
        [note],
    )


def prunes_section(section: Prunes) -> Section:
    kinds = list(section.freed)
    data, so_far = [], dict.fromkeys(kinds, 0)
    sums: dict[str, list[int]] = {kind: [] for kind in kinds}
    for row in section.rows:
        for kind in kinds:
            so_far[kind] += row.freed[kind]
            sums[kind].append(so_far[kind])
    steps = [row.step for row in section.rows]
    # The axis counts in the unit of the text above it.
    unit, size = next(
        (u, 1024**e)
        for e, u in ((3, "GiB"), (2, "MiB"), (1, "KiB"), (0, "bytes"))
        if sum(so_far.values()) >= 1024**e or e == 0
    )
    for i, kind in enumerate(kinds):
        data.append(
            {
                "type": "bar",
                "name": kind,
                "x": [str(step) for step in steps],
                "y": [n / size for n in sums[kind]],
                "customdata": [byte_size(n) for n in sums[kind]],
                "marker": {"color": LINES[i]},
                "hovertemplate": f"by step %{{x}}: %{{customdata}}<extra>{kind}</extra>",
            }
        )
    layout = base_layout("prune at step", f"freed so far ({unit})") | {
        "barmode": "stack",
        "bargap": 0.15 if len(steps) > 4 else 0.7,
    }
    layout["xaxis"] |= {"type": "category", "showgrid": False, "nticks": 12, "tickangle": 0}
    rows = [
        [
            count(r.step),
            count(r.kept),
            count(r.removed),
            *(byte_size(r.freed[k]) for k in kinds),
            byte_size(sum(r.freed.values())),
        ]
        for r in section.rows
    ]
    total = [
        "all",
        count(section.rows[-1].kept),
        count(sum(r.removed for r in section.rows)),
        *(byte_size(section.freed[k]) for k in kinds),
        byte_size(sum(section.freed.values())),
    ]
    table = Table(
        ["step", "ranks kept", "ranks cut", *(f"freed: {kind}" for kind in kinds), "freed: sum"],
        [*rows, total],
    )
    return Section(
        "prunes",
        "rank",
        section.finding,
        [
            Chart(
                "prunes",
                section.finding,
                data,
                layout,
                legend=[Key(kind, LINES[i], "block") for i, kind in enumerate(kinds)],
            )
        ],
        [table],
        is_table=len(rows) <= 12,
    )


def freeze_section(section: Freezes) -> Section:
    charts = []
    several = len(section.grids) > 1
    for g, grid in enumerate(section.grids):
        subtitle = grid.stack if several else ""
        last = section.last_step
        ends = [[None if name is None else _end(section, name) for name in row] for row in grid.names]
        cells_drawn = heat(
            grid, [[end and end[0] for end in row] for row in ends], "froze at step", 0, last, "--freeze"
        )
        cells_drawn |= {
            "text": [[end[1] if end else "" for end in row] for row in ends],
            "customdata": [[end[2] if end else "" for end in row] for row in ends],
            "hovertemplate": "%{y}, layer %{x}: %{customdata}<extra></extra>",
        }
        cells_drawn["texttemplate"] = cells_drawn["texttemplate"] and "%{text}"
        charts.append(
            Chart(
                f"freeze-{g}",
                "The step at which each matrix froze",
                [cells_drawn],
                grid_layout(grid, len(str(last))),
                subtitle,
                grid_height(grid),
                scale=Scale("froze at step", "0", f"{count(last)} (the end)", "--freeze"),
            )
        )
    ratio = [(s, r) for s, r in zip(section.steps, section.trainable_ratio) if r is not None]
    rows = [[name, _end(section, name)[2] if step is None else count(step)] for name, step in section.frozen_at.items()]
    tables = [Table(["matrix", "froze at step"], rows)]
    if ratio:
        tables.append(shortened(["step", "share still trained"], [[count(s), f"{100 * r:.1f} %"] for s, r in ratio]))
    note = "Darker means frozen later; the darkest trained to the end. A and B are an adapter's two factors."
    if section.cut_at:
        note += " “cut”: none of its ranks was left from that step on."
    return Section("freeze", "freeze", section.finding, charts, tables, [note])


def _end(section: Freezes, name: str) -> tuple[int, str, str]:
    """When a matrix stopped training, as a word for its cell, and in full."""
    if (step := section.frozen_at[name]) is not None:
        return step, str(step), f"froze at step {count(step)}"
    if (step := section.cut_at.get(name)) is not None:
        return step, "cut", f"cut to rank 0 at step {count(step)}"
    return section.last_step, "end", "trained to the end"
