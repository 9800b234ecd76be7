"""A loss or a gradient that is not a number: the step is left out on every process, recorded, and ends no good run."""

from __future__ import annotations

import json
import math
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed as dist

import short_runs as runs
import tiny
from marks import slow
from test_run import trimtab, write_recipe
from trimtab import Controller
from trimtab.train.steps import NOT_FINITE_LIMIT

pytestmark = pytest.mark.fault
LOST = 12
"""The step, counted from 1, that is not finite; some method decides at it."""


def bare_run(method: str, lost: str | None, batches: Any = None) -> dict[str, Any]:
    """A bare loop in which something is lost at one step; what was decided, and the weights around that step.

    Args:
        lost: ``"all"`` gradients, those of the ``"head"`` alone, or None.
    """
    model = runs.model_for("bert", method, lora_dropout=0.0).eval()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    events: list[dict] = []
    controller = Controller(model, optimizer, runs.STEPS, on_event=events.append)
    around = []
    for step in range(1, runs.STEPS + 1):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        if step == LOST and lost == "all":
            next(p for n, p in model.named_parameters() if "lora_B" in n and p.grad is not None).grad[0] = math.inf
        if step == LOST and lost == "head":
            next(p for n, p in model.named_parameters() if "modules_to_save" in n).grad[0] = math.nan
        controller.before_step()
        torch.nn.utils.clip_grad_value_(trained, 0.1)  # which makes an infinity finite
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        if step == LOST:
            around = [torch.equal(p, old) for p, old in zip(trained, before)]
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    return {"events": events, "stayed": around, "weights": [p.detach() for p in trained], "ranks": controller.ranks()}


@pytest.mark.parametrize("method", [m if m in runs.FEW else slow(m) for m in runs.METHODS if "svd" not in m])
@pytest.mark.parametrize("lost", ["all", "head"])
def test_a_step_without_finite_gradients_moves_and_scores_nothing(method, lost):
    run, whole = bare_run(method, lost), bare_run(method, None)
    assert all(run["stayed"]) and not all(whole["stayed"])
    assert [e for e in run["events"] if e["event"] == "skipped"] == [{"event": "skipped", "step": LOST}]
    assert all(torch.isfinite(w).all() for w in run["weights"])
    assert sum(run["ranks"].values()) == sum(whole["ranks"].values()) or method == "sora"
    assert not any(e["step"] == LOST for e in run["events"] if e["event"] in ("rank", "freeze"))


def test_a_loss_that_is_nan_but_has_gradients_scores_nothing_either(tmp_path):
    rows = tiny.rows("bert", 320)
    unlabelled = [rows[i] | {"labels": -100} if 80 <= i < 88 else rows[i] for i in range(320)]  # the 11th batch
    model = runs.model_for("bert", "salientlora")
    trim, _ = runs.train(
        model, "bert", tmp_path, train_sampling_strategy="sequential", logging_nan_inf_filter=False, logging_steps=1,
        rows=unlabelled,
    )  # fmt: skip
    losses = {e["step"]: e["loss"] for e in trim.events if e["event"] == "log"}
    assert [step for step, loss in losses.items() if math.isnan(loss)] == [11]
    assert [e["step"] for e in trim.events if e["event"] == "skipped"] == [11]
    assert all(torch.isfinite(p).all() for p in model.parameters())


# -- two processes, one of which has it ---------------------------------------------------------------------


def one_of_two(rank: int, folder: str, method: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found = bare_run(method, "all" if rank == 1 else None)
    torch.save({key: found[key] for key in ("events", "stayed", "weights")}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("method", ["salientlora", "adalora", "aflora"])
def test_one_process_s_nan_is_every_process_s(tmp_path, method):
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["short_runs", "test_run"])
    processes = [server.Process(target=one_of_two, args=(rank, str(tmp_path), method)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert all(first["stayed"]) and all(second["stayed"])
    assert first["events"] == second["events"]
    assert [e["step"] for e in first["events"] if e["event"] == "skipped"] == [LOST]
    adapters = [name for name, p in runs.model_for("bert", method).named_parameters() if p.requires_grad]
    for name, a, b in zip(adapters, first["weights"], second["weights"]):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b) or "modules_to_save" in name  # nobody averages a head here
    assert any(e["event"] in ("rank", "freeze") and e["step"] > LOST for e in first["events"])


# -- a run that does not come back --------------------------------------------------------------------------


def test_a_run_that_stays_lost_ends_with_advice_and_its_last_good_checkpoint(tmp_path):
    rank = {"method": "salientlora", "target_r": 2}
    train = {
        "max_steps": 80, "per_device_train_batch_size": 8, "learning_rate": 1e30, "use_cpu": True, "save_steps": 10,
        "save_strategy": "steps", "save_total_limit": 1, "max_grad_norm": 0,
    }  # fmt: skip
    recipe = write_recipe(tmp_path, where=None, rank=rank, train=train)
    said = trimtab("run", recipe, code=2).stderr.splitlines()[-1]
    assert f"for {NOT_FINITE_LIMIT} steps in a row" in said and "lower the learning rate" in said
    rows = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert sum(row["event"] == "skipped" for row in rows) == NOT_FINITE_LIMIT
    saved = sorted(Path(tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert saved
    assert all(torch.isfinite(t).all() for t in load_file(saved[-1] / "adapter_model.safetensors").values())
