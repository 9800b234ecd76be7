"""The stock Trainer of a recipe: its arguments, its optimizer, and what watches it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError, did_you_mean
from . import trainer_settings
from .recipe import Recipe
from .runfolder import RunFolder

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

    from ..train.callback import TrimCallback
    from .job import Job
    from .tasks import Task

# Where the recipe's `train` is silent. The Trainer's own logging and saving every 500 steps would leave a
# short run without a curve and without a checkpoint.
TRAIN_DEFAULTS: dict[str, Any] = {
    "logging_steps": 0.02,  # a share of the run: 50 points on the loss curve
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "report_to": "none",
    "logging_nan_inf_filter": False,  # the Trainer's would show the last finite loss for one that is NaN
}


def make_trainer(
    job: Job,
    model: nn.Module,
    folder: RunFolder,
    callbacks: list[Any],
    rates: Mapping[str, float] | None = None,
    is_tracked: bool = False,
) -> Trainer:
    """The stock Trainer for this job. Unless ``is_tracked`` it reports to no tracker: those would open a second run."""
    from transformers import PrinterCallback, Trainer

    splits = job.task.eval_splits(job.ready)
    # While training, one split is watched, and where there is another never the one for testing.
    watched = next((name for name in splits if not name.startswith("test")), splits[0] if splits else None)
    args = training_arguments(job.recipe, job.task, folder.checkpoints, has_eval=bool(splits))
    n, batch = len(job.ready.get("train", ())), args.train_batch_size * args.world_size
    if args.dataloader_drop_last and 0 < n < batch:
        cure = f"leaves nothing of {n} training rows in batches of {batch}: leave it out, or take smaller batches"
        raise ConfigError("train.dataloader_drop_last", True, cure)
    if not is_tracked:
        args.report_to = []
    elif args.run_name is None:
        args.run_name = folder.run_name()
    is_reentrant = cast(Any, args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
    is_adaptive = job.recipe.rank is not None or job.recipe.freeze is not None  # then DDP holds no adapter
    if is_reentrant and not is_adaptive and args.ddp_find_unused_parameters is None:
        # It would find parameters once more in every backward within another; Trainer knows that of bare models alone.
        args.ddp_find_unused_parameters = False
    trainer = _reaching_the_hub(
        args,
        _answer_trainer() if job.task.task_type == "CAUSAL_LM" else Trainer,
        model=model,
        train_dataset=job.ready.get("train"),
        eval_dataset=job.ready[watched] if watched else None,
        data_collator=_collator(job, model, args),
        compute_metrics=job.task.compute_metrics,
        preprocess_logits_for_metrics=job.task.preprocess_logits_for_metrics,
        callbacks=callbacks,
        optimizer_cls_and_kwargs=_optimizer(model, args, rates) if rates else None,
    )
    if rates and trainer.is_fsdp_enabled:  # it makes the optimizer's parameters anew
        raise ConfigError("rates", dict(rates), "does not go together with FSDP; drop one of them")
    trainer.remove_callback(PrinterCallback)
    _log_beside_checkpoints(trainer, folder)
    if job.task.task_type in ("SEQ_CLS", "SEQ_2_SEQ_LM"):
        # BERT's heads, T5, BART and their kin take **kwargs but not num_items_in_batch from them: their loss is a mean.
        # Trainer would believe it normalised, and leave it (and the gradient) too large by the number of
        # accumulated batches times the number of processes.
        trainer.model_accepts_loss_kwargs = False
    return trainer


def _collator(job: Job, model: Any, args: TrainingArguments) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """The task's. Where labels are smoothed Trainer keeps them to itself, and the decoder is given what it reads."""
    collate = job.task.collator(job.tokenizer)
    if not args.label_smoothing_factor or job.task.task_type != "SEQ_2_SEQ_LM":
        return collate

    def collated(rows: list[dict[str, Any]]) -> dict[str, Any]:
        batch = collate(rows)
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])}

    return collated


