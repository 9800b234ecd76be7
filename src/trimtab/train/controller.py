"""The step protocol: who decides when, during training.

    start -> per step: backward done -> before_step -> clipping -> optimizer.step -> after_step -> zero_grad
          -> finish

`before_step` averages the adapters' gradients over processes, adds the penalty's gradient and reads what
must be read before clipping. `after_step` lets the rank method decide, then the freeze method, and applies
both. The controller knows no method by name: it calls settings objects through `rank/base.py` and
`freeze/base.py`, and finds parameters by type.
"""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..budget import Choice, solve
from ..errors import ConfigError, ModelError, StaleAdapterError
from ..host.adapted import adapter_layers, adapter_parameters, peft_model_of, running_averages
from ..host.config import TrimConfig, own_config, settle
from ..host.layers import unwrap_empty
from ..host.sharding import is_sharded
from ..plans import Budget, Site
from .parallel import (
    AverageAfterBackward,
    agree,
    average,
    broadcast,
    decision_bits,
    give_back_to_ddp,
    is_distributed,
    is_launched,
    keep_whole,
    refuse_engines,
    refuse_if_in_ddp,
    refuse_other_sites,
)
from .prune import (
    Freed,
    decouples_decay,
    drop_optimizer_state,
    prune_layer,
    unwrap_optimizer,
    why_masks_only,
    why_not_cuttable,
)
from .refusals import (
    refuse_a_second_adapter,
    refuse_a_second_controller,
    refuse_dead_start,
    refuse_groups_that_leave_out,
    refuse_lora_fa,
    refuse_plain_layers,
    refuse_tensors_made_anew,
    refuse_what_is_no_optimizer,
    refuse_while_merged,
    take_charge,
)
from .state import (
    fingerprint,
    refuse_another_run,
    refuse_other_tensors,
    refuse_to_go_on_undecided,
    restore_factors,
    saved_factors,
)
from .steps import (
    NOT_FINITE_LIMIT,
    UNSEEN_LIMIT,
    StepWatch,
    forget_interrupted_accumulation,
    is_accumulating,
    refuse_second_copies,
    refuse_what_cannot_be_followed,
)
from .tensors import AdapterTensors, active_adapter

if TYPE_CHECKING:
    from ..freeze.base import FreezeSettings
    from ..rank.base import Decision, Factors, RankSettings

logger = logging.getLogger("trimtab")

Event = dict[str, Any]
_WHOLE = 0.9
"""Share of its steps from which a run counts as whole: loops drop a last batch, and round."""


