"""A long run with all axes on, killed again and again, beside one that is left alone: ``make soak``.

2 000 steps of a tiny model: layers by CKA, SalientLoRA, AFLoRA, a head of its own, a checkpoint every 50 steps. SIGKILL
at 50 random instants, from the start of the process on; each time the same command goes on with what lies in the
folder. Both runs must end alike to the bit, and the one that is left alone in flat memory.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import shutil
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

from commands import PRELOADED, _command
from test_run import paraphrases, write_recipe

STEPS, KILLS, SAVE = 2000, 50, 50
FLAT = 1.05  # of resident memory: the last quarter of the run over the second


def made(folder: Path) -> Path:
    """The recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    return write_recipe(
        folder,
        data={
            "train": paraphrases(folder / "train.jsonl", 512),
            "validation": paraphrases(folder / "validation.jsonl", 64),
        },
        adapter={"r": 6, "target_modules": ["query", "value", "dense"]},
        rank={"method": "salientlora", "target_r": 2, "initial_window": 10, "final_window": 40},
        freeze={"method": "aflora"},
        train={
            "max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-3, "use_cpu": True,
            "save_strategy": "steps", "save_steps": SAVE, "save_total_limit": 2, "logging_steps": 20,
            "eval_strategy": "steps", "eval_steps": 200,
        },
    )  # fmt: skip


class Life:
    """One process of a run, from what lies in the folder on."""

    def __init__(self, recipe: Path, folder: Path) -> None:
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(PRELOADED)
        self.folder, self.began = folder, time.monotonic()
        goes_on = any(folder.glob("checkpoints/checkpoint-*/trainer_state.json"))
        args = ["run", str(recipe), f"output_dir={folder}", "--resume" if goes_on else "--overwrite"]
        out = folder.parent / f"{folder.name}-out"
        out.mkdir(parents=True, exist_ok=True)
        self.output = out / "output.txt"
        self.process = server.Process(target=_command, args=(out, args, None))
        self.process.start()

    def _timing(self) -> list[str]:
        try:
            return (self.folder / "timing.jsonl").read_text().splitlines()
        except OSError:
            return []

    def rows(self) -> int:
        """Rows of the log so far, of earlier processes as well."""
        return len(self._timing())

    def step(self) -> int:
        """The newest that was logged."""
        try:
            return json.loads(self._timing()[-1])["step"]
        except (ValueError, IndexError):
            return 0

    def memory(self) -> float:
        """Resident, in MiB; 0 when the process is gone."""
        try:
            pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        except OSError:
            return 0.0
        return pages * resource.getpagesize() / 2**20

    def end(self) -> int:
        self.process.join()
        if self.process.exitcode not in (0, -9):
            raise SystemExit(f"ended with {self.process.exitcode}:\n{self.output.read_text()[-3000:]}")
        return self.process.exitcode


def left_alone(recipe: Path, folder: Path, memory: dict[int, list[float]]) -> None:
    """Args: memory: resident, in MiB, by step in steps of 100; filled in."""
    life = Life(recipe, folder)
    while life.process.is_alive():
        if (step := life.step()) and (mib := life.memory()):
            memory.setdefault(step // 100 * 100, []).append(mib)
        time.sleep(0.5)
    life.end()


def killed(recipe: Path, folder: Path) -> list[Path]:
    """Runs that were killed and taken up until they ended: one, or more where one came through before all kills."""
    random, kills, ends = Random(0), 0, []
    while kills < KILLS:
        place = folder / str(len(ends))
        life = Life(recipe, place)
        before, rows, first = life.rows(), random.randrange(6), 0.0
        while rows and life.process.is_alive() and life.rows() < before + rows:
            first = first or (time.monotonic() if life.rows() > before else 0.0)
            time.sleep(0.02)
        # A sixth dies while it loads and resumes, the others anywhere between two rows of the log.
        between = (time.monotonic() - first) / (rows - 1) if rows > 1 and first else 1.0
        life.process.join(random.uniform(0, between if rows else 8))
        life.process.kill()
        if life.end() == 0:
            ends.append(place)
            continue
        kills += 1
        print(
            f"kill {kills:2}: {time.monotonic() - life.began:6.2f} s after the start, at step {life.step()}", flush=True
        )
    Life(recipe, folder / str(len(ends))).end()
    return [*ends, folder / str(len(ends))]


_NAMES_THE_FOLDER = ("README.md", "trim_state.json", "trainer_state.json", "training_args.bin")


def differences(folder: Path, other: Path) -> list[str]:
    """Files of two runs that are not the same, to the byte; without what tells the time."""
    found = []
    names = [
        "history.jsonl",
        "where.json",
        "plan.json",
        "predictions.json",
        "adapter",
        f"checkpoints/checkpoint-{STEPS}",
    ]
    for name in names:
        paths = [folder / name] if (folder / name).is_file() else sorted((folder / name).iterdir())
        for path in paths:
            relative = path.relative_to(folder)
            if path.name not in _NAMES_THE_FOLDER and _text(path, folder) != _text(other / relative, other):
                found.append(str(relative))
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, other))
    found += [f"metrics.json: {key}" for key in ("metrics", "params") if ours[key] != theirs[key]]
    return found


def _text(path: Path, folder: Path) -> bytes:
    """A file's content, whatever the run's folder is called in it."""
    return path.read_bytes().replace(str(folder).encode(), b"")


def soak(folder: Path) -> int:
    recipe, memory = made(folder), {}
    beside = threading.Thread(target=left_alone, args=(recipe, folder / "alone", memory))
    beside.start()
    ends = killed(recipe, folder / "killed")
    beside.join()
    print(f"left alone, {STEPS} steps; resident memory by step:")
    for step, values in memory.items():
        print(f"  step {step:4}: {statistics.median(values):7.1f} MiB")
    second, last = ([v for s, vs in memory.items() if lo <= 4 * s / STEPS < lo + 1 for v in vs] for lo in (1, 3))
    growth = statistics.median(last) / statistics.median(second)
    print(f"memory of the last quarter over the second: {growth:.3f}")
    different = [name for end in ends for name in differences(end, folder / "alone")]
    events = [json.loads(line)["event"] for line in (folder / "alone" / "history.jsonl").read_text().splitlines()]
    print(f"decided: {events.count('rank')} cuts, {events.count('freeze')} freezes")
    print(f"kills survived: {KILLS} in {len(ends)} run(s); files that differ: {', '.join(different) or 'none'}")
    return int(bool(different) or growth > FLAT or not events.count("rank") or not events.count("freeze"))


if __name__ == "__main__":
    given: Any = sys.argv[1:2]
    place = Path(given[0]) if given else Path(tempfile.mkdtemp(prefix="trimtab-soak-"))
    code = soak(place)
    if not given and not code:
        shutil.rmtree(place)
    sys.exit(code)
