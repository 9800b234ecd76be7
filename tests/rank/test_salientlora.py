import math

import numpy as np
import pytest
import torch
from allocator_host import Host, Rails
from test_influence import dense_log_domain
from torch import nn

from trimtab.errors import ConfigError, SelectionError
from trimtab.rank.base import CostLimit, Factors
from trimtab.rank.orthogonality import Orthogonality, defect
from trimtab.rank.salientlora import SalientLoRA, Schedule, magnitude, released_salience, salience

RANKS = {"a": 6, "b": 6, "c": 4, "d": 6}
STEPS = 60
SETTINGS = {"start": "svd", "target_r": 2, "warmup": 5, "allocation": 40, "initial_window": 3, "final_window": 12}


def build(**changes):
    return SalientLoRA(**{**SETTINGS, **changes}).build(RANKS, STEPS, None)


# -- the oracles of the method's specification ---------------------------------------------------------


def test_oracle_c_windows_and_budgets():
    schedule = Schedule(800, 2000, 1080, 144)
    steps = [800 + round(u * 2000) for u in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
    assert [schedule.window(t) for t in steps] == [10, 61, 120, 176, 197, 200, 200]
    assert [schedule.budget(t) for t in steps] == [1033, 795, 518, 256, 158, 144, 144]


def test_oracle_c_the_prunings_of_a_run():
    schedule = Schedule(800, 2000, 1080, 144)
    events = list(schedule.events())
    assert [step for step, _ in events] == [
        810, 823, 839, 860, 887, 921, 963, 1016, 1081, 1160, 1255, 1367, 1497, 1644, 1807, 1984, 2171, 2365, 2563, 2763,
        2800,
    ]  # fmt: skip
    assert [(schedule.window(t), b) for t, b in events[:3]] == [(13, 1019), (16, 1005), (21, 982)]
    assert (schedule.window(2365), dict(events)[2365]) == (198, 153)
    assert events[-1] == (2800, 144)


def test_oracle_d_magnitude():
    series = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])
    orth = torch.tensor([1.0, 2.0, 4.0, 1.0])
    assert magnitude(series, orth).tolist() == pytest.approx([0.490909, 0.509091], abs=1e-6)
    assert magnitude(-series, orth).tolist() == pytest.approx([0.490909, 0.509091], abs=1e-6)
    assert magnitude(series, orth, "minmax").tolist() == pytest.approx([0.485714, 0.514286], abs=1e-6)


def test_oracle_e_orthogonality():
    P = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    assert defect(P.T).item() == pytest.approx(1.7320508)
    assert defect(P.T, "fro2").item() == pytest.approx(3)


def test_oracle_f_a_slope_of_one_is_refused():
    with pytest.raises(ConfigError, match=r"rank\.gamma=1\.0"):
        SalientLoRA(target_r=2, gamma=1.0)


# -- the salience --------------------------------------------------------------------------------------


def test_salience_is_the_weighted_sum_of_two_shares():
    series = torch.randn(30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).cumsum(1)
    series *= 10 ** torch.linspace(-2, 1, 30, dtype=torch.float64)[:, None]
    orth = torch.rand(12, generator=torch.Generator().manual_seed(1)) + 0.5
    g = (orth.double().sum() / orth.double()).numpy()
    m = np.abs(series.numpy()) @ g
    log_domain = dense_log_domain(series.numpy(), 0.8, 2.0)
    domain = np.exp(log_domain - np.logaddexp.reduce(log_domain))
    for weight in (0.0, 0.3, 0.7, 1.0):
        found = salience(series, orth, 0.8, 2.0, weight)
        np.testing.assert_allclose(found, weight * m / m.sum() + (1 - weight) * domain, rtol=1e-9)
        assert found.sum().item() == pytest.approx(1)


def test_a_window_of_zeros_or_of_one_step_still_ranks():
    assert salience(torch.zeros(4, 5), torch.ones(5), 0.9, 2.0, 0.7).tolist() == pytest.approx([0.25] * 4)
    one = salience(torch.tensor([[1.0], [3.0]]), torch.ones(1), 0.9, 2.0, 0.7, "minmax")
    assert one.tolist() == pytest.approx([0.7 / 4 + 0.15, 0.7 * 3 / 4 + 0.15])


def test_perfect_orthogonality_at_one_step_is_no_division_by_zero():
    assert torch.isfinite(salience(torch.rand(3, 4), torch.tensor([1.0, 0.0, 1.0, 1.0]), 0.9, 2.0, 0.7)).all()