class Controller:
    """Owns what adapts during training; independent of any trainer.

    In a bare loop::

        ctl = trimtab.Controller(model, optimizer, total_steps=n)
        for batch in data:
            model(**batch).loss.backward()
            ctl.before_step()          # before clipping
            optimizer.step()
            ctl.after_step()
            optimizer.zero_grad()
        ctl.finish()

    The same inside ``with accelerator.accumulate(model)``: only micro-batches that end in a step count. With several
    processes, make it of the module that `DistributedDataParallel` or `accelerator.prepare` is going to wrap, before
    they do, and after `fully_shard` (see `trimtab.whole_parameters`).

    Args:
        model: a `PeftModel` (possibly wrapped) whose adapter came from `TrimConfig`; any other adapter is
            only counted.
        optimizer: the torch optimizer, or a wrapper with ``.optimizer``.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: needed where a phase is given in epochs.
        adapter_name: PEFT's name of the adapter; None takes the active one.
        on_event: called with each history row (see the reports page for the rows).
    Raises:
        ConfigError: a schedule that does not fit ``total_steps``, with the numbers.
        StaleAdapterError: the layers hold tensors that were loaded from elsewhere.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any = None,
        total_steps: int = 0,
        *,
        steps_per_epoch: int | None = None,
        adapter_name: str | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        if not is_count(total_steps):
            raise ConfigError("total_steps", total_steps, "the number of optimizer steps of the run, at least 1")
        if steps_per_epoch is not None and not is_count(steps_per_epoch):
            raise ConfigError("steps_per_epoch", steps_per_epoch, "optimizer steps of one epoch, at least 1")
        self.model = model
        self.adapter_name = adapter_name = active_adapter(model) if adapter_name is None else adapter_name
        self.optimizer = unwrap_optimizer(optimizer)
        self.total_steps = operator.index(total_steps)
        self.steps_per_epoch = steps_per_epoch = None if steps_per_epoch is None else operator.index(steps_per_epoch)
        self.on_event = on_event
        self.step = 0
        self._mark = object()  # tells this controller from another on the same adapter
        self._tensors = AdapterTensors(model, adapter_name)
        self.layers = self._tensors.layers
        if self.layers:
            refuse_what_cannot_be_followed(self.optimizer)
        refuse_groups_that_leave_out(self._tensors, self.optimizer)
        if self.layers:
            forget_interrupted_accumulation()
            refuse_engines(model, self._tensors.parameters, optimizer, self.optimizer)
            refuse_what_is_no_optimizer(optimizer, self.optimizer)
            if is_distributed():
                refuse_other_sites(self._tensors.shapes())
            if is_launched():
                keep_whole(model, adapter_name)
            self.broadcast()  # nobody else does
            was_narrow = [layer.widen(adapter_name) for layer in self.layers.values()]
            if any(was_narrow):
                warnings.warn(
                    "adapters in half precision are brought to float32: smaller steps would be lost in it", stacklevel=2
                )
        if moving := running_averages(model):
            others = f" and {len(moving) - 1} more" if moving[1:] else ""
            warnings.warn(
                f"running averages of {moving[0]}{others}: training changes them, and no adapter or checkpoint holds "
                "them: what is saved would compute something else; name them in modules_to_save, or keep them in "
                "evaluation mode",
                stacklevel=2,
            )
        self.param_steps = 0  # sum over steps of what was trainable in them: the time-average's numerator
        self.initial_params = self.trainable_params()
        self.last_penalty: Tensor | None = None
        self.final_params = self.held_params = 0  # known once finished
        self.is_finished = False
        self._finished: dict[str, Any] | None = None  # state of the finished run that trains on
        self._is_ready = False
        self._seen: tuple[nn.Parameter, Tensor] | None = None  # a gradient that the penalty was added to
        self._not_finite = 0  # steps in a row without finite gradients
        self._is_unseen = False  # in this step no adapter had a gradient
        self._is_late = False  # in this step it was seen only after clipping
        self._unseen = 0  # steps in a row of the two kinds
        self._has_seen = False  # at any step
        self._gradients: dict[str, Tensor] = {}
        self._e_before: dict[str, Tensor] = {}
        self._mask: dict[str, Tensor] = {}  # the last mask that processes have not compared yet, and its hash
        self._mask_bits: list[int] = []
        self._is_sharded: bool | None = None  # not known yet
        self._gone: list[nn.Parameter] = []  # what `finish` took out of the model
        config = own_config(model, adapter_name)
        if isinstance(config, TrimConfig):  # PEFT's own layers, where another adapter made them, have not asked for it
            config.check_model(peft_model_of(model).get_base_model())
        elif not self.layers and config.peft_type == "LORA":
            logger.warning("these are plain LoRA layers: they train on at their ranks, and nothing is decided")
        for layer in self.layers.values():
            layer.hosted[adapter_name].is_decided = True
        if isinstance(config, TrimConfig) and config.is_adaptive:
            refuse_plain_layers(self._tensors)
            refuse_a_second_adapter(self._tensors)
        self._decide_from_start()
        self._why_masks_only = why_masks_only(self.rank, self.optimizer)
        refuse_dead_start(self._tensors, self.freeze)
        refuse_lora_fa(self._tensors, self.freeze, self.optimizer)
        self._watch = StepWatch(self.optimizer if self.layers else None, optimizer)
        if never := self.frozen():
            self._emit_freeze(never)
        self._emit_params()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy decides on the layers that were copied with it."""
        self.__dict__.update(state)
        for layer in self.layers.values():
            if (hosted := layer.hosted.get(self.adapter_name)) is not None:
                hosted.is_decided = True

    def _decide_from_start(self) -> None:
        """Settings, allocator and freezer for the initial ranks that the layers have."""
        config = own_config(self.model, self.adapter_name)
        self.rank: RankSettings | None = None
        self.freeze: FreezeSettings | None = None
        self.choice: Choice | None = None
        if isinstance(config, TrimConfig) and self.layers:
            self.rank, self.freeze = config.rank, config.freeze
            if config.budget is not None:
                self._meet(config.budget, config.budget_frees)
        hosted = {name: layer.hosted[self.adapter_name] for name, layer in self.layers.items()}
        self.initial_ranks = {name: own.initial_r for name, own in hosted.items()}
        self._sites = {name: (own.initial_r, own.scale) for name, own in hosted.items()}
        self.allocator = self.freezer = None
        length = self.total_steps, self.steps_per_epoch
        if self.rank is not None:
            limit = self.choice.cost_limit() if self.choice is not None else None
            self.allocator = self.rank.build(self.initial_ranks, *length, self._peak_learning_rate(), limit)
        if self.freeze is not None:
            self.freeze.check_sites(self.layers)
            self.freezer = self.freeze.build(self._tensors.projections_at_start(), *length)
            if self.choice is not None:
                self.freezer.follow(list(self.choice.levels))

    # -- the protocol -------------------------------------------------------------------------------

    def before_step(self, loss_scale: float | None = None, loss: Tensor | None = None) -> None:
        """After the step's last backward and before clipping.

        While accelerate accumulates, it does nothing. Called again in the same step (a second loss), it takes in what
        was added to the gradients since.

        Args:
            loss_scale: factor that the gradients still carry (a bare fp16 scaler's ``get_scale()``); None asks
                accelerate's optimizer, and is 1 without one.
            loss: of this process, shape (). Gradients tell of one that is not finite, but for a mean over no labels,
                whose gradients are 0: given here, that step is left out as well.
        """
        if is_accumulating():
            return
        self._check_not_stale()
        self._tensors.keep_frozen()
        if self._watch.has_stepped:
            raise StaleAdapterError(
                "before_step: the optimizer has stepped since the last call of "
                + ("before_step, and after_step was not called" if self._is_ready else "after_step without before_step")
                + "; the order is before_step, optimizer.step, after_step, zero_grad"
            )
        if loss_scale is None:
            loss_scale = self._watch.loss_scale()
        has_penalty = self._is_ready and self._seen is not None and not self._was_zeroed()
        if loss is not None:
            self._take_in(loss.detach())
        self._average_gradients()  # what was averaged before is the same everywhere, so that it stays as it is
        self._silence_dead_columns()
        trained = self._tensors.trained()
        self._is_unseen, self._is_late = bool(trained) and all(p.grad is None for p in trained), False
        if self._is_unseen:
            self.last_penalty = None  # it would be all that the optimizer gets
        elif not has_penalty:
            self._add_penalty(loss_scale)
        with_gradient = [p for p in trained if p.grad is not None]
        gradients = [p.grad for p in with_gradient if p.grad is not None]
        self._seen = (with_gradient[0], gradients[0]) if gradients else None
        self._watch.norms = list(torch._foreach_norm(gradients)) if gradients else []
        if self.freezer is not None and self.freezer.reads_gradients:
            read = {
                name: p.grad.detach()
                for name, p in self._tensors.projections().items()
                if p.requires_grad and p.grad is not None
            }
            # Copies: they are clipped in place after this. One call, and divided by 1 they stay as they are.
            self._gradients = dict(zip(read, torch._foreach_div(list(read.values()), loss_scale))) if read else {}
        if self.rank is not None and not self.rank.e_decays:
            gates = self._tensors.diagonals()  # copies, in one call
            self._e_before = dict(zip(gates, torch._foreach_mul([e.detach() for e in gates.values()], 1)))
        self._is_ready = self._watch.is_ready = True

    def catch_up(self) -> None:
        """`before_step`, too late to score this step: gradients were clipped, as no backward ended with the step."""
        self.before_step()
        self._is_late = True

    def has_gradient(self) -> bool:
        """Whether any tensor of the adaptive layers has a gradient now."""
        return any(p.grad is not None for p in self._tensors.trained())

    def after_step(self, skipped: bool = False) -> None:
        """After `optimizer.step`, while gradients are still there. While accelerate accumulates, it does nothing.

        A step without finite gradients counts, but scores nothing; where no scaler does so, the optimizer is kept from
        taking it. Nor does a step score in which no adapter had a gradient, as where a batch is left out.

        Args:
            skipped: the optimizer was not stepped, for a reason that cannot be seen from here.
        Raises:
            StaleAdapterError: the optimizer was not stepped without such a reason, or the calls come in another order.
        """
        if not self._is_ready:
            if is_accumulating() and not self._watch.has_stepped:
                return
            raise StaleAdapterError(
                "after_step: call before_step first, after backward and before clipping"
                + (
                    " (accelerate says that gradients are still accumulating, as it also does while a Trainer is held "
                    "that was interrupted)"
                    if is_accumulating()
                    else ""
                )
            )
        was_seen = not (self._is_unseen or self._is_late)
        is_blind = not was_seen and not skipped
        if is_blind:
            self._refuse_to_go_on_unseen()
        skipped = skipped or not self._watch.was_finite() or (not is_blind and self._watch.was_left_out())
        if not skipped and not is_blind:
            self._refuse_lost_gradients()
            if not self._has_seen:
                refuse_second_copies(self._tensors.trained(), self.optimizer, self._watch.given)
        self._is_ready = self._watch.is_ready = False
        self._watch.forget()
        take_charge(self._tensors, self._mark)
        self.param_steps += self.trainable_params()
        self.step += 1
        if was_seen:
            self._unseen, self._has_seen = 0, True
        if skipped or is_blind:
            self._emit({"event": "skipped", "step": self.step})
        if skipped:
            self._not_finite += 1
            if self._not_finite >= NOT_FINITE_LIMIT:
                raise ModelError(
                    f"gradients were not finite, or the optimizer was not stepped, for {self._not_finite} steps in a "
                    f"row, up to step {self.step}: lower the learning rate, train in bf16 or fp32 instead of fp16, "
                    "and look for NaN in the data and the loss"
                )
        elif not is_blind:
            self._not_finite = 0
            self._undo_decay_of_e()
            if self.freezer is not None:
                seen = self._tensors.weights() if self.freezer.reads_weights else self._gradients
                self.freezer.observe(self.step - 1, seen)
            if self.allocator is not None:
                self._apply(self.allocator.after_step(self.step, self._factors()))
        if self.freezer is not None and (not (skipped or is_blind) or self._has_purse()):
            is_due = self.freezer.is_due(self.step - 1)
            self._freeze(self.freezer.decide(self.step - 1, self._allowance()), is_due)
        self._gradients, self._e_before, self._watch.norms, self._seen = {}, {}, [], None

    def finish(self, stopped_early: bool = False) -> None:
        """Cut to the target, fold the diagonals, leave plain LoRA factors. Safe to call twice.

        Args:
            stopped_early: the run was meant to end before ``total_steps``, so that no warning tells of it.
        Raises:
            StaleAdapterError: ranks would be cut by scores, and the steps that were taken were not seen.
            ModelError: the adapter is merged into the base's weights.
        """
        if self.is_finished:
            return
        refuse_while_merged(self._tensors)
        ranks = sum(self.ranks().values())
        if self.allocator is not None:
            decision = self.allocator.finish(self.step, self._factors()) or self._masked_for_good()
            is_cut = decision is not None and not all(bool(keep.all()) for keep in decision.keep.values())
            if is_cut and not self._has_seen and (self.step or self._watch.has_stepped):
                raise StaleAdapterError(
                    "finish: ranks are to be cut by scores, and no step of the optimizer was seen; call before_step "
                    "before optimizer.step, and after_step after it, in every step"
                )
            self._apply(decision, is_last=True)
        if not stopped_early and self.step < _WHOLE * self.total_steps:
            self._warn_of_an_early_end(ranks)
        # Before the diagonals are folded in: they were trained, and are part of what the run held.
        self.final_params = self.trainable_params()
        self.held_params = self._tensors.held_params()
        self._emit_params()
        for layer in self.layers.values():
            if any(d is not None for d in layer.at_work(self.adapter_name)):  # A and B change as they are folded in
                for p in self._tensors.named(layer).values():
                    drop_optimizer_state(p, self.optimizer)
        self._settle()
        self._watch.close()
        give_back_to_ddp(self.model)

    def let_go(self) -> None:
        """Take tensors that `finish` took out of the model out of the optimizer's groups, too.

        Only after the last checkpoint, and under FSDP2, where a second `prepare` would look them up in the model: a
        Trainer that goes on from a checkpoint may do it with this optimizer, and needs them listed.
        """
        gone = {id(p) for p in self._gone}
        for group in self.optimizer.param_groups if self.optimizer is not None else ():
            group["params"] = [p for p in group["params"] if id(p) not in gone]
        self._gone = []

    # -- figures ------------------------------------------------------------------------------------

    def trainable_params(self) -> int:
        """Trainable adapter parameters now; heads and other saved modules are not counted."""
        return self._tensors.trainable_params()

    def average_params(self) -> float:
        """Mean over the steps so far of the parameters that were trainable in them (AFLoRA's figure)."""
        return self.param_steps / self.step if self.step else float(self.initial_params)

    def figures(self) -> dict[str, float]:
        """Measured adapter parameters: ``initial``, ``final``, ``average`` trainable, and ``held`` at the end."""
        is_open = not self.is_finished
        held = self._tensors.held_params() if is_open else self.held_params
        final = self.trainable_params() if is_open else self.final_params
        return {"initial": self.initial_params, "final": final, "average": self.average_params(), "held": held}

    def ranks(self) -> dict[str, int]:
        """Site name -> current rank."""
        return self._tensors.ranks()

    # -- state --------------------------------------------------------------------------------------

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that training needs beyond the checkpoint: tensors, and JSON-able facts."""
        if self._finished is not None:  # a finished run that trains on: what was decided stands
            return {}, {**self._finished, "step": self.step, "param_steps": self.param_steps}
        tensors = {} if self.is_finished else saved_factors(self._tensors)
        meta: dict[str, Any] = {
            "step": self.step,
            **self._horizon(),
            "param_steps": self.param_steps,
            "initial_params": self.initial_params,
            "initial_ranks": self.initial_ranks,
            "final_params": self.final_params,
            "held_params": self.held_params,
            "is_finished": self.is_finished,
            "settings": self.settings(),
            "sites": self._sites,
            "fingerprint": self.fingerprint(),
            "ranks": self.ranks(),
            "frozen": sorted(self.frozen()),
            "scales_set": self._scales_set(),
        }
        for part, owner in (("rank", self.allocator), ("freeze", self.freezer)):
            if owner is not None:
                own, facts = owner.state_dict()
                tensors.update({f"{part}/{key}": value for key, value in own.items()})
                meta[part] = facts
        return tensors, meta

    def load_state_dict(
        self, tensors: dict[str, Tensor] | tuple[dict[str, Tensor], dict[str, Any]], meta: dict[str, Any] | None = None
    ) -> None:
        """Restore what `state_dict` gave, in two arguments or as the pair that it is (as accelerate hands it over).

        The layers take the raw factors, at their saved shapes.

        Raises:
            CheckpointError: the state belongs to another horizon, other settings, other sites, or to other tensors
                than were loaded into the layers.
        """
        if isinstance(tensors, tuple):
            tensors, meta = tensors
        assert meta is not None
        refuse_while_merged(self._tensors)
        if not self.layers:
            refuse_to_go_on_undecided(meta)
        self._take_start(meta["sites"])
        if self.layers:  # a finished run may also have been loaded as the plain LoRA that it left
            refuse_another_run(meta, self.settings(), self._sites, self._horizon())
        if not meta["is_finished"]:
            refuse_other_tensors(self._tensors, tensors)
        self.step, self.param_steps = meta["step"], meta["param_steps"]
        self._has_seen = self.step > 0
        take_charge(self._tensors, self._mark)
        self.initial_params, self.initial_ranks = meta["initial_params"], meta["initial_ranks"]
        self.final_params, self.held_params = meta["final_params"], meta["held_params"]
        restore_factors(self._tensors, tensors, meta["ranks"] if meta["is_finished"] else {})
        for name, scale in meta.get("scales_set", {}).items() if self.layers else ():  # a plain LoRA's has it
            self.layers[name].scaling[self.adapter_name] = scale
        for name in meta["frozen"]:
            self._freeze_one(name)
        for part, owner in (("rank", self.allocator), ("freeze", self.freezer)):
            if owner is not None and not meta["is_finished"]:
                own = {k.removeprefix(f"{part}/"): v for k, v in tensors.items() if k.startswith(f"{part}/")}
                owner.load_state_dict(own, meta[part])
        if meta["is_finished"]:
            self._settle()  # nothing is decided again
            self._finished = meta

    def _scales_set(self) -> dict[str, float]:
        """Site -> its scale, where the user has set another one than it was made with (PEFT's ``set_scale``)."""
        now = {name: layer.scaling.get(self.adapter_name) for name, layer in self.layers.items()}
        return {name: s for name, s in now.items() if s is not None and s != self._sites[name][1]}

    def _take_start(self, sites: Mapping[str, tuple[int, float]]) -> None:
        """Where a probe chooses the initial ranks, a resumed run's are those of the run that it resumes."""
        hosted = {name: layer.hosted[self.adapter_name] for name, layer in self.layers.items()}
        if any(own.awaits_start for own in hosted.values()) and sites.keys() == hosted.keys():
            for name, own in hosted.items():
                own.initial_r, own.awaits_start = sites[name][0], False
            self._decide_from_start()

    def _settle(self) -> None:
        own_config(self.model, self.adapter_name)
        for layer in self.layers.values():
            layer.finish(self.adapter_name)
        if self.layers:
            settle(self.model, self.adapter_name)
            unwrap_empty(self.model, self.layers.values())
        left = adapter_parameters(self.model, self.adapter_name)
        held = {id(p) for p in left}
        self._gone = [p for p in self._tensors.parameters if id(p) not in held]
        self._tensors.parameters = left
        if is_distributed() and self.layers:  # the wrapper that was told to leave them alone may still be there
            AverageAfterBackward(self._whole())
        self.is_finished = True

    def settings(self) -> dict[str, str]:
        """What decides, in words: a resumed run must have the same."""
        budget = "; ".join(self.choice.explanation[:1]) if self.choice is not None else "None"
        return {"rank": repr(self.rank), "freeze": repr(self.freeze), "budget": budget, "adapter": self.adapter_name}

    def fingerprint(self) -> str:
        """Hash of the settings, the sites with their initial ranks and scales, and the horizon."""
        return fingerprint(self.settings(), self._sites, self._horizon())

    def _horizon(self) -> dict[str, int | None]:
        return {"total_steps": self.total_steps, "steps_per_epoch": self.steps_per_epoch}

    def frozen(self) -> set[str]:
        """Names ``<site>.lora_A`` of the projections that no longer train."""
        return self._tensors.frozen()

    # -- inside -------------------------------------------------------------------------------------

    def _meet(self, budget: Budget, free: tuple[str, ...]) -> None:
        """Choose the free settings for the sites and steps that there really are."""
        sites = [Site(name, *layer.widths()) for name, layer in self.layers.items()]
        ranks = {name: layer.hosted[self.adapter_name].initial_r for name, layer in self.layers.items()}
        self.choice = solve(
            budget, sites, ranks, rank=self.rank, freeze=self.freeze, ratio=None, total_steps=self.total_steps,
            steps_per_epoch=self.steps_per_epoch, free=free, beside=self._tensors.params_at_no_site(),
        )  # fmt: skip
        self.rank, self.freeze = self.choice.rank, self.choice.freeze
        reason = why_not_cuttable(self.optimizer)
        if self.rank is not None and reason:
            raise ConfigError("budget", str(budget), f"ranks cannot be cut: {reason}; use torch's AdamW, Adam or SGD")

    def _has_purse(self) -> bool:
        return self.choice is not None and self.choice.purse is not None

    def _allowance(self) -> int | None:
        if self.choice is None or self.choice.purse is None:
            return None
        trainable = self.trainable_params() + sum(p.numel() for p in self._tensors.at_rest())  # they will be at work
        projections = sum(p.numel() for p in self._tensors.projections().values() if p.requires_grad)
        return self.choice.purse.allowance(self.param_steps, trainable - projections, self.total_steps - self.step)

    def _peak_learning_rate(self) -> float | None:
        if self.optimizer is None:
            return None
        gates = {id(e) for e in self._tensors.diagonals().values()}
        groups = [g for g in self.optimizer.param_groups if any(id(p) in gates for p in g["params"])]
        return max(group.get("initial_lr", group["lr"]) for group in groups or self.optimizer.param_groups)

    def _check_not_stale(self) -> None:
        stale = [
            name
            for name, layer in self.layers.items()
            if not layer.is_adaptive(self.adapter_name) or layer.hosted[self.adapter_name].is_stale
        ]
        if self.is_finished:
            raise StaleAdapterError(
                "this adapter is finished: plain LoRA factors are left. To train on, load it with "
                "PeftModel.from_pretrained(checkpoint, is_trainable=True)"
            )
        if stale:
            raise StaleAdapterError(
                f"the tensors of {stale[0]!r} and {len(stale) - 1} more modules were replaced while a rank or freeze "
                "method was at work. To resume, use train(resume_from_checkpoint=trimtab.last_checkpoint(dir)); in a "
                "loop of your own load the controller too (accelerator.register_for_checkpointing(controller)); "
                "to train on from a finished adapter, use PeftModel.from_pretrained(checkpoint, is_trainable=True)"
            )
        refuse_while_merged(self._tensors)
        refuse_tensors_made_anew(self._tensors)
        refuse_a_second_controller(self._tensors, self._mark)
        if any(layer.hosted[self.adapter_name].awaits_start for layer in self.layers.values()):
            assert self.rank is not None and self.rank.starter is not None
            raise StaleAdapterError(
                f"rank: {self.rank.starter.method} chooses ranks and factors from training rows before training; call "
                "trimtab.initialize_ranks(model, batches) after get_peft_model, before the Controller or the Trainer"
            )

    def _factors(self) -> dict[str, Factors]:
        return self._tensors.factors(has_values=self.rank is None or self.rank.has_e)

    def _why_state_is_not_cuttable(self) -> str | None:
        if self.optimizer is None or not (reason := why_not_cuttable(self.optimizer)):
            return None
        warnings.warn(f"ranks are masked, not pruned: {reason}. Memory stays as it is", stacklevel=4)
        return reason

    def _was_zeroed(self) -> bool:
        # Another backward adds to the gradients that are there; only after zero_grad are they new tensors. (Those of
        # create_graph are new as well, and remember what they were added up from.)
        if self._seen is None:
            return False
        p, gradient = self._seen
        return p.grad is not gradient and (p.grad is None or p.grad.grad_fn is None)

    def _refuse_lost_gradients(self) -> None:
        norms = self._watch.norms
        if self.allocator is None or not norms:
            return
        left = [p.grad for p in self._tensors.trained() if p.grad is not None]
        # A loop has the same order in all its steps, so that a look at the values is needed in the first ones only.
        if len(left) < len(norms) or (
            self.step < 3 and bool(torch.stack(norms).any()) and not any(bool(g.any()) for g in left)
        ):
            raise StaleAdapterError(
                "after_step: the gradients that scores need are gone; call optimizer.zero_grad after after_step"
            )

    def _warn_of_an_early_end(self, ranks: int) -> None:
        cut_short = []
        if (left := sum(self.ranks().values())) < ranks:
            assert self.rank is not None
            cut_short.append(f"{self.rank.method} cut {ranks} ranks to {left} at once")
        projections = {
            name for name, p in self._tensors.projections().items() if p.numel()
        }  # others were cut to rank 0
        if self.freeze is not None and not projections <= (frozen := self.frozen()):
            frozen &= projections
            cut_short.append(f"{self.freeze.method} froze {len(frozen)} of {len(projections)} projections")
        if cut_short:
            warnings.warn(
                f"finish: {self.step} of total_steps={self.total_steps} were taken, so that {' and '.join(cut_short)}; "
                "total_steps counts optimizer steps, not micro-batches (a run that is meant to end early: "
                "finish(stopped_early=True))",
                stacklevel=3,
            )

    def _refuse_to_go_on_unseen(self) -> None:
        if self._is_unseen and self.has_gradient():
            raise StaleAdapterError(
                "after_step: before_step was called before backward, when no adapter had a gradient; the order is "
                "backward, before_step, optimizer.step, after_step, zero_grad (a Trainer's training_step that sets "
                "gradients itself, as of torch.autograd.grad, cannot be followed: take a bare loop)"
            )
        self._unseen += 1
        if self._unseen >= UNSEEN_LIMIT[self._has_seen]:
            raise StaleAdapterError(
                f"no gradient of the adapters was seen for {self._unseen} steps in a row, up to step {self.step + 1}: "
                "the model's forward was not called through the PeftModel, nothing in its output needs a gradient, or "
                "an optimizer steps inside backward, which cannot be followed"
            )

    def _take_in(self, loss: Tensor) -> None:
        # By way of the gradients every process learns of it: 0 times what is not finite is NaN.
        gradient = next((p.grad for p in self._tensors.trained() if p.grad is not None), None)
        if gradient is not None:
            gradient.detach()[(0,) * gradient.dim()].add_(0 * loss.to(gradient))

    def _average_gradients(self) -> None:
        if not is_distributed() or not self.layers:
            return
        at_rest = {id(p) for p in self._tensors.at_rest()}
        held = [p for p in self._whole() if p.requires_grad and p.numel() and id(p) not in at_rest]
        if not average(held, self._mask_bits):
            agree("rank", self.step, self._mask)
        self._mask, self._mask_bits = {}, []

    def _whole(self) -> list[nn.Parameter]:
        """What nobody else averages: the adapter, and under FSDP2 whatever else it was told to leave whole."""
        if self._is_sharded is None:  # at the first step: the model may be wrapped only after this object was made
            refuse_if_in_ddp(self._tensors.parameters)
            self._is_sharded = is_sharded(self.model)
            if self._is_sharded and hasattr(peft_model_of(self.model), "trim_anchor"):
                raise ModelError("model: it was sharded after the Controller was made; call fully_shard before")
        return [*self._tensors.parameters, *(self._tensors.beside() if self._is_sharded else ())]

    def _silence_dead_columns(self) -> None:
        # A rank that is gone but could not be cut has a column of B at zero. Its gradient would weigh in the clipping
        # norm and in freezing scores, as it does not where ranks are cut.
        if self.allocator is None or self.rank is None or self.rank.has_e or not self.allocator.some_dead:
            return
        sizes = self.allocator.sizes
        for name, alive in zip(self.allocator.names, self.allocator.alive.split(sizes)):
            B = self.layers[name].factors(self.adapter_name)[1]
            if B.grad is not None:
                B.grad.mul_(alive.to(B.device))

    def broadcast(self) -> None:
        """Give every process what trains on process 0; DDP leaves the adapters alone, and FSDP2 what it is told to."""
        if not is_distributed():
            return
        broadcast([*self._tensors.parameters, *self._tensors.beside()])

    def _add_penalty(self, loss_scale: float) -> None:
        self.last_penalty = None
        if self.allocator is None:
            return
        with torch.enable_grad():  # an end-of-backward callback runs without
            penalty = self.allocator.penalty(self._factors())
        if penalty is None:
            return
        self.last_penalty = penalty.detach()
        parameters = self._tensors.trained()
        gradients = torch.autograd.grad(penalty, parameters, allow_unused=True)
        with torch.no_grad():
            for p, g in zip(parameters, gradients):
                if g is None:
                    continue
                if loss_scale != 1.0:
                    g = g * loss_scale
                p.grad = g if p.grad is None else p.grad.add_(g)

    def _undo_decay_of_e(self) -> None:
        # A gate that is pulled to zero by its own rule must not be pulled by weight decay as well. Decoupled
        # decay has taken lr·wd·e from it; give that back.
        if not self._e_before or self.optimizer is None:
            return
        rates = {
            p: group["lr"] * group.get("weight_decay", 0.0)
            for group in self.optimizer.param_groups
            if decouples_decay(self.optimizer, group)
            for p in group["params"]
        }
        pulled: dict[float, list[tuple[Tensor, Tensor]]] = {}
        for name, e in self._tensors.diagonals().items():
            rate = float(rates.get(e, 0.0))
            if rate and e.grad is not None:
                pulled.setdefault(rate, []).append((e.data, self._e_before[name]))
        for rate, pairs in pulled.items():
            torch._foreach_add_(*zip(*pairs), alpha=rate)

    def _masked_for_good(self) -> Decision | None:
        """Ranks that are gone but could only be masked so far; None if there are none."""
        from ..rank.base import Decision

        assert self.allocator is not None
        if bool(self.allocator.alive.all()):
            return None
        keep = dict(zip(self.allocator.names, self.allocator.alive.split(self.allocator.sizes)))
        return Decision(keep, "prune", None, event=True)

    def _apply(self, decision: Decision | None, is_last: bool = False) -> None:
        if decision is None:
            return
        if decision.event:
            agree("rank", self.step, decision.keep)
        elif decision.budget is not None and is_distributed():
            # A mask that is not worth a row changes no shape: it is compared with the next gradients, at no cost.
            self._mask, self._mask_bits = decision.keep, decision_bits(decision.keep)
        assert self.rank is not None
        if decision.kind == "prune" and self._why_masks_only is None:
            self._why_masks_only = self._why_state_is_not_cuttable()
        # Moments that cannot be cut are needed no more once training is over.
        is_cuttable = self._why_masks_only is None
        cut = decision.kind == "prune" and (is_cuttable or (is_last and self.rank.prune))
        freed = Freed()
        with torch.no_grad():
            for name, keep in decision.keep.items():
                layer = self.layers[name]
                if not cut:
                    _, B = layer.factors(self.adapter_name)
                    e, _ = layer.at_work(self.adapter_name)
                    # A column of B takes gradients through A, so that it may come back; frozen, only e can.
                    hidden = B if e is None or (B.requires_grad and not self.rank.has_e) else e
                    hidden.data.mul_(keep.to(hidden.device))
                elif not bool(keep.all()):
                    freed += prune_layer(layer, self.adapter_name, keep, self.optimizer if is_cuttable else None)
                    if not is_cuttable:
                        dropped = [drop_optimizer_state(p, self.optimizer) for p in self._tensors.named(layer).values()]
                        freed += Freed(moments=sum(dropped))
        if cut:
            own_config(self.model, self.adapter_name)  # another adapter may have been made from it since the start
            assert self.allocator is not None
            self.allocator.pruned(decision.keep)
            if self.freezer is not None:
                self.freezer.pruned(decision.keep)
        if decision.event:
            alive = self.ranks() if cut else _counts(decision.keep)
            self._emit(
                {
                    "event": "rank",
                    "step": self.step,
                    "kind": "prune" if cut else "mask",
                    "budget": decision.budget,
                    "ranks": {**self.ranks(), **alive},
                    "freed": vars(freed),
                }
            )
            self._emit(
                {
                    "event": "values",
                    "step": self.step,
                    "values": self._values(),
                }
            )
            if cut:
                self._emit_params()

    def _values(self) -> dict[str, list[float]]:
        """Site -> size of each rank that it holds."""
        from ..rank.base import values_of

        factors = self._factors()
        home = next(iter(factors.values())).A.device
        parts = values_of(list(factors.values()), home).abs().cpu().split([len(f.e) for f in factors.values()])
        return dict(zip(factors, [part.tolist() for part in parts]))

    def _freeze(self, names: set[str], is_due: bool) -> None:
        if names or is_due:  # a process that freezes nothing must take part where another one may
            agree("freeze", self.step, sorted(names))
        if not names:
            return
        for name in sorted(names):
            self._freeze_one(name)
        self._emit_freeze(names)
        self._emit_params()

    def _emit_freeze(self, names: set[str]) -> None:
        projections = self._tensors.projections().values()
        total = sum(p.numel() for p in projections)
        left = sum(p.numel() for p in projections if p.requires_grad)
        self._emit(
            {
                "event": "freeze",
                "step": self.step,
                "frozen": sorted(names),
                "trainable_ratio": left / total if total else 0.0,
            }
        )

    def _freeze_one(self, name: str) -> None:
        site, _, which = name.rpartition(".")
        drop_optimizer_state(self.layers[site].freeze(self.adapter_name, which), self.optimizer)

    def _emit(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)

    def _emit_params(self) -> None:
        row: Event = {"event": "params", "step": self.step, "trainable": self.trainable_params()}
        ranks = [layer.r[self.adapter_name] for _, layer in adapter_layers(self.model, self.adapter_name)]
        if ranks:
            row["total_rank"] = sum(ranks)
        self._emit(row)


def _counts(keep: Mapping[str, Tensor]) -> dict[str, int]:
    """Site -> how many ranks stay. Brought over once, not site by site."""
    flat = torch.cat(list(keep.values())).cpu().split([len(mask) for mask in keep.values()])
    return {name: int(mask.sum()) for name, mask in zip(keep, flat)}


def is_count(value: Any) -> bool:
    """Whether it is an integer of at least 1, numpy's and torch's included."""
    try:
        return not isinstance(value, bool) and operator.index(value) >= 1
    except TypeError:
        return False
