"""The latency bench, by form alone: what is timed against what. Never how long it takes."""

from __future__ import annotations

import json

import pytest
import torch

from marks import slow
from tasks.stand_ins import tiny_config
from test_run import trimtab
from trimtab.app import latency, recipe

LLAMA = {"model": {"config": tiny_config("llama").to_dict()}, "adapter": {"r": 2, "target_modules": ["q_proj"]}}
NAMES = ["base", "merged LoRA", "unmerged LoRA", "bottleneck"]


def models_of(settings):
    """The models that would be timed, by name."""
    chosen = recipe.load(settings)
    base = latency.make_model(chosen, torch.device("cpu"))
    found = {"base": base}
    for name, build in latency._builders(chosen, base).items():
        found[name], _ = build()
    return found


def linears(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.Linear)]


def test_the_table_has_every_adapter_at_every_batch_size(tmp_path):
    (tmp_path / "r.yaml").write_text(json.dumps(LLAMA))
    options = ["--tokens", "4", "--rounds", "3", "--batch", "1", "--batch", "2"]
    found = json.loads(trimtab("bench", "latency", tmp_path / "r.yaml", *options, "--json").stdout)
    assert [(row["batch"], row["name"]) for row in found["timings"]] == [
        (batch, name) for batch in (1, 2) for name in [*NAMES, "LLaMA-Adapter"]
    ]
    for row in found["timings"]:
        assert len(row["seconds"]) == 3
        assert row["ratio_quartiles"][0] <= row["ratio"] <= row["ratio_quartiles"][1]
        assert row["name"] != "base" or row["ratio"] == 1
    assert found["parameters"]["merged LoRA"] == found["parameters"]["unmerged LoRA"] == 2 * 2 * (16 + 16)
    assert found["parameters"]["LLaMA-Adapter"] == 2 * (10 * 16 + 1)

    said = trimtab("bench", "latency", tmp_path / "r.yaml", *options).stdout
    assert "batch 2 × 4 tokens, float32" in said
    assert all(name in said for name in NAMES)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["bert", slow("gpt2"), "t5", slow("bart"), slow("deberta-v2")])
def test_every_family_is_measured_and_what_it_cannot_have_is_said(kind, tmp_path):
    tiny_config(kind).save_pretrained(tmp_path)
    settings = {"model": {"config": str(tmp_path / "config.json")}, "where": {"ratio": 0.5}}
    found = latency.measure(recipe.load(settings), batches=[2], tokens=6, rounds=1)
    has_prompts = kind == "gpt2"
    assert [timing.name for timing in found.timings] == [*NAMES, *["LLaMA-Adapter"] * has_prompts]
    assert ("LLaMA-Adapter" in found.left_out) == (not has_prompts)
    assert found.parameters["merged LoRA"] > 0


def test_merged_lora_is_the_base_s_modules_on_other_weights():
    found = models_of(LLAMA)
    base, merged = found["base"], found["merged LoRA"]
    assert [type(m) for m in base.modules()] == [type(m) for m in merged.modules()]
    ids = torch.arange(6)[None]
    assert not torch.allclose(base(ids).logits, merged(ids).logits)  # an update is in there
    shared = {id(p) for p in base.parameters()}
    own = [name for name, p in merged.named_parameters() if id(p) not in shared]
    assert own == [f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)]


def test_the_other_models_hold_no_second_copy_of_the_base():
    found = models_of(LLAMA)
    held = {p.data_ptr() for p in found["base"].parameters()}
    for name in NAMES[2:]:
        assert held <= {p.data_ptr() for p in found[name].parameters()}
        assert len(linears(found[name])) > len(linears(found["base"]))


def test_measuring_leaves_the_base_s_function_alone():
    chosen = recipe.load(LLAMA)
    base = latency.make_model(chosen, torch.device("cpu"))
    ids = torch.arange(6)[None]
    before = base(ids).logits
    for build in latency._builders(chosen, base).values():
        build()
    assert torch.equal(base(ids).logits, before)


def test_nobody_always_goes_first():
    assert [next(latency._turned(["a", "b", "c"], i)) for i in range(-2, 4)] == ["b", "c", "a", "b", "c", "a"]


@pytest.mark.parametrize(
    "override, options, message",
    [
        ("model.config.max_position_embeddings=8", ["--tokens", "9"], "at most 8"),
        ("model.quantization={load_in_4bit: true}", [], "unquantised"),
        ("adapter.target_modules=[query]", [], "query"),
        ("seed=1", ["--device", "gpu"], "device='gpu': cannot be used here; cpu"),
        ("seed=1", ["--device", "meta"], "device='meta': cannot be used here; cpu"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path, override, options, message):
    (tmp_path / "r.yaml").write_text(json.dumps(LLAMA))
    assert message in trimtab("bench", "latency", tmp_path / "r.yaml", override, *options, code=2).stderr
