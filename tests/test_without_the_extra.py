"""`pip install trimtab` is enough for the two lines; what needs `trimtab[app]` says so in one line."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import fresh
from trimtab.errors import APP

ROOT = Path(__file__).parents[1]
# The packages of the extra are not there for Trimtab. Others (transformers asks for scipy, datasets, rich) still find
# what is installed: a machine without the extra may have any of them.
BLOCKED = """
import builtins, sys

found = builtins.__import__

def without_the_extra(name, globals=None, locals=None, fromlist=(), level=0):
    asks = (globals or {{}}).get("__name__", "").split(".")[0]
    if asks == "trimtab" and not level and name.split(".")[0] in {app!r}:
        raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
    return found(name, globals, locals, fromlist, level)

builtins.__import__ = without_the_extra
"""
IMPORTED_NAMES = {"scikit-learn": "sklearn", "pyyaml": "yaml"}


def without_the_extra(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return fresh.python("-c", BLOCKED.format(app=APP) + code, *arguments, environment=environment)


def test_the_packages_of_the_extra_are_those_of_pyproject() -> None:
    text = re.search(r"^app = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text("utf-8"), re.M | re.S)[1]
    names = [name.lower() for name in re.findall(r'"([A-Za-z0-9-]+)', text)]
    assert sorted(IMPORTED_NAMES.get(name, name) for name in names) == sorted(APP)


def test_everything_outside_of_the_application_imports_without_them() -> None:
    modules = [
        ".".join(path.relative_to(ROOT / "src").with_suffix("").parts)
        for path in sorted((ROOT / "src/trimtab").rglob("*.py"))
        if "app" not in path.relative_to(ROOT / "src/trimtab").parts
    ]
    assert len(modules) > 30
    done = without_the_extra(f"import importlib\nfor name in {modules}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_the_bare_loop_runs_without_them(tmp_path: Path) -> None:
    code = "import runpy\nrunpy.run_path(sys.argv.pop(1), run_name='__main__')"
    done = without_the_extra(code, str(ROOT / "examples/bare_loop.py"), str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.mark.parametrize("arguments", [[], ["--help"], ["run", "recipe.yaml"]])
def test_the_command_names_the_extra_in_one_line(arguments: list[str]) -> None:
    done = without_the_extra("from trimtab.__main__ import main\nmain()", *arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the trimtab command needs the package click: pip install 'trimtab[app]'\n"


def test_a_part_of_the_extra_that_is_missing_is_one_line_too() -> None:
    """Other packages bring click, and not the rest."""
    code = BLOCKED.format(app=("pydantic",)) + "from trimtab.__main__ import main\nmain()"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = fresh.python("-c", code, "plan", ROOT / "recipes/quick_minilm_cola.yaml", environment=environment)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: this command needs the package pydantic: pip install 'trimtab[app]'\n"


def test_a_public_name_that_needs_the_extra_names_it() -> None:
    code = """
import trimtab
try:
    trimtab.plan
except trimtab.TrimtabError as error:
    assert isinstance(error, ImportError)
    print(error)
"""
    done = without_the_extra(code)
    assert done.stdout.startswith("trimtab.plan needs the package"), done.stderr
    assert done.stdout.endswith(": pip install 'trimtab[app]'\n")


def test_all_other_public_names_come_with_a_star() -> None:
    done = without_the_extra("from trimtab import *\nprint(TrimConfig.__name__, 'plan' in globals())")
    assert done.stdout == "TrimConfig False\n", done.stderr


def test_another_missing_module_is_not_blamed_on_the_extra() -> None:
    done = without_the_extra(
        "sys.modules['torch'] = None\nimport trimtab\ntry:\n    trimtab.Controller\n"
        "except ModuleNotFoundError as error:\n    print(type(error).__name__, error.name)"
    )
    assert done.stdout == "ModuleNotFoundError torch\n", done.stderr
