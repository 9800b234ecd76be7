"""TrimCallback: stock Trainer's events, in the controller's order.

Trainer clips before it fires `on_pre_optimizer_step` and has no event between backward and clipping. So
`before_step` is reached through hooks on outputs of the model that queue an end-of-backward callback, on
the synchronising micro-batch only. `after_step` sits at `on_optimizer_step`.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import math
import os
import uuid
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..errors import CheckpointError, ConfigError, StaleAdapterError
from ..host.adapted import adapter_config, callers, entrances, keep_inputs_out_of_the_graph, peft_model_of
from ..host.config import TrimConfig
from ..host.layers import REPLICAS, hosted_layers
from ..host.sharding import is_sharded, reshard
from .checkpoint import (
    COMPLETE,
    checkpoints,
    last_checkpoint,
    make_newest,
    read_facts,
    read_state,
    what_is_wrong,
    write_state,
)
from .controller import Controller, Event
from .history import History, without_clock
from .parallel import (
    NO_DEEPSPEED,
    accelerates_fsdp,
    give_back_to_ddp,
    is_distributed,
    is_launched,
    keep_whole,
    of_process_0,
    refuse_sharded_heads,
    whole_parameters,
)
from .state import what_differs
from .steps import Weakly, is_accumulating
from .tensors import active_adapter
from .trackers import Figures, layer_scores, tell

logger = logging.getLogger("trimtab")


class TrimCallback(TrainerCallback, ExportableState):
    """Decides during a stock Trainer's run, and keeps what exact resume needs in every checkpoint.

    Args:
        history: file for the run's history, one JSON object a line, without clock times (those go to
            ``timing.jsonl`` beside it); None keeps it in memory (`.events`).
        adapter_name: PEFT's name of the adapter; None takes the active one.
        resume_from: folder of the checkpoint being resumed, if it is not
            ``<output_dir>/checkpoint-<step>``.
    """

    def __init__(
        self,
        history: str | os.PathLike[str] | None = None,
        adapter_name: str | None = None,
        resume_from: str | os.PathLike[str] | None = None,
    ) -> None:
        self.history = Path(history) if history is not None else None
        self.adapter_name = adapter_name
        self.resume_from = Path(resume_from) if resume_from is not None else None
        self.controller: Controller | None = None
        self._history = History(history)
        self.figures = Figures()  # for trackers, and for a progress line
        self._args: TrainingArguments | None = None
        self._hooks: list[Any] = []
        self._is_queued = False
        self._loss: Tensor | None = None  # of the step's micro-batches so far, where backward went through it
        self._was_reached = False
        self._was_ever_reached = False  # by a backward, in whichever micro-batch
        self._has_loop = False  # Trainer's own loop runs; an exception or Ctrl-C ends it without an event
        self._is_training = False
        self._penalties: list[Tensor] = []
        self._optimizer: Any = None
        self._over: Any = None  # the Trainer, where it resumes a run that is at its end
        self._run = ""  # tells this run's checkpoints from another run's
        self._draws: Tensor | None = None  # torch's generator as the epoch began that is not yet over

    def __getstate__(self) -> dict[str, Any]:
        """A copy is in no Trainer: accelerate's optimizer holds its data, and cannot be pickled."""
        return {**self.__dict__, "_optimizer": None, "_hooks": [], "_over": None}

    @property
    def events(self) -> list[Event]:
        """The history of this run, or since it was resumed."""
        return self._history.events

    # -- Trainer's events, in their order ----------------------------------------------------------

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model = kw.get("model")
        self._args = args
        if model is None or not self._layers(model):
            return
        trainer = _trainer()
        self._refuse_a_second_callback(trainer, model)
        self._refuse_engines(args, model)
        if trainer is not None and getattr(trainer, "is_distributed_loading_by_transformers", False):
            self._save_for_resume(args)
        if args.save_only_model:
            warnings.warn(
                "save_only_model=True: checkpoints will be plain LoRA, but this run cannot be resumed",
                stacklevel=2,
            )
        self._widen(model)
        self._keep_whole(model, args, trainer)
        self._warn_of_checkpoints(args, model)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        model, self._optimizer = kw["model"], kw.get("optimizer")
        self._args = args
        last = self.controller
        if last is not None and last.model is model and last.step > 0 and last.layers and not last.is_finished:
            raise StaleAdapterError(
                "training begins again on an adapter that has already adapted (auto_find_batch_size "
                "after its first steps, or a second train()); build the model anew (with a per_device_train_batch_size "
                "that fits), or load it with PeftModel.from_pretrained(checkpoint, is_trainable=True)"
            )
        self._refuse_a_second_callback(_trainer(), model)
        self._history, self._penalties, self._run = History(self.history), [], ""
        self._draws = None
        self.figures = Figures()
        self._loss = None
        self._take_steps_again()  # after a run that was interrupted
        # A first attempt may have run out of memory in mid-backward.
        self._is_queued = self._was_reached = self._was_ever_reached = False
        self._look_away()
        self._has_loop = _is_in_training(self)
        self.controller = Controller(
            model,
            self._optimizer,
            state.max_steps,
            steps_per_epoch=self._steps_per_epoch(args, kw),
            adapter_name=self._name(model),
            on_event=self._record,
        )
        keep_inputs_out_of_the_graph(model)  # the Trainer has turned checkpointing on by now
        if state.global_step > 0:
            self._resume(args, state)
            args.eval_on_start = False  # that was done when the run began
        else:
            self._start_history()
            if self.controller.layers:
                self.controller._check_not_stale()
        if not self._run:
            self._run = uuid.uuid4().hex
        self._is_training = True
        if state.global_step >= state.max_steps:
            self.take_no_step()
        config = adapter_config(model, self.controller.adapter_name)
        if self.controller.layers and not self.controller.is_finished:
            self._hooks = [
                module.register_forward_hook(Weakly(self._watch_output))
                for module in entrances(model, self.controller.adapter_name, is_compiled=bool(args.torch_compile))
            ]
        self._tell_trackers(args, state, control, model, **layer_scores(getattr(config, "where", None)))
        self._history.start_clock()

    def on_epoch_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._over is not None:
            control.should_training_stop = True
        # Rows that are grouped by length are put in order by torch's own generator, which Trainer brings back within a
        # resumed epoch only after it has drawn the order.
        if self._draws is not None:
            torch.set_rng_state(self._draws)
        else:
            _draw_alike(args)
        self._draws = torch.get_rng_state()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        if not self._is_running() or self._was_reached:
            return
        # No backward came at the end of this step: the training step left its last batch out, or went another way. One
        # that ran out of memory midway leaves these behind.
        self._is_queued, self._loss = False, None
        assert self.controller is not None
        if not self.controller.has_gradient() or (self._was_ever_reached and not is_distributed()):
            self.controller.catch_up()
            if not is_distributed() or not self.controller.has_gradient():
                return
        raise StaleAdapterError(
            "the adapters' gradients were never seen: no module was called that holds the adapted blocks, as the "
            "PeftModel does and the encoder in it, or nothing in its output needs a gradient"
            + (", on every process" if is_distributed() else "")
        )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any
    ) -> None:
        self._was_reached = False
        controller = self.controller
        if controller is None:
            return
        if not self._is_running():  # nothing to decide: count only
            controller.param_steps += controller.trainable_params()
            controller.step += 1
            return
        ranks = controller.ranks()
        controller.after_step(skipped=bool(getattr(self._optimizer, "step_was_skipped", False)))
        if controller.last_penalty is not None:
            self._penalties.append(controller.last_penalty)
        if controller.ranks() != ranks:
            self._restart_best(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._refuse_silent_loop(state)
        if state.epoch == int(state.epoch or 0):
            self._draws = None
            _draw_alike(args)  # here, too: this state is what a checkpoint between two epochs holds
        if state.global_step >= state.max_steps or control.should_training_stop:
            self._finish(args, state)
        self._log_before_saving(args, control)
        if self.figures.are_new and not control.should_log:  # else they go with the log row
            self._tell_trackers(args, state, control, kw.get("model"))
        self._history.step_ended()

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        if self._over is not None:  # all of this was done, and is in the history
            control.should_log = control.should_evaluate = control.should_save = False
            return
        if control.should_training_stop:  # early stopping speaks up after on_step_end
            self._finish(args, state)
        self._log_before_saving(args, control)
        self._history.step_ended()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._history.set_aside()
        _reshard(**kw)

    def on_predict(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **kw: Any
    ) -> None:
        _reshard(**kw)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kw: Any,
    ) -> None:
        if logs and "train_runtime" in logs and control.should_training_stop:
            self._finish(args, state)  # Trainer's last row: the last event before it loads the best model
        if logs and ("loss" in logs or self.figures.are_new):
            self._tell_trackers(args, state, control, kw.get("model"))
        if not logs or "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]) and isinstance(running := getattr(_trainer(), "_tr_loss", None), Tensor):
            running.zero_()  # Trainer takes it from itself, which a NaN survives: every later row would be lost, too
        row: Event = {"event": "log", "step": state.global_step, "epoch": state.epoch}
        row.update(without_clock(logs))
        if self._penalties:
            row["penalty"] = float(torch.stack(self._penalties).mean())
            self._penalties = []
        self._record(row)
        if _is_main():
            self._history.write_time(state.global_step)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kw: Any,
    ) -> None:
        self._history.set_aside()
        _reshard(**kw)
        kept = without_clock(metrics or {})
        self._record({"event": "eval", "step": state.global_step, "epoch": state.epoch, "metrics": kept})

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kw: Any) -> None:
        self._finish(args, state)
        self._is_training = False
        self._take_steps_again()
        if self.controller is not None and self.controller.layers:
            give_back_to_ddp(kw["model"])
            if is_sharded(kw["model"]):
                self.controller.let_go()
        self._look_away()

    # -- ExportableState: called just before trainer_state.json is written -------------------------------

    def state(self) -> dict[str, Any]:
        """Writes `trim_state` into the checkpoint being saved; called by Trainer before `trainer_state.json`."""
        controller, args = self.controller, self._args
        # A new run asks as well, and may find the checkpoint that an interrupted one has just completed.
        is_begun = any(isinstance(frame.f_locals.get("self"), TrainerState) for frame in itertools.islice(callers(), 4))
        is_saving = self._is_training and not is_begun
        if is_saving and controller is not None and args is not None and controller.step > 0:
            folder = _being_saved(Path(args.output_dir or "."), controller.step)
            if folder is None and not args.save_only_model:
                logger.warning(
                    "no checkpoint-%d was found in %r: what a resumed run needs is not saved", controller.step,
                    args.output_dir,
                )  # fmt: skip
            if folder is not None and not args.save_only_model:
                (folder / COMPLETE).unlink(missing_ok=True)  # of an earlier run that is being overwritten
                tensors, facts = controller.state_dict()
                facts["processes"], facts["run"] = args.world_size, self._run
                rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
                facts["rows_a_step"] = rows * args.world_size
                facts["history_rows"] = self._history.count()
                tensors["draws"] = torch.get_rng_state() if self._draws is None else self._draws
                if self._penalties:  # the mean that the next log row will show must not lose its first part
                    facts["penalties"] = [float(p) for p in self._penalties]
                write_state(folder, tensors, facts)
                make_newest(folder)
        # What restore_callback_states_from_checkpoint makes the callback anew from; the folder is found again then.
        history = None if self.history is None else str(self.history)
        return {"args": {"history": history, "adapter_name": self.adapter_name}, "attributes": {}}

    # -- inside -------------------------------------------------------------------------------------

    @staticmethod
    def _save_for_resume(args: TrainingArguments) -> None:
        # Trainer takes this model's optimizer for sharded and saves none. It holds whole tensors only.
        if args.save_only_model:
            args.save_only_model = False
            logger.warning(
                "save_only_model=True, which Trainer asks for where a model is sharded at load, is set back: what "
                "trains is whole on every process, so that checkpoints can be resumed from"
            )

    def _widen(self, model: nn.Module) -> None:
        was_narrow = [layer.widen(self._name(model)) for layer in self._layers(model).values()]
        if any(was_narrow):  # TRL does this to adapters of a quantised base
            logger.warning("adapters in half precision are brought to float32: smaller steps would be lost in it")

    @staticmethod
    def _log_before_saving(args: TrainingArguments, control: TrainerControl) -> None:
        # Trainer does not save its running loss: after a resume the mean would lack the steps since the last row.
        may_save = control.should_save or (args.save_strategy == SaveStrategy.BEST and control.should_evaluate)
        if may_save and args.logging_strategy != IntervalStrategy.NO:
            control.should_log = True

    def _warn_of_checkpoints(self, args: TrainingArguments, model: nn.Module) -> None:
        """Trainer would trip over these before it asks us, and could not say what to do instead."""
        folder = args.output_dir or "."
        newest = next(iter(checkpoints(folder)), None)
        if newest is None:
            return
        config = adapter_config(model, self._name(model))
        if fault := what_is_wrong(newest):
            logger.warning(
                "%s cannot be resumed from (%s); use trainer.train(resume_from_checkpoint="
                "trimtab.last_checkpoint(%r)), which gives %r", newest, fault, folder, last_checkpoint(folder),
            )  # fmt: skip
        elif isinstance(config, TrimConfig) and config.budget is None:  # a budget chooses the settings later
            facts, name = read_facts(newest), self._name(model)
            sites = {n: (la.hosted[name].initial_r, la.hosted[name].scale) for n, la in self._layers(model).items()}
            for n in (n for n, la in self._layers(model).items() if la.hosted[name].awaits_start):
                sites[n] = tuple(facts["sites"].get(n, sites[n]))  # the checkpoint's own
            other = what_differs(facts, {"rank": repr(config.rank), "freeze": repr(config.freeze)}, sites)
            if other:
                logger.warning("%s is of another run (%s) and cannot be resumed by this one", newest, other)

    def _name(self, model: nn.Module) -> str:
        if self.adapter_name is not None:
            return self.adapter_name
        return active_adapter(model)

    def _layers(self, model: nn.Module) -> dict[str, Any]:
        try:
            return hosted_layers(model, self._name(model))
        except Exception:  # not a PeftModel (yet): on_train_begin says so with its reason
            return {}

    def _is_running(self) -> bool:
        return self.controller is not None and bool(self.controller.layers) and not self.controller.is_finished

    @staticmethod
    def _steps_per_epoch(args: TrainingArguments, kw: dict[str, Any]) -> int | None:
        try:
            return max(1, math.ceil(len(kw["train_dataloader"]) / args.gradient_accumulation_steps))
        except (TypeError, KeyError):  # a streaming dataset has no length
            return None

    def _watch_output(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        if not torch.compiler.is_compiling():
            if self._has_loop and not _is_in_training(self):
                self._look_away()
                return
            if torch._C._current_graph_task_id() >= 0:  # in a backward, which runs blocks or batches once more
                self._on_backward()
        for tensor in _tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._on_backward)
                if tensor.dim() == 0:  # a loss
                    tensor.register_hook(functools.partial(self._take_loss, tensor.detach()))

    def _look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _on_backward(self, gradient: Tensor | None = None) -> None:
        # Runs at the start of the outermost backward, also under gradient checkpointing.
        self._was_ever_reached = True
        if self._is_queued or is_accumulating():
            return
        self._is_queued = True
        torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _take_loss(self, loss: Tensor, gradient: Tensor) -> None:
        self._loss = loss if self._loss is None else self._loss + loss

    def _after_backward(self) -> None:
        self._is_queued = False
        assert self.controller is not None
        loss, self._loss = self._loss, None
        self.controller.before_step(loss=loss)
        self._was_reached = True

    def _finish(self, args: TrainingArguments, state: TrainerState) -> None:
        if not self._is_running():
            return
        assert self.controller is not None
        self._refuse_silent_loop(state)
        ranks = self.controller.ranks()
        self.controller.finish(stopped_early=True)  # Trainer has said so, where it did
        if self.controller.ranks() != ranks:
            self._restart_best(args, state)

    def _refuse_silent_loop(self, state: TrainerState) -> None:
        if self._is_running() and self.controller is not None and state.global_step > 0 == self.controller.step:
            raise StaleAdapterError(
                f"the Trainer has taken {state.global_step} steps, and told no callback of them (on_optimizer_step), "
                "as one with a loop of its own does: nothing can be decided in it. Use a Trainer with transformers' "
                "own loop, or a loop of yours with trimtab.Controller"
            )

    def _restart_best(self, args: TrainingArguments, state: TrainerState) -> None:
        """Only checkpoints at the final shape compete for the best model."""
        if not args.load_best_model_at_end or state.best_metric is None:
            return
        logger.warning(
            "ranks changed at step %d: the best checkpoint so far (%s=%.6g) has another shape and no longer competes. "
            "Reach the target rank earlier (shorter warmup/allocation) to leave more steps at the final shape.",
            self.controller.step if self.controller is not None else state.global_step,
            args.metric_for_best_model,
            state.best_metric,
        )
        state.best_metric = state.best_model_checkpoint = None
        state.best_global_step = None

    def _refuse_a_second_callback(self, trainer: Trainer | None, model: nn.Module) -> None:
        handler = getattr(trainer, "callback_handler", None)
        ours = [one for one in getattr(handler, "callbacks", ()) if isinstance(one, TrimCallback)]
        if len(ours) > 1 and self._layers(model):
            raise ConfigError("callbacks", f"{len(ours)} TrimCallbacks", "one decides for the whole run; pass one")

    @staticmethod
    def _refuse_engines(args: TrainingArguments, model: nn.Module) -> None:
        if getattr(args, "deepspeed", None) or getattr(args, "deepspeed_plugin", None):
            raise ConfigError("deepspeed", getattr(args, "deepspeed", None) or "accelerate's plugin", NO_DEEPSPEED)
        accelerates_fsdp()
        is_quantised = getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
        if args.n_gpu > 1 and not is_quantised:  # what Trainer looks at
            raise ConfigError("n_gpu", args.n_gpu, f"Trainer would copy the model by {REPLICAS}")

    def _keep_whole(self, model: nn.Module, args: TrainingArguments, trainer: Trainer | None) -> None:
        if not is_launched():
            return
        name = self._name(model)
        if is_sharded(model):  # at load, by transformers: Trainer would average what trains, each in a hook of its own
            refuse_sharded_heads(model)
            for p in whole_parameters(model, name):
                p._replicated_grad_hook_registered = True  # type: ignore[attr-defined]
        keep_whole(model, name)
        if accelerates_fsdp() is not None and trainer is not None:
            # All that a checkpoint needs is whole on every process. Trainer saves, loads and resumes it as under DDP:
            # FSDP's own files fit no other shapes and no other number of processes, and gather the base each time.
            trainer.is_fsdp_enabled = False
        if hasattr(peft_model_of(model), "trim_anchor"):
            if args.ddp_find_unused_parameters is False:
                raise ConfigError("ddp_find_unused_parameters", False, "must be unset or true when only adapters train")
            args.ddp_find_unused_parameters = True
            if trainer is not None:
                _leave_anchor_out_of_optimizers(trainer, peft_model_of(model).trim_anchor)

    def _resume(self, args: TrainingArguments, state: TrainerState) -> None:
        assert self.controller is not None
        own = Path(args.output_dir or ".")
        folder = self.resume_from or _trainers_own("resume_from_checkpoint") or own / f"checkpoint-{state.global_step}"
        if not self.controller.layers and what_is_wrong(folder):
            self._start_history()
            return  # a plain adapter resumes with Trainer's own means
        tensors, facts = read_state(folder)
        self._run = facts.get("run") or self._run
        for other in checkpoints(own):
            if what_is_wrong(other) is None and read_facts(other).get("run", self._run) != self._run:
                raise CheckpointError(
                    f"output_dir={str(own)!r}: its {other.name} is of another run than {str(folder)!r}, which is being "
                    "resumed; give the resumed run a folder of its own"
                )
        if state.best_global_step and (best := own / f"checkpoint-{state.best_global_step}").is_dir():
            state.best_model_checkpoint = str(best)  # as Trainer says, at the next save: the folder may have been moved
        if facts["step"] != state.global_step:
            raise CheckpointError(
                f"checkpoint {str(folder)!r}: it is of step {facts['step']}, Trainer resumes step "
                f"{state.global_step}; pass TrimCallback(resume_from=…) the folder you resume from"
            )
        self._cut_history(facts.get("history_rows", 0))
        self._draws = tensors.pop("draws", None)
        self.controller.load_state_dict(tensors, facts)
        self._penalties = [torch.tensor(p) for p in facts.get("penalties", [])]

    def take_no_step(self) -> None:
        """For a run that is resumed at its end: in the middle of an epoch Trainer would take one more step."""
        trainer: Any = _trainer()
        if trainer is not None:
            trainer.get_batch_samples = lambda *_, **__: ([], None)
            self._over = trainer

    def _take_steps_again(self) -> None:
        if self._over is not None:
            del self._over.get_batch_samples
            self._over = None

    def _tell_trackers(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any, **more: float
    ) -> None:
        self.figures.are_new = False
        if metrics := self.figures.now | more:
            tell(metrics, args, state, control, model)

    # -- history -------------------------------------------------------------------------------------

    def _record(self, row: Event) -> None:
        self.figures.see(row)
        # Before training, and in a process that only evaluates, the file is another run's or not there yet.
        self._history.add(row, to_file=bool(self._run) and _is_main())

    def _start_history(self) -> None:
        if _is_main():
            self._history.begin_file()

    def _cut_history(self, rows: int) -> None:
        self._history.events.clear()
        for row in self._history.cut_file(rows) if _is_main() else ():
            self.figures.see(row)


