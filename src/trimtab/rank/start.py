"""Ranks and factors that are chosen before training, by what a probe of the model sees on training rows.

Such a method is a rank method of its own (``rank: eva``), whose ranks then stay, and a start of those that decide
during training (``start: eva``): they prune from the ranks that it gave out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from ..plans import Site
from .base import Allocator, CostLimit, Decision, Factors, RankSettings, Start


class Probe(Protocol):
    """What a method may look at; see `trimtab.host.probe.Probe`."""

    sites: Mapping[str, Site]
    ranks: Mapping[str, int]
    """The rank of each site in the config: what is given out anew, in total."""
    scales: Mapping[str, float]
    rows: int
    n_batches: int

    def inputs(self, take: Callable[[tuple[str, ...], Tensor], None], is_enough: Callable[[], bool]) -> bool: ...

    def gradients(self) -> dict[str, Tensor]: ...

    def weight(self, name: str) -> Tensor: ...


@dataclass(frozen=True)
class Chosen:
    """What a method chose."""

    factors: dict[str, tuple[Tensor, Tensor]]
    """Site -> A (r, in) and B (out, r); r may be 0."""
    scores: dict[str, float]
    """Site -> what its rank was given out by."""
    told: str
    """How, in words."""


@dataclass(frozen=True, kw_only=True)
class StartSettings(RankSettings):
    """Base of these methods. Subclasses implement `choose`; training decides nothing after it."""

    start: Start = field(default="lora", init=False)
    prune: bool = field(default=False, init=False)
    samples: int = 1024
    """Training rows that a recipe's run looks at, drawn by its seed."""
    batch_size: int = 32
    """Rows of a batch there. In Python the batches are yours."""

    def choose(self, probe: Probe) -> Chosen:
        """Ranks and factors of every site."""
        raise NotImplementedError

    @property
    def starter(self) -> StartSettings:
        return self

    def build(
        self,
        modules: Mapping[str, int],
        total_steps: int,
        steps_per_epoch: int | None,
        base_lr: float | None = None,
        limit: CostLimit | None = None,
    ) -> Settled:
        return Settled(self.method, modules)


class Settled(Allocator):
    """The ranks stay as they are."""

    def __init__(self, method: str, modules: Mapping[str, int]) -> None:
        super().__init__(modules)
        self.method = method  # type: ignore[misc]

    def after_step(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        return None

    def finish(self, step: int, factors: Mapping[str, Factors]) -> Decision | None:
        return None


def in_words(ranks: Mapping[str, int]) -> str:
    """``ranks 2 to 16, 288 in total over 36 sites``."""
    given = ranks.values()
    return f"ranks {min(given)} to {max(given)}, {sum(given)} in total over {len(given)} sites"