@pytest.mark.parametrize(
    "series, orth", [(torch.zeros(3, 4), torch.zeros(5)), (torch.full((3, 4), torch.nan), torch.ones(4)),
                     (torch.zeros(3, 4), torch.tensor([1.0, torch.inf, 1, 1])), (torch.zeros(4), torch.ones(4)),
                     (torch.zeros(3, 4), torch.tensor([1.0, torch.nan, 1, 1]))],
)  # fmt: skip
def test_salience_refuses_what_it_cannot_rank(series, orth):
    for step_weight in ("inverse", "minmax"):
        with pytest.raises(SelectionError):
            salience(series, orth, 0.9, 2.0, 0.7, step_weight)


def test_the_released_salience_as_its_code_computes_it():
    # Two sites of two; rows of oracle (a) less its last: D is [14, 7/3] for the two that lead somewhere.
    t = torch.arange(5.0)
    series = torch.stack([t, 3 * t + 1, 7 * t - 2, -9 * t])
    orth = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0])
    g = [1, 3 / 7, 0, 1, 1]  # Σo/o = [9, 4.5, 2.25, 9, 9], then to [0, 1]
    g = [(v - 2.25) / 6.75 for v in (9, 4.5, 2.25, 9, 9)]
    m = [sum(w * abs(v) for w, v in zip(g, row)) for row in series.tolist()]
    domain = [14 / (14 + 7 / 3), 7 / 3 / (14 + 7 / 3), 0, 0]
    expected = [
        domain[0] + m[0] / (m[0] + m[1]), domain[1] + m[1] / (m[0] + m[1]), m[2] / (m[2] + m[3]), m[3] / (m[2] + m[3]),
    ]  # fmt: skip
    assert released_salience(series, orth, 0.9, 2.0, [2, 2]).tolist() == pytest.approx(expected, rel=1e-6)


def test_the_released_salience_is_defined_without_edges_and_for_dead_sites():
    series = torch.zeros(4, 3)
    series[:2] = torch.tensor([[1.0, -1, 1], [1, 1, -1]])
    found = released_salience(series, torch.ones(3), 0.9, 2.0, [2, 2, 0])
    assert found.tolist() == pytest.approx([0.5, 0.5, 0, 0])


# -- the penalty ---------------------------------------------------------------------------------------


def random_factors(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        name: Factors(
            name,
            nn.Parameter(torch.randn(r, 7, generator=g, dtype=dtype)),
            nn.Parameter(torch.randn(r, generator=g, dtype=dtype)),
            nn.Parameter(torch.randn(5, r, generator=g, dtype=dtype)),
        )
        for name, r in {"a": 3, "b": 2, "c": 4}.items()
    }


def plain_defect(factors, norm, sides="AB"):
    """As PEFT writes it: one term per factor, mean over all factors."""
    total = 0
    for site in factors.values():
        for side in sides:
            F = site.A if side == "A" else site.B.T
            value = torch.norm(F @ F.T - torch.eye(len(F), dtype=F.dtype), p="fro")
            total = total + (value if norm == "fro" else value**2)
    return total / (2 * len(factors))


@pytest.mark.parametrize("norm", ["fro", "fro2"])
def test_the_penalty_and_its_gradient_are_those_of_the_plain_formula(norm):
    settings = SalientLoRA(start="svd", target_r=1, orth=norm, orth_weight=0.3)
    factors = random_factors()
    parameters = [p for site in factors.values() for p in (site.A, site.B)]
    found = settings.build({"a": 3, "b": 2, "c": 4}, 100, None).penalty(factors)
    expected = 0.3 * plain_defect(factors, norm)
    torch.testing.assert_close(found, expected)
    got, want = torch.autograd.grad(2 * found, parameters), torch.autograd.grad(2 * expected, parameters)
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


def test_the_penalty_of_orthonormal_factors_has_no_gradient_and_no_nan():
    site = Factors("a", nn.Parameter(torch.eye(3, 7)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.eye(5, 3)))
    moving, total = Orthogonality(1, "fro")({"a": site}, {})
    moving.backward()
    assert total == 0 and not site.A.grad.any() and not site.B.grad.any()


def test_frozen_factors_get_no_penalty_and_keep_their_part_of_the_recorded_defect():
    factors = random_factors()
    everything = plain_defect(factors, "fro").item()
    factors["a"].A.requires_grad_(False)
    factors["b"].B.requires_grad_(False)
    measure = Orthogonality(3, "fro")
    for _ in range(2):  # the second time, frozen norms are remembered
        moving, total = measure(factors, {})
        assert total.item() == pytest.approx(everything)
        frozen = {"a": factors["a"]}, {"b": factors["b"]}
        gone = (plain_defect(frozen[0], "fro", "A") + plain_defect(frozen[1], "fro", "B")).item() / 3
        assert moving.item() == pytest.approx(everything - gone)
    for site in factors.values():
        site.A.requires_grad_(False)
        site.B.requires_grad_(False)
    moving, total = measure(factors, {})
    assert moving is None and total.item() == pytest.approx(everything)


