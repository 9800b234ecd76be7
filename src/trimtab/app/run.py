"""A run, from recipe to report: each stage takes what the last one returned and writes one file.

    recipe.yaml -> where.json -> plan.json, history.jsonl, checkpoints/ -> adapter/ -> metrics.json -> report.html

Training is the stock `transformers.Trainer` over a stock `peft.get_peft_model`; what Trimtab adds goes in as
a config and a callback.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError, DataError, ExportError
from ..plans import Plan, SitePlan, Where
from ..train.checkpoint import checkpoints, what_is_wrong
from . import card, judging, loading, model_facts, models, runfolder, stopping, trainer_settings
from . import recipe as recipes
from .peft_config import adapter_config, choose_own, choose_without_data, layers_to_choose_from, reads_rows
from .planning import (
    chosen_among,
    horizon_of,
    load_rows,
    model_spec,
    plan_of_run,
    plan_recipe,
    with_initial_ranks,
    with_layer_ratio,
)
from .progress import progress_on
from .recipe import Recipe
from .report.words import byte_size, count, number, some
from .runfolder import RunFolder
from .screen import Screen, Stage
from .trainer import early_stopping, let_go_of_previous, make_trainer, save_at_end, training_arguments

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from peft import PeftModel
    from torch import nn
    from transformers import Trainer

    from ..rank.start import StartSettings
    from .tasks import Task

ADAPTER_CONFIG = "adapter_config.json"


def run(recipe: Recipe, folder: Path, screen: Screen, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """The whole flow. Returns the folder; its `metrics.json` and `report.html` say how it went."""
    with runfolder.session(recipe, folder, overwrite=overwrite, resume=resume) as session:
        job = load(recipe, screen)
        out = session.begin(trained_on(job))
        where = select(job, out, screen, anew=overwrite)
        trained = train(job, where, out, screen, resume=resume)
        export_run(job, trained, out, screen)
        evaluate(job, trained, out, screen)
        warn(out, screen)
        write_report(out, screen)
    return out


# -- load ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What every stage needs: the recipe's task with its rows, and the base model."""

    recipe: Recipe
    task: Task
    rows: DatasetDict
    tokenizer: Any
    model: nn.Module
    modules_to_save: tuple[str, ...]
    ready: DatasetDict
    """Tokenised rows."""


def load(recipe: Recipe, screen: Screen, task: Task | None = None, *, with_rows: bool = True) -> Job:
    """Task, rows, tokenizer and base model.

    A dry run comes first: targets that match nothing, a schedule that does not fit and the like are refused
    before any weights are read.

    Args:
        task: the recipe's, with what is known of it from elsewhere.
        with_rows: else none are read, unless the task knows its classes by them alone.
    """
    trainer_settings.check_machine(recipe.train)
    from datasets import DatasetDict
    from transformers import set_seed

    from .tasks import get_task

    with screen.stage("load") as stage:
        task = task or get_task(recipe.require_task().model_dump())
        spec = model_spec(recipe)
        bar = stage.bar(None, "data")
        training_arguments(recipe, task, Path())  # before rows and weights are read
        rows = load_rows(recipe, task) if with_rows or not knows_classes(task) else DatasetDict()
        if "train" in rows:
            n = len(rows["train"]) if getattr(task, "counts_rows", True) else None
            plan_recipe(recipe, horizon_of(recipe, n), task)
        bar.say("model")
        tokenizer = models.load_tokenizer(spec, task)
        set_seed(recipe.seed)  # a new head is drawn here
        loaded = models.load_model(spec, task, tokenizer)
        bar.say("tokens")
        ready = task.prepare(rows, tokenizer, loaded.model)
        counted = ", ".join(f"{count(len(split))} {name}" for name, split in ready.items())
        if "train" in rows:
            horizon = horizon_of(recipe, len(ready["train"]))
            recipe = with_layer_ratio(recipe, loaded.model, horizon, task.task_type, loaded.modules_to_save)
        stage.result = " · ".join(filter(None, (recipe.model.name_or_path, counted and f"{counted} rows")))
    for note in (*task.notes, *loaded.notes):
        screen.note(note)
    return Job(recipe, task, rows, tokenizer, loaded.model, loaded.modules_to_save, ready)


def knows_classes(task: Task) -> bool:
    """Whether a task can say its classes without the training rows."""
    try:
        task.model_kwargs()
    except ConfigError:  # before the training rows are read
        return False
    return True


