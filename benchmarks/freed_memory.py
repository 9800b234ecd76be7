"""What does it gain, and what does it hold, to keep freed memory? A process each, the two taking turns.

    python -m benchmarks.freed_memory [--short]

LoRA steps of the whole models, with batches of one length and of lengths that differ from step to step, since
blocks of many sizes are what a kept heap might not reuse. Ratios are kept over given back; no target.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from functools import partial

import torch

from trimtab.app.malloc import keep_freed_memory

from .common import BERT, MINILM, SMOLLM2, Row, adapted, batch, lora, main, timed

SHAPES = {shape.name.split()[0]: shape for shape in (MINILM, BERT, SMOLLM2)}


def measure(name: str, steps: int, keep: bool, varied: bool) -> dict[str, float]:
    """Median CPU seconds of a step on one thread, and the process's peak in MiB."""
    torch.set_num_threads(1)
    if keep and not keep_freed_memory():
        raise SystemExit("freed memory cannot be kept here: not glibc, or the environment sets its allocator")
    shape = SHAPES[name]
    model = adapted(shape, lora(True))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step(data: dict[str, torch.Tensor]) -> None:
        model(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = []
    for i in range(steps + 1):
        length = shape.length // 4 + (i * 37) % (shape.length * 3 // 4) + 1 if varied else shape.length
        seconds.append(timed(partial(step, batch(replace(shape, length=length)))))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(seconds[1:]), "peak": peak}


def rows(short: bool) -> list[Row]:
    out, rounds = [], 1 if short else 2
    for name in ("MiniLM",) if short else SHAPES:
        for varied in (False, True):
            found: dict[bool, list[dict[str, float]]] = {True: [], False: []}
            for _ in range(rounds):
                for keep in (False, True):
                    given = json.dumps([name, 5 if short else 7, keep, varied])
                    command = [sys.executable, "-m", "benchmarks.freed_memory", "--one", given]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                    found[keep].append(json.loads(done.stdout))
            middle = {
                keep: {key: statistics.median(one[key] for one in found[keep]) for key in ("seconds", "peak")}
                for keep in found
            }
            case = f"{name}, {'lengths that differ' if varied else 'one length'}: "
            for key, unit in (("seconds", "s"), ("peak", "MiB")):
                kept, given_back = middle[True][key], middle[False][key]
                note = (
                    f"{kept:.3g} and {given_back:.3g} {unit}"
                    if unit == "s"
                    else f"{kept:.0f} and {given_back:.0f} {unit}"
                )
                out.append(Row(f"{case}{key}, kept / given back", kept / given_back, None, None, note))
    return out


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1] == "--one":
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main("freed_memory", rows, __doc__)