def _answer_trainer() -> type[Trainer]:
    from transformers import Trainer

    from .answer_head import AnswerHead, OtherTokens

    class AnswerTrainer(Trainer):
        """The stock Trainer, but that while training the head is given only tokens that are learned (`AnswerHead`), and
        that several processes' loss of an evaluation is a mean over its batches."""

        answer_head: AnswerHead | None = None

        def _head_for(self, model: nn.Module) -> AnswerHead:
            self.answer_head = self.answer_head or AnswerHead(model)
            return self.answer_head

        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            if not model.training and self.args.world_size > 1:
                # Trainer would divide by the tokens of all processes' batches, which is a mean only where all of them
                # count alike: of the last batches it leaves some rows out.
                num_items_in_batch = None
            # A replica of nn.DataParallel has hooks of its own, and a compiled model does not see new ones.
            is_plain = self.label_smoother is None and self.args.n_gpu <= 1 and not self.args.torch_compile
            head = self._head_for(model) if is_plain and model.training and not return_outputs else None
            if head is not None and head.serves(model, inputs):
                try:
                    with head.on():
                        return super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                except OtherTokens:
                    head.is_same = False
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    return AnswerTrainer


def _log_beside_checkpoints(trainer: Trainer, folder: RunFolder) -> None:
    """TensorBoard's logs, which the Trainer would put among the checkpoints. The other trackers have a place for all
    runs."""
    from transformers.integrations import TensorBoardCallback

    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
            callback.logging_dir = str(folder.logs)


def _reaching_the_hub(args: TrainingArguments, make: Callable[..., Trainer], **parts: Any) -> Trainer:
    """A Trainer that pushes makes its repository at once; what the hub says to that is one line."""
    try:
        return make(args=args, **parts)
    except Exception as error:
        if not args.push_to_hub:
            raise
        text = " ".join(str(error).split())[:300]
        raise ConfigError("train.push_to_hub", True, f"{text} (is there a token, and a way to the hub?)") from error


def _optimizer(model: nn.Module, args: TrainingArguments, rates: Mapping[str, float]) -> tuple[type, dict[str, Any]]:
    """What the Trainer would take by itself, with groups by role in place of its own."""
    import torch
    from transformers import Trainer

    import trimtab

    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, cast(Any, model))
    if not issubclass(kind, torch.optim.Optimizer) or {"params", "model", "optimizer_dict"} & set(options):
        cure = f"train.optim={getattr(args.optim, 'value', args.optim)} makes its own groups; use adamw_torch"
        raise ConfigError("rates", dict(rates), cure)
    groups = trimtab.parameter_groups(model, args.learning_rate, rates, weight_decay=args.weight_decay)
    return kind, {**options, "params": groups}


def training_arguments(recipe: Recipe, task: Task, output_dir: Path, *, has_eval: bool = True) -> TrainingArguments:
    """`TrainingArguments` from the recipe's ``train``, over `TRAIN_DEFAULTS`.

    Raises:
        ConfigError: a field cannot be, alone or together with others.
    """
    import torch

    # Who says after how many steps says that steps are counted.
    by_steps = {f"{what}_strategy": "steps" for what in ("eval", "save") if recipe.train.get(f"{what}_steps")}
    values = {**TRAIN_DEFAULTS, **by_steps, **recipe.train}
    if not has_eval and "eval_strategy" not in recipe.train:
        values["eval_strategy"] = "no"
    if recipe.early_stopping and has_eval and values["eval_strategy"] == "no":
        stopping = recipe.early_stopping.model_dump()
        raise ConfigError("early_stopping", stopping, "nothing is scored while training: train.eval_strategy=no")
    trainer_settings.check_together(values)
    values |= _what_is_best(values, task, bool(recipe.early_stopping))
    values.setdefault("dataloader_pin_memory", torch.cuda.is_available())
    given = {"output_dir": str(output_dir), "seed": recipe.seed, "disable_tqdm": True}
    try:
        return _made(given | values)
    except (TypeError, ValueError, ImportError) as error:
        text = " ".join(str(error).split())
        key = _at_fault(given | values, recipe.train, text)
        raise ConfigError(f"train.{key}", recipe.train[key], text) from None


