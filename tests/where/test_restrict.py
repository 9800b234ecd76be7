"""restrict() puts a selection on any PEFT config: exactly the chosen blocks are adapted, and reload works."""

import copy
import re

import peft
import pytest
import torch
import transformers as tf
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import tiny
from test_sites import llava_config
from trimtab.errors import ConfigError, ModelError
from trimtab.host.restrict import restrict
from trimtab.host.sites import find_stacks, matched_names
from trimtab.plans import Where
from trimtab.where import from_mask


def headless_bert():
    return tiny.build("bert").bert


def llava():
    torch.manual_seed(0)
    return tf.LlavaForConditionalGeneration(llava_config())


def text(with_decoder=False, with_image=False):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    data = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if with_decoder:
        data["decoder_input_ids"] = ids[:, :5]
    if with_image:
        ids[:, 1:5] = 63
        data["pixel_values"] = torch.ones(2, 3, 8, 8)
    return data


MODELS = {
    "bert": (headless_bert, {"encoder.layer": "0101"}, ["query", "value"], text()),
    "gpt2": (lambda: tiny.build("gpt2"), {"h": "0110"}, ["c_attn", "c_fc"], text()),
    "llama": (lambda: tiny.build("llama"), {"layers": "1001"}, ["q_proj", "v_proj", "down_proj"], text()),
    "t5": (lambda: tiny.build("t5"), {"encoder.block": "01", "decoder.block": "10"}, ["q", "v"], text(True)),
    "bart": (
        lambda: tiny.build("bart"),
        {"encoder.layers": "10", "decoder.layers": "01"},
        ["q_proj", "fc2"],
        text(True),
    ),
    "llava": (llava, {"language_model.layers": "110"}, ["q_proj", "v_proj"], text(with_image=True)),
}
FEEDFORWARD = {"c_fc", "down_proj", "fc2"}


def conv1d(targets):
    return "c_attn" in targets


METHODS = {
    "lora": lambda t: peft.LoraConfig(target_modules=t, r=2, init_lora_weights=False, fan_in_fan_out=conv1d(t)),
    "dora": lambda t: peft.LoraConfig(target_modules=t, r=2, use_dora=True, fan_in_fan_out=conv1d(t)),
    "pissa": lambda t: peft.LoraConfig(target_modules=t, r=2, init_lora_weights="pissa", fan_in_fan_out=conv1d(t)),
    "adalora": lambda t: peft.AdaLoraConfig(
        target_modules=t, init_r=2, target_r=1, total_step=9, tinit=2, tfinal=2, fan_in_fan_out=conv1d(t)
    ),
    "vera": lambda t: peft.VeraConfig(target_modules=t, r=4, fan_in_fan_out=conv1d(t)),
    "ia3": lambda t: peft.IA3Config(
        target_modules=t, feedforward_modules=[x for x in t if x in FEEDFORWARD], fan_in_fan_out=conv1d(t)
    ),
    "loha": lambda t: peft.LoHaConfig(target_modules=t, r=2),
    "lokr": lambda t: peft.LoKrConfig(target_modules=t, r=2),
    "oft": lambda t: peft.OFTConfig(target_modules=t, oft_block_size=8),
    "boft": lambda t: peft.BOFTConfig(target_modules=t, boft_block_size=4),
    "hra": lambda t: peft.HRAConfig(target_modules=t, r=2),
    "fourierft": lambda t: peft.FourierFTConfig(target_modules=t, n_frequency=20, fan_in_fan_out=conv1d(t)),
    "randlora": lambda t: peft.RandLoraConfig(target_modules=t, r=4),
    "c3a": lambda t: peft.C3AConfig(target_modules=t, block_size=8),
    "miss": lambda t: peft.MissConfig(target_modules=t, r=2),
}
EVERYWHERE = ("lora", "dora", "pissa", "adalora", "vera", "ia3", "fourierft")
CASES = [
    (m, a)
    for m in MODELS
    for a in (EVERYWHERE if m == "gpt2" else METHODS)
    if m in ("bert", "llama") or a in (*EVERYWHERE, "loha")
]


