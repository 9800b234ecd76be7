"""A model-free host for allocators: sites that move on rails, and the controller's part of the protocol."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trimtab.rank.base import Allocator, Decision, Factors

IN, OUT = 6, 5


class Rails:
    """What an optimizer might do to the factors of some sites, fixed beforehand for every step and rank.

    Step t moves A, e and B to the t-th of random walks whose sizes span three decades, and leaves random
    gradients. A rank's walk does not depend on what else is still there.
    """

    def __init__(self, ranks: dict[str, int], steps: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> None:
        g = torch.Generator().manual_seed(seed)

        def walk(*shape: int) -> Tensor:
            return torch.randn(steps + 1, *shape, generator=g, dtype=torch.float64).cumsum(0)

        self.ranks, self.steps = ranks, steps
        self.values, self.grads = {}, {}
        trend = torch.linspace(0, 1, steps + 1, dtype=torch.float64)[:, None]
        for name, r in ranks.items():
            size = 10 ** (3 * torch.rand(r, generator=g, dtype=torch.float64) - 2)
            self.values[name] = {
                "A": (walk(r, IN) * 0.05).to(dtype),
                "e": ((trend + 0.02 * walk(r)) * size).to(dtype),
                "B": (walk(OUT, r) * 0.05).to(dtype),
            }
            self.grads[name] = {
                key: torch.randn(value.shape, generator=g, dtype=torch.float64).to(dtype)
                for key, value in self.values[name].items()
            }


class Host:
    """Holds the factors, moves them along the rails, carries decisions out.

    ``cuts=False`` is a host whose optimizer cannot be cut: it only ever sets e to zero.
    """

    def __init__(self, rails: Rails, allocator: Allocator, cuts: bool = True) -> None:
        self.rails, self.allocator, self.cuts = rails, allocator, cuts
        self.held = {name: torch.arange(r) for name, r in rails.ranks.items()}  # original positions
        self.factors = {
            name: Factors(name, *(nn.Parameter(rails.values[name][k][0].clone()) for k in "AeB"))
            for name in rails.ranks
        }
        self.history: list[tuple[int, str, int | None, frozenset[tuple[str, int]]]] = []

    def step(self, t: int) -> Decision | None:
        self.allocator.penalty(self.factors)
        for name, site in self.factors.items():
            held = self.held[name]
            for key in "AeB":
                p = getattr(site, key)
                rail, grad = self.rails.values[name][key][t], self.rails.grads[name][key][t]
                p.data.copy_(rail[..., held] if key != "A" else rail[held])
                p.grad = (grad[..., held] if key != "A" else grad[held]).clone() if p.requires_grad else None
        return self.apply(t, self.allocator.after_step(t, self.factors))

    def finish(self, t: int) -> Decision | None:
        return self.apply(t, self.allocator.finish(t, self.factors))

    def run(self, first: int = 1, last: int | None = None) -> Host:
        last = self.rails.steps if last is None else last
        for t in range(first, last + 1):
            self.step(t)
        return self

    def apply(self, t: int, decision: Decision | None) -> Decision | None:
        if decision is None:
            return None
        if decision.event:
            self.history.append((t, decision.kind, decision.budget, self.kept(decision)))
        with torch.no_grad():
            for name, keep in decision.keep.items():
                site = self.factors[name]
                assert keep.dtype == torch.bool and keep.shape == site.e.shape
                if decision.kind == "prune" and self.cuts:
                    self.held[name] = self.held[name][keep]
                    trains = site.A.requires_grad
                    site.A = nn.Parameter(site.A[keep].detach(), requires_grad=trains)
                    site.B = nn.Parameter(site.B[:, keep].detach(), requires_grad=site.B.requires_grad)
                    site.e = nn.Parameter(site.e[keep].detach())
                else:
                    site.e.mul_(keep)
        if decision.kind == "prune" and self.cuts:
            self.allocator.pruned(decision.keep)
        return decision

    def kept(self, decision: Decision) -> frozenset[tuple[str, int]]:
        return frozenset((name, int(i)) for name, keep in decision.keep.items() for i in self.held[name][keep].tolist())

    def nonzero(self) -> frozenset[tuple[str, int]]:
        return frozenset(
            (name, int(i)) for name, site in self.factors.items() for i in self.held[name][site.e.detach() != 0]
        )
