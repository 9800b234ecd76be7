"""A training run in a process that can be killed, forked from a server that has everything imported already."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from random import Random
from typing import Any

Bomb = tuple[str, float]
"""``("time", seconds)`` after training began, or ``("write", n)``: inside the n-th write or removal of a file."""

SETTINGS = dict(save_steps=2, save_total_limit=1, logging_steps=5, eval_strategy="steps", eval_steps=10)


def live(folder: Path, method: str, bomb: Bomb | None = None, options: dict[str, Any] | None = None) -> bool:
    """Train in a process of its own, from the last complete checkpoint on; False if it was killed."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["short_runs"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "began").unlink(missing_ok=True)
    process = server.Process(target=_train, args=(folder, method, bomb, options or {}))
    process.start()
    if bomb and bomb[0] == "time":
        while process.is_alive() and not (folder / "began").exists():
            time.sleep(0.005)
        process.join(bomb[1])
        process.kill()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError((folder / "output.txt").read_text()[-6000:])
    return process.exitcode == 0


def _train(folder: Path, method: str, bomb: Bomb | None, options: dict[str, Any]) -> None:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        _train_here(folder, method, bomb, options)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def _train_here(folder: Path, method: str, bomb: Bomb | None, options: dict[str, Any]) -> None:
    import torch
    from transformers import TrainerCallback

    import short_runs as runs
    import trimtab

    class Began(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            (folder / "began").write_text(str(time.time()))
            if bomb and bomb[0] == "write":
                _arm(int(bomb[1]))

    torch.set_num_threads(1)
    model = runs.model_for("bert", method)
    resume = trimtab.last_checkpoint(folder)
    runs.train(model, "bert", folder, resume=resume, callbacks=(Began(),), **(SETTINGS | options))
    torch.save(model.state_dict(), folder / "final.pt")
    (folder / "seconds").write_text(str(time.time() - float((folder / "began").read_text())))


def _arm(fatal: int) -> None:
    """Kill this process in the middle of the ``fatal``-th write or removal, which leaves half of the file."""
    import peft.peft_model
    import torch
    from transformers import TrainerState

    count = 0

    def now() -> bool:
        nonlocal count
        count += 1
        return count == fatal

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def torn(write: Any, which: int) -> Any:
        def half(*args: Any, **kwargs: Any) -> Any:
            is_last = now()
            done = write(*args, **kwargs)
            if is_last:
                path = args[which]
                os.truncate(path, os.path.getsize(path) // 2)
                die()
            return done

        return half

    rmtree, replace = shutil.rmtree, os.replace

    def half_rmtree(path: Any, *args: Any, **kwargs: Any) -> None:
        if now():
            for file in sorted(Path(path).iterdir())[::2]:
                file.unlink()
            die()
        rmtree(path, *args, **kwargs)

    def no_replace(*args: Any, **kwargs: Any) -> None:
        if now():
            die()
        replace(*args, **kwargs)

    torch.save = torn(torch.save, 1)
    peft.peft_model.safe_save_file = torn(peft.peft_model.safe_save_file, 1)
    TrainerState.save_to_json = torn(TrainerState.save_to_json, 1)
    shutil.rmtree, os.replace = half_rmtree, no_replace


def bombs(seed: int, seconds: float) -> Any:
    """An endless row of random bombs for a run that takes ``seconds``, half of each kind."""
    random = Random(seed)
    while True:
        yield ("time", random.uniform(0, 0.3 * seconds))
        yield ("write", random.randint(1, 60))
