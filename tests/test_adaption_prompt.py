"""LLaMA-Adapter through PEFT: what differs from the paper, what it costs, and that a run carries it through."""

import json
import shutil

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

import tiny
import trimtab
from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from test_run import read
from test_run import trimtab as command
from trimtab.adapters.prompts import check
from trimtab.app.models import meta_model
from trimtab.errors import ConfigError, ExportError

FAMILIES = ("llama", "mistral", "gpt2")


def adapted(family, adapter_len=3, adapter_layers=2):
    config = peft.AdaptionPromptConfig(adapter_len=adapter_len, adapter_layers=adapter_layers, task_type="CAUSAL_LM")
    torch.manual_seed(1)
    return peft.get_peft_model(tiny.build(family), config)


def prompts(model):
    """(prompt, gate) of each adapted layer."""
    return [(m.adaption_prompt, m.adaption_gate) for m in model.modules() if hasattr(m, "adaption_gate")]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_base_and_the_gate_learns_first(family):
    model = adapted(family)
    assert torch.equal(tiny.logits(model, family), tiny.logits(tiny.build(family), family))
    model(**tiny.batch(family)).loss.backward()
    for prompt, gate in prompts(model):
        assert not prompt.grad.any() and gate.grad.any()


def test_one_key_makes_a_constant_through_a_bare_gate():
    """K = 1: softmax over one key is 1, so every position gets the gate's multiple of one vector; there is no tanh."""
    model = adapted("llama", adapter_len=1, adapter_layers=1)
    attention = next(m for m in model.modules() if hasattr(m, "adaption_gate"))
    seen = {}
    handle = attention.register_forward_hook(lambda m, a, kw, out: seen.update(kw=kw, out=out[0]), with_kwargs=True)
    with torch.no_grad():
        attention.adaption_gate.fill_(0.5)
        tiny.logits(model, "llama")
        handle.remove()
        added = seen["out"] - attention.model(**seen["kw"])[0]
        value = attention.model.v_proj(attention.adaption_prompt)  # (1, 1, groups · head)
        repeated = value.view(1, 1, 2, 8).repeat_interleave(2, dim=2).reshape(1, 1, 32)
        assert torch.allclose(added, 0.5 * attention.model.o_proj(repeated).expand_as(added), atol=1e-6)


def test_the_plan_counts_prompts_and_one_gate_a_layer():
    for family in FAMILIES:
        model = adapted(family)
        trained = sum(p.numel() for pair in prompts(model) for p in pair)
        assert trained == 2 * (3 * 32 + 1) == trimtab.Controller(model, total_steps=1).trainable_params()
        plan = trimtab.plan(tiny.build(family), model.peft_config["default"])
        assert plan.params["initial"] == trained
        assert [site.site.block for site in plan.sites] == [2, 3]
    llama = meta_model(AutoConfig.for_model("llama", hidden_size=4096, num_hidden_layers=32), "AutoModelForCausalLM")
    large = trimtab.plan(llama, peft.AdaptionPromptConfig(adapter_len=10, adapter_layers=30, task_type="CAUSAL_LM"))
    assert large.params["initial"] == 1_228_800 + 30  # the paper's 1 229 760 have a gate for each of 32 heads


@pytest.mark.parametrize("form", ["peft", "padded", "merged"])
def test_no_form_of_export_pretends(form, tmp_path):
    with pytest.raises(ExportError, match=f"export.format='{form}'.*softmax of its own query"):
        trimtab.export(adapted("llama"), tmp_path, format=form)


def recipe_for(folder, kind="llama"):
    byte_model(kind, max_position_embeddings=256).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": "say it", "output": f"the cat {i % 3}"} for i in range(16)]
    recipe = {
        "model": str(folder / "model"),
        "task": {"name": "instruct", "max_length": 200},
        "data": {name: write_jsonl(folder / f"{name}.jsonl", rows) for name in ("train", "validation")},
        "adapter": {"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1},
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 5e-2, "use_cpu": True},
        "output_dir": str(folder / "run"),
    }
    (folder / "r.yaml").write_text(json.dumps(recipe))
    return folder / "r.yaml"


def test_a_run_trains_saves_resumes_and_is_read_by_stock_peft(tmp_path):
    said = command("run", recipe_for(tmp_path)).output
    run = tmp_path / "run"
    assert "no LoRA or merged form" in said
    metrics = read(run, "metrics.json")
    assert metrics["params"] == {"initial": 49, "final": 49, "average": 49, "held": 49}
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in tensors} == {"adaption_prompt", "adaption_gate"}
    assert read(run / "adapter", "adapter_config.json")["peft_type"] == "ADAPTION_PROMPT"
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-8")
    (run / "metrics.json").unlink()
    command("run", run, "--resume")
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert read(run, "metrics.json")["metrics"] == metrics["metrics"]


@pytest.mark.parametrize("override, message", [
    ("where=last", "where.method='last': adaption_prompt always takes the last layers"),
    ("rank={method: adalora, target_r: 1}", "rank.method='adalora': works on adapter.type=lora"),
    ("freeze=aflora", "freeze.method='aflora': works on adapter.type=lora"),
    ("budget={final_params: 100}", "the size of adaption_prompt is set by adapter.adapter_len"),
    ("export=merged", "export.format='merged': adaption_prompt has no LoRA or merged form"),
    ("adapter.r=8", "its size is adapter_len"),
    ("adapter.adapter_layers=3", "adapter.adapter_layers=3: at most 2, the layers of this model"),
    ("adapter.adapter_layers=0", "at least 1"),
    ("adapter.adapter_len=null", "adapter.adapter_len=None: the number of prompt tokens, at least 1"),
    ("adapter.modules_to_save=[lm_head]", "PEFT saves the prompts alone"),
    ("model.config={model_type: gemma}", "PEFT has it for llama, mistral, gpt2; this model is a gemma"),
    ("model.dtype=bfloat16", "model.dtype='bfloat16': adaption_prompt trains in the model's dtype"),
    ("model.config.head_dim=16", "PEFT's needs heads that fill the hidden width"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_refused_in_one_line(override, message, tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
    }
    recipe = {
        "model": {"config": config},
        "adapter": {"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    said = command("plan", tmp_path / "r.yaml", override, code=2).stderr
    assert message in said and said.count("\n") == 1


def test_a_model_in_half_precision_is_refused():
    """PEFT would train the prompts in it, and lose their steps without a word."""
    config = peft.AdaptionPromptConfig(adapter_len=3, adapter_layers=1)
    with pytest.raises(ConfigError, match=r"model\.dtype='bfloat16'"):
        check(tiny.build("llama").bfloat16(), config, "CAUSAL_LM")
    check(tiny.build("llama"), config, "CAUSAL_LM")


def test_a_task_with_a_new_head_is_refused(tmp_path):
    config = {
        "model_type": "llama",
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "pad_token_id": 0,
    }
    recipe = {
        "model": {"config": config},
        "task": "glue/cola",
        "adapter": {"type": "adaption_prompt", "adapter_len": 3, "adapter_layers": 1},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    assert "PEFT saves no head beside it, as SEQ_CLS needs" in command("plan", tmp_path / "r.yaml", code=2).stderr
