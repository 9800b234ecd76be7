"""Two lines in the user's own script: what people do with a Trainer is right, or refused with the cure."""

from __future__ import annotations

import copy
import logging
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

import short_runs as runs
import tiny
import trimtab
from fakes import Halving
from marks import slow
from trimtab import AdaLoRA, AFLoRA, Controller, FreezeAt, SalientLoRA, SoRA, TrimCallback, TrimConfig
from trimtab.errors import ConfigError, StaleAdapterError
from trimtab.host.adapted import adapter_layers
from trimtab.host.layers import hosted_layers
from trimtab.train.checkpoint import what_is_wrong
from two_process import METHODS, STEPS

SALIENT = SalientLoRA(target_r=2, warmup=2, allocation=8, initial_window=2, final_window=4)
AFLORA = AFLoRA(warmup=1, final=4, interval_steps=2)
SITES = 16  # of tiny BERT


def salient_model(**options: Any) -> peft.PeftModel:
    return runs.model_for("bert", "salientlora", **({"rank": SALIENT} | options))


def fit(model: nn.Module, folder: Path, callbacks: tuple = (), steps: int = 14, **more: Any) -> TrimCallback:
    settings = dict(max_steps=steps, save_strategy="no", logging_steps=1) | more
    return runs.train(model, "bert", folder, callbacks=callbacks, **settings)[0]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "trimtab"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class At(TrainerCallback):
    """Calls a function at one event of one step."""

    def __init__(self, event: str, step: int, act) -> None:
        setattr(self, event, lambda args, state, control, **kw: act(**kw) if state.global_step == step else None)


# -- the best model, and stopping early ---------------------------------------------------------------------------


class Scored(TrainerCallback):
    """Gives every evaluation a score from a list, before anybody reads it; keeps the logits at each save."""

    def __init__(self, scores: dict[int, float]) -> None:
        self.scores, self.logits = scores, {}

    def on_evaluate(self, args, state, control, metrics=None, **kw):
        metrics["eval_score"] = self.scores[state.global_step]

    def on_save(self, args, state, control, model=None, **kw):
        self.logits[state.global_step] = tiny.logits(model, "bert")


BEST = dict(
    eval_strategy="steps", save_strategy="steps", eval_steps=3, save_steps=3, load_best_model_at_end=True,
    metric_for_best_model="score", greater_is_better=True,
)  # fmt: skip


def test_only_checkpoints_of_the_final_shape_compete_for_the_best(tmp_path, caplog):
    scored = Scored({3: 0.9, 6: 0.99, 9: 0.8, 12: 0.5, 15: 0.4, 18: 0.3})
    model = salient_model(rank=Halving(steps=(5, 10)))
    fit(model, tmp_path, (scored,), steps=18, **BEST)
    assert torch.allclose(tiny.logits(model, "bert"), scored.logits[12], atol=1e-6)
    lines = [line for line in said(caplog) if "no longer competes" in line]
    assert ["score=0.9 " in lines[0] or "score=0.9)" in lines[0], "score=0.99)" in lines[1]] == [True, True]
    assert len(lines) == 2 and all("shorter warmup/allocation" in line for line in lines)


def test_the_best_of_the_final_shape_is_loaded(tmp_path):
    scored = Scored({3: 0.1, 6: 0.1, 9: 0.1, 12: 0.5, 15: 0.9, 18: 0.3})
    model = salient_model()
    callback = fit(model, tmp_path, (scored,), steps=18, **BEST)
    assert not torch.allclose(scored.logits[15], scored.logits[18], atol=1e-6)
    assert torch.allclose(tiny.logits(model, "bert"), scored.logits[15], atol=1e-6)
    assert sum(callback.controller.ranks().values()) == 2 * SITES


def test_freezing_changes_no_shape_so_every_checkpoint_competes(tmp_path, caplog):
    scored = Scored({3: 0.9, 6: 0.1, 9: 0.1, 12: 0.1})
    model = runs.model_for("bert", "aflora", freeze=AFLORA)
    fit(model, tmp_path, (scored,), steps=12, **BEST)
    assert torch.allclose(tiny.logits(model, "bert"), scored.logits[3], atol=1e-6)
    assert not any("competes" in line for line in said(caplog))


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_that_stops_early_is_cut_to_its_target(tmp_path, strategy):
    scored = Scored({step: 1 / step for step in range(1, 40)})
    model = salient_model(rank=SalientLoRA(target_r=2, warmup=2, allocation=30, initial_window=4, final_window=8))
    each = dict(eval_steps=4, save_steps=4) if strategy == "steps" else dict(per_device_train_batch_size=16)
    settings = BEST | dict(eval_strategy=strategy, save_strategy=strategy) | each
    callback = fit(model, tmp_path, (scored, EarlyStoppingCallback(1)), steps=40, **settings)
    controller = callback.controller
    assert controller.step < 40 and controller.is_finished and not hosted_layers(model)
    assert sum(controller.ranks().values()) == 2 * SITES
    config = model.peft_config["default"].to_dict()
    held = {n: p.shape[0] for n, p in model.named_parameters() if "lora_A" in n}
    assert sum(held.values()) == 2 * SITES and max(held.values()) == config["r"]


