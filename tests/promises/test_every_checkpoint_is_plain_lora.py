"""Every checkpoint is a plain LoRA: so is the hosted layer, to everyone who looks at it from outside."""

from __future__ import annotations

import copy
import json
import pickle
from functools import partial

import peft
import pytest
import safetensors.torch
import torch
from torch import nn

import short_runs as runs
import tiny
import trimtab
from fakes import Halving
from trimtab import Controller, TrimConfig, Where
from trimtab.errors import ConfigError, ModelError
from trimtab.host.adapted import adapter_ranks
from trimtab.host.config import portable_fields
from trimtab.host.layers import TrimLayer, hosted_layers


def adaptive(family: str = "bert", **more) -> peft.PeftModel:
    fam = tiny.FAMILIES[family]
    options = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, rank=Halving(), task_type=fam.task_type) | more
    base = tiny.build(family)
    torch.manual_seed(0)
    return peft.get_peft_model(base, TrimConfig(**options)).eval()


def plain_reload(model: peft.PeftModel, family: str, folder) -> peft.PeftModel:
    model.save_pretrained(str(folder))
    return peft.PeftModel.from_pretrained(tiny.build(family), str(folder)).eval()


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_saved_adapter_is_plain_lora_of_the_same_function(family, tmp_path):
    model = adaptive(family)
    reloaded = plain_reload(model, family, tmp_path)
    assert not any(isinstance(m, TrimLayer) for m in reloaded.modules())
    assert torch.allclose(tiny.logits(model, family), tiny.logits(reloaded, family), atol=1e-5)
    assert set(peft.get_peft_model_state_dict(model)) == set(peft.get_peft_model_state_dict(reloaded))


def test_the_first_of_two_patterns_counts_in_the_file_too(tmp_path):
    first, all_others = r"layers\.0\.self_attn\.q_proj", "[qv]_proj"  # PEFT writes them sorted, the other way around
    patterns = {"rank_pattern": {first: 2, all_others: 6}, "alpha_pattern": {first: 2, all_others: 12}}
    model = adaptive("llama", rank=None, init_lora_weights=False, **patterns)
    reloaded = plain_reload(model, "llama", tmp_path)
    assert torch.allclose(tiny.logits(model, "llama"), tiny.logits(reloaded, "llama"), atol=1e-6)
    assert [rank for _, rank in sorted(adapter_ranks(reloaded).items())][:5] == [4, 4, 2, 6, 4]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("bert", dict(use_rslora=True, rank_pattern={"query": 2}, alpha_pattern={"dense": 5})),
        ("llama", dict(target_modules=["q_proj", "embed_tokens"])),
        ("gpt2", dict(use_dora=True)),
    ],
)
def test_a_start_that_is_drawn_anew_is_in_the_file(family, settings, tmp_path):
    base = tiny.build(family)

    def begun(seed: int) -> peft.PeftModel:
        torch.manual_seed(seed)
        config = TrimConfig(**dict(r=3, target_modules=tiny.FAMILIES[family].target_modules) | settings,
                            init_lora_weights="pissa_niter_1")  # fmt: skip
        return peft.get_peft_model(copy.deepcopy(base), config).eval()

    model = begun(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.mul_(3)
    trained = tiny.logits(model, family)
    assert not torch.allclose(trained, tiny.logits(base, family), atol=1e-4)
    with pytest.raises(ModelError, match="safe_serialization=False: init_lora_weights='pissa_niter_1' is undone"):
        model.save_pretrained(str(tmp_path / "pickle"), safe_serialization=False)
    model.save_pretrained(str(tmp_path))
    torch.manual_seed(1)
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    assert torch.allclose(tiny.logits(stock, family), trained, atol=1e-5)
    resumed = begun(1)
    for _ in range(2):
        resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
        assert torch.allclose(tiny.logits(resumed.eval(), family), trained, atol=1e-5)
    ours, theirs = (dict(m.named_parameters()) for m in (resumed, model))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora_" in name)
    exported = trimtab.export(resumed, tmp_path / "exported")
    stock = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(exported)).eval()
    assert torch.allclose(tiny.logits(stock, family), trained, atol=1e-5)


