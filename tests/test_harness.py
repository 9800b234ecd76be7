"""A run's adapter goes to another program's evaluation as that program wants it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from test_run import write_recipe
from trimtab.app import harness
from trimtab.app.cli import cli
from trimtab.errors import ConfigError

STANDIN = """
import json, os, sys
print('its own table')
json.dump(sys.argv[1:], open(os.environ['CALLED_WITH'], 'w'))
"""


@pytest.fixture
def called_with(tmp_path, monkeypatch):
    """Stands for both harnesses, and tells what they were called with."""
    for name in ("lm_eval", "lmms_eval"):
        (tmp_path / "programs" / name).mkdir(parents=True)
        (tmp_path / "programs" / name / "__init__.py").touch()
        (tmp_path / "programs" / name / "__main__.py").write_text(STANDIN)
    monkeypatch.syspath_prepend(tmp_path / "programs")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "programs"))
    monkeypatch.setenv("CALLED_WITH", str(tmp_path / "argv.json"))
    return lambda: json.loads((tmp_path / "argv.json").read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    byte_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Say {i}.", "input": "", "output": str(i)} for i in range(8)]
    recipe = {
        "model": {"name_or_path": str(folder / "model"), "dtype": "float32"},
        "task": {"name": "instruct", "max_length": 300},
        "data": {"train": write_jsonl(folder / "train.jsonl", rows)},
        "adapter": {"r": 2, "target_modules": ["q_proj"]},
        "train": {"max_steps": 1, "use_cpu": True},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    result = CliRunner().invoke(cli, ["train", str(folder / "recipe.yaml")])
    assert result.exit_code == 0, result.output
    return folder / "run"


def evaluate(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli, ["eval", *map(str, args)])
    assert result.exit_code == code, result.output
    return result.output


def settings(argv: list[str]) -> dict[str, str]:
    return dict(pair.split("=") for pair in argv[argv.index("--model_args") + 1].split(","))


def test_lm_eval_gets_the_base_with_the_adapter_beside_it(run, called_with):
    evaluate(run, "--harness", "lm-eval", "--tasks", "gsm8k,arc_easy", "--harness-args", "--limit 10")
    argv = called_with()
    assert settings(argv) == {
        "pretrained": str(run.parent / "model"), "peft": str(run / "adapter"), "tokenizer": str(run / "adapter"),
        "dtype": "float32",
    }  # fmt: skip
    assert argv[argv.index("--tasks") + 1] == "gsm8k,arc_easy"
    assert argv[-2:] == ["--limit", "10"]


def test_lm_eval_scores_the_base_alone_when_asked(run, called_with):
    out = evaluate(run, "--harness", "lm-eval", "--tasks", "gsm8k", "--base").strip()
    assert settings(called_with()) == {"pretrained": str(run.parent / "model"), "dtype": "float32"}
    assert out == str(run / "harness" / "lm-eval-base")


def test_lmms_eval_which_knows_no_adapters_gets_the_merged_model(run, called_with):
    evaluate(run, "--harness", "lmms-eval", "--tasks", "scienceqa_img")
    assert settings(called_with()) == {"pretrained": str(run / "merged"), "dtype": "float32"}
    assert (run / "merged" / "model.safetensors").is_file()


def test_a_merged_model_is_kept_until_the_adapter_is_a_newer_one(run, called_with):
    call = [run, "--harness", "lmms-eval", "--tasks", "scienceqa_img"]
    evaluate(*call)
    made = (run / "merged" / "model.safetensors").stat().st_mtime_ns
    evaluate(*call)
    assert (run / "merged" / "model.safetensors").stat().st_mtime_ns == made
    later = (run / "merged" / "tokenizer_config.json").stat().st_mtime_ns + 1_000_000_000
    os.utime(run / "adapter" / "adapter_model.safetensors", ns=(later, later))
    evaluate(*call)
    assert (run / "merged" / "model.safetensors").stat().st_mtime_ns != made


def test_with_json_nothing_else_is_on_stdout(run, called_with, capfd):
    said = evaluate(run, "--harness", "lm-eval", "--tasks", "gsm8k", "--json")
    assert json.loads(said)["path"] == str(run / "harness" / "lm-eval")
    shown = capfd.readouterr()
    assert ("its own table" in shown.out, "its own table" in shown.err) == (False, True)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--harness", "lm_eval", "--tasks", "x"], "harness='lm_eval': one of lm-eval, lmms-eval"),
        (["--harness", "lm-eval"], "tasks=None: say what lm-eval is to run"),
        (["--harness", "lm-eval", "--tasks", "x", "--harness-args", "--a 'b"], "cannot be split into arguments"),
        (["--harness", "lm-eval", "--tasks", "x", "adapter={type: bottleneck}"], "has no merged form"),
        (["--tasks", "gsm8k"], "harness=None: --tasks is for one of lm-eval, lmms-eval"),
    ],
)
def test_a_call_that_cannot_be_is_refused_in_one_line(run, called_with, args, words):
    assert words in evaluate(run, *args, code=2)


def test_a_harness_that_is_not_installed_says_how_to_get_it(run, monkeypatch):
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert "is not installed: pip install 'lm-eval[hf]'" in evaluate(
        run, "--harness", "lm-eval", "--tasks", "gsm8k", code=2
    )


def test_a_run_that_classifies_is_refused(tmp_path, called_with):
    recipe = write_recipe(tmp_path)
    assert CliRunner().invoke(cli, ["select", str(recipe), "where=last", "where.count=1"]).exit_code == 0
    assert "asks for text" in evaluate(tmp_path / "run", "--harness", "lm-eval", "--tasks", "x", code=2)


def test_a_harness_that_fails_ends_with_its_code(run, called_with, monkeypatch):
    monkeypatch.setenv("CALLED_WITH", "/nowhere/argv.json")
    assert "ended with code 1" in evaluate(run, "--harness", "lm-eval", "--tasks", "gsm8k", code=2)


def test_a_path_that_a_harness_would_cut_in_two_is_refused():
    with pytest.raises(ConfigError, match="splits its settings at commas"):
        harness.command(harness.HARNESSES["lm-eval"], "a,b", None, Path("t"), "gsm8k", Path("out"))
