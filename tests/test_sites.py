"""Stacks and sites of every model family, with and without heads, on the meta device and inside a PeftModel."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PromptTuningConfig, VeraConfig, get_peft_model
from torch import nn

import tiny
import trimtab
from trimtab.errors import ConfigError, ModelError
from trimtab.host.sites import find_sites, find_stacks, matched_names
from trimtab.plans import Where

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
T5 = {"vocab_size": 64, "d_model": 16, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 2, "d_ff": 32, "d_kv": 8}
BART = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
DISTIL = {"vocab_size": 64, "dim": 16, "n_layers": 3, "n_heads": 2, "hidden_dim": 32}
GPT2 = {"vocab_size": 64, "n_embd": 16, "n_layer": 3, "n_head": 2, "bos_token_id": 1, "eos_token_id": 2}
WHISPER = {
    "vocab_size": 64,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
}


def llava_config():
    vision = tf.CLIPVisionConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8, patch_size=4
    )
    return tf.LlavaConfig(text_config=tf.LlamaConfig(**SMALL), vision_config=vision, image_token_index=63)


def encoder_decoder_config():
    decoder = tf.BertConfig(**SMALL, is_decoder=True, add_cross_attention=True)
    return tf.EncoderDecoderConfig.from_encoder_decoder_configs(tf.RobertaConfig(**SMALL), decoder)


def phi4_config():
    """Its towers lie inside of the language model's embeddings, and its config is the language model's own."""
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=28)
    audio = dict(hidden_size=16, num_blocks=2, num_attention_heads=2, intermediate_size=32, nemo_conv_channels=16)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return tf.Phi4MultimodalConfig(**SMALL, **tokens, vision_config=vision, audio_config=audio)


def t5gemma2_config():
    text = dict(**SMALL, num_key_value_heads=1, head_dim=8)
    vision = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=8,
                  patch_size=4)  # fmt: skip
    encoder = dict(text_config=text, vision_config=vision, mm_tokens_per_image=4, vocab_size=64)
    return tf.T5Gemma2Config(encoder=encoder, decoder=text)


def on_meta(cls, config):
    with torch.device("meta"):
        return cls(config)


CASES = {
    "BertModel": ((tf.BertModel, tf.BertConfig(**SMALL)), {"encoder.layer": 3}),
    "BertForSequenceClassification": ((tf.BertForSequenceClassification, tf.BertConfig(**SMALL)), {"encoder.layer": 3}),
    "RobertaModel": ((tf.RobertaModel, tf.RobertaConfig(**SMALL)), {"encoder.layer": 3}),
    "DebertaV2Model": ((tf.DebertaV2Model, tf.DebertaV2Config(**SMALL)), {"encoder.layer": 3}),
    "DebertaV2ForSequenceClassification": (
        (tf.DebertaV2ForSequenceClassification, tf.DebertaV2Config(**SMALL)),
        {"encoder.layer": 3},
    ),
    "DistilBertModel": ((tf.DistilBertModel, tf.DistilBertConfig(**DISTIL)), {"transformer.layer": 3}),
    "DistilBertForSequenceClassification": (
        (tf.DistilBertForSequenceClassification, tf.DistilBertConfig(**DISTIL)),
        {"transformer.layer": 3},
    ),
    "GPT2Model": ((tf.GPT2Model, tf.GPT2Config(**GPT2)), {"h": 3}),
    "GPT2LMHeadModel": ((tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2)), {"h": 3}),
    "LlamaModel": ((tf.LlamaModel, tf.LlamaConfig(**SMALL)), {"layers": 3}),
    "LlamaForCausalLM": ((tf.LlamaForCausalLM, tf.LlamaConfig(**SMALL)), {"layers": 3}),
    "LlamaForQuestionAnswering": ((tf.LlamaForQuestionAnswering, tf.LlamaConfig(**SMALL)), {"layers": 3}),
    "MistralForCausalLM": ((tf.MistralForCausalLM, tf.MistralConfig(**SMALL, num_key_value_heads=1)), {"layers": 3}),
    "GemmaForCausalLM": ((tf.GemmaForCausalLM, tf.GemmaConfig(**SMALL, num_key_value_heads=1)), {"layers": 3}),
    "Qwen2ForSequenceClassification": (
        (tf.Qwen2ForSequenceClassification, tf.Qwen2Config(**SMALL, num_key_value_heads=1)),
        {"layers": 3},
    ),
    "MixtralForCausalLM": (
        (tf.MixtralForCausalLM, tf.MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=2)),
        {"layers": 3},
    ),
    "T5Model": ((tf.T5Model, tf.T5Config(**T5)), {"encoder.block": 2, "decoder.block": 3}),
    "T5ForConditionalGeneration": (
        (tf.T5ForConditionalGeneration, tf.T5Config(**T5)),
        {"encoder.block": 2, "decoder.block": 3},
    ),
    "T5ForSequenceClassification": (
        (tf.T5ForSequenceClassification, tf.T5Config(**T5)),
        {"encoder.block": 2, "decoder.block": 3},
    ),
    "T5EncoderModel": ((tf.T5EncoderModel, tf.T5Config(**T5)), {"encoder.block": 2}),
    "BartModel": ((tf.BartModel, tf.BartConfig(**BART)), {"encoder.layers": 2, "decoder.layers": 3}),
    "BartForConditionalGeneration": (
        (tf.BartForConditionalGeneration, tf.BartConfig(**BART)),
        {"encoder.layers": 2, "decoder.layers": 3},
    ),
    "BartForCausalLM": ((tf.BartForCausalLM, tf.BartConfig(**BART)), {"decoder.layers": 3}),
    "WhisperForConditionalGeneration": (
        (tf.WhisperForConditionalGeneration, tf.WhisperConfig(**WHISPER)),
        {"encoder.layers": 2, "decoder.layers": 3},
    ),
    "LlavaModel": ((tf.LlavaModel, llava_config()), {"language_model.layers": 3}),
    "LlavaForConditionalGeneration": ((tf.LlavaForConditionalGeneration, llava_config()), {"language_model.layers": 3}),
    "EncoderDecoderModel": (
        (tf.EncoderDecoderModel, encoder_decoder_config()),
        {"encoder.encoder.layer": 3, "decoder.bert.encoder.layer": 3},
    ),
    "Phi4MultimodalForCausalLM": ((tf.Phi4MultimodalForCausalLM, phi4_config()), {"model.layers": 3}),
    "EvollaForProteinText2Text": (
        (
            tf.EvollaForProteinText2Text,
            tf.EvollaConfig(
                **SMALL,
                num_key_value_heads=1,
                bos_token_id=1,
                eos_token_id=2,
                protein_encoder_config=dict(
                    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
                ),
                resampler_depth=2,
                resampler_heads=2,
                resampler_num_latents=4,
                resampler_dim_head=8,
                aligner_num_add_layers=1,
            ),
        ),
        {"model.layers": 3},
    ),
    "FunnelModel": (
        (
            tf.FunnelModel,
            tf.FunnelConfig(vocab_size=64, d_model=16, n_head=2, d_head=8, d_inner=32, block_sizes=[1, 2]),
        ),
        {"encoder.blocks.0": 1, "encoder.blocks.1": 2, "decoder.layers": 2},
    ),
    "T5Gemma2ForConditionalGeneration": (
        (tf.T5Gemma2ForConditionalGeneration, t5gemma2_config()),
        {"encoder.text_model.layers": 3, "decoder.layers": 3},
    ),
    "AlbertModel": ((tf.AlbertModel, tf.AlbertConfig(**SMALL)), {"encoder.albert_layer_groups": 1}),
    "ViTModel": (
        (
            tf.ViTModel,
            tf.ViTConfig(
                hidden_size=16,
                num_hidden_layers=3,
                num_attention_heads=2,
                intermediate_size=32,
                image_size=8,
                patch_size=4,
            ),
        ),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_stacks_of_every_family_are_found(case):
    (cls, config), depths = CASES[case]
    model = on_meta(cls, config)
    stacks = find_stacks(model)
    if depths is None:  # one stack, whatever this version calls it
        assert [len(s) for s in stacks.values()] == [3]
        return
    assert {path: len(stack) for path, stack in stacks.items()} == depths
    for stack in stacks.values():
        assert stack.hidden_size == 16
        assert model.get_submodule(stack.name) is stack.module
        assert stack.name.endswith(stack.path)


def test_the_vision_tower_of_a_llava_is_there_on_request():
    stacks = find_stacks(on_meta(*CASES["LlavaForConditionalGeneration"][0]), include_vision=True)
    assert [(len(s), s.hidden_size) for s in stacks.values()] == [(2, 24), (3, 16)]


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules=["query", "value"]),
        VeraConfig(target_modules=["query", "value"], r=4),
        PromptTuningConfig(num_virtual_tokens=2, task_type="SEQ_CLS"),
    ],
    ids=["lora", "vera", "prompt"],
)
def test_stacks_and_sites_are_the_same_inside_a_peft_model(config):
    base = tiny.build("bert")
    stacks, sites = find_stacks(base), find_sites(base, ["query", "value", "intermediate.dense"])
    model = get_peft_model(base, config)
    assert {p: (s.name, len(s)) for p, s in find_stacks(model).items()} == {
        p: (s.name, len(s)) for p, s in stacks.items()
    }
    assert find_sites(model, ["query", "value", "intermediate.dense"]) == sites


def test_a_compiled_or_wrapped_model_is_looked_into():
    base = tiny.build("bert")
    assert list(find_stacks(nn.DataParallel(base))) == ["encoder.layer"]


def test_a_plain_torch_transformer_has_stacks_too():
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 3)
    assert {p: (len(s), s.hidden_size) for p, s in find_stacks(encoder).items()} == {"layers": (3, 16)}


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ModelError, match="Sequential has no list of repeated blocks"):
        find_stacks(nn.Sequential(nn.Linear(2, 2)))


# Sites


def bert(**more):
    return on_meta(tf.BertForSequenceClassification, tf.BertConfig(**SMALL, **more))


def test_a_site_knows_its_shape_and_place():
    site = find_sites(bert(), ["intermediate.dense"])[1]
    assert site.name == "bert.encoder.layer.1.intermediate.dense"
    assert (site.in_features, site.out_features) == (16, 32)
    assert (site.stack, site.block, site.kind) == ("encoder.layer", 1, "intermediate.dense")


def test_a_site_outside_of_all_blocks_has_no_block():
    site = find_sites(bert(), ["pooler.dense"])[0]
    assert (site.stack, site.block, site.kind) == (None, None, "bert.pooler.dense")


def test_a_conv1d_counts_in_and_out_the_right_way_round():
    site = find_sites(on_meta(tf.GPT2LMHeadModel, tf.GPT2Config(**GPT2)), ["c_attn"])[0]
    assert (site.in_features, site.out_features) == (16, 48)


def test_a_selection_keeps_the_sites_in_its_blocks():
    sites = find_sites(bert(), ["query"], Where("mask", {"encoder.layer": "101"}))
    assert [s.block for s in sites] == [0, 2]


def test_language_model_sites_leave_the_vision_tower_out():
    model = on_meta(*CASES["LlavaForConditionalGeneration"][0])
    assert {s.stack for s in find_sites(model, ["q_proj"])} > {"language_model.layers"}  # PEFT hits both towers
    inside = find_sites(model, ["q_proj"], Where("mask", {"language_model.layers": "110"}))
    assert [s.name for s in inside] == [f"model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


BERT_TARGETS = {
    "suffixes": ["query", "value"],
    "full name": ["bert.encoder.layer.0.attention.self.query"],
    "regex": r".*\.[02]\.attention\.self\.(query|key)",
    "head too": ["dense", "classifier"],
}
TARGETS = [("bert", t) for t in BERT_TARGETS.values()] + [
    (family, targets)
    for family in tiny.FAMILIES
    for targets in ("all-linear", None)
    if (family, targets) != ("llava", None)  # PEFT has no default for it
]


@pytest.mark.parametrize("with_task", [False, True], ids=["no task type", "task type"])
@pytest.mark.parametrize(("family", "targets"), TARGETS, ids=lambda v: str(v))
def test_sites_are_exactly_what_peft_adapts(family, targets, with_task):
    task_type = tiny.FAMILIES[family].task_type if with_task else None
    base = tiny.build(family)
    sites = find_sites(base, targets, task_type=task_type)
    model = get_peft_model(base, LoraConfig(target_modules=targets, task_type=task_type, r=2))
    assert [s.name for s in sites] == model.targeted_module_names
    layers = dict(model.get_base_model().named_modules())
    for site in sites:
        assert layers[site.name].lora_A["default"].in_features == site.in_features
        assert layers[site.name].lora_B["default"].out_features == site.out_features


def test_a_peft_config_brings_its_own_matching_settings():
    config = LoraConfig(
        target_modules=["query", "dense"],
        layers_to_transform=[1],
        layers_pattern="layer",
        exclude_modules=["output.dense"],
        task_type="SEQ_CLS",
    )
    base = tiny.build("bert")
    sites = find_sites(base, config)
    assert [s.name for s in sites] == get_peft_model(base, config).targeted_module_names
    assert {s.block for s in sites} == {1}


def test_matching_leaves_the_config_as_it_was():
    config = LoraConfig(target_modules=None, task_type="SEQ_CLS")
    before = config.to_dict()
    matched_names(tiny.build("bert"), config)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("targets", "says"),
    [
        (
            ["query_proj"],
            "no linear named 'query_proj' in this model. It has query, key, value, dense, classifier. "
            "Did you mean 'query'?",
        ),
        (
            ["query", "qurey"],
            "no linear named 'qurey' in this model. It has query, key, value, dense, classifier. Did you mean 'query'?",
        ),
        ("query", "no linear matches 'query' as a regex for the whole name"),
        (r".*\.self", "no linear matches"),
        (r".*\.0\.attention\.self.*", "'bert.encoder.layer.0.attention.self' is a BertSelfAttention, not a linear"),
    ],
)
def test_a_target_that_matches_no_linear_is_refused(targets, says):
    with pytest.raises(ModelError) as error:
        find_sites(bert(), targets)
    assert says in str(error.value)
    assert str(error.value).startswith("target_modules: ")


def test_a_model_type_without_default_targets_is_refused():
    with pytest.raises(ModelError, match="no default for 'llava'"):
        find_sites(on_meta(*CASES["LlavaModel"][0]))


def test_a_selection_without_any_target_is_refused():
    with pytest.raises(ModelError, match="lies outside the chosen layers"):
        find_sites(bert(), ["classifier"], Where("mask", {"encoder.layer": "111"}))


def test_a_selection_for_another_model_is_refused():
    with pytest.raises(ConfigError, match=r"12 characters, but encoder\.layer has 3 layers"):
        find_sites(bert(), ["query"], Where("mask", {"encoder.layer": "1" * 12}))
    with pytest.raises(ConfigError, match=r"no such stack; it has encoder\.layer\. Did you mean"):
        find_sites(bert(), ["query"], Where("mask", {"encoder.layers": "111"}))


def test_a_selection_reaches_no_tower_whose_layers_are_called_as_the_language_models():
    base = on_meta(*CASES["Phi4MultimodalForCausalLM"][0])
    assert any(".encoder.layers.1." in name for name in matched_names(base, LoraConfig(target_modules="all-linear")))
    where = trimtab.where.uniform(base, count=1)
    model = get_peft_model(base, trimtab.TrimConfig(r=2, target_modules="all-linear", where=where))
    assert model.targeted_module_names
    assert all(name.startswith("model.layers.1.") for name in model.targeted_module_names)


# Trainable parameters of the published runs, from shapes alone

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SIX = ["query_proj", "key_proj", "value_proj", "attention.output.dense", "intermediate.dense", "output.dense"]
COUNTS = {
    "RoBERTa-base": (tf.RobertaModel, tf.RobertaConfig(), ["query", "value"], 8, 294_912),
    "DeBERTa-v3-base": (
        tf.DebertaV2Model,
        tf.DebertaV2Config(
            vocab_size=128_100,
            hidden_size=768,
            num_hidden_layers=12,
            num_attention_heads=12,
            intermediate_size=3072,
            relative_attention=True,
            position_buckets=256,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
        ),
        SIX,
        8,
        1_327_104,
    ),
    "LLaMA-2-7B": (tf.LlamaForCausalLM, tf.LlamaConfig(), SEVEN, 128, 319_815_680),
    "Mistral-7B": (tf.MistralForCausalLM, tf.MistralConfig(), SEVEN, 128, 335_544_320),
    "Gemma-7B": (tf.GemmaForCausalLM, tf.GemmaConfig(), SEVEN, 128, 400_031_744),
}


@pytest.mark.parametrize("name", COUNTS)
def test_trainable_parameters_are_the_published_ones(name):
    cls, config, targets, r, full = COUNTS[name]
    model = on_meta(cls, config)

    def count(where=None):
        return sum(r * (s.in_features + s.out_features) for s in find_sites(model, targets, where))

    ((path, stack),) = find_stacks(model).items()
    assert count() == full
    assert count(Where("mask", {path: "01" * (len(stack) // 2)})) == full // 2
