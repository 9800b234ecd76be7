"""Block influence: the layers that turn the hidden states of their tokens most.

ShortGPT, arXiv 2403.03853, equation 1: BI_l = 1 − mean over tokens of cos(x_l, x_{l+1}), where x_l enters layer l. One
forward pass, all tokens but padding; without centring, unlike CKA, so that what all tokens share counts as alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import DataError, ModelError
from ..host.sites import base_with_weights, find_stacks
from ..plans import Where
from .controls import Among
from .importance import most_important
from .pooling import StackPooler, observed, run_backbone


def influence(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ratio: float | None = None,
    count: int | None = None,
    exclude: str | Iterable[int] = (),
    among: Among | None = None,
) -> Where:
    """The layers of the highest block influence.

    Args:
        batches: as for `trimtab.layer_similarity`.
    Raises:
        DataError: no batch.
        ModelError: the model has no blocks, or no weights (meta device); a block gives another width than it takes.
    """
    base = base_with_weights(model)
    poolers = [StackPooler(stack, "all", "exclude") for stack in find_stacks(base).values()]
    sums = [torch.zeros(len(pooler.stack), dtype=torch.float64) for pooler in poolers]
    tokens = [0] * len(poolers)
    with observed(base, poolers):
        for batch in batches:
            run_backbone(base, batch, poolers)
            for i, pooler in enumerate(poolers):
                rows = pooler.take()
                tokens[i] += len(rows[0])
                for layer, (a, b) in enumerate(pooler.pairs):
                    if rows[a].shape != rows[b].shape:
                        raise ModelError(
                            f"{pooler.stack.path}.{layer}: {_shape(rows[a])} enter it and {_shape(rows[b])} leave it, "
                            "and influence compares the same features before and after; choose by cka or gradient"
                        )
                sums[i] += torch.stack([block_influence(rows[a], rows[b]) for a, b in pooler.pairs])
    if not tokens or not tokens[0]:
        raise DataError("batches: there are none")
    values = {pooler.stack.path: (s / n).tolist() for pooler, s, n in zip(poolers, sums, tokens)}
    return most_important("influence", values, ratio, count, exclude, among, tokens=tokens[0])


def _shape(rows: Tensor) -> str:
    return f"{len(rows)} rows of {rows.shape[-1]} features"


def block_influence(x: Tensor, y: Tensor) -> Tensor:
    """Σ over tokens of 1 − cos(what enters, what leaves).

    Args:
        x, y: (tokens, d).
    """
    return (1 - nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)).sum()