def inside(model, masks, targets):
    """Full names of the targets in the chosen blocks, worked out from the names alone."""
    stacks = find_stacks(model)
    prefixes = tuple(
        f"{stacks[path].name}.{i}." for path, mask in masks.items() for i, c in enumerate(mask) if c == "1"
    )
    return [n for n, _ in model.named_modules() if n.startswith(prefixes) and n.rpartition(".")[2] in targets]


def adapted(model):
    layers = model.get_base_model().named_modules()
    return [n for n, m in layers if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)]


def function(model, data):
    model.eval()
    with torch.no_grad():
        return model(**data)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("family", "method"), CASES)
def test_exactly_the_chosen_blocks_are_adapted_and_a_reload_computes_the_same(family, method, tmp_path):
    build, masks, targets, data = MODELS[family]
    base = build()
    plain = function(base, data)
    torch.manual_seed(1)
    config = restrict(METHODS[method](list(targets)), Where("mask", masks), base)
    model = peft.get_peft_model(base, config)
    assert adapted(model) == inside(build(), masks, targets)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.5 * torch.randn_like(p))
    trained = function(model, data)
    assert (trained - plain).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(build(), tmp_path)
    assert adapted(again) == adapted(model)
    torch.testing.assert_close(function(again, data), trained, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "targets",
    [["query", "output.dense"], r".*\.(query|key)", "all-linear", None],
    ids=["list", "regex", "all-linear", "default"],
)
@pytest.mark.parametrize("cls", [peft.LoraConfig, peft.VeraConfig, peft.IA3Config], ids=lambda c: c.__name__)
def test_a_selection_is_the_part_of_the_targets_inside_the_blocks(cls, targets):
    settings = {"feedforward_modules": ["output.dense"]} if cls is peft.IA3Config else {}
    config = cls(target_modules=targets, task_type="SEQ_CLS", **settings)
    base = tiny.build("bert")
    every = matched_names(base, config)
    got = matched_names(base, restrict(config, "0110", base))
    assert got == [n for n in every if re.search(r"encoder\.layer\.[12]\.", n)] != []


def test_users_own_exclusions_stay():
    base = tiny.build("bert")
    for exclude in (["key"], r".*\.key", r"(?i).*\.KEY"):
        config = peft.LoraConfig(target_modules=["query", "key"], exclude_modules=exclude)
        got = peft.get_peft_model(tiny.build("bert"), restrict(config, "0100", base)).targeted_module_names
        assert got == ["bert.encoder.layer.1.attention.self.query"]


def test_the_given_config_is_left_alone():
    config = peft.VeraConfig(target_modules=["query"])
    before = copy.deepcopy(config.to_dict())
    restrict(config, "0100", tiny.build("bert"))
    assert config.to_dict() == before


def test_feedforward_modules_of_ia3_stay_in_step():
    base = tiny.build("bert")
    config = peft.IA3Config(target_modules=["key", "output.dense"], feedforward_modules=["output.dense"])
    model = peft.get_peft_model(base, restrict(config, "0100", base))
    kinds = {
        n.rpartition("layer.1.")[2]: m.is_feedforward
        for n, m in model.get_base_model().named_modules()
        if hasattr(m, "is_feedforward")
    }
    assert kinds == {"attention.self.key": False, "attention.output.dense": True, "output.dense": True}


def test_layer_indices_of_the_config_narrow_the_selection():
    base = tiny.build("bert")
    for cls in (peft.LoraConfig, peft.VeraConfig):
        config = cls(target_modules=["query"], layers_to_transform=[0, 1], layers_pattern="layer")
        assert matched_names(base, restrict(config, "0110", base)) == ["bert.encoder.layer.1.attention.self.query"]