def test_half_precision_factors_are_measured_in_float32():
    factors = random_factors(torch.bfloat16)
    wide = {n: Factors(n, s.A.float(), s.e.float(), s.B.float()) for n, s in factors.items()}
    with torch.autocast("cpu", torch.bfloat16):
        moving, _ = Orthogonality(3, "fro")(factors, {})
    torch.testing.assert_close(moving, plain_defect(wide, "fro"))
    moving.backward()
    assert factors["a"].A.grad.dtype == torch.bfloat16


def test_empty_sites_add_nothing_to_the_penalty():
    factors = random_factors()
    before = Orthogonality(3, "fro")({k: factors[k] for k in ("a", "b")}, {})[1]
    site = factors["c"]
    site.A, site.e, site.B = nn.Parameter(site.A[:0]), nn.Parameter(site.e[:0]), nn.Parameter(site.B[:, :0])
    moving, after = Orthogonality(3, "fro")(factors, {})
    torch.testing.assert_close(after, before)
    moving.backward()


def test_without_a_weight_there_is_no_penalty_but_orthogonality_still_counts():
    rails = Rails(RANKS, STEPS)
    host = Host(rails, build(orth_weight=0.0))
    assert host.allocator.penalty(host.factors) is None
    assert len(host.run().history) > 2


# -- the whole course ----------------------------------------------------------------------------------


def plain_course(rails, settings, orth_of):
    """The published algorithm with nothing clever: dense matrices, Python sorting, one list of survivors."""
    alive = [(name, i) for name, r in rails.ranks.items() for i in range(r)]
    b0, bT = len(alive), settings.target_r * len(rails.ranks)
    n_i, end = settings.warmup, settings.warmup + settings.allocation
    rows, orth, history, last = [], [], [], None
    window = settings.initial_window

    def length(t):
        u = min(max((t - n_i) / settings.allocation, 0), 1)
        return round(settings.final_window + (settings.initial_window - settings.final_window) * (1 - u) ** 3)

    for t in range(n_i + 1, end + 1):
        rows.append([rails.values[name]["e"][t, i].item() for name, i in alive])
        orth.append(orth_of(t, alive))
        if len(rows) < window and t < end:
            continue
        series = np.array(rows).T
        if len(rows) >= 2 or last is None:
            g = sum(orth) / np.array(orth)
            m = np.abs(series) @ g
            log_domain = dense_log_domain(series, settings.beta, settings.gamma)
            domain = np.exp(log_domain - np.logaddexp.reduce(log_domain))
            w = settings.magnitude_weight
            last = w * m / m.sum() + (1 - w) * domain
        low = settings.initial_window if settings.anchored else 0
        budget = bT if t == end else round(b0 - (length(t) - low) / (settings.final_window - low) * (b0 - bT))
        chosen = sorted(sorted(range(len(alive)), key=lambda i: (-last[i], i))[:budget])
        alive, last = [alive[i] for i in chosen], last[chosen]
        history.append((t, "prune", budget, frozenset(alive)))
        rows, orth, window = [], [], length(t)
    return history


def defect_before(rails):
    """Mean defect of the living columns as the loss of step t sees it: with the factors of step t − 1."""

    def value(t, alive):
        total = 0.0
        for name in rails.ranks:
            index = [i for site, i in alive if site == name]
            A = rails.values[name]["A"][t - 1][index].numpy()
            B = rails.values[name]["B"][t - 1][:, index].numpy()
            for gram in (A @ A.T, B.T @ B):
                total += math.sqrt(((gram - np.eye(len(gram))) ** 2).sum())
        return total / (2 * len(rails.ranks))

    return value


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", [{}, {"anchored": True}, {"allocation": 37, "warmup": 0, "beta": 0.6}])
def test_a_run_equals_a_plain_implementation(cuts, seed, changes):
    rails = Rails(RANKS, STEPS, seed)
    settings = SalientLoRA(**{**SETTINGS, **changes})
    host = Host(rails, settings.build(RANKS, STEPS, None), cuts).run()
    expected = plain_course(rails, settings, defect_before(rails))
    assert host.history == expected
    assert host.nonzero() == expected[-1][3] and len(host.nonzero()) == 8


def test_15_to_2_over_72_sites_ends_at_144():
    ranks = {f"layer.{i}": 15 for i in range(72)}
    rails = Rails(ranks, 60, seed=3)
    settings = SalientLoRA(start="svd", target_r=2, initial_window=10, final_window=200)
    host = Host(rails, settings.build(ranks, 60, None)).run()
    assert sum(site.e.numel() for site in host.factors.values()) == 144
    assert min(site.e.numel() for site in host.factors.values()) == 0  # sites without any rank take part to the end
    assert [(t, b) for t, _, b, _ in host.history] == settings.budget_curve(60, None, 1080, 72)


