"""What editors and shells are told: the recipe's JSON schema, and completion on the command line."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from trimtab.app import recipe as recipes
from trimtab.app.cli import cli
from trimtab.app.lookup import parse_yaml
from trimtab.app.schema import recipe_schema

ROOT = Path(__file__).parent.parent
SCHEMA = recipe_schema()


def section(name):
    return next(part for part in SCHEMA["$defs"][name]["anyOf"] if "properties" in part)


def test_the_command_prints_the_schema():
    assert json.loads(CliRunner().invoke(cli, ["schema"]).stdout) == SCHEMA


def test_it_has_every_key_of_the_recipe_with_its_docstring():
    keys = {*SCHEMA["properties"], *(f"train.{name}" for name in SCHEMA["properties"]["train"]["properties"])}
    for name in ("Model", "Adapter", "Where", "Export"):
        keys |= {f"{name.lower()}.{key}" for key in section(name)["properties"]}
    keys |= {f"data.{key}" for key in SCHEMA["$defs"]["Data"]["properties"]}
    named = {key for key in recipes.every_key() if key.partition(".")[0] not in ("task", "budget", "early_stopping")}
    assert named - keys - {"adapter.lora_alpha", "adapter.lora_dropout", "adapter.init_lora_weights"} <= {
        f"adapter.{key}" for key in recipes.ELSEWHERE["adapter"]
    } | {"rank.method", "freeze.method"}
    assert section("Model")["properties"]["name_or_path"]["description"].startswith("Hub id, local folder, GGUF file")
    assert SCHEMA["properties"]["train"]["description"].startswith("Fields of `transformers.TrainingArguments`")


def test_it_takes_what_a_run_takes_and_underlines_what_it_refuses():
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator(SCHEMA)
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        assert not [
            f"{path.name}: {error.message}" for error in validator.iter_errors(parse_yaml(path.read_text(), "x"))
        ]
    for wrong in (
        {"adapter": {"r": 0}},
        {"where": {"method": "cak"}},
        {"rank": "salient"},
        {"train": {"lr": 1}},
        {"train": {"lr_scheduler_type": "cosin"}},
        {"modle": "x"},
        {"data": {"trian": "x"}},
        {"export": "pefft"},
    ):
        assert list(validator.iter_errors({"model": "some/model", **wrong})), wrong
    for right in ({"rank": "my_package.rank:Mine"}, {"early_stopping": 3}, {"train": {"eval_strategy": False}}):
        assert not list(validator.iter_errors({"model": "some/model", **right})), right


def test_the_line_for_editors_that_is_documented_names_the_schema_that_is_written():
    for page in (ROOT / "docs" / "recipes.md").read_text(), cli.commands["schema"].help:
        assert re.search(r"# yaml-language-server:\s*\$schema=recipe\.schema\.json", page)
        assert "trimtab schema --out recipe.schema.json" in page


@pytest.mark.parametrize(
    "words, offers", [("trimtab pl", "plan"), ("trimtab run --ov", "--overwrite"), ("trimtab bench late", "latency")]
)
def test_the_shell_completes_commands_and_options(words, offers):
    env = {
        **os.environ,
        "_TRIMTAB_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(words.count(" ")),
    }
    done = subprocess.run([sys.executable, "-m", "trimtab"], env=env, capture_output=True, text=True, check=True)
    assert f"plain,{offers}" in done.stdout.splitlines()


def test_the_documented_line_sets_completion_up():
    page = (ROOT / "docs" / "commands.md").read_text()
    line = re.search(r'eval "\$\(_TRIMTAB_COMPLETE=bash_source trimtab\)"', page)
    assert line
    env = {**os.environ, "_TRIMTAB_COMPLETE": "bash_source"}
    done = subprocess.run([sys.executable, "-m", "trimtab"], env=env, capture_output=True, text=True, check=True)
    assert "complete -o nosort -F _trimtab_completion trimtab" in done.stdout
