"""What every rank method consists of: settings that a user writes, and an allocator that decides.

An allocator never changes a model's shapes and never searches names. It is handed the raw factors of
every site, ``W x + s · B (e ⊙ (A x))``, and answers with a `Decision`: which ranks stay. Whoever owns
the model carries it out, by a mask or by cutting, and tells `Allocator.pruned` after a cut.

Two starts. ``svd``: the papers'; ``e`` holds the singular values. ``lora``: the layer trains A and B from
LoRA's own start, at its rate and scale, without any ``e``; the singular values are read off the factors. ``eva`` and
``gora`` are LoRA's with other ranks and factors, which a probe of the model chooses; see `trimtab.rank.start`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..adapters.lowrank import rank_sizes
from ..errors import BudgetError, CheckpointError, ConfigError, SelectionError, StaleAdapterError

if TYPE_CHECKING:
    from .start import StartSettings

Start = Literal["lora", "svd", "eva", "gora"]


@dataclass
class Factors:
    """Raw parameters of one site; ``r`` may be 0 after pruning, ``.grad`` may be None."""

    name: str
    A: Tensor  # (r, in)
    e: Tensor  # (r,); ones where the site trains none
    B: Tensor  # (out, r)
    has_values: bool = True
    """Whether ``e`` holds the values that ranks are judged by; else they are in the sizes of the factors."""

    def values(self) -> Tensor:
        """(r,) value of each rank; see `values_of`."""
        return values_of([self], self.e.device)


def values_of(sites: Sequence[Factors], device: torch.device) -> Tensor:
    """Values of all ranks, sites one after the other: ``e`` with its signs, or ``|e_i| · ‖B_i‖ · ‖A_i‖`` in float64,
    what the singular values of ΔW/s are where rows of A and columns of B are orthogonal."""
    e = torch.cat([site.e.detach().to(device) for site in sites])
    if all(site.has_values for site in sites):
        return e
    A, B = ([getattr(site, side).detach() for site in sites] for side in "AB")
    return rank_sizes(A, B, device) * e.abs()


@dataclass(frozen=True)
class Decision:
    """Which ranks stay, per site, over the ranks the site holds now."""

    keep: dict[str, Tensor]  # bool (r,)
    kind: Literal["mask", "prune"]
    """``mask``: set to 0, in ``e`` or in the column of B, and may come back; ``prune``: gone for good, to be cut
    where possible."""
    budget: int | None
    """What the schedule allowed: total rank, or total parameters under a parameter budget."""
    event: bool
    """Whether this is an allocation worth logging; False for a mask that is only applied again."""


@dataclass(frozen=True)
class CostLimit:
    """A parameter budget: what one rank of each site costs, and what may remain in total."""

    costs: Mapping[str, int]
    final: int


@dataclass(frozen=True, kw_only=True)
class RankSettings:
    """Base of every method's settings. Subclasses set `method` and `paper` and implement `build`.

    A method that takes LoRA's start by default redeclares the field: ``start: Start = "lora"``.
    """

    method: ClassVar[str]
    paper: ClassVar[str]
    e_decays: ClassVar[bool] = True
    """False: the optimizer's weight decay on ``e`` is to be compensated."""

    start: Start = "svd"
    """``lora``: PEFT's factors, scale and rate; ``svd``: the paper's, as `init_factors` and `scale` say; ``eva``,
    ``gora``: ranks and factors that these choose from training rows, in total what ``r`` gives."""
    prune: bool = True
    """Cut shapes when ranks are gone for good; False keeps masks only."""

    @property
    def penalty_weight(self) -> float:
        """Of the orthogonality penalty, for methods with a setting ``orth_weight``: only the SVD form needs one."""
        weight: float | None = getattr(self, "orth_weight", None)
        return weight if weight is not None else 0.1 if self.start == "svd" else 0.0

    @property
    def has_e(self) -> bool:
        """Whether every site gets a trained diagonal ``e``, which holds the ranks' values."""
        return self.start == "svd"

    @property
    def starter(self) -> StartSettings | None:
        """What chooses ranks and factors before training; None where the start needs no training rows."""
        if self.start in ("lora", "svd"):
            return None
        from . import load

        return load(self.start)()  # type: ignore[return-value]

    def init_factors(self, A: Tensor, e: Tensor, B: Tensor, generator: torch.Generator | None = None) -> None:
        """Values of the start ``svd``, in place. Here the SVD form: A, B ~ N(0, 0.02²), e = 0, so that ΔW = 0.

        Args:
            A: (r, in). e: (r,). B: (out, r).
        """
        with torch.no_grad():
            A.normal_(0.0, 0.02, generator=generator)
            B.normal_(0.0, 0.02, generator=generator)
            e.zero_()

    def scale(self, alpha: float, r: int) -> float:
        """The constant ``s`` of the start ``svd`` for initial rank ``r``; never changed when ranks fall."""
        return alpha / (r + 1e-5)

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> Allocator:
        """An allocator for one run.

        Args:
            modules: site name -> initial rank.
            total_steps: optimizer steps of the run.
            steps_per_epoch: for lengths in epochs; None where unknown.
            base_lr: the run's peak learning rate, for methods that use it.
            limit: cut by parameters instead of by number of ranks; replaces the settings' target.
        Raises:
            ConfigError: the schedule or the target does not fit; the message holds the numbers.
        """
        raise NotImplementedError

    def budget_curve(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        initial_total: int,
        modules: int,
        final_total: int | None = None,
    ) -> list[tuple[int, int]]:
        """(step, total budget after it) wherever the schedule changes it; empty if it cannot be foreseen.

        In ranks, or in whatever unit ``initial_total`` and ``final_total`` are given in.
        """
        return []

    def prune_curve(
        self,
        total_steps: int,
        steps_per_epoch: int | None,
        initial_total: int,
        modules: int,
        final_total: int | None = None,
    ) -> list[tuple[int, int]]:
        """As `budget_curve`, but only what is cut for good: the steps at which parameters are freed."""
        if not self.prune:
            return []
        return self.budget_curve(total_steps, steps_per_epoch, initial_total, modules, final_total)