# -- running out of memory -------------------------------------------------------------------------------------------


def out_of_memory(model: nn.Module, at_call: int, where: str) -> None:
    calls = 0

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at_call:
            if where == "forward":
                fail()
            output.logits.register_hook(fail)

    model.register_forward_hook(hook)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_batch_that_does_not_fit_at_the_first_step_is_made_smaller(tmp_path, where):
    model, small = salient_model(), salient_model()
    out_of_memory(model, 1, where)
    callback = fit(model, tmp_path / "auto", auto_find_batch_size=True)
    direct = fit(small, tmp_path / "direct", per_device_train_batch_size=7)  # accelerate takes a tenth off
    assert callback.events == direct.events
    assert same(model.state_dict(), small.state_dict())


def test_running_out_of_memory_later_is_refused_with_the_cure(tmp_path):
    model = salient_model()
    out_of_memory(model, 4, "forward")
    with pytest.raises(
        StaleAdapterError, match=r"build the model anew.*from_pretrained\(checkpoint, is_trainable=True"
    ):
        fit(model, tmp_path, auto_find_batch_size=True)


# -- training again, resuming, loading -------------------------------------------------------------------------------


def test_a_second_train_on_a_half_adapted_model_is_refused_with_the_cure(tmp_path):
    def stop(**kw: Any) -> None:
        raise KeyboardInterrupt

    model, callback = salient_model(), TrimCallback()
    with pytest.raises(KeyboardInterrupt):
        runs.train(model, "bert", tmp_path, trim=callback, callbacks=(At("on_step_end", 3, stop),), save_strategy="no")
    with pytest.raises(StaleAdapterError, match=r"second train.*from_pretrained"):
        runs.train(model, "bert", tmp_path, trim=callback, max_steps=14, save_strategy="no")


def test_an_interrupted_trainer_that_is_still_held_does_not_act_in_the_one_that_resumes(tmp_path):
    def stop(**kw: Any) -> None:
        raise KeyboardInterrupt

    options = dict(save_strategy="steps", save_steps=4, max_steps=14)
    whole, model = (salient_model(rank=replace(SALIENT, orth_weight=0.1)) for _ in range(2))
    runs.train(whole, "bert", tmp_path / "whole", **options)
    held = TrimCallback()
    with pytest.raises(KeyboardInterrupt):
        runs.train(model, "bert", tmp_path, trim=held, callbacks=(At("on_step_end", 6, stop),), **options)
    runs.train(model, "bert", tmp_path, resume=True, **options)
    assert held.controller.step == 6 and same(model.state_dict(), whole.state_dict())


def test_a_second_trainer_on_a_half_adapted_model_is_refused_with_the_cure(tmp_path):
    def stop(**kw: Any) -> None:
        raise KeyboardInterrupt

    model = salient_model()
    with pytest.raises(KeyboardInterrupt):
        fit(model, tmp_path, (At("on_step_end", 3, stop),))
    with pytest.raises(StaleAdapterError, match="one Controller for the whole run"):
        fit(model, tmp_path)


def test_a_second_train_on_a_finished_model_trains_on_at_its_ranks(tmp_path, caplog):
    model = salient_model()
    callback = fit(model, tmp_path)
    ranks = {name: layer.r["default"] for name, layer in adapter_layers(model)}
    caplog.clear()
    runs.train(model, "bert", tmp_path, trim=callback, max_steps=3, save_strategy="no")
    assert said(caplog) == ["these are plain LoRA layers: they train on at their ranks, and nothing is decided"]
    assert {name: layer.r["default"] for name, layer in adapter_layers(model)} == ranks


def trim_lines(model: nn.Module, folder: Path, caplog: pytest.LogCaptureFixture, **more: Any) -> list[str]:
    caplog.clear()
    callback = fit(model, folder, steps=3, **more)
    assert callback.controller.step == 3 and callback.controller.average_params() > 0
    return said(caplog)


