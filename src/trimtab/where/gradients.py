"""Layers by the gradient of the loss at the start of training, on labelled batches.

``gradient``: I_l = (1/K) Σ_k √(Σ_{W ∈ l} ‖∂L_k/∂W‖²_F), the size of the gradient of a layer's weight matrices.
``fisher``: I_l = (1/(K·|l|)) Σ_k Σ_{w ∈ l} (∂L_k/∂w)², the diagonal of the empirical Fisher information per weight, a
batch standing for a row; what the CKA paper (arXiv 2602.05988) compares with.

K batches, W the matrices of a layer's linears, |l| their number of weights. A gradient is reduced to a number and
dropped as soon as it is there: one is alive at a time, and the base needs no room for any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import DataError, ModelError
from ..host.probe import gradients_of, loss_of
from ..host.sharding import is_sharded
from ..host.sites import base_with_weights, find_stacks
from ..plans import Where
from .controls import Among
from .importance import most_important


def gradient(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ratio: float | None = None,
    count: int | None = None,
    exclude: str | Iterable[int] = (),
    among: Among | None = None,
) -> Where:
    """The layers whose weights the loss asks to move most.

    Args:
        batches: labelled, as for `layer_gradients`, which also says what is raised.
        ratio, count, exclude, among: as for `most_important`.
    """
    found = layer_gradients(model, batches)
    return most_important("gradient", found.norms(), ratio, count, exclude, among, n=found.rows)


def fisher(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    ratio: float | None = None,
    count: int | None = None,
    exclude: str | Iterable[int] = (),
    among: Among | None = None,
) -> Where:
    """The layers of the highest Fisher information per weight; arguments and errors as of `gradient`."""
    found = layer_gradients(model, batches)
    return most_important("fisher", found.information(), ratio, count, exclude, among, n=found.rows)


@dataclass(frozen=True)
class LayerGradients:
    """Squared gradients of each layer's matrices, batch by batch."""

    squares: dict[str, list[list[float]]]
    """Stack -> layer -> batch: Σ over the layer's weights of the squared gradient."""
    sizes: dict[str, list[int]]
    """Stack -> layer: its number of weights."""
    rows: int

    def norms(self) -> dict[str, list[float]]:
        """``gradient`` of each layer."""
        return self._mean(lambda square, size: math.sqrt(square))

    def information(self) -> dict[str, list[float]]:
        """``fisher`` of each layer."""
        return self._mean(lambda square, size: square / size)

    def _mean(self, of: Callable[[float, int], float]) -> dict[str, list[float]]:
        return {
            path: [sum(of(s, size) for s in batches) / len(batches) for batches, size in zip(layers, self.sizes[path])]
            for path, layers in self.squares.items()
        }


def layer_gradients(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> LayerGradients:
    """One forward and backward pass per batch, in evaluation mode; the model is left as it was.

    Args:
        batches: what the model's forward takes, labels included.
    Raises:
        DataError: no batch, or one from which the model makes no loss.
        ModelError: no weights (meta device), none that has a gradient (a quantised base), or one that two layers share.
    """
    if is_sharded(model):
        raise ModelError("model: it is sharded, and base gradients are read on one process; choose layers before that")
    base = base_with_weights(model)
    stacks = {path: [_matrices(block) for block in stack.blocks] for path, stack in find_stacks(base).items()}
    for path, layers in stacks.items():
        for layer, weights in enumerate(layers):
            if not weights:
                raise ModelError(f"{path}.{layer}: no linear with a gradient; a quantised base has none")
    every = [weight for layers in stacks.values() for weights in layers for weight in weights]
    if len(set(every)) < len(every):
        raise ModelError("model: two layers share their weights, and cannot be chosen one by one")
    squares: dict[str, list[list[float]]] = {path: [[] for _ in layers] for path, layers in stacks.items()}
    rows = 0
    taken: dict[nn.Parameter, float] = {}

    def take(weight: nn.Parameter, gradient: Tensor) -> None:
        exact = torch.float32 if gradient.device.type == "mps" else torch.float64
        taken[weight] = float(gradient.float().pow(2).sum(dtype=exact))

    with gradients_of(base, every, take):
        for batch in batches:
            loss_of(base, batch).backward()
            rows += len(next(iter(batch.values())))
            for path, layers in stacks.items():
                for layer, weights in enumerate(layers):
                    squares[path][layer].append(sum(taken.pop(weight, 0.0) for weight in weights))
    if not rows:
        raise DataError("batches: there are none")
    sizes = {path: [sum(w.numel() for w in weights) for weights in layers] for path, layers in stacks.items()}
    return LayerGradients(squares, sizes, rows)


def _matrices(block: nn.Module) -> list[nn.Parameter]:
    """Weights of a layer's linears that a gradient can reach; those of integers (quantised) have none."""
    linears: list[Any] = [module for module in block.modules() if isinstance(module, (nn.Linear, Conv1D))]
    return [linear.weight for linear in linears if linear.weight.is_floating_point()]
