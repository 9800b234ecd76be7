"""How long does importing take, beside `import peft`?

python -m benchmarks.startup [--short]
"""

from __future__ import annotations

import resource
import subprocess
import sys

from .common import Row, main, ratio

IMPORTS = {
    "import trimtab": "import trimtab",
    "every public name": "import trimtab; [getattr(trimtab, n) for n in trimtab.__all__]",
    "import peft": "import peft",
}


def seconds(code: str) -> float:
    """CPU seconds of a fresh interpreter."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def rows(short: bool) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for turn in range(4 if short else 8):
        for name, code in IMPORTS.items():
            taken = seconds(code)
            if turn:  # the first round fills the file cache
                times[name].append(taken)
    return [
        ratio(times, "import trimtab", "import peft", 1.05),
        ratio(times, "every public name", "import peft", None),
    ]


if __name__ == "__main__":
    main("startup", rows, __doc__)
