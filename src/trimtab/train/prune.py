"""Cut ranks for good: parameters, gradients and optimizer moments together.

`mask` hides and may return; `prune` is what this file does. The `Parameter` objects stay the same, so
optimizers, schedulers and hooks keep working.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..host.layers import TrimLayer, set_data

if TYPE_CHECKING:
    from ..rank.base import RankSettings

# Optimizers whose state is element-wise in the parameter, so that index-selecting it is exact. Others
# (Adafactor's column statistics, 8-bit blocks that cross rows, anything unknown) keep masks only.
_ELEMENTWISE = (
    torch.optim.AdamW,
    torch.optim.Adam,
    torch.optim.SGD,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adamax,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
)


@dataclass(frozen=True)
class Freed:
    """Bytes that a cut gave back."""

    parameters: int = 0
    gradients: int = 0
    moments: int = 0

    def __add__(self, other: Freed) -> Freed:
        return Freed(self.parameters + other.parameters, self.gradients + other.gradients, self.moments + other.moments)


def unwrap_optimizer(optimizer: Any) -> torch.optim.Optimizer | None:
    """The torch optimizer inside accelerate's, Lightning's or Fabric's wrapper (or any with ``.optimizer``)."""
    while optimizer is not None:
        inner = getattr(optimizer, "optimizer", None)
        # Lightning's and Fabric's wrappers are made subclasses of what they wrap, and hold copies of its attributes.
        is_wrapper = isinstance(inner, torch.optim.Optimizer) or type(optimizer).__name__ == "AcceleratedOptimizer"
        if isinstance(optimizer, torch.optim.Optimizer) and not is_wrapper:
            return optimizer
        optimizer = inner
    return None


def why_not_cuttable(optimizer: torch.optim.Optimizer | None) -> str | None:
    """None if moments can be cut exactly, else the reason in words."""
    if optimizer is None:
        return "there is no torch optimizer to cut moments in"
    if type(optimizer) in _ELEMENTWISE:
        return None
    if isinstance(optimizer, _ELEMENTWISE) and all(  # a subclass may keep something else
        isinstance(p, Tensor) and (not isinstance(value, Tensor) or value.dim() == 0 or value.shape == p.shape)
        for p, state in optimizer.state.items()
        for value in state.values()
    ):
        return None
    return f"the state of {type(optimizer).__name__} is not element-wise in the parameter, or not known to be"


def why_masks_only(rank: RankSettings | None, optimizer: torch.optim.Optimizer | None) -> str | None:
    """None if a run's ranks can be cut, else the reason in words; warns where the optimizer is the reason."""
    if rank is None:
        return None
    if (
        not rank.e_decays
        and optimizer is not None
        and any(group.get("weight_decay") and not decouples_decay(optimizer, group) for group in optimizer.param_groups)
    ):
        warnings.warn(
            f"weight_decay: in {type(optimizer).__name__} it is part of the gradient, so it also pulls at "
            f"{rank.method}'s gates; use AdamW, or set it to 0",
            stacklevel=3,
        )
    if not rank.prune:
        return "prune is off"
    reason = why_not_cuttable(optimizer)
    if reason:
        warnings.warn(
            f"ranks are masked, not pruned: {reason}. Memory stays as it is; use torch's AdamW, Adam or "
            "SGD to have it freed.",
            stacklevel=3,
        )
    return reason


def decouples_decay(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay takes ``lr · weight_decay · p`` from a parameter, apart from its gradient."""
    return bool(group.get("decoupled_weight_decay", "AdamW" in type(optimizer).__name__))


def cut_parameter(parameter: nn.Parameter, keep: Tensor, dim: int, optimizer: torch.optim.Optimizer | None) -> Freed:
    """Keep the entries ``keep`` (indices, int64) of ``dim``, in parameter, gradient and moments.

    Returns:
        The bytes given back.
    """
    shape, before = parameter.shape, parameter.numel() * parameter.element_size()
    gradient = parameter.grad
    cut = parameter.data.index_select(dim, keep)
    set_data(parameter, cut)
    gradients = 0
    if gradient is not None:
        parameter.grad = gradient.index_select(dim, keep)
        gradients = before - parameter.numel() * parameter.element_size()
    moments = 0
    state = optimizer.state.get(parameter, {}) if optimizer is not None else {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape and value.dim() > 0:
            state[key] = value.index_select(dim, keep)
            moments += (value.numel() - state[key].numel()) * value.element_size()
    return Freed(before - parameter.numel() * parameter.element_size(), gradients, moments)


def prune_layer(layer: TrimLayer, adapter_name: str, keep: Tensor, optimizer: torch.optim.Optimizer | None) -> Freed:
    """Cut the ranks where ``keep`` (r,) bool is False out of A, e and B of one layer."""
    A, B = layer.factors(adapter_name)
    e, _ = layer.diagonals(adapter_name)
    indices = keep.nonzero().squeeze(1).to(A.device)
    freed = cut_parameter(A, indices, 0, optimizer) + cut_parameter(B, indices, 1, optimizer)
    if e is not None:
        freed += cut_parameter(e, indices, 0, optimizer)
    layer.resized(adapter_name)
    return freed


def drop_optimizer_state(parameter: nn.Parameter, optimizer: torch.optim.Optimizer | None) -> int:
    """Forget what the optimizer knows of a frozen parameter; returns the bytes given back."""
    state = optimizer.state.pop(parameter, {}) if optimizer is not None else {}
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor) and v.dim() > 0)
