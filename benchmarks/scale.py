"""What deciding costs at the shapes of 70 billion parameters: seconds a step and an event, memory, without the base.

    python -m benchmarks.scale [--short]

The linears have the shapes of Llama-2-70B's and no storage: gradients are drawn, since what a controller does depends
on nothing else. The adapters, their gradients and AdamW's moments are real, in float32. The longest step of a run is
the one that scores, prunes and freezes; beside it stands the optimizer's own.
"""

from __future__ import annotations

import resource
import statistics
import time
from typing import Any

import peft
import torch
from torch import nn

import trimtab

from .common import Row, main

LAYERS, R, STEPS = 80, 8, 60
SHAPES = {
    "q_proj": (8192, 8192),
    "k_proj": (8192, 1024),
    "v_proj": (8192, 1024),
    "o_proj": (8192, 8192),
    "gate_proj": (8192, 28672),
    "up_proj": (8192, 28672),
    "down_proj": (28672, 8192),
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, (n_in, n_out) in SHAPES.items():
            linear = nn.Linear(n_in, n_out, bias=False, device="meta")
            linear.weight = nn.Parameter(torch.zeros(()).expand(n_out, n_in), requires_grad=False)
            self.add_module(name, linear)


class Decoder(nn.Module):
    """Layers in a list, as transformers has them."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(layers))


def methods() -> dict[str, dict[str, Any]]:
    return {
        "LoRA": {},
        "AdaLoRA 8→4": {"rank": trimtab.AdaLoRA(target_r=4)},
        "SalientLoRA 8→4": {"rank": trimtab.SalientLoRA(target_r=4)},
        "AFLoRA": {"freeze": trimtab.AFLoRA()},
        "SalientLoRA 8→4 × AFLoRA": {"rank": trimtab.SalientLoRA(target_r=4), "freeze": trimtab.AFLoRA()},
    }


def one(name: str, layers: int, steps: int) -> dict[str, Any]:
    """A whole schedule: seconds of the optimizer and of the controller, step by step."""
    torch.manual_seed(0)
    settings = methods()[name]
    config = trimtab.TrimConfig(r=R, lora_alpha=16, target_modules=list(SHAPES), **settings)
    model = peft.get_peft_model(Decoder(layers), config)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=True)
    control = trimtab.Controller(model, optimizer, total_steps=steps) if settings else None
    optimizing, deciding = [], []
    for _ in range(steps):
        for p in model.parameters():
            if p.requires_grad:
                p.grad = torch.empty_like(p).normal_(std=1e-4)
        began = time.perf_counter()
        if control:
            control.before_step()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        if control:
            control.after_step()
        optimizing.append(end - middle)
        deciding.append(middle - began + time.perf_counter() - end)
    return {
        "n": sum(p.numel() for p in params),
        "optimizing": optimizing,
        "deciding": deciding,
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def rows(short: bool) -> list[Row]:
    """Each method in a process of its own, so that peaks do not mix."""
    import multiprocessing

    layers, steps, out = (4, 20, []) if short else (LAYERS, STEPS, [])
    processes = multiprocessing.get_context("spawn")
    plain = None
    for name in methods():
        with processes.Pool(1) as pool:
            found = pool.apply(one, (name, layers, steps))
        case = f"{layers} layers of Llama-2-70B, r {R}: {name}"
        optimizer = statistics.median(found["optimizing"])
        out.append(Row(f"{case}, optimizer, seconds a step", optimizer, note=f"{found['n']:,} trained at the start"))
        if plain is None:
            plain = found
        else:
            ordered = sorted(found["deciding"])
            spread = (ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4])
            out.append(Row(f"{case}, controller, seconds a step", statistics.median(ordered), spread=spread))
            out.append(Row(f"{case}, controller, seconds of its longest step", ordered[-1], note=f"{steps} steps"))
        out.append(Row(f"{case}, peak GiB", found["peak"] / 2**30, note="without the base and what it computes"))
    return out


if __name__ == "__main__":
    main("scale", rows, __doc__)
