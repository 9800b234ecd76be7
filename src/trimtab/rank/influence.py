"""Which singular values drive others: SalientLoRA's influence domain, in tiles and logs.

i → j is an edge where, over the window, the Pearson correlation ``ρ_ij ≥ β`` and the slope of j on i
``s_ij = ρ_ij σ_j / σ_i ≥ γ``. A value's influence is ``D_i = Σ_j s_ij D_j`` over its edges, and 1
without any. For γ > 1 every edge leads to a strictly larger σ (Cauchy-Schwarz), so the graph has no
cycle, the paper's de-cycling has nothing to do, and one pass in order of falling σ solves it.

With ``F_i = σ_i D_i`` the recursion is ``F_i = Σ_j ρ_ij F_j``, a matrix product with thresholded
correlations: no n × n matrix is kept, only one tile of it at a time. F grows with the number of paths,
beyond float64 for γ near 1, so only log F is stored, and a tile's F_j are grouped by magnitude.
"""

from __future__ import annotations

import bisect
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from ..errors import ConfigError, SelectionError

ROWS, COLUMNS = 512, 1024  # one tile of correlations is 4 MiB
_SPAN = 600.0  # e^600 · e^600 would not, e^600 · n does fit into float64


def influence(series: Tensor, beta: float, gamma: float) -> Tensor:
    """Share of each value in all influence; sums to 1.

    Concentrates on small, early values that many larger ones follow; nearly all others get close to 0.

    Args:
        series: (n, window) values over time, any float dtype; computed in float64.
        beta: correlation threshold, in (0, 1].
        gamma: slope threshold, above 1.
    Returns:
        (n,) float64.
    Raises:
        ConfigError: beta or gamma is out of range.
        SelectionError: series contains NaN or infinity, or has another shape.
    Source: SalientLoRA (NeurIPS 2024), influence domain.

    >>> t = torch.arange(5.0)
    >>> share = influence(torch.stack([t, 3 * t + 1, 7 * t - 2, -9 * t]), beta=0.9, gamma=2.0)
    >>> (share * 55).round().tolist()  # D = [14, 7/3, 1, 1]
    [42.0, 7.0, 3.0, 3.0]
    """
    log_domain, _ = log_influence(series, beta, gamma)
    return torch.softmax(log_domain, dim=0)