class Allocator:
    """Decides during training. Subclasses implement `after_step` and `finish`.

    Keeps ``alive``, the permanent mask over the ranks the host holds, so that it decides the same
    whether or not the host cuts what was pruned.
    """

    method: ClassVar[str]

    def __init__(self, modules: Mapping[str, int]) -> None:
        if not modules:
            raise ConfigError("rank", dict(modules), "no site to allocate ranks to")
        self.names = tuple(modules)
        self.initial = {name: int(r) for name, r in modules.items()}
        self.sizes = list(self.initial.values())
        self.alive = torch.ones(sum(self.sizes), dtype=torch.bool)  # all sites one after the other
        self._refresh()

    # -- protocol ------------------------------------------------------------------------------

    def penalty(self, factors: Mapping[str, Factors]) -> Tensor | None:
        """A differentiable scalar to be added to the loss, already weighted, or None.

        Called at most once per optimizer step, before it. Takes gradients to A, B or e.
        """
        return None

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        """Called after every optimizer step that was not skipped, with ``.grad`` as the optimizer saw it.

        Args:
            step: optimizer steps completed, 1 after the first.
        """
        raise NotImplementedError

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        """The run ends here, early or not: cut to the target unless that was done. None if it was."""
        raise NotImplementedError

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        """The host cut the ranks where ``keep`` is False. Sites left out are unchanged.

        Args:
            keep: site -> (r,) bool, over the ranks it held before the cut.
        """
        flat = self._flat_mask(keep)
        self._select(flat[self.alive])
        self.alive = self.alive[flat]
        self.sizes = [int(part.sum()) for part in flat.split(self.sizes)]
        self._refresh()

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything later decisions depend on: tensors, and JSON-able rest."""
        meta = {
            "method": self.method,
            "sites": list(self.names),
            "initial": list(self.initial.values()),
            "sizes": list(self.sizes),
        }
        return {"alive": self.alive}, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises `CheckpointError` if it belongs to other sites."""
        if meta.get("method") != self.method:
            raise CheckpointError(f"rank state of method {meta.get('method')!r} cannot continue {self.method!r}")
        if meta["sites"] != list(self.names) or meta["initial"] != list(self.initial.values()):
            raise CheckpointError("rank state belongs to other sites or other initial ranks than this run has")
        self.sizes = list(meta["sizes"])
        self.alive = tensors["alive"].to(torch.bool)
        self._refresh()

    # -- for subclasses ------------------------------------------------------------------------

    def _select(self, kept: Tensor) -> None:
        """Cut what is held per living rank. Args: kept: bool over the living ranks."""

    def _place(self, device: torch.device) -> None:
        self.alive = self.alive.to(device)
        self._refresh()

    def _refresh(self) -> None:
        self.some_dead = not bool(self.alive.all())
        self._index = self.alive.nonzero().flatten() if self.some_dead else None
        parts = self.alive.split(self.sizes)
        self._keep = dict(zip(self.names, parts))
        self._living = {n: p.nonzero().flatten() for n, p in self._keep.items()} if self.some_dead else {}

    def _check(self, factors: Mapping[str, Factors]) -> None:
        """The host's shapes are those we decided on; moves to the parameters' device at first sight."""
        sizes = [factors[name].e.numel() for name in self.names]
        if sizes != self.sizes:
            name, now, then = next((n, a, b) for n, a, b in zip(self.names, sizes, self.sizes) if a != b)
            raise StaleAdapterError(f"{name} holds {now} ranks where the allocator left {then}")
        device = factors[self.names[0]].A.device
        if self.alive.device != device:
            self._place(device)

    def _values(self, factors: Mapping[str, Factors]) -> Tensor:
        """Values of all living ranks, sites one after the other, (n,) float64."""
        values = values_of([factors[name] for name in self.names], self.alive.device)
        return (values if self._index is None else values.index_select(0, self._index)).double()

    def _flat_mask(self, keep: Mapping[str, Tensor]) -> Tensor:
        parts = [
            keep[name].to(self.alive.device, torch.bool) if name in keep else self.alive.new_ones(size)
            for name, size in zip(self.names, self.sizes)
        ]
        for name, part, size in zip(self.names, parts, self.sizes):
            if part.shape != (size,):
                raise StaleAdapterError(f"{name}: a mask of {tuple(part.shape)} for {size} ranks")
        return torch.cat(parts)

    def _per_living(self, per_site: Mapping[str, int]) -> Tensor:
        """A site's number, repeated for each of its living ranks, (n,) int64."""
        values = torch.tensor([per_site[name] for name in self.names])
        return values.repeat_interleave(torch.tensor(self.sizes)).to(self.alive.device)[self.alive]

    def _living_counts(self) -> list[int]:
        return [int(part.sum()) for part in self._keep.values()]

    def _retire(self, kept: Tensor) -> None:
        """Whatever is not kept is gone for good. Args: kept: bool over the living ranks."""
        self._select(kept)
        alive = self.alive.clone()
        alive[self.alive] = kept
        self.alive = alive
        self._refresh()

    def _pruning(self, budget: int | None) -> Decision:
        return Decision(dict(self._keep), "prune", budget, event=True)

    def _again(self) -> Decision | None:
        """The permanent mask, when the host still holds ranks that are gone."""
        return Decision(dict(self._keep), "mask", None, event=False) if self.some_dead else None

    def _require_finite(self, values: Tensor, what: str) -> None:
        """Args: values: (..., n) over the living ranks."""
        good = torch.isfinite(values).reshape(-1, values.shape[-1]).all(dim=0)
        if not good.all():
            bad = int((~good).nonzero()[0])
            site = next(n for n, end in zip(self.names, _ends(self._living_counts())) if bad < end)
            raise SelectionError(f"{what} of {site} is not finite, so ranks cannot be compared; "
                                 "lower the learning rate or clip gradients")  # fmt: skip


