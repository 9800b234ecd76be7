"""The files of a run folder, and when one may be written into.

Each stage writes its own file, whole or not at all, so that a command can start from whatever the folder
holds. Reading a folder for a report is `report.runfolder`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from . import recipe as recipes
from .errors import ConfigError, DataError
from .plans import Where
from .recipe import Recipe

# What a run makes. Only these are removed by --overwrite; a user's own files in the folder stay.
_OURS = (
    "recipe.yaml",
    "where.json",
    "plan.json",
    "history.jsonl",
    "timing.jsonl",
    "metrics.json",
    "predictions.json",
    "base.json",
    "report.html",
    "checkpoints",
    "adapter",
    "merged",
    "answers",
    "harness",
    "error.log",
)
# What may differ between the recipe that began a run and the one that goes on with it.
_FREE = ("output_dir", "export")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def where(self) -> Path:
        return self.path / "where.json"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def history(self) -> Path:
        return self.path / "history.jsonl"

    @property
    def timing(self) -> Path:
        return self.path / "timing.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        return self.path / "merged"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.json"

    @property
    def predictions(self) -> Path:
        """What came out for each scored row."""
        return self.path / "predictions.json"

    @property
    def base(self) -> Path:
        """Scores of the model without an adapter."""
        return self.path / "base.json"

    @property
    def answers(self) -> Path:
        """What the model generated while it was scored."""
        return self.path / "answers"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def is_finished(self) -> bool:
        return self.metrics.is_file()

    @property
    def has_training(self) -> bool:
        return self.history.is_file() or any(self.checkpoints.glob("checkpoint-*"))

    def need(self, path: Path, command: str) -> Path:
        """``path`` if the stage that writes it has run.

        Raises:
            DataError: it has not; the message names the command to run first.
        """
        if not path.exists():
            raise DataError(f"run folder {str(self.path)!r}: {path.name} is missing. Run `trimtab {command}` first.")
        return path

    def read(self, path: Path) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: not JSON ({error})") from None

    def saved_where(self) -> Where | None:
        return Where.from_json(self.read(self.where)) if self.where.is_file() else None

    def write(self, path: Path, data: dict[str, Any]) -> None:
        """JSON, complete or not at all; under torchrun by the main process. A score may be NaN, as Python writes it."""
        if is_main():
            write_text(path, json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n")


def is_main() -> bool:
    """Whether this process writes: the only one, or torchrun's first."""
    return os.environ.get("RANK", "0") == "0"


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_text(text, encoding="utf-8")
    os.replace(half, path)


def default_folder(recipe: Recipe, source: str | Path) -> Path:
    """``output_dir`` of the recipe, or ``runs/NAME`` for ``NAME.yaml``."""
    return Path(recipe.output_dir or Path("runs") / Path(source).stem)


def begin(recipe: Recipe, path: Path, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """The folder of a run that is about to write, with its recipe in it.

    Raises:
        ConfigError: the folder holds a run that would be lost, or one of another recipe.
    """
    folder = RunFolder(path)
    if not is_main():
        return folder
    if path.exists() and not path.is_dir():
        raise ConfigError("output_dir", str(path), "is a file; name a folder")
    if overwrite:
        clear(folder)
    elif resume:
        same_recipe(recipe, folder)
        return folder
    elif folder.is_finished:
        raise ConfigError("output_dir", str(path), "holds a finished run; name another folder, or pass --overwrite")
    elif folder.has_training:
        raise ConfigError(
            "output_dir", str(path), "holds an unfinished run; go on with --resume, or start again with --overwrite"
        )
    elif folder.where.is_file() and not _selects_alike(recipe, folder):
        folder.where.unlink()  # left by `trimtab select` of another recipe
    if folder.base.is_file() and not what_was_scored(recipe).items() <= folder.read(folder.base).items():
        folder.base.unlink()  # left by `trimtab eval --base` of another recipe
    write_text(folder.recipe, recipe.to_yaml())
    return folder


def what_was_scored(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that scores without an adapter depend on, as base.json holds them."""
    return {"model": recipe.model.name_or_path, "data": recipe.data.model_dump(mode="json", exclude_none=True)}


def refuse_base_of_another(recipe: Recipe, folder: RunFolder) -> None:
    """Raise `ConfigError` where a run's folder would get the scores of another recipe's base model."""
    if not folder.recipe.is_file():
        return
    saved = recipes.load(folder.recipe)
    for part in ("model", "task", "data"):
        if getattr(saved, part) != getattr(recipe, part):
            raise ConfigError(
                "output_dir",
                str(folder.path),
                f"holds a run with another {part}; name another folder, "
                f"or score that run's base: trimtab eval {folder.path} --base",
            )


def clear(folder: RunFolder) -> None:
    """Removes what a run made, and nothing else."""
    for name in _OURS:
        path = folder.path / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def same_recipe(recipe: Recipe, folder: RunFolder) -> None:
    """Raise `ConfigError` where the run in a folder began with another recipe."""
    folder.need(folder.recipe, "train")
    began, goes_on = (_flat(r) for r in (recipes.load(folder.recipe), recipe))
    for key in sorted(began.keys() | goes_on.keys()):
        if began.get(key) != goes_on.get(key) and key.partition(".")[0] not in _FREE:
            cure = (
                f"the run in {str(folder.path)!r} began with {began.get(key)!r}; resume with that, or start again "
                "with --overwrite"
            )
            raise ConfigError(key, goes_on.get(key), cure)


def _flat(recipe: Recipe) -> dict[str, Any]:
    from .report.runfolder import flatten

    return dict(flatten(yaml.safe_load(recipe.to_yaml())))


def _selects_alike(recipe: Recipe, folder: RunFolder) -> bool:
    if not folder.recipe.is_file():
        return False
    saved = recipes.load(folder.recipe)
    return all(getattr(saved, part) == getattr(recipe, part) for part in ("model", "task", "data", "where", "seed"))
