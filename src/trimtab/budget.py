"""One number over all axes: how many parameters the adapter may train, at the end or on average.

What counts: the adapter's parameters. A rank of a site costs ``in + out`` for its row of A and column of B,
and 1 more where there is a rank diagonal ``e``; an output diagonal ``b`` costs ``out``, as DoRA's magnitudes and
LoRA's biases do; tokens that train count, too. Heads and other saved modules do not. Diagonals that are at
rest until their site's first freeze count from then on.

``final_params``    what the adapter holds when training ends, before the diagonals are folded in. A frozen
                    projection is part of it: freezing saves work, not size.
``average_params``  the mean over the run's optimizer steps of what was trainable in them (AFLoRA's figure).

Three settings may be free, and are chosen in this order: the *layer ratio* (the most layers that still
leave every site one rank), the *target rank* (with the freeze schedule as it is set), and, only if that
cannot meet the number, the *freeze ramp* (sooner or later). What is not free stays as it is.

How the average is predicted. Steps are counted one by one, as the methods will act. The rank method says
when parameters are cut, ``R(s)``, in parameters (ranks under a budget are kept by score while their cost
fits, so R is met to within one rank); the freeze method says which share of the projections trains,
``φ(s)``. With τ and ε the shares of projections and of ``e`` in a rank's cost, step s trains
``R(s) · (τ φ(s) + ε) + Σ b``, and the average is the mean of that. The closed form, for a fixed rank, takes
the integral of the smooth ramp instead. Of diagonals at rest the share ``1 − φ(s)²`` is taken to be at work: that
of the sites with a frozen projection, if A and B freeze independently. There is no closed form then.

How "measured ≤ budget" is kept. Cuts of ranks are certain: what remains never costs more than R(s). What
freezes depends on gradients and comes in whole projections, so freezing follows what was really spent: a
`Purse` holds the run's parameter-steps (budget × steps), and after each step tells the freezer how many are
left once the diagonals are paid for to the end. At each event the freezer scales the planned level by
(left) / (still planned), and in any step it keeps no more than the next step can pay for. What trains last
goes on until the purse is empty, so that nothing is left over. The guarantee is for the whole run: one that is
stopped early has trained its dear first steps and not its cheap last ones.

What cannot be held to a number is refused: SoRA, whose ranks follow from a threshold, and AFLoRA's
``rule="element_quantile"``, whose freezes follow from the scores.

No torch here: plain numbers in, plain numbers out.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from .errors import BudgetError, ConfigError
from .plans import Budget, Site

if TYPE_CHECKING:
    from .freeze.base import FreezeSettings
    from .rank.base import CostLimit, RankSettings

Curve = list[tuple[int, float]]
"""``(step, value)`` rows: the value holds from that step on."""

FREE = ("where.ratio", "rank.target_r", "freeze.ramp")
"""What a budget may choose, in the order of choosing."""


@dataclass(frozen=True)
class Figures:
    """Adapter parameters of one run, as predicted."""

    initial: int
    """Trainable in the first step."""
    final: float
    """Trainable in the end."""
    size: int
    """Held in the end, frozen or not: what ``final_params`` limits."""
    average: float
    """Mean over the steps, with the schedule's discrete events: what ``average_params`` limits."""
    average_closed_form: float | None
    """The same from the integral of the smooth ramp; None where a rank method cuts."""
    curve: tuple[tuple[int, float], ...]
    """Trainable from each step on."""


