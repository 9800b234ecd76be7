"""A step is an optimizer step, whatever loop it is in, and the optimizer holds what trains."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
from typing import Any

import numpy as np
import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from torch.amp import GradScaler
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

import short_runs as runs
import tiny
from trimtab import AdaLoRA, AFLoRA, Controller, TrimCallback, TrimConfig
from trimtab.errors import CheckpointError, ConfigError, ModelError, StaleAdapterError
from trimtab.train.steps import NOT_FINITE_LIMIT

ADALORA = AdaLoRA(target_r=2, start="svd", warmup=2, final=6, interval_steps=1)  # adds a penalty


def made(optimizer: Any = torch.optim.AdamW, steps: int = 12, **options: Any):
    """Model, optimizer, controller, and the controller's events."""
    more = {k: options.pop(k) for k in ("fused",) if k in options}
    method = options.pop("method", {"rank": ADALORA})
    model = runs.model_for("bert", "adalora", lora_dropout=0.0, **({"rank": None} | method), **options).eval()
    optimizer = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2, **more)
    events: list[dict] = []
    return model, optimizer, Controller(model, optimizer, steps, on_event=events.append), events


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], atol: float = 1e-6) -> bool:
    return one.keys() == two.keys() and all(
        one[n].shape == two[n].shape and torch.allclose(one[n], two[n], atol=atol) for n in one
    )


def plain_run(losses: int = 1, steps: int = 12) -> dict[str, torch.Tensor]:
    model, optimizer, controller, _ = made(torch.optim.SGD, steps)
    for step in range(steps):
        sum(model(**tiny.batch("bert", seed=step * losses + i)).loss for i in range(losses)).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    return weights(model)


# -- a step is an optimizer step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_made_first", [True, False])
def test_accelerates_accumulated_micro_batches_are_one_step(is_made_first):
    model, optimizer, controller, _ = made(torch.optim.SGD)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    if not is_made_first:
        model = runs.model_for("bert", "adalora", lora_dropout=0.0, rank=ADALORA).eval()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if not is_made_first:
        controller = Controller(wrapped, optimizer, 12)
    for micro in range(24):
        with accelerator.accumulate(wrapped):
            accelerator.backward(2 * wrapped(**tiny.batch("bert", seed=micro)).loss)  # accelerate divides by 2
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
    controller.finish()
    assert controller.step == 12
    assert same(weights(model), plain_run(losses=2))


@pytest.mark.parametrize("calls", ["after the last", "after each"])
def test_two_backward_passes_are_one_step(calls):
    model, optimizer, controller, _ = made(torch.optim.SGD)
    for step in range(12):
        for i in range(2):
            model(**tiny.batch("bert", seed=2 * step + i)).loss.backward(retain_graph=True)
            if calls == "after each" or i == 1:
                controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    assert controller.step == 12
    assert same(weights(model), plain_run(losses=2))


@pytest.mark.parametrize("zeroed", [False, True])
def test_the_trainer_penalises_once_in_a_step_of_two_backward_passes(tmp_path, zeroed):
    seen: list[dict[str, torch.Tensor]] = []

    class Twice(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            if zeroed:  # as sharpness-aware minimisation does: the first gradients are thrown away
                model(**inputs).loss.backward()
                model.zero_grad()
            else:
                (0.5 * model(**inputs).loss).backward()
            loss = (1.0 if zeroed else 0.5) * model(**inputs).loss
            loss.backward()
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n})
            return loss.detach()

    class Once(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = super().training_step(model, inputs)
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n})
            return loss

    for kind in (Once, Twice):
        model = runs.model_for("bert", "adalora", lora_dropout=0.0, rank=ADALORA)
        model.config.hidden_dropout_prob = 0.0
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        args = TrainingArguments(str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True, seed=0)
        kind(model, args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()]).train()
    assert len(seen) == 24 and same(seen[0], seen[12]) and seen[0]


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_before_after_step_is_refused(set_to_none):
    model, optimizer, controller, _ = made()
    model(**tiny.batch("bert")).loss.backward()
    controller.before_step()
    optimizer.step()
    optimizer.zero_grad(set_to_none=set_to_none)
    with pytest.raises(StaleAdapterError, match=r"call optimizer.zero_grad after after_step"):
        controller.after_step()


