"""A way of choosing layers: some at the input, the rest at the output.

A method of the axis `where` is a function. It takes the model and, by name, its settings in the recipe's ``where:``,
and answers with a 0/1 string for each stack of layers. With a parameter ``batches`` it would be given training rows
too, and run after the weights are loaded; this one looks at nothing but the number of layers.
"""

from __future__ import annotations

from typing import Any

from trimtab.errors import ConfigError
from trimtab.where.controls import depths_of, mask_of, wanted


def ends(model: Any, ratio: float | None = None, count: int | None = None, low: int = 1) -> dict[str, str]:
    """The ``low`` lowest layers, and the highest ones.

    Args:
        ratio, count: how many layers of each stack, as in every method; half of them if neither is given.
        low: how many of them are at the input.

    >>> ends({"encoder.layer": 6}, count=3)
    {'encoder.layer': '100011'}
    """
    masks = {}
    for path, depth in depths_of(model).items():
        n = wanted(depth, ratio, count, path)
        if not 0 <= low <= n:
            raise ConfigError("where.low", low, f"from 0 to {n}, the number of layers chosen")
        masks[path] = mask_of(depth, [*range(low), *range(depth - (n - low), depth)])
    return masks
