"""A small search: every combination of some settings, tried on a part of the training rows.

    key=v1,v2 … -> trials, each a run folder of its own -> the best of them -> best.yaml

A trial is `trimtab run` in a process of its own, of the recipe with ``data.held_out``: a part of the training rows,
the same for all, is scored in place of validation and test, which no trial sees. What is in the folder decides what is
left to do, so that the same command goes on with a search that was killed, or with a larger one.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from ..errors import ConfigError, DataError, TrimtabError
from . import recipe as recipes
from .lookup import parse_yaml
from .outputs import check_folder
from .recipe import Recipe
from .runfolder import RunFolder, write_recipe, write_text
from .screen import Screen
from .session import same_recipe
from .stopping import Stopped
from .storage import alone

HELD_OUT = 0.2
_STATE = "search.json"
# In these trials would be scored on other rows, or by another measure.
_SAME_FOR_ALL = {
    "output_dir": "every trial has a folder of its own",
    "data": "trials are compared on the same rows",
    "task": "trials are compared on the same task",
    "task.name": "trials are compared on the same task",
    "task.metric": "trials are compared by one score",
    "task.label": "trials are compared on the same labels",
    "task.labels": "trials are compared on the same labels",
    "task.regression": "trials are compared on the same labels",
}
# A mean over tokens says nothing across these: other tokens, or other rows, are counted.
_OTHER_TOKENS = (
    *("model", "model.name_or_path", "model.gguf_file", "model.revision", "model.tokenizer"),
    *("task.max_length", "task.max_target_length", "task.template", "task.text", "task.pack", "task.sample_by"),
)


class SearchError(TrimtabError):
    """The search ended without a choice; the command exits with 1."""


@dataclass
class Trial:
    """One run of the search."""

    settings: dict[str, Any]
    """What was varied, by dotted key; the seed among it if that was."""
    recipe: Recipe
    folder: RunFolder
    total_steps: int | None = None
    state: str = "waiting"
    """waiting, running, done, diverged (its score is not finite), failed."""
    error: str = ""

    @property
    def step(self) -> int:
        """Optimizer steps done, as its history says."""
        if not self.folder.history.is_file():
            return 0
        with self.folder.history.open("rb") as file:
            file.seek(max(0, self.folder.history.stat().st_size - 4096))
            steps = re.findall(rb'"step": (\d+)', file.read())
        return int(steps[-1]) if steps else 0

    @property
    def found(self) -> dict[str, Any]:
        return self.folder.read(self.folder.metrics) if self.folder.is_finished else {}


@dataclass
class Candidate:
    """Trials that differ by their seed alone; the search is among these."""

    settings: dict[str, Any]
    trials: list[Trial]
    overrides: list[str]
    score: float | None = None
    loss: float = math.inf
    """Held-out loss, which decides between equal scores."""


@dataclass
class Search:
    """What was tried and what came out."""

    folder: Path
    keys: list[str]
    candidates: list[Candidate]
    metric: str
    greater_is_better: bool
    held_out_rows: int | None = None
    best: Candidate | None = None
    recipe: Path | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def trials(self) -> list[Trial]:
        return [trial for candidate in self.candidates for trial in candidate.trials]

    @property
    def ranked(self) -> list[Candidate]:
        """The best first; those without a score last."""
        sign = -1 if self.greater_is_better else 1
        return sorted(self.candidates, key=lambda one: (one.score is None, sign * (one.score or 0.0), one.loss))

    @property
    def chosen_by(self) -> str:
        return f"{self.metric} ({'higher' if self.greater_is_better else 'lower'} is better)"

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder), "metric": self.metric, "greater_is_better": self.greater_is_better,
            "held_out_rows": self.held_out_rows, "best": self.best and self.best.settings,
            "recipe": self.recipe and str(self.recipe), "notes": self.notes,
            "candidates": [{
                "settings": one.settings, "score": one.score, "loss": one.loss if math.isfinite(one.loss) else None,
                "trials": [{"folder": str(t.folder.path), "seed": t.recipe.seed, "state": t.state,
                            "params": t.found.get("params"), "seconds": t.found.get("seconds"),
                            **({"error": t.error} if t.error else {})} for t in one.trials],
            } for one in self.ranked],
        }  # fmt: skip


def tune(
    source: str, texts: Sequence[str], out: Path, screen: Screen, *, jobs: int = 1, overwrite: bool = False
) -> Search:
    """The whole search, from where the folder stands.

    Args:
        texts: ``key=v1,v2`` to search over, ``key=value`` to set.
    Raises:
        ConfigError: a key or a value cannot be, alone or together with others. Before anything is loaded.
    """
    search = _laid_out(source, texts, out)
    check_folder(out, lambda place: (place / _STATE).is_file(), "search of trimtab tune")
    with screen.stage("plan") as stage:
        _check(search)
        tried = len(search.trials)
        stage.result = f"{tried} trials, chosen by {search.chosen_by}, {jobs} at a time"
    with alone(out, "out", patience=5.0) as lock:  # trials of a search that was just killed are about to end
        _take_folder(search, overwrite)
        _run_all(search, screen, jobs, lock)
        return _choose(search, source, texts)


# -- what is to be tried -------------------------------------------------------------------------------


def split_values(text: str) -> list[str]:
    """The values of a list with commas; those inside of brackets and quotes belong to one value.

    >>> split_values("[query, value],[query]"), split_values("1e-3,1e-4"), split_values("'a,b'")
    (['[query, value]', '[query]'], ['1e-3', '1e-4'], ["'a,b'"])
    """
    values, start, depth, quote = [], 0, 0, ""
    for i, character in enumerate(text):
        if quote:
            quote = "" if character == quote else quote
        elif character in "\"'" and text[start:i].rstrip()[-1:] in ("", *"[{(,:"):
            quote = character  # an apostrophe inside of a word opens nothing
        elif character in "[{(":
            depth += 1
        elif character in ")}]":
            depth -= 1
        elif character == "," and depth == 0:
            values.append(text[start:i])
            start = i + 1
    return [value.strip() for value in (*values, text[start:])]


def _grid(texts: Sequence[str]) -> dict[str, list[str]]:
    """Key -> its values as they were written."""
    grid: dict[str, list[str]] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError("override", text, "must read key=value, or key=v1,v2 to search over")
        values = split_values(value)
        if key in grid:
            raise ConfigError(key, value, f"given twice; write {key}={','.join(grid[key])},{value}")
        if len(values) > 1:
            if "" in values:
                raise ConfigError(key, value, "has an empty value between its commas")
            parsed = [repr(parse_yaml(one, key)) for one in values]
            if twice := next((one for i, one in enumerate(parsed) if one in parsed[:i]), None):
                raise ConfigError(key, value, f"holds {twice} twice")
            if why := _SAME_FOR_ALL.get(key) or _SAME_FOR_ALL.get(key.split(".")[0] if key.startswith("data") else ""):
                raise ConfigError(key, value, f"cannot be searched over: {why}")
        grid[key] = values
    if not any(len(values) > 1 for key, values in grid.items() if key != "seed"):
        raise ConfigError(
            "search",
            " ".join(texts) or None,
            "nothing to choose from; give a key several values: train.learning_rate=1e-4,1e-3",
        )
    return grid


def _laid_out(source: str, texts: Sequence[str], out: Path) -> Search:
    """Every trial, its recipe checked, nothing loaded."""
    from .tasks import get_task

    grid = _grid(texts)
    if (held := recipes.load(source).data.held_out) is not None:
        raise ConfigError(
            "data.held_out",
            held,
            "leave it out of the recipe: the search holds out rows of its own; "
            "give it on the command line to set how many",
        )
    varied = [key for key, values in grid.items() if len(values) > 1]
    held_out = [] if "data.held_out" in grid else [f"data.held_out={HELD_OUT}"]
    candidates: dict[str, Candidate] = {}
    names: set[str] = set()
    for values in itertools.product(*grid.values()):
        overrides = [f"{key}={value}" for key, value in zip(grid, values)]
        recipe = recipes.load(source, [*overrides, *held_out])
        settings = {key: parse_yaml(value, key) for key, value in zip(grid, values) if key in varied}
        task = get_task(recipe.require_task().model_dump())
        name = _name(settings)
        if name in names:  # [query] and query, a list and a regex
            name = f"{name}-{_digest(repr(settings))}"
        names.add(name)
        recipe = recipe.model_copy(update={"output_dir": str(out / "trials" / name), "base_rows": 0})
        trial = Trial(settings, recipe, RunFolder(out / "trials" / name))
        without_seed = {key: value for key, value in settings.items() if key != "seed"}
        candidates.setdefault(repr(without_seed), Candidate(without_seed, [], overrides)).trials.append(trial)
    search = Search(out, varied, list(candidates.values()), task.metric, task.greater_is_better)
    _refuse_other_tokens(search)
    return search


def _refuse_other_tokens(search: Search) -> None:
    from .trainer import OF_ANSWERS

    for key in search.keys:
        if search.metric in OF_ANSWERS and key in _OTHER_TOKENS:
            raise ConfigError(
                key,
                None,
                f"cannot be searched over by {search.metric}, a mean over tokens: other values of it mean other tokens",
            )


def _name(settings: dict[str, Any]) -> str:
    """A folder name for some settings; one that had to be shortened ends in a digest of them."""
    whole = ",".join(f"{key}={_value_text(value)}" for key, value in settings.items())
    name = re.sub(r"[^\w.,=+-]", "_", whole)[:80]
    return name if name == whole else f"{name}-{_digest(whole)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _value_text(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_value_text, value))
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _check(search: Search) -> None:
    """A dry run of every candidate, without weights: what cannot work is refused before the first trial."""
    from .planning import horizon_of, plan_recipe
    from .rows import load_rows, rows_known
    from .tasks import get_task
    from .trainer import training_arguments

    loaded: dict[str, tuple[Any, int | None]] = {}
    for candidate in search.candidates:
        recipe = candidate.trials[0].recipe
        spec = recipe.require_task().model_dump()
        if repr(spec) not in loaded:
            task = get_task(spec)
            rows = load_rows(recipe, task)
            loaded[repr(spec)] = task, rows_known(task, rows)
        task, n = loaded[repr(spec)]
        training_arguments(recipe, task, Path())
        horizon = horizon_of(recipe, n)
        plan_recipe(recipe, horizon, task)
        for trial in candidate.trials:
            trial.total_steps = horizon.total_steps if horizon else None


# -- the folder ----------------------------------------------------------------------------------------


def _training_files(train: str | Sequence[str]) -> list[Path]:
    """Every file that folders and patterns stand for, those inside of a saved dataset, too."""
    from .tasks.files import existing_files

    paths = [train] if isinstance(train, str) else train
    found = [file for path in paths for file in existing_files("data.train", path, "train")]
    return [
        file
        for place in found
        for file in (sorted(p for p in place.rglob("*") if p.is_file()) if place.is_dir() else [place])
    ]


def _take_folder(search: Search, overwrite: bool) -> None:
    """Refuses a folder whose trials are of another recipe or other data, and marks what is done."""
    state = search.folder / _STATE
    if overwrite and state.is_file():
        shutil.rmtree(search.folder / "trials", ignore_errors=True)
        for name in (_STATE, "best.yaml"):
            (search.folder / name).unlink(missing_ok=True)
    data = {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        for path in _training_files(search.trials[0].recipe.data.train or [])
    }
    before = json.loads(state.read_text(encoding="utf-8"))["data"] if state.is_file() else data
    if changed := [path for path, digest in data.items() if before.get(path, digest) != digest]:
        raise ConfigError(
            "data",
            changed[0],
            "has changed since the search in this folder began; start again with --overwrite, or name another folder",
        )
    for trial in search.trials:
        if trial.folder.recipe.is_file():
            same_recipe(trial.recipe, trial.folder)
    write_text(state, json.dumps({"data": data}, indent=1) + "\n")
    for trial in search.trials:
        _settle(trial)


def _settle(trial: Trial) -> None:
    """State of a trial that does not run, by what its folder holds."""
    if trial.folder.is_finished:
        losses = [value for name, value in trial.found["metrics"].items() if name == "loss" or name.endswith("_loss")]
        trial.state = "done" if all(map(math.isfinite, losses)) else "diverged"


# -- trials --------------------------------------------------------------------------------------------


def _run_all(search: Search, screen: Screen, jobs: int, lock: IO[str] | None) -> None:
    from rich.live import Live

    from .tables import tune_table

    waiting = [trial for trial in search.trials if trial.state == "waiting"]
    if kept := len(search.trials) - len(waiting):
        screen.note(f"{kept} of {len(search.trials)} trials are finished already")
    running: list[tuple[Trial, subprocess.Popen[bytes]]] = []
    is_live = screen.console.is_terminal and not screen.quiet
    live: Any = Live(console=screen.console, auto_refresh=False, transient=True) if is_live else None
    drawn = 0.0
    with live or contextlib.nullcontext():
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    trial = waiting.pop(0)
                    running.append((trial, _start(trial, jobs, lock)))
                    trial.state = "running"
                for trial, process in list(running):
                    code = process.poll()
                    if code is None:
                        continue
                    running.remove((trial, process))
                    _end(trial, code)
                    screen.note(_line(search, trial))
                    if code == 2:  # bad input, most likely for all of them
                        waiting.clear()
                if live and time.monotonic() - drawn > 0.5:
                    _score(search)
                    live.update(tune_table(search), refresh=True)
                    drawn = time.monotonic()
                time.sleep(0.1)
        except Stopped:
            screen.note("finished trials are kept: the same command goes on with the others")
            raise
        finally:
            for _, process in running:
                process.terminate()
            for _, process in running:
                process.wait()


def _start(trial: Trial, jobs: int, lock: IO[str] | None) -> subprocess.Popen[bytes]:
    """`trimtab run` of the trial's folder: from its last checkpoint where there is one, else anew."""
    folder = trial.folder
    write_recipe(trial.recipe, folder)
    goes_on = any(folder.checkpoints.glob("checkpoint-*/trainer_state.json"))
    threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
    with (folder.path / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "trimtab", "run", str(folder.path), "--resume" if goes_on else "--overwrite"],
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **threads},
            pass_fds=() if lock is None else (lock.fileno(),), preexec_fn=_ends_with_us if _LIBC else None,
        )  # fmt: skip


