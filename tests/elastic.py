"""``trimtab`` as ``torchrun`` starts it, to which something happens: what `test_elastic.py` runs.

In the first start process 1 alone gets SIGTERM, in the second it is killed, the third is left alone.
"""

from __future__ import annotations

import os
import sys
from signal import SIGKILL, SIGTERM

from commands import AtCall, Send
from trimtab.app.cli import cli

STEP = "trimtab:TrimCallback.on_pre_optimizer_step"

if __name__ == "__main__":
    start = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    if os.environ["RANK"] == "1" and "--quiet" not in sys.argv and start < 2:
        AtCall(STEP, (5, 9)[start], Send((SIGTERM, SIGKILL)[start]))()
    cli([arg for arg in sys.argv[1:] if arg != "--quiet"])
