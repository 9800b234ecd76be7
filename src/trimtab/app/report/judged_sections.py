"""The sections about single classes and rows: score per class, which was taken for which, and the worst of the rows."""

from __future__ import annotations

from .charts import Chart, Scale, Section, Spec, Table, base_layout
from .judged import Judged
from .words import count, number

_LONG = 18


def judged_sections(found: Judged) -> list[Section]:
    made = []
    if found.classes and found.finding:
        cells = [
            [one.name, count(one.rows), *(number(value, 3) for value in (one.precision, one.recall, one.f1))]
            for one in found.classes
        ]
        tables = [Table(["class", "rows", "precision", "recall", "F1"], cells)]
        charts = [_confusion(found)] if found.confusion else []
        made.append(Section("classes", "classes", found.finding, charts, tables, is_table=True))
    if found.worst:
        made.append(Section("worst", "rows", found.worst_finding, [], quotes=found.worst))
    return made


def _confusion(found: Judged) -> Chart:
    """Rows of each class by what they were given; a colour is a share of its row, since classes differ in size."""
    names = [one.name if len(one.name) <= _LONG else f"{one.name[: _LONG - 1]}…" for one in found.classes]
    at = list(range(len(names)))
    shares = [[n / max(1, sum(row)) for n in row] for row in found.confusion]
    data: Spec = {
        "type": "heatmap",
        "x": at,
        "y": at,
        "z": shares,
        "customdata": found.confusion,
        "text": found.confusion,
        "texttemplate": "%{text}",
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[i / 4, f"--heat-{i}"] for i in range(5)],
        "xgap": 1,
        "ygap": 1,
        "showscale": False,
        "hovertemplate": "right: %{y}<br>given: %{x}<br>%{customdata} rows<extra></extra>",
    }
    characters = max(len(str(n)) for row in found.confusion for n in row)
    layout = base_layout("given", "right") | {"meta": {"layers": len(at), "characters": characters}}
    ticks = {"tickvals": at, "ticktext": names, "showgrid": False, "ticks": ""}
    layout["xaxis"] |= ticks | {"tickangle": -35}  # side by side, a phone would leave some out
    layout["yaxis"] |= ticks | {"autorange": "reversed"}
    height = 70 + max(22, min(40, 420 // len(at))) * len(at)
    scale = Scale("share of the rows of a class", "0", "all", "--heat")
    return Chart("confusion", "Which class was taken for which", [data], layout, height=height, scale=scale)
