"""FSDP2 in two processes is one process on the same global batch: stock Trainer and bare loops, on sharded bases.

accelerate shards on accelerators only; `sharded_process.fsdp_on_a_cpu` has it shard here. Every case asserts that base
weights are `DTensor`s and that what trains is not.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import fresh
import sharded_process as sharded
import tiny
import trimtab
import two_process
from marks import slow
from trimtab.train.checkpoint import what_is_wrong
from two_process import decisions, numbers

pytestmark = pytest.mark.two_process


def torchrun(out: Path, *jobs: str, options: tuple[str, ...] = (), **more: str) -> None:
    here = Path(__file__).parent
    environment = os.environ | more | {
        "PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    what = str(here / "sharded_process.py"), str(out), *jobs
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *options, *what]
    done = (
        fresh.processes(2, *what, environment=environment)
        if jobs == sharded.FEW
        else subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """One launch for all cases: folder, and what each process saw. By torchrun itself where all cases run."""
    is_short = "not slow" in request.config.getoption("markexpr")
    out = tmp_path_factory.mktemp("fsdp")
    torchrun(out, *(sharded.FEW if is_short else sharded.jobs(out)))
    return out, [torch.load(out / f"process-{i}.pt", weights_only=False) for i in (0, 1)]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """The same cases in one process; each runs once."""
    folder = tmp_path_factory.mktemp("one")
    trainer = functools.cache(lambda case: two_process.run(case, folder / case, processes=1))
    bare = functools.cache(lambda has_head, method: two_process.bare_loop("one", has_head, method))
    return trainer, bare


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(weight, other[name]) for name, weight in one.items())


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 1e-9) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(weight, other[name], rtol=0, atol=atol) for name, weight in one.items()
    )


def few(names: list[str]) -> list:
    """A part of the cases alone runs with `make test`."""
    return [name if name in sharded.FEW else slow(name) for name in names]


SHARDED = {"base": {"DTensor"}, "trains": {"Parameter"}}


# -- equal to one process -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", few([*sharded.TRAINER, *(f"{case}, at load" for case in sharded.AT_LOAD)]))
def test_a_trainer_that_shards_equals_one_process(launched, one_process, case):
    one = one_process[0](case.removesuffix(", at load"))
    kinds = [event["event"] for event in one["events"]]
    _, method, *_ = two_process.CASES[case.removesuffix(", at load")]
    assert ("rank" in kinds) == two_process.cuts_ranks(method)
    assert ("freeze" in kinds) == ("freeze" in two_process.METHODS[method])
    for two in (process[case] for process in launched[1]):
        assert two["kinds"] == SHARDED and two["traces"] == []
        assert decisions(two["events"]) == decisions(one["events"])
        assert [event["event"] for event in two["events"]] == kinds
        if "float32" not in case:
            assert torch.allclose(numbers(two["events"]), numbers(one["events"]), rtol=1e-9, atol=1e-9)
        assert close(two["weights"], one["weights"], 1e-5 if "float32" in case else 1e-9)
    assert same_bits(*(process[case]["weights"] for process in launched[1]))


@pytest.mark.parametrize("name", few([sharded.named(*one) for one in sharded.BARE]))
def test_a_bare_loop_on_a_sharded_base_equals_one_process(launched, one_process, name):
    _, has_head, method = next(one for one in sharded.BARE if sharded.named(*one) == name)
    one = one_process[1](has_head, method)
    if two_process.cuts_ranks(method):
        assert sum(one["ranks"].values()) < 4 * len(one["ranks"])
    if method == "aflora" or "+" in method:
        assert one["frozen"]
    for two in (process[name] for process in launched[1]):
        assert two["kinds"] == SHARDED and two["traces"] == []
        assert two["ranks"] == one["ranks"] and two["frozen"] == one["frozen"]
        assert close(two["weights"], one["weights"])


# -- checkpoints ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(["FULL", "SHARDED"]))
def test_a_sharded_run_resumes_exactly_across_a_cut(launched, kind):
    for process in launched[1]:
        unbroken, again, *by_ddp = process[kind]["runs"]
        assert again["history"] == unbroken["history"]
        assert same_bits(again["weights"], unbroken["weights"])
        for ddp in by_ddp:  # a Trainer that does not shard goes on from the same checkpoint
            assert close(ddp["weights"], unbroken["weights"], 1e-12)
    assert len(launched[1][0]["SHARDED"]["runs"]) == 3


@pytest.mark.parametrize("kind", few(["FULL", "SHARDED"]))
def test_every_checkpoint_of_a_sharded_run_is_a_plain_lora(launched, kind):
    folder = launched[0] / "kept" / kind
    assert len(list(folder.glob("checkpoint-*"))) == 4
    for checkpoint in folder.glob("checkpoint-*"):
        assert what_is_wrong(checkpoint) is None
        assert not [file.name for file in checkpoint.iterdir() if "fsdp" in file.name or (file.suffix == ".bin"
                    and file.name != "training_args.bin")]  # fmt: skip
        model = peft.PeftModel.from_pretrained(tiny.build("bert").double(), checkpoint)
        saved = load_file(checkpoint / "adapter_model.safetensors")
        held = peft.get_peft_model_state_dict(model)
        assert held.keys() == saved.keys() and all(torch.equal(held[key], saved[key]) for key in saved)


def test_a_sharded_run_is_resumed_by_one_process(launched, tmp_path):
    folder = shutil.copytree(launched[0] / "kept" / "SHARDED", tmp_path / "run")
    for step in (15, 20):
        shutil.rmtree(folder / f"checkpoint-{step}")
    saving = dict(save_strategy="steps", save_steps=5, logging_steps=3)
    one = two_process.run(sharded.RESUMED, folder, 1, resume=trimtab.last_checkpoint(folder), **saving)
    assert close(one["weights"], launched[1][0]["SHARDED"]["runs"][0]["weights"])


@pytest.mark.slow
def test_a_run_of_which_a_process_is_killed_comes_back_the_same(launched, tmp_path):
    torchrun(tmp_path, "elastic", options=("--max-restarts", "1"), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    unbroken = launched[1][0]["SHARDED"]["runs"][0]
    for process in (0, 1):
        assert same_bits(torch.load(tmp_path / f"elastic-{process}.pt"), unbroken["weights"])
    assert (tmp_path / "runs" / "elastic" / "history.jsonl").read_text() == unbroken["history"]


def test_a_model_that_is_sharded_at_load_can_be_resumed_though_trainer_saves_no_optimizer_of_it(launched):
    folder = launched[0] / "runs" / f"{sharded.AT_LOAD[0]}, at load" / "checkpoint-10"
    assert what_is_wrong(folder) is None and (folder / "optimizer.pt").exists()


@pytest.mark.slow
def test_the_best_checkpoint_of_a_sharded_run_is_loaded(launched):
    for process in launched[1]:
        folder = Path(process["best"]["best"])
        assert folder.name != "checkpoint-20"
        saved = load_file(folder / "adapter_model.safetensors")
        held = {name.replace(".default", ""): w for name, w in process["best"]["weights"].items() if "lora_" in name}
        assert held and all(torch.equal(weight, saved[name]) for name, weight in held.items())


# -- after the run --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_is_finished_trains_on_averaged(launched):
    first, second = (process["trained on"] for process in launched[1])
    assert first["kinds"] == SHARDED and same_bits(first["weights"], second["weights"])


def test_a_sharded_model_is_merged_weight_by_weight(launched):
    out, (first, _) = launched
    expected = first["merged"]["before"]
    assert torch.equal(first["merged"]["after"], expected)
    alone = AutoModelForSequenceClassification.from_pretrained(out / "merged", dtype=torch.float64)
    assert torch.allclose(tiny.logits(alone, "bert"), expected, rtol=0, atol=1e-12)
    adapter = peft.PeftModel.from_pretrained(tiny.build("bert").double(), out / "peft")
    assert torch.allclose(tiny.logits(adapter, "bert"), expected, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_a_recipe_that_shards_runs_to_its_report_and_its_merged_model(launched):
    run = launched[0] / "recipe" / "run"
    for process in launched[1]:
        assert process["recipe"]["code"] == 0, process["recipe"]["output"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["params"]["final"] < metrics["params"]["initial"]
    assert (run / "report.html").is_file() and (run / "merged" / "model.safetensors").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
def test_under_mixed_precision_adapters_stay_in_float32_and_processes_the_same(launched):
    first, second = (process["bf16"] for process in launched[1])
    assert first["kinds"] == SHARDED and same_bits(first["weights"], second["weights"])
    assert {weight.dtype for weight in first["weights"].values()} == {torch.float32}
    assert all(bool(torch.isfinite(weight).all()) for weight in first["weights"].values())
    assert [e["kind"] for e in first["events"] if e["event"] == "rank"].count("prune") > 0


def test_cka_of_a_sharded_model_gives_one_processs_mask(launched):
    scores = trimtab.layer_similarity(tiny.build("bert").double(), [tiny.batch("bert", seed=seed) for seed in range(4)])
    for process in launched[1]:
        assert process["similarity"]["cka"] == pytest.approx(scores.cka, rel=1e-12)
        assert process["similarity"]["mask"] == trimtab.select_layers(scores, ratio=0.5).mask


# -- what cannot work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("too late", "sharded after the Controller was made; call fully_shard before"),
        ("shards", "ignored_params=trimtab.whole_parameters(model)"),
        ("another mesh", "which PEFT takes for tensor parallelism"),
    ],
)
def test_what_cannot_work_is_refused_with_what_would(launched, what, words):
    assert all(words in process["refusals"][what] for process in launched[1])
