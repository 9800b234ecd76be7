"""A gated feed-forward's product, found where it is used: x = φ(gate) ⊙ up, each of shape (..., ff).

Autograd keeps four tensors of that shape for `down(act(gate(x)) * up(x))`: gate's output, φ(gate), up's output and x.
From the first and the third the other two are rebuilt in the backward pass, by the same operations and so to the bit.
No model is patched and no class asked for: the graph itself says what a layer's input was made of. Where it does not
say exactly this, x stays what it is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_hooks_for_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


class Gated(NamedTuple):
    """x = φ(gate) ⊙ up; all three of one shape, dtype and device."""

    gate: Tensor
    up: Tensor
    gelu: str | None
    """φ: torch's name for an approximation of GELU; None for SiLU."""

    def activated(self) -> Tensor:
        """φ(gate)."""
        return F.silu(self.gate) if self.gelu is None else F.gelu(self.gate, approximate=self.gelu)

    def gradients(self, grad: Tensor, activated: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, ...]:
        """Gradients of (gate, up) from that of x; ``grad`` and ``activated`` are written over."""
        of_gate = of_up = None
        if needs[1]:
            of_up = activated.mul_(grad)
        if needs[0]:
            of_gate = grad.mul_(self.up)
            if self.gelu is None:
                torch.ops.aten.silu_backward.grad_input(of_gate, self.gate, grad_input=of_gate)
            else:
                torch.ops.aten.gelu_backward.grad_input(of_gate, self.gate, approximate=self.gelu, grad_input=of_gate)
        return of_gate, of_up


def gated(x: Tensor) -> Gated | None:
    """What ``x`` is the product of, if it came out of ``φ(gate) * up`` just so, and nobody watches it on its way.

    None as well where something else holds what autograd keeps (torch's non-reentrant checkpointing, offloading of
    activations): to ask it for a tensor would have it computed or copied.
    """
    product: Any = x.grad_fn
    if product is None or product.name() != "MulBackward0":
        return None
    if _hooks_for_saved is None or _hooks_for_saved(True) is not None or _is_watched(x):
        return None
    for side, other in ((0, 1), (1, 0)):
        activation, number = product.next_functions[side]
        if activation is None or number or activation.name() not in ("SiluBackward0", "GeluBackward0"):
            continue
        try:
            activated, up = (product._saved_self, product._saved_other)[:: 1 if side == 0 else -1]
            gate = activation._saved_self
        except RuntimeError:  # changed in place since, or a graph that is used up: autograd will say so
            return None
        if activated is None or up is None or _is_watched(activated):
            return None
        # What is kept must be what the graph leads to: of a tensor changed in place, a copy is.
        edges = (activation.next_functions[0], gate), (product.next_functions[other], up)
        if all(_leads_to(edge, tensor) and _is_like(x, tensor) for edge, tensor in edges):
            gelu = None if activation.name() == "SiluBackward0" else activation._saved_approximate
            return Gated(gate, up, gelu)
    return None


def _is_watched(tensor: Tensor) -> bool:
    return bool(tensor._backward_hooks) or tensor.retains_grad


def _leads_to(edge: tuple[Any, int], tensor: Tensor) -> bool:
    return tensor.grad_fn is not None and edge == (tensor.grad_fn, tensor.output_nr)


def _is_like(x: Tensor, tensor: Tensor) -> bool:
    return tensor.shape == x.shape and tensor.dtype is x.dtype and tensor.device == x.device and type(tensor) is Tensor
