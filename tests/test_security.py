"""No pickle of ours, no code from elsewhere unless the recipe says so, no name that leads out, no data as markup."""

from __future__ import annotations

import ast
import html.parser
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from test_run import paraphrases, tiny_model, trimtab, write_recipe
from trimtab.app import lookup
from trimtab.app.cli import cli
from trimtab.train.checkpoint import _checksum_of_facts, what_is_wrong

ROOT = Path(__file__).parent.parent
SOURCES = {p.relative_to(ROOT).as_posix(): p for folder in ("src", "examples") for p in ROOT.glob(f"{folder}/**/*.py")}


@cache
def tree_of(source: str) -> ast.Module:
    return ast.parse(SOURCES[source].read_text("utf-8"))


# -- pickle -----------------------------------------------------------------------------------------------

PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def calls(tree):
    return (
        (ast.unparse(n.func), {k.arg: ast.unparse(k.value) for k in n.keywords})
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
    )


@pytest.mark.parametrize("path", SOURCES)
def test_no_pickle_is_read_or_written(path):
    for node in ast.walk(tree_of(path)):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not PICKLES & {name.split(".")[0] for name in names}, ast.unparse(node)
    for function, given in calls(tree_of(path)):
        assert function not in ("torch.save", "np.save", "numpy.save", "yaml.unsafe_load"), function
        assert function != "yaml.load" or issubclass(lookup._Loader, yaml.SafeLoader)
        assert not function.endswith((".to_pickle", "read_pickle")), function
        assert not function.endswith("torch.load") or given.get("weights_only") == "True", function
        assert given.get("allow_pickle", "False") == "False", function


def test_only_the_sandbox_runs_text_as_code():
    found = {path for path in SOURCES for function, _ in calls(tree_of(path)) if function in ("eval", "exec")}
    assert found == {"src/trimtab/app/tasks/confine.py"}


def test_what_a_run_leaves_to_others_is_no_pickle(ran):
    for folder in (ran / "run" / "adapter", ran / "run"):
        kinds = {path.suffix for path in folder.iterdir() if path.is_file()}
        assert kinds <= {".json", ".jsonl", ".safetensors", ".md", ".html", ".yaml", ".txt", ".jinja"}


# -- code that a model brings -----------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import BertConfig, BertForSequenceClassification

Path(__file__)
Path({mark!r}).write_text("ran")

class MineConfig(BertConfig):
    model_type = "mine"

class Mine(BertForSequenceClassification):
    config_class = MineConfig
"""


@pytest.fixture
def with_code(tmp_path):
    """A recipe whose model's folder brings Python, and the file that shows that it was run."""
    recipe = write_recipe(tmp_path, where={"method": "last", "ratio": 0.5})
    model, mark = tmp_path / "model", tmp_path / "ran"
    (model / "mine.py").write_text(CODE.format(mark=str(mark)))
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.MineConfig", "AutoModelForSequenceClassification": "mine.Mine", "AutoModel": "mine.Mine",
    }}  # fmt: skip
    (model / "config.json").write_text(json.dumps(config))
    return recipe, mark


@pytest.mark.parametrize("command", ["plan", "run", "show", "select"])
def test_code_that_a_model_brings_is_refused_in_one_line_without_a_question(with_code, command):
    recipe, mark = with_code
    result = CliRunner().invoke(cli, [command, str(recipe)], input="y\n" * 5)
    assert result.exit_code == 2
    assert "Python of its own, which is run only with model.trust_remote_code=true" in result.stderr
    assert len([line for line in result.stderr.splitlines() if line.startswith("error")]) == 1
    assert not mark.exists()


def test_code_that_a_model_brings_runs_when_the_recipe_says_so(with_code):
    recipe, mark = with_code
    trimtab("plan", recipe, "model.trust_remote_code=true")
    assert mark.read_text() == "ran"
    trimtab("run", recipe, "model.trust_remote_code=true")
    metrics = json.loads((recipe.parent / "run" / "metrics.json").read_text())
    assert "trust_remote_code=True" in metrics["load"]
    assert metrics["metrics"]["loss"] > 0


# -- names ------------------------------------------------------------------------------------------------


