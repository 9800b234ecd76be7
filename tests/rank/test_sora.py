import math

import pytest
import torch
from allocator_host import Host, Rails
from torch import nn

from trimtab.errors import BudgetError, ConfigError, SelectionError
from trimtab.rank.base import CostLimit, Factors
from trimtab.rank.sora import SoRA, shrink_, threshold_values

RANKS = {"a": 6, "b": 6, "c": 4, "d": 6}
STEPS = 60


def build(steps=STEPS, base_lr=None, **changes):
    return SoRA(**{"prox_threshold": 0.05, **changes}).build(RANKS, steps, None, base_lr)


def shrunk(values, threshold, dtype=torch.float64):
    gate = torch.tensor(values, dtype=dtype)
    shrink_([gate], threshold)
    return gate.tolist()


# -- the oracles of the method's specification ---------------------------------------------------------


def test_oracle_a_the_proximal_step():
    assert shrunk([0.5, -0.2, 0.05, -0.05, 0.1, -0.1], 0.1) == pytest.approx([0.4, -0.1, 0, 0, 0, 0])


def test_oracle_b_gates_below_twice_the_threshold_survive():
    assert shrunk([0.15, 0.25, 0.2, 0.3, 0.19], 0.1) == pytest.approx([0.05, 0.15, 0.1, 0.2, 0.09])


def test_oracle_c_linear_thresholds():
    values = threshold_values(0, 7e-4, 7)
    assert values[0] == 0 and values[-1] == pytest.approx(7e-4)
    assert values[1] == pytest.approx(1.16667e-4, rel=1e-5)


def test_oracle_d_an_adam_step_and_the_proximal_step():
    gate = nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    gate.grad = torch.tensor([3.0], dtype=torch.float64)
    torch.optim.AdamW([gate], lr=0.1, eps=1e-6, weight_decay=0).step()
    assert gate.item() == pytest.approx(0.400000033, abs=1e-9)
    shrink_([gate.detach()], 0.02)
    assert gate.item() == pytest.approx(0.380000033, abs=1e-9)


def test_oracle_e_geometric_thresholds():
    assert threshold_values(1e-4, 1e-2, 3, "exp_linear") == pytest.approx([1e-4, 1e-3, 1e-2])


# -- the rule ------------------------------------------------------------------------------------------


def test_the_proximal_step_is_torchs_soft_threshold_for_many_gates_at_once():
    gates = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (5, 0, 17)]
    expected = [nn.functional.softshrink(gate, 0.3) for gate in gates]
    shrink_(gates, 0.3)
    for got, want in zip(gates, expected):
        torch.testing.assert_close(got, want)
    before = gates[0].clone()
    shrink_(gates, 0.0)
    shrink_([], 0.3)
    assert torch.equal(gates[0], before)


def test_log_linear_thresholds_are_the_logarithm_of_a_ramp():
    values = threshold_values(0.1, 2.0, 5, "log_linear")
    assert values == pytest.approx(torch.linspace(math.exp(0.1), math.exp(2), 5, dtype=torch.float64).log().tolist())


def test_thresholds_rise_in_equal_stages_of_the_run():
    allocator = build(70, max_threshold=0.11, thresholds=7)
    assert [allocator.threshold(t) for t in (1, 10, 11, 35, 70)] == pytest.approx([0.05, 0.05, 0.06, 0.08, 0.11])
    assert build().threshold(1) == build().threshold(STEPS) == 0.05


def test_the_threshold_may_be_multiplied_by_the_learning_rate():
    assert build(base_lr=0.1, scale_by_lr=True).threshold(1) == pytest.approx(0.005)
    assert build(base_lr=0.1).threshold(1) == 0.05
    with pytest.raises(ConfigError, match=r"rank\.scale_by_lr"):
        build(scale_by_lr=True)


def test_the_start_is_zero_with_a_live_gate():
    A, e, B = torch.empty(200, 64), torch.empty(200), torch.ones(9, 200)
    SoRA(prox_threshold=1e-3).init_factors(A, e, B, torch.Generator().manual_seed(0))
    assert not B.any()
    assert A.abs().max() <= 0.125 and A.std().item() == pytest.approx(0.125 / math.sqrt(3), rel=0.02)
    assert e.std().item() == pytest.approx(1, rel=0.15)
    assert SoRA(prox_threshold=1e-3).scale(16, 8) == 2
    assert not SoRA.e_decays


def test_the_loss_term_is_the_mean_gate_over_those_at_the_start():
    site = Factors("a", torch.zeros(3, 2), nn.Parameter(torch.tensor([1.0, -2.0, 3.0])), torch.zeros(2, 3))
    allocator = SoRA(prox_threshold=0.1, l1_loss_weight=0.5).build({"a": 3, "b": 1}, 10, None)
    other = Factors("b", torch.zeros(0, 2), nn.Parameter(torch.zeros(0)), torch.zeros(2, 0))
    penalty = allocator.penalty({"a": site, "b": other})
    assert penalty.item() == pytest.approx(0.5 * 6 / 4)
    penalty.backward()
    assert site.e.grad.tolist() == pytest.approx([0.125, -0.125, 0.125])
    assert build().penalty(dict.fromkeys(RANKS, site)) is None


