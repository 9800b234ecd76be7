"""Writes the tables of docs/performance.md from benchmarks/results, so that no figure is copied by hand.

    python -m benchmarks.tables

A table stands between ``<!-- QUESTION -->`` and ``<!-- end -->``, QUESTION being a result file's name. A test
holds the page to what this makes.
"""

from __future__ import annotations

import json
import re

from . import RESULTS

PAGE = RESULTS.parents[1] / "docs" / "performance.md"
_BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(question: str) -> str:
    """The rows of one result file in Markdown, and how they were measured."""
    record = json.loads((RESULTS / f"{question}.json").read_text())
    machine = record["machine"]
    load = ", ".join(map(str, machine["load"]))
    lines = [
        f"{'Short form' if record['short'] else 'Full form'}; {machine['threads']} thread(s), {machine['clock']}, "
        f"freed memory {machine.get('freed memory', 'given back')}, load at the end {load}.",
        "",
        "| case | measured | quartiles | target | |",
        "|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        case = f"{row['case']} ({row['note']})" if row["note"] else row["case"]
        spread = "–".join(_number(x) for x in row["spread"]) if row["spread"] else ""
        target = "" if row["target"] is None else f"{row['target']:g}"
        verdict = "**not reached**" if row["verdict"] == "NOT reached" else row["verdict"]
        lines.append(f"| {case} | {_number(row['measured'])} | {spread} | {target} | {verdict} |")
    return "\n".join(lines) + "\n"


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 40 else f"{value:.3f}"


def filled(page: str) -> str:
    """The page with every table made anew."""
    return _BLOCK.sub(lambda found: found[1] + table(found[2]) + found[3], page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text()))
