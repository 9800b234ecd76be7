"""Which blocks of a model are adapted, decided before training.

`METHODS` is what the recipe, the command line and the report read; no torch is imported here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..plans import Where
from . import controls
from .controls import first, from_mask, last, random, uniform

__all__ = ["METHODS", "Method", "choose", "first", "from_mask", "last", "random", "uniform"]


@dataclass(frozen=True)
class Method:
    """One way of choosing layers, as `trimtab methods` lists it."""

    name: str
    summary: str
    paper: str = ""
    needs_scores: bool = False
    """Needs one forward pass over data (`trimtab.layer_similarity`)."""
    settings: tuple[str, ...] = ("ratio", "count")
    """Recipe keys under ``where`` that it reads, beside ``method``."""


METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "cka",
            "the layers whose output differs most from their input, measured on data",
            "Layer-wise LoRA with CKA, arXiv 2602.05988",
            needs_scores=True,
            settings=("ratio", "count", "samples", "pool", "estimator", "final_norm", "exclude", "degenerate"),
        ),
        Method("uniform", "evenly spaced layers"),
        Method("first", "the layers nearest to the input"),
        Method("last", "the layers nearest to the output"),
        Method("random", "layers drawn at random", settings=("ratio", "count", "seed")),
        Method("mask", "your own choice, one 0 or 1 per layer", settings=("mask",)),
    )
}


def choose(
    method: str,
    model: Any,
    *,
    ratio: float | None = None,
    count: int | None = None,
    mask: str | Mapping[str, str] | None = None,
    seed: int = 0,
    scores: Any = None,
    exclude: str | Iterable[int] | Mapping[str, Iterable[int]] = "auto",
    degenerate: str = "exclude",
) -> Where:
    """A selection by the name of its method; ``cka`` needs ``scores`` from `trimtab.layer_similarity`.

    Raises:
        ConfigError: an unknown method, or one without what it needs.

    >>> choose("last", {"layers": 4}, count=1).mask
    '0001'
    """
    if method not in METHODS:
        raise ConfigError("where.method", method, f"one of {', '.join(METHODS)}.{did_you_mean(str(method), METHODS)}")
    if method == "cka":
        if scores is None:
            raise ConfigError("where.method", method, "needs layer scores; run layer_similarity first")
        from .cka import select_layers

        return select_layers(scores, ratio=ratio, count=count, exclude=exclude, degenerate=degenerate)
    if method == "mask":
        if mask is None:
            raise ConfigError("where.mask", None, "a string of 0 and 1, one per layer")
        return from_mask(model, mask)
    if method == "random":
        return controls.random(model, ratio, count, seed)
    return {"uniform": uniform, "first": first, "last": last}[method](model, ratio, count)
