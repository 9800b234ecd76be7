"""What do the adaptive methods add to our own LoRA step? Controller included, over a whole schedule.

    python -m benchmarks.methods [--short]

Every method's step alternates with a LoRA step of the very ranks that the method has in it: what is left is what
deciding costs. From LoRA's start, the default, and from the papers' own, where the diagonals are at work in every step.
"""

from __future__ import annotations

import peft

import trimtab

from .common import MINILM, Row, Shape, Step, adapted, lora, main, ratio, timed, training_step

R = 12


def methods(total: int, start: str) -> dict[str, dict]:
    return {
        "SalientLoRA": {
            "rank": trimtab.SalientLoRA(
                start=start,
                target_r=8,
                warmup=total // 10,
                allocation=total // 2,
                initial_window=4,
                final_window=total // 4,
            )
        },
        "AdaLoRA": {"rank": trimtab.AdaLoRA(start=start, target_r=8)},
        "SoRA": {"rank": trimtab.SoRA(start=start, prox_threshold=1e-3)},
        "AFLoRA": {"freeze": trimtab.AFLoRA(start=start, warmup="auto", final=0.7, interval_steps=max(2, total // 10))},
    }


def rows(short: bool) -> list[Row]:
    total, schedules, out = 20 if short else 40, 2 if short else 3, []
    for start, words, target in (("lora", "LoRA's start", 1.02), ("svd", "the papers'", 1.05)):
        for name in methods(total, start):
            seconds = [one_schedule(name, total, start) for _ in range(schedules)]
            times = {who: [run[who] for run in seconds] for who in seconds[0]}
            note = f"{schedules} schedules of {total} steps"
            case = f"MiniLM, 1 block, {words}: {name} / our LoRA at the same rank"
            out.append(ratio(times, "own", "LoRA", target, case, note))
            if "PEFT" in times:
                case = f"MiniLM, 1 block, {words}: our AdaLoRA / PEFT AdaLoRA"
                out.append(ratio(times, "own", "PEFT", 0.85, case, f"r {R} to 8, {note}"))
    return out


def one_schedule(name: str, total: int, start: str) -> dict[str, float]:
    """Seconds of a whole schedule, its steps alternating with those of what it is compared with."""
    shape = MINILM.cut(1)
    step = training_step(adapted(shape, lora(True, R, **methods(total, start)[name])), shape, total)
    control = step.control  # type: ignore[attr-defined]
    rival = peft_adalora(shape, total) if name == "AdaLoRA" and start == "svd" else None
    spent = {"own": 0.0, "LoRA": 0.0, **({"PEFT": 0.0} if rival else {})}
    baseline, of = step, {}
    for _ in range(total):
        if of != (current := control.ranks() or of):  # a finished run has no ranks to change
            baseline, of = lora_of(current, shape), current
        spent["own"] += timed(step)
        spent["LoRA"] += timed(baseline)
        if rival:
            spent["PEFT"] += timed(rival)
    return spent


def lora_of(ranks: dict[str, int], shape: Shape) -> Step:
    """A step of our LoRA of these ranks, warm."""
    kept = {name: r for name, r in ranks.items() if r}
    config = trimtab.TrimConfig(r=R, lora_alpha=16, target_modules=list(kept), rank_pattern=kept)
    step = training_step(adapted(shape, config), shape)
    for _ in range(2):
        step()
    return step


def peft_adalora(shape, total: int):
    config = peft.AdaLoraConfig(
        init_r=R,
        target_r=8,
        lora_alpha=16,
        target_modules="all-linear",
        deltaT=1,
        tinit=total // 10,
        tfinal=total * 4 // 10,
        total_step=total,
        orth_reg_weight=0.1,
    )
    model = adapted(shape, config)
    done = 0
    inner = training_step_with(model, shape)

    def step() -> None:
        nonlocal done
        inner(done)
        done += 1

    return step


def training_step_with(model, shape):
    import torch

    from .common import batch

    data = batch(shape)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(number: int) -> None:
        model(**data).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(number)
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    main("methods", rows, __doc__)
