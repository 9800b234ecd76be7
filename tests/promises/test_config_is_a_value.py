"""A config is a value: training changes the model, never the config that somebody else may use as well."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import sys
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import fresh
import short_runs as runs
import tiny
import trimtab
from marks import slow
from short_runs import steps
from trimtab import AdaLoRA, Controller, TrimConfig
from trimtab.errors import ConfigError, TrimtabError
from trimtab.host.layers import hosted_layers
from trimtab.where.controls import first, last

TARGETS = ["q_proj", "up_proj"]
SITES = 8  # of tiny Llama


def config_for(method: str, **options: Any) -> TrimConfig:
    settings = dict(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM")
    return TrimConfig(**(settings | runs.METHODS[method] | options))


def model_with(config: TrimConfig) -> peft.PeftModel:
    base = tiny.build("llama")
    torch.manual_seed(0)
    return tiny.begun(peft.get_peft_model(base, config), "llama")


def optimizer_of(model: torch.nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)


def begin(model: peft.PeftModel, name: str = "default", total: int = 40) -> tuple[Controller, torch.optim.Optimizer]:
    optimizer = optimizer_of(model)
    return Controller(model, optimizer, total_steps=total, adapter_name=name), optimizer


def fit(model: peft.PeftModel, name: str = "default", total: int = 40) -> peft.PeftModel:
    controller, optimizer = begin(model, name, total)
    steps(model, controller, optimizer, total)
    controller.finish()
    return model


def ranks(model: peft.PeftModel, name: str = "default") -> list[int]:
    return [p.shape[0] for n, p in model.named_parameters() if f"lora_A.{name}" in n]


def stock_logits(folder: Path, name: str = "default") -> torch.Tensor:
    """What stock PEFT computes with a saved adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a missing key is a warning there
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        where = folder if name == "default" else folder / name
        return tiny.logits(peft.PeftModel.from_pretrained(tiny.build("llama"), str(where)), "llama")


def saves_what_it_computes(model: peft.PeftModel, folder: Path, name: str = "default") -> None:
    model.set_adapter(name)
    expected = tiny.logits(model, "llama")
    model.save_pretrained(str(folder))
    assert torch.allclose(stock_logits(folder, name), expected, atol=1e-5)


@runs.each_method
def test_training_leaves_the_config_as_it_was(method):
    config = config_for(method)
    before = copy.deepcopy(config)
    fit(model_with(config))
    assert config == before and config.to_dict() == before.to_dict()
    assert config.rank == before.rank and config.freeze == before.freeze


@runs.each_method
def test_one_config_serves_models_that_live_side_by_side(method, tmp_path):
    config = config_for(method)
    models = [model_with(config) for _ in range(2)]
    fit(models[0])
    controller, optimizer = begin(models[1])
    steps(models[1], controller, optimizer, 15)
    for i, model in enumerate(models):  # one is finished, the other in mid-run
        saves_what_it_computes(model, tmp_path / str(i))


def test_one_config_serves_a_loop_over_seeds():
    config = config_for("adalora")
    assert [sum(ranks(fit(model_with(config)))) for _ in range(2)] == [2 * SITES] * 2


def test_a_config_can_be_varied_while_a_model_of_it_trains(tmp_path):
    config = config_for("adalora")
    model = model_with(config)
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 15)
    other = dataclasses.replace(config, r=6, lora_alpha=12)
    assert set(ranks(model_with(other))) == {6}
    saves_what_it_computes(model, tmp_path)


def test_a_replaced_selection_leaves_nothing_of_the_one_before():
    base = tiny.build("llama")
    config = config_for("adalora", where=first(base, count=1), exclude_modules=["lm_head"])
    for where, blocks in ((last(base, count=1), {"3"}), (None, {"0", "1", "2", "3"})):
        varied = dataclasses.replace(config, where=where)
        model = model_with(varied)
        found = {n.split("layers.")[1].split(".")[0] for n, _ in model.named_parameters() if "lora_A" in n}
        assert found == blocks
    assert dataclasses.replace(dataclasses.replace(config, where=last(base, count=1)), where=config.where) == config


@dataclasses.dataclass
class Noted(TrimConfig):
    """A config of the user's own."""

    note: str = ""

    def told(self) -> str:
        return f"{self.note}: {self.is_adaptive}"


