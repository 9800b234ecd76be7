"""What every rank method promises, whatever it decides by."""

import json
import subprocess
import sys

import pytest
import torch
from allocator_host import Host, Rails

from trimtab.errors import CheckpointError, ConfigError, StaleAdapterError
from trimtab.rank import METHODS, available, load, make
from trimtab.rank.base import RankSettings

RANKS = {"a": 6, "b": 6, "c": 4, "d": 6}
STEPS = 48
OPTIONS = {
    "salientlora": {
        "start": "svd",
        "target_r": 2,
        "warmup": 5,
        "allocation": 30,
        "initial_window": 3,
        "final_window": 12,
    },
    "adalora": {"start": "svd", "target_r": 2, "warmup": 5, "final": 15, "interval_steps": 4},
    "sora": {"prox_threshold": 0.2, "interval": 6},
    "sora sticky": {"prox_threshold": 0.2, "interval": 6, "sticky_zeros": True},
}
every_method = pytest.mark.parametrize("case", OPTIONS)


def build(case, steps=STEPS):
    return make(case.split()[0], OPTIONS[case]).build(RANKS, steps, 12)


@every_method
def test_a_host_that_cuts_and_one_that_only_masks_get_the_same_decisions(case):
    hosts = [Host(Rails(RANKS, STEPS), build(case), cuts).run() for cuts in (True, False)]
    for host in hosts:
        host.finish(STEPS)
    assert hosts[0].history == hosts[1].history
    assert hosts[0].nonzero() == hosts[1].nonzero()
    assert {name: site.e.numel() for name, site in hosts[1].factors.items()} == RANKS


@every_method
def test_ranks_that_are_gone_never_return(case):
    for cuts in (True, False):
        host = Host(Rails(RANKS, STEPS), build(case), cuts)
        gone = frozenset()
        for t in range(1, STEPS + 1):
            decision = host.step(t)
            assert not host.nonzero() & gone
            if decision is not None and decision.kind == "prune":
                gone = frozenset((n, i) for n, r in RANKS.items() for i in range(r)) - host.history[-1][3]


@every_method
@pytest.mark.parametrize("cuts", [True, False])
def test_a_state_from_any_step_continues_with_the_same_decisions(case, cuts):
    unbroken = Host(Rails(RANKS, STEPS), build(case), cuts).run()
    unbroken.finish(STEPS)
    for stop in (0, 3, 6, 7, 13, 20, 33, 35, STEPS):
        host = Host(Rails(RANKS, STEPS), build(case), cuts).run(1, stop)
        tensors, meta = host.allocator.state_dict()
        tensors = {key: value.clone() for key, value in tensors.items()}
        meta = json.loads(json.dumps(meta, sort_keys=True))
        assert all(type(value) is torch.Tensor and value.is_contiguous() for value in tensors.values())
        resumed = build(case)
        resumed.load_state_dict(tensors, meta)
        host.allocator = resumed
        host.run(stop + 1)
        host.finish(STEPS)
        assert host.history == unbroken.history, stop
        for name, site in host.factors.items():
            assert torch.equal(site.e, unbroken.factors[name].e)


@every_method
def test_state_of_another_method_or_other_sites_is_refused(case):
    tensors, meta = build(case).state_dict()
    with pytest.raises(CheckpointError, match="cannot continue"):
        build(case).load_state_dict(tensors, {**meta, "method": "other"})
    for changes in ({"sites": ["a", "b", "d", "c"]}, {"initial": [6, 6, 4, 5]}):
        with pytest.raises(CheckpointError, match="other sites or other initial ranks"):
            build(case).load_state_dict(tensors, {**meta, **changes})


@every_method
@pytest.mark.parametrize("cuts", [True, False])
def test_a_run_that_stops_early_is_cut_to_its_target(case, cuts):
    for stop in (0, 1, 3, 6, 7, 20, 34, 40):
        host = Host(Rails(RANKS, STEPS), build(case), cuts).run(1, stop)
        host.finish(stop)
        assert 1 <= sum(int(p.sum()) for p in host.allocator.alive.split(host.allocator.sizes)) <= 22
        if "target_r" in OPTIONS[case]:
            assert len(host.history[-1][3]) == 8
        assert host.finish(stop) is None


@every_method
def test_at_least_one_rank_survives_the_smallest_target(case):
    options = dict(OPTIONS[case])
    options.update({"target_r": 0.25} if "target_r" in options else {"prox_threshold": 1e6})
    host = Host(Rails(RANKS, STEPS), make(case.split()[0], options).build(RANKS, STEPS, None)).run()
    host.finish(STEPS)
    assert sum(site.e.numel() for site in host.factors.values()) == 1


