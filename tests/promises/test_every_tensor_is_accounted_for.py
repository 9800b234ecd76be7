"""Every tensor is accounted for, written exactly or refused by name: PEFT's fields, kinds of layers, ways of saving."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import peft
import pytest
import torch
import transformers as tf
from torch import nn

import fresh
import short_runs as runs
import tiny
import trimtab
from marks import slow
from trimtab import AdaLoRA, TrimConfig
from trimtab.errors import ConfigError, ExportError, ModelError
from trimtab.host.layers import _make_room, hosted_layers
from trimtab.host.sites import base_of
from trimtab.where import last

IDS = torch.randint(3, tiny.VOCAB, (2, 9), generator=torch.Generator().manual_seed(0))
IDS[0, 2], IDS[1, 1], IDS[1, 3] = 5, 5, 6  # the new tokens, and aLoRA's
SIZES = dict(
    vocab_size=tiny.VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.1,
)


def llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES | more))


def mixtral() -> nn.Module:
    return tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, num_local_experts=4))


def qwen2_moe() -> nn.Module:
    return tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(
            **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, shared_expert_intermediate_size=24
        )
    )


def gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=tiny.VOCAB,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=64,
            initializer_range=0.1,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def t5() -> nn.Module:
    return tiny.build("t5")


def bert() -> nn.Module:
    return tiny.build("bert")


def convbert() -> nn.Module:
    return tf.ConvBertForSequenceClassification(
        tf.ConvBertConfig(
            vocab_size=tiny.VOCAB,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            embedding_size=16,
            head_ratio=2,
            conv_kernel_size=3,
            initializer_range=0.1,
        )
    )


def vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=8,
            patch_size=4,
            initializer_range=0.1,
        )
    )


class Attentive(nn.Module):
    """torch's own MultiheadAttention, whose weights PEFT adapts by a layer class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(tiny.VOCAB, 32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.lift, self.head = nn.Linear(32, 32), nn.Linear(32, 5)

    def forward(self, input_ids: torch.Tensor) -> Any:
        x = self.embed(input_ids)
        return self.head(self.lift(self.mix(x, x, x)[0]) + x)


FORMS = ("save", "peft", "padded", "merged", "switch")


@dataclass
class Case:
    """A base, settings of an adapter on it, and the ways that refuse it: form -> what the refusal says."""

    base: Callable[[], nn.Module] = llama
    settings: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        return self.base().eval()


