"""Ranks that a run chooses before training: told everywhere, resumed to the bit, under `where` and `budget`."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from marks import slow
from test_run import trimtab, write_recipe
from trimtab.app import run as runs
from trimtab.plans import Plan

TRAIN = {
    "num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True,
    "save_strategy": "steps", "save_steps": 4, "save_total_limit": 8,
}  # fmt: skip
ADAPTER = {"r": 4, "target_modules": ["query", "value", "output.dense"]}
EVA = {"method": "eva", "samples": 40, "batch_size": 8}


def at(folder, **sections):
    return write_recipe(folder, **{"train": TRAIN, "adapter": ADAPTER, "where": None} | sections)


@pytest.mark.parametrize("rank", [EVA, slow({"method": "gora", "samples": 40, "gamma": 1.0})], ids=["eva", "gora"])
def test_plan_report_card_and_adapter_say_the_ranks_and_a_resumed_run_looks_at_nothing(rank, tmp_path, monkeypatch):
    recipe = at(tmp_path, rank=rank)
    assert f"which ranks is for {rank['method']} to say" in " ".join(trimtab("plan", recipe).stdout.split())
    shown = trimtab("run", recipe).stderr
    run = tmp_path / "run"
    plan = Plan.from_json(json.loads((run / "plan.json").read_text()))
    told = plan.settings["start"]["told"]
    assert told.startswith(f"{rank['method']}: ranks ") and told in " ".join(shown.split()) and told == plan.notes[0]
    ranks = {p.site.name: p.r for p in plan.sites}
    assert ranks == plan.settings["start"]["ranks"] and len(set(ranks.values())) > 1
    assert plan.params["initial"] == sum(p.trainable_params for p in plan.sites) == plan.params["held"]
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    held = {name: len(tensors[f"base_model.model.{name}.lora_A.weight"]) for name, r in ranks.items() if r}
    assert held == {name: r for name, r in ranks.items() if r}
    page = (run / "report.html").read_text()
    assert f"{sum(ranks.values())} ranks, given out before training" in page
    assert f"Total rank {sum(ranks.values())} over" in (run / "adapter" / "README.md").read_text()

    unbroken = {p.name: p.read_bytes() for p in (run / "history.jsonl", run / "plan.json")}
    shutil.rmtree(run / "adapter")
    for later in (8, 12, 16):
        shutil.rmtree(run / "checkpoints" / f"checkpoint-{later}")
    monkeypatch.setattr(runs, "initialize", lambda *_: pytest.fail("the rows were looked at again"))
    with monkeypatch.context() as stopped:  # before it has trained a step
        stopped.setattr(runs, "make_trainer", lambda *_, **__: 1 / 0)
        trimtab("run", run, f"output_dir={run}", "--resume", code=1)
    with monkeypatch.context() as stopped:
        stopped.setattr("peft.get_peft_model", lambda *_: 1 / 0)
        trimtab("run", run, f"output_dir={run}", "--resume", code=1)
    trimtab("run", run, f"output_dir={run}", "--resume")
    assert unbroken == {p.name: p.read_bytes() for p in (run / "history.jsonl", run / "plan.json")}
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(again[key], t) for key, t in tensors.items())


def test_it_is_a_start_of_other_methods_under_a_budget_and_in_chosen_layers(tmp_path):
    rank = {"method": "salientlora", "start": "eva"}
    recipe = at(
        tmp_path, rank=rank, where={"ratio": 0.5, "samples": 40, "batch_size": 16}, budget={"final_params": 1000}
    )
    trimtab("run", recipe)
    plan = Plan.from_json(json.loads((tmp_path / "run" / "plan.json").read_text()))
    assert len(plan.sites) == 2 * 4 and sum(p.r for p in plan.sites) == 4 * 8
    assert all(p.final_r <= p.r for p in plan.sites) and plan.params["held"] <= 1000


@pytest.mark.parametrize("method", ["eva", "gora"])
def test_under_a_budget_of_its_own_it_is_refused_with_what_works(method, tmp_path):
    recipe = at(tmp_path, rank={"method": method}, budget={"final_params": 1000})
    assert f"take salientlora or adalora with start: {method}" in trimtab("plan", recipe, code=2).stderr
    said = trimtab("plan", recipe, "budget=null", "adapter.init=eva", code=2).stderr
    assert "adapter.init='eva': set rank.method=eva" in said
    assert "Did you mean 'samples'" in trimtab("plan", recipe, "budget=null", "rank.sampels=3", code=2).stderr