def test_the_fold_is_exact_in_float64(tmp_path):
    model = adaptive().double()
    before = tiny.logits(model, "bert")
    model.merge_adapter()
    assert torch.allclose(tiny.logits(model, "bert"), before, rtol=1e-12, atol=1e-12)


def test_a_state_dict_round_trip_changes_nothing():
    model = adaptive()
    raw = {n: p.clone() for n, p in model.named_parameters()}
    assert not model.load_state_dict(model.state_dict()).missing_keys
    assert all(torch.equal(p, raw[n]) for n, p in model.named_parameters())
    assert not any(layer.hosted["default"].is_stale for layer in hosted_layers(model).values())


def test_loading_another_lora_takes_its_tensors_and_marks_the_layer_stale(tmp_path):
    other = adaptive(r=2, lora_alpha=4)  # the same scale: PEFT keeps the scale of the adapter that is there
    model = adaptive()
    other.save_pretrained(str(tmp_path))
    model.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert torch.allclose(tiny.logits(model, "bert"), tiny.logits(other, "bert"), atol=1e-5)
    assert all(layer.hosted["default"].is_stale for layer in hosted_layers(model).values())
    assert all(layer.r["default"] == 2 for layer in hosted_layers(model).values())


def test_disabling_merging_and_unmerging_follow_peft(tmp_path):
    model = adaptive()
    base = tiny.build("bert").eval()
    adapted = tiny.logits(model, "bert")
    with model.disable_adapter():
        hidden = model.base_model.model.bert(**{k: v for k, v in tiny.batch("bert").items() if k != "labels"})
    plain = base.bert(**{k: v for k, v in tiny.batch("bert").items() if k != "labels"})
    assert torch.equal(hidden.last_hidden_state, plain.last_hidden_state)
    model.merge_adapter()
    assert torch.allclose(tiny.logits(model, "bert"), adapted, atol=1e-5)
    model.unmerge_adapter()
    assert torch.allclose(tiny.logits(model, "bert"), adapted, atol=1e-5)


def test_two_adapters_keep_their_own_ranks_and_configs(tmp_path):
    model = adaptive("llama")
    second = TrimConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj"], rank=Halving())
    first = tiny.logits(model, "llama")
    model.add_adapter("second", second)
    model.set_adapter("second")
    other = tiny.logits(model, "llama")
    model.save_pretrained(str(tmp_path))
    for name, folder, expected in (("default", tmp_path, first), ("second", tmp_path / "second", other)):
        reloaded = peft.PeftModel.from_pretrained(tiny.build("llama"), str(folder)).eval()
        assert torch.allclose(tiny.logits(reloaded, "llama"), expected, atol=1e-5), name
    model.delete_adapter("default")
    assert torch.allclose(tiny.logits(model, "llama"), other)


def test_float32_adapters_sit_on_a_bfloat16_base():
    fam = tiny.FAMILIES["llama"]
    base = tiny.build("llama").to(torch.bfloat16)
    model = peft.get_peft_model(base, TrimConfig(r=4, target_modules=fam.target_modules, rank=Halving()))
    out = model(**tiny.batch("llama"))
    out.loss.backward()
    assert out.logits.dtype == torch.bfloat16
    grads = {n: p.grad.dtype for n, p in model.named_parameters() if p.grad is not None}
    assert grads and set(grads.values()) == {torch.float32}


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = adaptive("llama")
        model.train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model(**tiny.batch("llama")).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.allclose(g, gradients[1][n], atol=1e-7) for n, g in gradients[0].items())


