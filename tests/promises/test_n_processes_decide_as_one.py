"""N processes decide as one: two do, on the same global batch (torchrun, gloo, stock Trainer, DDP)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fresh
import two_process
from marks import slow
from two_process import decisions, numbers

pytestmark = pytest.mark.two_process


@pytest.fixture(scope="module")
def launched(request, tmp_path_factory):
    """One launch for all cases: folder, and what each process saw. By torchrun itself where all cases run."""
    out = tmp_path_factory.mktemp("ddp")
    here = Path(two_process.__file__).parent
    is_short = "not slow" in request.config.getoption("markexpr")
    cases = two_process.FEW if is_short else two_process.CASES
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
    }
    what = str(here / "two_process.py"), str(out), *cases
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *what]
    done = (
        fresh.processes(2, *what, environment=environment)
        if is_short
        else subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return out, [torch.load(out / f"process-{i}.pt", weights_only=False) for i in (0, 1)]


def each_case(dtype):
    names = [name for name, case in two_process.CASES.items() if case[3] == dtype]
    return pytest.mark.parametrize("case", [name if name in two_process.FEW else slow(name) for name in names])


@each_case(torch.float64)
def test_two_processes_equal_one(launched, tmp_path, case):
    _, (first, second) = launched
    one = two_process.run(case, tmp_path, processes=1)
    assert first[case]["wrapped"] == "DistributedDataParallel"
    kinds = [event["event"] for event in one["events"]]
    _, method, *_ = two_process.CASES[case]
    assert ("rank" in kinds) == two_process.cuts_ranks(method)
    assert ("freeze" in kinds) == ("freeze" in two_process.METHODS[method])
    for two in (first[case], second[case]):
        assert two["traces"] == []
        assert decisions(two["events"]) == decisions(one["events"])
        assert [e["event"] for e in two["events"]] == kinds
        assert torch.allclose(numbers(two["events"]), numbers(one["events"]), rtol=1e-9, atol=1e-9)
        losses = [[e["loss"] for e in run["events"] if e["event"] == "log"] for run in (one, two)]
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert two["weights"].keys() == one["weights"].keys()
        for name, weight in one["weights"].items():
            assert torch.allclose(two["weights"][name], weight, rtol=0, atol=1e-9), name


@each_case(torch.float32)
def test_two_processes_decide_as_one_in_float32(launched, tmp_path, case):
    one = two_process.run(case, tmp_path, processes=1)
    for two in launched[1]:
        assert decisions(two[case]["events"]) == decisions(one["events"])


def test_both_processes_hold_the_same_weights_to_the_bit(launched):
    first, second = launched[1]
    for case in (name for name in two_process.CASES if name in first):
        weights = second[case]["weights"]
        assert all(torch.equal(w, weights[n]) for n, w in first[case]["weights"].items()), case


def test_two_processes_resume_exactly(launched):
    out, both = launched
    for process in both:
        expected = process["unbroken"]["weights"]
        assert process["resumed"]["weights"].keys() == expected.keys()
        assert all(torch.equal(w, expected[n]) for n, w in process["resumed"]["weights"].items())
    assert (out / "runs" / "resumed" / "history.jsonl").read_text() == (out / "unbroken.jsonl").read_text()


@pytest.mark.parametrize("kind", ["prune", "mask", "freeze"])
def test_a_differing_decision_stops_both_processes_with_both_plans(launched, kind):
    said = [process[f"disagree: {kind}"] for process in launched[1]]
    assert said[0] == said[1]
    word = "freeze" if kind == "freeze" else "rank"
    # A mask that gets no row in the history is compared along with the next step's gradients.
    step = {"prune": 3, "mask": 3, "freeze": 4}[kind]
    assert f"{word} decisions differ at step {step}" in said[0]
    if kind == "freeze":
        assert "process 0: " in said[0] and "freezes" in said[0] and "nothing" in said[0].split("process 1: ")[1]
    else:
        assert "query keeps 0111" in said[0] and "query keeps 1011" in said[0].split("process 1: ")[1]


def test_a_finished_adapter_that_trains_on_is_averaged_by_ddp(launched):
    first, second = (process["trained on"] for process in launched[1])
    assert all(torch.equal(w, second[n]) for n, w in first.items())


def test_what_no_process_used_gets_no_gradient(launched):
    assert [process["unused"] for process in launched[1]] == [[True, False], [True, False]]


def test_the_same_trainer_trains_on_with_what_is_finished(launched):
    first, second = (process["same trainer"] for process in launched[1])
    assert all(torch.equal(w, second["weights"][n]) for n, w in first["weights"].items())


def test_a_finished_run_is_resumed_by_two_processes(launched):
    first, second = (process["finished"]["runs"] for process in launched[1])
    made, again, longer = first
    assert 0 < len(made["weights"]) < 2 * 4  # some of the four modules have no rank left
    assert again["history"] == made["history"] != longer["history"]
    for one, other in ((made, again), *zip(first, second)):
        assert one["weights"].keys() == other["weights"].keys()
        assert all(torch.equal(weight, other["weights"][n]) for n, weight in one["weights"].items())


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("unscales_first", [True, False])
def test_an_overflow_on_one_process_is_one_on_all(launched, unscales_first, fused):
    first, second = (process[f"overflow: {(unscales_first, fused)}"] for process in launched[1])
    assert first["skipped"] == second["skipped"] == [1, 6]
    assert first["scale"] == second["scale"] == 16.0  # halved twice
    for name, weight in first["weights"].items():
        assert torch.isfinite(weight).all() and torch.equal(weight, second["weights"][name])


def test_rows_that_are_grouped_by_length_are_taken_once_an_epoch(launched):
    first, second = (process["grouped"]["seen"] for process in launched[1])
    assert [sorted([*mine, *others]) for mine, others in zip(first, second)] == [[*range(3, 27)]] * 3


@pytest.mark.parametrize("step", [4, 6])  # between two epochs, and within one
def test_rows_that_are_grouped_by_length_are_resumed_exactly(launched, step):
    for ends in (process["grouped"]["ends"] for process in launched[1]):
        assert all(torch.equal(weight, ends[step][n]) for n, weight in ends[0].items())


def test_processes_that_hold_other_adapters_are_refused(launched):
    said = [process["other sites"] for process in launched[1]]
    assert said[0] == said[1] and "process 1 holds other adapters than process 0" in said[0] and "pipeline" in said[0]


@pytest.mark.parametrize(
    ("kind", "has_head", "method"), [one if one in two_process.FEW_BARE else slow(*one) for one in two_process.BARE]
)
def test_a_bare_loop_in_two_processes_equals_one(launched, kind, has_head, method):
    one = two_process.bare_loop("one", has_head, method)
    if two_process.cuts_ranks(method):
        assert sum(one["ranks"].values()) < 4 * len(one["ranks"])
    for two in (process[f"{kind}, {has_head}, {method}"] for process in launched[1]):
        assert two["ranks"] == one["ranks"] and two["frozen"] == one["frozen"] and two["traces"] == []
        assert two["weights"].keys() == one["weights"].keys()
        assert all(torch.allclose(two["weights"][n], w, rtol=0, atol=1e-9) for n, w in one["weights"].items())


def test_ranks_and_factors_from_other_batches_are_those_of_process_0_everywhere(launched):
    first, second = (process["started"] for process in launched[1])
    mine, others = two_process._started_from(0), two_process._started_from(1)
    assert not any(torch.equal(others[n], t) for n, t in mine.items())
    for found in (first, second):
        assert found.keys() == mine.keys() and all(torch.equal(found[n], t) for n, t in mine.items())


def test_a_model_that_ddp_already_holds_is_refused_with_what_to_do(launched):
    for process in launched[1]:
        assert "make the Controller before DistributedDataParallel or" in process["wrapped too early"]
        assert "of the very module that is wrapped" in process["wrapped around"]
