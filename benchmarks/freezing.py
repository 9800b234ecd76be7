"""What does freezing save? Floor, before and after all projections froze; and AFLoRA beside VeRA.

python -m benchmarks.freezing [--short]
"""

from __future__ import annotations

import statistics

import peft

import trimtab
from trimtab.host.layers import PROJECTIONS, hosted_layers

from .common import MINILM, Products, Row, Step, adapted, floor, lora, main, paired, ratio, training_step


def aflora_step(shape, r: int, frozen: bool) -> Step:
    model = adapted(shape, lora(True, r, freeze=trimtab.AFLoRA(start="svd")))
    if frozen:
        for layer in hosted_layers(model).values():
            for which in PROJECTIONS:
                layer.freeze("default", which)
    return training_step(model, shape)


def counted(step: Step) -> int:
    with Products() as counter:
        step()
    return counter.flops


def rows(short: bool) -> list[Row]:
    blocks = 1 if short else 2
    shape, out = MINILM.cut(blocks), []
    for r in (4,) if short else (4, 8):
        steps = {
            "floor": floor(shape),
            "before": aflora_step(shape, r, frozen=False),
            "after": aflora_step(shape, r, frozen=True),
        }
        times = paired(steps, 11 if short else 31)
        name = f"MiniLM, {blocks} block(s), AFLoRA r={r}: "
        added = {k: statistics.median(a - b for a, b in zip(times[k], times["floor"])) for k in ("before", "after")}
        out.append(ratio(times, "before", "floor", None, f"{name}before / floor"))
        out.append(ratio(times, "after", "floor", None, f"{name}after / floor"))
        out.append(Row(f"{name}added time, after / before", added["after"] / added["before"], 0.90))
        flops = {k: counted(step) for k, step in steps.items()}
        extra = {k: flops[k] - flops["floor"] for k in ("before", "after")}
        note = (
            f"{extra['before'] / 1e6:.1f} and {extra['after'] / 1e6:.1f} MFLOP above {flops['floor'] / 1e9:.2f} GFLOP"
        )
        out.append(Row(f"{name}added FLOPs, after / before", extra["after"] / extra["before"], 0.90, None, note))
    vera = peft.VeraConfig(r=1024, target_modules="all-linear")
    steps = {
        "AFLoRA": aflora_step(shape, 4, frozen=False),
        "AFLoRA, frozen": aflora_step(shape, 4, frozen=True),
        "VeRA": training_step(adapted(shape, vera), shape),
    }
    times = paired(steps, 3 if short else 9)
    out.append(ratio(times, "AFLoRA", "VeRA", 0.54, f"MiniLM, {blocks} block(s): AFLoRA r=4 / PEFT VeRA r=1024"))
    out.append(
        ratio(
            times, "AFLoRA, frozen", "VeRA", 0.54, f"MiniLM, {blocks} block(s): AFLoRA r=4, frozen / PEFT VeRA r=1024"
        )
    )
    return out


if __name__ == "__main__":
    main("freezing", rows, __doc__)