def test_conv1d_bases_merge_to_the_same_function():
    model = adaptive("gpt2")
    before = tiny.logits(model, "gpt2")
    merged = copy.deepcopy(model).merge_and_unload()
    assert torch.allclose(tiny.logits(merged, "gpt2"), before, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
def test_bitsandbytes_bases_carry_adaptive_layers(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            kind = partial(bnb.nn.Linear8bitLt, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit
            self.proj, self.out = kind(64, 64), kind(64, 64)
            self.config = {"model_type": "none"}

        def forward(self, x):
            return self.out(self.proj(x))

    torch.manual_seed(0)
    net = Net().to("cpu")
    model = peft.get_peft_model(net, TrimConfig(r=4, target_modules=["proj", "out"], rank=Halving()))
    assert list(hosted_layers(model)) == ["proj", "out"]
    layer = model.base_model.model.proj
    assert isinstance(layer, TrimLayer) and "bit" in type(layer).__name__
    x = torch.randn(3, 64)
    out = layer(x)
    out.float().square().sum().backward()
    A, B = layer.folded("default")
    expected = layer.base_layer(x) + x @ A.T @ B.T * layer.scaling["default"]
    assert torch.allclose(out.float(), expected.float(), atol=1e-2)
    assert layer.lora_e["default"].grad is not None


@pytest.mark.parametrize("bits", [8, 4])
def test_plain_lora_over_bitsandbytes_is_peft_s_own_and_keeps_less_for_the_backward_pass(bits, tmp_path):
    bnb = pytest.importorskip("bitsandbytes")
    found = []
    for kind in (TrimConfig, peft.LoraConfig):
        torch.manual_seed(0)
        linear = partial(bnb.nn.Linear8bitLt, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit
        net = nn.Sequential(linear(64, 64, bias=False), linear(64, 64, bias=False)).to("cpu").to(torch.bfloat16)
        net.config = {"model_type": "none"}
        model = peft.get_peft_model(net, kind(r=4, target_modules=["0", "1"], init_lora_weights=False))
        x = torch.randn(30, 64, dtype=torch.bfloat16, requires_grad=True)
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s, kept=kept: kept.append(s) or s, lambda s: s):
            out = model(x)
        out.float().square().sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None] + [x.grad]
        found.append((out, gradients, sum(s.nbytes for s in kept if s.shape == x.shape)))
        model.save_pretrained(tmp_path / kind.__name__)
    (ours, gradients, kept), (theirs, wanted, kept_by_peft) = found
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    assert all((a - b).norm() < 0.03 * b.norm() for a, b in zip(gradients, wanted, strict=True))
    assert 0 < kept <= kept_by_peft / 2
    files = [tmp_path / kind / "adapter_model.safetensors" for kind in ("TrimConfig", "LoraConfig")]
    ours, theirs = map(safetensors.torch.load_file, files)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_plain_lora_over_bitsandbytes_leaves_to_peft_what_the_function_does_not_cover():
    bnb = pytest.importorskip("bitsandbytes")
    x, calls, outputs = torch.randn(5, 64), [], []
    for kind in (TrimConfig, peft.LoraConfig):
        torch.manual_seed(0)
        net = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False)).to("cpu")
        net.config = {"model_type": "none"}
        config = kind(r=4, target_modules=["0"], init_lora_weights=False, lora_bias=True)
        layer = peft.get_peft_model(net, config).base_model.model[0]
        nn.init.constant_(layer.lora_B["default"].bias, 3.0)
        layer.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
        out = layer(x)
        out.sum().backward()
        outputs.append((out, layer.lora_B["default"].bias.grad))
    assert len(calls) == 2
    torch.testing.assert_close(outputs[0], outputs[1])


def test_a_pickled_model_over_bitsandbytes_can_be_pickled_again():
    bnb = pytest.importorskip("bitsandbytes")

    def model() -> nn.Module:
        net = nn.Sequential(bnb.nn.Linear4bit(64, 64, bias=False)).to("cpu")
        net.config = {"model_type": "none"}
        return peft.get_peft_model(net, TrimConfig(r=4, target_modules=["0"]))

    first = pickle.loads(pickle.dumps(model().base_model.model[0]))
    again = pickle.loads(pickle.dumps(first))
    assert type(again) is type(first) is type(model().base_model.model[0])


def test_the_saved_config_names_live_ranks_and_leaves_out_rank_zero():
    fields = portable_fields({"a.q": (3, 2.0), "a.v": (0, 2.0), "b.q": (1, 2.0)})
    assert fields["r"] == 3 and fields["lora_alpha"] == 6.0
    assert fields["target_modules"] == ["a.q", "b.q"]
    assert fields["rank_pattern"] == {r"b\.q": 1} and fields["alpha_pattern"] == {r"b\.q": 2.0}


