"""When a run may write into its folder, and what becomes of an earlier run there.

Only one process is at work in a folder. A run that --overwrite replaces can be had back until the new one has a
checkpoint; one that --resume goes on with must have begun with the same recipe and the same rows.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, DataError, TrimtabError
from ..train.checkpoint import checkpoints, last_checkpoint, read_facts, what_is_wrong
from . import about
from . import recipe as recipes
from .recipe import Recipe
from .report.words import some
from .runfolder import ASIDE, HALF_ASIDE, RunFolder, is_main, write_recipe
from .stopping import Stopped
from .storage import LOCK, alone, telling_of_storage

logger = logging.getLogger("trimtab")

# By these a folder is known to be a run's, whatever else lies there; a recipe.yaml alone may be a user's own.
_OF_A_RUN = ("where.json", "plan.json", "history.jsonl", "metrics.json", "base.json", "checkpoints")
# What a folder may hold and still count as empty.
_NOBODYS = (".DS_Store", "Thumbs.db", "desktop.ini", ".gitkeep", ".gitignore", "lost+found")
# What may differ between the recipe that began a run and the one that goes on with it.
_FREE = ("base_rows", "output_dir", "export")
# What may, too, as long as a step takes as many rows, so that another number of processes can go on.
_SHARES = ("train.per_device_train_batch_size", "train.gradient_accumulation_steps")


@dataclass(frozen=True)
class Session:
    """A run at work in its folder, which nobody else may write to meanwhile."""

    recipe: Recipe
    folder: RunFolder
    overwrite: bool
    resume: bool

    def begin(self, data: Mapping[str, Any] | None = None) -> RunFolder:
        """The folder, ready to be written to. Comes after all that can be checked has been: until here nothing of an
        earlier run is touched.

        Args:
            data: what is trained on, which stays the same for all of a run: ``rows``, ``fingerprint``, ``classes``.
        Raises:
            ConfigError: the run that is to go on began with other data.
        """
        folder, recipe = self.folder, self.recipe
        if not is_main():
            return folder
        if self.resume:
            began = folder.read(folder.about) if folder.about.is_file() else about.facts()
            if data and (before := began.setdefault("data", data)) != data:
                raise _changed_data(recipe, folder, before, data)
            now = about.facts()
            again = [*began.get("resumed", ()), {key: now[key] for key in ("began", "command")}]
            folder.write(folder.about, {**began, "resumed": again})
            return folder
        if self.overwrite:
            folder.set_aside()
        if folder.where.is_file() and not _selects_alike(recipe, folder):
            folder.where.unlink()  # left by `trimtab select` of another recipe
        if folder.base.is_file() and not what_was_scored(recipe).items() <= folder.read(folder.base).items():
            folder.base.unlink()  # left by `trimtab eval --base` of another recipe
        write_recipe(recipe, folder)
        folder.write(folder.about, {**about.facts(), **({"data": data} if data else {})})
        return folder


@contextlib.contextmanager
def session(recipe: Recipe, path: Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Session]:
    """A run in a folder, from the first check to its end.

    With ``overwrite`` the earlier run stays where it is until `Session.begin`, and can be had back until the new one
    has a checkpoint: a run that ends before that, however it does, leaves the earlier one in its place.

    Raises:
        ConfigError: the folder cannot be a run's, holds one that would be lost, or is at work; it cannot be written to.
        DataError: there is nothing to resume.
    """
    folder = RunFolder(path)
    made = Session(recipe, folder, overwrite, resume)
    if not is_main():
        yield made
        return
    if overwrite and resume:
        raise ConfigError("--overwrite", True, "--resume goes on with what --overwrite deletes; give one of them")
    with at_work(path):
        if resume:
            same_recipe(recipe, folder, (*_FREE, *_SHARES))
            _same_step(recipe, folder, checkpoint_to_resume(folder))
        elif not overwrite:
            _refuse_to_lose_a_run(folder)
        try:
            yield made
        except BaseException as error:
            is_back = folder.put_back()
            if isinstance(error, Stopped):
                raise Stopped(error.number, f"{error}: {_how_to_go_on(folder, is_back)}") from None
            kept = None if is_back or isinstance(error, TrimtabError) else last_checkpoint(folder.checkpoints)
            if kept:
                logger.warning(_goes_on(kept, path))
            raise
        folder.let_go()


def after_restart(path: Path, overwrite: bool, resume: bool) -> tuple[bool, bool]:
    """``overwrite`` and ``resume`` for a command that torchrun starts again after a process died: it goes on with what
    it has saved, or begins again where that is nothing."""
    job = about.job()
    if resume or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" or (overwrite and job == "none"):
        return overwrite, resume
    folder = RunFolder(path)
    if not folder.about.is_file() or folder.read(folder.about).get("job") != job:
        return overwrite, resume  # it died before it began: what lies there is another run's
    is_saved = last_checkpoint(folder.checkpoints) is not None
    return not is_saved, is_saved


def _how_to_go_on(folder: RunFolder, is_back: bool) -> str:
    if is_back:
        return "the run that --overwrite was to replace is back"
    kept = last_checkpoint(folder.checkpoints)
    if kept is None and folder.has_training:
        return "there is no complete checkpoint to go on from; start again with --overwrite"
    if kept is None:
        return "nothing was trained yet, so that the same command starts again"
    return _goes_on(kept, folder.path)


def _goes_on(kept: str, path: Path) -> str:
    return f"{Path(kept).name} is whole, and `trimtab run {shlex.quote(str(path))} --resume` goes on from it"


@contextlib.contextmanager
def at_work(path: Path) -> Iterator[None]:
    """The only process that writes to a run's folder; of torchrun's, the one that writes.

    Raises:
        ConfigError: the folder cannot be a run's, another process is at work in it, or it cannot be written to.
    """
    if not is_main():
        yield
        return
    folder = RunFolder(path)
    with telling_of_storage(folder):
        _refuse_what_is_no_run_folder(path)
        with alone(path):
            _put_in_order(folder)
            yield


def _refuse_what_is_no_run_folder(path: Path) -> None:
    if not str(path).isprintable():
        raise ConfigError("output_dir", str(path), "holds a character that cannot be seen; name another folder")
    absolute = path.resolve()
    if absolute in (Path(absolute.anchor), Path.home().resolve()):
        raise ConfigError("output_dir", str(path), "is not for a run; name a folder of its own, such as runs/NAME")
    if path.exists() and not path.is_dir():
        raise ConfigError("output_dir", str(path), "is a file; name a folder")
    if not path.is_dir():
        return
    names = names_in(path)
    if names & {*_OF_A_RUN, ASIDE, HALF_ASIDE} or _is_marked(path / "recipe.yaml"):
        return
    if names:
        held = some(sorted(names), 3)
        cure = f"holds {held} and no run; name a folder that is empty or not there yet, such as {path / 'run'}"
        raise ConfigError("output_dir", str(path), cure)


def names_in(folder: Path) -> set[str]:
    """What a folder holds that is somebody's."""
    return {entry.name for entry in folder.iterdir()} - {*_NOBODYS, LOCK}


