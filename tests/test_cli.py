"""The command line: instant help, one-line errors with exit code 2, results on stdout alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModel

from tasks.stand_ins import write_jsonl
from test_run import paraphrases, write_recipe
from trimtab.app import ending
from trimtab.app.cli import cli


def run(*args):
    return CliRunner().invoke(cli, [str(arg) for arg in args])


def one_line_error(*args):
    """The message of a command that refuses: one line on stderr, nothing on stdout, exit code 2."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-1:] == errors
    assert "Traceback" not in result.output
    assert result.stdout == ""
    return errors[0]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("recipe"))


def test_help_answers_at_once():
    """Processor time of the whole process: what other work on the machine adds to the wall clock is not ours."""
    before = os.times()
    done = subprocess.run([sys.executable, "-m", "trimtab", "--help"], capture_output=True, text=True)
    after = os.times()
    assert done.returncode == 0
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.5


def test_the_list_of_commands_cuts_no_sentence_on_a_narrow_terminal():
    assert "..." not in CliRunner().invoke(cli, ["--help"], terminal_width=80).stdout.partition("Commands:")[2]


def test_help_imports_nothing_heavy():
    code = (
        "import sys, trimtab.app.cli as c; from click.testing import CliRunner; "
        "assert CliRunner().invoke(c.cli, ['run', '--help']).exit_code == 0; "
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'pydantic', 'rich')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("name", list(cli.commands))
def test_every_command_has_help_and_json(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert cli.commands[name].help


def test_the_commands_are_those_of_the_public_surface():
    assert list(cli.commands) == [
        "init",
        "run",
        "plan",
        "show",
        "select",
        "train",
        "eval",
        "export",
        "predict",
        "report",
        "compare",
        "tune",
        "methods",
        "schema",
        "bench",
        "demo",
    ]


@pytest.mark.parametrize(
    "override, says",
    [
        ("where.ratoi=0.5", ["where.ratoi=0.5", "Did you mean 'ratio'"]),
        ("train.lerning_rate=1", ["train.lerning_rate=1", "Did you mean 'learning_rate'"]),
        ("task.max_lenght=3", ["task.max_lenght=3", "Did you mean 'max_length'"]),
        ("adapter.target_modules=[qurey]", ["target_modules", "'qurey'", "Did you mean 'query'"]),
        ("data.train=no/such.jsonl", ["data.train='no/such.jsonl'", "no such file"]),
        ("model=./no-such-model", ["model.name_or_path='./no-such-model'", "no such file or folder"]),
        ("where.ratio=0", ["where.ratio=0", "above 0 and at most 1"]),
        ("where.ratio=.nan", ["where.ratio=nan", "above 0 and at most 1"]),
        ("where.ratio=0.1", ["where.ratio=0.1", "chooses none of 4 layers"]),
        ("task=glue/mprc", ["task.name='glue/mprc'", "Did you mean 'glue/mrpc'"]),
        ("rank={method: adalora, target_r: 9}", ["rank.target_r=9", "at most the initial rank"]),
        ("rank=adalroa", ["rank.method='adalroa'", "Did you mean 'adalora'"]),
        ("train.lr_scheduler_type=cosin", ["train", "cosin"]),
        ("nonsense", ["override='nonsense'", "key=value"]),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_cure(recipe, tmp_path, override, says):
    message = one_line_error("run", recipe, f"output_dir={tmp_path}/run", override)
    for part in says:
        assert part in message


def test_a_plan_refuses_a_target_that_matches_nothing(recipe):
    assert "no linear named 'query_proj'" in one_line_error("plan", recipe, "adapter.target_modules=[query_proj]")


def test_one_sample_cannot_be_compared(recipe, tmp_path):
    file = paraphrases(tmp_path / "one.jsonl", 1)
    message = one_line_error("select", recipe, f"output_dir={tmp_path}/run", f"data.train={file}")
    assert "needs at least 2 samples" in message


def test_nan_representations_are_refused_with_the_layer_that_made_them(recipe, tmp_path):
    model = AutoModel.from_pretrained(recipe.parent / "model")
    with torch.no_grad():
        model.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    (tmp_path / "broken" / "tokenizer.json").write_bytes((recipe.parent / "model" / "tokenizer.json").read_bytes())
    (tmp_path / "broken" / "tokenizer_config.json").write_bytes(
        (recipe.parent / "model" / "tokenizer_config.json").read_bytes()
    )
    message = one_line_error("select", recipe, f"output_dir={tmp_path}/run", f"model={tmp_path}/broken")
    assert "layer 2 has NaN" in message


def test_a_row_that_cannot_be_read_is_named(recipe, tmp_path):
    file = write_jsonl(tmp_path / "bad.jsonl", [{"sentence1": "a cat", "label": 1}] * 3)
    message = one_line_error("run", recipe, f"output_dir={tmp_path}/run", f"data.train={file}")
    assert "sentence2" in message


@pytest.mark.parametrize("args, says", [
    (["rnu"], "Did you mean 'run'"),
    (["run"], "Missing argument 'RECIPE'"),
    (["run", "x.yaml", "--overwrit"], "--overwrite"),
    (["run", "no-such.yaml"], "no such file"),
    (["export", "x", "--format", "onnx"], "'peft', 'merged', 'padded', 'gguf'"),
    (["methods", "rnak"], "Did you mean 'rank'"),
    (["compare", "no-such-run"], "no such folder"),
    (["report", "no-such-run"], "no such file"),
])  # fmt: skip
def test_wrong_arguments_exit_with_2(args, says):
    assert says in one_line_error(*args)


def test_a_stage_that_needs_another_says_which_to_run(recipe, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no such folder" in one_line_error("eval", recipe, f"output_dir={tmp_path}/none")
    assert "recipe.yaml is missing" in one_line_error("eval", recipe, f"output_dir={tmp_path}/empty")
    run("select", recipe, f"output_dir={tmp_path}/selected")
    message = one_line_error("eval", tmp_path / "selected")
    assert "adapter is missing" in message
    assert "trimtab train" in message


def test_json_is_all_that_stdout_holds(recipe):
    result = run("plan", recipe, "--json")
    assert json.loads(result.stdout)["params"]["initial"] == 512
    assert result.stderr == ""


def test_plan_shows_a_table(recipe):
    result = run("plan", recipe)
    for part in ("query", "any 2", "512", "16 steps, 8 an epoch"):
        assert part in result.stdout


def test_methods_names_every_axis_with_defaults_and_papers():
    found = json.loads(run("methods", "--json").stdout)
    assert {entry["axis"] for entry in found} == {"task", "adapter", "where", "rank", "freeze", "rates"}
    salient = next(entry for entry in found if entry["name"] == "salientlora")
    assert salient["defaults"]["gamma"] == 2.0
    assert salient["needed"] == ["target_r"]
    assert "NeurIPS 2024" in salient["paper"]
    assert "2403.13269" in run("methods", "freeze").stdout


def test_a_failure_of_ours_is_one_line_with_the_place_of_its_traceback(monkeypatch, recipe):
    monkeypatch.setattr("trimtab.app.planning.plan_recipe", lambda recipe, **given: 1 / 0)
    monkeypatch.delenv(ending.DEBUG, raising=False)
    result = run("plan", recipe)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ZeroDivisionError: division by zero (traceback: ")
    assert len(result.stderr.splitlines()) == 1
    log = result.stderr.partition("traceback: ")[2].partition(",")[0]
    assert "1 / 0" in Path(log).read_text()


def test_debug_shows_the_traceback(monkeypatch, recipe):
    monkeypatch.setenv(ending.DEBUG, "")  # put back afterwards what --debug sets
    result = run("plan", recipe, "where.ratoi=1", "--debug")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("process, begins", [("0", "error: train.bf16="), ("1", "error: process 1: train.bf16=")])
def test_an_error_of_all_processes_is_left_to_the_first_one_to_tell(monkeypatch, recipe, process, begins):
    waited = []
    monkeypatch.setattr(ending.time, "sleep", waited.append)  # torchrun ends the others within it
    monkeypatch.setenv("RANK", process)
    result = CliRunner().invoke(cli, ["run", str(recipe), "train.bf16=yess"])
    assert result.exit_code == 2 and result.stderr.startswith(begins)
    assert bool(waited) == (process != "0")


def test_ctrl_c_ends_quietly(monkeypatch, recipe):
    def interrupted(recipe, **given):
        raise KeyboardInterrupt

    monkeypatch.setattr("trimtab.app.planning.plan_recipe", interrupted)
    result = run("plan", recipe)
    assert result.exit_code == 130
    assert result.stderr.strip() == "error: stopped"
