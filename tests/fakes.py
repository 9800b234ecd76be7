"""The simplest rank method: halves the total rank at given steps, by |e|. Lets the host be tested without any paper."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from trimtab.rank.base import Allocator, Decision, Factors, RankSettings


@dataclass(frozen=True, kw_only=True)
class Halving(RankSettings):
    """Cuts the smaller half of all |e| at each of ``steps``."""

    method: ClassVar[str] = "halving"
    paper: ClassVar[str] = "none"

    steps: tuple[int, ...] = (12, 22)
    orth_weight: float = 0.1

    def init_factors(self, A: Tensor, e: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
        super().init_factors(A, e, B, generator)
        with torch.no_grad():
            e.normal_(generator=generator)

    def build(self, modules: Mapping[str, int], total_steps: int, *_: Any, **__: Any) -> Allocator:
        return _Halver(modules, self)


class _Halver(Allocator):
    method = "halving"

    def __init__(self, modules: Mapping[str, int], settings: Halving) -> None:
        super().__init__(modules)
        self.settings = settings

    def penalty(self, factors: Mapping[str, Factors]) -> Tensor | None:
        if not self.settings.orth_weight:
            return None
        terms = [(f.A @ f.A.T - torch.eye(f.A.shape[0], dtype=f.A.dtype)).norm() for f in factors.values() if len(f.e)]
        return self.settings.orth_weight * torch.stack(terms).mean()

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        self._check(factors)
        if step not in self.settings.steps:
            return self._again()
        values = self._values(factors).abs()
        kept = torch.zeros(len(values), dtype=torch.bool)
        kept[values.topk(len(values) // 2).indices] = True
        self._retire(kept)
        return self._pruning(len(values) // 2)

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        return None
