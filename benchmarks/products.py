"""What do the single products of a layer cost, one way and the other, on one thread and on two; and the calls?

    python -m benchmarks.products [--short]

The rows are microseconds (best of many) and, for two threads, speed-ups; there is no target. They explain the
rows of `benchmarks/steps.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import peft
import torch
import torch.nn.functional as F

import trimtab

from .common import Row, Step, main, paired, ratio

R, LAYERS = 8, 50
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
    return [*out, *calls(short)]


def calls(short: bool) -> list[Row]:
    """Forward and backward pass of 50 layers so small that the calls are all they cost."""

    def step(kind: type[peft.LoraConfig] | None) -> Step:
        layers = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(LAYERS))).requires_grad_(False)
        names = [str(i) for i in range(LAYERS)]
        model = layers if kind is None else peft.get_peft_model(layers, kind(r=R, target_modules=names))
        x = torch.randn(4, 64, requires_grad=True)
        return lambda: model(x).sum().backward()

    steps = {"no adapter": step(None), "ours": step(trimtab.TrimConfig), "PEFT": step(peft.LoraConfig)}
    times = paired(steps, 60 if short else 300, warm=20)
    microseconds = {who: 1e6 * statistics.median(taken) / LAYERS for who, taken in times.items()}
    out = [Row(f"calls of a layer, {who}, microseconds", taken) for who, taken in microseconds.items()]
    return [*out, ratio(times, "ours", "PEFT", None, "calls of a layer: ours / PEFT")]


if __name__ == "__main__":
    main("products", rows, __doc__)
