"""What do the single products of a layer cost, one way and the other, on one thread and on two?

    python -m benchmarks.products [--short]

The rows are microseconds (best of many) and, for two threads, speed-ups; there is no target. They explain the
rows of `benchmarks/steps.py`.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from .common import Row, main

R = 8
SHAPES = ((2048, 384), (1024, 768), (256, 576))


def best(run: Callable[[], object], times: int) -> float:
    """Microseconds of wall time."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e6 * min(seconds)


def products(n: int, width: int) -> dict[str, Callable[[], object]]:
    """Of a layer width → width with n tokens: as the fused function writes them, then as (n, r)."""
    make = torch.Generator().manual_seed(0)
    x, g, y = (torch.randn(n, width, generator=make) for _ in range(3))
    weight, bias = torch.randn(width, width, generator=make), torch.randn(width, generator=make)
    A, B = torch.randn(R, width, generator=make), torch.randn(width, R, generator=make)
    h, gh = torch.randn(R, n, generator=make), torch.randn(R, n, generator=make)
    tall_h, tall_gh = h.t().contiguous(), gh.t().contiguous()
    return {
        "base product": lambda: F.linear(x, weight, bias),
        "h = A x": lambda: F.linear(A, x),
        "gradient of h": lambda: F.linear(B.t(), g),
        "G = h'g": lambda: h @ g,
        "gradient of A": lambda: gh @ x,
        "y += B h": lambda: y.addmm_(h.t(), B.t()),
        "W + B A": lambda: torch.addmm(weight, B, A),
        "as (n, r): h": lambda: x @ A.t(),
        "as (n, r): gradient of h": lambda: g @ B,
        "as (n, r): G": lambda: g.t() @ tall_h,
        "as (n, r): gradient of A": lambda: tall_gh.t() @ x,
    }


def rows(short: bool) -> list[Row]:
    times, before, out = 60 if short else 300, torch.get_num_threads(), []
    try:
        for n, width in SHAPES[:1] if short else SHAPES:
            for name, run in products(n, width).items():
                found = {}
                for threads in (1, 2):
                    torch.set_num_threads(threads)
                    found[threads] = best(run, times)
                case = f"{n} tokens, {width}: {name}"
                out.append(Row(f"{case}, microseconds", found[1]))
                out.append(Row(f"{case}, speed-up by a second thread", found[1] / found[2]))
    finally:
        torch.set_num_threads(before)
    return out


if __name__ == "__main__":
    main("products", rows, __doc__)
