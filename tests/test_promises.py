"""The promises on the architecture page, each method on each kind of model, through the stock Trainer."""

from __future__ import annotations

import json
import shutil
import warnings

import peft
import pytest
import torch
from safetensors import safe_open

import short_runs as runs
import tiny
import trimtab

FAMILIES = ("llama", "bert", "deberta", "t5", "gpt2")


def load_with_stock_peft(family: str, folder: str) -> peft.PeftModel:
    with warnings.catch_warnings():  # PEFT warns of missing keys; a warning is a failure here
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        return peft.PeftModel.from_pretrained(tiny.build(family), folder)


@pytest.fixture(scope="module")
def finished(request, tmp_path_factory):
    """(family, method) -> run folder, callback, model and logits at every save; made once a module."""
    made: dict = {}

    def get(family: str, method: str):
        if (family, method) not in made:
            folder = tmp_path_factory.mktemp(f"{family}-{method}".replace("+", "-"))
            model = runs.model_for(family, method)
            callback, logits = runs.train(model, family, folder)
            made[family, method] = folder, callback, model, logits
        return made[family, method]

    return get


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", runs.METHODS)
def test_every_checkpoint_is_a_plain_lora_of_the_same_function(finished, family, method):
    folder, _, _, logits = finished(family, method)
    assert len(logits) == 8
    for step, expected in logits.items():
        checkpoint = f"{folder}/checkpoint-{step}"
        loaded = load_with_stock_peft(family, checkpoint)
        with safe_open(f"{checkpoint}/adapter_model.safetensors", "pt") as file:
            assert set(file.keys()) == set(peft.get_peft_model_state_dict(loaded)), step
        assert torch.allclose(tiny.logits(loaded, family), expected, atol=1e-5), step


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["salientlora", "adalora", "sora"])
def test_the_run_has_two_pruning_events_that_free_memory(finished, family, method):
    _, callback, _, _ = finished(family, method)
    prunes = [e for e in callback.events if e["event"] == "rank" and e["kind"] == "prune"]
    if method != "adalora":  # prunes once, when its pattern is final
        assert len(prunes) >= 2
    freed = [e["freed"] for e in prunes if sum(e["freed"].values())]
    assert freed and all(f["moments"] == 2 * f["parameters"] for f in freed)  # both Adam moments


@pytest.mark.parametrize("method", ["salientlora", "adalora"])
def test_the_rank_budget_is_met_exactly(finished, method):
    _, callback, _, _ = finished("llama", method)
    assert sum(callback.controller.ranks().values()) == 2 * len(callback.controller.ranks())


@pytest.mark.parametrize(("family", "method"), [("bert", m) for m in runs.METHODS] + [("t5", "salientlora")])
@pytest.mark.parametrize("step", [5, 20, 35])
def test_resume_is_exact(finished, tmp_path, family, method, step):
    folder, _, unbroken, _ = finished(family, method)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for later in range(step + 5, runs.STEPS + 1, 5):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "log", "st')  # the killed run was in the middle of a line
    model = runs.model_for(family, method)
    runs.train(model, family, tmp_path, resume=trimtab.last_checkpoint(tmp_path))
    assert model.state_dict().keys() == unbroken.state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), unbroken.state_dict().values()))
    assert (tmp_path / "history.jsonl").read_text() == (folder / "history.jsonl").read_text()


def test_history_holds_no_clock_times_and_one_json_object_a_line(finished):
    folder, *_ = finished("bert", "salientlora")
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert {"params", "log", "rank", "values"} <= {row["event"] for row in rows}
    assert not any("runtime" in key or "second" in key for row in rows for key in row)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_modules_at_rank_zero_vanish_from_the_export(tmp_path):
    from fakes import Halving

    model = runs.model_for("llama", "salientlora", rank=Halving(steps=(6, 12, 18, 24)))
    callback, _ = runs.train(model, "llama", tmp_path)
    alive = {name for name, r in callback.controller.ranks().items() if r}
    assert 0 < len(alive) < len(callback.controller.ranks())
    trimtab.export(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert set(config["target_modules"]) == alive
    assert config["alpha_pattern"] == config["rank_pattern"] and config["lora_alpha"] == config["r"]


@pytest.mark.parametrize("format", ["peft", "padded", "merged"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_exports_compute_what_the_trained_model_computes(finished, tmp_path, family, format):
    _, _, model, _ = finished(family, "salientlora")
    trimtab.export(model, tmp_path, format=format)
    if format == "merged":
        loaded = type(tiny.build(family)).from_pretrained(tmp_path)
    else:
        loaded = load_with_stock_peft(family, str(tmp_path))
    assert torch.allclose(tiny.logits(loaded, family), tiny.logits(model, family), atol=1e-5)