def test_a_config_of_the_users_own_class_stays_of_it(tmp_path):
    model = model_with(Noted(r=4, target_modules=TARGETS, note="mine", **runs.METHODS["salientlora"]))
    controller, optimizer = begin(model)
    for config in (model.peft_config["default"], copy.deepcopy(model).peft_config["default"]):
        assert config.told() == "mine: True"
    steps(model, controller, optimizer, 20)
    saves_what_it_computes(model, tmp_path / "at work")
    controller.finish(stopped_early=True)
    assert model.peft_config["default"].told() == "mine: False"
    saves_what_it_computes(model, tmp_path / "finished")


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [slow(copy.copy), slow(copy.deepcopy), by_pickle])
def test_a_copied_config_is_equal_and_of_its_own(copied, tmp_path):
    config = config_for("salientlora")
    model = fit(model_with(config))
    twin = copied(config)
    assert twin == config and type(twin) is TrimConfig
    saves_what_it_computes(fit(model_with(twin)), tmp_path / "twin")
    saves_what_it_computes(model, tmp_path / "model")


@pytest.mark.parametrize("when", [slow("fresh"), "at work", slow("finished")])
@runs.each_method
def test_a_model_is_copied_with_its_adapter(method, when, tmp_path):
    model = model_with(config_for(method))
    if when != "fresh":
        controller, optimizer = begin(model)
        steps(model, controller, optimizer, 20 if when == "at work" else 40)
        if when == "finished":
            controller.finish()
    expected = tiny.logits(model, "llama")
    twin = copy.deepcopy(model)
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    stored = torch.load(held, weights_only=False)
    if when != "finished":
        fit(model) if when == "fresh" else (steps(model, controller, optimizer, 20), controller.finish())
    for i, other in enumerate((twin, stored)):  # the original went on; they did not
        assert torch.equal(tiny.logits(other, "llama"), expected)
        saves_what_it_computes(other, tmp_path / str(i))
    saves_what_it_computes(model, tmp_path / "model")


def test_a_copied_model_trains_by_itself(tmp_path):
    model = model_with(config_for("salientlora+aflora"))
    twin = copy.deepcopy(model)
    fit(model)
    assert sum(ranks(twin)) == 4 * SITES
    fit(twin)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values()))
    saves_what_it_computes(twin, tmp_path)


def test_a_pickled_model_opens_in_another_process(tmp_path):
    model = model_with(config_for("salientlora"))
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 20)
    torch.save(model, tmp_path / "model.pt")
    torch.save(tiny.logits(model, "llama"), tmp_path / "logits.pt")
    script = (
        "import sys, torch; sys.path[:0] = sys.argv[2:]; import tiny\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "assert torch.equal(tiny.logits(model, 'llama'), torch.load(sys.argv[1] + '/logits.pt'))\n"
        "model.save_pretrained(sys.argv[1] + '/saved')\n"
    )
    fresh.python("-c", script, tmp_path, *sys.path).check_returncode()
    assert torch.allclose(stock_logits(tmp_path / "saved"), torch.load(tmp_path / "logits.pt"), atol=1e-5)


def test_a_reference_adapter_may_be_made_of_the_config_at_any_time(tmp_path):
    """TRL's preference trainers make one from ``model.peft_config``."""
    model = model_with(config_for("adalora"))
    model.add_adapter("early", model.peft_config["default"])
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 12)
    model.add_adapter("late", model.peft_config["default"])
    steps(model, controller, optimizer, 28)
    controller.finish()
    assert sum(ranks(model)) == 2 * SITES and set(ranks(model, "early")) == set(ranks(model, "late")) == {4}
    for name in ("early", "late", "default"):
        saves_what_it_computes(model, tmp_path, name)


def test_a_deleted_adapter_leaves_nothing_behind(tmp_path):
    config = config_for("salientlora+aflora")
    model = model_with(config)
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=config.target_modules, task_type="CAUSAL_LM"))
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 20)
    model.delete_adapter("default")
    assert model.active_adapters == ["other"] and not hosted_layers(model)
    saves_what_it_computes(model, tmp_path / "left", "other")
    model.add_adapter("default", config)
    model.set_adapter("default")
    saves_what_it_computes(fit(model), tmp_path / "again")


def test_an_adapter_deleted_under_its_controller_is_said(tmp_path):
    model = model_with(config_for("adalora"))
    model.add_adapter("other", peft.LoraConfig(r=3, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 3)
    model.delete_adapter("default")
    with pytest.raises(TrimtabError):
        steps(model, controller, optimizer, 1)


def test_adapters_are_added_loaded_and_switched_in_mid_run(tmp_path):
    trained = fit(model_with(config_for("salientlora")))
    trained.save_pretrained(str(tmp_path / "trained"))
    expected = tiny.logits(trained, "llama")
    model = model_with(config_for("adalora"))
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 12)
    model.load_adapter(str(tmp_path / "trained"), "loaded")
    model.set_adapter("loaded")
    assert torch.allclose(tiny.logits(model, "llama"), expected, atol=1e-5)
    model.set_adapter("default")
    steps(model, controller, optimizer, 28)
    controller.finish()
    assert sum(ranks(model)) == 2 * SITES
    for name in ("loaded", "default"):
        saves_what_it_computes(model, tmp_path / "both", name)


