"""Scores of a run: of its adapter, and of the model without it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ExportError
from . import judging, loading, model_facts, trainer_settings
from .job import Job, data_of, fingerprint
from .progress import progress_on
from .report.data import NOT_SCORES
from .report.words import number
from .rows import by_length
from .runfolder import RunFolder, is_main
from .screen import Screen
from .session import what_was_scored
from .trained import Trained
from .trainer import make_trainer

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from torch import nn
    from transformers import EvalPrediction

    from .tasks import Task


def evaluate(job: Job, trained: Trained, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    """Scores on the task's labelled splits -> metrics.json."""
    _say_unscored(job, screen)
    metrics = score(job, trained.model, folder, screen, _kept_answers(job, folder), folder.predictions)
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
        "train_samples": len(job.training_rows),
        "new_modules": list(job.modules_to_save),
        **{name: part.model_dump(mode="json", exclude_none=True) if part else None for name, part in sections.items()},
        "seed": job.recipe.seed,
        "data": data_of(job),
        "load": loading.lines(job, folder, trained.steps),
        **({} if trained.is_finished else {"unfinished": trained.steps}),
    }
    folder.write(folder.metrics, result)
    if metrics and not _stands_beside(job, trained, folder):
        _score_without_adapter(job, trained, folder, screen)
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


def evaluate_base(job: Job, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    """Scores of the model as it is, without an adapter -> base.json, to be read beside those after training."""
    _say_unscored(job, screen)
    result = _of_base(job, job.model, folder, screen)
    folder.write(folder.base, result)
    return result


def _of_base(job: Job, model: nn.Module, folder: RunFolder, screen: Screen) -> dict[str, Any]:
    return {
        "metrics": score(job, model, folder, screen, _kept_answers(job, folder) / "base", name="base"),
        "metric": job.task.metric,
        "task": job.task.name,
        "seed": job.recipe.seed,
        **what_was_scored(job.recipe),
    }


def _stands_beside(job: Job, trained: Trained, folder: RunFolder) -> bool:
    """Whether base.json is there, and of the rows that were scored, asked alike. One that holds scores of the adapter
    on a part of them is of the steps that it has seen, too."""
    if not folder.base.is_file():
        return False
    kept = folder.read(folder.base)
    of_adapter = {"step": trained.steps.get("step")} if "with_adapter" in kept else {}
    return {**what_was_scored(job.recipe), **of_adapter}.items() <= kept.items()


def _score_without_adapter(job: Job, trained: Trained, folder: RunFolder, screen: Screen) -> None:
    """Scores of the trained model with its adapter off -> base.json; no second model is loaded.

    Where answers are written, which takes a base model long, the first ``base_rows`` of the headline split alone are
    answered, and the adapter's scores of these stand beside them. A new head would be scored untrained: left out.
    """
    from ..exporting.formats import refuse_a_changed_base

    if is_main():
        folder.base.unlink(missing_ok=True)
    model, most, split = trained.model, job.recipe.base_rows, job.task.eval_splits(job.ready)[0]
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
            if (answers := _kept_answers(job, folder)).is_dir():
                shutil.copytree(answers, kept, dirs_exist_ok=True)
            found |= {
                "first_rows": most,
                "step": trained.steps.get("step"),
                "with_adapter": score(few, model, folder, screen, Path(kept), name="same rows"),
            }
    folder.write(folder.base, found)


def _kept_answers(job: Job, folder: RunFolder) -> Path:
    """Where generated answers are kept: in the run's folder, or in the one that the task names."""
    own = getattr(job.task, "generations", None)
    return Path(own).expanduser() if own else folder.answers


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
        trainer_settings.score_every_row(trainer.args)
        if is_sharded(model):
            trainer.is_fsdp_enabled = False  # there is nothing left to shard, and no optimizer to shard it with
        found: dict[str, float] = {}
        kept: dict[str, Any] = {}
        for i, split in enumerate(splits):
            prefix = "" if i == 0 else f"{split}_"
            rows = job.ready[split]
            kept[split] = {"rows": len(rows), "fingerprint": fingerprint(job.rows[split])}
            places = None
            if job.task.task_type == "SEQ_CLS":  # of others the loss, a mean over batches, would follow their order
                rows, places = by_length(rows)
            trainer.compute_metrics = _keeping_rows(job, kept[split], places)
            got = trainer.evaluate(rows, metric_key_prefix="eval", ignore_keys=model_facts.unread_outputs(model))
            names = [name for name in got if name.startswith("eval_") and not name.endswith(NOT_SCORES)]
            scores = {name.removeprefix("eval_"): got[name] for name in names}
            scores |= job.task.evaluate(model, job.tokenizer, job.rows, split, folder=answers, make_bar=stage.bar)
            found |= {prefix + name: float(value) for name, value in scores.items()}
            if constant := judging.constant(job.task, job.rows, split):
                kept[split]["constant"] = constant
            places = getattr(job.task, "places", {}).get(split)
            if predictions and (worst := judging.worst(job.task, kept[split], job.rows[split], places)):
                kept[split]["worst"] = worst
        stage.result = " · ".join(f"{name} {number(value)}" for name, value in found.items())
    if predictions is not None:
        folder.write(predictions, kept)
    return found


def _keeping_rows(job: Job, kept: dict[str, Any], places: Sequence[int] | None) -> Callable[[Any], dict[str, float]]:
    """The task's `compute_metrics`, which also puts what each row got into ``kept``.

    Args:
        places: where each row of the data is among those that were scored; None: they are in the data's order.
    """
    row_scores = getattr(job.task, "row_scores", None)  # a task of one's own need not have it

    def compute_metrics(eval_pred: EvalPrediction) -> dict[str, float]:
        if places is not None:
            eval_pred = _in_order(eval_pred, places)
        if row_scores is not None:
            kept.update(row_scores(eval_pred))
        return job.task.compute_metrics(eval_pred)

    return compute_metrics


def _in_order(eval_pred: EvalPrediction, places: Sequence[int]) -> EvalPrediction:
    """Outputs and labels, arrays (rows, …) in any nesting, with row i of the data as the i-th."""
    from transformers import EvalPrediction

    def ordered(values: Any) -> Any:
        if isinstance(values, (tuple, list)):
            return type(values)(ordered(part) for part in values)
        if isinstance(values, dict):
            return {name: ordered(part) for name, part in values.items()}
        return None if values is None else values[places]

    names = ("predictions", "label_ids", "inputs", "losses")
    return EvalPrediction(**{name: ordered(getattr(eval_pred, name, None)) for name in names})
