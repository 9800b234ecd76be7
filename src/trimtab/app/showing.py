"""Rows as the model will read them: the text of their tokens, and which of these are learned."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .recipe import Recipe

if TYPE_CHECKING:
    from rich.text import Text

MARKS = ("⟦", "⟧")
"""Around what is learned, where there is no colour."""


@dataclass(frozen=True)
class Example:
    """One training row."""

    row: int
    """Its place among the training rows that are kept, from 1."""
    tokens: int
    learned: int
    """Tokens that the loss is taken on."""
    pieces: list[tuple[str, bool]]
    """The text in order, each piece with whether it is learned."""
    label: str | None = None
    """The class (or number) to be found, where nothing is written."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def examples(recipe: Recipe, n: int) -> tuple[list[Example], list[str]]:
    """The first n training rows, ready for the model, and what was said while they were read. Weights are not read."""
    from datasets import DatasetDict

    from . import models
    from .planning import model_spec
    from .rows import load_rows
    from .tasks import get_task

    task = get_task(recipe.require_task().model_dump())
    rows = load_rows(recipe, task)
    spec = model_spec(recipe)
    config = models.load_config(spec, task)
    tokenizer = models.load_tokenizer(spec, task)
    part = rows["train"].select(range(min(n, len(rows["train"]))))
    ready = task.prepare(
        DatasetDict({"train": part}), tokenizer, models.meta_model(config, task.auto_class, spec.trust_remote_code)
    )
    return [_example(i, row, task, tokenizer) for i, row in enumerate(ready["train"], 1)], task.notes


def _example(number: int, row: dict[str, Any], task: Any, tokenizer: Any) -> Example:
    text = getattr(tokenizer, "tokenizer", tokenizer)
    ids, labels = row["input_ids"], row.get("labels")
    if not isinstance(labels, list):
        names = getattr(task, "label_names", None)
        label = None if labels is None else names[int(labels)] if names is not None else f"{labels:g}"
        return Example(number, len(ids), 0, [(text.decode(ids), False)], label)
    if len(labels) != len(ids) or getattr(task, "is_encoder_decoder", False):
        learned = [token for token in labels if token != -100]
        return Example(number, len(ids), len(learned), [(text.decode(ids), False), (text.decode(learned), True)])
    pieces = [
        (text.decode([token for token, _ in group]), is_learned)
        for is_learned, group in groupby(zip(ids, labels), key=lambda pair: pair[1] != -100)
    ]
    return Example(number, len(ids), sum(label != -100 for label in labels), pieces)


def shown(example: Example, is_coloured: bool) -> Text:
    """An example for people; what is learned is coloured, or stands in brackets."""
    from rich.text import Text

    counted = f", {example.learned} learned" if example.learned else ""
    out = Text.assemble((f"row {example.row} · {example.tokens} tokens{counted}\n", "bold"))
    for piece, is_learned in example.pieces:
        marked = f"{MARKS[0]}{piece}{MARKS[1]}" if is_learned and not is_coloured else piece
        out.append(marked, style="green" if is_learned else "")
    if example.label is not None:
        out.append(f"\n→ {example.label}", style="green")
    return out