def _reshard(model: nn.Module | None = None, **_: Any) -> None:
    if model is not None:
        reshard(model)


def _leave_anchor_out_of_optimizers(trainer: Trainer, anchor: Any) -> None:
    """An optimizer's state is the same with and without a DDP, so that another number of processes takes it."""
    create = trainer.create_optimizer

    def without_anchor(*args: Any, **kwargs: Any) -> Any:
        optimizer = create(*args, **kwargs)
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if p is not anchor]
        return optimizer

    trainer.create_optimizer = without_anchor  # type: ignore[method-assign]


def _draw_alike(args: Any) -> None:
    """Rows that are grouped by length are put in order by each process's own generator, which dropout on a CPU moves on
    by as many numbers as the process has tokens: in another order it would take rows that others have taken, too."""
    # The first of transformers 5 have a flag for it.
    if getattr(args, "train_sampling_strategy", "") == "group_by_length" or getattr(args, "group_by_length", False):
        torch.set_rng_state(of_process_0(torch.get_rng_state()))


def _being_saved(output_dir: Path, step: int) -> Path | None:
    """The checkpoint folder that Trainer is writing; a hyperparameter search has one folder a trial in between."""
    if (told := _trainers_own("output_dir")) is not None and told.name == f"checkpoint-{step}" and told.is_dir():
        return told  # wherever a Trainer of the user's puts it
    found = [p for p in (output_dir / f"checkpoint-{step}", *output_dir.glob(f"*/checkpoint-{step}")) if p.is_dir()]
    return max(found, key=lambda p: p.stat().st_mtime_ns, default=None)