def _is_marked(recipe: Path) -> bool:
    if not recipe.is_file():
        return False
    with recipe.open(encoding="utf-8", errors="replace") as file:
        return file.readline() == recipes.MARK


def _refuse_to_lose_a_run(folder: RunFolder) -> None:
    path = str(folder.path)
    if folder.is_finished:
        raise ConfigError("output_dir", path, "holds a finished run; name another folder, or pass --overwrite")
    if folder.has_training:
        raise ConfigError(
            "output_dir", path, "holds an unfinished run; go on with --resume, or start again with --overwrite"
        )


def _put_in_order(folder: RunFolder) -> None:
    """After a run that was killed while it replaced another: keeps the one that has something to go on from."""
    if (folder.path / ASIDE).is_dir() and last_checkpoint(folder.checkpoints):
        folder.let_go()
    elif folder.put_back():
        logger.warning("the run that --overwrite was to replace is back: the new one ended before its first checkpoint")


def checkpoint_to_resume(folder: RunFolder) -> str:
    """The newest complete checkpoint, with a word on newer ones that are damaged.

    Raises:
        DataError: there is none, and what is wrong with the newest.
    """
    all_of_them = checkpoints(folder.checkpoints)
    found = last_checkpoint(folder.checkpoints)
    faults = [f"{p.name}: {what_is_wrong(p)}" for p in all_of_them if str(p) != found][:1]
    if found is None:
        why = f" ({faults[0]})" if faults else ""
        raise DataError(
            f"run folder {str(folder.path)!r}: no complete checkpoint to resume from{why}; start again with --overwrite"
        )
    if faults and all_of_them[0] != Path(found):
        logger.warning(f"{faults[0]}; going on from {Path(found).name}: the steps since then are trained again")
    rows = len(folder.history.read_bytes().splitlines()) if folder.history.is_file() else 0
    if (lost := read_facts(found).get("history_rows", 0) - rows) > 0:
        logger.warning(f"history.jsonl has lost {lost} rows: curves of the report lack them; the training does not")
    return found