@dataclass(frozen=True)
class Purse:
    """What a run may spend: one parameter trained in one step costs one."""

    total: int

    def allowance(self, spent: int, diagonals: int, steps_left: int) -> int:
        """What the projections may still spend.

        Args:
            spent: sum over the steps done of what was trainable in them.
            diagonals: adapter parameters outside the projections that train to the end, those still at rest, too.
            steps_left: steps to come.

        >>> Purse(1000).allowance(spent=400, diagonals=10, steps_left=20)
        400
        """
        return self.total - spent - diagonals * steps_left


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why. Nothing in it depends on the data."""

    ratio: float | None
    """Share of the layers; None if the sites were given."""
    layers: dict[str, int]
    """Layers of each stack at that ratio."""
    rank: RankSettings | None
    """With ``target_r`` as the chosen mean rank (ranks are cut by `rank_params`, not by this)."""
    rank_params: int | None
    """What the ranks may cost in the end; None without a rank method."""
    rank_costs: dict[str, int]
    """Cost of one rank of each site."""
    freeze: FreezeSettings | None
    """With the chosen ramp."""
    levels: tuple[tuple[int, float], ...]
    """Planned number of trainable projection elements from each step on; see `Freezer.follow`."""
    purse: Purse | None
    """Under ``average_params`` with a freeze method: what the run may spend."""
    figures: Figures
    explanation: tuple[str, ...]

    def cost_limit(self) -> CostLimit | None:
        """For `RankSettings.build`."""
        from .rank.base import CostLimit

        return None if self.rank_params is None else CostLimit(self.rank_costs, self.rank_params)


@dataclass(frozen=True)
class Layout:
    """What is adapted and how it changes, as numbers: sites, ranks, methods, length of the run."""

    sites: tuple[Site, ...]
    ranks: tuple[int, ...]
    """Initial rank of each site."""
    rank: RankSettings | None
    freeze: FreezeSettings | None
    total_steps: int
    steps_per_epoch: int | None
    vectors: int = 0
    """Of ``out`` each, how many train at every site beside its ranks: DoRA's magnitude, LoRA's bias."""
    beside: int = 0
    """Adapter parameters at no site, which train to the end: tokens."""

    @property
    def has_b(self) -> bool:
        return self.freeze is not None and self.freeze.needs_output_diagonal

    @property
    def has_e(self) -> bool:
        return (self.rank is not None and self.rank.has_e) or self.has_b

    @cached_property
    def costs(self) -> dict[str, int]:
        """Cost of one rank of each site."""
        return {site.name: rank_cost(site, self.has_e) for site in self.sites}

    @cached_property
    def initial_rank_params(self) -> int:
        return sum(r * self.costs[site.name] for site, r in zip(self.sites, self.ranks))

    @property
    def mean_rank(self) -> float:
        return sum(self.ranks) / len(self.ranks)

    @cached_property
    def one_rank_each(self) -> int:
        return min(sum(self.costs.values()), self.initial_rank_params)

    @cached_property
    def dearest_rank(self) -> int:
        return max(self.costs.values())

    @cached_property
    def output_params(self) -> int:
        return sum(site.out_features for site in self.sites) * (self.has_b + self.vectors)

    @cached_property
    def diagonal_share(self) -> float:
        """ε: the rank diagonal's share of the ranks' cost."""
        return sum(self.ranks) / self.initial_rank_params if self.has_e else 0.0

    @cached_property
    def rests(self) -> tuple[float, float]:
        """Shares of the sites' ``e`` and ``b`` that are at rest at the start."""
        freeze = self.freeze
        if freeze is None or not freeze.rests:
            return 0.0, 0.0
        waiting = [
            (r, site.out_features) for site, r in zip(self.sites, self.ranks) if not freeze.initially_frozen(site.name)
        ]
        e, b = (sum(column) for column in zip(*waiting)) if waiting else (0, 0)
        has_own_e = self.rank is not None and self.rank.has_e
        return 0.0 if has_own_e else e / sum(self.ranks), b / self.output_params

    @cached_property
    def trainable_share(self) -> float:
        """τ: the share of projections that train at the start in the ranks' cost."""
        freeze = self.freeze
        trains = sum(
            r * (site.in_features + site.out_features)
            for site, r in zip(self.sites, self.ranks)
            if freeze is None or not freeze.initially_frozen(site.name)
        )
        return trains / self.initial_rank_params

    def rank_curve(self, rank_params: int | None = None) -> Curve:
        """R(s): what all ranks cost, down to ``rank_params`` (by default: the rank method's own target)."""
        initial = self.initial_rank_params
        curve: Curve = [(0, initial)]
        if self.rank is None:
            return curve
        if rank_params is not None:
            total, unit = initial, 1.0
        else:  # counted in ranks of mean cost
            total, unit = sum(self.ranks), initial / sum(self.ranks)
        cuts = self.rank.prune_curve(self.total_steps, self.steps_per_epoch, total, len(self.sites), rank_params)
        return curve + [(step, value * unit) for step, value in cuts]

    def levels(self, rank_params: int | None = None) -> Curve:
        """Trainable projection elements from each step on: R(s) τ φ(s)."""
        rank, share = self.rank_curve(rank_params), self._shares()
        return [(s, _at(rank, s) * self.trainable_share * _at(share, s)) for s in _starts(rank, share)]

    def figures(self, rank_params: int | None = None) -> Figures:
        """What trains, when."""
        rank, levels, shares = self.rank_curve(rank_params), self.levels(rank_params), self._shares()
        e, b = self.rests
        curve = []
        for s, value in levels:
            resting = _at(shares, s) ** 2
            e_params, b_params = _at(rank, s) * self.diagonal_share, self.output_params
            curve.append((s, value + e_params * (1 - e * resting) + b_params * (1 - b * resting) + self.beside))
        closed = None
        if len(rank) == 1 and not (self.freeze is not None and self.freeze.rests):
            fraction = 1.0
            if self.freeze is not None:
                fraction = self.freeze.average_fraction(self.total_steps, self.steps_per_epoch, closed_form=True)
            closed = levels[0][1] * fraction + sum(self.ranks) * self.has_e + self.output_params + self.beside
        average = sum_over(curve, self.total_steps) / self.total_steps
        size = round(rank[-1][1]) + self.output_params + self.beside
        return Figures(round(curve[0][1]), curve[-1][1], size, average, closed, tuple(curve))

    def _shares(self) -> Curve:
        if self.freeze is None:
            return [(0, 1.0)]
        return self.freeze.trainable_curve(self.total_steps, self.steps_per_epoch)


