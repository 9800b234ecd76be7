"""The files of a run folder.

Each stage writes its own file, whole or not at all, so that a command can start from whatever the folder
holds. Reading a folder for a report is `report.runfolder`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError
from ..plans import Where
from .recipe import Recipe

# What a run makes. Only these are removed by --overwrite; a user's own files in the folder stay.
_OURS = (
    "recipe.yaml",
    "run.json",
    "where.json",
    "plan.json",
    "history.jsonl",
    "timing.jsonl",
    "metrics.json",
    "predictions.json",
    "base.json",
    "report.html",
    "checkpoints",
    "logs",
    "adapter",
    "merged",
    "padded",
    "gguf",
    "answers",
    "harness",
    "error.log",
)
_MADE_BY = {
    "where.json": "`trimtab select`",
    "metrics.json": "`trimtab eval`",
    "predictions.json": "`trimtab eval`",
    "base.json": "`trimtab run`, or `trimtab eval --base`",
}
# The run that --overwrite replaces, while it is moved and until the new one has something to go on from.
HALF_ASIDE, ASIDE = ".previous.half", ".previous"
# Of an adapter, and of a model.
_CONFIGS = ("adapter_config.json", "config.json")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run's files."""

    path: Path

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def about(self) -> Path:
        """When, by which command and with which versions."""
        return self.path / "run.json"

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
    def logs(self) -> Path:
        """What TensorBoard reads."""
        return self.path / "logs"

    def run_name(self) -> str:
        """What trackers call the run: the folder and when the run began in it. A resumed run keeps its name, one that
        takes another's place has its own; Trackio goes on with whatever has the name."""
        began = time.localtime(self.recipe.stat().st_mtime if self.recipe.is_file() else None)
        return f"{self.path.resolve().name}-{time.strftime('%Y%m%d-%H%M%S', began)}"

    @property
    def is_finished(self) -> bool:
        """Whether training has ended and was scored: a run that is under way can be scored too, and says so."""
        return self.metrics.is_file() and "unfinished" not in self.read(self.metrics)

    @property
    def has_training(self) -> bool:
        return self.history.is_file() or any(self.checkpoints.glob("checkpoint-*"))

    # The run that is replaced stands aside, in the same folder, so that moving it is renaming. Names with "half" are
    # of a move that is under way: whoever finds one moves back what is in it.

    def set_aside(self) -> None:
        """Moves what a run made out of the way."""
        if not any(os.path.lexists(self.path / name) for name in _OURS):
            return
        half = self.path / HALF_ASIDE
        half.mkdir(exist_ok=True)
        for name in _OURS:
            if os.path.lexists(self.path / name):
                os.rename(self.path / name, half / name)
        os.rename(half, self.path / ASIDE)

    def put_back(self) -> bool:
        """Moves it back over what the new run has made, unless that has a checkpoint; whether there was any."""
        half, aside = self.path / HALF_ASIDE, self.path / ASIDE
        if aside.is_dir():
            _remove(self.path / name for name in _OURS)
            os.rename(aside, half)
        if not half.is_dir():
            return False
        for path in half.iterdir():
            os.rename(path, self.path / path.name)
        half.rmdir()
        return True

    def let_go(self) -> None:
        """Deletes it: the new run has a checkpoint, or has ended."""
        if is_main():
            _remove([self.path / ASIDE])

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
            found = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found, dict):
                raise ValueError(f"holds a {type(found).__name__}, not an object")
            return found
        except ValueError as error:  # what JSON and UTF-8 refuse is one, too
            again = next((f" and run {command}" for name, command in _MADE_BY.items() if path.name == name), "")
            raise DataError(f"{path}: damaged, not JSON ({error}); delete it{again} to have it made again") from None

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
    try:
        half.write_text(text, encoding="utf-8")
        os.replace(half, path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` when all is written. What lies in ``target`` is replaced file by
    file, so that a user's own files there stay, and what failed half-way replaces nothing. The config, without which
    nothing is loaded, goes first and comes last: a kill in between leaves no mixture that could be taken for whole."""
    target = target.resolve()  # "." has no name
    half = target.with_name(f".{target.name}.half")
    _remove([half])
    half.mkdir(parents=True)
    try:
        yield half
        if not os.path.lexists(target):
            os.rename(half, target)
            return
        for name in _CONFIGS:
            (target / name).unlink(missing_ok=True)
        for path in sorted(half.rglob("*"), key=lambda path: (path.name in _CONFIGS, path)):
            if path.is_file():
                (target / path.relative_to(half)).parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target / path.relative_to(half))
    finally:
        _remove([half])


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def default_folder(recipe: Recipe, source: str | Path) -> Path:
    """``output_dir`` of the recipe, or ``runs/NAME`` for ``NAME.yaml``.

    Raises:
        ConfigError: it names a variable of the environment that is not set.
    """
    if not recipe.output_dir:
        return Path("runs") / Path(source).stem
    path = os.path.expandvars(recipe.output_dir)
    if unset := re.search(r"\$\{?([A-Za-z_]\w*)", path):
        cure = f"{unset[1]} is not set in the environment; set it, or write the folder's name out"
        raise ConfigError("output_dir", recipe.output_dir, cure)
    return Path(path).expanduser()


def write_recipe(recipe: Recipe, folder: RunFolder) -> None:
    write_text(folder.recipe, recipe.to_file())
