"""What trains is what the user thinks: nothing stays frozen after a run, and nobody trains without being decided on."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

import short_runs as runs
import tiny
from trimtab import AFLoRA, Controller, FreezeAt, TrimCallback
from trimtab.errors import ModelError
from trimtab.host.adapted import adapter_layers


def loop(model: nn.Module, steps: int = 40, **batch: torch.Tensor) -> Controller:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=steps)
    for _ in range(steps):
        model(**(batch or tiny.batch("bert"))).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    return controller


def fit(model: nn.Module, folder: Path, *callbacks: Any, **more: Any) -> None:
    settings = dict(
        max_steps=10, per_device_train_batch_size=8, report_to=[], learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True, save_strategy="no", average_tokens_across_devices=False,
    )  # fmt: skip
    args = TrainingArguments(str(folder), **settings | more)
    Trainer(model, args, train_dataset=tiny.rows("bert"), callbacks=list(callbacks)).train()


# -- after a run ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["aflora", "salientlora+aflora", "freeze at"])
def test_all_of_a_finished_adapter_trains_on(method):
    options = {"freeze": FreezeAt(at=5), "modules_to_save": ["classifier"]} if method == "freeze at" else {}
    model = runs.model_for("bert", "aflora" if options else method, **options)
    assert loop(model).freezer.frozen
    adapter = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert adapter and all(p.requires_grad for p in adapter.values())
    before = {n: p.detach().clone() for n, p in adapter.items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(**tiny.batch("bert")).loss.backward()
    optimizer.step()
    assert all(not torch.equal(p, before[n]) for n, p in adapter.items())


def test_what_froze_stays_frozen_when_the_adapter_is_switched_in_mid_run():
    model = runs.model_for("bert", "aflora", freeze=AFLoRA(warmup=2, final=30, interval_steps=2))
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=40)
    for _ in range(20):
        model(**tiny.batch("bert")).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    frozen = controller.frozen()
    assert frozen
    model.set_adapter("other")
    model.set_adapter("default")
    named = {f"{name}.{which}": getattr(layer, which)["default"].weight
             for name, layer in adapter_layers(model) for which in ("lora_A", "lora_B")}  # fmt: skip
    assert {name for name, p in named.items() if not p.requires_grad} == frozen


def test_what_froze_stays_frozen_when_all_of_the_adapter_is_told_to_train():
    model = runs.model_for("bert", "aflora", freeze=AFLoRA(warmup=2, final=30, interval_steps=2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=40)
    runs.steps(model, controller, optimizer, 20, family="bert")
    named = {f"{name}.{which}": getattr(layer, which)["default"].weight
             for name, layer in adapter_layers(model) for which in ("lora_A", "lora_B")}  # fmt: skip
    frozen, held = controller.frozen(), {name: p.detach().clone() for name, p in named.items()}
    assert frozen
    for name, p in model.named_parameters():  # as a loop does after a phase that trained the head alone
        if "lora_" in name:
            p.requires_grad_(True)
    runs.steps(model, controller, optimizer, 1, family="bert")
    assert {name for name, p in named.items() if torch.equal(p, held[name])} == frozen
    assert frozen <= {name for name, p in named.items() if not p.requires_grad}


# -- nobody decides -----------------------------------------------------------------------------------------------


def warned(act: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(w.message) for w in caught if "nothing decides" in str(w.message)]


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor"])
def test_a_forgotten_callback_is_said_once(tmp_path, optim):
    lines = warned(lambda: fit(runs.model_for("bert", "adalora"), tmp_path, optim=optim))
    assert len(lines) == 1 and "TrimCallback" in lines[0] and "Controller" in lines[0]


def test_a_forgotten_controller_is_said_once():
    model = runs.model_for("bert", "salientlora")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)

    def train() -> None:
        for _ in range(5):
            model(**tiny.batch("bert")).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    assert len(warned(train)) == 1


def test_forward_passes_and_runs_that_are_decided_on_are_not_commented(tmp_path):
    def quiet() -> None:
        model = runs.model_for("bert", "adalora")
        for _ in range(3):
            model(**tiny.batch("bert")).loss.backward()  # looks, does not train
            model.zero_grad()
        fit(model, tmp_path, TrimCallback(), max_steps=40)
        fit(runs.model_for("bert", "adalora", rank=None), tmp_path)

    assert warned(quiet) == []


# -- a PeftModel inside something else ----------------------------------------------------------------------------


class Pair(nn.Module):
    """A user's own module around an adapted encoder."""

    def __init__(self, *encoders: nn.Module) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor, **rest: torch.Tensor) -> Any:
        return self.encoders[0](input_ids=input_ids, labels=labels, **rest)


@runs.each_method
@pytest.mark.parametrize("how", ["trainer", "bare loop"])
def test_an_adapted_model_inside_another_module_is_decided_on_like_itself(tmp_path, method, how):
    results = []
    for wrap in (Pair, lambda model: model):
        model = runs.model_for("bert", method)
        if how == "trainer":
            fit(wrap(model), tmp_path, TrimCallback(), max_steps=40)
        else:
            loop(wrap(model))
        results.append({n: p for n, p in model.state_dict().items() if "lora_" in n})
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(p, results[1][n]) for n, p in results[0].items())


def test_two_adapted_models_in_one_module_are_refused():
    pair = Pair(runs.model_for("bert", "adalora"), runs.model_for("bert", "adalora"))
    with pytest.raises(ModelError, match="holds 2 PEFT models"):
        loop(pair)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_an_adapted_model_that_was_adapted_once_more_is_named_as_that():
    model = runs.model_for("bert", "aflora")
    again = peft.get_peft_model(model, runs.config_for("aflora")(target_modules=["query"], task_type="SEQ_CLS"))
    with pytest.raises(ModelError, match=r"given to peft.get_peft_model once more.*unload\(\)"):
        Controller(again, torch.optim.SGD(again.parameters(), lr=1e-2), total_steps=40)


def test_a_module_without_an_adapter_is_refused():
    with pytest.raises(ModelError, match="get_peft_model first"):
        loop(Pair(tiny.build("bert")))


@runs.each_method
def test_a_trainer_that_makes_its_models_anew_decides_on_each(tmp_path, method):
    args = TrainingArguments(str(tmp_path), max_steps=40, per_device_train_batch_size=8, report_to=[], use_cpu=True,
                             learning_rate=1e-2, disable_tqdm=True, save_strategy="no")  # fmt: skip
    made: list[peft.PeftModel] = []

    def init() -> peft.PeftModel:
        made.append(runs.model_for("bert", method))
        return made[-1]

    it = Trainer(model_init=init, args=args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])
    it.train()
    it.train()
    trained = [{n: p for n, p in model.state_dict().items() if "lora_" in n} for model in made[-2:]]
    assert all(torch.equal(p, trained[1][n]) for n, p in trained[0].items()) and trained[0].keys() == trained[1].keys()
    total = sum(layer.r["default"] for _, layer in adapter_layers(made[-1]))
    rank = runs.METHODS[method].get("rank")
    assert total < 4 * 16 or rank is None or rank.starter is rank
