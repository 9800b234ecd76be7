from itertools import pairwise

import pytest
import torch
from allocator_host import Host, Rails
from peft import AdaLoraConfig, get_peft_model
from torch import nn

from trimtab.errors import ConfigError, SelectionError
from trimtab.rank.adalora import AdaLoRA, Schedule, triplet_scores
from trimtab.rank.base import CostLimit, Factors

RANKS = {"a": 6, "b": 6, "c": 4, "d": 6}
STEPS = 60
SETTINGS = {"start": "svd", "target_r": 2, "warmup": 5, "final": 15}


def build(**changes):
    return AdaLoRA(**{**SETTINGS, **changes}).build(RANKS, STEPS, None)


# -- the oracles of the method's specification ---------------------------------------------------------


def test_oracle_a_budgets():
    schedule = AdaLoRA(target_r=8, warmup=100, final=500).schedule(1000, None, 864, 576)
    assert [schedule.budget(t) for t in (100, 150, 200, 300, 400, 500, 1000)] == [864, 768, 697, 612, 580, 576, 576]


def test_oracle_b_smoothed_scores_of_one_entry():
    site = Factors("a", nn.Parameter(torch.zeros(1, 1)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, 1)))
    allocator = AdaLoRA(start="svd", target_r=1, warmup=0, final=0).build({"a": 1}, 100, None)
    seen = []
    for t, (g, w) in enumerate([(0.5, 0.2), (-1, 0.2), (0.25, -0.4)], 1):
        site.e.data.fill_(w)
        site.e.grad = torch.tensor([float(g)])
        allocator.after_step(t, {"a": site})
        mean, spread = allocator.sensitivity["a.e"].item(), allocator.uncertainty["a.e"].item()
        seen.append((mean, spread, mean * spread))
    expected = [(0.015, 0.01275, 1.9125e-4), (0.04275, 0.034425, 1.47166875e-3),
                (0.0513375, 0.036560625, 1.87693109e-3)]  # fmt: skip
    for got, want in zip(seen, expected):
        assert got == pytest.approx(want, rel=1e-6)


def test_oracle_c_a_triplet_scores_its_value_and_the_means_of_its_vectors():
    score = triplet_scores(torch.tensor([[0.1, 0.3, 0.5]]), torch.tensor([0.5]), torch.tensor([[0.2], [0.4]]))
    assert score.tolist() == pytest.approx([1.1])


def test_oracle_d_the_scale_does_not_follow_the_rank():
    scale = AdaLoRA(target_r=2).scale(16, 3)
    assert 2 * scale == pytest.approx(10.6666311112)
    Q = torch.tensor([[1.0, 2, 3], [4, 5, 6], [7, 8, 9]]).double() / 10
    P = torch.tensor([[1.0, 0, 2], [0, 1, 1]]).double() / 10
    delta = scale * P @ (torch.tensor([2.0, 0, -1]).double()[:, None] * Q)
    assert delta[0].tolist() == pytest.approx([-0.63999787] * 3)
    assert delta[1].tolist() == pytest.approx([-0.37333209, -0.42666524, -0.4799984])


# -- against PEFT --------------------------------------------------------------------------------------


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 12), nn.Linear(12, 9), nn.Linear(9, 4)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("interval", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_masks_and_budgets_are_those_of_pefts_allocator_step_by_step(interval, dtype):
    torch.manual_seed(interval)
    steps, warmup, final = 50, 6, 12
    names = ["first", "second", "third"]
    config = AdaLoraConfig(init_r=5, target_r=2, tinit=warmup, tfinal=final, deltaT=interval, total_step=steps,
                           beta1=0.8, beta2=0.9, target_modules=names, lora_alpha=8)  # fmt: skip
    model = get_peft_model(Stack(), config).to(dtype)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    layers = {name: getattr(model.base_model.model, name) for name in names}
    theirs = model.base_model.rankallocator
    settings = AdaLoRA(
        start="svd", target_r=2, warmup=warmup, final=final, interval_steps=interval, beta1=0.8, beta2=0.9
    )
    ours = settings.build(dict.fromkeys(names, 5), steps, None)
    x, y = torch.randn(64, 8, dtype=dtype), torch.randn(64, 4, dtype=dtype)
    ended = masked = 0
    for t in range(1, steps + 1):
        (model.base_model.model(x) - y).square().mean().backward()
        optimizer.step()
        factors = {}
        for name, layer in layers.items():  # what the optimizer left, before PEFT masks it
            parts = layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]
            A, e, B = (nn.Parameter(p.detach().clone()) for p in (parts[0], parts[1].view(-1), parts[2]))
            A.grad, e.grad, B.grad = parts[0].grad.clone(), parts[1].grad.view(-1).clone(), parts[2].grad.clone()
            factors[name] = Factors(name, A, e, B)
        decision = ours.after_step(t, factors)
        model.base_model.update_and_allocate(t)
        for name, layer in layers.items():
            e = factors[name].e.detach()
            e = e if decision is None else e * decision.keep[name]
            assert torch.equal(e, layer.lora_E["default"].detach().view(-1)), (t, name)
        budget, allocates = theirs.budget_schedule(t)
        if t < steps - final:
            assert (decision is not None) == allocates
            assert decision is None or decision.budget == budget
            for name in names:
                for ours_side, their_side in (("A", "A"), ("e", "E"), ("B", "B")):
                    key = f"{name}.lora_{their_side}.default"
                    want = theirs.exp_avg_ipt[key], theirs.exp_avg_unc[key]
                    got = ours.sensitivity[f"{name}.{ours_side}"], ours.uncertainty[f"{name}.{ours_side}"]
                    for g, w in zip(got, want):
                        torch.testing.assert_close(g, w.view_as(g), rtol=1e-5 if dtype == torch.float32 else 1e-12,
                                                   atol=0)  # fmt: skip
            masked += decision is not None
        else:
            assert ours.schedule.budget(t) == budget == 6
            ended += decision.event
            assert decision.kind == ("prune" if t == steps - final else "mask")
        optimizer.zero_grad()
    pattern = {k.split(".")[-3]: v for k, v in model.peft_config["default"].rank_pattern.items()}
    assert pattern == {name: decision.keep[name].tolist() for name in names}
    assert masked > 2 and ended == 1


