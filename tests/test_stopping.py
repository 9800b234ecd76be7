"""SIGTERM and Ctrl-C: a run saves and says how to go on, and goes on as if nothing had been."""

import json
import os
import shutil
from signal import SIGINT, SIGTERM

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from commands import AtCall, Send, command
from test_run import write_recipe
from trimtab.app import session
from trimtab.app.cli import cli
from trimtab.train.checkpoint import checkpoints, what_is_wrong

pytestmark = pytest.mark.fault
METHODS = {
    "rank": {"method": "salientlora", "target_r": 2, "warmup": 2, "allocation": 10},
    "freeze": {"method": "aflora", "warmup": 2, "final": 8, "interval_steps": 2},
}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing happens to, and its recipe; 8 steps an epoch."""
    recipe = write_recipe(
        tmp_path_factory.mktemp("unbroken"), adapter={"r": 4, "target_modules": ["query", "value", "dense"]}, **METHODS
    )
    code, said = command(recipe.parent / "out", "run", recipe)
    assert code == 0, said
    return recipe.parent / "run"


def stopped(unbroken, folder, at, *signals, options=()):
    recipe, before = unbroken.parent / "recipe.yaml", AtCall(*at, Send(*signals))
    return command(folder / "out", "run", recipe, f"output_dir={folder}/run", *options, before=before)


def resumed(folder):
    code, said = command(folder / "out", "run", folder / "run", "--resume")
    assert code == 0, said


def decided(folder):
    rows = map(json.loads, (folder / "history.jsonl").read_text().splitlines())
    return [row for row in rows if row["event"] != "log"]


def assert_same_end(folder, unbroken):
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (folder, unbroken))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert decided(folder) == decided(unbroken)
    ours, theirs = (json.loads((f / "metrics.json").read_text()) for f in (folder, unbroken))
    assert ours["metrics"] == theirs["metrics"] and ours["params"] == theirs["params"]


STEP = "trimtab:TrimCallback.on_pre_optimizer_step"
BREADTH = pytest.mark.slow
IN_TRAINING = [
    (STEP, 5, 5, SIGTERM),
    pytest.param(STEP, 8, 8, SIGINT, marks=BREADTH),  # the last step of an epoch: its evaluation comes first
    pytest.param("transformers:Trainer.evaluate", 1, 8, SIGTERM, marks=BREADTH),
    pytest.param("transformers:Trainer._save_checkpoint", 1, 8, SIGINT, marks=BREADTH),
    pytest.param("trimtab.train.callback:write_state", 1, 8, SIGTERM, marks=BREADTH),
]


@BREADTH
@pytest.mark.parametrize("target, n, step, signal", IN_TRAINING)
def test_a_signal_in_training_saves_and_the_run_goes_on_exactly(unbroken, tmp_path, target, n, step, signal):
    code, said = stopped(unbroken, tmp_path, (target, n), signal)
    assert code == 128 + signal, said
    newest = checkpoints(tmp_path / "run" / "checkpoints")[0]
    assert newest.name == f"checkpoint-{step}" and what_is_wrong(newest) is None
    assert "saving a checkpoint after this step; a second signal leaves at once" in said
    last = said.splitlines()[-1]
    assert last == (
        f"error: stopped by {signal.name}: checkpoint-{step} is whole, and "
        f"`trimtab run {tmp_path}/run --resume` goes on from it"
    )
    resumed(tmp_path)
    assert_same_end(tmp_path / "run", unbroken)


def test_a_signal_in_the_last_step_takes_training_to_its_end(unbroken, tmp_path):
    code, said = stopped(unbroken, tmp_path, (STEP, 16), SIGTERM)
    assert code == 143 and "checkpoint-16 is whole" in said.splitlines()[-1]
    resumed(tmp_path)
    assert_same_end(tmp_path / "run", unbroken)


@BREADTH
@pytest.mark.parametrize(
    "target", ["trimtab.app.run:_name_base", "trimtab.app.scoring:score", "trimtab.app.report:write"]
)
def test_a_signal_after_training_leaves_nothing_half_written(unbroken, tmp_path, target):
    code, said = stopped(unbroken, tmp_path, (target, 1), SIGTERM)
    assert code == 143 and "checkpoint-16 is whole" in said.splitlines()[-1]
    assert not list(tmp_path.rglob("*.half"))
    resumed(tmp_path)
    assert_same_end(tmp_path / "run", unbroken)


@BREADTH
@pytest.mark.parametrize("target", ["trimtab.app.models:load_model", "trimtab.app.run:_choose"])
def test_a_signal_before_training_stops_at_once_and_the_same_command_starts_again(unbroken, tmp_path, target):
    code, said = stopped(unbroken, tmp_path, (target, 1), SIGINT)
    assert code == 130
    assert said.splitlines()[-1].endswith("nothing was trained yet, so that the same command starts again")
    code, said = command(tmp_path / "out", "run", unbroken.parent / "recipe.yaml", f"output_dir={tmp_path}/run")
    assert code == 0, said
    assert_same_end(tmp_path / "run", unbroken)


def test_a_run_whose_checkpoints_cannot_be_resumed_says_so_when_it_is_stopped(unbroken, tmp_path):
    code, said = stopped(unbroken, tmp_path, (STEP, 5), SIGTERM, options=["train.save_only_model=true"])
    assert code == 143
    assert said.splitlines()[-1].endswith("no complete checkpoint to go on from; start again with --overwrite")


def test_another_number_of_processes_does_not_go_on_with_a_run(unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-16")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "run"), "--resume"])
    assert result.exit_code == 2 and result.stderr.startswith("error: processes=2: the run in")
    assert "has 1, and 8 rows a step, not 16; start as many" in result.stderr


def test_a_run_that_others_have_gone_on_with_asks_for_their_rows_a_step(unbroken, tmp_path, monkeypatch):
    shutil.copytree(unbroken, tmp_path / "run")
    facts = {"step": 8, "total_steps": 16, "processes": 1, "rows_a_step": 16}  # its recipe.yaml says 8, as it began
    monkeypatch.setattr(session, "read_facts", lambda _: facts)
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "run"), "--resume"])
    assert result.exit_code == 2 and "has 1, and 16 rows a step, not 8; start as many, or say so in" in result.stderr


def test_a_step_of_as_many_rows_goes_on_with_a_run(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-16")
    other = ["train.per_device_train_batch_size=4", f"output_dir={tmp_path / 'run'}", "--resume"]
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "run"), *other])
    assert result.exit_code == 2 and "train.per_device_train_batch_size=4: the run in" in result.stderr
    result = CliRunner().invoke(cli, ["run", str(tmp_path / "run"), "train.gradient_accumulation_steps=2", *other])
    assert result.exit_code == 0, result.stderr
    ours, theirs = (json.loads((run / "adapter/trimtab.json").read_text()) for run in (tmp_path / "run", unbroken))
    assert ours["step"] == theirs["step"] == ours["of"]


def test_a_run_that_was_to_be_replaced_is_back_after_a_signal(unbroken, tmp_path):
    shutil.copytree(unbroken, tmp_path / "run")
    code, said = stopped(unbroken, tmp_path, ("trimtab.app.run:_choose", 1), SIGTERM, options=["--overwrite"])
    assert code == 143 and said.splitlines()[-1].endswith("the run that --overwrite was to replace is back")
    assert_same_end(tmp_path / "run", unbroken)


@BREADTH
@pytest.mark.parametrize("target, n", [(STEP, 12), ("transformers:Trainer._save_checkpoint", 2)])
def test_a_second_signal_leaves_at_once_and_the_last_checkpoint_counts(unbroken, tmp_path, target, n):
    code, _ = stopped(unbroken, tmp_path, (target, n), SIGTERM, SIGINT)
    assert code == -SIGINT  # by the system: 130 in a shell
    assert checkpoints(tmp_path / "run" / "checkpoints")[0].name == "checkpoint-8"
    resumed(tmp_path)
    assert_same_end(tmp_path / "run", unbroken)


def interrupt_all():
    os.killpg(0, SIGINT)


@BREADTH
def in_a_terminal():
    os.setpgid(0, 0)
    AtCall(STEP, 5, interrupt_all)()


def test_ctrl_c_of_a_terminal_spares_the_data_loader_s_workers(unbroken, tmp_path):
    recipe, workers = unbroken.parent / "recipe.yaml", "train.dataloader_num_workers=1"
    code, said = command(tmp_path, "train", recipe, f"output_dir={tmp_path}/run", workers, before=in_a_terminal)
    assert code == 130 and "checkpoint-5 is whole" in said.splitlines()[-1]


def test_another_command_ends_with_the_signal_s_number(unbroken, tmp_path):
    before = AtCall("trimtab.app.scoring:score", 1, Send(SIGTERM))
    code, said = command(tmp_path, "eval", unbroken, "--base", before=before)
    assert code == 143 and said.splitlines()[-1] == "error: stopped by SIGTERM"
    assert not (unbroken / ".lock").exists()
