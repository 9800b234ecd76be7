"""How far the factors of SVD-form sites are from orthonormal, and the gradient of that.

``P diag(λ) Q`` is only like an SVD while the columns of P and the rows of Q stay orthonormal, so both
SVD methods add ``weight · mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F over all factors)`` to the loss. Papers: squared
norms (``fro2``). Authors' code and PEFT: the norm itself (``fro``); we follow the code by default.

From LoRA's start the factors' sizes are part of the values, so that only angles count: the same of the
factors with their vectors at length 1, and zero vectors (all of B at first) left out.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .base import Factors

Norm = Literal["fro", "fro2"]


def defect(factor: Tensor, norm: Norm = "fro") -> Tensor:
    """Distance of the rows of one factor from orthonormal, a scalar; pass ``B.T`` for B.

    >>> defect(torch.tensor([[1.0, 1.0], [0.0, 1.0]]).T, "fro2").item()
    3.0
    """
    mask = torch.ones(1, len(factor), dtype=torch.bool, device=factor.device)
    return _Defects.apply(norm == "fro2", False, mask, (False,), factor)[0]


class Orthogonality:
    """The mean defect over the factors of all sites.

    The mean runs over every factor there was at the start, so that pruning a site away or freezing a
    factor does not raise the weight of the others.
    """

    def __init__(self, sites: int, norm: Norm, only_angles: bool = False) -> None:
        self.factors = 2 * sites
        self.only_angles = only_angles
        self.norm: Norm = norm
        self._mask: tuple[list[tuple[str, bool, int]], Tensor] | None = None

    def forget(self) -> None:
        """Which ranks count has changed."""
        self._mask = None

    def __call__(self, factors: Mapping[str, Factors], living: Mapping[str, Tensor]) -> tuple[Tensor | None, Tensor]:
        """Defect of what trains, and of everything.

        Args:
            factors: by site.
            living: site -> positions of the ranks that count, where the site holds dead ones, too.
        Returns:
            (differentiable mean defect of the trainable factors or None, detached mean of all)
        """
        held = [
            (name, factor, by_column)
            for name, site in factors.items()
            for factor, by_column in ((site.A, False), (site.B, True))
            if factor.numel()
        ]
        held.sort(key=lambda one: not one[1].requires_grad)  # what trains first, otherwise in their order
        if not held:
            return None, torch.zeros(())
        training = sum(factor.requires_grad for _, factor, _ in held)
        columns = tuple(by_column for _, _, by_column in held)
        values = _Defects.apply(
            self.norm == "fro2", self.only_angles, self._mask_of(held, living), columns, *(f for _, f, _ in held)
        )
        moving = values[:training].sum() / self.factors if training else None
        return moving, values.detach().sum() / self.factors

    def _mask_of(self, held: list[tuple[str, Tensor, bool]], living: Mapping[str, Tensor]) -> Tensor:
        """(factors, largest rank) bool: the ranks that count; the same from one cut to the next."""
        sizes = [(name, by_column, factor.shape[by_column]) for name, factor, by_column in held]
        if self._mask is None or self._mask[0] != sizes:
            mask = torch.zeros(len(sizes), max(r for _, _, r in sizes), dtype=torch.bool)
            for row, (name, _, r) in zip(mask, sizes):
                row[living[name].to(row.device) if name in living else slice(r)] = True
            self._mask = sizes, mask.to(held[0][1].device)
        return self._mask[1]


class _Defects(torch.autograd.Function):
    """The defect of each of many factors, (n,): their Gram matrices side by side in one tensor, so that all but one
    product a factor is done for all of them at once, on a GPU in one kernel each.

    d‖FFᵀ − I‖_F / dF = 2 (FFᵀ − I) F / ‖FFᵀ − I‖_F, taken as 0 where the norm is 0; without the division and
    twice that for the square. Of angles alone, with C the cosines between rows, 0 on the diagonal, and l their
    lengths: 2 / ‖C‖_F · l⁻¹ ⊙ (C − diag(Σ_j C_ij²)) (l⁻¹ ⊙ F), the unit vectors' gradient less its part along them.
    """

    @staticmethod
    def forward(
        ctx: Any, squared: bool, only_angles: bool, mask: Tensor, columns: tuple[bool, ...], *factors: Tensor
    ) -> Tensor:
        dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors), torch.float32)
        n, r = mask.shape
        off = torch.zeros(n, r, r, dtype=dtype, device=mask.device)  # what should be 0
        with torch.autocast(mask.device.type, enabled=False):
            for gram, factor, by_column in zip(_corners(off, factors, columns), factors, columns):
                rows = factor.T if by_column else factor
                if factor.dtype is dtype and factor.device == off.device:
                    torch.mm(rows, rows.T, out=gram)
                else:  # narrower than others, or a model spread over devices
                    rows = rows.to(dtype)
                    gram.copy_(rows @ rows.T)
        size = mask.to(dtype)  # by which rows are scaled: 0 for a rank that does not count
        diagonal = off.diagonal(dim1=1, dim2=2)
        if only_angles:
            length = diagonal.sqrt()
            size = torch.where(length > 0, size / length, 0)
        off.mul_(size.unsqueeze(2)).mul_(size.unsqueeze(1))
        if only_angles:
            diagonal.zero_()
        else:
            diagonal.sub_(size)
        norms = torch.linalg.vector_norm(off, dim=(1, 2))
        ctx.squared, ctx.only_angles, ctx.columns = squared, only_angles, columns
        ctx.save_for_backward(off, norms, size, *factors)
        return norms.square() if squared else norms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        off, norms, size, *factors = ctx.saved_tensors
        slope = outer[0] * (4.0 if ctx.squared else torch.where(norms > 0, 2 / norms, 0))
        middle = off * slope[:, None, None]
        if ctx.only_angles:
            along = (middle * off).sum(2)
            middle.diagonal(dim1=1, dim2=2).sub_(along)
            middle.mul_(size.unsqueeze(2)).mul_(size.unsqueeze(1))
        grads: list[Tensor | None] = []
        with torch.autocast(off.device.type, enabled=False):
            each = zip(_corners(middle, factors, ctx.columns), factors, ctx.columns, ctx.needs_input_grad[4:])
            for part, factor, by_column, is_needed in each:
                part, wide = part.to(factor.device), factor.to(off.dtype)
                grad = (wide @ part if by_column else part @ wide) if is_needed else None
                grads.append(grad if grad is None else grad.to(factor.dtype))
        return (None, None, None, None, *grads)


def _corners(square: Tensor, factors: Sequence[Tensor], columns: Sequence[bool]) -> Iterator[Tensor]:
    """Of (n, r, r) the part of each factor, of its own rank."""
    for one, factor, by_column in zip(square.unbind(), factors, columns):
        r = factor.shape[by_column]
        yield one if r == len(one) else one[:r, :r]
