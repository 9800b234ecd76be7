"""Faults of disk, memory and machine, each in a process of its own: one clear line, and the last good state is kept.

More of them stand where their parts are tested; all carry the mark ``fault``, and ``make test-faults`` prints a table.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from signal import SIGKILL

import pytest
import torch
from safetensors.torch import load_file

from commands import AtCall, Send, command
from test_run import write_recipe
from test_stopping import METHODS, STEP, assert_same_end
from trimtab.train.checkpoint import checkpoints, last_checkpoint, make_newest, what_is_wrong

pytestmark = pytest.mark.fault


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing happens to; its recipe lies beside it."""
    recipe = write_recipe(tmp_path_factory.mktemp("unbroken"), where=None, **METHODS)
    code, said = command(recipe.parent / "out", "run", recipe)
    assert code == 0, said
    return recipe.parent / "run"


def run(unbroken, place, *options, before=None, folder=None):
    """The same run in another place: exit code, and what was printed."""
    recipe = unbroken.parent / "recipe.yaml"
    return command(place / "out", "run", recipe, f"output_dir={folder or place / 'run'}", *options, before=before)


def goes_on(unbroken, place, folder=None):
    """The run is taken up again, and ends as the one that was left alone."""
    folder = folder or place / "run"
    option = "--resume" if last_checkpoint(folder / "checkpoints") else "--overwrite"
    code, said = run(unbroken, place, option, folder=folder)
    assert code == 0, said
    assert_same_end(folder, unbroken)
    assert not list(folder.glob(".*.half"))


def assert_one_line(said, *words):
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said.splitlines()[-1] == errors[0], said
    assert all(word in errors[0] for word in words), errors
    assert "Traceback" not in said


# -- the disk ---------------------------------------------------------------------------------------------


class FullAt:
    """The n-th file that is opened to be written, below a folder, finds the disk full."""

    def __init__(self, folder: Path, n: int) -> None:
        self.folder, self.n = str(folder), n

    def __call__(self) -> None:
        usual, count = builtins.open, 0

        def checked(file, mode="r", *args, **kwargs):
            nonlocal count
            if (
                isinstance(file, (str, os.PathLike))
                and os.fspath(file).startswith(self.folder)
                and set(mode) & set("wax")
            ):
                count += 1
                if count == self.n:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fspath(file))
            return usual(file, mode, *args, **kwargs)

        builtins.open = checked
        import io

        io.open = checked  # what pathlib calls


BREADTH = pytest.mark.slow


@pytest.mark.parametrize("n", [pytest.param(n, marks=[BREADTH] * (n != 11)) for n in (1, 2, 4, 7, 11, 16, 22, 30)])
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_run_goes_on(unbroken, tmp_path, n):
    code, said = run(unbroken, tmp_path, before=FullAt(tmp_path / "run", n))
    assert code == 2, said
    assert_one_line(said, "cannot be written", "No space left on device")
    goes_on(unbroken, tmp_path)


@BREADTH
@pytest.mark.parametrize("size", ["48k", "120k", "200k"])
def test_a_file_system_without_room_is_one_line_and_the_run_goes_on_when_there_is_some(unbroken, tmp_path, size):
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount a file system here")
    try:
        code, said = run(unbroken, tmp_path, folder=disk / "run")
        assert code == 2, said
        assert_one_line(said, "cannot be written")
        for checkpoint in checkpoints(disk / "run" / "checkpoints"):
            print(checkpoint.name, what_is_wrong(checkpoint))
        subprocess.run(["mount", "-o", "remount,size=50m", disk], check=True)
        goes_on(unbroken, tmp_path, folder=disk / "run")
    finally:
        subprocess.run(["umount", disk], check=True)


def without_root_s_rights() -> None:
    """root writes where nobody may; without two of its capabilities, modes hold for it as for everybody."""
    if os.getuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.capget(header, data) == 0
    for word in (0, 1):  # effective, permitted: CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
        data[word] &= ~0b110
    assert libc.capset(header, data) == 0


NO_RIGHTS = pytest.mark.skipif(sys.platform != "linux", reason="modes are Linux's")