def rank_cost(site: Site, has_e: bool) -> int:
    """Parameters of one rank of a site: a row of A, a column of B, and an entry of ``e`` if there is one.

    >>> rank_cost(Site("query", 768, 768), has_e=True)
    1537
    """
    return site.in_features + site.out_features + has_e


def figures(
    sites: Sequence[Site],
    r: int | Mapping[str, int],
    rank: RankSettings | None,
    freeze: FreezeSettings | None,
    total_steps: int,
    steps_per_epoch: int | None = None,
    rank_params: int | None = None,
    *,
    vectors: int = 0,
    beside: int = 0,
) -> Figures:
    """Predicted adapter parameters of a run: initial, final, average.

    Args:
        sites: what is adapted.
        r: initial rank, of all sites or by site name.
        rank, freeze: settings of the methods, or None.
        total_steps, steps_per_epoch: length of the run in optimizer steps.
        rank_params: what the ranks may cost in the end, where a budget decides instead of ``target_r``.
        vectors, beside: what trains beside the ranks; see `Layout`.
    """
    return _layout(sites, r, rank, freeze, total_steps, steps_per_epoch, vectors, beside).figures(rank_params)


def solve(
    budget: Budget,
    sites: Sequence[Site],
    r: int | Mapping[str, int],
    *,
    rank: RankSettings | None = None,
    freeze: FreezeSettings | None = None,
    ratio: tuple[float, float] | None = None,
    total_steps: int,
    steps_per_epoch: int | None = None,
    free: Collection[str] = FREE,
    vectors: int = 0,
    beside: int = 0,
) -> Choice:
    """Choose the free settings so that the run meets the budget, as closely below it as they allow.

    Args:
        budget: exactly one of its two numbers.
        sites: every site that may be adapted; with ``ratio`` those of all layers.
        r: initial rank, of all sites or by site name.
        rank, freeze: settings of the methods, or None.
        ratio: lowest and highest share of the layers; None if ``sites`` are the chosen ones. Which layers
            are chosen is not known here: where layers differ in cost, the dearest are counted.
        total_steps, steps_per_epoch: length of the run in optimizer steps.
        free: which of `FREE` may be chosen; ``target_r`` that is not free is met as a cost, that of this
            rank at every site.
        vectors, beside: what trains beside the ranks; see `Layout`.
    Raises:
        ConfigError: a method that cannot be held to a budget.
        BudgetError: no choice meets it; the message names the smallest number that can be met.
    """
    key, limit = _the_one(budget)
    _check_methods(rank, freeze, total_steps, steps_per_epoch)
    all_layers = _layout(sites, r, rank, freeze, total_steps, steps_per_epoch, vectors, beside)
    task = _Task(key, limit, frozenset(free))
    if ratio is None:
        return task.solved(all_layers, None, {}, [])
    costs = all_layers.costs
    candidates = _ratios(all_layers.sites, *ratio)
    if "where.ratio" not in free and ratio[0] != ratio[1]:
        raise ConfigError("where.ratio", ratio, "one value, or let the budget choose it")
    for share, layers in candidates:  # most layers first
        layout = _restricted(all_layers, layers)
        if task.modest(layout) <= limit or (share, layers) == candidates[-1]:
            return replace(task.solved(layout, share, layers, [n for _, n in candidates]), rank_costs=costs)
    raise AssertionError("there is always a last candidate")


