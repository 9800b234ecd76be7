"""GoRA: give ranks to the weights that the loss is most sensitive to, and start with a step along their gradient.

He et al., NeurIPS 2025 (arXiv 2502.12171). From Ḡ, the mean gradient of a site's weight W over N training batches:

    I = mean|W ⊙ Ḡ|                              how much a rank of the site is worth
    r = clip(t·I, r_min, r_max)                  one t for all sites, so that they cost what rank r everywhere would
    A ~ Kaiming,  B = −ξ · Ḡ A⁺                  A⁺ = Aᵀ(A Aᵀ)⁻¹: Ḡ within the span of A's rows
    ξ = γ · √(in / r) / s                        so that ΔW = s·B·A is about as long as a step of SGD at the rate γ

Our A is (r, in) and B (out, r); in the paper's shapes, W (in, out), this is B = −ξ(AᵀA)⁻¹AᵀG. It is the step that
lowers the loss: ⟨Ḡ, ΔW⟩ = −γ√(in/r)·‖Ḡ A⁺A‖². Every site keeps the scale s = alpha/r of the config, as in the
authors' code.

Paper and code give a site a share of the budget that is proportional to I (the code by choice to I over the root of
the site's width) and round what it buys; so sites of different widths differ from ours, where the rank itself is
proportional to I, and what is cut off at r_min and r_max changes the total. Ours goes to the other sites: the total is
never above that of rank r everywhere, and at most a rank of a site below. Theirs takes gradients in training mode,
with dropout; ours in evaluation mode. Their search over γ by the loss is left out; a γ by which the loss of a first
batch rises is told.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import ConfigError, SelectionError
from ..schedule import plain_numbers
from .base import check_number
from .start import Chosen, Probe, StartSettings, in_words


@dataclass(frozen=True, kw_only=True)
class GoRA(StartSettings):
    """Settings of GoRA. The gradients of all adapted weights are summed on the CPU, at four bytes a weight."""

    method: ClassVar[str] = "gora"
    paper: ClassVar[str] = "arXiv 2502.12171"

    gamma: float = 0.05
    """Length of the first step (γ), as a learning rate of SGD; 0 leaves B at zero."""
    r_min: int | None = None
    """Fewest ranks of a site; half of its ``r`` when not given."""
    r_max: int | None = None
    """Most; four times its ``r`` when not given."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_number("rank.gamma", self.gamma, at_least=0)
        check_number("rank.samples", self.samples, at_least=1, whole=True)
        check_number("rank.batch_size", self.batch_size, at_least=1, whole=True)
        for key in ("r_min", "r_max"):
            if getattr(self, key) is not None:
                check_number(f"rank.{key}", getattr(self, key), at_least=0 if key == "r_min" else 1, whole=True)
        if self.r_min is not None and self.r_max is not None and self.r_min > self.r_max:
            raise ConfigError("rank.r_min", self.r_min, f"at most r_max={self.r_max}")

    def choose(self, probe: Probe) -> Chosen:
        for name, r in probe.ranks.items():
            low, high = self.bounds(r)
            if not low <= r <= high:
                key = "r_min" if low > r else "r_max"
                raise ConfigError(f"rank.{key}", getattr(self, key), f"r={r} of {name!r} lies outside; the budget is r")
        gradients = probe.gradients()
        scores = {name: importance(probe.weight(name), gradients[name]) for name in probe.sites}
        costs = {name: site.in_features + site.out_features for name, site in probe.sites.items()}
        limits = {name: self.bounds(r) for name, r in probe.ranks.items()}
        ranks = give_out(scores, costs, limits, sum(costs[name] * r for name, r in probe.ranks.items()))
        factors = {}
        for name, r in ranks.items():
            A = torch.empty(r, probe.sites[name].in_features)
            if r:
                torch.nn.init.kaiming_uniform_(A, a=math.sqrt(5))  # LoRA's own
            factors[name] = A, first_step(gradients.pop(name), A, self.gamma, probe.scales[name])
        how = f"by mean |weight x gradient| over {probe.n_batches} batches, with a first step at rate {self.gamma:g}"
        return Chosen(factors, scores, f"{in_words(ranks)}, {how}")

    def bounds(self, r: int) -> tuple[int, int]:
        """Fewest and most ranks of a site whose rank in the config is ``r``."""
        return max(1, r // 2) if self.r_min is None else self.r_min, 4 * r if self.r_max is None else self.r_max


def importance(weight: Tensor, gradient: Tensor) -> float:
    """``mean|W ⊙ Ḡ|``.

    Args:
        weight, gradient: (out, in).

    >>> importance(torch.tensor([[1.0, -2.0]]), torch.tensor([[3.0, 0.5]]))
    2.0
    """
    return float((weight * gradient).abs().mean(dtype=torch.float64))


def give_out(
    scores: Mapping[str, float], costs: Mapping[str, int], limits: Mapping[str, tuple[int, int]], budget: int
) -> dict[str, int]:
    """Ranks in proportion to the scores, within each site's limits, that cost at most the budget and nearly that.

    Args:
        scores: site -> its importance.
        costs: site -> parameters of one of its ranks.
        limits: site -> fewest and most ranks; the fewest of all sites fit into the budget.
    Raises:
        SelectionError: a score that is not finite.

    >>> give_out({"a": 3.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": (1, 16), "b": (1, 16)}, 80)
    {'a': 6, 'b': 2}
    """
    if bad := next((name for name, score in scores.items() if not math.isfinite(score)), None):
        raise SelectionError(f"the gradient of {bad!r} is not finite, so sites cannot be compared; load the model in "
                             "float32 or bfloat16, and check its weights")  # fmt: skip
    top = max(scores.values())
    # A site without a gradient to speak of gets its fewest; where no site has one, all are alike.
    scores = {name: score / top if top and score > 1e-30 * top else float(not top) for name, score in scores.items()}

    def shares(t: float) -> dict[str, float]:
        return {name: min(max(t * score, limits[name][0]), limits[name][1]) for name, score in scores.items()}

    def cost(ranks: Mapping[str, float]) -> float:
        return math.fsum(costs[name] * r for name, r in ranks.items())

    low, high = 0.0, (1 + max(most for _, most in limits.values())) / min(score for score in scores.values() if score)
    while low < (middle := (low + high) / 2) < high:  # the cost grows with t
        low, high = (middle, high) if cost(shares(middle)) <= budget else (low, middle)
    wanted = shares(low)
    ranks = {name: math.floor(r + 1e-9) for name, r in wanted.items()}
    left = budget - round(cost(ranks))
    for name in sorted(wanted, key=lambda name: ranks[name] - wanted[name]):  # stable: of equal rests the earlier site
        if costs[name] <= left and ranks[name] < limits[name][1] and wanted[name] > ranks[name] + 1e-9:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def first_step(gradient: Tensor, A: Tensor, gamma: float, scale: float) -> Tensor:
    """B, (out, r), with which ``scale · B A`` is −γ√(in/r) times the gradient's part in the span of A's rows.

    Args:
        gradient: (out, in). A: (r, in).
    """
    r, width = A.shape
    if not r:
        return gradient.new_zeros(len(gradient), 0)
    return (gradient.double() @ torch.linalg.pinv(A.double()) * (-gamma * math.sqrt(width / r) / scale)).to(A.dtype)
