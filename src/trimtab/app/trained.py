"""What a run folder holds of a training: its adapter, its classes, how far it came."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError, DataError
from ..plans import Plan
from ..train.checkpoint import checkpoints, what_is_wrong
from . import loading
from . import recipe as recipes
from .job import Job, load, trained_on
from .recipe import Recipe
from .report.words import count, some
from .runfolder import RunFolder
from .screen import Screen
from .spent import training_seconds
from .tasks.data import NO_VALIDATION

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn

    from .tasks import Task


@dataclass(frozen=True)
class Trained:
    """A model at the end of its training, or as far as that has come."""

    model: PeftModel
    plan: Plan
    seconds: float
    peak_memory_bytes: int | None
    """None where another process trained it, and did not say."""
    steps: Mapping[str, int] = field(default_factory=dict)
    """``step`` it has seen ``of`` so many; empty where nothing says, and it counts as finished."""

    @property
    def is_finished(self) -> bool:
        return not self.steps or self.steps["step"] >= self.steps["of"]


def load_run(recipe: Recipe, folder: RunFolder, screen: Screen, *, with_rows: bool = True) -> Job:
    """The job of a run that has been trained.

    Its classes are those that it was trained on, whatever the data says today: their order is that of the head.

    Raises:
        ConfigError: the recipe names other classes.
        DataError: the rows have other classes.
    """
    names = class_names(folder)
    try:
        job = load(recipe, screen, task_of_run(recipe, names), with_rows=with_rows)
    except DataError as error:  # where the recipe names no classes, they are the run's own
        raise DataError(str(error).replace("task.labels does not name", "the run was not trained on")) from error
    today = getattr(job.task, "label_names", None)
    if names is not None and today is not None and list(today) != names:
        raise DataError(
            f"task {job.task.name!r}: has the classes {some([*map(repr, today)])}, and the run in "
            f"{str(folder.path)!r} was trained on {some([*map(repr, names)])}; give it rows with these"
        )
    _refuse_rows_that_were_trained_on(job, recipe, folder)
    return job


def _refuse_rows_that_were_trained_on(job: Job, recipe: Recipe, folder: RunFolder) -> None:
    """Where rows to score are split off the training rows: others than then would hold some that were trained on."""
    before = folder.read(folder.about).get("data", {}) if folder.about.is_file() else {}
    is_split = recipe.data.held_out is not None or any(n.startswith(NO_VALIDATION) for n in job.task.notes)
    if not is_split or "fingerprint" not in before or "train" not in job.rows:
        return
    saved = recipes.load(folder.recipe, needs_rows=False)
    if any(getattr(saved.data, key) != getattr(recipe.data, key) for key in ("max_samples", "sample_seed")):
        return  # fewer of them, which tell nothing
    if trained_on(job)["fingerprint"] != before["fingerprint"]:
        raise ConfigError(
            "data.train",
            recipe.data.train or recipe.data.hub,
            f"as it is and is split now, the rows to score may be some that the run in {str(folder.path)!r} was "
            "trained on; put the rows back as they were, or name others in data.validation",
        )


def task_of_run(recipe: Recipe, names: Sequence[str] | None) -> Task:
    """The recipe's task, with the class names of a trained run where the task takes them."""
    from .tasks import get_task

    settings = recipe.require_task().model_dump()
    if names is None or settings["name"] != "text_classification":
        return get_task(settings)
    if (given := settings.get("labels")) is not None and list(map(str, given)) != list(names):
        raise ConfigError(
            "task.labels",
            given,
            f"the run was trained on {some([*map(repr, names)])}, in this order; leave the key out",
        )
    return get_task({**settings, "labels": list(names)})


def class_names(folder: RunFolder) -> list[str] | None:
    """Those that a run was trained on, in the order of their ids; None where nothing says.

    Raises:
        DataError: the run has not been trained.
    """
    place = trained_adapter(folder)
    began = folder.read(folder.about) if folder.about.is_file() else {}
    return began.get("data", {}).get("classes") or loading.saved_labels(place)


def trained_adapter(folder: RunFolder) -> Path:
    """Where the run's adapter lies: adapter/, or a complete checkpoint of later steps where the run went on since.

    Raises:
        DataError: the run has not been trained.
    """
    is_there = folder.adapter.is_dir()
    seen = steps_of(folder.adapter).get("step") if is_there else -1
    if seen is not None:  # else an earlier version's: that has no other
        for path in checkpoints(folder.checkpoints):
            if int(path.name.rpartition("-")[2]) > seen and what_is_wrong(path) is None:
                return path
    return folder.adapter if is_there else folder.need(folder.adapter, "train")


def steps_of(place: Path) -> dict[str, int]:
    """The ``step`` of training that an adapter or a checkpoint is from, ``of`` so many; empty where it does not say."""
    if place.name.startswith("checkpoint-"):
        state = json.loads((place / "trainer_state.json").read_text(encoding="utf-8"))
        return {"step": state["global_step"], "of": state["max_steps"]}
    made = loading.origin(place)
    return {key: made[key] for key in ("step", "of")} if {"step", "of"} <= made.keys() else {}


def load_trained(job: Job, folder: RunFolder, screen: Screen) -> Trained:
    """The run's adapter on its base model, by stock PEFT, with what the folder says about its training."""
    model = with_adapter(job.model, folder, screen)
    known = folder.read(folder.metrics) if folder.is_finished else {}
    plan = Plan.from_json(folder.read(folder.need(folder.plan, "train")))
    seconds, peak = known.get("seconds") or training_seconds(folder), known.get("peak_memory_bytes")
    return Trained(model, plan, seconds, peak, steps_of(trained_adapter(folder)))


def give_template(tokenizer: Any, folder: RunFolder) -> None:
    """Puts the chat template that the run was trained with into the tokenizer: rows to be answered may not tell it."""
    file = folder.adapter / "chat_template.jinja"
    if file.is_file():
        tokenizer.chat_template = file.read_text(encoding="utf-8")


def with_adapter(model: nn.Module, folder: RunFolder, screen: Screen) -> PeftModel:
    """The base model with the run's adapter, by stock PEFT."""
    from peft import PeftModel
    from safetensors import SafetensorError

    from ..adapters import bottleneck  # noqa: F401  PEFT then knows a bottleneck adapter's folder

    place = trained_adapter(folder)
    steps = steps_of(place)
    if place != folder.adapter or (steps and steps["step"] < steps["of"]):
        of = f", step {count(steps['step'])} of {count(steps['of'])}" if steps else ""
        screen.note(f"the run is unfinished: taking {place}{of}")
    try:
        return PeftModel.from_pretrained(cast(Any, model), str(place))
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        text = " ".join(str(error).split())[:200]
        cure = "" if place != folder.adapter else "; delete it, and the newest checkpoint is taken"
        raise DataError(f"{place}: damaged, or not of this model ({text}){cure}") from error