@every_method
def test_defaults_fit_a_run_of_any_length(case):
    required = {key: OPTIONS[case][key] for key in ("target_r", "prox_threshold") if key in OPTIONS[case]}
    for steps in (1, 2, 3, 4, 5, 7, 10, 20, 1000):
        settings = make(case.split()[0], required)
        host = Host(Rails(RANKS, min(steps, 30)), settings.build(RANKS, steps, None)).run()
        host.finish(steps)
        if "target_r" in required:
            assert len(host.nonzero()) <= 8 and sum(site.e.numel() for site in host.factors.values()) == 8
            curve = settings.budget_curve(steps, None, 22, 4)
            assert curve[-1][1] == 8 and curve[-1][0] <= steps
            assert [t for t, _ in curve] == sorted({t for t, _ in curve})


@every_method
def test_skipped_steps_do_not_derail_a_run(case):
    host = Host(Rails(RANKS, STEPS), build(case))
    for t in range(1, STEPS + 1):
        if t % 5:  # every fifth step overflowed, the ones that would have decided among them
            host.step(t)
    host.finish(STEPS)
    if "target_r" in OPTIONS[case]:
        assert sum(site.e.numel() for site in host.factors.values()) == 8


@every_method
def test_shapes_that_changed_behind_its_back_are_noticed(case):
    host = Host(Rails(RANKS, STEPS), build(case)).run(1, 2)
    host.factors["c"].e = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    with pytest.raises(StaleAdapterError, match="c holds 3 ranks where the allocator left 4"):
        host.allocator.after_step(3, host.factors)


@every_method
def test_lengths_in_epochs_count_the_trainers_epochs(case):
    key = next(k for k in ("warmup", "interval") if k in OPTIONS[case])
    settings = make(case.split()[0], {**OPTIONS[case], key: "1ep"})
    settings.build(RANKS, STEPS, 12)
    with pytest.raises(ConfigError, match="the length of an epoch is unknown"):
        settings.build(RANKS, STEPS, None)


@every_method
def test_without_sites_there_is_nothing_to_allocate(case):
    with pytest.raises(ConfigError):
        make(case.split()[0], OPTIONS[case]).build({}, STEPS, None)


@pytest.mark.parametrize("method", ["salientlora", "adalora"])
def test_svd_methods_start_near_zero_with_live_projections(method):
    A, e, B = torch.empty(300, 40), torch.ones(300), torch.empty(30, 300)
    settings = make(method, {"target_r": 2})
    settings.init_factors(A, e, B, torch.Generator().manual_seed(0))
    assert not e.any()
    assert A.std().item() == pytest.approx(0.02, rel=0.05) and B.std().item() == pytest.approx(0.02, rel=0.05)
    assert settings.scale(16, 15) == 16 / 15.00001
    again = torch.empty(300, 40)
    settings.init_factors(again, e, B, torch.Generator().manual_seed(0))
    assert torch.equal(A, again)


# -- the table of methods ------------------------------------------------------------------------------


def test_every_method_loads_under_its_own_name():
    for name, method in METHODS.items():
        cls = load(name)
        assert issubclass(cls, RankSettings) and cls.method == name and cls.paper == method.paper
    assert list(available())[: len(METHODS)] == list(METHODS)


def test_the_table_needs_no_torch():
    code = "import sys, trimtab.rank, trimtab.schedule; trimtab.rank.available(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("salient", {}, r"rank\.method='salient'.*Did you mean 'salientlora'"),
        ("adalora", {"target_r": 2, "final_warmup": 3}, r"rank\.final_warmup=3.*Did you mean"),
        ("adalora", {}, r"rank\.target_r=None: needed by adalora"),
        ("sora", {}, r"rank\.prox_threshold=None: needed by sora"),
    ],
)
def test_a_recipe_with_a_wrong_name_or_key_is_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        make(name, options)


def test_an_installed_package_can_bring_a_method(monkeypatch):
    from importlib import metadata

    point = metadata.EntryPoint("mine", "trimtab.rank.sora:SoRA", "trimtab.rank")
    monkeypatch.setattr(metadata, "entry_points", lambda group: [point] if group == "trimtab.rank" else [])
    assert make("mine", {"prox_threshold": 0.1}).prox_threshold == 0.1