def trained_on(job: Job) -> dict[str, Any]:
    """What the training rows hold, by which a later command knows them again: run.json keeps it."""
    if "train" not in job.rows:
        return {}
    names = getattr(job.task, "label_names", None)
    found = {"rows": len(job.rows["train"]), "fingerprint": fingerprint(job.rows["train"], whole=True)}
    return {**found, "classes": list(names)} if names else found


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
    return job


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


# -- select --------------------------------------------------------------------------------------------


def select(job: Job, folder: RunFolder, screen: Screen, *, anew: bool = False) -> Where | None:
    """Which layers are adapted -> where.json. A selection already in the folder is taken as it is, unless ``anew``:
    then it is an earlier run's, which the main process may not have moved away yet."""
    settings = job.recipe.where
    if settings is None:
        return None
    with screen.stage("select") as stage:
        saved = None if anew else folder.saved_where()
        among = None if saved else _among(job, settings)
        where = saved or _choose(job, settings, stage, among)
        if not saved:
            folder.write(folder.where, where.to_json())
        stage.result = " · ".join(_where_text(where)) + (" (from where.json)" if saved else "")
    for note in (*chosen_among(among, where), *(where.scores or {}).get("warnings", ())):
        screen.note(note)
    return where


def selections(job: Job, settings: Mapping[str, recipes.Where], screen: Screen) -> dict[str, Where]:
    """What each of several methods would choose, by its name; nothing is written."""
    found = {}
    for name, own in settings.items():
        with screen.stage(name) as stage:
            found[name] = _choose(job, own, stage, _among(job, own))
            stage.result = " · ".join(_where_text(found[name]))
    return found


def _among(job: Job, settings: recipes.Where) -> Mapping[str, Sequence[int]] | None:
    return layers_to_choose_from(job.recipe, settings, job.model, job.task.task_type, job.modules_to_save)


def _choose(job: Job, settings: recipes.Where, stage: Stage, among: Mapping[str, Sequence[int]] | None) -> Where:
    import trimtab

    from ..where import METHODS

    if not reads_rows(settings):
        return choose_without_data(job.model, settings, job.recipe.seed, among)
    own = METHODS.get(settings.method)
    rows = job.ready["train"] if own and own.needs_labels else job.task.selection_rows(job.ready)
    if settings.seed is not None:
        rows = rows.shuffle(seed=settings.seed)
    if settings.samples != "all":
        rows = rows.select(range(min(settings.samples, len(rows))))
    batches = _batches(rows, job, settings.batch_size)
    if settings.method != "cka":
        batches = _on_device(stage.track(batches), job.model)
        return choose_own(job.model, settings, job.recipe.seed, batches, among)
    pool = job.task.pool(job.model.config) if settings.pool == "auto" else settings.pool
    scores = trimtab.layer_similarity(job.model, stage.track(batches), pool=pool, estimator=settings.estimator)
    return trimtab.select_layers(
        scores,
        ratio=settings.ratio,
        count=settings.count,
        exclude=settings.exclude,
        degenerate=settings.degenerate,
        among=among,
    )


def _on_device(batches: Iterable[Any], model: nn.Module) -> Iterator[Any]:
    device = next(model.parameters()).device
    for batch in batches:
        yield {key: value.to(device) if hasattr(value, "to") else value for key, value in batch.items()}


def _batches(rows: Dataset, job: Job, batch_size: int) -> Any:
    """Padded batches on the model's device. Rows of like length go together; the order does not matter."""
    from torch.utils.data import DataLoader

    lengths = [len(ids) for ids in rows["input_ids"]] if "input_ids" in rows.column_names else None
    order = sorted(range(len(rows)), key=lengths.__getitem__) if lengths else list(range(len(rows)))
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return DataLoader(rows, batch_sampler=groups, collate_fn=job.task.collator(job.tokenizer))  # type: ignore[arg-type]


def _where_text(where: Where) -> list[str]:
    return [f"{where.method}: {mask.count('1')} of {len(mask)} layers {mask}" for mask in where.stacks.values()]


# -- train ---------------------------------------------------------------------------------------------


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


