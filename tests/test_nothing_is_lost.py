"""Nothing of the user's is lost: a run is replaced by one that works, and a fault leaves the last good state."""

import contextlib
import json
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from test_run import read, trimtab, write_recipe
from trimtab import TrimCallback
from trimtab.app import recipe as recipes
from trimtab.app import runfolder, session
from trimtab.app.runfolder import RunFolder
from trimtab.app.storage import alone
from trimtab.errors import ConfigError, DataError

pytestmark = pytest.mark.fault


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    recipe = write_recipe(tmp_path_factory.mktemp("finished"), where=None)
    trimtab("run", recipe)
    return recipe.parent / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def unfinished(copied):
    """As if killed after its last checkpoint."""
    shutil.rmtree(copied / "adapter")
    for name in ("metrics.json", "predictions.json", "report.html"):
        (copied / name).unlink()
    return copied


def fails_at_step(monkeypatch, step):
    """Training that breaks down at a step; one epoch, and so one checkpoint, is 8 steps."""

    def on_step_end(self, args, state, control, **more):
        if state.global_step == step:
            raise RuntimeError("out of luck")
        return usual(self, args, state, control, **more)

    usual = TrimCallback.on_step_end
    monkeypatch.setattr(TrimCallback, "on_step_end", on_step_end)


# -- a run that is replaced ------------------------------------------------------------------------------


def test_a_run_is_back_when_the_one_that_was_to_replace_it_has_no_checkpoint(finished, copied, monkeypatch):
    (copied / "notes.txt").write_text("mine")
    before = contents(copied)
    fails_at_step(monkeypatch, 3)
    trimtab("run", finished.parent / "recipe.yaml", f"output_dir={copied}", "adapter.r=2", "--overwrite", code=1)
    assert contents(copied) == before


def test_a_run_goes_when_the_one_that_replaces_it_has_a_checkpoint(finished, copied, monkeypatch):
    recipe = finished.parent / "recipe.yaml"
    fails_at_step(monkeypatch, 10)
    trimtab("run", recipe, f"output_dir={copied}", "adapter.r=2", "--overwrite", code=1)
    assert {p.name for p in copied.iterdir()} == {
        "recipe.yaml",
        "run.json",
        "plan.json",
        "history.jsonl",
        "timing.jsonl",
        "checkpoints",
    }
    monkeypatch.undo()
    trimtab("run", copied, "--resume")
    assert read(copied, "metrics.json")["params"]["initial"] == 4 * 2 * 2 * 32


def kill_at_rename(monkeypatch, n):
    """The n-th renaming from now on does not happen, nor does anything after it."""

    def rename(*places):
        nonlocal n
        n -= 1
        if n < 0:
            raise SystemExit
        os_rename(*places)

    os_rename = os.rename
    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.parametrize("n", range(10))
@pytest.mark.parametrize("step", ["set_aside", "put_back"])
def test_a_run_is_back_after_a_kill_at_any_instant_of_its_being_moved(copied, monkeypatch, step, n):
    before, folder = contents(copied), RunFolder(copied)
    if step == "put_back":
        folder.set_aside()
        (copied / "plan.json").write_text("of the new run")
    kill_at_rename(monkeypatch, n)
    with contextlib.suppress(SystemExit):
        getattr(folder, step)()
    monkeypatch.undo()
    with session.at_work(copied):  # the next command
        assert {k: v for k, v in contents(copied).items() if k != ".lock"} == before


def test_overwrite_and_resume_are_not_given_together(finished):
    before = contents(finished)
    message = trimtab("run", finished, "--overwrite", "--resume", code=2).stderr
    assert "give one of them" in message
    assert contents(finished) == before


# -- one run a folder ------------------------------------------------------------------------------------


def test_a_folder_at_work_is_refused_with_the_other_process_named(finished):
    before = contents(finished)
    with alone(finished):
        for command in (
            ["run", finished, "--overwrite"],
            ["train", finished, "--resume"],
            ["eval", finished, "--base"],
        ):
            message = trimtab(*command, code=2).stderr
            assert f"process {os.getpid()} on " in message
            assert "is at work in this folder" in message
    assert contents(finished) == before


def test_a_lock_that_a_dead_process_left_is_taken_over(copied):
    (copied / ".lock").write_text("process 1 on elsewhere (trimtab run)\n")
    with alone(copied):
        assert f"process {os.getpid()}" in (copied / ".lock").read_text()
    assert not (copied / ".lock").exists()


def test_a_running_run_can_be_reported(unfinished):
    with alone(unfinished):
        trimtab("report", unfinished)
    assert (unfinished / "report.html").is_file()


# -- folders that are no run's ---------------------------------------------------------------------------


