"""A Python process of its own at the cost of a fork: torch, transformers and PEFT are imported in it already.

What a user does without Trimtab, or in a new process, is tested in one; a start that imports all of it takes seconds.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

_SERVER = """
import json, os, runpy, sys, traceback
import peft, torch, transformers
import transformers.models.auto.modeling_auto
torch.set_num_threads(1)
assert "trimtab" not in sys.modules
for line in sys.stdin:
    order = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in enumerate((os.devnull, "stdout", "stderr")):
            flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC
            os.dup2(os.open(os.path.join(order["folder"], name) if number else name, flags), number)
        sys.stdin = open(0, closefd=False)
        os.environ.clear()
        os.environ.update(order["environment"])
        os.chdir(order["cwd"])
        sys.path[:0] = [p for p in order["environment"].get("PYTHONPATH", "").split(os.pathsep) if p]
        kind, what, *sys.argv[1:] = order["words"]
        sys.argv[0] = what if kind == "file" else "-" + kind[0]
        code = 0
        try:
            if kind == "code":
                exec(compile(what, "<code>", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
            elif kind == "file":
                sys.path.insert(0, os.path.dirname(os.path.abspath(what)))
                runpy.run_path(what, run_name="__main__")
            else:
                runpy.run_module(what, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@cache
def _server() -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment, cwd="/",
    )  # fmt: skip
    atexit.register(server.kill)
    return server


def python(
    *words: object, environment: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([python, *words], text=True, capture_output=True)``: ``-c code``, ``-m module`` or a file."""
    first, *rest = map(str, words)
    kind = {"-c": "code", "-m": "module"}.get(first, "file")
    order = [kind, first, *rest] if kind == "file" else [kind, *rest]
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.TemporaryDirectory() as folder:
        given = dict(os.environ if environment is None else environment)
        print(
            json.dumps({"words": order, "environment": given, "folder": folder, "cwd": str(cwd or os.getcwd())}),
            file=server.stdin, flush=True,
        )  # fmt: skip
        code = int(server.stdout.readline())
        said = [(Path(folder) / name).read_text("utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess([sys.executable, *order], code, *said)


_PROCESSES = """
import faulthandler, os, runpy, signal, sys, traceback
faulthandler.enable()
count, sys.argv = int(sys.argv[1]), sys.argv[2:]
children = set()
for rank in range(count):
    if (child := os.fork()) == 0:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
        try:
            sys.path.insert(0, os.path.dirname(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    children.add(child)
failed = 0
while children:
    child, status = os.wait()
    children.remove(child)
    if status and not failed:
        failed = 1
        print(f"a process ended with {os.waitstatus_to_exitcode(status)}", file=sys.stderr, flush=True)
        for other in children:  # they wait for it
            os.kill(other, signal.SIGKILL)
sys.exit(failed)
"""


def processes(count: int, file: object, *words: object, environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    """As torchrun's processes on one machine, to the script that they run; without torchrun itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return python(
        "-c", _PROCESSES, count, file, *words, environment=environment | {k: str(v) for k, v in group.items()}
    )
