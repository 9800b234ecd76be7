"""docs/evidence.md: its tables, verdicts and figures, made from the JSON files alone.

The text around them is written by hand. A block stands between ``<!-- NAME -->`` and ``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trimtab.app.report.pairing import Difference
from trimtab.app.report.words import byte_size, count, duration, listing, number, plural

from .figures import dots, pareto
from .matrix import RATES, ROWS, SEEDS, TASKS, TUNED, UNTUNED, Row, Task
from .results import BASELINE, Cell, Results, learned_nothing

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


# -- words ---------------------------------------------------------------------------------------------


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


# -- the questions -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """Whether one row is above another, or at most a margin below it, by the whole interval."""

    text: str
    ours: str
    theirs: str
    margin: float = 0.0

    def verdict(self, apart: Difference | None) -> str:
        """
        >>> Question("", "a", "b", .01).verdict(Difference("b", -.002, -.005, .001, 3, None))
        'yes'
        """
        if apart is None:
            return "not run yet"
        if apart.low is None or apart.high is None:
            return "too few runs"
        if apart.low > -self.margin:
            return "yes"
        return "no" if apart.high < -self.margin else "cannot be told"


QUESTIONS = (
    Question("CKA's half above a random half?", "cka-lora", "random-lora"),
    Question("CKA's half above a uniform half?", "cka-lora", "uniform-lora"),
    Question("CKA's half above the last half?", "cka-lora", "last-lora"),
    Question("A half by gradient above CKA's?", "gradient-lora", "cka-lora"),
    Question("A half by Fisher information above CKA's?", "fisher-lora", "cka-lora"),
    Question("A half by block influence above CKA's?", "influence-lora", "cka-lora"),
    Question("CKA's half at most half a point below LoRA r 8?", "cka-lora", "lora-r8", 0.005),
    Question("CKA's half × SalientLoRA at most half a point below LoRA r 8?", "cka-salientlora-late", "lora-r8", 0.005),
    Question("SalientLoRA from LoRA's start above the paper's start?", "salientlora-late", "salientlora-svd"),
    Question("SalientLoRA above itself pruning early?", "salientlora-late", "salientlora"),
    Question("SalientLoRA above AdaLoRA, both 8→4?", "salientlora-late", "adalora"),
    Question("AdaLoRA above LoRA r 4, of as many ranks?", "adalora", "lora-r4"),
    Question("SalientLoRA above LoRA r 4, of as many ranks?", "salientlora-late", "lora-r4"),
    Question("And pruning early?", "salientlora", "lora-r4"),
    Question("Ours above PEFT's AdaLoRA at its defaults?", "adalora", "peft-adalora"),
    Question("And at a fair scale?", "adalora", "peft-adalora-scaled"),
    Question("The composition above itself pruning early?", "composition-latest", "composition-late"),
    Question("The composition at most a point below LoRA r 8?", "composition-latest", "lora-r8", 0.01),
    Question("And pruning early?", "composition-late", "lora-r8", 0.01),
    Question("The composition above LoRA r 2, which holds as much?", "composition-latest", "lora-r2"),
    Question("And pruning early?", "composition-late", "lora-r2"),
    Question("AFLoRA above itself freezing early?", "aflora-late", "aflora"),
    Question("The composition, pruning early, above itself freezing early, too?", "composition-late", "composition"),
    Question("AFLoRA freezing early, with vectors at ten times the rate, above without?", "aflora-vectors", "aflora"),
    Question("AFLoRA with vectors at ten times the rate above without?", "aflora-late-vectors", "aflora-late"),
    Question(
        "Block influence's half × SalientLoRA at most two points below LoRA r 8?",
        "influence-salientlora",
        "lora-r8",
        0.02,
    ),
    Question(
        "That × AFLoRA, with faster vectors, at most two points below LoRA r 8?",
        "influence-composition-vectors",
        "lora-r8",
        0.02,
    ),
    Question("Under one budget at most a point below LoRA r 8?", "budget-late", "lora-r8", 0.01),
    Question("Under one budget above LoRA r 2, which trains as much on average?", "budget-late", "lora-r2"),
)


def questions(results: Results) -> str:
    """Each question, answered on every tuned task, over those, and over the tasks that were run at the one rate."""
    known, rows = measured(results), []
    for one in QUESTIONS:
        tuned = _over(results, known, one)
        untuned = _over(results, swapped(results), one, UNTUNED)
        verdict = one.verdict(tuned or untuned)
        if one.theirs == "last-lora" and not (tuned or untuned) and (alike := results.cka_takes_the_last_half):
            verdict = f"the same layers {alike}"
        elif untuned and not tuned:
            verdict += ", untuned"
        each = (results.apart(task, one.ours, one.theirs) for task in known)
        rows.append([one.text, *map(interval, (*each, tuned, untuned)), f"**{verdict}**"])
    titles = [TASKS[name].title for name in known]
    return table(["", *titles, "tuned, pooled", "untuned, pooled", "holds here?"], rows)


def _over(results: Results, names: list[str], one: Question, rate: str | None = None) -> Difference | None:
    """Over the tasks that have both rows; of one task alone its own interval, which knows the scored rows."""
    both = [name for name in names if results.apart(name, one.ours, one.theirs, rate)]
    if len(both) == 1:
        return results.apart(both[0], one.ours, one.theirs, rate)
    return results.pooled(tuple(both), one.ours, one.theirs, rate) if both else None


# -- the tables ----------------------------------------------------------------------------------------


def whole(results: Results) -> list[str]:
    """Tasks on which every row that a user chooses between is to be tuned."""
    return [name for name in measured(results) if set(TUNED) <= set(TASKS[name].tuned)]


def overview(results: Results) -> str:
    """The scores of all tasks together, the best mean first, and how far each is from LoRA r 8 over them."""
    names, found = whole(results), []
    for row in (ROWS[name] for name in TUNED):
        cells = [cell for name in names if (cell := results.cell(name, row.name))]
        if len(cells) < len(names):
            continue
        apart = None if row.name == BASELINE else results.pooled(tuple(names), row.name, BASELINE)
        held, sizes = (sum(cell.of("params", key) for cell in cells) / len(cells) for key in ("held", "average"))
        mean = sum(cell.mean for cell in cells) / len(cells)
        scores = [f"{100 * cell.mean:.1f}" for cell in cells]
        found.append((-mean, [row.title, *scores, f"{100 * mean:.1f}", interval(apart), count(held), count(sizes)]))
    columns = ["", *(TASKS[name].title for name in names), "mean", "points to LoRA r 8", "held", "trained on average"]
    return table(columns, [cells for _, cells in sorted(found)])


def swapped(results: Results) -> list[str]:
    """Tasks with rows to compare at the one rate, on drawn rows."""
    return [name for name, task in TASKS.items() if not (task.is_variant or task.is_decoder)
            and results.cell(name, BASELINE, UNTUNED)
            and any(results.cell(name, row, UNTUNED) for row in task.swapped if row != BASELINE)]  # fmt: skip


def measured(results: Results) -> list[str]:
    """Tasks with a tuned row."""
    return [name for name, task in TASKS.items() if any(results.cell(name, row) for row in task.tuned)]


def untuned(results: Results) -> str:
    """Methods swapped at LoRA's own rate."""
    names = [task.name for task in TASKS.values()
             if task.swapped and not task.is_decoder
             and any(results.cell(task.name, BASELINE, rate) for rate in (UNTUNED, Task.rate))]  # fmt: skip
    return "\n\n".join(
        f"### {TASKS[name].title}, rate {TASKS[name].rate}\n\n{_untuned(results, name)}" for name in names
    )