def train(job: Job, where: Where | None, folder: RunFolder, screen: Screen, *, resume: bool = False) -> Trained:
    """Trains -> history.jsonl, timing.jsonl, checkpoints/, and plan.json with what was decided."""
    import peft
    from transformers import set_seed

    import trimtab

    from ..rank.base import starter_of
    from .report.runfolder import read

    recipe = job.recipe
    if "learning_rate" not in recipe.train:
        screen.note("train.learning_rate is not set: the Trainer's 5e-5 suits whole models; adapters take 1e-4 to 1e-3")
    rows = len(_split(job, "train"))
    config = adapter_config(
        recipe, job.model, where=where, task_type=job.task.task_type, modules_to_save=job.modules_to_save
    )
    planned = replace(plan_of_run(recipe, job.model, config, horizon_of(recipe, rows), rows), where=where)
    planned = replace(planned, settings={**planned.settings, "data": data_of(job)})
    started = folder.read(folder.plan)["settings"].get("start") if resume and folder.plan.is_file() else None
    folder.write(folder.plan, planned.to_json())
    if recipe.budget is not None:  # what was chosen, and why
        for note in planned.notes:
            screen.note(note)
    set_seed(recipe.seed)
    callback = trimtab.TrimCallback(history=folder.history)
    model = peft.get_peft_model(job.model, config)
    checkpoint = runfolder.checkpoint_to_resume(folder) if resume else None
    if (starter := starter_of(config)) is not None:
        if checkpoint is None:
            started = initialize(job, model, starter, screen)
        if started is not None:
            planned = with_initial_ranks(planned, started, config, horizon_of(recipe, rows))
            folder.write(folder.plan, planned.to_json())
    with screen.stage("train") as stage, stopping.saving_first() as save_and_stop:
        callbacks = [
            let_go_of_previous(folder),
            save_and_stop,
            callback,
            progress_on(stage, callback),
            save_at_end(),
            *early_stopping(job),
        ]
        trainer = make_trainer(job, model, folder, callbacks, recipe.rates, is_tracked=True)
        _reset_peak_memory()
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=model_facts.unread_outputs(model))
        seconds = _seconds(folder, time.monotonic() - began)
        params = read(folder.path).measured_params(trainer.state.global_step) if runfolder.is_main() else {}
        if callback.controller is not None:
            params["held"] = callback.controller.figures()["held"]
        final = final_plan(planned, model, params)
        folder.write(folder.plan, final.to_json())
        loss = next((row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row), None)
        stage.result = (
            f"{count(trainer.state.global_step)} steps · loss {number(loss)} · "
            f"{count(params.get('final'))} trainable parameters"
        )
    last = trainer.state.global_step
    return Trained(model, final, seconds, peak_memory(), {"step": last, "of": last})


def initialize(job: Job, model: PeftModel, starter: StartSettings, screen: Screen) -> dict[str, Any]:
    """Ranks and factors that a method chooses from training rows; what it chose, and how, as JSON."""
    from torch.utils.data import DataLoader

    import trimtab

    with screen.stage("start") as stage:
        stage.bar(None, starter.method)
        rows = _split(job, "train").shuffle(seed=job.recipe.seed)
        rows = rows.select(range(min(starter.samples, len(rows))))
        collate = job.task.collator(job.tokenizer)
        started = trimtab.initialize_ranks(model, DataLoader(rows, starter.batch_size, collate_fn=collate))
        stage.result = started.told
    return started.to_json()


def _split(job: Job, name: str) -> Dataset:
    if name not in job.ready:
        raise DataError(f"task {job.task.name!r}: the data has no {name!r} split; it has {', '.join(job.ready)}")
    return job.ready[name]


def final_plan(planned: Plan, model: PeftModel, params: Mapping[str, float]) -> Plan:
    """The plan with what training made of it: ranks that stayed, and measured parameters."""
    from ..host.adapted import adapter_ranks

    ranks = adapter_ranks(model)
    sites = tuple(
        SitePlan(p.site, p.r, p.trainable_params, ranks.get(p.site.name, p.final_r or 0)) for p in planned.sites
    )
    settings = {**planned.settings, "predicted_params": planned.params}
    return replace(planned, sites=sites, params={**planned.params, **params}, settings=settings)


# -- export, evaluate, report --------------------------------------------------------------------------


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
    seconds, peak = known.get("seconds") or _seconds(folder), known.get("peak_memory_bytes")
    return Trained(model, plan, seconds, peak, steps_of(trained_adapter(folder)))


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


