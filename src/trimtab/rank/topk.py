"""Keep the best within a budget: the one rule by which every allocator cuts."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

from ..errors import SelectionError


def keep_top(scores: Tensor, budget: int, costs: Tensor | Sequence[int] | None = None) -> Tensor:
    """Which entries stay: the highest scores, ties to the lower index, never more than the budget.

    Args:
        scores: (n,), any device; NaN is refused.
        budget: without ``costs``, how many stay: exactly this many, or all n when there are fewer.
            With ``costs``, the largest total cost of what stays.
        costs: (n,) positive ints. Entries are kept in order of score as long as they fit one after
            the other; from the first that does not fit, what is left of the budget is filled with
            the cheapest (ties: higher score, then lower index).
    Returns:
        (n,) bool on the device of ``scores``.
    Raises:
        SelectionError: scores contain NaN, are not one-dimensional, or costs or budget make no sense.

    >>> keep_top(torch.tensor([3.0, 1.0, 3.0, 2.0]), 2).tolist()
    [True, False, True, False]
    >>> keep_top(torch.tensor([9.0, 8.0, 1.0, 2.0]), 10, costs=[6, 6, 2, 2]).tolist()
    [True, False, True, True]
    """
    if scores.dim() != 1:
        raise SelectionError(f"scores of shape {tuple(scores.shape)}: one score per entry is needed, shape (n,)")
    if isinstance(budget, bool) or not isinstance(budget, Integral) or budget < 0:
        raise SelectionError(f"budget={budget!r}: a whole number of at least 0 is needed")
    if torch.isnan(scores).any():
        raise SelectionError(f"{int(torch.isnan(scores).sum())} of {len(scores)} scores are NaN and cannot be ranked")
    order = torch.sort(scores, descending=True, stable=True).indices
    keep = torch.zeros_like(scores, dtype=torch.bool)
    if costs is None:
        keep[order[:budget]] = True
        return keep
    price = torch.as_tensor(costs, device=scores.device)
    if price.shape != scores.shape or price.is_floating_point() or (price <= 0).any():
        raise SelectionError("costs: one positive whole number per score is needed")
    spent = price[order].cumsum(0)
    first_out = int((spent <= budget).sum())  # cumulative costs rise, so these are a prefix
    keep[order[:first_out]] = True
    left = int(budget) - (int(spent[first_out - 1]) if first_out else 0)
    rest = order[first_out:]
    rest = rest[torch.sort(price[rest], stable=True).indices]  # cheapest first, then by score
    keep[rest[price[rest].cumsum(0) <= left]] = True
    return keep