@BREADTH
@NO_RIGHTS
@pytest.mark.parametrize("inside", ["", "run", "run/checkpoints"])
def test_a_folder_that_may_not_be_written_to_is_one_line(unbroken, tmp_path, inside):
    if inside:
        shutil.copytree(unbroken, tmp_path / "new" / "run")
        shutil.rmtree(tmp_path / "new" / "run" / "checkpoints" / "checkpoint-16")
    folder = tmp_path / "new" / inside
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    options = ["--resume"] if inside else []
    code, said = run(unbroken, tmp_path, *options, before=without_root_s_rights, folder=tmp_path / "new" / "run")
    folder.chmod(0o755)
    assert code == 2, said
    assert_one_line(said, "ermission denied", str(folder))
    if inside:
        goes_on(unbroken, tmp_path, folder=tmp_path / "new" / "run")


@BREADTH
@NO_RIGHTS
@pytest.mark.parametrize("name", [
    "recipe.yaml", "train.jsonl", "model/config.json", "model/model.safetensors",
    "run/checkpoints/checkpoint-8/optimizer.pt", "run/checkpoints/checkpoint-8/trainer_state.json",
])  # fmt: skip
def test_a_file_that_may_not_be_read_is_one_line(unbroken, tmp_path, name):
    shutil.copytree(unbroken.parent, tmp_path / "all")
    place = tmp_path / "all"
    text = (place / "recipe.yaml").read_text().replace(str(unbroken.parent), str(place))
    (place / "recipe.yaml").write_text(text)
    mine = place / "run" / "recipe.yaml"
    mine.write_text(mine.read_text().replace(str(unbroken.parent), str(place)))
    shutil.rmtree(place / "run" / "checkpoints" / "checkpoint-16")
    (place / name).chmod(0)
    option = "--resume" if "run/" in name else "--overwrite"
    code, said = command(tmp_path, "run", place / "recipe.yaml", option, before=without_root_s_rights)
    assert code == 2, said
    assert_one_line(said, Path(name).name)


# -- an export that is interrupted ------------------------------------------------------------------------


@BREADTH
@pytest.mark.parametrize("target, n, is_mixed", [
    ("trimtab.app.run:_name_base", 1, False),  # the files are written, beside the old ones
    ("os:replace", 1, True),  # the first of them is about to take its place
    ("os:replace", 2, True),
])  # fmt: skip
def test_a_killed_export_leaves_the_old_one_or_none_that_loads(unbroken, tmp_path, target, n, is_mixed):
    shutil.copytree(unbroken, tmp_path / "run")
    adapter = tmp_path / "run" / "adapter"
    before = {path.name: path.read_bytes() for path in adapter.iterdir()}
    code, said = command(tmp_path / "out", "export", tmp_path / "run", before=AtCall(target, n, Send(SIGKILL)))
    assert code == -SIGKILL, said
    if is_mixed:
        assert not (adapter / "adapter_config.json").exists()
        code, said = command(tmp_path / "out", "eval", tmp_path / "run")
        assert code == 2
        assert_one_line(said, "adapter: damaged", "delete it, and the newest checkpoint is taken")
        shutil.rmtree(adapter)
    else:
        assert {path.name: path.read_bytes() for path in adapter.iterdir()} == before
    code, said = command(tmp_path / "out", "export", tmp_path / "run")
    assert code == 0, said
    assert_same_end(tmp_path / "run", unbroken)
    assert not list((tmp_path / "run").glob(".*.half"))


@BREADTH
@pytest.mark.parametrize("best", [False, True])
def test_a_run_that_is_killed_after_its_last_step_takes_no_further_one(unbroken, tmp_path, best):
    """The Trainer takes one more step when it resumes from the last, if that is not the last of an epoch."""
    steps = ["train.max_steps=12", "train.save_strategy=steps", "train.save_steps=4", "train.eval_strategy=steps",
             "train.eval_steps=4", f"train.load_best_model_at_end={str(best).lower()}"]  # fmt: skip
    code, said = run(unbroken, tmp_path, *steps, folder=tmp_path / "alone")
    assert code == 0, said
    code, said = run(unbroken, tmp_path, *steps, before=AtCall("trimtab.app.run:_name_base", 1, Send(SIGKILL)))
    assert code == -SIGKILL, said
    code, said = run(unbroken, tmp_path, *steps, "--resume")
    assert code == 0, said
    assert_same_end(tmp_path / "run", tmp_path / "alone")
    assert (tmp_path / "run" / "history.jsonl").read_text() == (tmp_path / "alone" / "history.jsonl").read_text()