def test_a_forgotten_call_is_refused_by_name():
    model, optimizer, controller, _ = made()
    with pytest.raises(StaleAdapterError, match="after_step: call before_step first"):
        controller.after_step()
    model(**tiny.batch("bert")).loss.backward()
    controller.before_step()
    optimizer.step()
    with pytest.raises(StaleAdapterError, match="after_step was not called"):
        controller.before_step()
    controller.after_step()
    optimizer.step()
    with pytest.raises(StaleAdapterError, match="without before_step"):
        controller.before_step()


def test_a_closure_that_makes_the_gradients_anew_is_refused():
    model, optimizer, controller, _ = made()

    def closure():
        optimizer.zero_grad()
        loss = model(**tiny.batch("bert")).loss
        loss.backward()
        return loss

    closure()
    controller.before_step()
    with pytest.raises(StaleAdapterError, match="before_step at the end of the closure"):
        optimizer.step(closure)
    with pytest.raises(ConfigError, match="LBFGS"):
        Controller(model, torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad]), 12)


def test_a_closure_that_does_nothing_is_no_mistake():
    ends = []
    for closure in ((), (lambda: None,)):  # Lightning hands one to every step of a loop with manual optimisation
        model, optimizer, controller, _ = made()
        for step in range(12):
            model(**tiny.batch("bert", seed=step)).loss.backward()
            controller.before_step()
            optimizer.step(*closure)
            controller.after_step()
            optimizer.zero_grad()
        controller.finish()
        ends.append(weights(model))
    assert same(*ends, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_an_optimizer_made_anew_in_mid_run_is_refused(fused):
    model, optimizer, controller, _ = made(fused=fused)
    with pytest.raises(StaleAdapterError, match=r"\(AdamW\) was not stepped.*optimizer\.state\.clear\(\)"):
        for step in range(12):
            if step == 4:  # for a warm restart
                optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=fused)
            model(**tiny.batch("bert", seed=step)).loss.backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
    assert controller.step == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda loop: pickle.loads(pickle.dumps(loop))])
def test_a_copied_or_pickled_loop_goes_on_as_the_one_that_it_is_of(copied):
    model, optimizer, controller, _ = made()
    controller.on_event = None
    runs.steps(model, controller, optimizer, 5, "bert")
    loops = [(model, controller, optimizer), copied((model, controller, optimizer))]
    for of_model, of_controller, of_optimizer in loops:
        runs.steps(of_model, of_controller, of_optimizer, 7, "bert")
        of_controller.finish()
    assert same(*(weights(of_model) for of_model, _, _ in loops), atol=0.0)


@pytest.mark.filterwarnings("ignore:adapter 'default' has a rank")
def test_weights_may_be_given_back_after_a_search_for_a_learning_rate():
    model = runs.model_for("bert", "salientlora").eval()
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        model(**tiny.batch("bert")).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    found = copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    controller = Controller(model, optimizer, 30)
    runs.steps(model, controller, optimizer, 1, "bert")
    model.load_state_dict(start)
    with pytest.raises(StaleAdapterError, match="were replaced while"):  # of a run that is on
        Controller(model, optimizer, 30)._check_not_stale()
    other = runs.model_for("bert", "salientlora")
    other.load_state_dict(found)
    with pytest.raises(StaleAdapterError, match="were replaced while"):  # of a run that nothing is known of
        Controller(other, None, 30)._check_not_stale()


@pytest.mark.parametrize("freeze", [AFLoRA(start="svd"), AFLoRA(trainable_projections=["query"])])
def test_a_start_whose_diagonals_are_no_ones_is_not_given_back_as_plain_lora(freeze):
    model = peft.get_peft_model(tiny.build("bert"), TrimConfig(r=4, target_modules=["query", "value"], freeze=freeze))
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.9)
    model.load_state_dict(start)
    with pytest.raises(StaleAdapterError):
        Controller(model, None, 30)._check_not_stale()


def test_an_adapter_without_its_peft_model_is_named_with_what_to_call():
    model = tiny.build("bert")
    peft.inject_adapter_in_model(TrimConfig(target_modules=["query"], rank=ADALORA), model)  # transformers' add_adapter
    with pytest.raises(ModelError, match=r"without its PeftModel.*peft\.get_peft_model"):
        Controller(model, torch.optim.SGD(model.parameters(), lr=1e-2), 12)