def test_a_finished_model_and_a_loaded_checkpoint_train_on_as_plain_lora(tmp_path, caplog):
    model = salient_model()
    fit(model, tmp_path, save_strategy="steps", save_steps=7)
    loaded = peft.PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "checkpoint-7"), is_trainable=True)
    for plain in (loaded, model):
        before = {n: p.detach().clone() for n, p in plain.named_parameters() if p.requires_grad}
        lines = trim_lines(plain, tmp_path / "again", caplog)
        assert lines == ["these are plain LoRA layers: they train on at their ranks, and nothing is decided"]
        assert all(not torch.equal(p, before[n]) for n, p in plain.named_parameters() if p.requires_grad)


def test_plain_lora_by_choice_needs_no_comment(tmp_path, caplog):
    model = runs.model_for("bert", "salientlora", rank=None)
    assert trim_lines(model, tmp_path, caplog) == []


@pytest.mark.parametrize("torn", ["trainer_state.json", slow("optimizer.pt"), "adapter_model.safetensors"])
def test_resuming_from_a_half_written_checkpoint_is_refused_with_the_cure(tmp_path, caplog, torn):
    fit(salient_model(), tmp_path, save_strategy="steps", save_steps=7)
    whole = (tmp_path / "checkpoint-14" / torn).read_bytes()
    (tmp_path / "checkpoint-14" / torn).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(Exception):  # noqa: B017 - Trainer's own, whatever it is
        fit(salient_model(), tmp_path, resume=True, save_strategy="steps", save_steps=7)
    lines = [line for line in said(caplog) if "cannot be resumed from" in line]
    assert len(lines) == 1 and torn in lines[0]
    assert "trimtab.last_checkpoint" in lines[0] and "checkpoint-7'" in lines[0]
    fit(salient_model(), tmp_path, resume=trimtab.last_checkpoint(tmp_path), save_strategy="steps", save_steps=7)
    assert what_is_wrong(tmp_path / "checkpoint-14") is None


def test_loading_by_hand_what_should_be_resumed_is_refused_with_the_cure(tmp_path):
    fit(salient_model(), tmp_path, save_strategy="steps", save_steps=7)
    model = salient_model()
    model.load_adapter(str(tmp_path / "checkpoint-7"), "default", is_trainable=True)
    with pytest.raises(StaleAdapterError, match=r"resume_from_checkpoint=trimtab.last_checkpoint"):
        fit(model, tmp_path / "other")


def test_save_only_model_warns_that_resume_is_impossible(tmp_path):
    with pytest.warns(UserWarning, match="save_only_model=True: checkpoints will be plain LoRA, but this run cannot"):
        fit(salient_model(), tmp_path, save_only_model=True, save_strategy="steps", save_steps=7)
    assert trimtab.last_checkpoint(tmp_path) is None
    assert peft.PeftModel.from_pretrained(tiny.build("bert"), str(tmp_path / "checkpoint-7"))


@pytest.mark.parametrize("method", [slow("adalora"), "salientlora+aflora"])
def test_a_state_dict_round_trip_in_mid_training_changes_nothing(tmp_path, method):
    class RoundTrip(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kw):
            model.load_state_dict(model.state_dict())

    undisturbed, disturbed = (salient_model(**({"rank": None} | METHODS[method])) for _ in range(2))
    first = fit(undisturbed, tmp_path / "a", steps=STEPS)
    second = fit(disturbed, tmp_path / "b", (RoundTrip(),), steps=STEPS)
    assert same(undisturbed.state_dict(), disturbed.state_dict())
    assert first.events == second.events


def test_tensors_from_elsewhere_in_mid_training_are_refused_with_the_cure(tmp_path):
    other = salient_model()
    fit(other, tmp_path / "other", steps=12, save_strategy="steps", save_steps=6)

    def load(model: nn.Module, **_: Any) -> None:
        model.load_adapter(str(tmp_path / "other" / "checkpoint-6"), "default", is_trainable=True)

    with pytest.raises(StaleAdapterError, match=r"were replaced.*To resume.*register_for_checkpointing"):
        fit(salient_model(), tmp_path / "own", (At("on_step_end", 4, load),))


def test_a_bare_loop_names_what_was_forgotten():
    model = salient_model()
    controller = Controller(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 14)
    with pytest.raises(StaleAdapterError, match="after_step: call before_step first"):
        controller.after_step()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": SalientLoRA(target_r=2, warmup=5, allocation=10)}, "warmup 5 .* allocation 10 = 15 steps, .* has 14"),
        ({"rank": AdaLoRA(target_r=2, warmup=4, final=10)}, "warmup 4 .* final 10 = 14 steps .* run's 14"),
        (
            {"rank": None, "freeze": AFLoRA(warmup=10, final=4)},
            "warm-up 10 .* final 4 steps leave none of the run's 14",
        ),
        ({"rank": None, "freeze": FreezeAt(at=14)}, "that is 14 of the run's 14 steps"),
        ({"rank": SoRA(prox_threshold=0.1, max_threshold=0.2, thresholds=15)}, "at most the run's 14 steps"),
        ({"rank": SalientLoRA(target_r=5, warmup=1, allocation=2)}, "at most the initial rank, 4"),
    ],
)
def test_schedules_that_do_not_fit_are_rejected_before_the_first_step(tmp_path, options, words):
    model = salient_model(**options)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError, match=words):
        fit(model, tmp_path)
    assert same(model.state_dict(), before)


