"""Linear CKA of many pairs of feature matrices whose rows arrive in batches.

All that CKA needs from two matrices x (n, d_x), y (n, d_y) is, for the pairs xy, xx and yy,

    t  = ‖x̄ᵀȳ‖_F² = Σ_ij K_ij L_ij      x̄, ȳ: centred columns; K = x̄x̄ᵀ, L = ȳȳᵀ
    Σk, Σl, Σkl                          k_i = ‖x̄_i‖², l_i = ‖ȳ_i‖²; only the unbiased estimator needs them

While n ≤ d the rows themselves are kept (as they came) and t comes from two n×n Gram matrices at a time.
From n > d on only d×d sums are kept, in float64, of rows shifted by the mean of the first d rows, so that
little is lost when they are centred at the end. Rows are added in blocks that count from the first row,
so how they were batched changes nothing.

Whether one row makes up more than half of a matrix is told from a short signature per row, kept for at
most `SIGNATURES` rows, evenly spaced over all that came.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SAME_ROW = 1e-6
"""Two rows are the same when they differ by at most this, relative to their norm."""
SIGNATURES = 32_768
"""Rows per matrix whose signature is kept; beyond it every second one is dropped, again and again."""


def hsic(t: float, sum_k: float, sum_l: float, sum_kl: float, n: int, estimator: str) -> float:
    """HSIC up to a factor that depends on n alone and cancels in CKA.

    ``biased``: tr(K L). ``unbiased``: the U-statistic of Song et al. 2012, eq. 5, tr(K̃L̃) + 1ᵀK̃1·1ᵀL̃1 / ((n−1)(n−2))
    − 2·1ᵀK̃L̃1 / (n−2) with zero diagonals, which for centred K, L has 1ᵀK̃1 = −Σk and 1ᵀK̃L̃1 = Σkl.
    """
    if estimator == "biased":
        return t
    return t - sum_kl + sum_k * sum_l / ((n - 1) * (n - 2)) - 2 * sum_kl / (n - 2)


def ratio(xy: float, xx: float, yy: float, estimator: str) -> float:
    """CKA from three HSIC values; 0 where the unbiased estimate of a matrix with itself is not positive."""
    if xx <= 0 or yy <= 0:
        return 0.0
    value = xy / (math.sqrt(xx) * math.sqrt(yy))
    return min(max(value, 0.0), 1.0) if estimator == "biased" else value


def noise(dtype: torch.dtype) -> float:
    """Relative size below which what is left after centring is rounding."""
    return 1e-12 if dtype == torch.float64 else SAME_ROW


class StreamingCKA:
    """CKA of pairs of matrices, ``pairs[i] = (a, b)`` indexing the list that `add` receives.

    Args:
        pairs: which matrices are compared.
        estimator: ``biased`` or ``unbiased``.
        block: rows per update of the d×d sums; one block of rows per matrix is held back.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], estimator: str = "biased", block: int = 512) -> None:
        self.pairs, self.estimator, self.block = tuple(pairs), estimator, block
        self.n = 0
        self._rows: list[list[Tensor]] = []  # per matrix: chunks (b, d) in the dtype they came in
        self._held = 0  # rows in _rows
        self._limit = 0  # the largest d: up to here rows are kept
        self._sums: _Sums | None = None
        self._signatures: list[_Signatures] = []

    def add(self, matrices: Sequence[Tensor]) -> None:
        """Take the next rows of every matrix, each (b, d_p), finite, on the CPU."""
        if not self._rows:
            self._rows = [[] for _ in matrices]
            self._limit = max(m.shape[1] for m in matrices)
            self._signatures = [_Signatures(m.shape[1]) for m in matrices]
        for chunks, signatures, m in zip(self._rows, self._signatures, matrices, strict=True):
            chunks.append(m)
            signatures.add(m.double())
        self.n += matrices[0].shape[0]
        self._held += matrices[0].shape[0]
        if self._sums is None and self.n > self._limit:
            first = self._take(self._limit)
            self._sums = _Sums(self.pairs, [f.mean(0) for f in first], self.estimator == "unbiased")
            self._sums.add(first)
        while self._sums is not None and self._held >= self.block:
            self._sums.add(self._take(self.block))

    @property
    def stored_values(self) -> int:
        """Numbers held now, the signatures left out: at most rows of n ≤ d, or the d×d sums and one block."""
        rows = sum(c.numel() for chunks in self._rows for c in chunks)
        return rows + (sum(s.numel() for s in self._sums.products.values()) if self._sums else 0)

    def finish(self) -> list[float]:
        """CKA per pair; 0 where a matrix is constant."""
        if self._sums is not None:
            noises = [noise(chunks[0].dtype) for chunks in self._rows]
            if self._held:
                self._sums.add(self._take(self._held))
            return self._sums.cka(self.n, self.estimator, noises)
        grams: dict[int, Tensor] = {}
        own: dict[int, float] = {}
        values = []
        for a, b in self.pairs:
            grams = {p: k for p, k in grams.items() if p in (a, b)}  # two n×n matrices at a time
            for p in (a, b):
                if p not in grams:
                    grams[p] = gram(centred(torch.cat(self._rows[p])))
                if p not in own:
                    own[p] = gram_hsic(grams[p], grams[p], self.estimator)
            values.append(ratio(gram_hsic(grams[a], grams[b], self.estimator), own[a], own[b], self.estimator))
        return values

    def repeated(self) -> list[bool]:
        """Per matrix: does one row, up to `SAME_ROW`, make up more than half of it?"""
        return [signatures.has_majority() for signatures in self._signatures]

    def _take(self, count: int) -> list[Tensor]:
        """The oldest ``count`` held rows of every matrix, in float64."""
        taken = []
        for chunks in self._rows:
            held = chunks[0] if len(chunks) == 1 else torch.cat(chunks)
            rest = held[count:]
            taken.append(held[:count].double())
            chunks[:] = [rest if len(rest) > len(held) // 2 else rest.clone()]  # a small rest must not pin the whole
        self._held -= count
        return taken


def centred(x: Tensor) -> Tensor:
    """x (n, d) in float64, columns centred, over its Frobenius norm; all zero when x is constant up to rounding.

    Dividing before anything is squared makes CKA blind to scale; an absolute epsilon would not.
    """
    relative_noise = noise(x.dtype)
    x = x.double()
    x = x / (x.abs().max() or 1.0)
    out = x - x.mean(0)
    size = torch.linalg.vector_norm(out)
    return torch.zeros_like(out) if size <= relative_noise * torch.linalg.vector_norm(x) else out / size


def gram(x: Tensor) -> Tensor:
    """``K = x̄x̄ᵀ`` (n, n) of centred x (n, d)."""
    return x @ x.T


def gram_hsic(k: Tensor, l: Tensor, estimator: str) -> float:
    """HSIC of two centred Gram matrices (n, n): the form for n < d."""
    dk, dl = k.diagonal(), l.diagonal()
    return hsic(float((k * l).sum()), float(dk.sum()), float(dl.sum()), float(dk @ dl), k.shape[0], estimator)


def covariance_hsic(x: Tensor, y: Tensor, estimator: str) -> float:
    """HSIC of two centred matrices (n, d_x), (n, d_y) through xᵀy (d_x, d_y): the form for n ≥ d."""
    k, l = x.square().sum(1), y.square().sum(1)
    t = float((x.T @ y).square().sum())
    return hsic(t, float(k.sum()), float(l.sum()), float(k @ l), x.shape[0], estimator)


class _Sums:
    """Sums over rows x of matrix a and y of matrix b, both minus a fixed shift.

    ``products[a, b]`` = Σ xyᵀ (d_a, d_b); ``first[a]`` = Σ x; ``square[a]`` = Σ ‖x‖²; for the unbiased
    estimator also ``quartic[a, b]`` = Σ ‖x‖²‖y‖² and ``cubic[a, b]`` = Σ ‖y‖² x.
    """

    def __init__(self, pairs: Sequence[tuple[int, int]], shifts: list[Tensor], unbiased: bool) -> None:
        self.pairs, self.shifts, self.unbiased = pairs, shifts, unbiased
        used = sorted({p for pair in pairs for p in pair})
        keys = dict.fromkeys([*pairs, *((p, p) for p in used)])
        self.products = {(a, b): shifts[a].new_zeros(len(shifts[a]), len(shifts[b])) for a, b in keys}
        self.first = {p: torch.zeros_like(shifts[p]) for p in used}
        self.square = dict.fromkeys(used, 0.0)
        self.quartic = dict.fromkeys(keys, 0.0)
        self.cubic = {(a, b): torch.zeros_like(shifts[a]) for pair in keys for a, b in (pair, pair[::-1])}

    def add(self, rows: list[Tensor]) -> None:
        shifted = {p: rows[p] - self.shifts[p] for p in self.first}
        squares = {p: x.square().sum(1) for p, x in shifted.items()}
        for p, x in shifted.items():
            self.first[p] += x.sum(0)
            self.square[p] += float(squares[p].sum())
        for a, b in self.products:
            self.products[a, b].addmm_(shifted[a].T, shifted[b])
            if self.unbiased:
                self.quartic[a, b] += float(squares[a] @ squares[b])
        if self.unbiased:
            for a, b in self.cubic:
                self.cubic[a, b] += squares[b] @ shifted[a]

    def cka(self, n: int, estimator: str, noises: list[float]) -> list[float]:
        mean = {p: first / n for p, first in self.first.items()}
        sum_k = {p: max(self.square[p] - n * float(mean[p] @ mean[p]), 0.0) for p in mean}
        for p in mean:  # Σ‖x‖² before any shift tells what counts as rounding
            raw = self.square[p] + 2 * float(self.shifts[p] @ self.first[p]) + n * float(self.shifts[p].square().sum())
            if sum_k[p] <= noises[p] ** 2 * raw:
                sum_k[p] = 0.0

        def value(a: int, b: int) -> float:
            if not sum_k[a] or not sum_k[b]:
                return 0.0
            scale = math.sqrt(sum_k[a]) * math.sqrt(sum_k[b])
            covariance = (self.products[a, b] - n * torch.outer(mean[a], mean[b])) / scale
            sum_kl = self._sum_kl(a, b, mean[a], mean[b], n) if self.unbiased else 0.0
            # Every term is divided by scale²: with unit norms, Σk·Σl is 1.
            return hsic(float(covariance.square().sum()), 1.0, 1.0, sum_kl / scale**2, n, estimator)

        return [ratio(value(a, b), value(a, a), value(b, b), estimator) for a, b in self.pairs]

    def _sum_kl(self, a: int, b: int, m: Tensor, q: Tensor, n: int) -> float:
        """Σ ‖x−m‖²‖y−q‖² from the sums of shifted rows, m and q their means."""
        mm, qq = float(m @ m), float(q @ q)
        return (
            self.quartic[a, b]
            - 2 * float(m @ self.cubic[a, b])
            - 2 * float(q @ self.cubic[b, a])
            + 4 * float(m @ self.products[a, b] @ q)
            + qq * self.square[a]
            + mm * self.square[b]
            - 3 * n * mm * qq
        )


class _Signatures:
    """Norm and four random projections per row: enough to tell equal rows from different ones.

    If one row makes up more than half of a matrix, the median of every number of the signature is that
    row's. A projection to four Gaussian directions keeps a distance to within a small factor.
    """

    def __init__(self, width: int) -> None:
        generator = torch.Generator().manual_seed(width)
        self.directions = torch.randn(width, 4, generator=generator, dtype=torch.float64) / 2
        self.kept: list[Tensor] = []  # chunks (·, 5)
        self.count = 0
        self.seen = 0
        self.every = 1

    def add(self, rows: Tensor) -> None:
        signature = torch.cat([torch.linalg.vector_norm(rows, dim=1, keepdim=True), rows @ self.directions], 1)
        start = -self.seen % self.every
        self.seen += rows.shape[0]
        self.kept.append(signature[start :: self.every])
        self.count += self.kept[-1].shape[0]
        while self.count > SIGNATURES:
            halved = torch.cat(self.kept)[::2].clone()
            self.kept, self.count, self.every = [halved], halved.shape[0], 2 * self.every

    def has_majority(self) -> bool:
        kept = torch.cat(self.kept)
        middle = kept.median(0).values
        distance = torch.linalg.vector_norm((kept - middle)[:, 1:], dim=1)
        same = distance <= SAME_ROW * middle[0].abs()
        return 2 * int(same.sum()) > kept.shape[0]
