"""Where not every layer holds a target, selections are made among those that do; other models' are refused."""

import json
import warnings

import peft
import pytest
import torch
import transformers as tf

import tiny
import trimtab
from trimtab.errors import ConfigError, ModelError
from trimtab.plans import Where
from trimtab.where import first, from_mask, last, random, uniform, with_targets
from trimtab.where.importance import most_important

SMALL = dict(
    vocab_size=64, hidden_size=32, num_hidden_layers=8, num_attention_heads=2, num_key_value_heads=2,
    intermediate_size=32,
)  # fmt: skip
TARGETS = ["q_proj", "v_proj"]
LFM2 = {"model_type": "lfm2", **SMALL, "full_attn_idxs": [2, 5, 6, 7]}
ENDS = r"target_modules=\['q_proj', 'v_proj'\] match nothing in 2 of the 4 chosen layers of layers \(0, 1; 2, 5, 6, 7 "


def hybrid():
    """Convolutions in its layers 0, 1, 3 and 4, attention in 2, 5, 6 and 7."""
    with torch.device("meta"):
        return tf.Lfm2ForCausalLM(tf.Lfm2Config(**SMALL, full_attn_idxs=[2, 5, 6, 7]))


def adapted(model):
    return {
        int(name.split(".layers.")[1].split(".")[0]) for name, _ in model.named_modules() if name.endswith("lora_A")
    }


def config(where, **more):
    return trimtab.TrimConfig(r=2, target_modules=TARGETS, where=where, **more)


@pytest.mark.parametrize(
    "model, layers",
    [
        (hybrid, {"layers": (2, 5, 6, 7)}),
        (
            lambda: tf.JambaForCausalLM(
                tf.JambaConfig(**SMALL, num_experts=2, attn_layer_period=4, attn_layer_offset=1, mamba_d_state=4)
            ),
            {"layers": (1, 5)},
        ),
        (
            lambda: tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**SMALL, lru_width=32)),
            {"layers": (2, 5)},
        ),
        (lambda: tiny.build("bart"), {"encoder.layers": (0, 1), "decoder.layers": (0, 1)}),
    ],
    ids=["lfm2", "jamba", "recurrent_gemma", "bart"],
)
def test_the_layers_that_hold_a_target_are_named(model, layers):
    assert with_targets(model(), TARGETS) == layers


@pytest.mark.parametrize("choose", [uniform, first, last, random])
def test_a_control_chooses_among_the_layers_that_hold_a_target_and_the_ratio_is_of_those(choose):
    among = with_targets(hybrid(), TARGETS)
    chosen = choose(hybrid(), ratio=0.5, among=among)
    assert len(chosen.layers) == 2 and set(chosen.layers) <= {2, 5, 6, 7}
    assert choose(hybrid(), count=4, among=among).layers == (2, 5, 6, 7)
    with pytest.raises(ConfigError, match=r"where\.count"):
        choose(hybrid(), count=5, among=among)


def test_measured_layers_are_ranked_among_those_that_hold_a_target():
    among = {"layers": (2, 5, 6, 7)}
    assert trimtab.select_layers([0.1, 0.1, 0.9, 0.1, 0.1, 0.3, 0.2, 0.8], ratio=0.5, among=among).layers == (5, 6)
    importance = {"layers": [9.0, 9.0, 1.0, 9.0, 9.0, 2.0, 4.0, 3.0]}
    assert most_important("gradient", importance, ratio=0.5, among=among).layers == (6, 7)


def test_a_stack_that_holds_no_target_is_left_out():
    model = tiny.build("t5")
    among = with_targets(model, r".*EncDecAttention\.q")
    assert among["encoder.block"] == ()
    chosen = uniform(model, ratio=0.5, among=among)
    assert "1" not in chosen.stacks["encoder.block"] and chosen.stacks["decoder.block"].count("1") == 1


@pytest.mark.parametrize("among", [{"decoder.layers": (0,)}, {"layers": (8,)}, {"layers": (-1,)}])
def test_layers_of_another_model_are_refused(among):
    with pytest.raises(ConfigError, match=r"where\.among"):
        uniform({"layers": 8}, among=among)


def test_targets_that_no_layer_holds_are_refused():
    with pytest.raises(ModelError, match="no layer of layers holds any"):
        with_targets(hybrid(), ["lm_head"])


