"""What a training has taken: seconds, and memory at its peak."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path

from .runfolder import RunFolder


def training_seconds(folder: RunFolder, measured: float = 0.0) -> float:
    """Wall seconds spent on training, those of the parts before a resume included.

    Each part counts from its own start in timing.jsonl; ``measured`` is the last part's, evaluation included.
    """
    parts: list[float] = []
    if folder.timing.is_file():
        for line in folder.timing.read_text(encoding="utf-8").splitlines():
            seconds = float(json.loads(line)["seconds"])
            if parts and seconds >= parts[-1]:
                parts[-1] = seconds
            else:
                parts.append(seconds)
    return sum(parts[:-1]) + max([measured, *parts[-1:]])


def reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the process's high-water mark, of an earlier run in it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the accelerator's peak since training began, else the largest this process has been."""
    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