def _untuned(results: Results, task: str) -> str:
    rows, behind, first = [], [], TASKS[task].swapped[:5]
    cells = {row: results.cell(task, row.name, UNTUNED) for row in map(ROWS.__getitem__, TASKS[task].swapped)}
    for row, cell in cells.items():
        if cell is None:
            continue
        apart = None if row.name == BASELINE else results.apart(task, row.name, BASELINE, UNTUNED)
        if row.name in first and apart is not None and apart.mean < -0.02:
            behind.append(f"{row.title} ({points(apart.mean)})")
        rows.append([row.title, spread(cell), interval(apart), number(cell.of("loss"), 3), str(len(cell.records)),
                     ", ".join(f"{100 * one['score']:.1f}" for one in cell.records),
                     *(count(cell.of("params", key)) for key in ("final", "average"))])  # fmt: skip
    if not rows:
        return f"Not run yet.{_at_the_common_rate(results, task)}"
    metric = next(one["metric"] for one in results.records if one["task"] == task).replace("_", " ")
    columns = ["", metric, "points to LoRA r 8", "loss", "seeds", "each seed", "trained at the end", "on average"]
    if any(_seeds(cells.get(ROWS[name])) < len(SEEDS) for name in first):
        said = "Not all of the first five are run yet."
    elif behind:
        said = f"Of the four methods above, more than two points under LoRA: {listing(behind)}."
    else:
        said = "Of the four methods above none is more than two points under LoRA."
    left = [row.title for row, cell in cells.items() if cell is None]
    not_run = f"\n\nNot run yet: {'; '.join(left)}." if left else ""
    return f"{table(columns, rows)}\n\n{said}{_stuck(cells.values())}{_at_the_common_rate(results, task)}{not_run}"


def _at_the_common_rate(results: Results, task: str) -> str:
    """What was run at most tasks' rate before this one was given its own."""
    common = Task.rate
    cells = [results.cell(task, name, common) for name in TASKS[task].swapped] if TASKS[task].rate != common else []
    if not (known := [cell for cell in cells if cell]):
        return ""
    each = {
        ROWS[cell.row].title: [f"{100 * one['score']:.1f}".replace("-", "−") for one in cell.records] for cell in known
    }
    scores = "; ".join(f"{title} {listing(scores)}" for title, scores in each.items())
    return f"\n\nAt {common}, by seed: {scores}.{_stuck(known)}"