def test_what_holds_a_model_and_is_none_is_named():
    class Holder:  # a SetFitModel, which SetFit's Trainer shows its callbacks
        body = runs.model_for("bert", "adalora", rank=ADALORA)

    with pytest.raises(ModelError, match="Holder is no torch module"):
        Controller(Holder(), None, 12)
    args, state = TrainingArguments(report_to=[], use_cpu=True), TrainerState(max_steps=12)
    with pytest.raises(ModelError, match="Holder is no torch module"):
        TrimCallback().on_train_begin(args, state, TrainerControl(), model=Holder())


def test_an_adapter_without_values_is_refused():
    config = TrimConfig(r=4, target_modules=["query"], rank=ADALORA)
    model = peft.get_peft_model(tiny.build("bert"), config, low_cpu_mem_usage=True)
    with pytest.raises(ConfigError, match=r"low_cpu_mem_usage=True: .*leave it out of get_peft_model"):
        Controller(model, None, 12)


def test_a_step_that_the_loop_leaves_out_is_no_mistake_where_it_says_so_or_gradients_do():
    model, optimizer, controller, events = made()
    for step in range(12):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        if step == 3:
            next(p for n, p in model.named_parameters() if "modules_to_save" in n).grad[0] = float("nan")
        controller.before_step()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if is_taken := bool(norm.isfinite()) and step != 7:
            optimizer.step()
        controller.after_step(skipped=not is_taken and step == 7)
        optimizer.zero_grad()
    controller.finish()
    assert [e["step"] for e in events if e["event"] == "skipped"] == [4, 8]


# -- no gradient, no score ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["adalora", "aflora"])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_before_step_before_backward_is_refused(set_to_none, method):
    options = {"rank": ADALORA} if method == "adalora" else {"freeze": AFLoRA(warmup=2, final=4, interval_steps=2)}
    model, optimizer, controller, _ = made(method=options)
    optimizer.zero_grad(set_to_none)
    controller.before_step()
    model(**tiny.batch("bert")).loss.backward()
    optimizer.step()
    with pytest.raises(StaleAdapterError, match="before_step was called before backward"):
        controller.after_step()


def test_an_optimizer_that_steps_inside_backward_is_refused():
    model = runs.model_for("bert", "adalora", lora_dropout=0.0, rank=ADALORA).eval()
    optimizers = {p: torch.optim.AdamW([p], lr=1e-2) for p in model.parameters() if p.requires_grad}

    def step_now(p: torch.nn.Parameter) -> None:
        optimizers[p].step()
        optimizers[p].zero_grad()

    for p in optimizers:
        p.register_post_accumulate_grad_hook(step_now)
    with pytest.warns(UserWarning, match="no torch optimizer"):
        controller = Controller(model, None, 12)
    with pytest.raises(StaleAdapterError, match=r"for 3 steps in a row, up to step 3: .*inside backward"):
        for step in range(12):
            model(**tiny.batch("bert", seed=step)).loss.backward()
            controller.before_step()
            controller.after_step()


def test_optimizers_that_are_known_to_step_inside_backward_are_refused_before_the_first_step():
    class Lomo(torch.optim.SGD):
        def fused_backward(self, loss: torch.Tensor, lr: float) -> None: ...

    model = runs.model_for("bert", "adalora", rank=ADALORA)
    trained = [p for p in model.parameters() if p.requires_grad]
    layerwise = LayerWiseDummyOptimizer({p: torch.optim.SGD([p]) for p in trained}, lr=1e-2)  # galore_adamw_layerwise
    for optimizer in (Lomo(trained, lr=1e-2), layerwise):
        with pytest.raises(ConfigError, match=f"{type(optimizer).__name__}.*steps inside backward"):
            Controller(model, optimizer, 12)


def test_ranks_are_not_cut_by_a_controller_that_saw_no_step():
    model, optimizer, controller, _ = made()
    ranks = controller.ranks()
    for step in range(12):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for _ in range(2):
        with pytest.raises(StaleAdapterError, match=r"finish: .* no step of the optimizer was seen; call before_step"):
            controller.finish()
    assert controller.ranks() == ranks


def test_an_adapter_that_nobody_trained_can_be_finished():
    _, _, controller, _ = made()
    controller.finish(stopped_early=True)
    assert sum(controller.ranks().values()) == 2 * len(controller.ranks())


