"""How much memory does a step hold at its peak, beside stock PEFT's and transformers'? Counted, not sampled.

python -m benchmarks.memory [--short]
"""

from __future__ import annotations

import contextlib

import peft
import torch

from trimtab.app.answer_head import AnswerHead

from .common import (
    BERT,
    MINILM,
    SMOLLM2,
    PeakBytes,
    Row,
    Shape,
    Step,
    adapted,
    base_model,
    batch,
    lora,
    main,
    paired,
    ratio,
    training_step,
    want_gradients_from_the_bottom,
)

# A decoder of few blocks and a long vocabulary; widths as in Gemma 3 270M.
GEMMA3 = Shape("Gemma 3's vocabulary 2 x 256", 640, 2, 4, 2048, 262144, 2, 256, kv_heads=1)


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


def head_step(shape: Shape, learned: float, on_answers: bool) -> Step:
    """Forward and backward; the last ``learned`` of each row's tokens have labels."""
    model, data = adapted(shape, lora(True, task_type="CAUSAL_LM")), batch(shape)
    data["labels"] = data["labels"].clone()
    data["labels"][:, : round(shape.length * (1 - learned))] = -100
    head = AnswerHead(model)
    assert head.serves(model, data)

    def step() -> None:
        with head.on() if on_answers else contextlib.nullcontext():
            model(**data).loss.backward()
        model.zero_grad()

    return step


def head_rows(rounds: int) -> list[Row]:
    """The command's loss (`trimtab.app.answer_head`) beside transformers'."""
    out = []
    for shape in (Shape(**{**vars(SMOLLM2), "layers": 2}), GEMMA3):
        for learned in (1.0, 0.5):
            steps = {how: head_step(shape, learned, how == "ours") for how in ("ours", "transformers'")}
            peaks = []
            for step in steps.values():
                with PeakBytes() as counter:
                    step()
                peaks.append(counter.peak)
            case = f"{shape.name}, 2 blocks, {learned:.0%} of the tokens learned: loss, ours / transformers'"
            note = " and ".join(f"{peak / 2**20:.0f}" for peak in peaks) + " MiB"
            out.append(Row(f"{case}, peak", peaks[0] / peaks[1], 1.0, None, note))
            out.append(ratio(paired(steps, rounds), *steps, case=f"{case}, time"))
    return out


def quantised(shape: Shape, bits: int) -> torch.nn.Module:
    """A bfloat16 model whose blocks' linears hold their weights in so many bits, by bitsandbytes."""
    import bitsandbytes as bnb

    base = base_model(shape, torch.bfloat16)
    for name, linear in list(base.base_model.named_modules()):
        if type(linear) is torch.nn.Linear:
            widths = linear.in_features, linear.out_features, False
            if bits == 4:
                few = bnb.nn.Linear4bit(*widths, compute_dtype=torch.bfloat16, quant_type="nf4")
            else:
                few = bnb.nn.Linear8bitLt(*widths, has_fp16_weights=False)
            few.load_state_dict({"weight": linear.weight.data})
            base.base_model.set_submodule(name, few.to("cpu"))
    setattr(base, f"is_loaded_in_{bits}bit", True)
    want_gradients_from_the_bottom(base)
    return base


def quantised_rows(rounds: int) -> list[Row]:
    """Plain LoRA on a base in few bits: the base's product is bitsandbytes' own, the adapter's part differs."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return []
    shape = Shape(**{**vars(SMOLLM2.cut(2)), "batch": 4, "length": 256})
    out = []
    for bits, autocast in ((4, False), (8, False), (4, True)):
        for p in (0.0, 0.1):
            steps, peaks = {}, {}
            for who in ("ours", "PEFT"):
                config = lora(who == "ours", dropout=p)
                config.target_modules = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
                base = quantised(shape, bits)
                if autocast:
                    base = peft.prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
                model = peft.get_peft_model(base, config).train()
                steps[who] = step = training_step(model, shape, autocast=autocast)
                step()
                with PeakBytes() as counter:
                    step()
                peaks[who] = counter.peak
            case = f"SmolLM2-135M 4 x 256, 2 blocks in {bits} bits{', dropout .1' if p else ''}"
            case += f"{', the rest in f32 under autocast' if autocast else ''}: ours / PEFT"
            note = " and ".join(f"{peak / 2**20:.0f}" for peak in peaks.values()) + " MiB"
            out.append(Row(f"{case}, peak", peaks["ours"] / peaks["PEFT"], 1.0, None, note))
            out.append(ratio(paired(steps, rounds), "ours", "PEFT", 1.0, f"{case}, time"))
    return out


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
                        Row(f"{case}: ours / PEFT", a / b, 0.95, None, f"{a / 2**20:.0f} and {b / 2**20:.0f} MiB")
                    )
    rounds = 3 if short else 9
    return out + quantised_rows(rounds) + head_rows(rounds)


if __name__ == "__main__":
    main("memory", rows, __doc__)