# -- gradients -------------------------------------------------------------------------------------------------------


class Watch(TrainerCallback):
    """Keeps every micro-batch, the clipped gradients of every step, and the weights after it."""

    def __init__(self, model: nn.Module) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        model.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if module.training:
            self.batches.append({k: v.clone() for k, v in kwargs.items() if isinstance(v, torch.Tensor)})

    def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
        self.gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_optimizer_step(self, args, state, control, model=None, **kw):
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad})


@pytest.mark.parametrize(
    "rank",
    [
        replace(SALIENT, orth_weight=0.1),
        replace(SALIENT, start="svd"),
        AdaLoRA(target_r=2, warmup=2, final=4, start="svd"),
        SoRA(prox_threshold=0.01, l1_loss_weight=0.5),
    ],
)
def test_the_penalty_reaches_the_gradient_once_a_step_and_before_clipping(tmp_path, rank):
    model = salient_model(rank=rank, double=True)
    twin = copy.deepcopy(model)
    watch = Watch(model)
    fit(model, tmp_path, (watch,), steps=12, gradient_accumulation_steps=3, max_grad_norm=0.05)
    controller = Controller(twin, None, 12, steps_per_epoch=3)
    for batch in watch.batches[:3]:
        twin(**batch).loss.backward()  # Trainer divides only where a model takes no loss arguments
    controller.allocator.penalty(controller._factors()).backward()
    norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.05)
    assert norm > 0.05
    mine = {n: p.grad for n, p in twin.named_parameters() if p.grad is not None}
    assert mine.keys() == watch.gradients[0].keys()
    for name, gradient in watch.gradients[0].items():
        assert torch.allclose(gradient, mine[name], rtol=1e-12, atol=1e-14), name


@pytest.mark.parametrize("method", [m if m in ("sora", "salientlora+aflora") else slow(m) for m in METHODS])
def test_a_bare_loop_equals_the_trainer_step_by_step(tmp_path, method):
    model = salient_model(**({"rank": None} | METHODS[method]))
    twin = copy.deepcopy(model)
    watch = Watch(model)
    settings = dict(optim="adamw_torch", lr_scheduler_type="constant", weight_decay=0.0, gradient_accumulation_steps=2)
    callback = fit(model, tmp_path, (watch,), steps=STEPS, **settings)

    events: list[dict] = []
    optimizer = torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    controller = Controller(twin, optimizer, STEPS, steps_per_epoch=4, on_event=events.append)
    twin.train()
    for step in range(STEPS):
        for batch in watch.batches[2 * step : 2 * step + 2]:
            twin(**batch).loss.backward()
        controller.before_step()
        nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        expected = watch.weights[step]
        mine = {n: p for n, p in twin.named_parameters() if p.requires_grad}
        assert mine.keys() == expected.keys()
        for name, weight in mine.items():
            assert torch.equal(weight, expected[name]), (step, name)
    controller.finish()
    assert [e for e in events if e["event"] in ("rank", "freeze", "params")] == [
        e for e in callback.events if e["event"] in ("rank", "freeze", "params")
    ]


def test_the_penalty_is_logged_apart_and_evaluation_never_sees_it(tmp_path):
    model = salient_model(rank=SalientLoRA(target_r=2, warmup=2, allocation=8, orth_weight=50.0))
    watch = Watch(model)
    losses: list[float] = []
    model.register_forward_hook(lambda m, i, out: losses.append(float(out.loss)) if m.training else None)
    callback = fit(model, tmp_path, (watch,), eval_strategy="steps", eval_steps=14)
    rows = [e for e in callback.events if e["event"] == "log"]
    assert [row["loss"] for row in rows] == pytest.approx(losses)
    assert all(row["penalty"] > 1 for row in rows)
    evaluated = next(e for e in callback.events if e["event"] == "eval")["metrics"]
    with torch.no_grad():
        rows16 = tiny.rows("bert", 16, seed=5)
        batch = {k: torch.stack([torch.as_tensor(r[k]) for r in rows16]) for k in rows16[0]}
        model.eval()
        assert evaluated["eval_loss"] == pytest.approx(float(model(**batch).loss), rel=1e-5)


