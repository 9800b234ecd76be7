"""How differences, intervals and scores are written on the evidence pages."""

from __future__ import annotations

from trimtab.app.report.pairing import Difference

from .results import Cell


def points(value: float) -> str:
    """A difference of scores in points: hundredths."""
    return f"{100 * value:+.1f}".replace("-", "−")


def interval(apart: Difference | None) -> str:
    """``−1.2 (−2.0 to −0.1)``; a dash where nothing can be paired."""
    if apart is None:
        return "–"
    if apart.low is None or apart.high is None:
        return points(apart.mean)
    return f"{points(apart.mean)} ({points(apart.low)} to {points(apart.high)})"


def spread(cell: Cell) -> str:
    """``84.1 ± 0.3``"""
    return f"{100 * cell.mean:.1f}" + ("" if cell.se is None else f" ± {100 * cell.se:.1f}")


def table(columns: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (columns, rule, *rows))


def of_losses(apart: Difference | None) -> str:
    """``+0.012 (−0.003 to +0.027)``; above zero is worse."""
    if apart is None:
        return "–"
    ends = [f"{x:+.3f}".replace("-", "−") for x in (apart.mean, apart.low, apart.high) if x is not None]
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if len(ends) == 3 else ends[0]
