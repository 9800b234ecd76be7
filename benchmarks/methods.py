"""What do the adaptive methods add to our own LoRA step? Controller included, over a whole schedule.

    python -m benchmarks.methods [--short]

Every method's step alternates with a LoRA step at the mean rank that the method had over its schedule. From the
papers' start, where the diagonals are at work in every step.
"""

from __future__ import annotations

import peft

import trimtab

from .common import MINILM, Row, adapted, lora, main, ratio, timed, training_step

R = 12


def methods(total: int) -> dict[str, dict]:
    return {
        "SalientLoRA": {
            "rank": trimtab.SalientLoRA(
                start="svd",
                target_r=8,
                warmup=total // 10,
                allocation=total // 2,
                initial_window=4,
                final_window=total // 4,
            )
        },
        "AdaLoRA": {"rank": trimtab.AdaLoRA(start="svd", target_r=8)},
        "SoRA": {"rank": trimtab.SoRA(start="svd", prox_threshold=1e-3)},
        "AFLoRA": {"freeze": trimtab.AFLoRA(start="svd", warmup="auto", final=0.7, interval_steps=max(2, total // 10))},
    }


def rows(short: bool) -> list[Row]:
    total, schedules, out = 20 if short else 40, 3 if short else 5, []
    for name in methods(total):
        seconds = [one_schedule(name, total) for _ in range(schedules)]
        times = {who: [run[who] for run in seconds] for who in seconds[0]}
        note = f"{schedules} schedules of {total} steps"
        case = f"MiniLM, 1 block: {name} / our LoRA at the same rank"
        out.append(ratio(times, "own", "LoRA", 1.05, case, note))
        if "PEFT" in times:
            case = "MiniLM, 1 block: our AdaLoRA / PEFT AdaLoRA"
            out.append(ratio(times, "own", "PEFT", 0.85, case, f"r {R} to 8, {note}"))
    return out


def one_schedule(name: str, total: int) -> dict[str, float]:
    """Seconds of a whole schedule, its steps alternating with those of what it is compared with."""
    shape = MINILM.cut(1)
    step = training_step(adapted(shape, lora(True, R, **methods(total)[name])), shape, total)
    control = step.control  # type: ignore[attr-defined]
    baselines = {r: training_step(adapted(shape, lora(True, r)), shape) for r in (8, R)}
    for baseline in baselines.values():
        baseline()
    rival = peft_adalora(shape, total) if name == "AdaLoRA" else None
    spent = {"own": 0.0, "LoRA": 0.0, **({"PEFT": 0.0} if rival else {})}
    for _ in range(total):
        current = control.ranks()
        mean = sum(current.values()) / max(1, len(current))
        high = min(1.0, max(0.0, (mean - 8) / (R - 8)))
        spent["own"] += timed(step)
        seconds = {r: timed(baseline) for r, baseline in baselines.items()}
        spent["LoRA"] += high * seconds[R] + (1 - high) * seconds[8]
        if rival:
            spent["PEFT"] += timed(rival)
    return spent


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