def test_the_penalty_is_pefts():
    torch.manual_seed(0)
    model = get_peft_model(
        Stack(), AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["first", "third"])
    )
    factors, total, count = {}, 0, 0
    for name in ("first", "third"):
        layer = getattr(model.base_model.model, name)
        A, B = layer.lora_A["default"], layer.lora_B["default"]
        factors[name] = Factors(name, A, layer.lora_E["default"].view(-1), B)
        for gram in (A @ A.T, B.T @ B):
            total, count = total + torch.norm(gram - torch.eye(4), p="fro"), count + 1
    found = AdaLoRA(start="svd", target_r=2, orth_weight=0.5).build({"first": 4, "third": 4}, 10, None).penalty(factors)
    torch.testing.assert_close(found, 0.5 * total / count)


# -- the whole course ----------------------------------------------------------------------------------


def plain_course(rails, s):
    """The published algorithm entry by entry, on Python lists of (site, rank)."""
    every = [(name, i) for name, r in rails.ranks.items() for i in range(r)]
    mean, spread, history = {}, {}, []
    end, b0, bT = rails.steps - s.final, len(every), s.target_r * len(rails.ranks)
    zeroed = set()
    for t in range(1, end + 1):
        if t < end:
            for name, i in every:
                for key, part in (
                    ("A", lambda v, i=i: v[i]),
                    ("B", lambda v, i=i: v[:, i]),
                    ("e", lambda v, i=i: v[i]),
                ):
                    w, g = (part(x[name][key][t]) for x in (rails.values, rails.grads))
                    now = (w * g).abs()
                    at = (name, i, key)
                    mean[at] = s.beta1 * mean.get(at, 0) + (1 - s.beta1) * now
                    spread[at] = s.beta2 * spread.get(at, 0) + (1 - s.beta2) * (now - mean[at]).abs()
        if t < end and (t <= s.warmup or t % s.interval_steps):
            continue
        left = 1 - (t - s.warmup) / (end - s.warmup)
        budget = bT if t == end else int(bT + (b0 - bT) * left**3)
        score = {(n, i): sum((mean[n, i, k] * spread[n, i, k]).mean().item() for k in "AeB") for n, i in every}
        ranked = sorted(every, key=lambda x: -score[x])
        zeroed = set(every) - set(ranked[:budget])
        history.append((t, "prune" if t == end else "mask", budget, frozenset(ranked[:budget])))
    return history, frozenset(every) - zeroed


@pytest.mark.parametrize("cuts", [True, False])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("changes", [{}, {"interval_steps": 4, "beta1": 0.5}, {"warmup": 0, "final": 0}])
def test_a_run_equals_a_plain_implementation(cuts, seed, changes):
    rails = Rails(RANKS, STEPS, seed)
    settings = AdaLoRA(**{**SETTINGS, **changes})
    host = Host(rails, settings.build(RANKS, STEPS, None), cuts).run()
    expected, survivors = plain_course(rails, settings)
    assert host.history == expected
    assert host.nonzero() == survivors and len(survivors) == 8


