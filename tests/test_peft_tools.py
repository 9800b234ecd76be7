"""PEFT's own tools on an adapter that adapts: as on a stock one, or refused before anything has changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from accelerate import cpu_offload
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.lora import LoraModel
from peft.tuners.lora.intruders import reduce_intruder_dimension
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap

import short_runs as runs
import tiny
from marks import slow
from trimtab import AdaLoRA, Controller, SalientLoRA, TrimConfig
from trimtab.errors import ConfigError, ModelError, StaleAdapterError
from trimtab.host.adapted import KNOWN_BY_NAME
from trimtab.host.layers import _make_room, hosted_layers
from trimtab.where.controls import first, last


def moved(method: str) -> peft.PeftModel:
    """An adapter whose tensors, diagonals included, are anything but those of its start; no controller knows of it."""
    model = runs.model_for("llama", method)
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def at_work(method: str) -> tuple[peft.PeftModel, Controller]:
    model = runs.model_for("llama", method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=runs.STEPS)
    runs.steps(model, controller, optimizer, 20)
    return model, controller


def joined(model: peft.PeftModel, folder: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "o_proj"], init_lora_weights=False)
    model.add_adapter("plain", config)
    model.add_weighted_adapter(["plain", "default"], [0.5, 0.7], "new", combination_type="cat")


def without_intruders(model: peft.PeftModel, folder: Path) -> None:
    reduce_intruder_dimension(model, "default", "new", logging_sink=None)


def swapped(model: peft.PeftModel, folder: Path) -> None:
    model.save_pretrained(str(folder))
    hotswap_adapter(model, str(folder), "default")


@pytest.mark.parametrize("tool", [joined, without_intruders, swapped])
@pytest.mark.parametrize("method", ["sora", "adalora+at, svd"])
def test_a_tool_that_knows_a_and_b_alone_is_refused_and_changes_nothing(method, tool, tmp_path):
    model = moved(method)
    expected = tiny.logits(model, "llama")
    with pytest.raises(ConfigError, match=r"still adapting.*finish\(\) first, or load what the model saved"):
        tool(model, tmp_path)
    assert "new" not in model.peft_config and not any(".new." in name for name in model.state_dict())
    assert torch.equal(tiny.logits(model, "llama"), expected)


def test_the_functions_of_peft_that_are_known_by_name_are_there_with_the_variables_that_are_read():
    functions = (
        LoraModel.add_weighted_adapter,
        BaseTuner.inject_adapter,
        hotswap_adapter_from_state_dict,
        reduce_intruder_dimension,
        peft.set_peft_model_state_dict,
    )
    found = {function.__name__: function.__code__.co_varnames for function in functions}
    assert found.keys() == KNOWN_BY_NAME.keys()
    for name, variables in KNOWN_BY_NAME.items():
        assert set(variables) <= set(found[name]), name


def test_adapters_beside_one_that_adapts_are_joined_and_swapped(tmp_path):
    model = moved("sora")
    joined_by_stock = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    joined_by_stock.save_pretrained(str(tmp_path))
    for one in (model, joined_by_stock):
        torch.manual_seed(4)
        for name in ("first", "second"):
            one.add_adapter(name, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
        one.add_weighted_adapter(["first", "second"], [0.5, 0.7], "new", combination_type="cat")
        one.set_adapter("new")
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(joined_by_stock, "llama"), atol=1e-6)
    hotswap_adapter(model, str(tmp_path), "first")
    model.set_adapter("first")
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(tiny.build("llama"), "llama"), atol=1e-6)


@pytest.mark.parametrize("kind", [{"use_dora": True}, {"lora_bias": True}], ids=["dora", "bias"])
def test_an_adapter_of_another_kind_is_whole_when_it_is_active_beside_one_that_adapts(kind, tmp_path):
    model = moved("sora")
    model.save_pretrained(str(tmp_path))
    stock = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path))
    for one in (model, stock):
        torch.manual_seed(4)
        one.add_adapter("x", peft.LoraConfig(r=3, target_modules=["q_proj", "o_proj"], init_lora_weights=False, **kind))
        with torch.no_grad():
            for name, parameter in one.named_parameters():
                if "magnitude" in name or name.endswith("lora_B.x.bias"):
                    parameter.add_(torch.rand_like(parameter))
        one.base_model.set_adapter(["default", "x"])
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(stock, "llama"), atol=1e-5)


def test_adapters_in_different_layers_are_not_joined_in_those_of_the_first_alone():
    base = tiny.build("llama")
    one, other = ({"target_modules": ["q_proj"], "init_lora_weights": False, "where": w} for w in
                  (first(base, count=2), last(base, count=2)))  # fmt: skip
    model = peft.get_peft_model(base, TrimConfig(**one))
    for name, settings in (("same", one), ("other", other)):
        model.add_adapter(name, TrimConfig(**settings))
    with pytest.raises(ConfigError, match=r"adapters=\['default', 'other'\]: they lie in different layers"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", combination_type="cat")
    assert "new" not in model.peft_config
    model.add_weighted_adapter(["default", "same"], [1.0, 1.0], "new", combination_type="cat")
    model.set_adapter("new")
    joined = tiny.logits(model, "llama")
    model.base_model.set_adapter(["default", "same"])
    assert torch.allclose(tiny.logits(model, "llama"), joined, atol=1e-5)


def test_adapters_whose_layers_the_first_one_has_are_joined_whatever_they_exclude():
    base = tiny.build("llama")
    model = peft.get_peft_model(base, TrimConfig(target_modules=["q_proj"], where=first(base, count=2)))
    model.add_adapter("within", peft.LoraConfig(target_modules=["q_proj"], layers_to_transform=[0]))
    model.add_weighted_adapter(["default", "within"], [1.0, 1.0], "new", combination_type="cat")


def test_adapters_without_diagonals_on_which_nobody_decided_are_joined():
    settings = dict(r=4, target_modules=["q_proj"], rank=SalientLoRA(target_r=2))
    model = peft.get_peft_model(tiny.build("llama"), TrimConfig(**settings))
    model.add_adapter("other", TrimConfig(**settings))
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "new", combination_type="cat")
    assert {"default", "other", "new"} <= model.peft_config.keys()


def test_weights_of_one_adapter_are_not_given_to_another_that_has_no_rank_left():
    model = runs.model_for("llama", "adalora")
    model.add_adapter("b", TrimConfig(r=4, target_modules=["q_proj"], rank=AdaLoRA(target_r=2)))
    kept = peft.get_peft_model_state_dict(model, adapter_name="b")
    layer = next(layer for name, layer in hosted_layers(model).items() if name.endswith("q_proj"))
    for name in ("default", "b"):
        _make_room(layer, name, 0)
    peft.set_peft_model_state_dict(model, kept, adapter_name="b")
    assert [layer.factors(name)[0].shape[0] for name in ("default", "b")] == [0, 4]


def test_a_finished_adapter_may_be_made_larger_by_peft():
    model, controller = at_work("salientlora")
    runs.steps(model, controller, controller.optimizer, runs.STEPS - 20)
    controller.finish()
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    expected = tiny.logits(model, "llama")
    model.load_state_dict(model.state_dict())
    assert torch.equal(tiny.logits(model, "llama"), expected)


@pytest.mark.parametrize("low_cpu_mem_usage", [slow(False), True])
@pytest.mark.parametrize("method", ["salientlora", "salientlora+aflora"])
def test_sites_that_were_cut_to_nothing_add_nothing_when_loaded_as_what_adapts(method, low_cpu_mem_usage, tmp_path):
    model, controller = at_work(method)
    assert 0 in controller.ranks().values()
    controller.finish(stopped_early=True)
    model.save_pretrained(str(tmp_path))
    fam = tiny.FAMILIES["llama"]
    config = runs.config_for(method)(target_modules=fam.target_modules, task_type=fam.task_type)
    again = peft.PeftModel.from_pretrained(
        tiny.build("llama"), str(tmp_path), config=config, low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.allclose(tiny.logits(again, "llama"), tiny.logits(model, "llama"), atol=1e-5)


def test_a_finished_adapter_with_sites_at_rank_0_is_what_loading_it_gives_to_pefts_tools(tmp_path):
    model, controller = at_work("salientlora")
    assert 0 in controller.ranks().values()
    controller.finish(stopped_early=True)
    model.save_pretrained(str(tmp_path))
    loaded = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path), is_trainable=True)
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert {name for name, _ in model.named_modules()} >= {name for name, _ in loaded.named_modules()}
    with pytest.warns(UserWarning, match="already a LoRA adapter"):
        (_, ours), (_, theirs) = (peft.convert_to_lora(one, rank=4, progressbar=False) for one in (model, loaded))
    assert ours.keys() == theirs.keys()
    for one in (model, loaded):
        reduce_intruder_dimension(one, "default", "new", logging_sink=None)
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(loaded, "llama"), atol=1e-5)


def test_what_a_finished_model_with_sites_at_rank_0_is_saved_as_goes_into_one_made_anew():
    model, controller = at_work("salientlora")
    controller.finish(stopped_early=True)
    expected, state = tiny.logits(model, "llama"), {key: p.clone() for key, p in model.state_dict().items()}
    anew = runs.model_for("llama", "salientlora")
    anew.load_state_dict(state)
    model.load_state_dict(state)
    assert torch.equal(tiny.logits(anew, "llama"), expected) and torch.equal(tiny.logits(model, "llama"), expected)


def test_a_base_s_own_tensors_leave_the_adapter_as_it_is():
    model, controller = at_work("salientlora")
    before, named = tiny.logits(model, "llama"), tiny.build("llama").state_dict()
    left = model.get_base_model().load_state_dict(named, strict=False).unexpected_keys  # as in PEFT's own layers
    assert left == [key for key in named if key.removesuffix(".weight") in controller.layers]
    assert torch.equal(tiny.logits(model, "llama"), before)
    assert not any(layer.hosted["default"].is_stale for layer in controller.layers.values())


def test_tensors_of_a_site_that_is_gone_are_refused_by_its_name():
    model, controller = at_work("salientlora")
    controller.finish(stopped_early=True)
    gone = next(name for name, r in controller.ranks().items() if r == 0)
    A, B = torch.ones(2, 32), torch.ones(32, 2)
    for named, give_back in (
        (".default", model.load_state_dict),
        ("", lambda state: peft.set_peft_model_state_dict(model, state)),
    ):
        ours = model.state_dict() if named else peft.get_peft_model_state_dict(model)
        theirs = {f"base_model.model.{gone}.lora_{which}{named}.weight": p for which, p in (("A", A), ("B", B))}
        with pytest.raises(ModelError, match=rf"it has rank 2 for '.*{gone}', which the run left at rank 0"):
            give_back({**ours, **theirs})


def test_an_earlier_checkpoint_is_loaded_whole_where_sites_have_been_cut_to_nothing_since(tmp_path):
    early = moved("salientlora")
    early.save_pretrained(str(tmp_path))
    model, controller = at_work("salientlora")
    assert 0 in controller.ranks().values()
    found = model.load_adapter(str(tmp_path), "default")
    assert not found.unexpected_keys
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(early, "llama"), atol=1e-5)


def test_raw_parameters_that_peft_named_for_a_file_are_taken_with_their_diagonals():
    model = moved("adalora+at, svd")
    raw = peft.get_peft_model_state_dict(model, state_dict=dict(model.named_parameters()))
    other = runs.model_for("llama", "adalora+at, svd")
    assert not peft.set_peft_model_state_dict(other, raw).unexpected_keys
    assert torch.equal(tiny.logits(other, "llama"), tiny.logits(model, "llama"))


def test_raw_parameters_are_not_pickled_as_a_plain_lora(tmp_path):
    model = moved("sora")
    with pytest.raises(ModelError, match="raw parameters"):
        model.save_pretrained(str(tmp_path), safe_serialization=False, state_dict=dict(model.named_parameters()))
    model.save_pretrained(str(tmp_path), safe_serialization=False)
    again = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path))
    assert torch.allclose(tiny.logits(again, "llama"), tiny.logits(model, "llama"), atol=1e-5)


@pytest.mark.parametrize(
    "call",
    [Controller.finish, Controller.before_step, lambda controller: controller.load_state_dict(controller.state_dict())],
    ids=["finish", "before_step", "load_state_dict"],
)
def test_a_merged_adapter_is_neither_trained_nor_cut(call: Callable[[Controller], None]):
    model, controller = at_work("salientlora")
    weights = {name: p.clone() for name, p in model.named_parameters() if "base_layer" in name}
    model.merge_adapter()
    with pytest.raises(ModelError, match=r"merged into the base's weights.*unmerge_adapter\(\) first"):
        call(controller)
    model.unmerge_adapter()
    controller.finish(stopped_early=True)
    after = dict(model.named_parameters())
    after |= {name.replace(".weight", ".base_layer.weight"): p for name, p in after.items()}  # of sites at rank 0
    assert all(torch.allclose(after[name], w, atol=1e-6) for name, w in weights.items())


@pytest.mark.parametrize(("method", "kind"), [("sora", peft.LoraConfig), ("aflora", runs.config_for("aflora"))])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_base_that_is_wrapped_once_more_begins_anew(method, kind):
    model, _ = at_work(method)
    again, fresh = (
        peft.get_peft_model(base, kind(r=3, target_modules=tiny.FAMILIES["llama"].target_modules))
        for base in (model.base_model.model, tiny.build("llama"))
    )
    trains, expected = ({n: p.requires_grad for n, p in one.named_parameters()} for one in (again, fresh))
    assert trains == expected
    assert torch.allclose(tiny.logits(again, "llama"), tiny.logits(fresh, "llama"), atol=1e-6)


def test_an_adapter_that_was_made_anew_under_its_controller_is_said():
    model = runs.model_for("llama", "aflora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=runs.STEPS)
    runs.steps(model, controller, optimizer, 1)
    config = runs.config_for("aflora")(target_modules=tiny.FAMILIES["llama"].target_modules, task_type="CAUSAL_LM")
    model.delete_adapter("default")
    model.add_adapter("default", config)
    model.set_adapter("default")
    with pytest.raises(StaleAdapterError, match="was made anew"):
        runs.steps(model, controller, optimizer, 1)


def test_diagonals_that_accelerate_has_offloaded_are_said():
    model = moved("sora")
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ModelError, match=r"offloaded.*load what the model saved"):
        tiny.logits(model, "llama")


def test_a_scale_that_the_user_has_set_stays_when_ranks_are_cut():
    model, controller = at_work("salientlora")
    before = controller.ranks()
    for layer in hosted_layers(model).values():
        layer.set_scale("default", 0.5)
    controller.finish(stopped_early=True)
    assert any(0 < r < before[name] for name, r in controller.ranks().items())
    assert {layer.scaling["default"] for layer in controller.layers.values() if layer.scaling} == {0.5 * 8 / 4}


@pytest.mark.parametrize("is_finished", [False, True])
def test_a_scale_that_the_user_has_set_is_resumed_with(is_finished):
    model, controller = at_work("salientlora")
    for layer in hosted_layers(model).values():
        layer.set_scale("default", 0.5)
    if is_finished:
        controller.finish(stopped_early=True)
    other = runs.model_for("llama", "salientlora")
    optimizer = torch.optim.AdamW([p for p in other.parameters() if p.requires_grad], lr=1e-2)
    again = Controller(other, optimizer, total_steps=runs.STEPS)
    other.load_state_dict(model.state_dict())
    again.load_state_dict(controller.state_dict())
    assert torch.equal(tiny.logits(other, "llama"), tiny.logits(model, "llama"))
    assert again.state_dict()[1]["scales_set"] == controller.state_dict()[1]["scales_set"] != {}


def test_a_finished_run_s_set_scale_is_no_matter_to_the_plain_lora_that_it_left(tmp_path):
    model, controller = at_work("salientlora")
    for layer in hosted_layers(model).values():
        layer.set_scale("default", 0.5)
    controller.finish(stopped_early=True)
    model.save_pretrained(str(tmp_path))
    plain = peft.PeftModel.from_pretrained(tiny.build("llama"), str(tmp_path), is_trainable=True)
    again = Controller(plain, torch.optim.AdamW(plain.parameters()), total_steps=runs.STEPS)
    again.load_state_dict(controller.state_dict())
    assert torch.allclose(tiny.logits(plain, "llama"), tiny.logits(model, "llama"), atol=1e-5)


@pytest.mark.parametrize("method", ["sora", "aflora", "grades"])
def test_lora_fa_is_refused_where_a_layer_holds_more_than_a_and_b(method):
    model = runs.model_for("llama", method)
    with pytest.raises(ConfigError, match="optimizer='LoraFAOptimizer'"):
        Controller(model, create_lorafa_optimizer(model, 4, 8, 1e-2), total_steps=runs.STEPS)


def test_the_config_of_a_finished_adapter_is_one_for_stock_layers():
    model, controller = at_work("salientlora")
    controller.finish(stopped_early=True)
    other = peft.get_peft_model(tiny.build("llama"), model.peft_config["default"])
    peft.set_peft_model_state_dict(other, peft.get_peft_model_state_dict(model))
    assert torch.allclose(tiny.logits(other, "llama"), tiny.logits(model, "llama"), atol=1e-6)
    assert not hosted_layers(other)