QV = ["q_proj", "v_proj"]
RANKS = dict(rank_pattern={"layers.1.self_attn.q_proj": 2}, alpha_pattern={"layers.0.self_attn.v_proj": 16})
CASES = {
    "plain": Case(),
    "ranks and alphas of its own": Case(settings=RANKS),
    "rsLoRA": Case(settings=dict(use_rslora=True) | RANKS),
    "a regex": Case(settings=dict(target_modules=r".*\.[12]\..*\.(q|v)_proj")),
    "all-linear": Case(settings=dict(target_modules="all-linear")),
    "some layers": Case(settings=dict(layers_to_transform=[1, 2], layers_pattern="layers")),
    "user's exclusions": Case(settings=dict(exclude_modules=["layers.1.self_attn.q_proj"])),
    "gaussian": Case(settings=dict(init_lora_weights="gaussian")),
    "orthogonal": Case(settings=dict(init_lora_weights="orthogonal")),
    "mica": Case(settings=dict(init_lora_weights="mica")),
    "pissa": Case(settings=dict(init_lora_weights="pissa"), refused=dict(switch="init_lora_weights=")),
    "olora": Case(settings=dict(init_lora_weights="olora"), refused=dict(switch="init_lora_weights=")),
    "an embedding": Case(settings=dict(target_modules=["q_proj", "embed_tokens"])),
    "an embedding, ranks": Case(
        settings=dict(target_modules=["q_proj", "embed_tokens"], rank_pattern={"embed_tokens": 3})
    ),
    "a head": Case(settings=dict(target_modules=["q_proj", "lm_head"])),
    "embedding tied": Case(lambda: llama(tie_word_embeddings=True), dict(target_modules=["q_proj", "embed_tokens"])),
    "head tied": Case(lambda: llama(tie_word_embeddings=True), dict(target_modules=["q_proj", "lm_head"])),
    "tying ensured": Case(
        lambda: llama(tie_word_embeddings=True),
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "tying ensured by the head": Case(
        lambda: llama(tie_word_embeddings=True), dict(target_modules=["q_proj", "lm_head"], ensure_weight_tying=True)
    ),
    "saved tying ensured": Case(
        lambda: llama(tie_word_embeddings=True), dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    ),
    "saved embedding tied": Case(lambda: llama(tie_word_embeddings=True), dict(modules_to_save=["embed_tokens"])),
    "saved head tied": Case(lambda: llama(tie_word_embeddings=True), dict(modules_to_save=["lm_head"])),
    "saved head and norm": Case(settings=dict(modules_to_save=["lm_head", "norm"])),
    "new tokens": Case(settings=dict(trainable_token_indices=[5, 6])),
    "new tokens by module": Case(settings=dict(trainable_token_indices={"embed_tokens": [5, 6], "lm_head": [5]})),
    "new tokens tied": Case(lambda: llama(tie_word_embeddings=True), dict(trainable_token_indices=[5, 6])),
    "new tokens and a head": Case(settings=dict(trainable_token_indices=[5, 6], modules_to_save=["lm_head"])),
    "new tokens in tied weights of an encoder-decoder": Case(
        t5, dict(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"], trainable_token_indices=[5, 6])
    ),
    "head of an encoder-decoder": Case(
        t5,
        dict(task_type="SEQ_2_SEQ_LM", target_modules=["q", "lm_head"]),
        refused=dict(merged="lm_head.weight is tied to shared.weight"),
    ),
    "layer replication": Case(
        settings=dict(layer_replication=[(0, 2), (1, 3)]), refused=dict(switch="layer_replication=")
    ),
    "aLoRA": Case(
        settings=dict(alora_invocation_tokens=[5]),
        refused=dict(merged="alora_invocation_tokens=[5]", switch="alora_invocation_tokens=[5]"),
    ),
    "KaSA": Case(settings=dict(kasa_config=peft.KasaConfig()), refused=dict(switch="kasa_config=")),
    "KaSA, ranks": Case(
        settings=dict(kasa_config=peft.KasaConfig()) | RANKS,
        refused=dict(switch="kasa_config=", padded="q_proj.lora_diag has rank 2"),
    ),
    "DoRA": Case(settings=dict(use_dora=True) | RANKS),
    "DoRA of an embedding": Case(settings=dict(use_dora=True, target_modules=["q_proj", "embed_tokens"])),
    "DoRA of pissa": Case(
        settings=dict(use_dora=True, init_lora_weights="pissa"), refused=dict(switch="init_lora_weights=")
    ),
    "LoRA biases": Case(lambda: llama(attention_bias=True), dict(lora_bias=True)),
    "LoRA biases, none in the base": Case(
        settings=dict(lora_bias=True), refused=dict(merged="q_proj.lora_B.bias", switch="q_proj.lora_B.bias")
    ),
    "all biases": Case(lambda: llama(attention_bias=True), dict(bias="all"), refused=dict(switch="bias='all'")),
    "the adapted biases": Case(
        lambda: llama(attention_bias=True), dict(bias="lora_only"), refused=dict(switch="bias='lora_only'")
    ),
    "experts, named": Case(mixtral, dict(target_modules=["q_proj", "w1", "w2", "w3"])),
    "experts, as parameters": Case(
        mixtral,
        dict(
            target_modules=["q_proj"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            rank_pattern={"experts.down_proj": 2},
        ),
    ),
    "experts alone": Case(mixtral, dict(target_modules=[], target_parameters=["experts.down_proj"])),
    "experts of Qwen2-MoE": Case(qwen2_moe, dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    "Conv1D": Case(gpt2, dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "Conv1D and its tied head": Case(gpt2, dict(target_modules=["c_attn", "lm_head"])),
    "Conv1D and its tied embedding": Case(gpt2, dict(target_modules=["c_attn", "wte"])),
    "convolutions": Case(convbert, dict(task_type="SEQ_CLS", target_modules=["query", "pointwise"])),
    "convolutions, ranks": Case(
        convbert, dict(task_type="SEQ_CLS", target_modules=["query", "pointwise"], rank_pattern={"pointwise": 2})
    ),
    "images": Case(vit, dict(task_type=None, target_modules=["projection", "q_proj"], rank_pattern={"projection": 2})),
    "images, DoRA": Case(vit, dict(task_type=None, target_modules=["projection", "q_proj"], use_dora=True)),
    "a classifier": Case(bert, dict(task_type="SEQ_CLS", target_modules=["query"])),
    "torch's attention": Case(
        Attentive,
        dict(task_type=None, target_modules=["mix", "lift"]),
        refused=dict(merged="Attentive has no save_pretrained"),
    ),
}
BESIDE_BLOCKS = "layer replication", "torch's attention"  # a selection of layers says nothing about these
OUTSIDE = {"head of an encoder-decoder": {}, "KaSA, ranks": dict(switch="kasa_config=")}  # what would be refused
CASES |= {
    f"where: {name}": Case(case.base, case.settings | dict(where=last), OUTSIDE.get(name, case.refused))
    for name, case in CASES.items()
    if name not in BESIDE_BLOCKS
}
ADAPTIVE = (
    "plain",
    "rsLoRA",
    "a regex",
    "a head",
    "head tied",
    "saved head and norm",
    "saved tying ensured",
    "new tokens",
    "new tokens tied",
    "where: new tokens",
    "a classifier",
    "Conv1D",
    "Conv1D and its tied head",
)
CASES |= {
    f"adaptive: {name}": Case(
        CASES[name].base, CASES[name].settings | dict(rank=AdaLoRA(target_r=2)), CASES[name].refused
    )
    for name in ADAPTIVE
}


def adapter(case: Case, seed: int = 1, base: nn.Module | None = None, **more: Any) -> peft.PeftModel:
    """The case's adapter, every number of it drawn at random."""
    base = case.build() if base is None else base
    settings = dict(task_type="CAUSAL_LM", r=4, lora_alpha=12, target_modules=QV) | copy.deepcopy(case.settings) | more
    if settings.get("where") is last:
        settings["where"] = last(base, count=1)
    model = peft.get_peft_model(base, TrimConfig(**settings))
    scramble(model, seed)
    return model.eval()


def scramble(model: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))


def function(model: nn.Module) -> torch.Tensor:
    inputs: dict[str, Any] = dict(input_ids=IDS)
    base = base_of(model)
    if isinstance(base, tf.ViTForImageClassification):
        inputs = dict(pixel_values=torch.ones(2, 3, 8, 8) * IDS.reshape(-1)[:2, None, None, None] / 64)
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = IDS[:, :4]
    with torch.no_grad():
        out = model.eval()(**inputs)
    return out if isinstance(out, torch.Tensor) else out.logits


def reload(case: Case, form: str, folder: Any) -> nn.Module:
    if form == "merged":
        return type(case.build()).from_pretrained(folder)
    return peft.PeftModel.from_pretrained(case.build(), folder)


def close(model: nn.Module, want: torch.Tensor) -> None:
    torch.testing.assert_close(function(model), want, atol=1e-5, rtol=1e-5)


def written(model: peft.PeftModel, form: str, folder: Any, name: str | None = None) -> None:
    if form == "save":
        model.save_pretrained(folder)
    else:
        trimtab.export(model, folder, format=form, adapter_name=name)


pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's, on tied weights and on bases without a folder


def each_form(names: Iterable[str]) -> Iterator[Any]:
    """Every case in every form. To begin with, a case takes three of the five forms, and one of a selection or a rank
    method takes one, since its tensors are those of the case without; the others when all tests run."""
    for i, (name, form) in enumerate(product(names, FORMS)):
        turn = (i - i // len(FORMS)) % len(FORMS)
        yield (name, form) if turn < (1 if ": " in name else 3) else slow(name, form)


@pytest.mark.parametrize(("name", "form"), each_form(CASES))
def test_an_adapter_is_written_exactly_or_refused_by_name(name, form, tmp_path):
    case = CASES[name]
    model, plain = adapter(case), function(case.build())
    want = function(model)
    assert (want - plain).abs().max() > 1e-3, "the adapter does something"
    if form in case.refused:
        with pytest.raises(ExportError, match=re.escape(case.refused[form])) as refusal:
            switched(model) if form == "switch" else written(model, form, tmp_path / "out")
        assert "merge" in str(refusal.value) or "format '" in str(refusal.value), "it says what would work"
        assert not (tmp_path / "out").exists()
    elif form == "switch":
        switch = switched(model)
        close(model, want)
        switch.to(None)
        close(model, plain)
    else:
        written(model, form, tmp_path)
        assert torch.equal(function(model), want), "writing changes nothing"
        close(reload(case, form, tmp_path), want)


def switched(model: peft.PeftModel) -> trimtab.AdapterSwitch:
    switch = trimtab.AdapterSwitch(model)
    switch.to("default")
    return switch


@pytest.mark.parametrize(("name", "form"), each_form(f"adaptive: {name}" for name in ADAPTIVE))
def test_so_is_one_whose_ranks_are_final(name, form, tmp_path):
    case = CASES[name]
    model = adapter(case)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = trimtab.Controller(model, optimizer, total_steps=12)
    for _ in range(12):
        model.train()(input_ids=IDS).logits.square().mean().backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    want = function(model)
    if form == "switch":
        close(switched(model).model, want)
    else:
        written(model, form, tmp_path)
        close(reload(case, form, tmp_path), want)


def test_biases_and_a_rank_method_do_not_go_together():
    """The bias of a module at rank 0 has no place in a saved adapter."""
    with pytest.raises(ConfigError, match="bias='lora_only'"):
        TrimConfig(bias="lora_only", rank=AdaLoRA(target_r=2))


TOGETHER = (
    slow("plain"),
    slow("a head"),
    slow("an embedding"),
    slow("saved head and norm"),
    slow("saved embedding tied"),
    slow("new tokens"),
    "new tokens tied",
    "experts, named",
    slow("Conv1D"),
    slow("DoRA"),
    "LoRA biases",
    slow("a classifier"),
    slow("where: saved head and norm"),
    "adaptive: saved head and norm",
)


@pytest.mark.parametrize("name", TOGETHER)
def test_the_named_adapter_is_written_whichever_is_active(name, tmp_path):
    case = CASES[name]
    model = adapter(case)
    other = adapter(case).peft_config["default"]
    model.add_adapter("other", type(other)(**{k: getattr(other, k) for k in other.__dataclass_fields__}))
    model.set_adapter("other")
    scramble(model, 2)
    want = {}
    for one in ("default", "other"):
        model.set_adapter(one)
        want[one] = function(model)
    assert not torch.allclose(want["default"], want["other"])
    for form in ("peft", "padded", "merged"):
        for one in ("default", "other"):  # "other" is active
            written(model, form, tmp_path / form / one, one)
            close(reload(case, form, tmp_path / form / one), want[one])
    close(model, want["other"])
    switch = trimtab.AdapterSwitch(model)
    for one in ("default", "other", "default"):
        switch.to(one)
        close(model, want[one])
    switch.to(None)
    close(model, function(case.build()))


def test_two_active_adapters_are_merged_together_and_written_one_by_one(tmp_path):
    case = CASES["a head"]
    model = adapter(case)
    model.add_adapter("second", TrimConfig(r=2, target_modules=["v_proj", "lm_head"]))
    model.base_model.set_adapter(["default", "second"])
    scramble(model, 2)
    want = function(model)
    written(model, "merged", tmp_path)
    close(reload(case, "merged", tmp_path), want)
    with pytest.raises(ExportError, match="default, second are active together"):
        written(model, "peft", tmp_path / "peft")


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("tying ensured", dict(target_modules=["embed_tokens"])),
        ("tying ensured", dict(target_modules=["q_proj", "lm_head"])),
        ("saved tying ensured", dict(target_modules=QV, modules_to_save=["embed_tokens"])),
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ["save", "peft"])
def test_a_second_adapter_is_saved_as_it_is_where_peft_ties_the_first_only(name, settings, form, tmp_path):
    case = CASES[name]
    model = adapter(case)
    model.add_adapter("second", TrimConfig(r=2, ensure_weight_tying=True, **settings))
    model.set_adapter("second")
    scramble(model, 2)
    written(model, form, tmp_path / ("second" if form == "peft" else ""))
    close(reload(case, form, tmp_path / "second"), function(model))


RESIZED = {
    "plain": {},
    "new tokens": dict(trainable_token_indices=[5, tiny.VOCAB + 1]),
    "an embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "a saved embedding": dict(modules_to_save=["embed_tokens", "lm_head"]),
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("form", FORMS[1:])
@pytest.mark.parametrize("name", RESIZED)
def test_a_vocabulary_that_grew_is_written(name, form, tied, tmp_path):
    llama(tie_word_embeddings=tied).save_pretrained(tmp_path / "base")

    def grown(seed: int) -> nn.Module:
        base = tf.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(seed)
        base.resize_token_embeddings(tiny.VOCAB + 3, mean_resizing=False)
        return base.eval()

    model = adapter(Case(settings=RESIZED[name]), base=grown(1))
    want = function(model)
    if form == "switch":
        close(switched(model).model, want)
        return
    written(model, form, tmp_path / "out")
    if form == "merged":
        close(tf.LlamaForCausalLM.from_pretrained(tmp_path / "out"), want)
    else:
        close(peft.PeftModel.from_pretrained(grown(2), tmp_path / "out"), want)


STOCK = """
import sys, torch, transformers, peft
for folder in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(folder + "/base")
    base = getattr(transformers, config.architectures[0]).from_pretrained(folder + "/base")
    model = peft.PeftModel.from_pretrained(base, folder + "/adapter").eval()
    inputs = torch.load(folder + "/inputs.pt")
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, torch.load(folder + "/logits.pt"), atol=1e-5, rtol=1e-5)
assert "trimtab" not in sys.modules
"""


def test_a_process_without_trimtab_reads_what_was_written(tmp_path):
    folders = []
    for name in (
        "where: convolutions",
        "where: experts, named",
        "an embedding, ranks",
        "adaptive: new tokens tied",
        "where: all biases",
        "adaptive: saved head and norm",
        "pissa",
    ):
        for form in ("save", "peft", "padded"):
            case, folder = CASES[name], tmp_path / str(len(folders))
            case.build().save_pretrained(folder / "base")
            model = adapter(case)
            written(model, form, folder / "adapter")
            torch.save(dict(input_ids=IDS), folder / "inputs.pt")
            torch.save(function(model), folder / "logits.pt")
            folders.append(str(folder))
    done = fresh.python("-c", STOCK, *folders)
    assert done.returncode == 0, done.stderr[-2000:]


# -- where -------------------------------------------------------------------------------------------------

NAMED = {
    "endings": (llama, dict(target_modules=QV)),
    "a regex": (llama, dict(target_modules=r".*\.(q|v)_proj")),
    "a regex with flags": (llama, dict(target_modules=r"(?i).*\.Q_proj")),
    "all linears": (llama, dict(target_modules="all-linear")),
    "PEFT's default": (llama, dict(target_modules=None)),
    "layers and a pattern": (llama, dict(target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers")),
    "beside the user's exclusions": (llama, dict(target_modules=QV, exclude_modules=["v_proj"])),
    "beside the user's regex": (llama, dict(target_modules=QV, exclude_modules=r".*v_proj")),
    "embeddings and heads": (llama, dict(target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "tied embeddings": (
        lambda: llama(tie_word_embeddings=True),
        dict(target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "a tied head": (
        lambda: llama(tie_word_embeddings=True),
        dict(target_modules=r".*(q_proj|lm_head)", ensure_weight_tying=True),
    ),
    "experts": (mixtral, dict(target_modules=["q_proj", "w1", "w2", "w3"])),
    "experts alone": (mixtral, dict(target_modules=["w1", "w2", "w3"])),
    "experts as parameters": (mixtral, dict(target_modules=[], target_parameters=["experts.gate_up_proj"])),
    "experts by full name": (
        mixtral,
        dict(target_modules=[], target_parameters=[f"model.layers.{i}.mlp.experts.down_proj" for i in range(3)]),
    ),
    "experts of Qwen2-MoE": (qwen2_moe, dict(target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])),
    "a parameter of a linear": (llama, dict(target_modules=[], target_parameters=["q_proj.weight"])),
    "convolutions": (convbert, dict(task_type="SEQ_CLS", target_modules=["query", "pointwise"])),
    "images": (vit, dict(task_type=None, target_modules=["q_proj", "projection"])),
}


def adapted_blocks(model: nn.Module) -> set[str]:
    found = {re.search(r"\.(?:layers?|h)\.(\d+)\.", name) for name, _ in model.named_parameters() if "lora_" in name}
    return {match[1] if match else "outside" for match in found}


@pytest.mark.parametrize("by", ["TrimConfig", "restrict", "restrict a TrimConfig"])
@pytest.mark.parametrize("name", NAMED)
def test_where_holds_for_every_way_of_naming_targets(name, by, tmp_path):
    build, settings = NAMED[name]
    case = Case(build)
    base = case.build()
    chosen = last(base, count=1)
    settings = dict(task_type="CAUSAL_LM", r=2) | copy.deepcopy(settings)
    config: Any
    if by == "TrimConfig":
        config = TrimConfig(**settings, where=chosen)
    else:
        config = trimtab.restrict((peft.LoraConfig if by == "restrict" else TrimConfig)(**settings), chosen, base)
    model = peft.get_peft_model(base, config)
    assert adapted_blocks(model) == {str(len(next(iter(chosen.stacks.values()))) - 1)}
    scramble(model, 1)
    model.save_pretrained(tmp_path)
    again = reload(case, "save", tmp_path)
    assert adapted_blocks(again) == adapted_blocks(model)
    close(again, function(model))
    ours = peft.get_peft_model(case.build(), TrimConfig.from_pretrained(tmp_path))
    assert adapted_blocks(ours) == adapted_blocks(model), "a config that was read back adapts the same layers"


@pytest.mark.parametrize(
    "make",
    [
        lambda base, chosen, **k: TrimConfig(where=chosen, **k),
        lambda base, chosen, **k: trimtab.restrict(peft.LoraConfig(**k), chosen, base),
    ],
    ids=["TrimConfig", "restrict"],
)
def test_where_and_replicated_layers_do_not_go_together(make):
    base = llama()
    with pytest.raises(ConfigError, match="layer_replication"):
        make(base, last(base, count=1), target_modules=QV, layer_replication=[(0, 2), (1, 3)])


def test_copies_and_second_adapters_on_experts_keep_to_their_layers(tmp_path):
    case = CASES["where: experts, named"]
    model = adapter(case)
    base = base_of(model)
    model.add_adapter(
        "second",
        TrimConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "w1", "w2", "w3"], where=last(base, count=1)),
    )
    model.set_adapter("second")
    scramble(model, 2)
    twin = copy.deepcopy(model).eval()
    for one in (model, twin):
        one.save_pretrained(tmp_path)
        for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
            one.set_adapter(name)
            again = peft.PeftModel.from_pretrained(case.build(), folder)
            assert adapted_blocks(again) == {"2"}
            close(again, function(one))


# -- raw parameters, as scripts take them ------------------------------------------------------------------


def trained(method: str) -> peft.PeftModel:
    model = runs.model_for("llama", method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = trimtab.Controller(model, optimizer, total_steps=runs.STEPS)
    runs.steps(model, controller, optimizer, 20)
    return model.eval()


@pytest.mark.parametrize("method", ["sora", "aflora", "salientlora+aflora", "adalora"])
def test_named_parameters_are_the_function_when_they_are_loaded(method):
    model = trained(method)
    expected = tiny.logits(model, "llama")
    kept = {name: p.detach().clone() for name, p in model.named_parameters()}
    best = {name: kept[name] for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(0.5)
    model.load_state_dict(best, strict=False)
    assert torch.equal(tiny.logits(model, "llama"), expected)
    other = runs.model_for("llama", method)
    other.load_state_dict(kept, strict=False)
    assert torch.equal(tiny.logits(other, "llama"), expected)


@pytest.mark.parametrize("form", ["state_dict", "peft"])
@pytest.mark.parametrize("method", ["adalora", "salientlora"])
def test_weights_kept_in_mid_run_are_given_back_before_the_end_or_refused(method, form):
    model = runs.model_for("llama", method)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = trimtab.Controller(model, optimizer, total_steps=runs.STEPS)
    runs.steps(model, controller, optimizer, 2)
    best = copy.deepcopy(model.state_dict() if form == "state_dict" else peft.get_peft_model_state_dict(model))
    expected = tiny.logits(model.eval(), "llama")
    runs.steps(model.train(), controller, optimizer, runs.STEPS - 2)

    def give_back(to: nn.Module) -> None:
        to.load_state_dict(best) if form == "state_dict" else peft.set_peft_model_state_dict(to, best)

    early = copy.deepcopy((model, controller))
    give_back(early[0])
    early[1].finish()
    assert torch.allclose(tiny.logits(early[0].eval(), "llama"), expected, atol=1e-6)
    controller.finish()
    with pytest.raises(ModelError, match=r"which the run left at rank \d; give back what was kept .* before"):
        give_back(model)


def test_hidden_ranks_of_a_site_that_is_gone_are_no_loss():
    model = runs.model_for("llama", "adalora")
    name, layer = next(iter(hosted_layers(model).items()))
    layer.factors("default")[1].data.zero_()
    kept = copy.deepcopy(model.state_dict())
    _make_room(layer, "default", 0)
    trimtab.Controller(model, None, runs.STEPS)
    layer.finish("default")
    model.load_state_dict(kept)
    assert not any(name in key and ".lora_A" in key for key in model.state_dict())


def test_an_average_may_be_swapped_in_and_out_in_mid_run():
    model = trained("sora")
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict({name: p * 0.9 for name, p in kept.items()}, strict=False)
    model.load_state_dict(kept, strict=False)
    assert not any(layer.hosted["default"].is_stale for layer in hosted_layers(model).values())


def test_what_still_trains_is_no_whole_adapter_for_another_model():
    model = trained("aflora")
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with pytest.raises(ModelError, match="stopped training"):
        runs.model_for("llama", "aflora").load_state_dict(kept, strict=False)


def test_raw_parameters_are_not_saved_as_a_plain_lora(tmp_path):
    model = trained("sora")
    raw = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
    with pytest.raises(ModelError, match="raw parameters"):
        model.save_pretrained(str(tmp_path), state_dict=raw)
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict())


@pytest.mark.parametrize("method", ["salientlora", "aflora"])
def test_hooks_and_modules_on_the_factors_are_called(method):
    model = runs.model_for("llama", method)
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    expected = tiny.logits(runs.model_for("llama", method), "llama")
    assert torch.allclose(tiny.logits(model, "llama"), expected, atol=1e-5)
    assert len(seen) == len(hosted_layers(model))


def t5gemma() -> nn.Module:
    """Its head is tied to the decoder's embedding; the encoder, whose embedding is the input's, has one of its own."""
    part = tf.T5GemmaModuleConfig(**SIZES | {"num_hidden_layers": 1}, head_dim=8)
    tokens = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return tf.T5GemmaForConditionalGeneration(tf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=64, **tokens))


def test_a_merged_model_keeps_a_head_that_is_tied_to_another_embedding_than_the_inputs(tmp_path):
    torch.manual_seed(0)
    model = peft.get_peft_model(t5gemma(), TrimConfig(r=2, target_modules=["q_proj"])).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
        wanted = model(input_ids=IDS, decoder_input_ids=IDS).logits
    trimtab.export(model, tmp_path, "merged")
    merged = tf.T5GemmaForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert merged.config.tie_word_embeddings
    got = merged(input_ids=IDS, decoder_input_ids=IDS).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_all_linear_over_fused_experts_is_refused_for_a_rank_method_with_what_to_name():
    with pytest.raises(ModelError, match=r"'model\.layers\.0\.mlp\.\S+' is a parameter, .* name the linears"):
        peft.get_peft_model(mixtral(), TrimConfig(r=2, target_modules="all-linear", rank=AdaLoRA(target_r=1)))