# -- the clock --------------------------------------------------------------------------------------------


@BREADTH
def an_hour_back() -> None:
    usual = time.time
    time.time = lambda: usual() - 3600


def test_a_clock_that_goes_back_costs_no_checkpoint(unbroken, tmp_path):
    """Trainer deletes the checkpoint of the earliest time: the newest, when that was written after the clock went."""
    code, said = run(unbroken, tmp_path, before=AtCall(STEP, 12, Send(SIGKILL)))
    assert code == -SIGKILL, said
    ahead = time.time() + 3600  # as if the clock had been ahead when these were written
    folder = tmp_path / "run"
    for path in (folder / "checkpoints").rglob("*"):
        os.utime(path, (ahead, ahead))
    code, said = run(unbroken, tmp_path, "--resume", before=an_hour_back)
    assert code == 0, said
    assert [path.name for path in checkpoints(folder / "checkpoints")] == ["checkpoint-16", "checkpoint-8"]
    assert_same_end(folder, unbroken)


@pytest.mark.parametrize("ages, order", [
    ({8: 5, 16: 3, 24: 0}, [8, 16, 24]),  # as it should be
    ({8: -90, 16: -99, 24: 0}, [8, 16, 24]),
    ({8: 9, 16: -99, 24: 0}, [8, 16, 24]),
    ({8: 9, 32: -5, 24: 0}, [32, 8, 24]),  # 32 is of a run that is trained again from an earlier checkpoint
])  # fmt: skip
def test_the_checkpoint_that_is_written_is_the_newest(tmp_path, ages, order):
    now = time.time()
    for step, age in ages.items():
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (now - age, now - age))
    make_newest(tmp_path / "checkpoint-24")
    by_time = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    assert [int(path.name.removeprefix("checkpoint-")) for path in by_time] == order


# -- processes and memory ---------------------------------------------------------------------------------


def kill_a_worker() -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    named = [int(pid) for pid in children if "resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(named[-1], SIGKILL)


@BREADTH
@pytest.mark.skipif(sys.platform != "linux", reason="children are found by /proc")
def test_a_killed_worker_of_the_data_loader_ends_the_run_and_it_goes_on(unbroken, tmp_path):
    workers = "train.dataloader_num_workers=1"
    code, said = run(unbroken, tmp_path, workers, before=AtCall(STEP, 10, kill_a_worker))
    assert code == 1, said
    assert_one_line(said, "DataLoader worker", "exited unexpectedly")
    assert "checkpoint-8 is whole" in said and "--resume` goes on from it" in said
    code, said = run(unbroken, tmp_path, workers, "--resume")
    assert code == 0, said
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "run", unbroken))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def no_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


LOSS = "transformers:Trainer.compute_loss"


@BREADTH
@pytest.mark.parametrize("n", [1, 3])
def test_memory_that_runs_out_is_one_line_with_what_to_do(unbroken, tmp_path, n):
    code, said = run(unbroken, tmp_path, before=AtCall(LOSS, n, no_memory))
    assert code == 1
    assert_one_line(said, "out of memory", "halve train.per_device_train_batch_size")


@BREADTH
def test_a_first_batch_that_does_not_fit_is_made_smaller_and_training_begins_anew(unbroken, tmp_path):
    still = "model.config={hidden_dropout_prob: 0, attention_probs_dropout_prob: 0}"  # the first try drew numbers
    code, said = run(unbroken, tmp_path, still, "train.auto_find_batch_size=true", before=AtCall(LOSS, 1, no_memory))
    assert code == 0, said
    smaller = "train.per_device_train_batch_size=7"  # accelerate takes a tenth off
    code, said = run(unbroken, tmp_path, still, smaller, folder=tmp_path / "smaller")
    assert code == 0, said
    assert_same_end(tmp_path / "run", tmp_path / "smaller")


def test_a_later_batch_that_does_not_fit_is_refused_and_nothing_is_trained_twice(unbroken, tmp_path):
    code, said = run(unbroken, tmp_path, "train.auto_find_batch_size=true", before=AtCall(LOSS, 5, no_memory))
    assert code == 2
    assert_one_line(said, "training begins again", "per_device_train_batch_size that fits")
    assert not (tmp_path / "run" / "adapter").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
