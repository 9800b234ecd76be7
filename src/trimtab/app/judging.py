"""What a score is to be read against: the answer that needs no model, and the rows that were judged worst."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

WORST = 10
"""Rows that are kept with their text."""
_LENGTH = 300


def constant(task: Any, rows: DatasetDict, split: str) -> dict[str, Any] | None:
    """Scores of one answer to every row: the most frequent class of the training rows, or their mean.

    None where answers are written, or nothing is known of the training rows.
    """
    column = getattr(task, "label_column", None)
    if column is None or "train" not in rows or column not in rows["train"].column_names:
        return None
    labels, names = np.asarray(rows[split][column][:]), task.label_names
    if names is None:
        answer: Any = float(np.mean(rows["train"][column][:]))
        outputs = np.full((len(labels), 1), answer)
    else:
        most, _ = Counter(rows["train"][column][:]).most_common(1)[0]
        answer, outputs = names[int(most)], np.tile(np.eye(len(names))[int(most)], (len(labels), 1))
    return {"answer": answer, "metrics": task.compute_metrics((outputs, labels))}


def worst(task: Any, kept: Mapping[str, Any], rows: Dataset) -> list[dict[str, Any]]:
    """The rows that were judged worst, the worst first: wrong and sure of it, furthest off, or least expected.

    Args:
        kept: what the task's `row_scores` gave, in lists.
        rows: as they were read.
    """
    if kept.get("classes"):
        bad = [1 - p for p in kept.get("probability", ())]
    elif "predicted" in kept:
        bad = [abs(a - b) for a, b in zip(kept["predicted"], kept["label"])]
    elif "answer_loss" in kept:
        bad = [loss / max(n, 1) for loss, n in zip(kept["answer_loss"], kept["tokens"])]
    else:
        return []
    if len(bad) != len(rows) or not getattr(task, "counts_rows", True):
        return []  # rows were left out, or packed: which of these is which of those is not known
    found = []
    for i in sorted(range(len(bad)), key=lambda i: -bad[i])[:WORST]:
        told = _row_text(task, rows[i])
        if not told:
            return []
        if names := kept.get("classes"):
            told |= {"label": names[kept["label"][i]], "predicted": names[kept["predicted"][i]]}
            told["probability"] = kept["probability"][i]
        elif "predicted" in kept:
            told |= {"label": kept["label"][i], "predicted": kept["predicted"][i]}
        else:
            told["loss"] = bad[i]
        found.append({"row": i + 1, **told})
    return found


def _row_text(task: Any, row: Mapping[str, Any]) -> dict[str, Any]:
    """Text of a row as a reader knows it again; empty where the task keeps it in another way."""
    if names := getattr(task, "text_columns", None):
        return {"text": _short(" / ".join(str(row[name]) for name in names))}
    if messages := row.get("messages"):
        said = {message["role"]: str(message["content"]) for message in messages}  # the last of each
        return {"text": _short(said.get("user", "")), "label": _short(said.get("assistant", ""))}
    return {}


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH - 1].rsplit(' ', 1)[0]} …"
