"""What every freezing method offers: settings that never change, and a freezer that decides.

Freezing acts on the projections ``lora_A (r, in)`` and ``lora_B (out, r)`` only; the vectors ``e (r,)``
and ``b (out,)`` train to the end. A projection is named ``"<site>.lora_A"`` or ``"<site>.lora_B"``.

From LoRA's start the vectors of a site are at rest, at one, until its first projection freezes: no part of
the function, of what trains, or of its cost. Until then the run is that of a plain LoRA.

Time: step t = 0, 1, 2, … is the optimizer step with t completed before it. The controller calls
``observe(t, gradients)`` with that step's unscaled, averaged, unclipped gradients, and once the step is
done ``decide(t)``. What freezes in ``decide(t)`` has therefore trained in the t + 1 steps 0 … t.
A step that the optimizer skipped is never shown to a freezer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from ..errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Curve = list[tuple[int, float]]
"""``(step, fraction)`` rows: from this step on, this fraction of the projections' elements trains."""


class FreezeSettings:
    """Base of the settings of a freezing method: a frozen dataclass that only stores and checks."""

    method: ClassVar[str]
    """Name in the recipe."""
    paper: ClassVar[str]
    needs_output_diagonal: ClassVar[bool] = False
    """True if every adapted layer gets an output vector ``b`` (and ``e``, unless a rank method gives one)."""

    start: Literal["lora", "svd"] = "svd"
    """``lora``: PEFT's factors and scale, vectors at rest at first; ``svd``: the paper's own, as `init_factors` and
    `scale` say. A method that takes LoRA's start has a field of this name."""

    @property
    def rests(self) -> bool:
        """Whether the vectors of a site wait for its first freeze."""
        return self.needs_output_diagonal and self.start == "lora"

    @property
    def freezes_all(self) -> bool:
        """Whether a run may come to have no projection left to train."""
        return True

    @property
    def has_no_scale(self) -> bool:
        """Whether alpha, and what may be made of it, is ignored."""
        return False

    def init_factors(
        self, A: Tensor, e: Tensor | None, b: Tensor | None, B: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """Fill the factors in place as the paper does; the base class leaves the layer's own start.

        From LoRA's start only the sites whose projections never train are filled so.
        """

    def scale(self, alpha: float, r: int) -> float:
        """The factor before the low-rank path with the start ``svd``, where no rank method sets one."""
        return alpha / r

    def initially_frozen(self, site_name: str) -> bool:
        """True if both projections of this site stay at their start values."""
        return False

    def check_sites(self, names: Iterable[str]) -> None:
        """Raise `ConfigError` if the settings name a site that is not there."""

    def build(self, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None) -> Freezer:
        """A freezer for one run.

        Args:
            tensors: elements of each projection that trains at the start, by name.
            total_steps: optimizer steps of the whole run.
            steps_per_epoch: optimizer steps of one epoch; None where the trainer does not know.
        Raises:
            ConfigError: if the phases do not fit the run.
        """
        raise NotImplementedError

    def trainable_curve(self, total_steps: int, steps_per_epoch: int | None) -> Curve:
        """Predicted fraction of projection elements that train, as steps; starts with ``(0, 1.0)``.

        Counts the discrete events of the run. A projection frozen at step t is still updated in step t,
        so its row is at t + 1.
        """
        raise NotImplementedError

    def n_ramps(self, total_steps: int, steps_per_epoch: int | None) -> int:
        """How many ways of freezing sooner or later a budget may choose from; 0 if none."""
        return 0

    def ramp(self, k: int, total_steps: int, steps_per_epoch: int | None) -> FreezeSettings:
        """These settings with the k-th of those ways, 0 the soonest; a larger k never trains less."""
        raise NotImplementedError

    def check_budget(self) -> None:
        """Raise `ConfigError` if the freezer does not heed `Freezer.decide`'s allowance."""
        raise ConfigError("freeze.method", self.method, "aflora, grades or at; this method cannot be held to a budget")

    def average_fraction(self, total_steps: int, steps_per_epoch: int | None, closed_form: bool = False) -> float:
        """Mean of `trainable_curve` over the run's steps, or of the ideal smooth curve where a method has one."""
        curve = self.trainable_curve(total_steps, steps_per_epoch)
        return CurveSums(curve, total_steps).after(0) / total_steps


class Freezer:
    """Decides, step by step, which projections freeze. Frozen is for good.

    Keeps the size of every projection, so that it can freeze by cost; sizes follow `pruned`.
    """

    reads_gradients: bool = False
    reads_weights: bool = False

    def __init__(self, tensors: Mapping[str, int], total_steps: int, curve: Curve) -> None:
        self.total_steps = total_steps
        self.numels = dict(tensors)
        """Elements of each projection that trained at the start, frozen or not, at its present rank."""
        self._frozen: dict[str, None] = {}  # a set that keeps its order
        self._fractions = CurveSums(curve, total_steps)
        self._levels: CurveSums | None = None

    @property
    def frozen(self) -> frozenset[str]:
        return frozenset(self._frozen)

    @property
    def trainable(self) -> list[str]:
        """Projections that still train; those cut down to rank 0 hold nothing to train."""
        return [name for name, numel in self.numels.items() if numel and name not in self._frozen]

    def observe(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in one optimizer step.

        Args:
            values: the gradients of the projections that train if `reads_gradients`, their weights after the step if
                `reads_weights`, else nothing.
        """

    def follow(self, levels: Curve) -> None:
        """Under a budget: aim at these numbers of trainable projection elements, as ``(step, number)``.

        Without this call a budget aims at the schedule's fraction of what there is now, which is wrong
        when a rank method will still cut most of it.
        """
        self._levels = CurveSums(levels, self.total_steps)

    def is_due(self, step: int) -> bool:
        """Whether processes must compare the answer of ``decide(step)`` even if it is empty.

        Called before `decide`. May depend on the step and on what is frozen already, never on gradients. False
        where those alone settle whether anything freezes; True is always right, at the cost of an exchange.
        """
        return True

    def decide(self, step: int, allowance: float | None = None) -> set[str]:
        """Names of the projections that freeze now, after ``step`` is done.

        Args:
            step: the step just done, from 0.
            allowance: under a budget, how many parameter-steps (one parameter trained in one step) the
                projections may spend in all the steps to come; ``None`` without a budget. See
                `trimtab.budget`.
        """
        raise NotImplementedError

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        """Follow a cut of ranks: ``keep[site] (r,)`` is False where a row of A and a column of B went."""
        for site, kept in keep.items():
            for name in (f"{site}.lora_A", f"{site}.lora_B"):
                if len(kept) and name in self.numels:  # sizes are multiples of the rank
                    self.numels[name] = self.numels[name] // len(kept) * int(kept.sum())

    def _cut(self, tensors: dict[str, Tensor], keep: Mapping[str, Tensor]) -> None:
        """The same cut in tensors of the projections' shapes: rows of A (r, in), columns of B (out, r), in place."""
        for site, kept in keep.items():
            if (A := tensors.get(f"{site}.lora_A")) is not None:
                tensors[f"{site}.lora_A"] = A[kept.to(A.device)]
            if (B := tensors.get(f"{site}.lora_B")) is not None:
                tensors[f"{site}.lora_B"] = B[:, kept.to(B.device)]

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors, and what JSON can hold."""
        return {}, {"frozen": list(self._frozen), "numels": dict(self.numels)}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        self._frozen = dict.fromkeys(meta["frozen"])
        self.numels = {name: int(numel) for name, numel in meta["numels"].items()}

    def _freeze(self, names: Iterable[str]) -> set[str]:
        names = list(names)
        self._frozen.update(dict.fromkeys(names))
        return set(names)

    def _over_allowance(
        self, step: int, scores: Mapping[str, float] | None, allowance: float, is_event: bool
    ) -> list[str]:
        """What must freeze after ``step`` so that the run's allowance is spent, and not exceeded.

        At an event the schedule's level is scaled by (what is left) / (what the schedule would still
        spend): too much spent so far means less now. The lowest scores freeze while what remains is still
        at or above that level. From the schedule's end on, what still trains goes on until the allowance
        is used up; and in any step, what trains in the next step must fit into it.
        """
        steps_left = self.total_steps - 1 - step
        trainable = self.trainable
        if not trainable or steps_left <= 0:
            return []
        scores = scores or dict.fromkeys(trainable, 0.0)
        frozen: list[str] = []
        if is_event:
            frozen = self._down_to_level(step, trainable, scores, allowance)
            trainable = [name for name in trainable if name not in set(frozen)]
        costs = [self.numels[name] for name in trainable]
        if sum(costs) > allowance:
            kept = keep_by_cost([scores[name] for name in trainable], costs, allowance)
            frozen += [name for name, stays in zip(trainable, kept) if not stays]
        return frozen

    def _down_to_level(
        self, step: int, trainable: list[str], scores: Mapping[str, float], allowance: float
    ) -> list[str]:
        total = 1.0 if self._levels else float(sum(self.numels.values()))
        planned = self._levels or self._fractions
        ahead = planned.after(step + 1) * total
        if ahead <= 0:
            return []
        level = planned.at(step + 1) * total * allowance / ahead
        remaining = sum(self.numels[name] for name in trainable)
        frozen = []
        for name in sorted(trainable, key=lambda name: scores[name]):
            remaining -= self.numels[name]
            if remaining < level:
                break
            frozen.append(name)
        return frozen


class CurveSums:
    """A step function with its sums, so that what lies ahead costs one look-up."""

    def __init__(self, curve: Curve, total_steps: int) -> None:
        self.starts = [min(start, total_steps) for start, _ in curve]
        self.fractions = [fraction for _, fraction in curve]
        ends = [*self.starts[1:], total_steps]
        self.total_steps = total_steps
        self.suffix = [0.0]
        for start, end, fraction in reversed(list(zip(self.starts, ends, self.fractions))):
            self.suffix.append(self.suffix[-1] + (end - start) * fraction)
        self.suffix.reverse()

    def at(self, step: int) -> float:
        """The fraction in force in ``step``."""
        return self.fractions[bisect_right(self.starts, step) - 1]

    def after(self, step: int) -> float:
        """Sum of the fractions of ``step`` and all later steps."""
        if step >= self.total_steps:
            return 0.0
        i = bisect_right(self.starts, step) - 1
        return self.suffix[i] - (step - self.starts[i]) * self.fractions[i]


def keep_by_cost(scores: Sequence[float], costs: Sequence[int], limit: float) -> list[bool]:
    """Which items stay within a limit on their summed cost: by score while they fit, then the cheapest.

    Highest score first until one does not fit; what is left is filled with the cheapest of the others.
    Ties go to the earlier item. What stays unused is less than the cheapest item left out.

    >>> keep_by_cost([3.0, 2.0, 1.0], [5, 8, 2], 7)
    [True, False, True]
    """
    keep = [False] * len(costs)
    left = limit
    order = sorted(range(len(costs)), key=lambda i: (-scores[i], i))
    first_that_does_not_fit = len(order)
    for place, i in enumerate(order):
        if costs[i] > left:
            first_that_does_not_fit = place
            break
        keep[i] = True
        left -= costs[i]
    for i in sorted(order[first_that_does_not_fit:], key=lambda i: (costs[i], -scores[i], i)):
        if costs[i] > left:
            break
        keep[i] = True
        left -= costs[i]
    return keep


def check_curve(curve: Curve) -> Curve:
    """The curve, after a look that it starts at step 0 and never rises."""
    assert curve[0] == (0, 1.0)
    assert all(a[0] < b[0] and a[1] >= b[1] for a, b in pairwise(curve)), curve
    return curve