def test_a_two_digit_block_is_not_mistaken_for_its_first_digit():
    config = copy.deepcopy(tiny.build("llama").config)
    config.num_hidden_layers = 12
    config.layer_types = None
    with torch.device("meta"):
        base = tf.LlamaForCausalLM(config)
    got = restrict(peft.LoraConfig(target_modules=["q_proj"]), "010000000000", base)
    assert matched_names(base, got) == ["model.layers.1.self_attn.q_proj"]


def test_a_selection_on_more_than_twenty_modules_survives_pefts_shortening():
    """PEFT shortens long target lists to endings; these must still tell the blocks and towers apart."""
    base = llava()
    config = peft.VeraConfig(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"], r=2)
    model = peft.get_peft_model(base, restrict(config, "111", base))
    assert len(adapted(model)) == 18
    wide = restrict(peft.LoraConfig(target_modules="all-linear"), "111", llava())
    assert len(adapted(peft.get_peft_model(llava(), wide))) == 21


class TwoTowers(torch.nn.Module):
    """A top-level stack whose path is the ending of another's: 'layers' and 'other.layers'."""

    def __init__(self):
        super().__init__()

        def tower():
            return torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(4, 4)) for _ in range(2)])

        self.layers = tower()
        self.other = torch.nn.Module()
        self.other.layers = tower()


def test_a_path_that_ends_like_another_is_kept_apart():
    base = TwoTowers()
    for cls in (peft.LoraConfig, peft.VeraConfig):
        config = restrict(cls(target_modules=["0"]), {"layers": "01"}, base)
        assert matched_names(base, config) == ["layers.1.0"]


def mixtral():
    torch.manual_seed(0)
    return tf.MixtralForCausalLM(
        tf.MixtralConfig(
            vocab_size=64,
            hidden_size=16,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            num_local_experts=2,
        )
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [["q_proj"], ["w1", "w2", "w3"], "all-linear"], ids=str)
def test_experts_that_transformers_fuses_into_parameters_stay_in_the_chosen_blocks(targets, tmp_path):
    """PEFT turns w1, w2, w3 into target_parameters, over which exclude_modules has no say."""
    config = restrict(peft.LoraConfig(target_modules=targets, r=2, init_lora_weights=False), "010", mixtral())
    model = peft.get_peft_model(mixtral(), config)
    names = [n for n, _ in model.named_parameters() if "lora_A" in n]
    assert names
    assert all(".layers.1." in n for n in names)
    want = function(model, text())
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(function(peft.PeftModel.from_pretrained(mixtral(), tmp_path), text()), want)


def test_a_second_adapter_can_be_restricted_on_a_peft_model():
    base = tiny.build("bert")
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["query"], r=2))
    model.add_adapter("second", restrict(peft.LoraConfig(target_modules=["query"], r=2), "0010", model))
    names = [n for n, _ in model.named_parameters() if ".lora_A.second" in n]
    assert len(names) == 1
    assert "layer.2." in names[0]


def test_the_model_may_be_on_the_meta_device():
    with torch.device("meta"):
        base = tiny.FAMILIES["t5"].build()
    config = restrict(peft.LoraConfig(target_modules=["q"]), {"decoder.block": "10"}, base)
    assert matched_names(base, config) == [
        "decoder.block.0.layer.0.SelfAttention.q",
        "decoder.block.0.layer.1.EncDecAttention.q",
    ]


def test_the_head_is_still_trained_and_saved():
    base = tiny.build("bert")
    config = restrict(peft.LoraConfig(target_modules=["query", "dense"], task_type="SEQ_CLS"), "0100", base)
    model = peft.get_peft_model(base, config)
    assert any("classifier" in n and p.requires_grad for n, p in model.named_parameters())
    assert all("layer.1." in n for n in model.targeted_module_names)


NEEDS = {"ADALORA": {"total_step": 10}, "IA3": {"feedforward_modules": []}, "OFT": {"oft_block_size": 8}}
NO_TARGETS = {"ADAPTION_PROMPT", "TRAINABLE_TOKENS", "XLORA"}


