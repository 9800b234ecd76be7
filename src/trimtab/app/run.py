"""A run, from recipe to report: each stage takes what the last one returned and writes one file.

    recipe.yaml -> where.json -> plan.json, history.jsonl, checkpoints/ -> adapter/ -> metrics.json -> report.html

Training is the stock `transformers.Trainer` over a stock `peft.get_peft_model`; what Trimtab adds goes in as
a config and a callback.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError
from ..plans import Plan, SitePlan, Where
from . import card, loading, model_facts, runfolder, scoring, stopping
from . import recipe as recipes
from .job import Job, data_of, load, trained_on
from .peft_config import adapted, adapter_config, choose_own, choose_without_data, layers_to_choose_from, reads_rows
from .planning import chosen_among, horizon_of, plan_of_run, with_initial_ranks
from .progress import progress_on
from .recipe import Recipe
from .report.words import byte_size, count, number, plural
from .rows import by_length
from .runfolder import RunFolder
from .screen import Screen, Stage
from .session import checkpoint_to_resume, session
from .spent import peak_memory, reset_peak_memory, training_seconds
from .trained import Trained
from .trainer import early_stopping, let_go_of_previous, make_trainer, save_at_end

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftModel
    from torch import nn

    from ..rank.start import StartSettings

ADAPTER_CONFIG = "adapter_config.json"


def run(recipe: Recipe, folder: Path, screen: Screen, *, overwrite: bool = False, resume: bool = False) -> RunFolder:
    """The whole flow. Returns the folder; its `metrics.json` and `report.html` say how it went."""
    with session(recipe, folder, overwrite=overwrite, resume=resume) as opened:
        job = load(recipe, screen)
        out = opened.begin(trained_on(job))
        where = select(job, out, screen, anew=overwrite)
        trained = train(job, where, out, screen, resume=resume)
        export_run(job, trained, out, screen)
        evaluate(job, trained, out, screen)
        warn(out, screen)
        write_report(out, screen)
    return out


# -- select --------------------------------------------------------------------------------------------


def select(job: Job, folder: RunFolder, screen: Screen, *, anew: bool = False) -> Where | None:
    """Which layers are adapted -> where.json. A selection already in the folder is taken as it is, unless ``anew``:
    then it is an earlier run's, which the main process may not have moved away yet."""
    from ..train.parallel import of_process_0

    settings = job.recipe.where
    if settings is None:
        return None
    with screen.stage("select") as stage:
        saved = None if anew else folder.saved_where()
        among = None if saved else _among(job, settings)
        # Process 0's holds: another one may have found what an earlier command left, or have rounded otherwise.
        where = of_process_0(saved or _choose(job, settings, stage, among))
        if not saved:
            folder.write(folder.where, where.to_json())
        stage.result = _where_text(where) + (" (from where.json)" if saved else "")
    for note in (*chosen_among(among, where), *(where.scores or {}).get("warnings", ())):
        screen.note(note)
    return where


def selections(job: Job, settings: Mapping[str, recipes.Where], screen: Screen) -> dict[str, Where]:
    """What each of several methods would choose, by its name; nothing is written."""
    found = {}
    for name, own in settings.items():
        with screen.stage("select") as stage:
            found[name] = _choose(job, own, stage, _among(job, own))
            stage.result = _where_text(found[name])
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

    return DataLoader(by_length(rows)[0], batch_size, collate_fn=job.task.collator(job.tokenizer))  # type: ignore[arg-type]


def _where_text(where: Where) -> str:
    stacks = where.stacks.values()
    return " · ".join(f"{where.method}: {mask.count('1')} of {len(mask)} layers {mask}" for mask in stacks)


# -- train ---------------------------------------------------------------------------------------------


