"""The parts of a page: sections, charts, tables, and what all figures have in common.

Figures are plain Plotly dicts (tests build `plotly.graph_objects.Figure` from every one, which checks
each property), so that the page carries no default template. A colour is the name of a CSS variable
(``"--accent"``); page.js puts in what the variable holds in the current theme, so that charts follow
light, dark and print.

Why Plotly, of what was weighed (plotly.js 4.1, Observable Plot 0.6, ECharts 6.1, uPlot 1.6): it is the
only one that a plain `pip install` brings along as JavaScript, so nothing minified is copied into this
repository. It draws SVG (sharp in print), has heat maps and hatched bars, and is kept well. Its price is
size, 4.8 MB; packed with gzip inside the page that is 1.9 MB (see `html`). uPlot (50 kB) draws on a
canvas and has no bars or heat maps of its own; ECharts (1.1 MB) and Observable Plot with D3 (0.5 MB)
would have to be vendored.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .modules import Grid
from .words import thin

Spec = dict[str, Any]
LINES = ("--accent", "--second", "--third", "--fourth", "--fifth", "--sixth")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
MOST_TABLE_ROWS = 60


@dataclass(frozen=True)
class Table:
    """A small table; the first column names the row, the others are numbers."""

    columns: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass(frozen=True)
class Control:
    """A slider (``range``) or a list (``select``); each option replaces the traces of the figure."""

    kind: str
    label: str
    options: list[str]
    traces: list[list[Spec]]
    """Per option: what to put over the base traces, in their order (``select``: instead of them)."""
    start: int = 0


@dataclass(frozen=True)
class Key:
    """One entry of a legend; ``mark`` is the class in page.css that draws what the name stands for."""

    name: str
    color: str
    mark: str = "line"


@dataclass(frozen=True)
class Scale:
    """What the colours of a heat map mean: ``--heat-0`` … ``--heat-4`` from low to high."""

    name: str
    low: str
    high: str
    colors: str


@dataclass(frozen=True)
class Chart:
    """One figure; ``media`` is ``"print"`` or ``"screen"`` when it belongs to one of them only.

    Legend and colour scale are HTML beside the figure: they wrap on a phone and take no room from the plot.
    """

    id: str
    label: str
    data: list[Spec]
    layout: Spec
    subtitle: str = ""
    height: int = 260
    control: Control | None = None
    media: str = ""
    legend: list[Key] = field(default_factory=list)
    scale: Scale | None = None
    caption: str = ""


@dataclass(frozen=True)
class Section:
    """A heading that states the finding, its charts, and the numbers behind them."""

    id: str
    axis: str
    heading: str
    charts: list[Chart]
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    quotes: list[tuple[str, str]] = field(default_factory=list)
    """Texts of rows, each with what there is to say of it."""
    is_table: bool = False
    """The table is the matter itself, not the numbers behind a chart: it is shown open."""


def line(name: str, steps: list[int], values: list[Any], i: int, shape: str = "linear") -> Spec:
    """One line; few points get marks of their own, so that a single one is seen."""
    # A gap is drawn where a value is missing; a lone point between two gaps needs its mark too.
    marks = len(steps) <= 40 or any(v is None for v in values)
    color = LINES[i % len(LINES)]
    return {
        "type": "scatter",
        "name": name,
        "x": steps,
        "y": values,
        "mode": "lines+markers" if marks else "lines",
        "line": {"color": color, "width": 2, "shape": shape, "dash": DASHES[i // len(LINES) % len(DASHES)]},
        "marker": {"color": color, "size": 8 if len(steps) == 1 else 5},
        "cliponaxis": False,
        "hovertemplate": f"step %{{x}}: %{{y}}<extra>{name}</extra>",
    }


def keys(data: list[Spec]) -> list[Key]:
    """The legend of some lines; a single one needs none."""
    return (
        [
            Key(trace["name"], trace["line"]["color"], "line" if trace["line"]["dash"] == "solid" else "dash")
            for trace in data
        ]
        if len(data) > 1
        else []
    )


def shortened(columns: list[str], rows: list[list[str]]) -> Table:
    """A table of at most `MOST_TABLE_ROWS` rows, evenly thinned."""
    kept = thin(len(rows), MOST_TABLE_ROWS)
    note = f"{len(kept)} of {len(rows)} rows, evenly spread" if len(kept) < len(rows) else ""
    return Table(columns, [rows[i] for i in kept], note)


def heat(grid: Grid, cells: list[Any], what: str, low: float, high: float, scale: str) -> Spec:
    few = len(grid.layers) * len(grid.kinds) <= 400
    return {
        "type": "heatmap",
        "x": grid.layers,
        "y": grid.labels,
        "z": cells,
        "zmin": low,
        "zmax": max(high, low + 1),
        "colorscale": [[i / 4, f"{scale}-{i}"] for i in range(5)],
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "texttemplate": "%{z}" if few else "",
        "showscale": False,
        "hovertemplate": f"%{{y}}, layer %{{x}}: {what} %{{z}}<extra></extra>",
    }


def grid_layout(grid: Grid, characters: int) -> Spec:
    """The layout of a heat map whose cells hold texts of so many characters."""
    layout = base_layout("layer", "") | {"meta": {"layers": len(grid.layers), "characters": characters}}
    layout["xaxis"] |= {"dtick": tick_step(len(grid.layers)), "showgrid": False, "ticks": ""}
    # Names as wide as a phone would leave no room for the cells; the hover and the table have them whole.
    names = [
        label if len(label) <= 24 else f"{label[:11].rstrip('.')}…{label[-12:].lstrip('.')}" for label in grid.labels
    ]
    layout["yaxis"] |= {
        "autorange": "reversed",
        "showgrid": False,
        "tickvals": grid.labels,
        "ticktext": names,
        "tickfont": {"size": 11, "color": "--muted"},
        "ticks": "",
    }
    return layout


def grid_height(grid: Grid) -> int:
    return 60 + max(20, min(32, 600 // max(1, len(grid.kinds)))) * len(grid.kinds)


def step_layout(y: str, end: int) -> Spec:
    """The same span of steps on every chart, so that one can be read against the other."""
    layout = base_layout("optimizer step", y)
    layout["xaxis"]["range"] = [0, max(1, end) * 1.02]
    return layout


def base_layout(x: str, y: str) -> Spec:
    """Axes and margins that all figures share."""
    axis: Spec = {
        "gridcolor": "--grid",
        "linecolor": "--grid",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"color": "--muted"},
    }
    title: Spec = {"standoff": 8, "font": {"size": 12, "color": "--muted"}}
    return {
        "font": {
            "family": "system-ui, -apple-system, Segoe UI, Roboto, sans-serif",
            "size": 12,
            "color": "--ink",
        },
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": False,
        "margin": {"l": 8, "r": 12, "t": 12, "b": 40},
        "hoverlabel": {"font": {"size": 12}},
        "xaxis": axis | {"title": title | {"text": x}},
        "yaxis": axis | {"title": title | {"text": y}},
    }


def tick_step(n: int) -> int:
    """Every layer has its number up to 16 of them, then every second, every fourth, …"""
    step = 1
    while n / step > 16:
        step *= 2
    return step
