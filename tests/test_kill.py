"""A run that is killed again and again ends as the run that was left alone."""

from __future__ import annotations

import shutil
import time

import pytest
import torch

import lives
import short_runs as runs
from marks import slow


def same_end(folder, unbroken) -> bool:
    ours, theirs = (torch.load(f / "final.pt") for f in (folder, unbroken))
    return (
        ours.keys() == theirs.keys()
        and all(torch.equal(a, b) for a, b in zip(ours.values(), theirs.values()))
        and (folder / "history.jsonl").read_text() == (unbroken / "history.jsonl").read_text()
    )


def kill_and_resume(tmp_path, method: str, bombs, kills: int, **options) -> None:
    unbroken, folder = tmp_path / "unbroken", tmp_path / "killed"
    assert lives.live(unbroken, method, options=options)
    assert (unbroken / "history.jsonl").read_text().count('"event": "') > 20
    done, missed = 0, None
    bombs = bombs(float((unbroken / "seconds").read_text()))
    while done < kills:
        bomb = missed or next(bombs)
        if not lives.live(folder, method, bomb, options):
            done, missed = done + 1, None
        else:  # what was left of the run was too short for this bomb: look at the end, and once more from the start
            assert same_end(folder, unbroken)
            shutil.rmtree(folder)
            missed = None if missed else bomb
    assert lives.live(folder, method, options=options)
    assert same_end(folder, unbroken)
    assert len(list(folder.glob("checkpoint-*"))) == 1


@pytest.mark.fault
@pytest.mark.parametrize("kills", [1, slow(3)])
def test_kills_leave_no_trace(tmp_path, kills):
    def bombs(seconds):
        yield ("write", 31)  # inside a checkpoint
        yield ("time", 0.4 * seconds)
        yield ("write", 3)
        while True:
            yield ("write", 1)

    kill_and_resume(tmp_path, "salientlora+aflora", bombs, kills)


@pytest.mark.slow
@pytest.mark.parametrize("method", runs.METHODS)
def test_many_kills_leave_no_trace(tmp_path, method):
    seed, kills = list(runs.METHODS).index(method), 20 if method in runs.FEW else 5
    kill_and_resume(tmp_path, method, lambda seconds: lives.bombs(seed, seconds), kills)


@pytest.mark.slow
def test_a_kill_at_every_write_of_a_checkpoint_leaves_no_trace(tmp_path):
    def bombs(seconds):
        for write in range(1, 28):  # three checkpoints: files, states, marks, and the removal of the one before
            yield ("write", write)

    kill_and_resume(tmp_path, "salientlora+aflora", bombs, kills=27, save_steps=4)


@pytest.mark.fault
def test_a_killed_run_that_never_saved_starts_afresh(tmp_path):
    began = time.time()
    assert not lives.live(tmp_path / "killed", "sora", ("write", 1))
    assert not list((tmp_path / "killed").glob("checkpoint-*/trainer_state.json"))
    assert lives.live(tmp_path / "killed", "sora", options={"max_steps": 12})
    assert float((tmp_path / "killed" / "began").read_text()) > began
