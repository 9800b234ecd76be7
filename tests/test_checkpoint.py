"""A complete checkpoint is told from a torn, damaged or foreign one, and the one before is offered."""

from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer

import short_runs as runs
import trimtab
from trimtab import AFLoRA, SalientLoRA
from trimtab.errors import CheckpointError
from trimtab.train.checkpoint import checkpoints, read_state, what_is_wrong, write_state
from trimtab.train.history import History

pytestmark = pytest.mark.fault

METHOD = "salientlora+aflora"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A run of 20 steps that saved at 10 (after one prune) and at 20."""
    folder = tmp_path_factory.mktemp("made")
    runs.train(runs.model_for("bert", METHOD), "bert", folder, max_steps=40, save_steps=20)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def resume(folder: Path, step: int = 20, method: str = METHOD, model_options: dict | None = None, **more):
    model = runs.model_for("bert", method, **(model_options or {}))
    return runs.train(model, "bert", folder, resume=str(folder / f"checkpoint-{step}"), save_steps=20, **more)


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


FILES = ("adapter_model.safetensors", "adapter_config.json", "optimizer.pt", "scheduler.pt", "rng_state.pth",
         "trim_state.safetensors", "trim_state.json", "trainer_state.json")  # fmt: skip


def test_a_checkpoint_holds_these_files_and_no_pickle_of_ours(made):
    names = {p.name for p in (made / "checkpoint-20").iterdir()}
    assert set(FILES) <= names
    assert {n for n in names if n.startswith("trim")} == {"trim_state.safetensors", "trim_state.json"}
    assert what_is_wrong(made / "checkpoint-20") is None


@pytest.mark.parametrize(
    ("name", "damage"),
    # Trainer writes trainer_state.json after ours, as the mark of a complete checkpoint: only a cut shows in it.
    [(n, d) for n in FILES for d in (halve, os.unlink, flip) if (n, d) != ("trainer_state.json", flip)],
)
def test_every_damage_is_seen_and_the_checkpoint_before_is_offered(folder, name, damage):
    newest = folder / "checkpoint-40"
    damage(newest / name)
    fault = what_is_wrong(newest)
    assert fault and name in fault
    assert trimtab.last_checkpoint(folder) == str(folder / "checkpoint-20")
    with pytest.raises(CheckpointError, match=r"The newest complete one is .*checkpoint-20"):
        read_state(newest)


def test_without_any_complete_checkpoint_none_is_offered(folder):
    for path in checkpoints(folder):
        (path / "trainer_state.json").unlink()
    assert trimtab.last_checkpoint(folder) is None
    with pytest.raises(CheckpointError, match="no complete checkpoint beside it"):
        read_state(folder / "checkpoint-20")
    assert trimtab.last_checkpoint(folder / "nowhere") is None


def test_the_last_checkpoint_is_the_one_of_the_highest_step(folder):
    shutil.copytree(folder / "checkpoint-20", folder / "checkpoint-9")
    (folder / "checkpoint-best").mkdir()
    assert [p.name for p in checkpoints(folder)] == ["checkpoint-40", "checkpoint-20", "checkpoint-9"]
    assert trimtab.last_checkpoint(folder) == str(folder / "checkpoint-40")


def test_a_state_of_another_format_is_refused(folder):
    tensors, facts = read_state(folder / "checkpoint-20")
    write_state(folder / "checkpoint-20", tensors, facts | {"format": 99})
    assert "format 99, this version reads 1" in what_is_wrong(folder / "checkpoint-20")


def test_a_method_s_facts_may_have_numbers_for_keys(folder):
    tensors, facts = read_state(folder / "checkpoint-20")
    write_state(folder / "checkpoint-20", tensors, facts | {"by_layer": {9: 0.5, 10: 0.1}})
    assert what_is_wrong(folder / "checkpoint-20") is None


def test_each_process_needs_its_own_random_state(folder):
    checkpoint = folder / "checkpoint-20"
    tensors, facts = read_state(checkpoint)
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_0.pth")
    write_state(checkpoint, tensors, facts | {"processes": 2})
    assert what_is_wrong(checkpoint) == "rng_state_1.pth is missing or damaged"
    shutil.copy(checkpoint / "rng_state.pth", checkpoint / "rng_state_1.pth")
    assert what_is_wrong(checkpoint) is None
    halve(checkpoint / "rng_state_1.pth")
    assert what_is_wrong(checkpoint) == "rng_state_1.pth is missing or damaged"


def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_state(tmp_path, {"a": torch.ones(2)}, {})
    assert list(tmp_path.iterdir()) == []


# -- checkpoints of another run ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_steps": 44}, "total_steps is 40, this run's is 44"),
        ({"per_device_train_batch_size": 4}, "steps_per_epoch is 8, this run's is 16"),
    ],
)
def test_another_horizon_is_refused_with_both_numbers(folder, options, words):
    if "state.train_batch_size is not None and args.auto" not in inspect.getsource(Trainer.train) and "epoch" in words:
        pytest.skip("older Trainers go on with the checkpoint's batch size, whatever is asked for")
    with pytest.raises(CheckpointError, match=words):
        resume(folder, **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": SalientLoRA(target_r=3, warmup=4, allocation=24, initial_window=4, final_window=8)}, "target_r=2"),
        ({"freeze": AFLoRA(warmup=5, final=12, interval_steps=4)}, "warmup=4"),
        ({"r": 5, "lora_alpha": 10}, r"\(rank, scale\) of .* is \(4, "),
        ({"lora_alpha": 4}, r"\(rank, scale\)"),
    ],
)
def test_other_settings_are_refused_by_name(folder, options, words):
    with pytest.raises(CheckpointError, match=words):
        resume(folder, model_options=options)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"rank": None}, "its rank is SalientLoRA"), ({"target_modules": ["query", "key"]}, "it adapts other modules")],
)
def test_where_trainer_itself_trips_over_another_plan_the_reason_is_said_before(folder, caplog, options, words):
    # Where the parameters differ in number it is torch that stops, while the optimizer is loaded.
    with pytest.raises((ValueError, CheckpointError), match=r"doesn't match the size|its rank is"):
        resume(folder, model_options=options)
    assert any("is of another run" in r.getMessage() and words in r.getMessage() for r in caplog.records)


def test_an_edited_plan_is_refused(folder):
    tensors, facts = read_state(folder / "checkpoint-20")
    write_state(folder / "checkpoint-20", tensors, facts | {"fingerprint": "0" * 16})
    with pytest.raises(CheckpointError, match="fingerprint is '0000000000000000', its plan gives"):
        resume(folder)


def test_a_checkpoint_of_another_step_is_refused(folder):
    model = runs.model_for("bert", METHOD)
    checkpoint = folder / "checkpoint-20"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    state["global_step"] = 15
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=r"checkpoint-20.*it is of step 20, Trainer resumes step 15"):
        runs.train(model, "bert", folder, resume=str(checkpoint), save_steps=20)


def test_a_checkpoint_from_elsewhere_is_resumed_when_it_is_named(made, tmp_path):
    moved = tmp_path / "backup"
    shutil.copytree(made / "checkpoint-20", moved)
    model = runs.model_for("bert", METHOD)
    trim = trimtab.TrimCallback(resume_from=moved, history=tmp_path / "history.jsonl")
    runs.train(model, "bert", tmp_path / "out", resume=str(moved), trim=trim, save_steps=20)
    expected = torch.load(made / "checkpoint-40" / "optimizer.pt")["state"]
    found = torch.load(tmp_path / "out" / "checkpoint-40" / "optimizer.pt")["state"]
    assert expected.keys() == found.keys()
    assert all(torch.equal(s["exp_avg"], found[k]["exp_avg"]) for k, s in expected.items())


# -- overwriting -------------------------------------------------------------------------------------------


def test_a_run_that_overwrites_later_checkpoints_leaves_complete_ones(folder):
    # Resumed from an older checkpoint, clipped harder: what lies ahead is replaced, file by file.
    before = (folder / "checkpoint-40" / "adapter_model.safetensors").read_bytes()
    resume(folder, max_grad_norm=1e-3)
    assert (folder / "checkpoint-40" / "adapter_model.safetensors").read_bytes() != before
    assert what_is_wrong(folder / "checkpoint-40") is None


def test_a_damaged_checkpoint_is_replaced_when_its_step_comes_again(folder):
    flip(folder / "checkpoint-40" / "trim_state.safetensors")
    resume(folder)
    assert trimtab.last_checkpoint(folder) == str(folder / "checkpoint-40")


def test_the_newest_torn_checkpoint_is_named_before_training(folder, caplog):
    (folder / "checkpoint-40" / "trainer_state.json").unlink()
    resume(folder)
    said = [r.getMessage() for r in caplog.records if r.name == "trimtab"]
    assert len([s for s in said if "checkpoint-40 cannot be resumed from (trainer_state.json is missing" in s]) == 1
    assert any("trimtab.last_checkpoint" in s and "checkpoint-20'" in s for s in said)


def test_a_finished_run_resumes_to_the_same_end(folder):
    model = runs.model_for("bert", METHOD)
    runs.train(model, "bert", folder, resume=trimtab.last_checkpoint(folder), save_steps=20)
    again = runs.model_for("bert", METHOD)
    runs.train(again, "bert", folder, resume=str(folder / "checkpoint-20"), save_steps=20)
    assert model.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))


def test_a_finished_run_that_is_resumed_in_mid_epoch_takes_no_step(tmp_path):
    settings = dict(save_steps=15, max_steps=30, eval_strategy="steps", eval_steps=15)
    runs.train(runs.model_for("bert", METHOD), "bert", tmp_path, **settings)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    again = runs.model_for("bert", METHOD)
    trim, _ = runs.train(again, "bert", tmp_path, resume=str(tmp_path / "checkpoint-30"), **settings)
    assert trim.controller.step == 30 and not (tmp_path / "checkpoint-31").exists()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    saved = load_file(tmp_path / "checkpoint-30" / "adapter_model.safetensors")
    held = peft.get_peft_model_state_dict(again)
    assert held.keys() == saved.keys() and all(torch.equal(held[key], saved[key]) for key in saved)


def test_a_damaged_history_is_one_line_with_the_cure(tmp_path):
    content = b'{"step": 1}\n{"st\xff\n{"step": 3}\n'
    (tmp_path / "history.jsonl").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"line 2 is damaged.*move the file away"):
        History(tmp_path / "history.jsonl").cut_file(2)
    assert (tmp_path / "history.jsonl").read_bytes() == content


def test_a_line_that_a_full_disk_cut_off_is_not_written_on(tmp_path):
    (tmp_path / "history.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "timing.jsonl").write_text('{"step": 1, "seconds": 1.0, "aside": 0}\n{"step": 2, "sec')
    history = History(tmp_path / "history.jsonl")
    assert history.cut_file(3) == [{"step": 1}, {"step": 2}]
    history.write_time(3)
    assert [json.loads(line)["step"] for line in (tmp_path / "timing.jsonl").read_text().splitlines()] == [1, 3]
