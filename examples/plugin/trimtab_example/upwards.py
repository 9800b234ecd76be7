"""A way of freezing: projections stop one by one, from the input upwards (as FreezeOut does, arXiv 1706.04983).

A method of the axis `freeze` is a dataclass of settings that extends `FreezeSettings` and builds a `Freezer`, which
names what freezes after each step. Trimtab takes it out of autograd and the optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from trimtab.errors import ConfigError
from trimtab.freeze.base import Curve, Freezer, FreezeSettings
from trimtab.schedule import StepLength, check_length, resolve_steps


@dataclass(frozen=True, kw_only=True)
class Upwards(FreezeSettings):
    """The fields are the settings of the recipe's ``freeze:``."""

    method: ClassVar[str] = "upwards"
    paper: ClassVar[str] = "control"

    warmup: StepLength = 0.1
    """Before the first projection freezes: steps, a share of the run, or ``"1ep"``."""
    final: StepLength = 0.3
    """At the end, with everything frozen."""
    interval_steps: int = 10
    """Steps between two looks."""

    def __post_init__(self) -> None:
        check_length(self.warmup, "freeze.warmup")
        check_length(self.final, "freeze.final")
        if type(self.interval_steps) is not int or self.interval_steps < 1:
            raise ConfigError("freeze.interval_steps", self.interval_steps, "a whole number, at least 1")

    def trainable_curve(self, total_steps: int, steps_per_epoch: int | None) -> Curve:
        """What `trimtab plan` shows: (step, share of the projections that train from it on)."""
        start = resolve_steps(self.warmup, total_steps, steps_per_epoch, "freeze.warmup")
        end = total_steps - resolve_steps(self.final, total_steps, steps_per_epoch, "freeze.final")
        if start >= end:
            raise ConfigError(
                "freeze.warmup",
                self.warmup,
                f"step {start} is not before step {end}, from which "
                "everything is frozen; shorten freeze.warmup or freeze.final",
            )
        looks = [*range(start + self.interval_steps, end, self.interval_steps), end]
        return [(0, 1.0), *((step, (end - step) / (end - start)) for step in looks)]

    def build(self, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None) -> Climber:
        return Climber(tensors, total_steps, self.trainable_curve(total_steps, steps_per_epoch))


class Climber(Freezer):
    """Freezes the lowest projections while what trains on is at least the curve's share."""

    def __init__(self, tensors: Mapping[str, int], total_steps: int, curve: Curve) -> None:
        super().__init__(tensors, total_steps, curve)  # tensors are in the model's order
        self.shares = dict(curve)

    def is_due(self, step: int) -> bool:
        return False  # the step alone decides, so processes need not compare

    def decide(self, step: int, allowance: float | None = None) -> set[str]:
        share = self.shares.get(step + 1)  # what holds from the next step on
        if share is None:
            return set()
        level, remaining = share * sum(self.numels.values()), sum(self.numels[name] for name in self.trainable)
        frozen = []
        for name in self.trainable:
            remaining -= self.numels[name]
            if remaining < level:
                break
            frozen.append(name)
        return self._freeze(frozen)