def what_was_scored(recipe: Recipe) -> dict[str, Any]:
    """The parts of a recipe that scores without an adapter depend on, as base.json holds them."""
    asked = recipe.task.model_dump(mode="json", exclude_none=True) if recipe.task else None
    data = recipe.data.model_dump(mode="json", exclude_none=True)
    return {"model": recipe.model.name_or_path, "data": data, "asked": asked}


def check_base_matches(recipe: Recipe, folder: RunFolder) -> None:
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


def same_recipe(recipe: Recipe, folder: RunFolder, free: Sequence[str] = _FREE) -> None:
    """Raise `ConfigError` where the run in a folder began with another recipe."""
    saved = recipes.load(folder.need(folder.recipe, "train"))
    if not recipes.is_as_written(folder.recipe.read_text(encoding="utf-8")):
        logger.warning(f"{folder.recipe} is not as the run wrote it: going on with what it says now")
    began, goes_on = _flat(saved), _flat(recipe)
    for key in sorted(began.keys() | goes_on.keys()):
        if began.get(key) != goes_on.get(key) and not {key, key.partition(".")[0]} & set(free):
            raise _other(key, goes_on.get(key), began.get(key), folder)


def _same_step(recipe: Recipe, folder: RunFolder, checkpoint: str) -> None:
    """Raise `ConfigError` where a step would take more rows than before, or fewer: the run would be another one."""
    facts, began, goes_on = read_facts(checkpoint), _flat(recipes.load(folder.recipe)), _flat(recipe)
    each, accumulated = (goes_on.get(key) for key in _SHARES)
    rows = int(each or 8) * int(accumulated or 1) * about.processes()
    before = facts.get("rows_a_step", rows)
    if rows == before or facts["step"] == facts["total_steps"]:
        return
    if about.processes() == facts["processes"]:
        for key in _SHARES:
            if began.get(key) != goes_on.get(key):
                raise _other(key, goes_on.get(key), began.get(key), folder)
    cure = (
        f"the run in {str(folder.path)!r} has {facts['processes']}, and {before} rows a step, not {rows}; start as "
        f"many, or say so in {_SHARES[0]} or {_SHARES[1]}, or start again with --overwrite"
    )
    raise ConfigError("processes", about.processes(), cure)


def _other(key: str, value: Any, before: Any, folder: RunFolder) -> ConfigError:
    cure = f"the run in {str(folder.path)!r} began with {before!r}; resume with that, or start again with --overwrite"
    return ConfigError(key, value, cure)


def _changed_data(recipe: Recipe, folder: RunFolder, before: Mapping[str, Any], now: Mapping[str, Any]) -> ConfigError:
    key, value = next(
        ((f"data.{key}", value) for key in ("train", "hub") if (value := getattr(recipe.data, key))), ("data", None)
    )
    if before.get("classes") != now.get("classes"):
        were, are = (some([*map(repr, data.get("classes") or ())]) or "none" for data in (before, now))
        what = f"its classes were {were}, and are {are}"
    elif before.get("rows") != now.get("rows"):
        what = f"{before.get('rows')} training rows then, {now.get('rows')} now"
    else:
        what = "as many training rows, with something else in them"
    cure = "put the rows back as they were, or start again with --overwrite"
    return ConfigError(key, value, f"has changed since the run in {str(folder.path)!r} began ({what}); {cure}")


def _flat(recipe: Recipe) -> dict[str, Any]:
    from .report.runfolder import flatten

    return dict(flatten(yaml.safe_load(recipe.to_yaml())))


def _selects_alike(recipe: Recipe, folder: RunFolder) -> bool:
    if not folder.recipe.is_file():
        return False
    saved = recipes.load(folder.recipe)
    return all(getattr(saved, part) == getattr(recipe, part) for part in ("model", "task", "data", "where", "seed"))
