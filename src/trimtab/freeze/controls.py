"""Freezing without a score: every projection at one step, as a control for AFLoRA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from ..errors import ConfigError
from ..schedule import StepLength, check_length, plain_numbers, resolve_steps, what_fits
from .base import Curve, Freezer, FreezeSettings


@dataclass(frozen=True, kw_only=True)
class FreezeAt(FreezeSettings):
    """Every projection trains for the first ``at`` steps, and none after that."""

    method: ClassVar[str] = "at"
    paper: ClassVar[str] = "control"

    at: StepLength
    """When: optimizer steps (``100``), a share of the run (``0.3``) or epochs (``"2ep"``)."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_length(self.at, "freeze.at")

    def resolve(self, total_steps: int, steps_per_epoch: int | None) -> int:
        """How many steps the projections train."""
        at = resolve_steps(self.at, total_steps, steps_per_epoch, "freeze.at")
        if not 1 <= at < total_steps:
            raise ConfigError(
                "freeze.at",
                self.at,
                f"that is {at} of the run's {total_steps} steps; {what_fits(1, total_steps)}",
            )
        return at

    def n_ramps(self, total_steps: int, steps_per_epoch: int | None) -> int:
        return total_steps - 1

    def ramp(self, k: int, total_steps: int, steps_per_epoch: int | None) -> FreezeAt:
        return replace(self, at=k + 1)

    def check_budget(self) -> None:
        pass

    def trainable_curve(self, total_steps: int, steps_per_epoch: int | None) -> Curve:
        return [(0, 1.0), (self.resolve(total_steps, steps_per_epoch), 0.0)]

    def build(self, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None) -> FixedFreezer:
        return FixedFreezer(
            tensors,
            total_steps,
            self.resolve(total_steps, steps_per_epoch),
            self.trainable_curve(total_steps, steps_per_epoch),
        )


class FixedFreezer(Freezer):
    """Freezes everything once ``at`` steps are done. Reads no gradient."""

    def __init__(self, tensors: Mapping[str, int], total_steps: int, at: int, curve: Curve) -> None:
        super().__init__(tensors, total_steps, curve)
        self.at = at

    def is_due(self, step: int) -> bool:
        return False

    def decide(self, step: int, allowance: float | None = None) -> set[str]:
        if allowance is not None:
            return self._freeze(self._over_allowance(step, None, allowance, is_event=False))
        return self._freeze(self.trainable) if step + 1 >= self.at else set()