def export_run(job: Job, trained: Trained, folder: RunFolder, screen: Screen) -> None:
    """adapter/ as stock PEFT reads it, and merged/ or gguf/ beside it if the recipe asks for one.

    An adapter that no weight can hold is saved as it is, and a remark says why.
    """
    from ..exporting.formats import why_no_lora_form
    from ..host.adapted import peft_model_of

    form = job.recipe.export.format
    if reason := why_no_lora_form(peft_model_of(trained.model)):
        keep(job, trained, folder, folder.adapter, screen)
        screen.note(reason.partition(". ")[0])
        return
    is_beside = form in ("merged", "gguf")
    export(job, trained, folder, folder.adapter, "peft" if is_beside else form, screen)
    if is_beside:
        export(job, trained, folder, folder.path / form, form, screen)


def keep(job: Job, trained: Trained, folder: RunFolder, target: Path, screen: Screen) -> Path:
    """The adapter in its own form, with the tokenizer beside it."""
    from ..host.sharding import reshard

    save = cast(Any, trained.model).save_pretrained
    reshard(trained.model)  # on every process; on the one that writes, saving does so
    return _write(job, trained, folder, target, job.recipe.adapter.type, screen, lambda half: save(str(half)))


def export(job: Job, trained: Trained, folder: RunFolder, target: Path, form: str, screen: Screen) -> Path:
    """The adapter in one form (peft, padded, gguf or merged), with the tokenizer beside it."""
    import trimtab

    from ..host.sharding import is_sharded

    model = trained.model
    if is_sharded(model) and not runfolder.is_main():
        trimtab.export(model, target, format=form)  # takes part, and writes nothing
    return _write(job, trained, folder, target, form, screen, lambda half: trimtab.export(model, half, format=form))


def _write(
    job: Job,
    trained: Trained,
    folder: RunFolder,
    target: Path,
    what: str,
    screen: Screen,
    save: Callable[[Path], object],
) -> Path:
    if not runfolder.is_main():
        return target
    with screen.stage("export") as stage, runfolder.whole(target) as half:
        save(half)
        (half / card.CARD).unlink(missing_ok=True)  # PEFT's, which names this machine's folders
        base = _name_base(job, half)
        job.tokenizer.save_pretrained(half)
        loading.save_labels(job.task, half)
        loading.save_origin(half, folder, what, trained.steps)
        written = sum(file.stat().st_size for file in half.rglob("*") if file.is_file())
        stage.result = f"{what} · {target} ({byte_size(written)})"
    if (target / ADAPTER_CONFIG).is_file():
        card.write(job, folder, target, base)
        if base is None and job.recipe.model.name_or_path is not None:
            screen.note(
                f"{target.name}/{ADAPTER_CONFIG} names the base model by a folder of this machine; "
                "export.base_model=ORG/NAME says where others find it"
            )
    return target


def _name_base(job: Job, folder: Path) -> str | None:
    """The base model's hub id, which is put into an adapter's config; None for a merged model, too."""
    from ..exporting.basemodel import name_base

    if not (folder / ADAPTER_CONFIG).is_file():
        return None
    return name_base(folder, job.recipe.export.base_model, job.recipe.model.revision)