def _ends(sizes: list[int]) -> list[int]:
    return torch.tensor(sizes).cumsum(0).tolist()


def final_total(target_r: float, modules: int, initial_total: int) -> int:
    """The total rank to end at: the mean target per site times the sites, refused if out of reach."""
    total = math.floor(target_r * modules + 1e-9)
    if total < 1:
        raise ConfigError("rank.target_r", target_r, f"over {modules} sites this leaves no rank; at least one stays")
    if total > initial_total:
        raise ConfigError(
            "rank.target_r",
            target_r,
            f"at most the initial rank, {initial_total / modules:g} on average; the budget only shrinks",
        )
    return total


def starter_of(config: object) -> StartSettings | None:
    """What chooses ranks and factors before training, of an adapter's config of any kind; None if nothing does."""
    rank = getattr(config, "rank", None)
    return None if rank is None else rank.starter


def totals(target_r: float, modules: Mapping[str, int], limit: CostLimit | None) -> tuple[int, int]:
    """What a budget falls from and to: in ranks, or in parameters under a limit of those.

    Raises:
        BudgetError: one rank of some site does not fit into the limit.
    """
    if limit is None:
        initial = sum(modules.values())
        return initial, final_total(target_r, len(modules), initial)
    dearest = max(limit.costs[name] for name in modules)
    if limit.final < dearest:
        raise BudgetError("budget.final_params", limit.final, f"at least {dearest}, one rank of the largest site")
    initial = sum(r * limit.costs[name] for name, r in modules.items())
    return initial, min(initial, limit.final)


def check_number(
    key: str,
    value: object,
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    whole: bool = False,
) -> None:
    """Refuse a setting that is no finite number within bounds. Raises `ConfigError`."""
    bounds = [
        f"{word} {bound:g}"
        for word, bound in (("at least", at_least), ("above", above), ("at most", at_most), ("below", below))
        if bound is not None
    ]
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    fits = number and math.isfinite(value) and not (  # type: ignore[arg-type]
        (at_least is not None and value < at_least)  # type: ignore[operator]
        or (above is not None and value <= above)  # type: ignore[operator]
        or (at_most is not None and value > at_most)  # type: ignore[operator]
        or (below is not None and value >= below)  # type: ignore[operator]
    )  # fmt: skip
    if not fits:
        raise ConfigError(key, value, f"a {'whole ' if whole else ''}number {' and '.join(bounds)}".strip())


def check_start(start: object, orth_weight: object = None) -> None:
    """Refuse another start than there is, and a penalty that is no weight."""
    check_choice("rank.start", start, get_args(Start))
    if orth_weight is not None:
        check_number("rank.orth_weight", orth_weight, at_least=0)


def check_choice(key: str, value: object, choices: tuple[object, ...]) -> None:
    """Refuse a word that is none of the choices. Raises `ConfigError`."""
    if value not in choices:
        raise ConfigError(key, value, f"one of {', '.join(map(repr, choices))}")