@pytest.mark.parametrize("rank", [None, trimtab.SalientLoRA(target_r=1)])
def test_chosen_layers_in_which_nothing_is_adapted_are_said_once(rank):
    chosen = from_mask(hybrid(), "11100100")
    with pytest.warns(UserWarning, match=ENDS) as said:
        model = peft.get_peft_model(hybrid(), config(chosen, rank=rank))
    assert adapted(model) == {2, 5}
    assert sum("where: " in str(one.message) for one in said) == 1
    with pytest.warns(UserWarning, match=ENDS):
        trimtab.restrict(peft.VeraConfig(target_modules=TARGETS), chosen, hybrid())
    assert any("match nothing in 2 of the 4" in note for note in trimtab.plan(hybrid(), config(chosen)).notes)


def test_nothing_is_said_where_all_chosen_layers_are_adapted():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="where")
        chosen = last(hybrid(), count=3)
        assert adapted(peft.get_peft_model(hybrid(), config(chosen))) == {5, 6, 7}
        model = peft.get_peft_model(tiny.build("llama"), config(uniform(tiny.build("llama"))))
        model.add_adapter("other", config(first(tiny.build("llama"))))


def test_a_config_is_held_against_each_model_that_it_is_used_for():
    made = config(from_mask({"layers": 8}, "11100100"))
    for _ in range(2):
        with pytest.warns(UserWarning, match=ENDS):
            peft.get_peft_model(hybrid(), made)


def beside_stock(chosen):
    """The second adapter lies in the layers that PEFT made for the first."""
    model = peft.get_peft_model(tiny.build("llama"), peft.LoraConfig(target_modules=TARGETS))
    model.add_adapter("b", config(chosen))
    return model


def test_a_selection_for_another_depth_is_refused_where_the_model_is_known(tmp_path):
    (tmp_path / "where.json").write_text(json.dumps(uniform({"layers": 8}).to_json()))
    chosen = Where.from_json(json.loads((tmp_path / "where.json").read_text()))
    says = r"where.mask\[layers\]='01010101': 8 characters, but layers has 4 layers; select again for this model"
    for call in (
        lambda: peft.get_peft_model(tiny.build("llama"), config(chosen)),
        lambda: peft.get_peft_model(tiny.build("llama"), config(None)).add_adapter("b", config(chosen)),
        lambda: trimtab.Controller(beside_stock(chosen), total_steps=9, adapter_name="b"),
        lambda: trimtab.restrict(peft.LoraConfig(target_modules=TARGETS), chosen, tiny.build("llama")),
        lambda: trimtab.plan(tiny.build("llama"), config(chosen)),
    ):
        with pytest.raises(ConfigError, match=says):
            call()


def test_a_selection_of_bare_scores_serves_a_stack_whose_path_ends_like_it():
    opt = dict(vocab_size=64, hidden_size=32, ffn_dim=32, num_attention_heads=2, word_embed_proj_dim=32)
    chosen = trimtab.select_layers([0.9, 0.1, 0.2, 0.8])
    assert adapted(
        peft.get_peft_model(tf.OPTForCausalLM(tf.OPTConfig(**opt, num_hidden_layers=4)), config(chosen))
    ) == {
        1,
        2,
    }
    with pytest.raises(
        ConfigError, match=r"where\.stacks='layers': the model has no such stack; it has encoder.layers"
    ):
        peft.get_peft_model(tiny.build("bart"), config(from_mask({"layers": 2}, "10")))


@pytest.mark.parametrize("adapter", ["lora", "vera"])
@pytest.mark.parametrize("method", ["uniform", "first", "random", "cka"])
def test_a_recipe_chooses_among_the_layers_that_hold_a_target(method, adapter):
    made = trimtab.plan(
        {"model": {"config": LFM2}, "adapter": {"type": adapter, "target_modules": TARGETS}},
        overrides=[f"where.method={method}", "where.ratio=0.5"],
    )
    blocks = {site.site.block for site in made.sites}
    assert len(blocks) == 2 and blocks <= {2, 5, 6, 7}
    assert any("4 of 8 layers of layers hold one of target_modules (2, 5, 6, 7)" in note for note in made.notes)


def test_a_function_of_the_users_own_is_given_the_layers_that_hold_a_target(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "def choose(model, among=None):\n"
        "    return ''.join('1' if i in tuple(among['layers'])[:1] else '0' for i in range(8))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    made = trimtab.plan(
        {"model": {"config": LFM2}, "adapter": {"target_modules": TARGETS}, "where": {"method": "mine:choose"}}
    )
    assert made.where.mask == "00100000"