@pytest.mark.parametrize("kind", ["cat", slow("svd")])
def test_finished_adapters_are_joined_by_peft(kind, tmp_path):
    config = config_for("salientlora+aflora")
    model = fit(model_with(config))
    model.add_adapter("second", config)
    model.set_adapter("second")
    fit(model, "second")
    deltas = {}
    for name in ("default", "second"):
        deltas[name] = {n: m.get_delta_weight(name) for n, m in adapted(model, name)}
    model.add_weighted_adapter(["default", "second"], [0.7, 0.3], "joined", combination_type=kind, svd_rank=16)
    for n, layer in adapted(model, "joined"):
        parts = [w * deltas[k][n] for k, w in (("default", 0.7), ("second", 0.3)) if n in deltas[k]]
        assert torch.allclose(layer.get_delta_weight("joined"), sum(parts), atol=1e-5), n
    saves_what_it_computes(model, tmp_path, "joined")


def adapted(model: peft.PeftModel, name: str) -> list[tuple[str, Any]]:
    return [(n, m) for n, m in model.named_modules() if name in getattr(m, "lora_A", {})]


def test_two_active_adaptive_adapters_are_refused():
    config = config_for("adalora")
    model = model_with(config)
    model.add_adapter("second", config)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ConfigError, match="'second' is active as well"):
        begin(model)


@runs.each_method
def test_merging_in_mid_run_computes_the_same_and_comes_back(method):
    model = model_with(config_for(method))
    controller, optimizer = begin(model)
    steps(model, controller, optimizer, 20)
    expected = tiny.logits(model, "llama")
    model.merge_adapter()
    assert torch.allclose(tiny.logits(model, "llama"), expected, atol=1e-5)
    model.unmerge_adapter()
    steps(model, controller, optimizer, 20)
    controller.finish()
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(tiny.logits(merged, "llama"), tiny.logits(model, "llama"), atol=1e-5)


def test_exports_of_models_that_share_a_config_are_each_their_own(tmp_path):
    config = TrimConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
                        rank=AdaLoRA(target_r=2))  # fmt: skip
    models = [fit(model_with(config), total=n) for n in (20, 30)]
    for i, model in enumerate(models):
        trimtab.export(model, tmp_path / str(i))
        assert torch.allclose(stock_logits(tmp_path / str(i)), tiny.logits(model, "llama"), atol=1e-5)


@pytest.mark.parametrize(
    "key, settings",
    [
        ("rank", {"rank": "salientlora"}),
        ("rank", {"rank": AdaLoRA}),
        ("rank", {"rank": {"method": "adalora"}}),
        ("rank", {"rank": trimtab.AFLoRA()}),
        ("rank", {"rank": False}),
        ("freeze", {"freeze": AdaLoRA(target_r=2)}),
        ("freeze", {"freeze": trimtab.AFLoRA}),
        ("where", {"where": [0, 2]}),
        ("where", {"where": {"encoder.layer": "0110"}}),
        ("budget", {"rank": AdaLoRA(target_r=2), "budget": 1000}),
        ("budget", {"budget": trimtab.Budget(final_params=200)}),
        ("adapter.alpha", {"lora_alpha": "16"}),
        ("adapter.dropout", {"lora_dropout": "0.1"}),
    ],
)
def test_a_value_of_another_kind_is_refused_when_the_config_is_made(key, settings):
    with pytest.raises(ConfigError, match=f"^{key}="):
        TrimConfig(r=4, target_modules=TARGETS, **settings)


@pytest.mark.parametrize("method", ["salientlora", "aflora"])
def test_what_the_user_has_frozen_stays_so_at_the_end(method):
    model = model_with(config_for(method))
    own = [p for name, p in model.named_parameters() if "layers.0." in name and "lora_" in name]
    for parameter in own:
        parameter.requires_grad_(False)
    fit(model)
    left = {name: p.requires_grad for name, p in model.named_parameters() if "lora_" in name}
    assert not any(wants for name, wants in left.items() if "layers.0." in name)
    assert all(wants for name, wants in left.items() if "layers.0." not in name)


def test_an_idle_adapter_that_was_loaded_in_part_stops_no_other_one():
    model = model_with(config_for("salientlora"))
    model.add_adapter("idle", config_for("salientlora"))
    part = {name: p + 1 for name, p in model.state_dict().items() if "layers.0." in name and ".idle." in name}
    model.load_state_dict(part, strict=False)
    fit(model)
