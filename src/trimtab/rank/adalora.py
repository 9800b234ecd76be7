"""AdaLoRA: move a shrinking rank budget between sites, by how sensitive the loss is to each triplet.

Zhang et al., ICLR 2023 (arXiv 2303.10512). A triplet is a singular value with its two vectors. Scores
are smoothed sensitivity times smoothed uncertainty, taken after the optimizer step: new weights, old
gradients, as in the authors' code and PEFT. During the ramp, triplets beyond the budget are masked and
may come back, since a masked value still gets a gradient; at ``total − final`` steps the pattern is
fixed and pruned.

Differs from PEFT's allocator only where that fails: ties never cut more than the budget asks for, an
equal start and target is no error, and a frozen factor keeps its last score.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import CheckpointError, ConfigError
from ..schedule import StepLength, check_length, plain_numbers, resolve_steps
from .base import (
    Allocator,
    CostLimit,
    Decision,
    Factors,
    RankSettings,
    Start,
    check_choice,
    check_number,
    check_start,
    final_total,
    totals,
)
from .orthogonality import Norm, Orthogonality
from .topk import keep_top

_LOGGED = 200  # allocations per run that are worth a line in the history
_GROUP = 16  # sites updated at once: few kernel launches, little scratch memory


@dataclass(frozen=True, kw_only=True)
class AdaLoRA(RankSettings):
    """Settings of AdaLoRA. PEFT's names: warmup is ``tinit``, final ``tfinal``, interval_steps ``deltaT``."""

    method: ClassVar[str] = "adalora"
    paper: ClassVar[str] = "arXiv 2303.10512"

    start: Start = "lora"
    target_r: float
    """Mean rank per site at the end; ``target_r · sites`` ranks remain in total, exactly. About two
    thirds of the initial rank is the authors' advice."""
    warmup: StepLength = 0.1
    """Training before the budget starts to fall: steps, a fraction of the run, or ``"1ep"``."""
    final: StepLength = 0.4
    """Training at the end with a fixed pattern."""
    interval_steps: int = 1
    """Steps between two allocations."""
    beta1: float = 0.85
    """Smoothing of the sensitivity."""
    beta2: float = 0.85
    """Smoothing of its uncertainty."""
    orth_weight: float | None = None
    """Coefficient of the orthogonality penalty; None: the papers' 0.1 with ``svd``, none with ``lora``."""
    orth: Norm = "fro"
    """Penalty per factor: the Frobenius norm (code, PEFT) or its square (paper)."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_number("rank.target_r", self.target_r, above=0)
        check_length(self.warmup, "rank.warmup")
        check_length(self.final, "rank.final")
        check_number("rank.interval_steps", self.interval_steps, at_least=1, whole=True)
        check_number("rank.beta1", self.beta1, above=0, below=1)
        check_number("rank.beta2", self.beta2, above=0, below=1)
        check_start(self.start, self.orth_weight)
        check_choice("rank.orth", self.orth, ("fro", "fro2"))

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> AdaAllocator:
        schedule = self.schedule(total_steps, steps_per_epoch, *totals(self.target_r, modules, limit))
        return AdaAllocator(self, modules, schedule, limit)

    def schedule(self, total_steps: int, steps_per_epoch: int | None, initial_total: int, final_total: int) -> Schedule:
        """The budgets of one run. Raises `ConfigError` if the phases do not fit into it."""
        t_i = resolve_steps(self.warmup, total_steps, steps_per_epoch, "rank.warmup")
        t_f = resolve_steps(self.final, total_steps, steps_per_epoch, "rank.final")
        if t_i + t_f >= total_steps:
            raise ConfigError(
                "rank.final",
                self.final,
                f"warmup {t_i} + final {t_f} = {t_i + t_f} steps leave nothing of the run's {total_steps} "
                "to allocate in; shorten them or train longer",
            )
        return Schedule(t_i, total_steps - t_f, initial_total, final_total, self.interval_steps)

    def budget_curve(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        initial_total: int,
        modules: int,
        final_total: int | None = None,
    ) -> list[tuple[int, int]]:
        target = _total(self.target_r, modules, initial_total) if final_total is None else final_total
        curve, before = [], initial_total
        for step, budget in self.schedule(total_steps, steps_per_epoch, initial_total, target).events():
            if budget < before:
                curve.append((step, budget))
            before = budget
        return curve

    def prune_curve(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        initial_total: int,
        modules: int,
        final_total: int | None = None,
    ) -> list[tuple[int, int]]:
        target = _total(self.target_r, modules, initial_total) if final_total is None else final_total
        schedule = self.schedule(total_steps, steps_per_epoch, initial_total, target)
        return [(schedule.end, target)] if self.prune and target < initial_total else []


_total = final_total  # the methods above have an argument of that name


@dataclass(frozen=True)
class Schedule:
    """Budget over time, in optimizer steps; ``end = total − final`` is when the pattern is fixed."""

    warmup: int
    end: int
    initial_total: int
    final_total: int
    interval: int = 1

    def budget(self, step: int) -> int:
        """``b_T + (b_0 − b_T)(1 − (t − warmup)/(end − warmup))³``, rounded down, between warmup and end.

        >>> [Schedule(100, 500, 864, 576).budget(step) for step in (150, 200, 300, 400, 500)]
        [768, 697, 612, 580, 576]
        """
        if step <= self.warmup:
            return self.initial_total
        if step >= self.end:
            return self.final_total
        left = 1 - (step - self.warmup) / (self.end - self.warmup)
        return int((self.initial_total - self.final_total) * left**3 + self.final_total)

    def allocates(self, step: int) -> bool:
        """Whether triplets are masked after ``step``, before the final pattern."""
        return self.warmup < step < self.end and step % self.interval == 0

    def events(self) -> Iterator[tuple[int, int]]:
        """(step, budget) of every allocation."""
        first = (self.warmup // self.interval + 1) * self.interval
        for step in range(first, self.end, self.interval):
            yield step, self.budget(step)
        yield self.end, self.final_total

    def logged(self, step: int) -> bool:
        """Whether the allocation after ``step`` is one of the few that tell the story."""
        every = max(1, (self.end - self.warmup) // (self.interval * _LOGGED))
        return step // self.interval % every == 0


def triplet_scores(score_A: Tensor, score_e: Tensor, score_B: Tensor) -> Tensor:
    """One score per triplet from the scores of its entries: (r, in), (r,), (out, r) -> (r,).

    >>> score_A, score_B = torch.tensor([[0.1, 0.3, 0.5]]), torch.tensor([[0.2], [0.4]])
    >>> round(triplet_scores(score_A, torch.tensor([0.5]), score_B).item(), 6)
    1.1
    """
    return score_e + (score_A.mean(dim=1) + score_B.mean(dim=0))


class AdaAllocator(Allocator):
    """Smooths sensitivities every step, masks on allocation steps, prunes once at the end of the ramp."""

    method = AdaLoRA.method

    def __init__(
        self,
        settings: AdaLoRA,
        modules: Mapping[str, int],
        schedule: Schedule,
        limit: CostLimit | None = None,
    ) -> None:
        super().__init__(modules)
        self.settings = settings
        self.schedule = schedule
        self.limit = limit
        self.done = False
        # "<site>.A" -> smoothed sensitivity and its smoothed uncertainty, each of the factor's shape
        self.sensitivity: dict[str, Tensor] = {}
        self.uncertainty: dict[str, Tensor] = {}
        self._defects = Orthogonality(len(self.names), settings.orth, only_angles=settings.start != "svd")

    def penalty(self, factors: Mapping[str, Factors]) -> Tensor | None:
        weight = self.settings.penalty_weight
        if not weight:
            return None
        moving, _ = self._defects(factors, self._living)
        return None if moving is None else weight * moving

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        self._check(factors)
        if self.done:
            return self._again()
        if step >= self.schedule.end:
            return self._fix(factors)
        self._observe(factors)
        if not self.schedule.allocates(step):
            return None
        budget = self.schedule.budget(step)
        keep = self._best(budget, factors)
        return Decision(dict(zip(self.names, keep.split(self.sizes))), "mask", budget, self.schedule.logged(step))

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        if self.done:
            return None
        self._check(factors)
        return self._fix(factors)

    def _fix(self, factors: Mapping[str, Factors]) -> Decision:
        budget = self.schedule.final_total
        self._retire(self._best(budget, factors))
        self.done = True
        self.sensitivity, self.uncertainty = {}, {}
        return self._pruning(budget)

    def _best(self, budget: int, factors: Mapping[str, Factors]) -> Tensor:
        scores = self._scores(factors)
        self._require_finite(scores, "the sensitivity")
        return keep_top(scores, budget, None if self.limit is None else self._per_living(self.limit.costs))

    @torch.no_grad()
    def _observe(self, factors: Mapping[str, Factors]) -> None:
        """One update of the averages from ``|w · g|`` of every entry that has a gradient."""
        b1, b2 = self.settings.beta1, self.settings.beta2
        for start in range(0, len(self.names), _GROUP):
            now = _products([factors[name] for name in self.names[start : start + _GROUP]])
            mean = [_held(self.sensitivity, key, value) for key, value in now.items()]
            spread = [_held(self.uncertainty, key, value) for key, value in now.items()]
            seen = list(now.values())
            if not seen:
                continue
            torch._foreach_abs_(seen)
            torch._foreach_mul_(mean, b1)
            torch._foreach_add_(mean, seen, alpha=1 - b1)
            torch._foreach_sub_(seen, mean)
            torch._foreach_abs_(seen)
            torch._foreach_mul_(spread, b2)
            torch._foreach_add_(spread, seen, alpha=1 - b2)

    @torch.no_grad()
    def _scores(self, factors: Mapping[str, Factors]) -> Tensor:
        """(n,) scores of all held triplets; 0 for a part that never had a gradient."""
        home, triplets = self.alive.device, []
        for start in range(0, len(self.names), _GROUP):
            names = self.names[start : start + _GROUP]
            parts = [(f"{name}.{side}", factor) for name in names for side, factor in _sides(factors[name])]
            scores = torch._foreach_mul(
                [_held(self.sensitivity, *part) for part in parts], [_held(self.uncertainty, *part) for part in parts]
            )
            triplets += [triplet_scores(*scores[i : i + 3]).to(home) for i in range(0, len(scores), 3)]
        return torch.cat(triplets).double()

    def _select(self, kept: Tensor) -> None:
        self._defects.forget()

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        for name, mask in keep.items():
            for averages in (self.sensitivity, self.uncertainty):
                for side in "AeB":
                    if (key := f"{name}.{side}") in averages:
                        cut = mask.to(averages[key].device)
                        averages[key] = averages[key][:, cut] if side == "B" else averages[key][cut]
        super().pruned(keep)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        tensors |= {f"sensitivity.{key}": value for key, value in self.sensitivity.items()}
        tensors |= {f"uncertainty.{key}": value for key, value in self.uncertainty.items()}
        return tensors, meta | {"done": self.done}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        self.done = meta["done"]
        self._defects.forget()
        self.sensitivity = _below(tensors, "sensitivity.")
        self.uncertainty = _below(tensors, "uncertainty.")
        if self.sensitivity.keys() != self.uncertainty.keys():
            raise CheckpointError("rank state: sensitivities and uncertainties are of different factors")


def _sides(site: Factors) -> tuple[tuple[str, Tensor], ...]:
    return ("A", site.A), ("e", site.e), ("B", site.B)


def _products(sites: Sequence[Factors]) -> dict[str, Tensor]:
    """ "<site>.<side>" -> ``w · g`` of what has a gradient, new tensors in at least float32.

    A frozen factor has none: its average keeps the last value.
    Without a diagonal of its own a rank's value is its scale, and ``Σ_out B_i ⊙ ∂B_i = ∂L/∂ log(scale of rank i)``;
    the same is Σ_in A_i ⊙ ∂A_i, and e_i ∂e_i where AFLoRA's vector is at work.
    """
    moved = {
        f"{site.name}.{side}": factor
        for site in sites
        for side, factor in _sides(site)
        if factor.grad is not None and factor.numel()
    }
    if not moved:
        return {}
    wide = [torch.promote_types(factor.dtype, torch.float32) for factor in moved.values()]
    weights = [factor.detach().to(dtype) for factor, dtype in zip(moved.values(), wide)]
    gradients = [factor.grad.to(dtype) for factor, dtype in zip(moved.values(), wide)]  # type: ignore[union-attr]
    found = dict(zip(moved, torch._foreach_mul(weights, gradients)))
    for site in sites:
        if not site.has_values and site.e.grad is None:
            for side, along in (("B", 0), ("A", 1)):
                if (product := found.get(f"{site.name}.{side}")) is not None:
                    found[f"{site.name}.e"] = product.sum(dim=along)
                    break
    return found


def _held(averages: dict[str, Tensor], key: str, factor: Tensor) -> Tensor:
    """The running average of a factor, 0 at first, in at least float32 and where the factor is."""
    if key not in averages:
        averages[key] = torch.zeros_like(factor, dtype=torch.promote_types(factor.dtype, torch.float32))
    elif averages[key].device != factor.device:
        averages[key] = averages[key].to(factor.device)
    return averages[key]


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value.clone() for key, value in tensors.items() if key.startswith(prefix)}