@pytest.mark.parametrize("name, says", [
    ("/", "is not for a run"),
    ("HOME", "is not for a run"),
    ("file", "is a file"),
    ("file/run", "Not a directory"),
    ("/proc/none", "cannot be written: No such file or directory: /proc/none"),
    ("thesis", "holds chapter.tex, data.csv and no run"),
    ("project", "holds recipe.yaml and no run"),
])  # fmt: skip
@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_folder_that_is_no_run_s_is_refused(finished, tmp_path, monkeypatch, name, says, overwrite):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "file").write_text("mine")
    for file in ("thesis/chapter.tex", "thesis/data.csv", "project/recipe.yaml"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("mine")
    before = contents(tmp_path)
    place = tmp_path if name == "HOME" else tmp_path / name
    message = trimtab("run", finished.parent / "recipe.yaml", f"output_dir={place}", *overwrite, code=2).stderr
    assert message.startswith(f"error: output_dir='{place}'")
    assert says in message
    assert len(message.splitlines()) == 1
    assert contents(tmp_path) == before


def test_a_variable_in_a_folder_s_name_is_the_environment_s(finished, monkeypatch, tmp_path):
    recipe = recipes.load(finished, ["output_dir=$PLACE/x"])
    monkeypatch.setenv("PLACE", str(tmp_path))
    assert runfolder.default_folder(recipe, "r.yaml") == tmp_path / "x"
    monkeypatch.delenv("PLACE")
    message = trimtab("run", finished.parent / "recipe.yaml", "output_dir=$PLACE/x", code=2).stderr
    assert message.startswith("error: output_dir='$PLACE/x': PLACE is not set in the environment; set it")


@pytest.mark.parametrize("file", [".DS_Store", ".gitignore"])
def test_a_folder_with_nobody_s_files_is_as_good_as_empty(tmp_path, file):
    (tmp_path / file).write_text("")
    with session.at_work(tmp_path):
        pass


def test_a_refused_recipe_leaves_no_folder_behind(finished, tmp_path):
    trimtab("run", finished.parent / "recipe.yaml", f"output_dir={tmp_path}/new", "task=glue/cola", code=2)
    assert not (tmp_path / "new").exists()


# -- a disk that is full -----------------------------------------------------------------------------------


class Limit:
    """Files may not grow beyond some bytes: what a full disk is to a program, but for the error's name."""

    def __init__(self, size):
        self.size = size

    def __enter__(self):
        self.before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.before[1]))

    def __exit__(self, *_):
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)


@pytest.mark.parametrize("size", [200, 1500, 3000, 6000])
def test_a_full_disk_is_one_line_and_the_run_that_was_to_be_replaced_is_back(finished, copied, size):
    before = contents(copied)
    with Limit(size):
        result = trimtab("run", finished.parent / "recipe.yaml", f"output_dir={copied}", "--overwrite", code=2)
    assert result.stderr.splitlines()[-1].startswith(f"error: output_dir='{copied}': cannot be written: ")
    assert contents(copied) == before


def test_after_a_full_disk_a_run_goes_on_from_its_last_checkpoint(finished, tmp_path, monkeypatch):
    recipe, limit = finished.parent / "recipe.yaml", Limit(3000)

    def on_epoch_begin(self, args, state, control, **more):
        if state.global_step == 8:
            limit.__enter__()
        return usual(self, args, state, control, **more)

    usual = TrimCallback.on_epoch_begin
    monkeypatch.setattr(TrimCallback, "on_epoch_begin", on_epoch_begin)
    result = trimtab("run", recipe, f"output_dir={tmp_path}/run", code=2)
    limit.__exit__()
    monkeypatch.undo()
    assert "checkpoint-8 is whole: mend that, then go on with --resume" in result.stderr.splitlines()[-1]
    trimtab("run", recipe, f"output_dir={tmp_path}/run", "--resume")
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (tmp_path / "run", finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_export_that_fails_leaves_the_earlier_one(copied):
    (copied / "adapter" / "notes.txt").write_text("mine")
    before = contents(copied)
    with Limit(2000):
        trimtab("export", copied, code=2)
    assert contents(copied) == before
    trimtab("export", copied)
    assert contents(copied).keys() == before.keys()


# -- damaged files on resume -------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [
    (cut, "trainer_state.json", "trainer_state.json is cut short"),
    (Path.unlink, "trainer_state.json", "the checkpoint was not finished"),
    (cut, "trim_state.json", "trim_state.json is damaged"),
    (flip, "trim_state.json", "trim_state.json "),
    (flip, "trim_state.safetensors", "does not have the checksum"),
    (Path.unlink, "trim_state.safetensors", "trim_state.safetensors is missing"),
    (cut, "adapter_model.safetensors", "does not have the checksum"),
    (flip, "adapter_model.safetensors", "does not have the checksum"),
    (Path.unlink, "adapter_model.safetensors", "adapter_model.safetensors is missing"),
    (flip, "optimizer.pt", "does not have the checksum"),
    (cut, "scheduler.pt", "does not have the checksum"),
    (Path.unlink, "rng_state.pth", "rng_state.pth is missing"),
]