def test_modules_at_rank_zero_vanish_from_the_export(tmp_path):
    model = runs.model_for("llama", "salientlora", rank=Halving(steps=(6, 12, 18, 24)))
    callback, _ = runs.train(model, "llama", tmp_path)
    alive = {name for name, r in callback.controller.ranks().items() if r}
    assert 0 < len(alive) < len(callback.controller.ranks())
    trimtab.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == alive
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]


def test_an_adapter_without_any_rank_is_refused():
    with pytest.raises(ModelError, match="every site is at rank 0"):
        portable_fields({"a.q": (0, 2.0)})


def test_where_restricts_by_the_selection():
    model = adaptive(where=Where("mask", {"encoder.layer": "0110"}))
    assert {name.split(".")[3] for name in hosted_layers(model)} == {"1", "2"}


def test_where_keeps_what_the_user_excludes():
    model = adaptive(where=Where("mask", {"encoder.layer": "0110"}), exclude_modules=["key"])
    assert not any(name.endswith("key") for name in hosted_layers(model))
    assert len(hosted_layers(model)) == 2 * 3


def test_finish_leaves_plain_factors_that_peft_tools_accept():
    model = adaptive("llama")
    before = tiny.logits(model, "llama")
    controller = Controller(model, total_steps=1)
    with pytest.raises(ConfigError, match=r"finish\(\) first"):
        model.add_weighted_adapter(["default"], [1.0], "joined", combination_type="cat")
    controller.finish()
    assert torch.allclose(tiny.logits(model, "llama"), before, atol=1e-5)
    model.add_weighted_adapter(["default"], [1.0], "joined", combination_type="cat")
    model.set_adapter("joined")
    assert torch.allclose(tiny.logits(model, "llama"), before, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"init_lora_weights": "pissa"}, "adapter.init"),
        ({"lora_bias": True}, "lora_bias"),
        ({"r": 0}, "adapter.r"),
        ({"lora_alpha": -1}, "adapter.alpha"),
        ({"lora_dropout": 1.0}, "adapter.dropout"),
        ({"where": "0110"}, "where"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=words):
        TrimConfig(**(dict(r=4, target_modules=["query"], rank=Halving()) | options))


def test_targets_that_are_no_linear_are_refused_with_a_rank_method():
    with pytest.raises(ModelError, match="word_embeddings"):
        adaptive(target_modules=["word_embeddings"])


def test_one_config_for_two_models_of_different_ranks_is_refused():
    config = TrimConfig(r=4, target_modules=["query"], rank=Halving())
    first = peft.get_peft_model(tiny.build("bert"), config)
    second = peft.get_peft_model(tiny.build("bert"), config)
    next(iter(hosted_layers(first).values())).r["default"] = 3
    with pytest.raises(ConfigError, match="two adapters"):
        config.to_dict()
    assert second is not first


def test_plain_lora_through_trimconfig_equals_stock_peft():
    fam = tiny.FAMILIES["bert"]
    options = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type)
    outputs = []
    for cls in (TrimConfig, peft.LoraConfig):
        base = tiny.build("bert")
        torch.manual_seed(0)
        model = peft.get_peft_model(base, cls(**options))
        for n, p in model.named_parameters():
            if "lora_B" in n:
                nn.init.normal_(p, generator=torch.Generator().manual_seed(len(n)))
        outputs.append(tiny.logits(model, "bert"))
    assert torch.allclose(*outputs, atol=1e-6)


def test_an_adaptive_adapter_in_layers_that_a_stock_one_made_is_refused():
    model = peft.get_peft_model(tiny.build("bert"), peft.LoraConfig(r=2, target_modules=["query"]))
    model.add_adapter("second", TrimConfig(r=4, target_modules=["query", "key"], rank=Halving()))
    with pytest.raises(ModelError, match=r"query' and 3 more modules carry 'second'.*before the others"):
        Controller(model, total_steps=4, adapter_name="second")
