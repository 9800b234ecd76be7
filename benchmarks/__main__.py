"""All questions in short form: ``python -m benchmarks``; ``--full`` takes the whole models.

Prints every row with its target and leaves one JSON file a question in benchmarks/results.
"""

from __future__ import annotations

import argparse

import torch

from . import freezing, memory, methods, selection, startup, steps
from . import salience as salience_script
from .common import Row, save, show


def salience(short: bool) -> list[Row]:
    """Salience of all singular values; the row is in seconds."""
    out = []
    for row in salience_script.rows(full=not short):
        target = row.get("target_seconds")
        out.append(Row(f"salience of {row['values']} values, seconds", row["seconds"], target, tuple(row["spread"])))
    return out


QUESTIONS = {
    "steps": steps.rows,
    "freezing": freezing.rows,
    "methods": methods.rows,
    "memory": memory.rows,
    "selection": selection.rows,
    "salience": salience,
    "startup": startup.rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="whole models, more rounds")
    parser.add_argument("--short", action="store_true", help="the default")
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="these questions alone")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for question in options.only or QUESTIONS:
        answers = QUESTIONS[question](not options.full)
        save(question, answers, not options.full)
        show(question, answers)


if __name__ == "__main__":
    main()