def _trainers_own(variable: str) -> Path | None:
    """A folder that the Trainer which is calling keeps in a variable of its own: it tells no callback of it."""
    for frame in callers():
        folder = frame.f_locals.get(variable)
        if isinstance(frame.f_locals.get("self"), Trainer) and isinstance(folder, (str, os.PathLike)):
            return Path(folder)
    return None


def _trainer() -> Trainer | None:
    """The Trainer that is calling; None where an event is called by hand."""
    return next((f.f_locals["self"] for f in callers() if isinstance(f.f_locals.get("self"), Trainer)), None)


def _is_in_training(callback: TrimCallback) -> bool:
    """Whether the training loop of a Trainer that has this callback is among the callers."""
    return any(
        frame.f_code.co_name in ("_inner_training_loop", "train")
        and isinstance(trainer := frame.f_locals.get("self"), Trainer)
        and any(one is callback for one in trainer.callback_handler.callbacks)
        for frame in callers()
    )


def _tensors(output: Any, depth: int = 4) -> list[Tensor]:
    """Those in a model's output: a tensor, a container of them, or an object that keeps them as attributes."""
    if isinstance(output, Tensor):
        return [] if isinstance(output, nn.Parameter) else [output]  # a parameter would collect hooks
    if isinstance(output, Mapping):
        held = list(output.values())
    elif isinstance(output, (list, tuple)):
        held = list(output)
    elif dataclasses.is_dataclass(output):  # with slots it has no __dict__
        held = [getattr(output, field.name, None) for field in dataclasses.fields(output)]
    else:  # an output may hold the module that made it
        held = [] if isinstance(output, (nn.Module, type)) else list(getattr(output, "__dict__", {}).values())
    return [t for value in held for t in _tensors(value, depth - 1)] if depth else []


def _is_main() -> bool:
    return not is_distributed() or torch.distributed.get_rank() == 0