@dataclass(frozen=True)
class _Task:
    """The number, which figure it limits, and what may be chosen."""

    key: str
    limit: int
    free: frozenset[str]

    @property
    def is_average(self) -> bool:
        return self.key == "average_params"

    def figure(self, layout: Layout, rank_params: int | None) -> float:
        if self.is_average:
            return layout.figures(rank_params).average
        held = layout.initial_rank_params if rank_params is None else rank_params
        return held + layout.output_params + layout.beside

    def rank_is_free(self, layout: Layout) -> bool:
        return layout.rank is not None and "rank.target_r" in self.free

    def n_ramps(self, layout: Layout) -> int:
        if layout.freeze is None or not self.is_average or "freeze.ramp" not in self.free:
            return 0
        return layout.freeze.n_ramps(layout.total_steps, layout.steps_per_epoch)

    def set_rank_params(self, layout: Layout) -> int | None:
        """The settings' own target as a cost."""
        if layout.rank is None:
            return None
        target_r = float(getattr(layout.rank, "target_r", 0.0))
        if target_r > layout.mean_rank:
            raise ConfigError("rank.target_r", target_r, f"at most the initial rank, {layout.mean_rank:g} on average")
        return max(math.floor(target_r * sum(layout.costs.values()) + 1e-9), layout.dearest_rank)

    def modest(self, layout: Layout) -> float:
        """The figure at one rank per site, with the freeze schedule as set."""
        rank_params = layout.one_rank_each if self.rank_is_free(layout) else self.set_rank_params(layout)
        return self.figure(layout, rank_params)

    def smallest(self, layout: Layout) -> float:
        """The least that the free settings can do."""
        rank_params = layout.dearest_rank if self.rank_is_free(layout) else self.set_rank_params(layout)
        if self.n_ramps(layout):
            layout = _with_ramp(layout, 0)
        return self.figure(layout, rank_params)

    def solved(
        self, layout: Layout, ratio: float | None, layers: dict[str, int], alternatives: list[dict[str, int]]
    ) -> Choice:
        smallest = math.ceil(self.smallest(layout) - 1e-9)
        if smallest > self.limit:
            raise BudgetError(
                f"budget.{self.key}",
                self.limit,
                f"at least {smallest} with {self._limits(layout, layers)}; adapter.r may be lowered",
            )
        why = [f"budget.{self.key}={self.limit:,} over {layout.total_steps:,} steps"]
        if ratio is not None:
            why.append(self._why_layers(layers, alternatives, layout))
        rank_params, ramp = self._choose(layout)
        if ramp is not None:
            layout = _with_ramp(layout, ramp)
        rank = layout.rank
        if rank is not None and rank_params is not None:
            mean = rank_params / sum(layout.costs.values())
            share = rank_params / layout.initial_rank_params
            how = "chosen" if self.rank_is_free(layout) else "as set"
            why.append(
                f"rank: ranks worth {rank_params:,} parameters stay in the end ({share:.1%} of the start, "
                f"a mean rank of {mean:.2f}; {how}); by score while their cost fits, then the cheapest"
            )
            if self.rank_is_free(layout) and hasattr(rank, "target_r"):
                rank = replace(rank, target_r=min(mean, layout.mean_rank))  # type: ignore[call-arg]
        found = layout.figures(rank_params)
        levels: Curve = []
        purse = None
        if layout.freeze is not None:
            levels = layout.levels(rank_params)
            why.append(self._why_freeze(layout, ramp, levels))
            if self.is_average:
                # A schedule that leaves part of the budget is stretched to use it, unless it is to stay as set.
                stretches = ramp is not None and ramp < self.n_ramps(layout) - 1
                held = self.limit if stretches or found.average >= 0.99 * self.limit else found.average
                purse = Purse(math.floor(held * layout.total_steps))
        why.append(self._why_figure(self.figure(layout, rank_params), found, purse, layout.total_steps))
        return Choice(
            ratio, layers, rank, rank_params, dict(layout.costs), layout.freeze, tuple(levels), purse, found, tuple(why)
        )

    def _choose(self, layout: Layout) -> tuple[int | None, int | None]:
        """Cost of the ranks in the end, and which ramp (None: as set)."""
        rank_params = self.set_rank_params(layout)
        n_ramps = self.n_ramps(layout)
        if self.rank_is_free(layout):
            low, high = layout.one_rank_each, layout.initial_rank_params
            best = _largest(low, high, lambda params: self.figure(layout, params) <= self.limit)
            if best is not None and (best < high or not n_ramps):
                return best, None
            if best is None and not n_ramps:  # less than one rank per site
                return _largest(layout.dearest_rank, low, lambda p: self.figure(layout, p) <= self.limit), None
            rank_params = high if best is not None else low
        if not n_ramps or self.figure(layout, rank_params) == self.limit:
            return rank_params, None
        fits = _largest(0, n_ramps - 1, lambda k: self.figure(_with_ramp(layout, k), rank_params) <= self.limit)
        if fits is not None:
            return rank_params, fits
        soonest = _with_ramp(layout, 0)
        return _largest(
            layout.dearest_rank, layout.one_rank_each, lambda params: self.figure(soonest, params) <= self.limit
        ), 0

    # -- in words --------------------------------------------------------------------------------------

    def _limits(self, layout: Layout, layers: dict[str, int]) -> str:
        parts = [f"{len(layout.sites)} sites"]
        if layers:
            parts.append("the fewest layers allowed" if "where.ratio" in self.free else "this layer ratio")
        if self.rank_is_free(layout):
            parts.append("one rank of the dearest site")
        elif layout.rank is not None:
            parts.append(f"rank.target_r={getattr(layout.rank, 'target_r', None)}")
        else:
            parts.append(f"rank {min(layout.ranks)}")
        if self.n_ramps(layout):
            parts.append("everything frozen at once")
        return ", ".join(parts)

    def _why_layers(self, layers: dict[str, int], alternatives: list[dict[str, int]], layout: Layout) -> str:
        shown = ", ".join(f"{n} layers of {stack}" for stack, n in layers.items())
        if len(alternatives) == 1:
            return f"where: {shown}, as set"
        what = "leave every site at least one rank" if self.rank_is_free(layout) else "fit"
        if layers == alternatives[-1]:
            return f"where: {shown}, the fewest allowed"
        limit = ", the most allowed" if layers == alternatives[0] else ""
        return f"where: {shown}, the most that {what}{limit}"

    def _why_freeze(self, layout: Layout, ramp: int | None, levels: Curve) -> str:
        assert layout.freeze is not None
        total, epoch = layout.total_steps, layout.steps_per_epoch
        curve = layout.freeze.trainable_curve(total, epoch)
        fraction = layout.freeze.average_fraction(total, epoch)
        how = "chosen" if ramp is not None else "as set"
        if len(curve) == 1:
            return f"freeze: the projections train to the end ({how})"
        until = f"to step {curve[-1][0]:,}" if curve[-1][1] == 0 else "on"
        return (
            f"freeze: projections freeze from step {curve[1][0]:,} {until}, training {fraction:.1%} of the time ({how})"
        )

    def _why_figure(self, figure: float, found: Figures, purse: Purse | None, total_steps: int) -> str:
        text = f"predicted {self.key}: {figure:,.0f}, {figure / self.limit:.1%} of the budget"
        if self.is_average and found.average_closed_form is not None:
            text += f" ({found.average_closed_form:,.0f} in closed form)"
        held = figure
        if purse is not None:
            held = purse.total / total_steps
            text += f"; freezing follows what is spent, up to {held:,.0f} on average"
        if held < 0.99 * self.limit:
            text += "; nothing that may be chosen comes closer, and the rest is not used"
        return text