def _made(values: Mapping[str, Any]) -> TrainingArguments:
    import torch
    from transformers import Trainer, TrainingArguments, get_scheduler

    args = TrainingArguments(**trainer_settings.stock(values))
    # Whether the schedule takes its settings.
    stand_in, far = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], args.learning_rate), 10**9
    get_scheduler(args.lr_scheduler_type, stand_in, 1, far, args.lr_scheduler_kwargs)  # type: ignore[arg-type]
    try:  # whether the optimizer's package is there
        Trainer.get_optimizer_cls_and_kwargs(args)
    except (ImportError, ValueError) as error:
        if "pass a" not in str(error):  # some ask the model, which is not there yet
            raise
    return args


def _at_fault(values: Mapping[str, Any], train: Mapping[str, Any], text: str) -> str:
    """The key of ``train`` without which there would be no error; of several the one that the error names."""
    found = []
    for key in train:
        try:
            _made({name: value for name, value in values.items() if name != key})
            found.append(key)
        except (TypeError, ValueError, ImportError) as error:
            if " ".join(str(error).split()) != text:
                found.append(key)
    named = [key for key in found if key in text]
    return next(iter([*named, *found[::-1], *train]))


def _what_is_best(values: Mapping[str, Any], task: Task, stops_early: bool) -> dict[str, Any]:
    """By which score the best checkpoint is told: the headline one that is taken while training, as it is called there.

    Raises:
        ConfigError: the recipe names one that the task does not take.
    """
    metric = values.get("metric_for_best_model")
    wants_one = values.get("load_best_model_at_end") or values["save_strategy"] == "best"
    if metric is None and not wants_one and not stops_early:
        return {}
    while_training = getattr(task, "training_metric", None)
    scores = [*(getattr(task, "scores", None) or (OF_ANSWERS if while_training else ())), "loss"]
    name = (metric or while_training or task.metric).removeprefix("eval_")
    if name not in scores and len(scores) > 1:  # what a task of one's own takes, only that task knows
        near = did_you_mean(name, scores)
        raise ConfigError("train.metric_for_best_model", metric, f"must be one of {', '.join(scores)}.{near}")
    if name != "loss" and values.get("prediction_loss_only"):
        cure = f"the best checkpoint is told by {name}: leave it out, or set train.metric_for_best_model to loss"
        raise ConfigError("train.prediction_loss_only", True, cure)
    greater = values.get("greater_is_better")
    if greater is None:
        headline = bool(getattr(task, "greater_is_better", True))
        greater = headline if name == task.metric else not name.endswith(_LOWER)
    return {"metric_for_best_model": name, "greater_is_better": greater}


OF_ANSWERS = ("answer_loss", "perplexity", "token_accuracy")
_LOWER = ("loss", "mse", "perplexity")


def save_at_end() -> Any:
    """A run always ends with a checkpoint: export and evaluation can start from the folder. Where the best model is to
    be had back, whatever is scored is saved: Trainer takes the last one if the best was scored between checkpoints."""
    from transformers import TrainerCallback
    from transformers.trainer_utils import SaveStrategy

    class SaveAtEnd(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            is_last = state.global_step >= state.max_steps or control.should_training_stop
            if is_last and args.save_strategy != SaveStrategy.EPOCH:  # that one saves after the last step anyway
                control.should_save = True
            control.should_save |= args.load_best_model_at_end and control.should_evaluate

    return SaveAtEnd()


def let_go_of_previous(folder: RunFolder) -> Any:
    """From the first checkpoint on there is something to go on from: the run that was replaced may go."""
    from transformers import TrainerCallback

    class LetGo(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            folder.let_go()

    return LetGo()


def early_stopping(job: Job, trim: TrimCallback) -> list[Any]:
    """What ends training when the watched score no longer gets better, if the recipe asks for it."""
    import transformers

    class EarlyStoppingCallback(transformers.EarlyStoppingCallback):  # by this name its state is in checkpoints
        """Counts on in a run that is resumed; where that had come to its end, no step more is taken."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            super().on_train_begin(args, state, control, **kwargs)
            for name, value in state.stateful_callbacks["EarlyStoppingCallback"]["attributes"].items():
                setattr(self, name, value)
            if self.early_stopping_patience_counter >= self.early_stopping_patience:
                trim.take_no_step()

    settings = job.recipe.early_stopping
    if settings is None:
        return []
    if not job.task.eval_splits(job.ready):
        raise ConfigError("early_stopping", settings.model_dump(), "there is no labelled split to watch")
    return [EarlyStoppingCallback(settings.patience, settings.threshold)]