@pytest.mark.parametrize("harm, name, says", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(unfinished, caplog, harm, name, says):
    harm(unfinished / "checkpoints" / "checkpoint-16" / name)
    found = session.checkpoint_to_resume(RunFolder(unfinished))
    assert Path(found).name == "checkpoint-8"
    assert "checkpoint-16: " in caplog.text
    assert says in caplog.text
    assert "going on from checkpoint-8: the steps since then are trained again" in caplog.text


@pytest.mark.parametrize("harm, name, says", DAMAGE)
def test_without_a_whole_checkpoint_the_fault_and_the_way_out_are_one_line(unfinished, harm, name, says):
    shutil.rmtree(unfinished / "checkpoints" / "checkpoint-8")
    harm(unfinished / "checkpoints" / "checkpoint-16" / name)
    before = contents(unfinished)
    message = trimtab("run", unfinished, "--resume", code=2).stderr
    assert says in message
    assert message.endswith("start again with --overwrite\n")
    assert len(message.splitlines()) == 1
    assert contents(unfinished) == before


def test_a_run_goes_on_from_before_the_damage_and_ends_as_it_would_have(finished, unfinished):
    flip(unfinished / "checkpoints" / "checkpoint-16" / "optimizer.pt")
    shown = trimtab("run", finished.parent / "recipe.yaml", f"output_dir={unfinished}", "--resume").stderr
    assert "going on from checkpoint-8" in shown
    ours, theirs = (load_file(f / "adapter" / "adapter_model.safetensors") for f in (unfinished, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (unfinished / "history.jsonl").read_text() == (finished / "history.jsonl").read_text()


def test_lost_rows_of_the_history_are_counted(unfinished, caplog):
    rows = (unfinished / "history.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "history.jsonl").write_text("".join(rows[:4]))
    session.checkpoint_to_resume(RunFolder(unfinished))
    assert f"history.jsonl has lost {len(rows) - 4} rows" in caplog.text


@pytest.mark.parametrize("name, command, says", [
    ("recipe.yaml", ["run", "--resume"], "damaged: it ends before its last line"),
    ("recipe.yaml", ["eval"], "damaged: it ends before its last line"),
    ("metrics.json", ["export"], "damaged, not JSON"),
    ("plan.json", ["export"], "damaged, not JSON"),
    ("adapter/adapter_model.safetensors", ["export"], "adapter: damaged"),
    ("adapter/adapter_config.json", ["export"], "adapter: damaged"),
])  # fmt: skip
def test_a_damaged_file_of_a_run_is_one_line(copied, name, command, says):
    cut(copied / name)
    before = contents(copied)
    message = trimtab(command[0], copied, *command[1:], code=2).stderr.splitlines()[-1]
    assert message.startswith("error: ")
    assert says in message
    assert contents(copied) == before


def test_a_recipe_is_known_to_be_cut_wherever_it_is(copied):
    text = (copied / "recipe.yaml").read_text()
    for end in range(0, len(text) - len("\n... # 0123456789abcdef\n"), 7):
        (copied / "recipe.yaml").write_text(text[:end])
        with pytest.raises(ConfigError, match=r"damaged|must hold keys and values"):
            recipes.load(copied)


def test_a_resume_says_that_the_recipe_was_changed(copied, caplog):
    recipe, folder = copied / "recipe.yaml", RunFolder(copied)
    session.same_recipe(recipes.load(copied), folder)
    assert not caplog.text
    recipe.write_text(recipe.read_text().replace("seed: 0", "seed: 1"))
    session.same_recipe(recipes.load(copied), folder)
    assert "recipe.yaml is not as the run wrote it" in caplog.text


def test_an_earlier_version_s_run_is_known_without_the_mark(copied):
    recipe = copied / "recipe.yaml"
    recipe.write_text(recipe.read_text().partition("\n")[2])
    with session.at_work(copied):
        assert json.loads((copied / "metrics.json").read_text())


def test_there_is_nothing_to_resume_in_an_empty_folder(finished, tmp_path):
    with (
        pytest.raises(DataError, match=r"recipe\.yaml is missing"),
        session.session(recipes.load(finished), tmp_path / "none", resume=True),
    ):
        pass
    assert not (tmp_path / "none").exists()
