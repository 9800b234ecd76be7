"""docs/evidence.md: its tables, verdicts and figures, made from the JSON files alone.

The text around them is written by hand. A block stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trimtab.app.report.words import listing, plural

from .figures import dots, pareto
from .matrix import ROWS, SEEDS, TASKS, TUNED, Row
from .questions import questions
from .results import BASELINE, Results, seeds
from .tables import decoder, overview, tasks, untuned

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
_BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def write(folder: Path) -> None:
    """The page with every block made anew, and its figures."""
    results = Results(folder)
    PAGE.write_text(filled(PAGE.read_text(), results))
    for name, svg in figures(results).items():
        (PAGE.parent / name).write_text(svg)


def filled(page: str, results: Results) -> str:
    return filled_with(page, {name: lambda name=name: BLOCKS[name](results) for name in BLOCKS})


def filled_with(page: str, blocks: Mapping[str, Callable[[], str]]) -> str:
    """A page with what stands between its marks made anew."""
    return _BLOCK.sub(lambda found: found[1] + blocks[found[2]]() + "\n" + found[3], page)


def extent(results: Results) -> str:
    finals = sum(not one["tuning"] for one in results.records)
    return (
        f"{plural(len(results.records), 'run')} so far, {finals} of them scored on validation and the others to choose "
        f"rates; {results.cpu_hours:.1f} CPU hours."
    )


def missing(results: Results) -> str:
    """What of the matrix there is no run of."""
    lines = []
    for task in (task for task in TASKS.values() if task.tuned):
        tuned = [ROWS[name] for name in task.tuned]
        rows = [row for row in tuned if seeds(results.cell(task.name, row.name)) < len(SEEDS)]
        some = [f"{row.title} ({seeds(results.cell(task.name, row.name))} of {len(SEEDS)} seeds)"
                if results.cell(task.name, row.name) else row.title for row in rows]  # fmt: skip
        if len(rows) == len(tuned):
            some = ["every row"]
        if some:
            lines.append(f"- {task.title}: {'; '.join(some)}")
    return "\n".join(lines) or "Everything is run."


def notes(results: Results) -> str:
    """What a row's name does not say."""
    return "\n".join(f"- {row.title}: {row.note}." for row in ROWS.values() if row.note)


def drawn(results: Results) -> str:
    """The figures that there are."""
    made = figures(results)
    return "\n\n".join(f"![{what}]({name})" for name, what in FIGURES.items() if name in made)


BLOCKS: dict[str, Callable[[Results], str]] = {
    "extent": extent,
    "overview": overview,
    "untuned": untuned,
    "decoder": decoder,
    "questions": questions,
    "notes": notes,
    "figures": drawn,
    "tasks": tasks,
    "missing": missing,
}


FIGURES = {
    "evidence_differences.svg": "differences to LoRA r 8, with intervals",
    "evidence_pareto.svg": "score against average trainable parameters",
}


def figures(results: Results) -> dict[str, str]:
    """File name -> SVG, of the tasks on which every row is to be tuned, and of these rows."""
    tasks = results.whole
    titles = [TASKS[name].title for name in tasks]
    rows = [row for row in ROWS.values() if row.name in TUNED and any(results.cell(t, row.name) for t in tasks)]
    others = [row for row in rows if row.name != BASELINE]
    apart = [[results.apart(task, row.name, BASELINE) for task in tasks] for row in others]
    differences, front = FIGURES
    found = {differences: dots([row.title for row in others], titles, apart)} if tasks else {}
    if len(marks := _marks(results, rows, tasks)) > 1:
        found[front] = pareto(marks, f"score on {listing(titles)}, tuned")
    return found


def _marks(results: Results, rows: list[Row], tasks: Sequence[str]) -> list[tuple[str, float, float]]:
    """Name, average parameters and score of the rows that all tasks have: only those can be averaged alike."""
    marks = []
    for row in rows:
        known = [cell for task in tasks if (cell := results.cell(task, row.name))]
        if len(known) == len(tasks):
            size = sum(cell.of("params", "average") for cell in known) / len(known)
            marks.append((row.title, size, sum(cell.mean for cell in known) / len(known)))
    return marks
