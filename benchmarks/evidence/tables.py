"""The tables of scores: all tasks together, each tuned task, each task at one rate, the decoder."""

from __future__ import annotations

from collections.abc import Iterable

from trimtab.app.report.words import byte_size, count, duration, listing, number, plural

from .matrix import RATES, ROWS, SEEDS, TASKS, TUNED, UNTUNED, Row, Task
from .results import BASELINE, Cell, Results, learned_nothing, seeds
from .words import interval, of_losses, points, spread, table


def overview(results: Results) -> str:
    """The scores of all tasks together, the best mean first, and how far each is from LoRA r 8 over them."""
    names, found = results.whole, []
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
    if any(seeds(cells.get(ROWS[name])) < len(SEEDS) for name in first):
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


def tasks(results: Results) -> str:
    """A table a task."""
    parts = []
    for task in results.measured:
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
