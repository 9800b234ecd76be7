"""SoRA: gates that shrink to zero by themselves decide the rank.

Ding et al., EMNLP 2023 (arXiv 2311.11696). The rank diagonal is a gate with an l1 penalty, applied as a
proximal step after each optimizer step: ``g ← sign(g) · max(|g| − ξ, 0)``. The released code shifts
values in place before it compares them, and so kills everything below 2ξ; this is the paper's rule.
A gate at zero still has a gradient and may return, unless ``sticky_zeros``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import BudgetError, ConfigError
from ..schedule import StepLength, check_length, plain_numbers, resolve_steps
from .base import Allocator, CostLimit, Decision, Factors, RankSettings, Start, check_choice, check_number, check_start

Spacing = Literal["linear", "log_linear", "exp_linear"]


@dataclass(frozen=True, kw_only=True)
class SoRA(RankSettings):
    """Settings of SoRA. The final rank follows from the threshold; no budget can be set."""

    method: ClassVar[str] = "sora"
    paper: ClassVar[str] = "arXiv 2311.11696"
    e_decays: ClassVar[bool] = False

    start: Start = "lora"
    """``lora``: PEFT's factors and scale, gates at 1; ``svd``: the paper's, gates drawn from N(0, 1)."""
    prox_threshold: float
    """What each optimizer step takes off every gate's magnitude (ξ). Gates start near 1 in size, so
    about ``1/ξ`` steps bring a useless one to zero; published runs use 3e-4."""
    l1_loss_weight: float = 0.0
    """Also add this times the mean ``|gate|`` to the loss, as the released code does (``sparse_lambda``)."""
    sticky_zeros: bool = False
    """A gate that reached zero stays there and is pruned at the next interval."""
    interval: StepLength = 0.05
    """Steps between counts of zero gates, and between prunings with ``sticky_zeros``."""
    scale_by_lr: bool = False
    """Multiply the threshold by the run's learning rate, as in the authors' second optimizer (theirs
    follows the learning-rate schedule; this takes its peak)."""
    max_threshold: float | None = None
    """Raise the threshold in equal stages of the run from ``prox_threshold`` to this."""
    thresholds: int = 7
    """Number of stages."""
    spacing: Spacing = "linear"
    """How the stages are spaced; ``exp_linear`` is geometric."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_start(self.start)
        check_number("rank.prox_threshold", self.prox_threshold, at_least=0)
        check_number("rank.l1_loss_weight", self.l1_loss_weight, at_least=0)
        check_length(self.interval, "rank.interval")
        check_number("rank.thresholds", self.thresholds, at_least=2, whole=True)
        check_choice("rank.spacing", self.spacing, ("linear", "log_linear", "exp_linear"))
        if self.max_threshold is not None:
            threshold_values(self.prox_threshold, self.max_threshold, self.thresholds, self.spacing)

    @property
    def has_e(self) -> bool:
        return True  # the gate is the method

    def init_factors(self, A: Tensor, e: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
        """A ~ Kaiming-uniform(√5), e ~ N(0, 1), B = 0, in place."""
        with torch.no_grad():
            bound = 1 / math.sqrt(A.shape[1])  # √(6 / ((1 + 5) · fan_in))
            A.uniform_(-bound, bound, generator=generator)
            e.normal_(0.0, 1.0, generator=generator)
            B.zero_()

    def scale(self, alpha: float, r: int) -> float:
        return alpha / r

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> SoRAAllocator:
        if limit is not None:
            raise BudgetError("rank.method", "sora", "salientlora or adalora; SoRA's final rank cannot be set")
        interval = max(1, resolve_steps(self.interval, total_steps, steps_per_epoch, "rank.interval"))
        values = [self.prox_threshold]
        if self.max_threshold is not None:
            if self.thresholds > total_steps:
                raise ConfigError("rank.thresholds", self.thresholds, f"at most the run's {total_steps} steps")
            values = threshold_values(self.prox_threshold, self.max_threshold, self.thresholds, self.spacing)
        if self.scale_by_lr:
            if base_lr is None:
                raise ConfigError("rank.scale_by_lr", True, "the learning rate is unknown here; scale the threshold")
            values = [value * base_lr for value in values]
        return SoRAAllocator(self, modules, values, total_steps, interval)


def threshold_values(start: float, stop: float, count: int, spacing: Spacing = "linear") -> list[float]:
    """The thresholds of successive stages, from ``start`` to ``stop``.

    ``linear``: equal steps; ``exp_linear``: equal ratios; ``log_linear``: the logarithm of equal steps
    of the exponential.

    >>> [round(value, 6) for value in threshold_values(1e-4, 1e-2, 3, "exp_linear")]
    [0.0001, 0.001, 0.01]
    """
    check_number("rank.prox_threshold", start, at_least=0)
    check_number("rank.max_threshold", stop, at_least=start)
    check_number("rank.thresholds", count, at_least=2, whole=True)
    if spacing == "exp_linear":
        if start == 0:
            raise ConfigError("rank.prox_threshold", start, "above 0 for spacing 'exp_linear', which multiplies it")
        return [start * (stop / start) ** (k / (count - 1)) for k in range(count)]
    if spacing == "log_linear":
        low, high = math.exp(start), math.exp(stop)
        return [math.log(low + (high - low) * k / (count - 1)) for k in range(count)]
    return [start + (stop - start) * k / (count - 1) for k in range(count)]


@torch.no_grad()
def shrink_(gates: list[Tensor], threshold: float) -> None:
    """The proximal step of ``threshold · ‖g‖₁``, in place: ``g ← sign(g) · max(|g| − threshold, 0)``.

    >>> gates = torch.tensor([0.5, -0.2, 0.05, -0.1])
    >>> shrink_([gates], 0.1)
    >>> gates.tolist()
    [0.4000000059604645, -0.10000000149011612, 0.0, -0.0]
    """
    gates = [gate for gate in gates if gate.numel()]
    if not gates or threshold == 0:
        return
    sizes = list(torch._foreach_abs(gates))
    torch._foreach_sub_(sizes, threshold)
    torch._foreach_clamp_min_(sizes, 0.0)
    signs = list(torch._foreach_sign(gates))
    torch._foreach_mul_(signs, sizes)
    torch._foreach_copy_(gates, signs)


class SoRAAllocator(Allocator):
    """Shrinks the gates itself after each step; counts zeros at intervals; prunes when zeros are final."""

    method = SoRA.method

    def __init__(
        self, settings: SoRA, modules: Mapping[str, int], values: list[float], total_steps: int, interval: int
    ) -> None:
        super().__init__(modules)
        self.settings = settings
        self.values = values
        self.total_steps = total_steps
        self.interval = interval
        self.done = False
        self.open = self.alive  # with sticky zeros: gates that never were zero, over all ranks the host holds

    def threshold(self, step: int) -> float:
        """ξ of the given step (1 is the first)."""
        stage = (step - 1) * len(self.values) // max(self.total_steps, 1)
        return self.values[min(stage, len(self.values) - 1)]

    def penalty(self, factors: Mapping[str, Factors]) -> Tensor | None:
        """``l1_loss_weight`` times the mean |gate| over the gates there were at the start."""
        gates = [factors[name].e for name in self.names if factors[name].e.numel()]
        if not self.settings.l1_loss_weight or not gates:
            return None
        home = gates[0].device
        total = torch.stack([gate.abs().sum().to(home) for gate in gates]).sum()
        return self.settings.l1_loss_weight / sum(self.initial.values()) * total

    @torch.no_grad()
    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        self._check(factors)
        if self.done:
            return self._again()
        gates = [factors[name].e.detach() for name in self.names]
        sticky = self.settings.sticky_zeros
        if sticky:  # gates that were zero before; the optimizer may have moved them since
            for gate, is_open in zip(gates, self.open.split(self.sizes)):
                gate.mul_(is_open.to(gate.device))
        shrink_(gates, self.threshold(step))
        if sticky:
            self.open = torch.cat([gate.to(self.alive.device) for gate in gates]) != 0
        if step % self.interval:
            return self._again()
        if sticky:
            return self._cut(factors)
        return Decision({name: factors[name].e.detach() != 0 for name in self.names}, "mask", None, event=True)

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        if self.done:
            return None
        self._check(factors)
        self.done = True
        return self._cut(factors)

    def _cut(self, factors: Mapping[str, Factors]) -> Decision:
        values = self._values(factors)
        self._require_finite(values, "the gate")
        kept = values != 0
        if not kept.any():
            kept[0] = True  # an adapter without any rank is none; a gate at zero adds nothing
        self._retire(kept)
        self.open = self.alive
        return self._pruning(None)

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        self.open = self.open[self._flat_mask(keep)]
        super().pruned(keep)

    def _place(self, device: torch.device) -> None:
        super()._place(device)
        self.open = self.open.to(device)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        return tensors | {"open": self.open.clone()}, meta | {"done": self.done}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        self.open = tensors["open"].to(torch.bool)
        self.done = meta["done"]
