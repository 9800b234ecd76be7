"""EVA: start A along the directions in which a site's inputs vary most; where these explain most, most ranks go.

Paischer et al. 2024 (arXiv 2410.07170). An incremental SVD of what enters each site, batch after batch, until the
leading right singular vectors settle: the cosine with those of the batch before is at least τ. The explained-variance
ratios of all sites' vectors compete for Σ r ranks, at most ρ·r a site; A holds the winners as rows, B = 0.

Follows PEFT's EVA (`initialize_lora_eva_weights`), the authors' own, down to the randomised SVD and its seed, so that
the same batches give the same ranks and the same A up to sign: tokens count that are neither padding nor, in a
language model, left out of the loss; inputs are centred by their running mean; a site whose needed vectors have
settled takes part in no further batch; sites with one input (query, key, value) share one SVD; every site keeps the
scale alpha/r, whatever its rank. Differs where PEFT's fails: ties go to the earlier site; a batch with fewer tokens
than vectors waits for the next one; batches that are too few to settle end with a remark, not never; labels of whole
rows (classification) mask no tokens; a decoder's tokens are masked by the decoder's mask. ``whiten`` is left out.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import DataError, SelectionError
from ..schedule import plain_numbers
from .base import check_number
from .start import Chosen, Probe, StartSettings, in_words

_SEED = 42  # of the randomised SVD, PEFT's


@dataclass(frozen=True, kw_only=True)
class EVA(StartSettings):
    """Settings of EVA, by PEFT's names."""

    method: ClassVar[str] = "eva"
    paper: ClassVar[str] = "arXiv 2410.07170"

    rho: float = 2.0
    """Most ranks of a site, as a multiple of its ``r``; 1 gives every site its ``r``."""
    tau: float = 0.99
    """Cosine between the vectors of two batches from which on they have settled."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        check_number("rank.rho", self.rho, at_least=1)
        check_number("rank.tau", self.tau, at_least=0, at_most=1)
        check_number("rank.samples", self.samples, at_least=2, whole=True)
        check_number("rank.batch_size", self.batch_size, at_least=1, whole=True)

    def choose(self, probe: Probe) -> Chosen:
        most = {name: min(round(self.rho * r), probe.sites[name].in_features) for name, r in probe.ranks.items()}
        total = sum(probe.ranks.values())
        leader: dict[str, str] = {}  # site -> the first site that has its input
        found: dict[str, InputSVD] = {}
        ranks = dict(most)  # until every site has vectors that can compete, all are needed

        def needed(first: str) -> int:
            return max(ranks[name] for name, its in leader.items() if its == first)

        def take(sites: tuple[str, ...], tokens: Tensor) -> None:
            first = sites[0]
            if first not in found:
                leader.update(dict.fromkeys(sites, first))
                found[first] = InputSVD(max(most[name] for name in sites), self.tau)
            if not found[first].has_settled(needed(first)):
                found[first].update(tokens)

        def is_enough() -> bool:
            if not all(svd.has_vectors for svd in found.values()):
                return False
            ratios = {name: found[leader[name]].ratios[: most[name]] for name in probe.sites}
            ranks.update(give_out(ratios, total))
            return all(svd.has_settled(needed(first)) for first, svd in found.items())

        settled = probe.inputs(take, is_enough)
        short = next((first for first, svd in found.items() if not svd.has_vectors), None)
        if short is not None:
            raise DataError(f"batches: {short!r} saw fewer tokens than its {most[short]} vectors; eva needs more rows")
        if not settled:
            warnings.warn(
                f"rank.method=eva: after {probe.n_batches} batches the vectors still move; what there is is taken "
                "(more rows, or a lower rank.tau)",
                stacklevel=2,
            )
        factors, scores = {}, {}
        for name, r in ranks.items():
            svd, site = found[leader[name]], probe.sites[name]
            A = svd.vectors[:r].float()
            factors[name] = A, A.new_zeros(site.out_features, r)
            scores[name] = float(svd.ratios[:r].sum())
        when = f"settled after {probe.n_batches} batches" if settled else f"not settled after {probe.n_batches} batches"
        return Chosen(factors, scores, f"{in_words(ranks)}, by the explained variance of each site's inputs ({when})")


class InputSVD:
    """The leading principal directions of all rows seen so far, batch by batch (Ross et al. 2008, as in scikit-learn).

    Between batches only the directions, their singular values and the mean are kept.

    Args:
        n: directions that are kept.
        tau: cosine with the last batch's direction from which on one has settled.
    """

    def __init__(self, n: int, tau: float) -> None:
        self.n, self.tau = n, tau
        self.rows = 0
        self.spread = 0.0  # Σ over rows of ‖x − mean‖²
        self.mean: Tensor | None = None  # (d,)
        self.values = torch.empty(0)
        self.vectors = torch.empty(0, 0)
        """(n, d); the largest entry of each is above zero."""
        self.settled = torch.zeros(n, dtype=torch.bool)
        self._waiting: list[Tensor] = []

    @property
    def has_vectors(self) -> bool:
        return len(self.vectors) > 0

    @property
    def ratios(self) -> Tensor:
        """(n,) the share of the inputs' variance that each direction explains."""
        return (self.values.double().square() / self.spread if self.spread else torch.zeros_like(self.values)).cpu()

    def has_settled(self, k: int) -> bool:
        """Whether the first ``k`` directions have."""
        return bool(self.settled[:k].all())

    def update(self, x: Tensor) -> None:
        """Args: x: (rows, d). Fewer rows than directions wait for more."""
        x = torch.cat([*self._waiting, x.float()])
        if len(x) < self.n:
            self._waiting = [x]
            return
        self._waiting = []
        if not bool(torch.isfinite(x).all()):
            raise SelectionError("inputs of a site are not finite, so their directions cannot be compared; load the "
                                 "model in float32 or bfloat16, and check its weights")  # fmt: skip
        wide = torch.float32 if x.device.type == "mps" else torch.float64
        mean, n, before = x.mean(0, dtype=wide), len(x), self.rows
        centred = x - mean.float()
        spread = float(centred.square().sum(dtype=wide))
        if self.mean is not None:
            apart = self.mean - mean
            weight = before * n / (before + n)
            spread += self.spread + weight * float(apart.square().sum())
            kept = self.values[:, None] * self.vectors
            centred = torch.cat([kept.to(wide), centred.to(wide), weight**0.5 * apart[None]])  # in float64, as in PEFT
            mean = (self.mean * before + mean * n) / (before + n)
        last = self.vectors
        self.values, self.vectors = leading(centred, self.n)
        self.mean, self.rows, self.spread = mean, before + n, spread
        if last.shape == self.vectors.shape:
            self.settled = (torch.nn.functional.cosine_similarity(self.vectors, last.to(wide)) >= self.tau).cpu()


def leading(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """The ``n`` largest singular values (n,) and right singular vectors (n, d) of a matrix.

    By random projections onto 2n directions with four power iterations, as in PEFT; exact where that saves nothing.

    Args:
        x: (rows, d).
    """
    if 2 * n >= min(x.shape):
        _, values, vectors = torch.linalg.svd(x, full_matrices=False)
    else:
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(_SEED)
            _, values, v = torch.svd_lowrank(x, q=2 * n, niter=4)
        vectors = v.mT
    values, vectors = values[:n], vectors[:n]
    top = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    return values, vectors * torch.where(top < 0, -1.0, 1.0)


def give_out(ratios: Mapping[str, Tensor], total: int) -> dict[str, int]:
    """Ranks: how many of the ``total`` largest ratios each site has; of equal ones the earlier site's.

    >>> give_out({"query": torch.tensor([0.6, 0.1]), "value": torch.tensor([0.3, 0.2])}, 3)
    {'query': 1, 'value': 2}
    """
    names = list(ratios)
    owner = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(ratios[name]) for name in names]))
    best = torch.cat([ratios[name] for name in names]).argsort(descending=True, stable=True)[:total]
    counts = torch.bincount(owner[best], minlength=len(names))
    return dict(zip(names, counts.tolist()))