def test_the_released_parity_still_meets_the_budget():
    rails = Rails(RANKS, STEPS)
    ours = Host(rails, build()).run()
    released = Host(rails, build(parity="released")).run()
    assert [h[:3] for h in ours.history] == [h[:3] for h in released.history]
    assert ours.history[0][3] != released.history[0][3]


def test_a_last_window_of_one_step_uses_the_salience_before():
    # Windows of 4 from step 0: events at 4, 8, and the last at 9, one step after.
    rails = Rails(RANKS, STEPS)
    settings = SalientLoRA(target_r=2, warmup=0, allocation=9, initial_window=4, final_window=4)
    host = Host(rails, settings.build(RANKS, STEPS, None))
    host.run(1, 8)
    saved = host.allocator.last.clone()
    decision = host.step(9)
    assert decision.kind == "prune" and decision.budget == 8
    assert len(saved) == 8  # unanchored windows that do not grow are at the target from the first event on


def test_before_the_first_full_window_the_end_decides_by_what_there_is():
    for allocation in (1, 2):
        host = Host(Rails(RANKS, STEPS), build(allocation=allocation)).run()
        assert [(t, b, len(kept)) for t, _, b, kept in host.history] == [(5 + allocation, 8, 8)]


def test_a_run_without_a_cut_to_make_decides_nothing_away():
    host = Host(Rails({"a": 3, "b": 3}, 30), SalientLoRA(target_r=3).build({"a": 3, "b": 3}, 30, None)).run()
    assert all(len(kept) == 6 for *_, kept in host.history)
    assert SalientLoRA(target_r=3).budget_curve(30, None, 6, 2) == []


def test_a_parameter_budget_is_never_exceeded_and_used_up():
    costs = {"a": 11, "b": 23, "c": 12, "d": 12}
    for cuts in (True, False):
        host = Host(Rails(RANKS, STEPS), SalientLoRA(**SETTINGS).build(
            RANKS, STEPS, None, limit=CostLimit(costs, 100)), cuts).run()  # fmt: skip
        spent = [sum(costs[name] for name, _ in kept) for *_, kept in host.history]
        assert all(s <= budget for s, (_, _, budget, _) in zip(spent, host.history))
        assert 100 - 11 < spent[-1] <= 100
    curve = SalientLoRA(**SETTINGS).budget_curve(STEPS, None, 6 * 11 + 6 * 23 + 4 * 12 + 6 * 12, 4, final_total=100)
    assert curve == [(t, b) for t, _, b, _ in host.history][: len(curve)]


# -- what cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key",
    [({"gamma": 1.0}, "gamma"), ({"gamma": 0.5}, "gamma"), ({"beta": 0.0}, "beta"), ({"beta": 1.01}, "beta"),
     ({"magnitude_weight": -0.1}, "magnitude_weight"), ({"magnitude_weight": 1.1}, "magnitude_weight"),
     ({"initial_window": 1}, "initial_window"), ({"initial_window": 2.5}, "initial_window"),
     ({"final_window": 2}, "final_window"), ({"target_r": 0}, "target_r"), ({"target_r": float("nan")}, "target_r"),
     ({"target_r": "2"}, "target_r"), ({"orth_weight": -1}, "orth_weight"), ({"orth": "nuc"}, "orth"),
     ({"step_weight": "x"}, "step_weight"), ({"parity": "paper"}, "parity"), ({"warmup": 1.0}, "warmup"),
     ({"allocation": "lots"}, "allocation"), ({"anchored": True, "final_window": 3}, "anchored")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, key):
    with pytest.raises(ConfigError, match=rf"^rank\.{key}="):
        SalientLoRA(**{**SETTINGS, **changes})


def test_a_schedule_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="warmup 500 \\+ allocation 3500 = 4000 steps, but the run has 3000"):
        SalientLoRA(target_r=2, warmup=500, allocation=3500).build(RANKS, 3000, None)
    with pytest.raises(ConfigError, match="at least one step"):
        build(allocation=0)


@pytest.mark.parametrize("target_r, cure", [(6, "at most the initial rank, 5.5 on average"), (0.2, "leaves no rank")])
def test_a_target_out_of_reach_is_refused(target_r, cure):
    with pytest.raises(ConfigError, match=cure):
        build(target_r=target_r)


def test_values_that_are_not_finite_are_refused_with_the_site():
    rails = Rails(RANKS, STEPS)
    rails.values["c"]["e"][7, 1] = torch.nan
    with pytest.raises(SelectionError, match="λ of c is not finite"):
        Host(rails, build()).run()
