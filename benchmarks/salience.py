"""How long SalientLoRA's salience takes, and how much memory: time and peak per size, one process each.

    python -m benchmarks.salience            # 1 080 and 3 360 singular values
    python -m benchmarks.salience --full     # and 107 520, LLaMA-7B at initial rank 480

The series are trends with noise over six decades of scale, the hardest kind: nearly every pair of values
correlates above the threshold, so no tile can be left out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

WINDOW = 200
SHORT, FULL = (1_080, 3_360), (1_080, 3_360, 20_000, 107_520)
TARGETS = {3_360: {"seconds": 0.4}, 107_520: {"seconds": 180.0, "peak_gib": 3.0}}


def measure(n: int, repeats: int, threads: int) -> dict[str, Any]:
    """One size, in this process."""
    import torch

    from trimtab.rank.salientlora import salience

    torch.set_num_threads(threads)
    g = torch.Generator().manual_seed(0)
    series = torch.randn(n, WINDOW, generator=g, dtype=torch.float64).cumsum_(1).mul_(0.1 / WINDOW**0.5)
    series += torch.linspace(0, 1, WINDOW, dtype=torch.float64)
    series *= 10 ** torch.empty(n, 1, dtype=torch.float64).uniform_(-3, 3, generator=g)
    orth = torch.rand(WINDOW, generator=g) + 0.5
    seconds, cpu = [], []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        share = salience(series, orth, beta=0.9, gamma=2.0, magnitude_weight=0.7)
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - cpu_start)
    assert abs(share.sum().item() - 1) < 1e-9
    row: dict[str, Any] = {
        "values": n,
        "window": WINDOW,
        "threads": threads,
        "seconds": statistics.median(seconds),
        "spread": [min(seconds), max(seconds)],
        "cpu_seconds": statistics.median(cpu),  # of all threads; the floor of `seconds` is this over `threads`
        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,  # torch and the series included
    }
    for key, target in TARGETS.get(n, {}).items():
        row[f"target_{key}"] = target
        row[f"reached_{key}"] = row[key] <= target
    return row


def rows(full: bool = False, threads: int = 2) -> list[dict[str, Any]]:
    """All sizes, a fresh process each, so that peaks do not mix."""
    found = []
    for n in FULL if full else SHORT:
        command = [sys.executable, "-m", "benchmarks.salience", "--one", str(n), "--threads", str(threads)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also the largest size (minutes)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", type=int, metavar="N", help="only this size, in this process")
    options = parser.parse_args()
    if options.one:
        result: Any = measure(options.one, 1 if options.one > 10_000 else 7, options.threads)
    else:
        result = rows(options.full, options.threads)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
