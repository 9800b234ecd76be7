"""What do the single products of a layer cost, one way and the other, on one thread and on two; and the calls?

    python -m benchmarks.products [--short]

The rows are microseconds (best of many) and, for two threads, speed-ups; there is no target. They explain the
rows of `benchmarks/steps.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab

from .common import MINILM, Row, Shape, Step, adapted, lora, main, paired, ratio, training_step
from .methods import methods, peft_adalora

R, LAYERS = 8, 50
SIBLINGS = ((2048, 384, 384, 384), (1024, 768, 768, 768), (256, 576, 192, 192))  # tokens, in, out of k and v
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
        torch.set_num_threads(1)
        for n, *widths in SIBLINGS[:1] if short else SIBLINGS:
            for r in (R, 2):
                out += siblings(n, widths, r, times)
    finally:
        torch.set_num_threads(before)
    return [*out, *calls(short), *launched()]


def siblings(n: int, widths: list[int], r: int, times: int) -> list[Row]:
    """q, k and v, which read the same input: h, ∂A and the thin part of ∂x one by one, and with A stacked."""
    n_in, make = widths[0], torch.Generator().manual_seed(0)
    x, grad_x = (torch.randn(n, n_in, generator=make) for _ in range(2))
    weights = [torch.randn(width, n_in, generator=make) for width in widths]
    grads = [torch.randn(n, width, generator=make) for width in widths]
    A = [torch.randn(r, n_in, generator=make) for _ in widths]
    gh = [torch.randn(r, n, generator=make) for _ in widths]
    apart = (
        lambda: [F.linear(a, x) for a in A],
        lambda: [g @ x for g in gh],
        lambda: [grad_x.addmm_(g.t(), a) for g, a in zip(gh, A)],
    )
    stacked = (
        lambda: F.linear(torch.cat(A), x),
        lambda: torch.cat(gh) @ x,
        lambda: grad_x.addmm_(torch.cat(gh).t(), torch.cat(A)),
    )
    base = best(lambda: [F.linear(x, w) for w in weights] + [g @ w for g, w in zip(grads, weights)], times)
    found = [sum(best(run, times) for run in runs) for runs in (apart, stacked)]
    case = f"{n} tokens, {n_in} to {', '.join(map(str, widths))}, r={r}"
    return [
        Row(f"{case}: thin products of x, one by one, microseconds", found[0]),
        Row(f"{case}: the same with A stacked, microseconds", found[1]),
        Row(f"{case}: saved, as a share of the base products", (found[0] - found[1]) / base),
    ]


class Kernels(TorchDispatchMode):
    """Counts operations that compute something; a view does not."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (func.is_view or func.overloadpacket.__name__ in ("promote_types", "detach", "_unsafe_view"))
        return func(*args, **(kwargs or {}))


def launched() -> list[Row]:
    """Operations of a step and of its controller, as counted after a fifth of a schedule, between two events."""
    shape, total = MINILM.cut(2), 1000
    tiny = Shape(**{**vars(shape), "batch": 1, "length": 8})

    def count(step: Step, warm: int) -> int:
        for _ in range(warm):
            step()
        with Kernels() as counter:
            step()
        return counter.count

    lora_step, theirs = (count(training_step(adapted(tiny, lora(ours, 12)), tiny), 2) for ours in (True, False))
    out = [Row("operations of a step, LoRA: ours / PEFT", lora_step / theirs, 1.0, None, f"{lora_step} and {theirs}")]
    rival = count(peft_adalora(tiny, total), 2)
    for start in ("lora", "svd"):
        for name, settings in methods(total, start).items():
            ours = count(training_step(adapted(tiny, lora(True, 12, **settings)), tiny, total), total // 5)
            case = f"operations of a step, {name}, start {start}: ours / our LoRA"
            out.append(Row(case, ours / lora_step, None, None, f"{ours} and {lora_step}"))
            if name == "AdaLoRA":
                case = f"operations of a step, {name}, start {start}: ours / PEFT"
                out.append(Row(case, ours / rival, 1.0, None, f"{ours} and {rival}"))
    return out


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
