"""The memory of a step, forecast from shapes, beside what the allocator counts in a real one."""

import contextlib
import json
import os
import sys

import peft
import pytest
import torch
import transformers as tf
from click.testing import CliRunner
from torch.profiler import ProfilerActivity, profile

import fresh
import spread_step
from marks import slow
from tasks.stand_ins import write_jsonl
from test_run import tiny_model
from trimtab.app import memory
from trimtab.app.answer_head import AnswerHead
from trimtab.app.cli import cli

SIZES = dict(vocab_size=512, hidden_size=96, num_hidden_layers=6, num_attention_heads=4, intermediate_size=256)
KINDS = {
    "bert, with dropout": (tf.BertForSequenceClassification, tf.BertConfig(**SIZES), "SEQ_CLS", ["query", "value"]),
    "llama": (
        tf.LlamaForCausalLM,
        tf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
        "CAUSAL_LM",
        "all-linear",
    ),
}


def lora(task_type, targets):
    return peft.LoraConfig(task_type=task_type, r=8, target_modules=targets)


def allocated(kind, batch, tokens, is_checkpointing):
    """Bytes of tensors at the height of a real step, by the allocator's own count, moments and all."""
    cls, config, task_type, targets = KINDS[kind]
    model = peft.get_peft_model(cls(config), lora(task_type, targets)).train()
    if is_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(5, 100, (batch, tokens))
    labels = ids if task_type == "CAUSAL_LM" else torch.zeros(batch, dtype=torch.long)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        head = AnswerHead(model)  # as the command trains
        with head.on() if head.serves(model, {"input_ids": ids, "labels": labels}) else contextlib.nullcontext():
            model(input_ids=ids, labels=labels).loss.backward()
    held = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    return held + spread_step.height(found) + 8 * sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("is_checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("batch, tokens", [(4, 64), slow(16, 128)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_is_what_the_allocator_counts(kind, batch, tokens, is_checkpointing):
    cls, config, task_type, targets = KINDS[kind]
    with torch.device("meta"):
        model = cls(config)
    found = memory.forecast(
        model, lora(task_type, targets), batch=batch, tokens=tokens, is_checkpointing=is_checkpointing
    ).to_json()
    assert found["peak"] == pytest.approx(allocated(kind, batch, tokens, is_checkpointing), rel=0.1)
    assert found["peak_with_checkpointing"] < found["peak_without_checkpointing"]


def test_quantised_weights_take_half_a_byte_and_a_scale_for_each_block():
    cls, config, task_type, targets = KINDS["llama"]
    weights = {}
    for bits in (None, {"load_in_4bit": True}):
        with torch.device("meta"):
            model = cls(config)
        inner = sum(m.weight.numel() for m in model.model.modules() if isinstance(m, torch.nn.Linear))
        weights[bool(bits)] = memory.forecast(
            model, lora(task_type, targets), batch=1, tokens=8, quantization=bits
        ).weights
    assert weights[False] - weights[True] == pytest.approx(inner * (4 - 0.5625), abs=1)


@pytest.fixture
def recipe(tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", [{"text": f"the cat {i}", "label": i % 2} for i in range(40)])
    (tmp_path / "r.yaml").write_text(
        f"model: {tiny_model(tmp_path / 'model')}\ntask: {{name: text_classification, max_length: 16}}\n"
        "data: {train: rows.jsonl}\nadapter: {target_modules: [query, value]}\n"
        "train: {per_device_train_batch_size: 4, num_train_epochs: 2, use_cpu: true}\n"
    )
    return str(tmp_path / "r.yaml")


def settings(*args):
    result = CliRunner().invoke(cli, ["plan", *args, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)["settings"]


def test_plan_forecasts_without_weights(recipe, monkeypatch):
    monkeypatch.setattr("trimtab.app.models.load_model", None)
    found = settings(recipe, "--memory")["memory"]
    assert (found["batch"], found["tokens"]) == (4, 16)
    parts = sum(found[key] for key in ("weights", "adapter", "gradients", "optimizer", "activations"))
    assert found["peak"] == parts > 0
    shown = CliRunner().invoke(cli, ["plan", recipe, "--memory", "train.gradient_checkpointing=true"]).stdout
    assert "memory of a step" in shown and "without checkpointing" in shown


def test_plan_measures_a_few_steps_and_leaves_nothing_behind(recipe, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir())
    found = settings(recipe, "--measure")
    took = found["measured"]
    assert took["steps"] == 3
    assert took["training_seconds"] == pytest.approx(took["step_seconds"] * found["total_steps"])
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("processes, strategy", [slow(2, "ddp"), (2, "fsdp2"), slow(4, "fsdp2")])
def test_several_processes_hold_and_send_what_is_forecast(processes, strategy, tmp_path):
    """A real step of each, over gloo, base weights as DTensors; sent: all that goes through collectives."""
    out = tmp_path / "told.json"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = fresh.processes(processes, spread_step.__file__, out, strategy, 2, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(out.read_text())
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(spread_step.CONFIG)
    batch, tokens = spread_step.BATCH, spread_step.TOKENS
    one = memory.forecast(model, peft.LoraConfig(**spread_step.LORA), batch=batch, tokens=tokens)
    found = memory.over_processes(one, processes, strategy, micro_batches=2)
    assert found["peak"] == pytest.approx(told["peak"], rel=0.15)
    assert (found["peak"] < one.to_json()["peak"]) == (strategy == "fsdp2")
    assert found["sent"] == pytest.approx(told["sent"], rel=2e-3)
    assert found["sent_weights"] == pytest.approx(told["sent_weights"], rel=2e-3)


def test_plan_says_what_each_process_holds(recipe):
    said = CliRunner().invoke(cli, ["plan", str(recipe), "--processes", "4", "--strategy", "fsdp2", "--json"])
    found = json.loads(said.output)["settings"]["processes"]
    assert found["weights"] < found["peak"] and found["sent"] > found["sent_weights"] > 0
    said = CliRunner().invoke(cli, ["plan", str(recipe), "--processes", "4", "--strategy", "fsdp2"])
    assert "each of 4 by fsdp2" in said.output and "sent a step" in said.output
