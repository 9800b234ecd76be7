"""How much memory does a step hold at its peak, beside stock PEFT's? Counted, not sampled.

python -m benchmarks.memory [--short]
"""

from __future__ import annotations

import torch

from .common import BERT, MINILM, SMOLLM2, PeakBytes, Row, adapted, lora, main, training_step


def peak(shape, ours: bool, p: float, checkpointing: bool, dtype: torch.dtype) -> int:
    model = adapted(shape, lora(ours, dropout=p), dtype)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    step = training_step(model, shape)
    step()  # the optimizer's state is there from the second step on
    with PeakBytes() as counter:
        step()
    return counter.peak


def rows(short: bool) -> list[Row]:
    out = []
    for whole in (MINILM, SMOLLM2) if short else (MINILM, BERT, SMOLLM2):
        shape = whole.cut(2)
        for p in (0.0, 0.1):
            for checkpointing in (False, True):
                for dtype in (torch.float32, torch.bfloat16) if whole is MINILM and not p else (torch.float32,):
                    a, b = (peak(shape, ours, p, checkpointing, dtype) for ours in (True, False))
                    case = f"{whole.name}, 2 blocks{', dropout .1' if p else ''}"
                    case += f"{', checkpointing' if checkpointing else ''}{', bf16' if dtype != torch.float32 else ''}"
                    out.append(
                        Row(f"{case}: ours / PEFT", a / b, 1.0, None, f"{a / 2**20:.0f} and {b / 2**20:.0f} MiB")
                    )
    return out


if __name__ == "__main__":
    main("memory", rows, __doc__)