# -- the whole course ----------------------------------------------------------------------------------


class FreeHost(Host):
    """Gates that move by their gradient, from where the last step left them."""

    def step(self, t):
        self.allocator.penalty(self.factors)
        for name, site in self.factors.items():
            drift = self.rails.grads[name]["e"][t][self.held[name]]
            site.e.data.add_(drift, alpha=0.08)
        return self.apply(t, self.allocator.after_step(t, self.factors))


def start(rails):
    for name in rails.ranks:
        rails.values[name]["e"][0] = torch.linspace(-1, 1.2, rails.ranks[name], dtype=torch.float64)
    return rails


def plain_course(rails, threshold, sticky, interval):
    gates = {(n, i): rails.values[n]["e"][0, i].item() for n, r in rails.ranks.items() for i in range(r)}
    dead, history = set(), []
    for t in range(1, rails.steps + 1):
        for (n, i), g in gates.items():
            g += 0.08 * rails.grads[n]["e"][t, i].item()
            g = 0.0 if (n, i) in dead else math.copysign(max(abs(g) - threshold, 0), g)
            gates[n, i] = g
            if sticky and g == 0:
                dead.add((n, i))
        if t % interval == 0:
            history.append((t, "prune" if sticky else "mask", None, frozenset(k for k, g in gates.items() if g)))
    return history, frozenset(k for k, g in gates.items() if g)


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("sticky", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_a_run_equals_a_plain_implementation(cuts, sticky, seed):
    rails, threshold = start(Rails(RANKS, STEPS, seed)), 0.01 if sticky else 0.05
    host = FreeHost(rails, build(prox_threshold=threshold, sticky_zeros=sticky, interval=7), cuts).run()
    history, survivors = plain_course(rails, threshold, sticky, 7)
    assert host.history == history
    assert host.nonzero() == survivors and 0 < len(survivors) < 22
    host.finish(STEPS)
    assert host.history[-1] == (STEPS, "prune", None, survivors)
    if cuts:
        assert sum(site.e.numel() for site in host.factors.values()) == len(survivors)


def test_gates_at_zero_come_back_unless_sticky():
    kept = {}
    for sticky in (True, False):
        host = FreeHost(start(Rails(RANKS, STEPS)), build(sticky_zeros=sticky, interval=1)).run()
        kept[sticky] = [k for *_, k in host.history]
    assert not any(later - earlier for earlier, later in zip(kept[True], kept[True][1:]))
    assert any(later - earlier for earlier, later in zip(kept[False], kept[False][1:]))


@pytest.mark.parametrize("sticky", [True, False])
@pytest.mark.parametrize("cuts", [True, False])
def test_one_rank_survives_a_threshold_that_kills_all(sticky, cuts):
    host = FreeHost(start(Rails(RANKS, STEPS)), build(prox_threshold=100, sticky_zeros=sticky), cuts).run()
    decision = host.finish(STEPS)
    assert sum(int(keep.sum()) for keep in decision.keep.values()) == 1


def test_its_final_rank_cannot_be_foreseen_or_set():
    assert SoRA(prox_threshold=0.1).budget_curve(100, None, 22, 4) == []
    assert SoRA(prox_threshold=0.1).prune_curve(100, None, 22, 4) == []
    with pytest.raises(BudgetError, match="SoRA"):
        SoRA(prox_threshold=0.1).build(RANKS, STEPS, None, limit=CostLimit(dict.fromkeys(RANKS, 11), 100))


# -- what cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key",
    [({"prox_threshold": -0.1}, "prox_threshold"), ({"prox_threshold": float("nan")}, "prox_threshold"),
     ({"l1_loss_weight": -1}, "l1_loss_weight"), ({"max_threshold": 0.01}, "max_threshold"),
     ({"max_threshold": 1, "thresholds": 1}, "thresholds"), ({"spacing": "cubic"}, "spacing"),
     ({"prox_threshold": 0, "max_threshold": 1, "spacing": "exp_linear"}, "prox_threshold"),
     ({"interval": 1.0}, "interval")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, key):
    with pytest.raises(ConfigError, match=rf"^rank\.{key}="):
        SoRA(**{"prox_threshold": 0.05, **changes})


def test_more_stages_than_steps_are_refused():
    with pytest.raises(ConfigError, match="at most the run's 5 steps"):
        build(5, max_threshold=1.0)


def test_gates_that_are_not_finite_are_refused_with_the_site():
    host = FreeHost(start(Rails(RANKS, STEPS)), build()).run(1, 4)
    host.factors["d"].e.data[0] = torch.nan
    with pytest.raises(SelectionError, match="the gate of d is not finite"):
        host.finish(5)
