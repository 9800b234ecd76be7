"""SalientLoRA: start with many ranks, keep those whose singular values matter over time.

NeurIPS 2024, "Unveiling LoRA Intrinsic Ranks via Salience Analysis". The singular values of all sites are
recorded over a window of steps. A value's *salience* is its magnitude, counted more where the factors
were closer to orthonormal, plus its *influence*: how many larger values follow its course. When the
window is full, the least salient values are pruned for good, down to the budget; windows grow from
``initial_window`` to ``final_window`` steps, so pruning is quick at first and careful at the end.

Where the released code departs from the paper we follow the paper: it never reaches the target budget,
gives values that nothing follows no influence at all, and compares magnitudes only within a site.
``parity="released"`` brings back the last two and its weighting, for comparison.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, SelectionError
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
from .influence import check_thresholds, influence, log_influence, one_thread
from .orthogonality import Norm, Orthogonality
from .topk import keep_top

__all__ = ["SalientAllocator", "SalientLoRA", "Schedule", "influence", "magnitude", "salience"]

StepWeight = Literal["inverse", "minmax"]


@dataclass(frozen=True, kw_only=True)
class SalientLoRA(RankSettings):
    """Settings of SalientLoRA. Defaults: the paper's where it has one; its runs have ``start="svd"``."""

    method: ClassVar[str] = "salientlora"
    paper: ClassVar[str] = "NeurIPS 2024, Unveiling LoRA Intrinsic Ranks via Salience Analysis"

    start: Start = "lora"
    target_r: float
    """Mean rank per site at the end; ``target_r · sites`` ranks remain in total, exactly."""
    warmup: StepLength = 0.3
    """Training before anything is recorded (the paper's n_i): steps, fraction, or ``"1ep"``. Later than in the
    paper's runs, in which a task that is learned late would be cut before anything tells its ranks apart."""
    allocation: StepLength = 0.5
    """Training during which the budget falls to the target (n_f); the pattern is fixed afterwards."""
    initial_window: int | None = None
    """Steps of the first time window (T_i). None: the paper's 10, less in a short run; see `windows`."""
    final_window: int | None = None
    """Steps of a time window at the end of the allocation (T_f). None: the paper's 200, or an eighth of the
    allocation if that is less."""
    beta: float = 0.9
    """Correlation from which one value is said to follow another."""
    gamma: float = 2.0
    """Slope from which it is said to depend on it; above 1."""
    magnitude_weight: float = 0.7
    """Share of the magnitude in the salience, the paper's λ; the influence has the rest."""
    orth_weight: float | None = None
    """Coefficient of the orthogonality penalty; None: 0.1 with ``svd``, none with ``lora``."""
    orth: Norm = "fro"
    """Penalty per factor: the Frobenius norm (released code) or its square (AdaLoRA's paper)."""
    step_weight: StepWeight = "inverse"
    """How a step counts in the magnitude: by 1/orthogonality, or that rescaled to [0, 1] (released code)."""
    anchored: bool = False
    """Let the budget start to fall from the initial rank instead of jumping by T_i/T_f at the first event."""
    parity: Literal["released"] | None = None
    """``"released"``: the salience of the released code, see `released_salience`."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_number("rank.target_r", self.target_r, above=0)
        check_length(self.warmup, "rank.warmup")
        check_length(self.allocation, "rank.allocation")
        if self.initial_window is not None:
            check_number("rank.initial_window", self.initial_window, at_least=2, whole=True)
        if self.final_window is not None:
            check_number("rank.final_window", self.final_window, at_least=self.initial_window or 2, whole=True)
        check_number("rank.beta", self.beta, above=0, at_most=1)
        check_number("rank.gamma", self.gamma, above=1)
        check_number("rank.magnitude_weight", self.magnitude_weight, at_least=0, at_most=1)
        check_start(self.start, self.orth_weight)
        check_choice("rank.orth", self.orth, ("fro", "fro2"))
        check_choice("rank.step_weight", self.step_weight, ("inverse", "minmax"))
        check_choice("rank.parity", self.parity, (None, "released"))
        if self.final_window is not None:
            self._check_anchor(self.initial_window, self.final_window)

    def _check_anchor(self, initial_window: int | None, final_window: int) -> None:
        if self.anchored and final_window == initial_window:
            raise ConfigError("rank.anchored", True, "final_window above initial_window; otherwise nothing grows")

    def windows(self, allocation: int) -> tuple[int, int]:
        """Steps of the first and the last window, for an allocation of so many steps.

        >>> [SalientLoRA(target_r=2).windows(n) for n in (50, 190, 50_000)]
        [(3, 6), (10, 24), (10, 200)]
        """
        first, last = self.initial_window, self.final_window
        if last is None:
            last = max(min(200, round(allocation / 8)), first or 2)
        if first is None:
            first = max(2, min(10, last // 2))
        return first, last

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> SalientAllocator:
        schedule = self.schedule(total_steps, steps_per_epoch, *totals(self.target_r, modules, limit))
        return SalientAllocator(self, modules, schedule, limit)

    def schedule(self, total_steps: int, steps_per_epoch: int | None, initial_total: int, final_total: int) -> Schedule:
        """The windows and budgets of one run. Raises `ConfigError` if they do not fit into it."""
        n_i = resolve_steps(self.warmup, total_steps, steps_per_epoch, "rank.warmup")
        n_f = resolve_steps(self.allocation, total_steps, steps_per_epoch, "rank.allocation")
        if n_f == 0 and self.allocation != 0 and not isinstance(self.allocation, int):
            n_f = 1  # a fraction of a very short run
        if n_f < 1:
            raise ConfigError("rank.allocation", self.allocation, "at least one step, to decide after")
        if n_i + n_f > total_steps:
            raise ConfigError(
                "rank.allocation",
                self.allocation,
                f"warmup {n_i} + allocation {n_f} = {n_i + n_f} steps, but the run has {total_steps}; "
                "shorten them or train longer",
            )
        first, last = self.windows(n_f)
        self._check_anchor(first, last)
        return Schedule(n_i, n_f, initial_total, final_total, first, last, self.anchored)

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
            before = min(before, budget)
        return curve


_total = final_total  # the method above has an argument of that name


@dataclass(frozen=True)
class Schedule:
    """Window lengths and budgets over time, in optimizer steps.

    ``u = (t − warmup) / allocation`` in [0, 1]; window ``T(t) = T_f + (T_i − T_f)(1 − u)³``, budget
    ``b(t) = b_0 − T(t)/T_f · (b_0 − b_T)``, both rounded. Pruning takes place when a window is full,
    and once more, to exactly ``b_T``, at ``warmup + allocation``.
    """

    warmup: int
    allocation: int
    initial_total: int
    final_total: int
    initial_window: int = 10
    final_window: int = 200
    anchored: bool = False

    @property
    def end(self) -> int:
        return self.warmup + self.allocation

    def window(self, step: int) -> int:
        """Steps of the window that opens at ``step``.

        >>> Schedule(800, 2000, 1080, 144).window(1000)
        61
        """
        u = min(max((step - self.warmup) / self.allocation, 0.0), 1.0)
        return round(self.final_window + (self.initial_window - self.final_window) * (1 - u) ** 3)

    def budget(self, step: int) -> int:
        """What may remain after pruning at ``step``.

        >>> Schedule(800, 2000, 1080, 144).budget(1000)
        795
        """
        if step >= self.end:
            return self.final_total
        low = self.initial_window if self.anchored else 0
        share = (self.window(step) - low) / (self.final_window - low)
        return round(self.initial_total - share * (self.initial_total - self.final_total))

    def events(self) -> Iterator[tuple[int, int]]:
        """(step, budget) of every pruning."""
        step = self.warmup + self.initial_window
        while step < self.end:
            yield step, self.budget(step)
            step += self.window(step)
        yield self.end, self.final_total


def magnitude(series: Tensor, orth: Tensor, step_weight: StepWeight = "inverse") -> Tensor:
    """Each value's share of the magnitude over a window; sums to 1.

    ``m_i = Σ_τ g_τ |λ_i(τ)|`` with ``g_τ = Σ_k o_k / o_τ``: a step counts more when factors were closer
    to orthonormal.

    Args:
        series: (n, window). orth: (window,) the orthogonality defect at each step.
    Returns:
        (n,) float64; equal shares where every value is 0.

    >>> series, orth = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]), torch.tensor([1, 2, 4, 1])
    >>> magnitude(series, orth).mul(110).round().tolist()
    [54.0, 56.0]
    """
    total = _weighted_magnitude(series, orth, step_weight)
    whole = total.sum()
    return torch.where(whole > 0, total / whole, 1 / max(len(total), 1))


def salience(
    series: Tensor,
    orth: Tensor,
    beta: float,
    gamma: float,
    magnitude_weight: float,
    step_weight: StepWeight = "inverse",
) -> Tensor:
    """How much each singular value matters over a window.

    ``magnitude_weight · magnitude + (1 − magnitude_weight) · influence``, both summing to 1 over all values.

    Args:
        series: (n, window) singular values of all sites, with their signs.
        orth: (window,) orthogonality defect at each step.
    Returns:
        (n,) float64.
    Raises:
        ConfigError: beta, gamma or magnitude_weight out of range.
        SelectionError: NaN or infinity, or shapes that do not agree.
    """
    check_number("rank.magnitude_weight", magnitude_weight, at_least=0, at_most=1)
    check_thresholds(beta, gamma)
    share = magnitude(series, orth, step_weight)
    if magnitude_weight == 1:
        return share
    return magnitude_weight * share + (1 - magnitude_weight) * influence(series, beta, gamma)


def released_salience(series: Tensor, orth: Tensor, beta: float, gamma: float, sizes: Sequence[int]) -> Tensor:
    """The released code's score, where it is defined: for comparison only.

    Influence is 0 for values that nothing follows, though they count as 1 for others; magnitude sums to 1
    within each site, with step weights rescaled to [0, 1]; the two are added without a weight. Where the
    released code divides by zero (no edge at all, constant orthogonality, a site without magnitude)
    the term is 0 or its step weights are 1.

    Args:
        sizes: how many of the values belong to each site, in order.
    """
    log_domain, has_edge = log_influence(series, beta, gamma)
    driven = log_domain.masked_fill(~has_edge, -torch.inf)
    influence_share = torch.where(has_edge.any(), torch.softmax(driven, dim=0), 0.0).nan_to_num(0.0)
    shares = []
    for part in _weighted_magnitude(series, orth, "minmax").split(list(sizes)):
        whole = part.sum()
        shares.append(torch.where(whole > 0, part / whole, 0.0))
    return influence_share + torch.cat(shares)


def _weighted_magnitude(series: Tensor, orth: Tensor, step_weight: StepWeight) -> Tensor:
    if series.dim() != 2 or orth.shape != (series.shape[1],):
        raise SelectionError(
            f"series {tuple(series.shape)} and orth {tuple(orth.shape)}: shapes (n, window) and (window,) needed"
        )
    orth = orth.double().clamp_min(1e-12)
    g = orth.sum() / orth
    if step_weight == "minmax":
        low, high = g.aminmax()
        g = torch.where(high > low, (g - low) / (high - low), 1.0)
    with one_thread(series.device):
        total = series.double().abs() @ g
    if not (torch.isfinite(total).all() and torch.isfinite(g).all() and torch.isfinite(orth).all()):
        raise SelectionError("series or orthogonality holds NaN or infinity")
    return total


class SalientAllocator(Allocator):
    """Records λ and the orthogonality once per step, prunes when a window is full."""

    method = SalientLoRA.method

    def __init__(
        self,
        settings: SalientLoRA,
        modules: Mapping[str, int],
        schedule: Schedule,
        limit: CostLimit | None = None,
    ) -> None:
        super().__init__(modules)
        self.settings = settings
        self.schedule = schedule
        self.limit = limit
        self.done = False
        self.window = schedule.initial_window  # steps of the open window
        self.filled = 0
        self.series: Tensor | None = None  # (window, n): a step is one contiguous row
        self.orth: Tensor | None = None  # (window,)
        self.last: Tensor | None = None  # (n,) salience at the last event
        self._defects = Orthogonality(len(self.names), settings.orth, only_angles=settings.start != "svd")
        self._defect: Tensor | None = None  # of the step under way

    def penalty(self, factors: Mapping[str, Factors]) -> Tensor | None:
        weight = self.settings.penalty_weight
        if not weight:
            return None
        moving, self._defect = self._defects(factors, self._living)
        return None if moving is None else weight * moving

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        self._check(factors)
        if self.done or step <= self.schedule.warmup:
            self._defect = None
            return self._again()
        self._record(factors)
        if step < self.schedule.end and self.filled < self.window:
            return self._again()
        return self._event(step)

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        if self.done:
            return None
        self._check(factors)
        if self.filled == 0 and self.last is None:
            self._record(factors)  # stopped before anything was recorded: decide by what is there
        return self._event(self.schedule.end)

    def _record(self, factors: Mapping[str, Factors]) -> None:
        values = self._values(factors)
        if self._defect is None:  # no penalty was asked for in this step
            with torch.no_grad():
                _, self._defect = self._defects(factors, self._living)
        if self.series is None:
            self.series = values.new_empty(self.window, len(values))
            self.orth = values.new_empty(self.window)
        assert self.orth is not None and self._defect is not None
        self.series[self.filled] = values
        self.orth[self.filled] = self._defect
        self.filled += 1
        self._defect = None

    def _event(self, step: int) -> Decision:
        budget = self.schedule.budget(step)
        if self.filled >= 2 or self.last is None:
            self.last = self._salience()
        costs = None if self.limit is None else self._per_living(self.limit.costs)
        kept = keep_top(self.last, budget, costs)
        self.done = step >= self.schedule.end
        self.window, self.filled = self.schedule.window(step), 0
        self.series = self.orth = None
        self._retire(kept)
        if self.done:
            self.last = None
        return self._pruning(budget)

    def _salience(self) -> Tensor:
        assert self.series is not None and self.orth is not None
        recorded, orth = self.series[: self.filled], self.orth[: self.filled]
        self._require_finite(recorded, "λ")
        if not torch.isfinite(orth).all():
            raise SelectionError("the orthogonality of the factors is not finite; lower the learning rate")
        s = self.settings
        if s.parity == "released":
            return released_salience(recorded.T, orth, s.beta, s.gamma, self._living_counts())
        return salience(recorded.T, orth, s.beta, s.gamma, s.magnitude_weight, s.step_weight)

    def _select(self, kept: Tensor) -> None:
        self._defects.forget()
        if self.series is not None:
            self.series = self.series[:, kept]
        if self.last is not None:
            self.last = self.last[kept]

    def _place(self, device: torch.device) -> None:
        super()._place(device)
        self.series, self.orth, self.last = (
            None if t is None else t.to(device) for t in (self.series, self.orth, self.last)
        )

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        meta |= {"done": self.done, "window": self.window, "filled": self.filled}
        if self.series is not None and self.orth is not None:
            tensors |= {"series": self.series[: self.filled], "orth": self.orth[: self.filled]}
        if self.last is not None:
            tensors["last"] = self.last
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        self.done, self.window, self.filled = meta["done"], meta["window"], meta["filled"]
        self.series = self.orth = self._defect = None
        self._defects.forget()
        if "series" in tensors:
            n = tensors["series"].shape[1]
            self.series = tensors["series"].new_empty(self.window, n)
            self.orth = tensors["orth"].new_empty(self.window)
            self.series[: self.filled] = tensors["series"]
            self.orth[: self.filled] = tensors["orth"]
        self.last = tensors.get("last")