@torch.no_grad()
def log_influence(series: Tensor, beta: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Natural logarithm of D, (n,) float64, and which values have edges, (n,) bool. See `influence`."""
    check_thresholds(beta, gamma)
    if series.dim() != 2:
        raise SelectionError(f"series of shape {tuple(series.shape)}: one row per value is needed, shape (n, window)")
    n, window = series.shape
    log_domain = torch.zeros(n, dtype=torch.float64, device=series.device)
    has_edge = torch.zeros(n, dtype=torch.bool, device=series.device)
    with _mapping(series.device, n) as each:
        if not torch.isfinite(series).all():
            raise SelectionError("series holds NaN or infinity")
        if n == 0 or window < 2:
            return log_domain, has_edge
        # One sort by σ; the centred, unit-length rows z give ρ = z zᵀ without ever multiplying variances.
        z = series.to(torch.float64, memory_format=torch.contiguous_format, copy=True)
        largest = z.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        z.div_(largest)  # scales near the ends of float64 would leave it when squared
        z.sub_(z.mean(dim=1, keepdim=True))
        length = torch.linalg.vector_norm(z, dim=1)
        moves = length / math.sqrt(window) > 1e-12  # below that a value is pruned or frozen, and has no edge
        order = torch.argsort(length, descending=True)
        order = order[moves[order]]
        if len(order) == 0:
            return log_domain, has_edge
        length = length[order]
        z = z[order].div_(length[:, None])
        flow, linked = _solve(z, length, beta, gamma, each)
    log_domain[order] = torch.where(linked, flow - length.log(), 0.0)
    has_edge[order] = linked
    return log_domain, has_edge


def check_thresholds(beta: float, gamma: float) -> None:
    """Raises `ConfigError` unless 0 < beta ≤ 1 < gamma."""
    if not 0 < beta <= 1:
        raise ConfigError("rank.beta", beta, "a correlation threshold above 0 and at most 1")
    if not 1 < gamma < math.inf:
        raise ConfigError("rank.gamma", gamma, "a slope threshold above 1; at 1 equal values depend on each other")


@contextmanager
def _mapping(device: torch.device, n: int) -> Iterator[Callable[..., Iterable[Tensor]]]:
    """A `map` over tiles. On the CPU a tile is worked on by one thread, several tiles at a time.

    Tiles are small enough for the cache of one core. Sharing each between threads costs more than it
    gives, many times more when other work wants the cores, and makes results depend on their number.
    """
    with one_thread(device) as threads:
        if threads == 1 or n <= 4 * COLUMNS:
            yield map
        else:
            with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
                yield pool.map


@contextmanager
def one_thread(device: torch.device) -> Iterator[int]:
    """On the CPU, let torch use one thread meanwhile; gives the number there may be otherwise (1 elsewhere)."""
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield 1
        return
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


def _solve(
    z: Tensor, sigma: Tensor, beta: float, gamma: float, each: Callable[..., Iterable[Tensor]]
) -> tuple[Tensor, Tensor]:
    """log F of all rows and which have edges. Args: z (n, w) unit rows, sigma (n,) falling, each: a `map`."""
    n = len(sigma)
    flow = torch.empty_like(sigma)
    linked = torch.zeros_like(sigma, dtype=torch.bool)
    log_sigma = sigma.log()
    sizes = sigma.tolist()
    falling = [-s for s in sizes]  # rising, as bisect needs it
    just_below = math.nextafter(beta, 0.0)
    zt = z.T
    scratch = threading.local()

    def along(start: int, stop: int, left: int, right: int) -> Tensor:
        """log Σ_j ρ_ij F_j over the edges from rows start:stop to the solved rows left:right."""
        if not hasattr(scratch, "tile"):
            scratch.tile = z.new_empty(ROWS * COLUMNS)
        shape = stop - start, right - left
        rho = torch.mm(z[start:stop], zt[:, left:right], out=scratch.tile[: shape[0] * shape[1]].view(shape))
        if beta * sizes[right - 1] < gamma * sizes[start]:  # else ρ ≥ β is the stricter test
            rho.masked_fill_(rho * sigma[left:right] < gamma * sigma[start:stop, None], 0.0)
        torch.threshold_(rho, just_below, 0.0)  # keeps ρ ≥ β
        return _log_product(rho, flow[left:right])

    for start in range(0, n, ROWS):
        stop = min(start + ROWS, n)
        reach = bisect.bisect_right(falling, gamma * falling[stop - 1])  # σ_j ≥ γ σ of the last row
        solved = min(reach, start)
        tiles = [(start, stop, left, min(left + COLUMNS, solved)) for left in range(0, solved, COLUMNS)]
        total = flow.new_full((stop - start,), -math.inf)
        for part in each(along, *zip(*tiles)) if tiles else ():
            total = torch.logaddexp(total, part)
        if reach <= start:
            linked[start:stop] = total > -math.inf
            flow[start:stop] = torch.where(linked[start:stop], total, log_sigma[start:stop])
            continue
        # Edges inside the block: rows within a factor γ of each other cannot depend on each other.
        rho = z[start:stop] @ zt[:, start:stop]
        rho.masked_fill_(rho * sigma[start:stop] < gamma * sigma[start:stop, None], 0.0)
        torch.threshold_(rho, just_below, 0.0)
        first = start
        while first < stop:
            last = bisect.bisect_left(falling, falling[first] / gamma, first + 1, stop)
            here, before = slice(first, last), slice(first - start, last - start)
            part = total[before]
            if first > start:
                inner = _log_product(rho[before, : first - start], flow[start:first])
                part = torch.logaddexp(part, inner)
            linked[here] = part > -math.inf
            flow[here] = torch.where(linked[here], part, log_sigma[here])
            first = last
    return flow, linked


def _log_product(weights: Tensor, logs: Tensor) -> Tensor:
    """``log(weights @ exp(logs))`` whatever the range of the logs. Args: weights (m, k) ≥ 0, logs (k,)."""
    top = logs.max()
    if top - logs.min() < _SPAN:
        return (weights @ torch.exp(logs - top)).log_() + top
    group = ((top - logs) / _SPAN).floor().long()  # 0 holds the largest
    groups = int(group.max()) + 1
    scaled = torch.exp(logs - top + group * _SPAN)  # in (e^-600, 1]
    spread = weights.new_zeros(len(logs), groups).scatter_(1, group[:, None], scaled[:, None])
    sums = (weights @ spread).log_()  # (m, groups)
    return torch.logsumexp(sums - _SPAN * torch.arange(groups, device=logs.device), dim=1) + top