def test_a_batch_that_is_left_out_scores_nothing_and_moves_nothing():
    left_out, whole = ({4, 5, 9}, set())
    seen = []
    for empty in (left_out, whole):
        model, optimizer, controller, events = made(method={"rank": ADALORA})
        for step in range(12):
            before = weights(model)
            if step not in empty:
                model(**tiny.batch("bert", seed=step)).loss.backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
            assert (step in empty) == (same(weights(model), before, atol=0))
        controller.finish()
        seen.append([e["step"] - 1 for e in events if e["event"] == "skipped"])
        assert sum(controller.ranks().values()) == 2 * len(controller.ranks())
    assert seen == [sorted(left_out), []]


# -- one controller, for the whole run --------------------------------------------------------------------------


def steps(model: Any, optimizer: Any, controller: Controller, n: int) -> None:
    for step in range(n):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", [{"rank": ADALORA}, {"freeze": AFLoRA(warmup=2, final=4, interval_steps=2)}])
def test_a_controller_for_each_epoch_is_refused(method):
    model, optimizer, controller, _ = made(method=method)
    untouched = Controller(model, optimizer, 12)  # made, and never at work
    steps(model, optimizer, controller, 4)
    for later in (untouched, Controller(model, optimizer, 12)):
        with pytest.raises(StaleAdapterError, match="one Controller for the whole run, with the total number of steps"):
            steps(model, optimizer, later, 1)
    optimizer.zero_grad()
    steps(model, optimizer, controller, 4)
    resumed = Controller(model, optimizer, 12)
    resumed.load_state_dict(controller.state_dict())
    steps(model, optimizer, resumed, 4)
    resumed.finish()
    assert resumed.step == 12


@pytest.mark.parametrize("method", [{"rank": ADALORA}, {"freeze": AFLoRA(warmup=2, final=4, interval_steps=2)}])
def test_a_run_that_still_adapts_is_not_resumed_with_the_plain_layers_of_its_checkpoint(method, tmp_path, caplog):
    model, optimizer, controller, _ = made(method=method)
    steps(model, optimizer, controller, 4)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path), is_trainable=True)
    optimizer = torch.optim.AdamW([p for p in loaded.parameters() if p.requires_grad], lr=1e-2)
    resumed = Controller(loaded, optimizer, 12)
    assert [record.getMessage() for record in caplog.records if record.name == "trimtab"] == [
        "these are plain LoRA layers: they train on at their ranks, and nothing is decided"
    ]
    with pytest.raises(CheckpointError, match=r"still adapts \(step 4\).*get_peft_model makes of the run's TrimConfig"):
        resumed.load_state_dict(controller.state_dict())
    steps(loaded, optimizer, resumed, 4)  # without the state it trains on
    assert resumed.step == 4 and not resumed.ranks()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"rank": ADALORA}, r"3 of total_steps=12 were taken, so that adalora cut 64 ranks to 32 at once"),
        ({"freeze": AFLoRA(warmup=2, final=4, interval_steps=2)}, r"3 of total_steps=12 .* aflora froze \d+ of 32"),
    ],
)
def test_a_run_that_ends_long_before_its_total_steps_says_what_was_cut_short(method, words):
    for is_meant in (False, True):
        model, optimizer, controller, _ = made(method=method)
        steps(model, optimizer, controller, 3)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            controller.finish(stopped_early=is_meant)
        lines = [str(w.message) for w in said]
        assert not lines if is_meant else re.search(words + ".*not micro-batches", lines[0])


def test_a_run_that_ends_a_step_before_its_total_steps_says_nothing():
    model, optimizer, controller, _ = made()
    steps(model, optimizer, controller, 11)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.finish()


def test_the_active_adapter_is_taken_whatever_its_name():
    config = TrimConfig(r=4, target_modules=["query"], rank=ADALORA, task_type="SEQ_CLS")
    model = peft.get_peft_model(tiny.build("bert"), config, adapter_name="mine")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, 12)
    train(model, optimizer, controller)
    assert controller.adapter_name == "mine" and set(controller.ranks().values()) != {4}


# -- overflow -------------------------------------------------------------------------------------------------------