# -- pieces --------------------------------------------------------------------------------------------


def _the_one(budget: Budget) -> tuple[str, int]:
    given = {
        key: value
        for key, value in (("final_params", budget.final_params), ("average_params", budget.average_params))
        if value is not None
    }
    if len(given) != 1:
        raise ConfigError("budget", given or None, "one number: final_params or average_params")
    key, value = next(iter(given.items()))
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"budget.{key}", value, "a whole number of parameters, at least 1")
    return key, value


def _check_methods(
    rank: RankSettings | None, freeze: FreezeSettings | None, total_steps: int, steps_per_epoch: int | None
) -> None:
    if rank is not None:
        method = rank.method
        if rank.starter is rank:
            cure = f"it gives out what adapter.r says; for a budget take salientlora or adalora with start: {method}"
            raise ConfigError("rank.method", method, cure)
        if not rank.budget_curve(total_steps, steps_per_epoch, 10_000, 1, 1):
            raise ConfigError(
                "rank.method",
                rank.method,
                "salientlora or adalora under a budget; this method's final rank cannot be set",
            )
        if not rank.prune:
            raise ConfigError("rank.prune", False, "true under a budget: masked ranks still train")
    if freeze is not None:
        freeze.check_budget()


def _layout(
    sites: Sequence[Site],
    r: int | Mapping[str, int],
    rank: RankSettings | None,
    freeze: FreezeSettings | None,
    total_steps: int,
    steps_per_epoch: int | None,
    vectors: int,
    beside: int,
) -> Layout:
    if not sites:
        raise ConfigError("target_modules", None, "a budget needs at least one adapted site")
    ranks = tuple(r if isinstance(r, int) else r[site.name] for site in sites)
    return Layout(tuple(sites), ranks, rank, freeze, total_steps, steps_per_epoch, vectors, beside)