def test_a_scaled_gradient_carries_a_scaled_penalty():
    gradients = []
    for scale in (1.0, 1024.0):
        model = salient_model(freeze=AFLORA)
        controller = Controller(model, None, 14)
        (model(**tiny.batch("bert")).loss * scale).backward()
        controller.before_step(scale)
        gradients.append({n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None})
        seen = controller._gradients
        gradients.append({f"base_model.model.{n}": g for n, g in seen.items()})
    for a, b in (gradients[::2], gradients[1::2]):
        assert a.keys() == b.keys() and len(a)
        assert all(torch.allclose(a[n], b[n], rtol=1e-4, atol=1e-8) for n in a)


def around(model: nn.Module, how: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Loss of a batch, by ways into a model that stock LoRA takes as well."""
    base = model.get_base_model()
    if how == "model":
        return model(**inputs).loss
    if how == "forward by its name":  # SentenceTransformer does so
        return model.forward(**inputs).loss
    if how == "base model":
        return base(**inputs).loss
    labels = inputs.pop("labels")
    if how == "encoder":
        hidden = base.bert(**inputs)[1]
    else:
        x = base.bert.embeddings(inputs["input_ids"])
        for block in base.bert.encoder.layer:
            x = block(x)
        hidden = base.bert.pooler(x)
    return nn.functional.cross_entropy(base.classifier(base.dropout(hidden)), labels)


def fit_around(folder: Path, how: str, **more: Any) -> tuple[TrimCallback, dict[str, torch.Tensor]]:
    class Around(Trainer):
        def compute_loss(self, model, inputs, **kw):
            return around(model, how, dict(inputs))

    model, trim = salient_model(), TrimCallback()
    args = dict(max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2)
    args = TrainingArguments(str(folder), **args | more)
    Around(model, args, train_dataset=tiny.rows("bert"), callbacks=[trim]).train()
    return trim, model.state_dict()


@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_whichever_way_into_the_model_is_taken_the_run_is_the_same(tmp_path, checkpointing):
    more: dict[str, Any] = {}
    if checkpointing is not None:
        more = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
    trim, expected = fit_around(tmp_path, "model", **more)
    for how in ("forward by its name", "base model", "encoder"):
        other, weights = fit_around(tmp_path, how, **more)
        assert other.events == trim.events and same(weights, expected), how
    assert [e["event"] for e in trim.events].count("rank") >= 2


def test_steps_after_which_no_gradient_was_seen_are_refused(tmp_path):
    with pytest.raises(StaleAdapterError, match="no module was called that holds the adapted blocks"):
        fit_around(tmp_path, "block by block")


def test_batches_that_run_once_more_inside_backward_are_one_step(tmp_path, monkeypatch):
    calls: list[int] = []

    class Cached(Trainer):  # as sentence-transformers' Cached…Loss: all outputs first, then the graph piece by piece
        def compute_loss(self, model, inputs, **kw):
            labels = inputs.pop("labels")
            parts = [{k: v[i : i + 3] for k, v in inputs.items()} for i in range(0, len(labels), 3)]
            with torch.no_grad():
                logits = torch.cat([model(**part).logits for part in parts]).requires_grad_()
            with torch.enable_grad():
                loss = nn.functional.cross_entropy(logits, labels)
                loss.backward()
            wanted = logits.grad.split(3)
            loss = loss.detach().requires_grad_()

            def once_more(factor: torch.Tensor) -> None:
                with torch.enable_grad():
                    for part, gradient in zip(parts, wanted):
                        ((model.forward(**part).logits * gradient).sum() * factor).backward()

            loss.register_hook(once_more)
            return loss

    def counted(self, *args: Any, **kw: Any) -> None:
        calls.append(self.step)
        before_step(self, *args, **kw)

    before_step = Controller.before_step
    monkeypatch.setattr(Controller, "before_step", counted)
    options = dict(max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", learning_rate=1e-2)
    trims, ends = [], []
    for cls in (Trainer, Cached):
        model, trim = salient_model(lora_dropout=0.0), TrimCallback()
        args = TrainingArguments(str(tmp_path), **options)
        cls(model, args, train_dataset=tiny.rows("bert"), callbacks=[trim]).train()
        trims.append(trim)
        ends.append(model.state_dict())
    assert calls == 2 * list(range(14))
    assert trims[0].controller.ranks() == trims[1].controller.ranks()
    assert all(torch.allclose(ends[0][k], ends[1][k], atol=1e-4) for k in ends[0])


@pytest.mark.parametrize("method", ["salientlora", "aflora"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_batch_that_a_training_step_leaves_out_ends_no_run(tmp_path, method, accumulated):
    class LeavesOut(Trainer):
        calls = 0

        def training_step(self, *args: Any, **kw: Any) -> torch.Tensor:
            self.calls += 1
            return torch.zeros(()) if self.calls % 6 == 4 else super().training_step(*args, **kw)

    options = {"rank": SALIENT} if method == "salientlora" else {"rank": None, "freeze": AFLORA}
    model, trim = salient_model(**options), TrimCallback()
    args = TrainingArguments(
        str(tmp_path), max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        gradient_accumulation_steps=accumulated,
    )  # fmt: skip
    LeavesOut(model, args, train_dataset=tiny.rows("bert"), callbacks=[trim]).train()
    skipped = [e["step"] for e in trim.events if e["event"] == "skipped"]
    assert skipped == ([4, 10] if accumulated == 1 else [2, 5, 8, 11, 14])
    assert trim.controller.is_finished and all(torch.isfinite(p).all() for p in model.parameters())
    if method == "salientlora":
        assert sum(trim.controller.ranks().values()) == 2 * SITES


def test_a_backward_that_runs_out_of_memory_and_is_left_out_costs_one_step(tmp_path):
    class LeavesOut(Trainer):
        def training_step(self, model, *args: Any, **kw: Any) -> torch.Tensor:
            try:
                return super().training_step(model, *args, **kw)
            except RuntimeError:
                model.zero_grad()
                return torch.zeros(())

    model, trim = salient_model(), TrimCallback()
    out_of_memory(model, 5, "backward")
    options = dict(max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no")
    trainer = LeavesOut(
        model, TrainingArguments(str(tmp_path), **options), train_dataset=tiny.rows("bert"), callbacks=[trim]
    )
    trainer.train()
    assert [e["step"] for e in trim.events if e["event"] == "skipped"] == [5]


@pytest.mark.parametrize("method", ["salientlora", "aflora"])
def test_a_trainer_with_a_loop_of_its_own_is_refused(tmp_path, method):
    class OwnLoop(Trainer):
        def train(self, *args: Any, **kw: Any) -> None:
            self.create_optimizer_and_scheduler(14)
            self.state.max_steps, self.callback_handler.optimizer = 14, self.optimizer
            told = self.callback_handler
            told.on_train_begin(self.args, self.state, self.control)
            for batch in self.get_train_dataloader():
                self.model(**batch).loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                self.state.global_step += 1
                told.on_step_end(self.args, self.state, self.control)

    model = salient_model(**({"rank": SALIENT} if method == "salientlora" else {"rank": None, "freeze": AFLORA}))
    args = TrainingArguments(str(tmp_path), max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = OwnLoop(model, args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])
    with pytest.raises(StaleAdapterError, match=r"taken 1 steps, and told no callback.*trimtab\.Controller"):
        trainer.train()


class Out:
    """A model's output that is no container."""

    def __init__(self, loss: torch.Tensor, logits: torch.Tensor) -> None:
        self.loss, self.logits = loss, logits


@dataclass(slots=True)
class SlotsOut:
    loss: torch.Tensor
    logits: torch.Tensor


@dataclass
class Nested:
    inner: SlotsOut
    model: nn.Module


@pytest.mark.parametrize("kind", [Out, SlotsOut, Nested])
def test_an_output_may_be_any_object(tmp_path, kind):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.fc1, self.fc2 = nn.Embedding(tiny.VOCAB, 16), nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, input_ids, attention_mask, labels):
            logits = self.fc2(self.fc1(self.embed(input_ids).mean(1)).relu())
            out = (nn.functional.cross_entropy(logits, labels), logits)
            return Nested(SlotsOut(*out), self) if kind is Nested else kind(*out)

    class Own(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kw):
            out = model(**inputs)
            return (out.inner if kind is Nested else out).loss

    model = peft.get_peft_model(Net(), TrimConfig(r=4, target_modules=["fc1", "fc2"], rank=SALIENT))
    args = TrainingArguments(str(tmp_path), max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Own(model, args, train_dataset=tiny.rows("bert"), callbacks=[trim := TrimCallback()])
    trainer.train()
    assert sum(trim.controller.ranks().values()) == 2 * 2


# -- the callback itself ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_added_later", [False, True])
def test_two_callbacks_in_one_trainer_are_refused(tmp_path, is_added_later):
    def go() -> None:
        args = TrainingArguments(str(tmp_path), max_steps=14, report_to=[], use_cpu=True, disable_tqdm=True)
        first, second = TrimCallback(), TrimCallback()
        ours = [first] if is_added_later else [first, second]
        trainer = Trainer(salient_model(), args, train_dataset=tiny.rows("bert"), callbacks=ours)
        trainer.add_callback(second)
        trainer.train()

    with pytest.raises(ConfigError, match=r"2 TrimCallbacks.*one decides for the whole run"):
        go()


def test_a_callback_that_was_used_is_pickled_with_its_history(tmp_path):
    callback = fit(salient_model(), tmp_path)
    for again in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert again.events == callback.events and again.controller.ranks() == callback.controller.ranks()
    model = salient_model()
    trim, _ = runs.train(
        model, "bert", tmp_path / "again", trim=again, max_steps=14, save_strategy="no", logging_steps=1
    )
    assert trim.events == callback.events


def test_checkpoints_are_resumed_from_wherever_a_trainer_puts_them(tmp_path):
    class Deeper(Trainer):
        def _get_output_dir(self, trial: Any) -> str:
            return str(tmp_path / "a" / "b")

    def go(resume: str | None = None) -> dict[str, torch.Tensor]:
        args = TrainingArguments(
            str(tmp_path), max_steps=14, save_steps=7, report_to=[], use_cpu=True, disable_tqdm=True
        )
        model = salient_model()
        trainer = Deeper(model, args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    whole = go()
    assert what_is_wrong(tmp_path / "a" / "b" / "checkpoint-7") is None
    assert same(whole, go(str(tmp_path / "a" / "b" / "checkpoint-7")))


def test_beginning_again_after_an_interrupt_leaves_the_last_checkpoint_whole(tmp_path):
    class Dies(Trainer):
        def training_step(self, *args: Any, **kw: Any) -> torch.Tensor:
            if self.state.global_step == 7:
                raise KeyboardInterrupt
            return super().training_step(*args, **kw)

    args = TrainingArguments(str(tmp_path), max_steps=14, save_steps=7, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Dies(salient_model(), args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with pytest.raises(StaleAdapterError, match="second train"):
        trainer.train()
    assert what_is_wrong(tmp_path / "checkpoint-7") is None


# -- steps that the scaler skipped -----------------------------------------------------------------------------------


def bare_run(options: dict[str, Any], skipped: set[int], steps: int = 20) -> list[dict]:
    """Events of a run in which the optimizer skipped some steps (numbered from 1)."""
    model = salient_model(**options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    events: list[dict] = []
    controller = Controller(model, optimizer, steps, on_event=events.append)
    for step in range(1, steps + 1):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        if step in skipped:
            next(p for p in model.parameters() if p.grad is not None).grad.fill_(float("inf"))
        controller.before_step()
        if step not in skipped:
            optimizer.step()
        controller.after_step(skipped=step in skipped)
        optimizer.zero_grad()
    controller.finish()
    return [e for e in events if e["event"] in ("rank", "freeze")]


FORCED = {
    "salientlora": ({"rank": SALIENT}, 10),
    "adalora": ({"rank": AdaLoRA(target_r=2, warmup=4, final=8, interval_steps=3)}, 12),
    "aflora": ({"rank": None, "freeze": AFLoRA(warmup=4, final=8, interval_steps=4)}, None),
    "freeze at": ({"rank": None, "freeze": FreezeAt(at=6)}, 6),
}


@pytest.mark.parametrize("method", FORCED)
def test_what_must_happen_at_a_skipped_step_happens_at_the_next(method):
    options, _ = FORCED[method]
    undisturbed = bare_run(options, set())
    forced = undisturbed[-1]
    delayed = bare_run(options, {forced["step"]})
    assert delayed[-1]["step"] == forced["step"] + 1
    if forced["event"] == "rank":
        assert delayed[-1]["kind"] == "prune" and sum(delayed[-1]["ranks"].values()) == 2 * SITES
    else:
        assert sorted(n for e in delayed for n in e["frozen"]) == sorted(n for e in undisturbed for n in e["frozen"])


@pytest.mark.parametrize("method", FORCED)
def test_what_falls_on_the_last_steps_is_done_at_the_end(method):
    options, _ = FORCED[method]
    if options["rank"] is None:
        return  # a projection that trains to the end of the run is not frozen after it
    events = bare_run(options, set(range(9, 21)))
    assert sum(events[-1]["ranks"].values()) == 2 * SITES


def test_sora_shrinks_no_gate_at_a_skipped_step():
    model = salient_model(rank=SoRA(prox_threshold=0.05))
    controller = Controller(model, None, 4)
    gates = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_e" in n}
    model(**tiny.batch("bert")).loss.backward()
    controller.before_step()
    controller.after_step(skipped=True)
    assert all(torch.equal(p, gates[n]) for n, p in model.named_parameters() if "lora_e" in n)


def test_the_trainer_says_which_steps_were_skipped(tmp_path, monkeypatch):
    step, calls = AcceleratedOptimizer.step, 0

    def overflow(self, closure=None):
        nonlocal calls
        calls += 1
        self._is_overflow = calls == 10  # the step of SALIENT's last prune
        if not self._is_overflow:
            step(self, closure)

    monkeypatch.setattr(AcceleratedOptimizer, "step", overflow)
    monkeypatch.setattr(AcceleratedOptimizer, "step_was_skipped", property(lambda self: self._is_overflow))
    callback = fit(salient_model(), tmp_path)
    prunes = [e for e in callback.events if e["event"] == "rank"]
    assert prunes[-1]["step"] == 11 and sum(prunes[-1]["ranks"].values()) == 2 * SITES


# -- TRL ---------------------------------------------------------------------------------------------------------------


def sft(model: nn.Module, folder: Path, **more: Any):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(tiny.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", pad_token="w1", eos_token="w2")
    data = Dataset.from_list(
        [{"text": " ".join(f"w{i}" for i in row["input_ids"].tolist())} for row in tiny.rows("llama")]
    )
    settings = dict(
        output_dir=str(folder), max_steps=14, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="steps", save_steps=7, max_length=16, bf16=False,
        dataloader_pin_memory=False, gradient_checkpointing=False,
    ) | more  # fmt: skip
    trim = TrimCallback()
    trainer = trl.SFTTrainer(
        model, trl.SFTConfig(**settings), train_dataset=data, processing_class=tokenizer, callbacks=[trim]
    )
    return trainer, trim


def llama(base: nn.Module | None = None, rank: Any = SALIENT) -> peft.PeftModel:
    base = base or tiny.build("llama")
    torch.manual_seed(0)
    targets = list(tiny.FAMILIES["llama"].targets)
    return peft.get_peft_model(
        base, TrimConfig(r=4, lora_alpha=8, target_modules=targets, rank=rank, task_type="CAUSAL_LM")
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_trains_an_adaptive_model(tmp_path, checkpointing):
    model = llama()
    trainer, trim = sft(model, tmp_path, gradient_checkpointing=checkpointing)
    trainer.train()
    assert sum(trim.controller.ranks().values()) == 2 * SITES
    assert {"rank", "log"} <= {e["event"] for e in trim.events}
    loaded = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path / "checkpoint-14"))
    assert torch.allclose(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"), atol=1e-5)


def test_trl_takes_our_config_itself(tmp_path):
    trl = pytest.importorskip("trl")
    config = TrimConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], rank=SALIENT, task_type="CAUSAL_LM")
    model = llama()
    trainer, _ = sft(model, tmp_path)
    again = trl.SFTTrainer(
        tiny.build("llama"), trainer.args, train_dataset=trainer.train_dataset, peft_config=config,
        processing_class=trainer.processing_class, callbacks=[trim := TrimCallback()],
    )  # fmt: skip
    again.train()
    assert sum(trim.controller.ranks().values()) == 2 * 8


def test_trl_casts_a_quantised_base_s_adapters_to_bfloat16_and_we_cast_them_back(tmp_path, caplog):
    bnb = pytest.importorskip("bitsandbytes")
    caplog.set_level(logging.WARNING, logger="trimtab")
    base = tiny.build("llama")
    for module in list(base.modules()):
        for child, linear in list(module.named_children()):
            if type(linear) is nn.Linear and "lm_head" not in child:
                four = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
                four.load_state_dict(linear.state_dict())
                setattr(module, child, four.to("cpu"))
    base.is_loaded_in_4bit = True
    model = llama(base, rank=SoRA(prox_threshold=0.002, interval=2))
    gates = torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_e" in n])
    trainer, _ = sft(model, tmp_path, learning_rate=1e-6)
    assert {n: p.dtype for n, p in model.named_parameters() if p.requires_grad and p.dtype != torch.float32} == {}
    assert any("are brought to float32" in line for line in said(caplog))
    raw: list[torch.Tensor] = []

    def keep(model: nn.Module, **_: Any) -> None:
        raw.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_e" in n]))

    trainer.add_callback(At("on_step_end", 13, keep))
    trainer.train()
    # Thirteen proximal steps of 0.002: in bfloat16 a gate near 1 would not have moved at all.
    assert torch.allclose(raw[0].abs(), (gates.bfloat16().float().abs() - 13 * 0.002).clamp_min(0), atol=1e-3)
    assert what_is_wrong(tmp_path / "checkpoint-7") is None