def test_a_loss_scale_changes_nothing():
    trained = []
    for is_scaled in (True, False):
        model, optimizer, controller, _ = made(torch.optim.SGD)
        scaler = GradScaler("cpu", init_scale=8.0, enabled=is_scaled)
        for step in range(12):
            scaler.scale(model(**tiny.batch("bert", seed=step)).loss).backward()
            controller.before_step(scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()
            controller.after_step()
            optimizer.zero_grad()
        trained.append(weights(model))
    assert same(*trained)


@pytest.mark.parametrize("method", ["adalora", "aflora"])
@pytest.mark.parametrize("where", ["everywhere", "in the head"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("lost", [0, 5])  # at the first one nobody has seen the scaler yet
def test_a_step_that_overflowed_counts_scores_nothing_and_is_recorded(lost, fused, where, method):
    options = {"rank": ADALORA} if method == "adalora" else {"freeze": AFLoRA(warmup=2, final=4, interval_steps=2)}
    model, optimizer, controller, events = made(fused=fused, method=options)
    scaler = GradScaler("cpu", init_scale=8.0)
    for step in range(12):
        loss = model(**tiny.batch("bert", seed=step)).loss
        scaler.scale(loss * (float("inf") if step == lost and where == "everywhere" else 1.0)).backward()
        if step == lost and where == "in the head":
            next(p for n, p in model.named_parameters() if "modules_to_save" in n and p.grad is not None).grad.fill_(
                float("inf")
            )
        controller.before_step(scaler.get_scale())
        scaler.step(optimizer)
        scaler.update()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    assert [e for e in events if e["event"] == "skipped"] == [{"event": "skipped", "step": lost + 1}]
    assert controller.step == 12
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("is_scaled", [True, False])
def test_a_run_whose_gradients_stay_nan_ends_with_advice(is_scaled):
    model, optimizer, controller, events = made(steps=80)
    scaler = GradScaler("cpu", enabled=is_scaled)
    with pytest.raises(ModelError, match=f"for {NOT_FINITE_LIMIT} steps in a row.*lower the learning rate"):
        for _ in range(80):
            scaler.scale(model(**tiny.batch("bert")).loss * float("nan")).backward()
            controller.before_step()
            scaler.step(optimizer)
            scaler.update()
            controller.after_step()
            optimizer.zero_grad()
    assert controller.step == NOT_FINITE_LIMIT == sum(e["event"] == "skipped" for e in events)
    assert all(torch.isfinite(t).all() for t in controller.state_dict()[0].values())


# -- nothing is left hanging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_run_that_died_leaves_no_hook_that_acts(tmp_path, error):
    class Dies(Trainer):
        def training_step(self, *args, **kw):
            if self.state.global_step == 3:
                raise error
            return super().training_step(*args, **kw)

    model = runs.model_for("bert", "adalora", rank=ADALORA)
    args = TrainingArguments(str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Dies(model, args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])
    with pytest.raises(error):
        trainer.train()
    trainer.optimizer.zero_grad()
    for held in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), model):
        held.eval()
        held(**tiny.batch("bert")).loss.backward()
        gradients = {n: p.grad.clone() for n, p in held.named_parameters() if "lora_" in n}
        held._forward_hooks.clear()
        held.zero_grad()
        held(**tiny.batch("bert")).loss.backward()
        assert same(gradients, {n: p.grad for n, p in held.named_parameters() if "lora_" in n}, atol=0)
    del trainer
    gc.collect()
    assert not model._forward_hooks


def test_a_trainer_that_was_interrupted_while_it_accumulated_holds_up_no_bare_loop(tmp_path):
    class Dies(Trainer):
        calls = 0

        def training_step(self, *args, **kw):
            self.calls += 1
            if self.calls == 6:
                raise KeyboardInterrupt
            return super().training_step(*args, **kw)

    model = runs.model_for("bert", "adalora", rank=None)
    args = TrainingArguments(
        str(tmp_path), max_steps=12, report_to=[], use_cpu=True, disable_tqdm=True, gradient_accumulation_steps=4
    )
    trainer = Dies(model, args, train_dataset=tiny.rows("bert"))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not GradientState().sync_gradients
    del trainer
    gc.collect()
    model, optimizer, controller, _ = made()
    train(model, optimizer, controller)
    assert controller.step == 12


# -- the optimizer holds what trains --------------------------------------------------------------------------------


class Mine(torch.optim.AdamW):
    """Somebody's subclass, with the original's state."""


class Statistics(torch.optim.AdamW):
    """Keeps a row of column statistics, which no cut can follow."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 2 and p in self.state:
                    self.state[p]["columns"] = p.detach().abs().sum(0)


class SlowWeights(torch.optim.AdamW):
    """Lookahead's kind: the state holds the weights once more."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p].setdefault("slow", p.detach().clone())


def train(model: Any, optimizer: Any, controller: Controller) -> None:
    steps(model, optimizer, controller, 12)
    controller.finish()


def test_a_subclass_of_adamw_is_cut_like_the_original():
    models = []
    for kind in (torch.optim.AdamW, Mine):
        model, optimizer, controller, events = made(kind)
        train(model, optimizer, controller)
        assert any(e.get("kind") == "prune" and e["freed"]["moments"] for e in events)
        models.append(weights(model))
    assert same(*models, atol=0)


def test_an_optimizer_with_a_state_of_another_shape_masks_and_says_so_once():
    model, optimizer, controller, _ = made(Statistics)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        train(model, optimizer, controller)
    assert len([w for w in said if "masked, not pruned" in str(w.message)]) == 1
    assert sum(controller.ranks().values()) == 2 * len(controller.ranks())


def test_a_second_copy_of_the_weights_is_refused_by_name():
    model = runs.model_for("bert", "adalora", rank=ADALORA)
    optimizer = SlowWeights([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ConfigError, match=r"SlowWeights.*second copy of the weights"):
        optimizer.zero_grad()
        train(model, optimizer, Controller(model, optimizer, 12))


def test_schedule_free_is_refused_by_name():
    schedulefree = pytest.importorskip("schedulefree")
    model = runs.model_for("bert", "adalora", rank=ADALORA)
    optimizer = schedulefree.AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with pytest.raises(ConfigError, match=r"AdamWScheduleFree.*second copy"):
        Controller(model, optimizer, 12)
    with pytest.raises(ConfigError, match=r"AdamWScheduleFree.*second copy"):
        Controller(model, Accelerator(cpu=True).prepare(optimizer), 12)


@pytest.mark.parametrize("held", ["list", "function"])
def test_what_is_no_optimizer_is_refused_by_its_type(held):
    model = runs.model_for("bert", "adalora", rank=ADALORA)
    trained = [p for p in model.parameters() if p.requires_grad]
    several = [torch.optim.AdamW(trained[::2], fused=True), torch.optim.AdamW(trained[1::2], fused=True)]
    with pytest.raises(ConfigError, match=f"optimizer='{held}': .* one torch optimizer") as said:
        Controller(model, several if held == "list" else lambda: several, 12)
    assert ("several parameter groups" in str(said.value)) == (held == "list")


@pytest.mark.parametrize("kind", ["fabric", "lightning"])
def test_lightnings_wrappers_are_cut_like_what_they_wrap(kind):
    pytest.importorskip("lightning")
    from lightning.fabric.wrappers import _FabricOptimizer
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = runs.model_for("bert", "adalora", rank=ADALORA)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    wrapped = LightningOptimizer(optimizer) if kind == "lightning" else _FabricOptimizer(optimizer, None)
    controller = Controller(model, wrapped, 12)
    assert controller.optimizer is optimizer
    train(model, optimizer, controller)
    assert all(v.shape == p.shape for p, s in optimizer.state.items() for v in s.values() if v.dim() > 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_in_half_precision_are_widened_in_a_bare_loop(dtype):
    model = runs.model_for("bert", "adalora", rank=ADALORA).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    with pytest.warns(UserWarning, match="brought to float32"):
        Controller(model, optimizer, 12)
    assert {p.dtype for n, p in model.named_parameters() if "lora_" in n} == {torch.float32}


def test_numpys_integers_are_integers():
    i = np.int64
    rank = AdaLoRA(target_r=i(2), start="svd", warmup=i(2), final=i(6), interval_steps=i(1))
    assert rank == ADALORA and repr(rank) == repr(ADALORA)
    assert repr(AFLoRA(interval_steps=i(2))) == repr(AFLoRA(interval_steps=2))
    config = TrimConfig(r=i(4), target_modules=["query"], rank=rank)
    assert type(config.r) is int
    model = peft.get_peft_model(tiny.build("bert"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, i(12), steps_per_epoch=i(4))
    assert (type(controller.total_steps), type(controller.steps_per_epoch)) == (int, int)
    for wrong in (0, True, 2.0, np.float64(3)):
        with pytest.raises(ConfigError, match="total_steps"):
            Controller(model, optimizer, wrong)