def test_a_folder_s_name_with_what_cannot_be_seen_is_refused(tmp_path):
    recipe = write_recipe(tmp_path)
    for name in ("a\0b", "a\nb", "a\x1b[2Jb"):
        text = json.loads(recipe.read_text()) | {"output_dir": f"{tmp_path}/{name}"}
        recipe.write_text(json.dumps(text))
        assert "cannot be seen" in trimtab("run", recipe, code=2).stderr
    said = trimtab("run", recipe, f"output_dir={tmp_path}/{'x' * 300}", code=2).stderr
    assert len(said.splitlines()) == 1 and "ame too long" in said


def test_settings_with_paths_in_them_name_trials_inside_the_search_s_folder():
    from trimtab.app.tune import _name

    for value in ("../../etc", "/etc/passwd", "..\\..\\x", "a\0b", "a\nb", "x" * 500, "~root"):
        name = _name({"task.text": value})
        assert "/" not in name and "\\" not in name and name.isprintable() and len(name) < 120
        assert not name.startswith((".", "~"))


def test_a_checkpoint_that_names_files_of_another_folder_is_damaged(ran, tmp_path):
    checkpoint = shutil.copytree(ran / "run" / "checkpoints" / "checkpoint-16", tmp_path / "checkpoint-16")
    for name in ("../../recipe.yaml", "/etc/hostname", "a/b"):
        facts = json.loads((checkpoint / "trim_state.json").read_text())
        facts["files"] = {name: "0" * 64}
        facts["facts"] = _checksum_of_facts(facts)
        (checkpoint / "trim_state.json").write_text(json.dumps(facts))
        assert "names a file of another folder" in what_is_wrong(checkpoint)


# -- data that would be markup ----------------------------------------------------------------------------

HOSTILE = [
    "<script>alert(1)</script>", "\"'><img src=x onerror=alert(1)>", "`rm -rf`", "---\nlicense: evil\n---",
    "[a](javascript:alert(1))", "{{ 7*7 }}", "# heading", "[red]x[/] [/nope]",
]  # fmt: skip


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run whose classes, texts and folder are hostile."""
    folder = tmp_path_factory.mktemp("hostile") / "<b onclick=x>&`'"
    folder.mkdir()
    tiny_model(folder / "model")
    for name, n in (("train", 64), ("validation", 32)):
        rows = [json.loads(line) for line in Path(paraphrases(folder / f"{name}.jsonl", n)).read_text().splitlines()]
        rows = [
            {"text": f"{row['sentence1']} {HOSTILE[i % len(HOSTILE)]}", "label": HOSTILE[i % len(HOSTILE)]}
            for i, row in enumerate(rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": {"name_or_path": str(folder / "model")},
        "task": {"name": "text_classification", "text": "text", "label": "label", "max_length": 24},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "adapter": {"r": 4, "target_modules": ["query", "value"]},
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    trimtab("run", folder / "recipe.yaml")
    return folder


class Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found, self.handlers, self.text = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)
        self.handlers += [(tag, key) for key, value in attrs if key.startswith("on") or "javascript:" in (value or "")]

    def handle_data(self, data):
        self.text += data


def elements(path):
    parsed = Elements()
    parsed.feed(path.read_text("utf-8"))
    return parsed


def test_the_report_shows_hostile_data_as_text(ran):
    page = elements(ran / "run" / "report.html")
    assert not page.handlers and "img" not in page.found and "b" not in page.found
    assert "alert(1)" in page.text
    scripts = re.findall(r"<script[^>]*>", (ran / "run" / "report.html").read_text("utf-8"))
    assert len(scripts) == page.found.count("script")  # what is in a script element ends it nowhere


def test_a_comparison_shows_hostile_data_as_text(ran):
    other = shutil.copytree(ran / "run", ran / "<u>other")
    trimtab("compare", ran / "run", other, "--out", ran / "page.html")
    page = elements(ran / "page.html")
    assert not page.handlers and "img" not in page.found and "u" not in page.found


def test_the_model_card_holds_hostile_data_as_text_and_its_head_is_ours(ran):
    card = (ran / "run" / "adapter" / "README.md").read_text("utf-8")
    _, head, body = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(head)
    outside = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.MULTILINE | re.DOTALL)
    outside = outside.replace("<!-- Written by Trimtab", "")
    assert not re.search(r"(?<!\\)<(?!/?details|/?summary)", outside)
    assert not re.search(r"(?<!\\)\]\(javascript", outside)
    assert "\n# heading" not in outside and "\n---" not in outside


def test_the_screen_shows_hostile_data_as_text(ran):
    shown = trimtab("show", ran / "recipe.yaml", "-n", "8").stdout
    assert "[red]x[/] [/nope]" in shown
