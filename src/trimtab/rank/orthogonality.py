"""How far the factors of SVD-form sites are from orthonormal, and the gradient of that.

``P diag(λ) Q`` is only like an SVD while the columns of P and the rows of Q stay orthonormal, so both
SVD methods add ``weight · mean(‖AAᵀ − I‖_F, ‖BᵀB − I‖_F over all factors)`` to the loss. Papers: squared
norms (``fro2``). Authors' code and PEFT: the norm itself (``fro``); we follow the code by default.

From LoRA's start the factors' sizes are part of the values, so that only angles count: the same of the
factors with their vectors at length 1, and zero vectors (all of B at first) left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from .base import Factors

Norm = Literal["fro", "fro2"]


def defect(factor: Tensor, norm: Norm = "fro") -> Tensor:
    """Distance of the rows of one factor from orthonormal, a scalar; pass ``B.T`` for B.

    >>> defect(torch.tensor([[1.0, 1.0], [0.0, 1.0]]).T, "fro2").item()
    3.0
    """
    return _Defects.apply(norm == "fro2", False, (False,), factor)


class Orthogonality:
    """The mean defect over the factors of all sites, with the norms of frozen factors remembered.

    The mean runs over every factor there was at the start, so that pruning a site away or freezing a
    factor does not raise the weight of the others.
    """

    def __init__(self, sites: int, norm: Norm, only_angles: bool = False) -> None:
        self.factors = 2 * sites
        self.only_angles = only_angles
        self.norm: Norm = norm
        self._frozen: dict[tuple[str, str], Tensor] = {}

    def forget(self) -> None:
        """Shapes or values of frozen factors changed."""
        self._frozen.clear()

    def __call__(
        self, factors: Mapping[str, Factors], living: Mapping[str, Tensor]
    ) -> tuple[Tensor | None, Tensor | None]:
        """Defect of what trains, and of everything.

        Args:
            factors: by site.
            living: site -> positions of the ranks that count, where the site holds dead ones, too.
        Returns:
            (differentiable mean defect of the trainable factors or None, detached mean of all or None)
        """
        training: list[Tensor] = []
        columns: list[bool] = []
        still: list[Tensor] = []
        for name, site in factors.items():
            index = living.get(name)
            for side, factor in (("A", site.A), ("B", site.B)):
                by_column = side == "B"
                if index is not None and index.device != factor.device:  # a model spread over devices
                    index = index.to(factor.device)
                if factor.requires_grad:
                    self._frozen.pop((name, side), None)
                    training.append(factor if index is None else factor.index_select(int(by_column), index))
                    columns.append(by_column)
                else:
                    if (name, side) not in self._frozen:
                        part = factor.detach()
                        part = part if index is None else part.index_select(int(by_column), index)
                        self._frozen[name, side] = self._of(part, by_column)
                    still.append(self._frozen[name, side])
        moving = None
        if training:
            moving = self._sum(tuple(columns), *training) / self.factors
        total = None if moving is None else moving.detach()
        if still:
            rest = torch.stack([value.to(still[0].device) for value in still]).sum() / self.factors
            total = rest if total is None else total + rest.to(total.device)
        return moving, total

    def _of(self, factor: Tensor, by_column: bool) -> Tensor:
        return self._sum((by_column,), factor)

    def _sum(self, columns: tuple[bool, ...], *factors: Tensor) -> Tensor:
        return _Defects.apply(self.norm == "fro2", self.only_angles, columns, *factors)


class _Defects(torch.autograd.Function):
    """Sum of the defects of many factors: one node instead of a graph of several per factor.

    d‖FFᵀ − I‖_F / dF = 2 (FFᵀ − I) F / ‖FFᵀ − I‖_F, taken as 0 where the norm is 0; without the division and
    twice that for the square. Of angles alone, the gradient of the unit vectors less its part along them,
    divided by the vector's length.
    """

    @staticmethod
    def forward(ctx: Any, squared: bool, only_angles: bool, columns: tuple[bool, ...], *factors: Tensor) -> Tensor:
        grams: list[Tensor] = []
        with torch.autocast(factors[0].device.type, enabled=False):
            for factor, by_column in zip(factors, columns):
                wide = _units(factor, by_column)[0] if only_angles else _wide(factor)
                gram = wide.T @ wide if by_column else wide @ wide.T  # (r, r)
                if only_angles:
                    gram.fill_diagonal_(0)
                else:
                    gram.diagonal().sub_(1)
                grams.append(gram)
        norms = list(torch._foreach_norm(grams))
        ctx.squared, ctx.only_angles, ctx.columns, ctx.count = squared, only_angles, columns, len(factors)
        ctx.save_for_backward(*factors, *grams, *norms)
        home = norms[0].device
        values = torch.stack([norm.to(home) for norm in norms])
        return (values.square() if squared else values).sum()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        n = ctx.count
        saved = ctx.saved_tensors
        factors, grams, norms = saved[:n], saved[n : 2 * n], saved[2 * n :]
        grads: list[Tensor | None] = []
        with torch.autocast(factors[0].device.type, enabled=False):
            for factor, gram, norm, by_column in zip(factors, grams, norms, ctx.columns):
                slope = 4.0 if ctx.squared else torch.where(norm > 0, 2 / norm, 0)
                gram = gram * (outer[0].to(gram) * slope)
                wide, inverse = _units(factor, by_column) if ctx.only_angles else (_wide(factor), None)
                grad = wide @ gram if by_column else gram @ wide
                if inverse is not None:
                    along = (grad * wide).sum(dim=int(not by_column), keepdim=True)
                    grad = (grad - along * wide) * inverse
                grads.append(grad.to(factor.dtype))
        return (None, None, None, *grads)


def _units(factor: Tensor, by_column: bool) -> tuple[Tensor, Tensor]:
    """The vectors at length 1, those of length 0 as they are, and 1 / length of each, 0 for those."""
    wide = _wide(factor)
    length = torch.linalg.vector_norm(wide, dim=int(not by_column), keepdim=True)
    inverse = torch.where(length > 0, 1 / length, 0)
    return wide * inverse, inverse


def _wide(factor: Tensor) -> Tensor:
    return factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor
