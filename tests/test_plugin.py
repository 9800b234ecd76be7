"""Tasks and methods of other packages: the example package installs, runs, and needs no change in Trimtab."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from test_run import FILES, tiny_model, trimtab

PLUGIN = Path(__file__).parents[1] / "examples" / "plugin"
TINY = {
    "model": {
        "config": {
            "model_type": "bert",
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
    },
    "adapter": {"r": 4},
}
OWN = '''
import torch
from dataclasses import dataclass
from trimtab.freeze.controls import FreezeAt
from trimtab.rank.adalora import AdaLoRA

@dataclass(frozen=True, kw_only=True)
class MyRank(AdaLoRA):
    pass

@dataclass(frozen=True, kw_only=True)
class MyFreeze(FreezeAt):
    pass

def odd(model, seed, start=1):
    return "".join("1" if i % 2 == start else "0" for i in range(4))

def loudest(model, batches, count):
    """Blocks with the largest output."""
    sizes = torch.zeros(4)
    with torch.no_grad():
        for batch in batches:
            states = model(**batch, output_hidden_states=True).hidden_states[1:]
            sizes += torch.stack([state.norm() for state in states]).cpu()
    return "".join("1" if i in sizes.topk(count).indices else "0" for i in range(4))

def broken(model):
    return "01"

def free(net, **settings):
    return "".join("1" if i in settings["layers"] else "0" for i in range(4))

nothing = 3
'''


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The example package as pip leaves it, on the path."""
    source = shutil.copytree(PLUGIN, tmp_path_factory.mktemp("source") / "plugin")  # building writes beside it
    target = tmp_path_factory.mktemp("site")
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    pytest.importorskip("setuptools", "77", reason="its build backend, which pip may not fetch here")
    subprocess.run([sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(target)
        yield target


@pytest.fixture
def tiny(tmp_path):
    """A recipe of nothing but the model and the adapter."""
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(TINY))
    return path


def read(path):
    return json.loads(path.read_text("utf-8"))


def test_what_the_package_adds_is_listed_with_its_settings(installed):
    found = {(entry["axis"], entry["name"]): entry for entry in json.loads(trimtab("methods", "--json").stdout)}
    added = {("task", "brackets"), ("where", "ends"), ("rank", "largest"), ("freeze", "upwards")}
    assert added <= set(found)
    assert found["where", "ends"]["summary"] == "from trimtab-example"
    assert found["where", "ends"]["defaults"]["low"] == 1
    assert (found["rank", "largest"]["needed"], found["freeze", "upwards"]["defaults"]["final"]) == (["target_r"], 0.3)


def test_its_recipe_runs_with_what_it_adds(installed, tmp_path):
    model = tiny_model(tmp_path / "model")
    settings = [
        f"model.name_or_path={model}",
        "task.rows=96",
        "where.count=3",
        "adapter.r=4",
        "train.per_device_train_batch_size=8",
        "train.use_cpu=true",
        f"output_dir={tmp_path / 'run'}",
    ]
    trimtab("run", PLUGIN / "recipe.yaml", *settings)
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == FILES
    where, plan = read(folder / "where.json"), read(folder / "plan.json")
    assert (where["method"], where["stacks"]) == ("ends", {"encoder.layer": "1011"})
    assert sum(site["final_r"] for site in plan["sites"]) == 2 * 9
    events = [json.loads(line) for line in (folder / "history.jsonl").read_text("utf-8").splitlines()]
    assert [event["step"] for event in events if event["event"] == "rank"] == [7]  # 0.3 of 24 steps
    frozen = [name for event in events if event["event"] == "freeze" for name in event["frozen"]]
    assert len(frozen) == 2 * 9
    assert [".layer.0." in name for name in frozen[:6]] == [True] * 6  # from the input upwards
    predicted = plan["settings"]["predicted_params"]
    assert predicted["final"] == plan["params"]["final"]

    trimtab("eval", folder)  # a run folder's recipe holds every default; it still loads


@pytest.mark.parametrize(
    "override, message",
    [
        ("where={method: ends, lo: 1}", "Did you mean 'low'?"),
        ("where={method: ends, low: 9}", "from 0 to 2"),
        ("where={method: ends, estimator: unbiased}", "where.estimator='unbiased': ends has ratio, count, low"),
        ("where=end", "Did you mean 'ends'?"),
        ("rank=largest", "rank.target_r=None: needed by largest"),
        ("rank={method: largest, target: 2}", "Did you mean 'target_r'?"),
        ("freeze={method: upwards, warmup: 0.8}", "shorten"),
        ("task={name: brackets, pair: 2}", "Did you mean 'pairs'?"),
    ],
)
def test_wrong_settings_are_refused_as_those_of_our_own_methods(installed, tiny, override, message):
    said = trimtab("plan", tiny, override, "train.max_steps=100", code=2).stderr
    assert message in said
    assert len(said.splitlines()) == 1


# -- without a package ---------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "my_methods.py").write_text(OWN)
    sys.modules.pop("my_methods", None)  # a page of the docs has one, too
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("my_methods", None)


def test_a_budget_leaves_alone_the_layers_of_a_method_without_a_ratio(own, tiny):
    settings = ["where=my_methods:odd", "rank=adalora", "budget.final_params=600", "train.max_steps=100"]
    made = json.loads(trimtab("plan", tiny, *settings, "--json").stdout)
    assert made["where"]["stacks"] == {"encoder.layer": "0101"}
    assert made["params"]["final"] <= 600


def test_methods_in_a_file_of_the_current_directory_are_named_by_module(own, tiny):
    settings = [
        "where={method: 'my_methods:odd', start: 0}",
        "rank={method: 'my_methods:MyRank', target_r: 2}",
        "freeze={method: 'my_methods:MyFreeze', at: 0.5}",
    ]
    made = json.loads(trimtab("plan", tiny, *settings, "train.max_steps=100", "--json").stdout)
    assert (made["where"]["method"], made["where"]["stacks"]) == ("my_methods:odd", {"encoder.layer": "1010"})
    assert made["params"]["final"] < made["params"]["initial"]


def test_a_method_may_take_whatever_it_is_given_and_call_the_model_what_it_likes(own, tiny):
    made = json.loads(trimtab("plan", tiny, "where={method: 'my_methods:free', layers: [0, 3]}", "--json").stdout)
    assert made["where"]["stacks"] == {"encoder.layer": "1001"}


def test_a_package_that_fails_while_it_is_imported_leaves_the_others_listed(own, tmp_path, monkeypatch):
    (tmp_path / "fails_at_import.py").write_text("raise RuntimeError('no such driver')")
    point = {"unlucky": ("fails_at_import:choose", "a-package")}
    monkeypatch.setattr("trimtab.where.announced", lambda group: point)
    found = {e["name"]: e for e in json.loads(trimtab("methods", "where", "--json").stdout)}
    assert found["unlucky"]["summary"] == "from a-package, but RuntimeError: no such driver"
    assert "cka" in found


def test_a_method_with_batches_chooses_by_data(own, tiny, tmp_path):
    from test_run import paraphrases

    rows = paraphrases(tmp_path / "train.jsonl", 24)
    settings = [
        f"model={tiny_model(tmp_path / 'model')}",
        "task=glue/mrpc",
        f"data.train={rows}",
        "where={method: 'my_methods:loudest', count: 2, samples: 8}",
        f"output_dir={tmp_path / 'run'}",
    ]
    made = json.loads(trimtab("plan", tiny, *settings, "--json").stdout)
    assert made["where"] is None
    assert any("for my_methods:loudest to say" in note for note in made["notes"])
    where = json.loads(trimtab("select", tiny, *settings, "--json").stdout)
    assert (where["method"], where["stacks"]["encoder.layer"].count("1")) == ("my_methods:loudest", 2)


@pytest.mark.parametrize(
    "override, message",
    [
        ("where=my_methods:broken", "2 characters, but encoder.layer has 4 layers"),
        ("where=my_methods:add", "'my_methods' has no 'add'. Did you mean 'odd'?"),
        ("task=my_methods:make", "'my_methods' has no 'make'"),
        ("where=my_module:odd", "cannot import 'my_module'"),
        ("where=my_methods:nothing", "must be a function of the model; it is a int"),
        ("where=my_methods:torch.zeros", "'my_methods' has no 'torch.zeros'"),
        ("where=':odd'", "'' is no name of a module"),
        ("where='.my_methods:odd'", "'.my_methods' is no name of a module"),
        ("where={method: 'my_methods:broken', ratio: 0.5}", "my_methods:broken has no settings"),
        ("rank=my_methods:odd", "must be a dataclass that extends trimtab.rank.base.RankSettings"),
        ("freeze=my_methods:MyRank", "must be a dataclass that extends trimtab.freeze.base.FreezeSettings"),
    ],
)
def test_what_is_no_method_is_refused(own, tiny, override, message):
    assert message in trimtab("plan", tiny, override, code=2).stderr
