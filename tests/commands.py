"""A command of Trimtab in a process of its own, forked from a server that has everything imported already."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = [
    "transformers.models.bert.modeling_bert", "transformers.trainer", "datasets", "sklearn.metrics",
    "plotly.graph_objects", "trimtab.app.run", "trimtab.app.report.html", "trimtab.app.tables", "trimtab.app.tasks",
    "trimtab.train.callback", "trimtab.where.cka", "trimtab.exporting.formats",
]  # fmt: skip


def command(folder: Path, *args: Any, before: Callable[[], None] | None = None) -> tuple[int, str]:
    """Exit code (minus the signal's number for a process that one killed) and what was printed.

    Args:
        folder: where ``output.txt`` is written.
        before: called in the process, to make something happen to it.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    folder.mkdir(parents=True, exist_ok=True)
    process = server.Process(target=_command, args=(folder, [str(arg) for arg in args], before))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, (folder / "output.txt").read_text()


def _command(folder: Path, args: list[str], before: Callable[[], None] | None) -> None:
    import torch

    from trimtab.app.cli import cli

    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if before is not None:
        before()
    sys.argv = ["trimtab", *args]
    cli(args)


class AtCall:
    """At the n-th call of a function, say ``"transformers:Trainer.evaluate"``, does something before it is run."""

    def __init__(self, target: str, n: int, act: Callable[[], None]) -> None:
        self.target, self.n, self.act = target, n, act

    def __call__(self) -> None:
        module, _, path = self.target.partition(":")
        *owners, name = path.split(".")
        owner: Any = importlib.import_module(module)
        for part in owners:
            owner = getattr(owner, part)
        usual, count = getattr(owner, name), 0

        def counted(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == self.n:
                self.act()
            return usual(*args, **kwargs)

        setattr(owner, name, counted)


class Send:
    """Signals to this process, one after the other."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers

    def __call__(self) -> None:
        for number in self.numbers:
            os.kill(os.getpid(), number)