def evaluate(job: Job, trained: Trained, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    """Scores on the task's labelled splits -> metrics.json."""
    _say_unscored(job, screen)
    metrics = score(job, trained.model, folder, screen, folder.answers, folder.predictions)
    sections = {name: getattr(job.recipe, name) for name in ("where", "rank", "freeze", "adapter")}
    result = {
        "metrics": metrics,
        "metric": job.task.metric,
        "greater_is_better": getattr(job.task, "greater_is_better", True),
        "params": dict(trained.plan.params),
        "seconds": round(trained.seconds, 3),
        "peak_memory_bytes": trained.peak_memory_bytes,
        "model": job.recipe.model.name_or_path,
        "task": job.task.name,
        "train_samples": len(_split(job, "train")),
        "new_modules": list(job.modules_to_save),
        **{name: part.model_dump(mode="json", exclude_none=True) if part else None for name, part in sections.items()},
        "seed": job.recipe.seed,
        "data": data_of(job),
        "load": loading.lines(job, folder),
        **({} if trained.is_finished else {"unfinished": trained.steps}),
    }
    folder.write(folder.metrics, result)
    if metrics and not folder.base.is_file():
        _score_without_adapter(job, trained.model, folder, screen)
    if runfolder.is_main() and (folder.adapter / ADAPTER_CONFIG).is_file():  # now with the scores
        card.write(job, folder, folder.adapter, _name_base(job, folder.adapter))
    return result


def _say_unscored(job: Job, screen: Screen) -> None:
    """Files given for testing that have no labels: scores of another split are not to be taken for theirs."""
    scored = job.task.eval_splits(job.ready)
    for split in job.ready:
        file = getattr(job.recipe.data, split, None)
        if file and scored and split not in scored and split.startswith("test"):
            note = f"data.{split}={file!r} has no labels and is not scored: the scores are those of {scored[0]}"
            job.task.notes.append(note)  # metrics.json has it, too
            screen.note(note)


def data_of(job: Job) -> dict[str, Any]:
    """What was read: rows and classes of each split, and what was said of them."""
    names, column = getattr(job.task, "label_names", None), getattr(job.task, "label_column", "")
    classes = {}
    for split, part in job.rows.items():
        if names is not None and column in part.column_names:
            counts = Counter(part[column][:])
            classes[split] = {name: counts[i] for i, name in enumerate(names)}
    rows = {split: len(part) for split, part in job.ready.items()}
    return {"rows": rows, **({"classes": classes} if classes else {}), "notes": list(dict.fromkeys(job.task.notes))}


def evaluate_base(job: Job, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    """Scores of the model as it is, without an adapter -> base.json, to be read beside those after training."""
    _say_unscored(job, screen)
    result = _of_base(job, job.model, folder, screen)
    folder.write(folder.base, result)
    return result


def _of_base(job: Job, model: nn.Module, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    return {
        "metrics": score(job, model, folder, screen, folder.answers / "base", name="base"),
        "metric": job.task.metric,
        "task": job.task.name,
        "seed": job.recipe.seed,
        **runfolder.what_was_scored(job.recipe),
    }


def _score_without_adapter(job: Job, model: PeftModel, folder: RunFolder, screen: Screen) -> None:
    """Scores of the trained model with its adapter off -> base.json; no second model is loaded.

    Where answers are written, which takes a base model long, the first ``base_rows`` of the headline split alone are
    answered, and the adapter's scores of these stand beside them. A new head would be scored untrained: left out.
    """
    from ..exporting.formats import refuse_a_changed_base

    most, split = job.recipe.base_rows, job.task.eval_splits(job.ready)[0]
    rows = len(job.rows[split])
    if most == 0 or job.modules_to_save:
        return
    try:
        refuse_a_changed_base(model, model.active_adapter)
    except ExportError:
        screen.note("training changed the base itself, so that it is not scored beside; see trimtab eval --base")
        return
    few = job
    if most != "all" and most < rows and _writes_answers(job.task, job.rows[split]):
        few = replace(job, rows=_first(job.rows, split, most), ready=_first(job.ready, split, most))
    with model.disable_adapter():
        found = _of_base(few, model, folder, screen)
    if few is not job:
        with tempfile.TemporaryDirectory() as kept:  # the answers that are there already
            if folder.answers.is_dir():
                shutil.copytree(folder.answers, kept, dirs_exist_ok=True)
            found |= {
                "first_rows": most,
                "with_adapter": score(few, model, folder, screen, Path(kept), name="same rows"),
            }
    folder.write(folder.base, found)


def _writes_answers(task: Task, rows: Dataset) -> bool:
    from .tasks import Task

    asks = getattr(task, "needs_generation", None)
    return asks(rows) if asks else getattr(type(task), "evaluate", Task.evaluate) is not Task.evaluate


def _first(rows: DatasetDict, split: str, n: int) -> DatasetDict:
    from datasets import DatasetDict

    return DatasetDict({split: rows[split].select(range(min(n, len(rows[split]))))})


def score(
    job: Job,
    model: nn.Module,
    folder: RunFolder,
    screen: Screen,
    answers: Path,
    predictions: Path | None = None,
    name: str = "eval",
) -> dict[str, float]:
    """Every score of the task's labelled splits; the headline split's by their bare names.

    Generated answers are kept in ``answers``, so that an evaluation that was cut off goes on from them. What came
    out for each row goes into ``predictions``.
    """
    from ..host.sharding import is_sharded

    splits = job.task.eval_splits(job.ready)
    if not splits:
        screen.note(f"task {job.task.name!r}: no labelled split to evaluate on")
        return {}
    with screen.stage(name) as stage:
        trainer = make_trainer(job, model, folder, callbacks=[progress_on(stage)])
        trainer_settings.score_in_order(trainer.args)
        if is_sharded(model):
            trainer.is_fsdp_enabled = False  # there is nothing left to shard, and no optimizer to shard it with
        found: dict[str, float] = {}
        kept: dict[str, Any] = {}
        for i, split in enumerate(splits):
            prefix = "" if i == 0 else f"{split}_"
            rows = job.ready[split]
            kept[split] = {"rows": len(rows), "fingerprint": fingerprint(job.rows[split])}
            trainer.compute_metrics = _keeping_rows(job, trainer, kept[split])
            got = trainer.evaluate(rows, metric_key_prefix="eval", ignore_keys=model_facts.unread_outputs(model))
            skip = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "eval_model_preparation_time")
            scores = {k.removeprefix("eval_"): v for k, v in got.items() if k.startswith("eval_") and k not in skip}
            scores |= job.task.evaluate(model, job.tokenizer, job.rows, split, folder=answers, make_bar=stage.bar)
            found |= {prefix + name: float(value) for name, value in scores.items()}
            if constant := judging.constant(job.task, job.rows, split):
                kept[split]["constant"] = constant
            if worst := judging.worst(job.task, kept[split], job.rows[split]):
                kept[split]["worst"] = worst
        stage.result = " · ".join(f"{name} {number(value)}" for name, value in found.items())
    if predictions is not None:
        folder.write(predictions, kept)
    return found


def _keeping_rows(job: Job, trainer: Trainer, kept: dict[str, Any]) -> Callable[[Any], dict[str, float]]:
    """The task's `compute_metrics`, which also puts what each row got into ``kept``."""
    row_scores = getattr(job.task, "row_scores", None)  # a task of one's own need not have it

    def compute_metrics(eval_pred: Any) -> dict[str, float]:
        if row_scores is not None:
            kept.update(row_scores(eval_pred))
        return job.task.compute_metrics(eval_pred)

    return compute_metrics


def fingerprint(rows: Dataset, *, whole: bool = False) -> str:
    """Of the content of raw rows, wherever they were read from. Unless it is ``whole``, only what is to be answered
    counts of a conversation: how it is asked may differ between runs that are compared."""
    found = hashlib.sha256()
    for batch in rows.iter(1000):  # a tenth of the time of one by one
        if "messages" in batch and not whole:
            answers = [[m["content"] for m in turns if m["role"] == "assistant"] for turns in batch["messages"]]
            batch["messages"] = answers
        for values in zip(*batch.values()):
            row = dict(zip(batch, values))
            found.update(json.dumps(row, sort_keys=True, default=_digest).encode())
    return found.hexdigest()[:16]


def _digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest() if isinstance(value, bytes) else repr(value)


def warn(folder: RunFolder, screen: Screen) -> None:
    """Remarks on what went wrong without an error. A loss that is not finite is for `unusable` to tell."""
    from .report.runfolder import read
    from .report.troubles import not_finite, troubles

    if runfolder.is_main():
        run = read(folder.path)
        for trouble in troubles(run):
            if trouble != not_finite(run):
                screen.note(trouble)


def unusable(folder: RunFolder) -> str | None:
    """Why nothing that a run made can be used: its loss is not finite. None for any other run."""
    from .report.runfolder import read
    from .report.troubles import not_finite

    return not_finite(read(folder.path)) if runfolder.is_main() else None


def write_report(folder: RunFolder, screen: Screen) -> Path:
    """report.html from whatever the folder holds."""
    from . import report

    if not runfolder.is_main():
        return folder.report
    with screen.stage("report") as stage:
        path = report.write(folder.path)
        stage.result = str(path)
    return path


# -- time and memory -----------------------------------------------------------------------------------


def _seconds(folder: RunFolder, measured: float = 0.0) -> float:
    """Wall seconds spent on training, those of the parts before a resume included.

    Each part counts from its own start in timing.jsonl; ``measured`` is the last part's, evaluation included.
    """
    parts: list[float] = []
    if folder.timing.is_file():
        for line in folder.timing.read_text(encoding="utf-8").splitlines():
            seconds = float(json.loads(line)["seconds"])
            if parts and seconds >= parts[-1]:
                parts[-1] = seconds
            else:
                parts.append(seconds)
    return sum(parts[:-1]) + max([measured, *parts[-1:]])


def _reset_peak_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux: the process's high-water mark, of an earlier run in it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes: the accelerator's peak since training began, else the largest this process has been."""
    import sys

    import torch

    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