_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def _ends_with_us() -> None:
    """Linux: a trial does not outlive a search that is killed."""
    if _LIBC:
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(trial: Trial, code: int) -> None:
    _settle(trial)
    if trial.state == "running" or (code and trial.state != "diverged"):
        said = (trial.folder.path / "output.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line.removeprefix("error: ") for line in said if line.startswith("error: ")]
        trial.state, trial.error = "failed", (errors or said or [f"ended with {code}"])[-1]


def _line(search: Search, trial: Trial) -> str:
    """A trial that has ended, in one line."""
    told = _name(trial.settings) if len(_name(trial.settings)) < 80 else trial.folder.path.name
    if trial.state == "failed":
        return f"{told}: failed: {trial.error}"
    return f"{told}: {trial.state}, {search.metric} {trial.found['metrics'].get(search.metric, float('nan')):.4g}"


# -- the choice ----------------------------------------------------------------------------------------


def _score(search: Search) -> None:
    """Scores of the candidates all of whose trials are done. One seed that diverged leaves none."""
    for one in search.candidates:
        one.score, one.loss = None, math.inf
        if all(trial.state == "done" for trial in one.trials):
            found = [trial.found["metrics"] for trial in one.trials]
            scores = [metrics.get(search.metric, math.nan) for metrics in found]
            if all(map(math.isfinite, scores)):
                one.score = statistics.fmean(scores)
            one.loss = statistics.fmean(metrics.get("loss", math.inf) for metrics in found)


def _choose(search: Search, source: str, texts: Sequence[str]) -> Search:
    """The best candidate -> best.yaml.

    Raises:
        DataError: a trial is missing, or they cannot be ranked.
    """
    if failed := [trial for trial in search.trials if trial.state in ("failed", "waiting")]:
        errors = [trial.error for trial in failed if trial.error]
        raise SearchError(
            f"{len(failed)} of {len(search.trials)} trials did not finish, so nothing is chosen: "
            f"{errors[0] if errors else 'stopped'} (the same command tries them again)"
        )
    done = [trial for trial in search.trials if trial.state == "done"]
    if done and not any(search.metric in trial.found["metrics"] for trial in done):
        from .tasks import get_task

        loss = get_task(done[0].recipe.require_task().model_dump()).training_metric
        if loss is None:
            raise DataError(
                f"the task's {search.metric} was not taken on the rows held out; there is "
                f"{', '.join(done[0].found['metrics'])}"
            )
        search.notes.append(f"{search.metric} cannot be taken on training rows; chosen by {loss}")
        search.metric, search.greater_is_better = loss, False
        _refuse_other_tokens(search)
    scored = [trial.folder.read(trial.folder.predictions) for trial in done]
    kept: list[dict[str, Any]] = [next(iter(splits.values()), {}) for splits in scored]
    same = ("rows",) if any(key.startswith("task.") for key in search.keys) else ("rows", "fingerprint")
    if len({tuple(one.get(key) for key in same) for one in kept}) > 1:
        raise DataError(
            "the trials were scored on different rows, so they cannot be ranked: task.max_length left "
            "some out, or a file changed"
        )
    search.held_out_rows = kept[0].get("rows") if kept else None
    _score(search)
    first = search.ranked[0]
    if first.score is None:
        raise SearchError("no trial ended with a finite score: try lower learning rates")
    search.best = first
    if n := sum(trial.state == "diverged" for trial in search.trials):
        search.notes.append(f"{n} of {len(search.trials)} trials diverged (their loss is not a number)")
    search.notes.append(_how_clear([t for one in search.candidates if one.score is not None for t in one.trials]))
    fixed = [text for text in first.overrides if text.partition("=")[0] not in ("data.held_out", "data.held_out_seed")]
    fixed = [text for text in fixed if "seed" not in search.keys or not text.startswith("seed=")]
    # Whole, so that the recipe does the same from wherever it is run, as its paths of data do.
    best = recipes.load(source, fixed).model_copy(update={"output_dir": str((search.folder / "best").resolve())})
    search.recipe = search.folder / "best.yaml"
    write_text(
        search.recipe,
        f"# Chosen by trimtab tune among {len(search.candidates)}: {search.metric} "
        f"{first.score:.6g} on {search.held_out_rows} held-out training rows.\n{best.to_yaml()}",
    )
    return search


def _how_clear(scored: Sequence[Trial]) -> str:
    """Whether the choice is more than chance, as `trimtab compare` tells it."""
    from .report import compare

    table = compare([trial.folder.path for trial in scored])
    return f"{table.finding}."
