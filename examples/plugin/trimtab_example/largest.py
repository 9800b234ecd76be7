"""A way of choosing ranks: at one step, keep those whose update is largest.

A method of the axis `rank` is a dataclass of settings that extends `RankSettings` and builds an `Allocator`, which
decides during training. Trimtab cuts what it lets go: parameters, gradients and optimizer state.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from trimtab.errors import BudgetError, ConfigError
from trimtab.rank.base import Allocator, CostLimit, Decision, Factors, RankSettings, check_number, final_total
from trimtab.rank.topk import keep_top
from trimtab.schedule import StepLength, check_length, resolve_steps


@dataclass(frozen=True, kw_only=True)
class Largest(RankSettings):
    """The fields are the settings of the recipe's ``rank:``."""

    method: ClassVar[str] = "largest"
    paper: ClassVar[str] = "control"

    target_r: float
    """Mean rank of a site at the end."""
    at: StepLength = 0.3
    """When the cut is made: steps, a share of the run, or ``"1ep"``."""

    def __post_init__(self) -> None:
        check_number("rank.target_r", self.target_r, above=0)
        check_length(self.at, "rank.at")

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> Cutter:
        if limit is not None:
            raise BudgetError("rank.method", self.method, "salientlora or adalora; this one counts ranks only")
        total = final_total(self.target_r, len(modules), sum(modules.values()))
        return Cutter(modules, self._step(total_steps, steps_per_epoch), total)

    def budget_curve(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        initial_total: int,
        modules: int,
        final_total: int | None = None,
    ) -> list[tuple[int, int]]:
        """What `trimtab plan` shows: the total rank after each step at which it changes."""
        total = int(self.target_r * modules) if final_total is None else final_total
        return [(self._step(total_steps, steps_per_epoch), total)]

    def _step(self, total_steps: int, steps_per_epoch: int | None) -> int:
        step = resolve_steps(self.at, total_steps, steps_per_epoch, "rank.at")
        if not 1 <= step <= total_steps:
            raise ConfigError("rank.at", self.at, f"that is step {step} of {total_steps}")
        return step


class Cutter(Allocator):
    """Cuts once. What a checkpoint needs beyond the base class is whether that has happened."""

    method = Largest.method

    def __init__(self, modules: Mapping[str, int], at: int, total: int) -> None:
        super().__init__(modules)
        self.at, self.total, self.done = at, total, False

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        self._check(factors)
        if self.done:
            return self._again()
        return self._cut(factors) if step >= self.at else None

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        return None if self.done else self._cut(factors)

    def _cut(self, factors: Mapping[str, Factors]) -> Decision:
        scores = torch.cat([update_sizes(factors[name]) for name in self.names])
        self._require_finite(scores, "the update")
        self._retire(keep_top(scores, self.total))
        self.done = True
        return self._pruning(self.total)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, object]]:
        tensors, rest = super().state_dict()
        return tensors, {**rest, "done": self.done}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, object]) -> None:
        super().load_state_dict(tensors, meta)
        self.done = bool(meta["done"])


def update_sizes(site: Factors) -> Tensor:
    """Norm of each rank's part of the update ``B diag(e) A``: |e_i| · ‖A_i‖ · ‖B_i‖, shape (r,)."""
    return (site.e.abs() * site.A.norm(dim=1) * site.B.norm(dim=0)).detach()