def train(job: Job, where: Where | None, folder: RunFolder, screen: Screen, *, resume: bool = False) -> Trained:
    """Trains -> history.jsonl, timing.jsonl, checkpoints/, and plan.json with what was decided."""
    from transformers import set_seed

    import trimtab

    from ..rank.base import starter_of
    from .report.runfolder import read

    recipe = job.recipe
    if "learning_rate" not in recipe.train:
        screen.note("train.learning_rate is not set: the Trainer's 5e-5 suits whole models; adapters take 1e-4 to 1e-3")
    rows = len(job.training_rows)
    config = adapter_config(
        recipe, job.model, where=where, task_type=job.task.task_type, modules_to_save=job.modules_to_save
    )
    planned = replace(plan_of_run(recipe, job.model, config, horizon_of(recipe, rows), rows), where=where)
    planned = replace(planned, settings={**planned.settings, "data": data_of(job)})
    started = folder.read(folder.plan)["settings"].get("start") if resume and folder.plan.is_file() else None
    if started is None:  # else the plan on the disk has the ranks that were begun with, which nothing could tell again
        folder.write(folder.plan, planned.to_json())
    if recipe.budget is not None:  # what was chosen, and why
        for note in planned.notes:
            screen.note(note)
    set_seed(recipe.seed)
    callback = trimtab.TrimCallback(history=folder.history)
    model = adapted(job.model, config)
    _refuse_what_cannot_be_scaled(recipe, model)
    checkpoint = checkpoint_to_resume(folder) if resume else None
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
            save_at_end(),
            callback,
            progress_on(stage, callback),
            *early_stopping(job, callback),
        ]
        trainer = make_trainer(job, model, folder, callbacks, recipe.rates, is_tracked=True)
        reset_peak_memory()
        began = time.monotonic()
        trainer.train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=model_facts.unread_outputs(model))
        seconds = training_seconds(folder, time.monotonic() - began)
        params = read(folder.path).measured_params(trainer.state.global_step) if runfolder.is_main() else {}
        if callback.controller is not None:
            params["held"] = callback.controller.figures()["held"]
        final = final_plan(planned, model, params)
        folder.write(folder.plan, final.to_json())
        loss = next((row["loss"] for row in reversed(trainer.state.log_history) if "loss" in row), None)
        stage.result = (
            f"{plural(trainer.state.global_step, 'step')} · loss {number(loss)} · "
            f"{count(params.get('final'))} trainable parameters"
        )
    last = trainer.state.global_step
    return Trained(model, final, seconds, peak_memory(), {"step": last, "of": last})


def _refuse_what_cannot_be_scaled(recipe: Recipe, model: PeftModel) -> None:
    """Raise `ConfigError` where a scaler would meet float16 gradients, as a head has: PEFT widens adapters alone."""
    import torch

    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if recipe.train.get("fp16") and narrow:
        what = narrow[0].replace(".modules_to_save.default", "").removeprefix("base_model.model.")
        cure = (
            f"{what} trains in float16, whose gradients train.fp16 cannot scale; use float32, which it computes "
            "in float16 all the same, or bfloat16 with train.bf16"
        )
        raise ConfigError("model.dtype", recipe.model.dtype, cure)


def initialize(job: Job, model: PeftModel, starter: StartSettings, screen: Screen) -> dict[str, Any]:
    """Ranks and factors that a method chooses from training rows; what it chose, and how, as JSON."""
    from torch.utils.data import DataLoader

    import trimtab

    with screen.stage("start") as stage:
        stage.bar(None, starter.method)
        rows = job.training_rows.shuffle(seed=job.recipe.seed)
        rows = rows.select(range(min(starter.samples, len(rows))))
        collate = job.task.collator(job.tokenizer)
        started = trimtab.initialize_ranks(model, DataLoader(rows, starter.batch_size, collate_fn=collate))
        stage.result = started.told
    return started.to_json()


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
    """Scores -> metrics.json and base.json; the adapter's card has them, too."""
    found = scoring.evaluate(job, trained, folder, screen)
    if runfolder.is_main() and (folder.adapter / ADAPTER_CONFIG).is_file():
        card.write(job, folder, folder.adapter, _name_base(job, folder.adapter))
    return found


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
