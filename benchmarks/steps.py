"""What does a training step cost, as a multiple of the frozen model's? LoRA, ours and stock PEFT's.

python -m benchmarks.steps [--short]
"""

from __future__ import annotations

from dataclasses import replace

import torch

from .common import (
    BERT,
    BF16,
    MINILM,
    SMOLLM2,
    Row,
    adapted,
    floor,
    lora,
    loralib_model,
    main,
    paired,
    ratio,
    training_step,
    whole_model,
)

# Of the frozen model's time on one thread and on more; of PEFT's.
TARGETS = {MINILM.name: (1.08, 1.12, 0.80), BERT.name: (1.05, 1.08, 0.90), SMOLLM2.name: (1.08, 1.12, 0.90)}


def rows(short: bool) -> list[Row]:
    return [*shapes(short), *ranks(short), *dtypes(short)]


def shapes(short: bool) -> list[Row]:
    out = []
    for whole in (MINILM, BERT, SMOLLM2):
        blocks = {MINILM: 2, BERT: 1, SMOLLM2: 4}[whole]
        shape = whole.cut(blocks) if short else whole
        variants = {"floor": floor(shape)}
        for ours, who in ((True, "ours"), (False, "PEFT")):
            for p, tail in ((0.0, ""), (0.1, ", dropout .1")):
                variants[who + tail] = training_step(adapted(shape, lora(ours, dropout=p)), shape)
        variants["full fine-tuning"] = training_step(whole_model(shape), shape)
        if (rival := loralib_model(shape)) is not None:
            variants["loralib"] = training_step(rival, shape)
        # Single ratios scatter by several per cent on a shared machine; their median does not, given enough of them.
        times = paired(variants, 15 if short else 21 if whole is not BERT else 11)
        name = f"{shape.name}{f', {blocks} block(s)' if short else ''}: "
        for over, under, target in (
            ("ours", "floor", TARGETS[whole.name][torch.get_num_threads() > 1]),
            ("PEFT", "floor", None),
            ("ours", "PEFT", TARGETS[whole.name][2]),
            ("ours, dropout .1", "ours", 1.25),
            ("PEFT, dropout .1", "PEFT", None),
            ("ours, dropout .1", "PEFT, dropout .1", 1.0),
            ("full fine-tuning", "floor", None),
            ("loralib", "floor", None),
        ):
            if over not in times:
                continue
            out.append(ratio(times, over, under, target, f"{name}{over} / {under}"))
    return out


def ranks(short: bool) -> list[Row]:
    """MiniLM's shape, one block."""
    shape, out = MINILM.cut(1), []
    for r in (2, 8, 64, 480):
        variants = {
            "floor": floor(shape),
            "ours": training_step(adapted(shape, lora(True, r)), shape),
            "PEFT": training_step(adapted(shape, lora(False, r)), shape),
        }
        times = paired(variants, 9 if short else 31)
        out.append(ratio(times, "ours", "floor", None, f"MiniLM, 1 block, r={r}: ours / floor"))
        out.append(ratio(times, "PEFT", "floor", None, f"MiniLM, 1 block, r={r}: PEFT / floor"))
        out.append(ratio(times, "ours", "PEFT", 1.0, f"MiniLM, 1 block, r={r}: ours / PEFT"))
    return out


def dtypes(short: bool) -> list[Row]:
    """A bf16 base with adapters of its own dtype and of f32; one block."""
    out = []
    for whole, target in ((MINILM, 1.20), (BERT, 1.12)):
        shape = replace(whole.cut(1), batch=max(2, whole.batch // 4)) if short else whole.cut(1)
        variants = {"floor": floor(shape, BF16)}
        for ours, who in ((True, "ours"), (False, "PEFT")):
            for f32, tail in ((True, ", f32 adapters"), (False, ", bf16 adapters")):
                variants[who + tail] = training_step(adapted(shape, lora(ours), BF16, f32), shape)
        times = paired(variants, 1 if short else 3)
        for tail in (", f32 adapters", ", bf16 adapters"):
            name = f"{whole.name}, 1 block, bf16 base: "
            out.append(ratio(times, "ours" + tail, "floor", target, f"{name}ours{tail} / bf16 floor"))
            out.append(ratio(times, "PEFT" + tail, "floor", None, f"{name}PEFT{tail} / bf16 floor"))
            out.append(ratio(times, "ours" + tail, "PEFT" + tail, 1.0, f"{name}ours{tail} / PEFT"))
    return out


if __name__ == "__main__":
    main("steps", rows, __doc__)
