"""Runs a generated program in a process of its own, which can reach neither files, nor network, nor processes.

Each program gets a fresh Python in an empty temporary folder, with no environment, with limits on CPU time,
memory, file size and wall time, and with the layers of `confine.py`. It passes when it runs to its end; an
early exit, an exception, a crash or a limit is a failure.

What this is for: programs that a language model wrote, whose mistakes must not harm the machine. It is not
made to hold an adversary: files that the user can read, the program can read too (but send nowhere).
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path

from ...errors import ConfigError

LAYERS = ("namespaces", "landlock", "seccomp")
_GIVES = {
    "no network": ("namespaces", "seccomp"),
    "no writing outside its folder": ("landlock",),
    "no other processes": ("seccomp",),
}
"""What isolation means -> the layers any one of which gives it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use."""

    cpu_seconds: int = 10
    """Twice what the slowest reference solution of HumanEval and MBPP needs (MBPP 123)."""
    wall_seconds: float = 60.0
    """Ends sleepers; far above `cpu_seconds`, so that a busy machine does not fail good programs."""
    memory_bytes: int = 1 << 30
    """Address space, that of Python itself included."""
    file_bytes: int = 1 << 20
    """Largest single file."""
    total_bytes: int = 16 << 20
    """All files together."""
    processes: int = 16
    """Threads; new processes are refused wherever the kernel filters system calls."""


@dataclass(frozen=True)
class Verdict:
    """How a program ended."""

    passed: bool
    reason: str = ""
    """Why not: what it raised, or the limit that it met."""


@dataclass(frozen=True)
class Isolation:
    """What this machine offers."""

    layers: tuple[str, ...]
    missing: dict[str, str] = field(default_factory=dict)
    """Layer -> why it is not there."""

    @property
    def lacks(self) -> tuple[str, ...]:
        """What cannot be guaranteed here; empty on a machine on which programs may run."""
        return tuple(what for what, layers in _GIVES.items() if not set(layers) & set(self.layers))


@cache
def isolation() -> Isolation:
    """Tries each layer in a process that does nothing else (a tenth of a second, once)."""
    if sys.platform != "linux":
        return Isolation((), dict.fromkeys(LAYERS, f"{sys.platform} has none of them"))
    _, outcome = _start("", Limits(), LAYERS, require=())
    if not outcome:
        return Isolation((), dict.fromkeys(LAYERS, "a bare Python process does not start here"))
    return Isolation(
        tuple(name for name in LAYERS if outcome[name] == ""), {name: why for name, why in outcome.items() if why}
    )


def require_isolation(force: bool = False) -> Isolation:
    """The machine's isolation.

    Raises:
        ConfigError: when it is not enough and `force` is not set.
    """
    found = isolation()
    if found.lacks and not force:
        why = "; ".join(f"{name}: {reason}" for name, reason in found.missing.items())
        raise ConfigError(
            "task.allow_code_execution",
            True,
            f"this machine cannot guarantee {', '.join(found.lacks)} ({why}); run it in a container or "
            "virtual machine that holds nothing of value, with task.force_code_execution=true",
        )
    return found


def run_program(
    program: str, limits: Limits | None = None, *, layers: Sequence[str] | None = None, force: bool = False
) -> Verdict:
    """Runs Python source to its end, or to a limit.

    Args:
        layers: those that must hold; all that the machine has, if not given.
        force: run even where the machine offers too little.
    Raises:
        ConfigError: on a machine without isolation, unless forced.

    >>> run_program("assert 1 + 1 == 2", force=True).passed
    True
    >>> run_program("assert 1 + 1 == 3", force=True).reason
    'AssertionError'
    """
    if layers is None:
        layers = require_isolation(force).layers
    verdict, outcome = _start(program, limits or Limits(), layers, layers)
    lost = [name for name in layers if outcome.get(name, "")]
    return Verdict(False, f"not run: {lost[0]}: {outcome[lost[0]]}") if lost else verdict


def run_programs(
    programs: Sequence[str], limits: Limits | None = None, *, force: bool = False, workers: int | None = None
) -> Iterator[Verdict]:
    """The programs' verdicts, in order, several programs at a time (by default one for each processor)."""
    require_isolation(force)
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        yield from pool.map(lambda program: run_program(program, limits, force=force), programs)


def _start(
    program: str, limits: Limits, layers: Iterable[str], require: Iterable[str]
) -> tuple[Verdict, dict[str, str]]:
    """The verdict, and what became of each layer (empty when the child said nothing)."""
    token = secrets.token_hex(8)  # tells the child's own answers from what a program might print
    job = {
        "program": program,
        "token": token,
        "limits": asdict(limits),
        "layers": list(layers),
        "require": list(require),
    }
    folder = tempfile.mkdtemp(prefix="trimtab-program-")
    try:
        process = subprocess.Popen(
            [sys.executable, "-s", "-B", "-X", "utf8", "-c", _confine_source()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            # Fixed hashing: a program that depends on the order of a set ends the same way every time.
            env={"PYTHONHASHSEED": "0"},
            start_new_session=True,
        )
        said, stopped = _watch(process, json.dumps(job).encode(), limits, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    answers = [
        json.loads(line.removeprefix(token))
        for line in said.decode(errors="replace").split("\n")
        if line.startswith(token)
    ]
    outcome: dict[str, str] = next((answer["layers"] for answer in answers if "layers" in answer), {})
    error = next((answer["error"] for answer in answers if "error" in answer), None)
    if stopped:
        return Verdict(False, stopped), outcome
    if error is None:
        return Verdict(False, _how_it_ended(process.returncode)), outcome
    return Verdict(error == "", error), outcome


def _watch(process: subprocess.Popen[bytes], job: bytes, limits: Limits, folder: str) -> tuple[bytes, str]:
    """What the child answered, and the limit that we stopped it at, if we did."""
    end = time.monotonic() + limits.wall_seconds
    stopped = ""
    send: bytes | None = job
    while True:
        try:
            said, _ = process.communicate(send, timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            send = None  # the job is on its way
            if not stopped and time.monotonic() > end:
                stopped = f"wall time over {limits.wall_seconds:g} s"
            if not stopped and _used(folder) > limits.total_bytes:
                stopped = f"files over {limits.total_bytes} bytes"
            if stopped:
                _kill_all(process)
    _kill_all(process)  # what a forced run without isolation left behind
    return said, stopped


def _used(folder: str, at_most: int = 1000) -> int:
    """Bytes in a folder's files, by at most so many of them; 4096 for each, so that empty ones count too."""
    total = 0
    with suppress(OSError):
        for number, path in enumerate(Path(folder).rglob("*")):
            total += max(4096, path.lstat().st_size)
            if number > at_most:
                return 1 << 62
    return total


def _kill_all(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _how_it_ended(code: int) -> str:
    if code == -signal.SIGXCPU:
        return "CPU time over the limit"
    if code < 0:
        with suppress(ValueError):
            return f"stopped by {signal.Signals(-code).name}"
    return f"left before its end, with exit code {code}"


@cache
def _confine_source() -> str:
    return Path(__file__).with_name("confine.py").read_text(encoding="utf-8")
