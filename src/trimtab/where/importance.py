"""Selections by how much a layer matters, measured on training batches: highest first, ties to the lower index."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from ..errors import ConfigError, SelectionError
from ..plans import Where
from .controls import Among, candidates, mask_of, wanted


def most_important(
    method: str,
    importance: Mapping[str, Sequence[float]],
    ratio: float | None = None,
    count: int | None = None,
    exclude: str | Iterable[int] = (),
    among: Among | None = None,
    **facts: Any,
) -> Where:
    """The layers of the highest importance, ``count`` or floor(ratio · M) of each stack.

    Args:
        importance: a number per layer, for each stack.
        exclude: layers never chosen; ``auto``, the recipe's default, excludes none.
        among: the only layers to choose from, of which M is the number; see `trimtab.where.with_targets`.
        facts: what else belongs into the selection's scores, such as the number of rows.

    Raises:
        ConfigError: a ratio or count that chooses nothing, or more than may be chosen.
        SelectionError: an importance that is not a number.

    >>> most_important("gradient", {"layers": [0.1, 0.4, 0.4, 0.2]}, count=1).mask
    '0100'
    """
    out = set() if exclude == "auto" else {exclude} if isinstance(exclude, int) else set(exclude)
    chosen = {}
    for path, values in importance.items():
        depth = len(values)
        for layer in out:
            if not isinstance(layer, Integral) or not 0 <= int(layer) < depth:
                raise ConfigError("where.exclude", layer, f"a layer index from 0 to {depth - 1}")
        for layer, value in enumerate(values):
            if not math.isfinite(value):
                raise SelectionError(
                    f"{path}: {method} of layer {layer} is {value}; layers cannot be ranked. Load the model in float32 "
                    "or bfloat16, and check its weights"
                )
        own = candidates(among, path, depth)
        n = wanted(len(own), ratio, count, path if len(importance) > 1 else "") if own else 0
        ranked = sorted((i for i in own if i not in out), key=lambda i: -values[i])  # stable
        if n > len(ranked):
            key = "where.ratio" if count is None else "where.count"
            raise ConfigError(key, count or ratio or 0.5, f"asks for {n} of {len(own)} layers, {len(out)} are excluded")
        chosen[path] = mask_of(depth, ranked[:n])
    stacks = {path: {"importance": [float(v) for v in values]} for path, values in importance.items()}
    return Where(method, chosen, {**facts, "stacks": stacks})