def _with_ramp(layout: Layout, k: int) -> Layout:
    assert layout.freeze is not None
    return replace(layout, freeze=layout.freeze.ramp(k, layout.total_steps, layout.steps_per_epoch))


def _ratios(sites: tuple[Site, ...], low: float, high: float) -> list[tuple[float, dict[str, int]]]:
    """Shares of the layers between two ratios that differ in layers, most first; with the layers of each stack."""
    sizes: dict[str, set[int]] = {}
    for site in sites:
        if site.stack is not None and site.block is not None:
            sizes.setdefault(site.stack, set()).add(site.block)
    if not sizes:
        raise ConfigError("where", None, "no adapted site sits in a stack of layers")
    if not 0 < low <= high <= 1:
        raise ConfigError("where.ratio", (low, high), "above 0, at most 1, the lower bound first")
    counts = {stack: len(blocks) for stack, blocks in sizes.items()}
    shares = {n / m for m in counts.values() for n in range(1, m + 1)} | {low, high}
    found: dict[tuple[int, ...], float] = {}
    for share in sorted(shares):  # the smallest share that gives these layers
        layers = tuple(math.floor(share * m + 1e-9) for m in counts.values())
        if low - 1e-9 <= share <= high + 1e-9 and all(layers):
            found.setdefault(layers, share)
    if not found:
        raise ConfigError("where.ratio", high, f"at least {1 / min(counts.values()):.3g}, one layer of each stack")
    return [(share, dict(zip(counts, layers))) for layers, share in sorted(found.items(), reverse=True)]


def _restricted(layout: Layout, layers: dict[str, int]) -> Layout:
    """The dearest layers of each stack, so that whichever are chosen cost no more."""
    cost: dict[tuple[str, int], int] = {}
    for site, r in zip(layout.sites, layout.ranks):
        if site.stack is not None and site.block is not None:
            place = site.stack, site.block
            own = r * layout.costs[site.name] + site.out_features * (layout.has_b + layout.vectors)
            cost[place] = cost.get(place, 0) + own
    kept: set[tuple[str | None, int | None]] = set()
    for stack, n in layers.items():
        blocks = sorted((place for place in cost if place[0] == stack), key=lambda place: (-cost[place], place[1]))
        kept.update(blocks[:n])
    chosen = [(site, r) for site, r in zip(layout.sites, layout.ranks) if (site.stack, site.block) in kept]
    return replace(layout, sites=tuple(site for site, _ in chosen), ranks=tuple(r for _, r in chosen))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int | None:
    """The largest whole number in [low, high] that fits, where what fits is below what does not."""
    if low > high or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _starts(*curves: Curve) -> list[int]:
    return sorted({step for curve in curves for step, _ in curve})


def _at(curve: Curve, step: int) -> float:
    return curve[bisect_right(curve, step, key=lambda row: row[0]) - 1][1]


def sum_over(curve: Sequence[tuple[int, float]], total_steps: int) -> float:
    """Sum over the steps 0 … total_steps - 1 of what holds from each point's step on."""
    ends = [*(step for step, _ in curve[1:]), total_steps]
    return math.fsum(
        (min(end, total_steps) - min(start, total_steps)) * value for (start, value), end in zip(curve, ends)
    )
