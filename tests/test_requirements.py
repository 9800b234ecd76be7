"""The versions that CI tests are those that pyproject.toml and the README name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYPROJECT = (ROOT / "pyproject.toml").read_text("utf-8")


def pinned(name: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(package): version for package, version in pairs}


def bounds(*keys: str) -> dict[str, str]:
    """Package -> lower bound, of lists in pyproject.toml. Read as text: Python 3.10 has no tomllib."""
    found = {}
    for key in keys:
        for text in re.findall(r'"([^"]+)"', re.search(rf"^{key} = \[(.*?)\]$", PYPROJECT, re.M | re.S)[1]):
            requirement = Requirement(text)
            found[canonicalize_name(requirement.name)] = re.sub(r"^>=", "", str(requirement.specifier))
    return found


def parts(version: str) -> list[int]:
    """Numbers of a version without the zeros at its end."""
    numbers = [int(n) for n in version.split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return numbers


def test_the_oldest_set_is_what_pyproject_admits():
    admitted, oldest = bounds("dependencies", "app", "gguf", "summarize", "vqa"), pinned("oldest")
    assert admitted.keys() == oldest.keys()
    assert {n: parts(v) for n, v in admitted.items()} == {n: parts(v) for n, v in oldest.items()}


def test_the_locked_set_holds_all_that_is_needed_and_nothing_below_the_bounds():
    locked, needed = pinned("locked"), bounds("dependencies", "app", "gguf", "summarize", "vqa")
    for name, least in needed.items():
        assert [int(n) for n in re.findall(r"\d+", locked[name])[:3]] >= parts(least), name
    assert {"pytest", "ruff", "mypy", "hypothesis"} <= locked.keys()


@pytest.mark.parametrize("name", ["locked", "oldest"])
def test_locks_name_packages_and_versions_only(name):
    lines = (ROOT / "requirements" / f"{name}.txt").read_text("utf-8").splitlines()
    assert all(re.fullmatch(r"#.*|[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", line) for line in lines if line)


@pytest.mark.parametrize(("name", "where"), [("locked", "locked.txt"), ("oldest", "oldest.txt")])
def test_the_readme_names_the_versions_that_are_tested(name, where):
    said = re.search(rf"{where}\) \((.*?)\)", (ROOT / "README.md").read_text("utf-8"))[1]
    versions = dict(part.rsplit(" ", 1) for part in said.split(", ") if not part.startswith("Python"))
    assert len(versions) == 4
    assert {canonicalize_name(n): v for n, v in versions.items()} == {
        canonicalize_name(n): pinned(name)[canonicalize_name(n)] for n in versions}  # fmt: skip


def test_every_package_that_is_needed_has_a_licence_that_binds_nobody():
    done = subprocess.run([sys.executable, ROOT / "requirements" / "licences.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert {"torch", "transformers", "peft", "datasets", "numpy"} <= names
