"""What a run was made with: when it began, by which command, on which versions and which machine -> run.json.

Apart from the other files of a run, which are the same for the same recipe on any day.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("trimtab", "torch", "transformers", "peft", "accelerate")
SECRETS = "token|password|secret|api_key"
"""How keys end that hold one."""
_SECRET = re.compile(rf"((?:^|[\w.])*(?:{SECRETS})=)\S+", re.IGNORECASE)


def facts() -> dict[str, Any]:
    """Of this moment and this process."""
    return {
        "began": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(),
        "versions": {"python": platform.python_version(), **{name: v for name in PACKAGES if (v := _version(name))}},
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "cores": os.cpu_count(),
            "device": _device(),
        },
        **({"job": job()} if job() else {}),
    }


def job() -> str | None:
    """torchrun's name of what it started, the same after a restart; None without torchrun."""
    return os.environ.get("TORCHELASTIC_RUN_ID")


def processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def command() -> str:
    """The command line as it can be typed again; secrets in it are left out.

    >>> hidden("trimtab run r.yaml train.hub_token=hf_abc")
    'trimtab run r.yaml train.hub_token=…'
    """
    name = Path(sys.argv[0]).name
    ours = name in ("trimtab", "trimtab.exe") or Path(sys.argv[0]).parts[-2:] == ("trimtab", "__main__.py")
    return hidden(shlex.join(["trimtab" if ours else name, *sys.argv[1:]]))


def hidden(text: str) -> str:
    """The text without the values of keys that hold a secret."""
    return _SECRET.sub(r"\1…", text)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _device() -> str:
    """The accelerator's name; ``cpu`` where there is none."""
    torch = sys.modules.get("torch")  # a run has imported it by now; nothing else here needs it
    if torch is None or not torch.cuda.is_available():
        return "mps" if torch is not None and torch.backends.mps.is_available() else "cpu"
    return str(torch.cuda.get_device_name(0))