def _stuck(cells: Iterable[Cell | None]) -> str:
    """Names the runs that answer every row alike: a mean over seeds hides them."""
    found = [f"{ROWS[one['row']].title} with seed {one['seed']}" for cell in cells if cell for one in cell.records
             if learned_nothing(one)]  # fmt: skip
    return f" {listing(found)} learned nothing: one answer for every row, or a correlation below 10." if found else ""


def decoder(results: Results) -> str:
    """The loss on held-out answers at equal steps, with what was trained. Not the time: these runs did not have the
    machine to themselves."""
    parts = []
    for task in (task for task in TASKS.values() if task.is_decoder):
        cells = [(ROWS[name], results.cell(task.name, name, UNTUNED)) for name in task.swapped]
        if not (known := [(row, cell) for row, cell in cells if cell]):
            continue
        rows = []
        for row, cell in known:
            apart = None if row.name == BASELINE else results.apart(task.name, row.name, BASELINE, UNTUNED)
            rows.append([row.title, f"{cell.mean:.3f}", of_losses(apart), str(len(cell.records)),
                         *(count(cell.of("params", key)) for key in ("final", "average")),
                         byte_size(max(one["peak_memory_bytes"] for one in cell.records))])  # fmt: skip
        columns = ["", "loss", "to LoRA r 8", "seeds", "trained at the end", "on average", "peak memory"]
        left = [row.title for row, cell in cells if cell is None]
        said = f"\n\nNot run yet: {'; '.join(left)}." if left else ""
        parts.append(f"### {task.title}\n\n{table(columns, rows)}{said}")
    return "\n\n".join(parts) or "Not run yet."


def of_losses(apart: Difference | None) -> str:
    """``+0.012 (−0.003 to +0.027)``; above zero is worse."""
    if apart is None:
        return "–"
    ends = [f"{x:+.3f}".replace("-", "−") for x in (apart.mean, apart.low, apart.high) if x is not None]
    return f"{ends[0]} ({ends[1]} to {ends[2]})" if len(ends) == 3 else ends[0]


def tasks(results: Results) -> str:
    """A table a task."""
    parts = []
    for task in measured(results):
        rows = [_of_task(results, task, ROWS[name]) for name in TASKS[task].tuned if results.cell(task, name)]
        setting, metric = TASKS[task], next(one["metric"] for one in results.records if one["task"] == task)
        length = f"{count(setting.rows)} training rows, {plural(setting.epochs, 'epoch')}, batch 16"
        tuning = f"rates chosen with {count(setting.tuning_rows)} of them, a fifth held out"
        if setting.held_back:
            tuning = f"rates chosen by seed 0 on {setting.held_back} other training rows"
        columns = ["", metric.replace("_", " "), "points to LoRA r 8", "loss", "rate", "seeds",
                   "parameters, initial", "final", "average", "CPU time", "peak memory"]  # fmt: skip
        said = _stuck(results.cell(task, row) for row in ROWS) + _lowered(results, task)
        parts.append(f"### {setting.title}\n\n{length}; {tuning}.{said}\n\n{table(columns, rows)}")
    return "\n\n".join(parts) or "No row is tuned on its task yet."


def _lowered(results: Results, task: str) -> str:
    """Names the rows whose first rate failed in a whole run."""
    found = []
    for row in ROWS.values():
        *failed, chosen = results.turns.get((task, row.name), [None])
        if failed:
            found.append(f"{row.title} ({listing([str(rate) for rate in failed])}, now {chosen or 'none'})")
    said = "Given a lower rate, since with one seed or more the one chosen taught nothing"
    return f" {said}: {'; '.join(found)}." if found else ""


def _of_task(results: Results, task: str, row: Row) -> list[str]:
    cell = results.cell(task, row.name)
    assert cell
    edge = " (the lowest tried)" if cell.rate == RATES[0] else " (the highest tried)" if cell.rate == RATES[-1] else ""
    apart = None if row.name == BASELINE else results.apart(task, row.name, BASELINE)
    return [row.title, spread(cell), interval(apart), number(cell.of("loss"), 3), cell.learning_rate + edge,
            str(len(cell.records)), *(count(cell.of("params", key)) for key in ("initial", "final", "average")),
            duration(cell.of("cpu_seconds", "training")),
            byte_size(max(one["peak_memory_bytes"] for one in cell.records))]  # fmt: skip


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
        rows = [row for row in tuned if _seeds(results.cell(task.name, row.name)) < len(SEEDS)]
        some = [f"{row.title} ({_seeds(results.cell(task.name, row.name))} of {len(SEEDS)} seeds)"
                if results.cell(task.name, row.name) else row.title for row in rows]  # fmt: skip
        if len(rows) == len(tuned):
            some = ["every row"]
        if some:
            lines.append(f"- {task.title}: {'; '.join(some)}")
    return "\n".join(lines) or "Everything is run."


def _seeds(cell: Cell | None) -> int:
    return len(cell.records) if cell else 0


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


# -- the figures ---------------------------------------------------------------------------------------


def figures(results: Results) -> dict[str, str]:
    """File name -> SVG, of the tasks on which every row is to be tuned, and of these rows."""
    tasks = whole(results)
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
