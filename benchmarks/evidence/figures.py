"""Two small figures in SVG, written by hand: the page's readers see them in any viewer, and nothing has to be installed
to draw them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence

from trimtab.app.report.compare_page import pareto_front
from trimtab.app.report.pairing import Difference
from trimtab.app.report.words import short_count

_STYLE = (
    "<style>text{font:12px system-ui,sans-serif;fill:#57606a}.name{fill:#24292f}"
    ".grid{stroke:#d0d7de}.zero{stroke:#57606a}.mark{fill:#0969da}.line{stroke:#0969da;stroke-width:2}"
    ".clear{fill:#bc4c00}.clearline{stroke:#bc4c00;stroke-width:2}.front{fill:none;stroke:#57606a;stroke-dasharray:2 3}"
    "@media(prefers-color-scheme:dark){text{fill:#8b949e}.name{fill:#e6edf3}.grid{stroke:#30363d}}</style>"
)

CUT = 10
"""Points from the baseline, or from the best, that are shown; one run that learned nothing would squeeze the rest."""


_WIDE = 7.2
"""Units that a letter of a row's name takes at most on average, in the fonts that ``system-ui`` stands for."""


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    return "\n".join([head, f"<title>{html.escape(title)}</title>", _STYLE, *parts, "</svg>"]) + "\n"


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{html.escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{kind}"/>'


def dots(rows: Sequence[str], columns: Sequence[str], apart: Sequence[Sequence[Difference | None]]) -> str:
    """Differences to LoRA r 8 with their intervals: a line a row, a panel a task. Orange where zero is outside."""
    left = 20 + math.ceil(_WIDE * max(map(len, rows)))
    panel, gap, step, top = 190, 44, 24, 44
    ends = [100 * x for line in apart for d in line if d for x in (d.mean, d.low, d.high) if x is not None]
    low, high = max(math.floor(min([*ends, -1])), -CUT), min(math.ceil(max([*ends, 1])), CUT)
    width, height = left + len(columns) * (panel + gap), top + step * len(rows) + 34
    every = max(1, math.ceil((high - low) / 5))
    parts = []
    for i, column in enumerate(columns):
        x0 = left + i * (panel + gap)

        def at(points: float, x0: float = x0) -> float:
            return x0 + (min(max(points, low), high) - low) / (high - low) * panel

        parts.append(_text(x0 + panel / 2, 18, column, "middle", "name"))
        for tick in range(math.ceil(low / every) * every, high + 1, every):
            parts.append(_line(at(tick), top - 12, at(tick), height - 34, "zero" if tick == 0 else "grid"))
            parts.append(_text(at(tick), height - 18, f"{tick:+d}".replace("-", "−") if tick else "0", "middle"))
        for j, line in enumerate(apart):
            y = top + step * j
            if (d := line[i]) is None:
                parts.append(_text(at(0), y + 4, "not run yet", "middle"))
                continue
            kind = "clear" if d.is_clear else "mark"
            if d.low is not None and d.high is not None:
                parts.append(_line(at(100 * d.low), y, at(100 * d.high), y, "clearline" if d.is_clear else "line"))
            parts.append(f'<circle cx="{at(100 * d.mean):.1f}" cy="{y}" r="4" class="{kind}"/>')
            if not low <= 100 * d.mean <= high:  # beyond the panel: the mark is on its edge, the number says where
                end = at(100 * max(d.mean, d.mean if d.high is None else d.high))
                parts.append(_text(end + 10, y + 4, f"{100 * d.mean:+.1f}".replace("-", "−")))
    parts += [_text(left - 14, top + step * j + 4, name, "end", "name") for j, name in enumerate(rows)]
    parts.append(_text(left, height - 2, "points to LoRA r 8, with 95 % intervals"))
    return _svg(width, height, "Differences to LoRA r 8", parts)


def pareto(marks: Sequence[tuple[str, float, float]], what: str) -> str:
    """Score against average trainable parameters on a log axis; numbers stand for the names beside the plot."""
    plot, height, top, bottom, left = 520, 60 + 20 * max(len(marks), 14), 20, 40, 56
    width = plot + 24 + math.ceil(_WIDE * (max(len(name) for name, _, _ in marks) + 10))  # and its number and score
    sizes, scores = [size for _, size, _ in marks], [100 * score for _, _, score in marks]
    high = math.ceil(max(scores)) + 0.5
    low = max(math.floor(min(scores)) - 0.5, high - CUT)  # what is further down lies on the edge
    first, last = math.log10(min(sizes)) - 0.1, math.log10(max(sizes)) + 0.1

    def x(size: float) -> float:
        return left + (math.log10(size) - first) / (last - first) * (plot - left - 10)

    def y(score: float) -> float:
        return top + (high - max(score, low)) / (high - low) * (height - top - bottom)

    parts = []
    for tick in range(math.ceil(low), math.floor(high) + 1, max(1, round((high - low) / 6))):
        parts += [_line(left, y(tick), plot, y(tick), "grid"), _text(left - 8, y(tick) + 4, str(tick), "end")]
    steps = (1, 2, 3, 5) if last - first < 2 else (1, 3)  # more would lie on one another
    for power in range(math.floor(first), math.ceil(last) + 1):
        for size in (step * 10**power for step in steps):
            if first <= math.log10(size) <= last:
                parts += [_line(x(size), top, x(size), height - bottom, "grid"),
                          _text(x(size), height - bottom + 16, short_count(size), "middle")]  # fmt: skip
    front = pareto_front([(size, score) for size, score in zip(sizes, scores)])
    path = " ".join(f"{x(sizes[i]):.1f},{y(scores[i]):.1f}" for i in front)
    parts.append(f'<polyline points="{path}" class="front"/>')
    for i, (name, _, _) in enumerate(marks):
        kind = "clear" if i in front else "mark"
        parts.append(f'<circle cx="{x(sizes[i]):.1f}" cy="{y(scores[i]):.1f}" r="4" class="{kind}"/>')
        parts.append(_text(x(sizes[i]) + 6, y(scores[i]) - 5, str(i + 1)))
        parts.append(_text(plot + 24, top + 12 + 20 * i, f"{i + 1}  {name}  {scores[i]:.1f}", kind="name"))
    parts.append(_text(left, height - 4, f"trainable parameters, average over the run; upwards the {what}"))
    return _svg(width, height, "Score against average trainable parameters", parts)