@pytest.mark.parametrize("kind", PEFT_TYPE_TO_CONFIG_MAPPING, ids=lambda k: k.value)
def test_every_method_that_peft_has_is_restricted_or_refused_with_a_reason(kind):
    cls = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if issubclass(cls, peft.PromptLearningConfig) or kind.value in NO_TARGETS:
        config = cls(**{"task_type": "CAUSAL_LM"} if kind.value == "CPT" else {})
        with pytest.raises(ConfigError, match="layers cannot be chosen for it: it "):
            restrict(config, "0110", tiny.build("llama"))
        return
    base = tiny.build("llama")
    config = restrict(cls(target_modules=["q_proj", "v_proj"], **NEEDS.get(kind.value, {})), "0110", base)
    assert matched_names(base, config) == [f"model.layers.{i}.self_attn.{p}_proj" for i in (1, 2) for p in "qv"]


def test_a_vision_tower_can_be_named_too():
    base = llava()
    (vision,) = set(find_stacks(base, include_vision=True)) - {"language_model.layers"}
    where = Where("mask", {"language_model.layers": "100", vision: "01"})
    got = matched_names(base, restrict(peft.LoraConfig(target_modules=["q_proj"]), where, base))
    assert sorted(got) == ["model.language_model.layers.0.self_attn.q_proj", f"model.{vision}.1.self_attn.q_proj"]


# What is refused


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (peft.PromptTuningConfig(num_virtual_tokens=4), "it trains prompts"),
        (peft.PrefixTuningConfig(num_virtual_tokens=4), "it trains prompts"),
        (peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2), "set adapter_layers"),
        (peft.TrainableTokensConfig(token_indices=[1]), "token embeddings"),
        (peft.XLoraConfig(hidden_size=8, adapters={}), "targets no modules"),
    ],
    ids=lambda v: type(v).__name__ if not isinstance(v, str) else "",
)
def test_a_config_without_target_modules_is_refused_with_the_reason(config, says):
    with pytest.raises(ConfigError) as error:
        restrict(config, "0110", tiny.build("bert"))
    assert says in str(error.value)
    assert type(config).__name__ in str(error.value)


def test_a_selection_for_another_depth_is_refused_with_both_lengths():
    for where in ("010101", Where("cka", {"encoder.layer": "010101"})):
        with pytest.raises(ConfigError, match=r"6 characters, but encoder\.layer has 4 layers"):
            restrict(peft.LoraConfig(target_modules=["query"]), where, tiny.build("bert"))


def test_one_mask_for_two_stacks_is_refused():
    with pytest.raises(ConfigError, match="one mask for each"):
        restrict(peft.LoraConfig(target_modules=["q"]), "01", tiny.build("t5"))


def test_targets_outside_the_chosen_blocks_are_refused():
    for cls in (peft.LoraConfig, peft.VeraConfig):
        with pytest.raises(ModelError, match=r"no match lies in the chosen layers \(encoder\.layer 0100\)"):
            restrict(cls(target_modules=["classifier"]), "0100", tiny.build("bert"))


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_outside_matches_every_name_but_those_in_the_chosen_blocks(family):
    model = tiny.build(family)
    stacks = find_stacks(model)
    where = from_mask(model, {path: "10" * (len(s) // 2) for path, s in stacks.items()})
    chosen = tuple(f"{s.name}.{i}" for s in stacks.values() for i in range(0, len(s), 2))
    for name, _ in model.named_modules():
        is_inside = name.startswith(tuple(f"{c}." for c in chosen)) or name in chosen
        assert bool(re.fullmatch(where.outside, name)) != is_inside


def test_layer_10_is_outside_where_layer_1_is_chosen():
    outside = from_mask({"layers": 12}, "010000000000").outside
    assert not re.fullmatch(outside, "model.layers.1.q_proj")
    assert all(re.fullmatch(outside, f"model.layers.{i}.q_proj") for i in (0, 10, 11))