def test_masked_triplets_may_come_back_until_the_pattern_is_final():
    host = Host(Rails(RANKS, STEPS), build()).run()
    kept = [k for *_, k in host.history]
    assert any(later - earlier for earlier, later in pairwise(kept))


def test_the_budget_curve_is_what_a_run_does_and_only_the_last_step_frees_parameters():
    settings = AdaLoRA(**SETTINGS, interval_steps=7)
    host = Host(Rails(RANKS, STEPS), settings.build(RANKS, STEPS, None)).run()
    curve = settings.budget_curve(STEPS, None, 22, 4)
    assert curve == [(t, b) for t, _, b, _ in host.history][: len(curve)]
    assert settings.prune_curve(STEPS, None, 22, 4) == [(45, 8)]
    assert AdaLoRA(**SETTINGS, prune=False).prune_curve(STEPS, None, 22, 4) == []


def test_a_long_run_logs_some_of_its_allocations_and_the_last():
    ranks = {"a": 3}
    allocator = AdaLoRA(target_r=1, warmup=0, final=100).build(ranks, 1300, None)
    host = Host(Rails(ranks, 1300), allocator).run()
    assert 200 <= len(host.history) <= 250 and host.history[-1][:3] == (1200, "prune", 1)


def test_an_equal_start_and_target_masks_nothing():
    host = Host(Rails({"a": 3, "b": 3}, 30), AdaLoRA(target_r=3).build({"a": 3, "b": 3}, 30, None)).run()
    assert all(len(kept) == 6 for *_, kept in host.history)


def test_ties_do_not_cut_more_than_the_budget_asks_for():
    ranks = {"a": 4, "b": 4}
    rails = Rails(ranks, 20)
    for name in ranks:
        for key in "AeB":
            rails.grads[name][key].zero_()  # every score is 0
    host = Host(rails, AdaLoRA(target_r=2).build(ranks, 20, None)).run()
    assert [len(kept) for *_, kept in host.history] == [b for _, _, b, _ in host.history]
    assert host.nonzero() == {("a", i) for i in range(4)}


def test_a_frozen_factor_keeps_its_last_score():
    host = Host(Rails(RANKS, STEPS), build())
    host.run(1, 10)
    for site in host.factors.values():
        site.A.requires_grad_(False)
    before = {k: v.clone() for k, v in host.allocator.sensitivity.items()}
    host.run(11, 12)
    for key, value in host.allocator.sensitivity.items():
        assert torch.equal(value, before[key]) == key.endswith(".A")
    host.run(13)
    assert len(host.nonzero()) == 8


def test_bfloat16_factors_are_scored_in_float32():
    host = Host(Rails(RANKS, STEPS, dtype=torch.bfloat16), build()).run(1, 3)
    assert {v.dtype for v in host.allocator.sensitivity.values()} == {torch.float32}


def test_a_parameter_budget_is_never_exceeded():
    costs = {"a": 11, "b": 23, "c": 12, "d": 12}
    host = Host(Rails(RANKS, STEPS), AdaLoRA(**SETTINGS).build(RANKS, STEPS, None, limit=CostLimit(costs, 100))).run()
    spent = [sum(costs[name] for name, _ in kept) for *_, kept in host.history]
    assert all(s <= budget for s, (_, _, budget, _) in zip(spent, host.history))
    assert 89 < spent[-1] <= 100


# -- what cannot work ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, key",
    [({"target_r": 0}, "target_r"), ({"beta1": 0.0}, "beta1"), ({"beta1": 1.0}, "beta1"), ({"beta2": -1}, "beta2"),
     ({"interval_steps": 0}, "interval_steps"), ({"interval_steps": 1.5}, "interval_steps"),
     ({"orth_weight": -0.1}, "orth_weight"), ({"orth": ""}, "orth"), ({"warmup": -1}, "warmup"),
     ({"final": 1.0}, "final")],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(changes, key):
    with pytest.raises(ConfigError, match=rf"^rank\.{key}="):
        AdaLoRA(**{**SETTINGS, **changes})


def test_a_schedule_that_does_not_fit_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="warmup 20 \\+ final 40 = 60 steps leave nothing of the run's 60"):
        build(warmup=20, final=40)
    assert isinstance(AdaLoRA(target_r=2, warmup=20, final=39).schedule(60, None, 22, 8), Schedule)


def test_a_target_above_the_initial_rank_is_refused():
    with pytest.raises(ConfigError, match="at most the initial rank, 5\\.5 on average; the budget only shrinks"):
        build(target_r=6)


def test_scores_that_are_not_finite_are_refused_with_the_site():
    rails = Rails(RANKS, STEPS)
    rails.grads["b"]["B"][3, 0, 2] = torch.inf
    with pytest.raises(SelectionError, match="the sensitivity of b is not finite"):
        Host(rails, build()).run()
