"""All questions in short form: ``python -m benchmarks``; ``--full`` takes the whole models.

Prints every row with its target and leaves one JSON file a question in benchmarks/results.
"""

from __future__ import annotations

from . import (
    cola_selection,
    freed_memory,
    freezing,
    memory,
    methods,
    products,
    scale,
    selection,
    startup,
    steps,
    whole_runs,
)
from . import salience as salience_script
from .common import Row, parser_for, prepared, save, show


def salience(short: bool) -> list[Row]:
    """Salience of all singular values, on two threads; rows in seconds and GiB."""
    out = []
    for row in salience_script.rows(full=not short):
        case, note = f"salience of {row['values']} values", f"{row['threads']} threads"
        spread = (row["spread"][0], row["spread"][1])
        out.append(Row(f"{case}, seconds", row["seconds"], row.get("target_seconds"), spread, note))
        out.append(Row(f"{case}, peak GiB", row["peak_gib"], row.get("target_peak_gib")))
    return out


QUESTIONS = {
    "steps": steps.rows,
    "products": products.rows,
    "freed_memory": freed_memory.rows,
    "freezing": freezing.rows,
    "methods": methods.rows,
    "memory": memory.rows,
    "selection": selection.rows,
    "cola_selection": cola_selection.rows,
    "salience": salience,
    "startup": startup.rows,
    "scale": scale.rows,
    "whole_runs": whole_runs.rows,
}


def main() -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--full", action="store_true", help="whole models, more rounds; without it the short form")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="these questions alone")
    options = prepared(parser)
    for question in options.only or QUESTIONS:
        answers = QUESTIONS[question](not options.full)
        save(question, answers, options, not options.full)
        show(question, answers)


if __name__ == "__main__":
    main()
