"""GoRA against autograd and numpy, in the paper's own shapes, and its first step by what it does to the loss."""

from __future__ import annotations

import math

import numpy as np
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import tiny
import trimtab
from trimtab import Controller, GoRA, TrimConfig
from trimtab.errors import ConfigError, DataError, SelectionError
from trimtab.host.layers import hosted_layers
from trimtab.rank import make
from trimtab.rank.gora import first_step, give_out


def adapted(family: str = "llama", rank=None, **options) -> peft.PeftModel:
    base, fam = tiny.build(family), tiny.FAMILIES[family]
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type)
    return peft.get_peft_model(base, TrimConfig(rank=rank or GoRA(), **settings | options))


def batches(family: str, n: int = 6) -> list[dict[str, torch.Tensor]]:
    return [tiny.batch(family, seed=seed) for seed in range(n)]


def mean_loss(model: nn.Module, family: str) -> float:
    with torch.no_grad():
        return sum(float(model.eval()(**batch).loss) for batch in batches(family)) / 6


# -- an independent plain implementation ------------------------------------------------------------------


def by_hand(family: str, names: list[str]) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Mean gradients of a plain base model's weights, (in, out) as in the paper, and mean|W ⊙ Ḡ|."""
    base = tiny.build(family).eval()
    modules = {name: base.get_submodule(name) for name in names}
    sums = dict.fromkeys(names, 0.0)
    for batch in batches(family):
        found = torch.autograd.grad(base(**batch).loss, [m.weight for m in modules.values()])
        for name, gradient in zip(names, found):
            sums[name] = sums[name] + gradient.double().numpy()
    gradients, importance = {}, {}
    for name, module in modules.items():
        transposed = isinstance(module, nn.Linear)  # GPT-2's Conv1D holds (in, out) already
        W = module.weight.detach().double().numpy()
        G = sums[name] / 6
        gradients[name] = G.T if transposed else G
        importance[name] = float(np.mean(np.abs(W * G)))
    return gradients, importance


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5"])
def test_importance_and_first_step_are_those_of_the_formulas(family):
    gamma, alpha, r0 = 0.3, 8, 4
    model = adapted(family, rank=GoRA(gamma=gamma))
    started = trimtab.initialize_ranks(model, batches(family))
    gradients, importance = by_hand(family, list(started.ranks))
    assert started.scores == pytest.approx(importance, rel=1e-4)
    for name, layer in hosted_layers(model).items():
        A, B = (p.detach().double().numpy().T for p in layer.factors("default"))  # (in, r), (r, out)
        G, r = gradients[name], started.ranks[name]
        xi = gamma * math.sqrt(len(G) / r) / (alpha / r0)
        expected = -xi * np.linalg.inv(A.T @ A) @ A.T @ G
        assert np.allclose(B, expected, atol=1e-5 * np.abs(expected).max()), name
        bound = 1 / math.sqrt(len(G))
        assert np.abs(A).max() <= bound and A.std() == pytest.approx(bound / math.sqrt(3), rel=0.25)


def test_the_step_is_as_long_as_gamma_times_the_gradient_where_the_gradient_is_noise():
    torch.manual_seed(0)
    G = torch.randn(300, 400)
    for r in (4, 64):
        A = torch.empty(r, 400)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5))
        delta = 2.0 * first_step(G, A, 0.05, scale=2.0) @ A
        assert float(delta.norm()) == pytest.approx(0.05 * float(G.norm()), rel=0.1)


# -- the sign --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "bart", "llava"])
def test_the_loss_falls_by_the_first_step_and_rises_by_its_opposite(family):
    model = adapted(family, rank=GoRA(gamma=0.05))
    before = mean_loss(model, family)
    started = trimtab.initialize_ranks(model, batches(family))
    after = mean_loss(model, family)
    assert after < before
    assert started.loss[1] == pytest.approx(float(model.eval()(**batches(family)[0]).loss), rel=1e-5)
    with torch.no_grad():
        for layer in hosted_layers(model).values():
            layer.factors("default")[1].neg_()
    assert mean_loss(model, family) > before


def test_a_step_that_is_too_long_is_told():
    assert "lower rank.gamma" in trimtab.initialize_ranks(adapted("gpt2", rank=GoRA(gamma=3000)), batches("gpt2")).told
    assert "lower rank.gamma" not in trimtab.initialize_ranks(adapted(), batches("llama")).told


# -- the allocation -----------------------------------------------------------------------------------------


def test_a_case_by_hand():
    # Budget 8 ranks of 10; a would get 6 of 3:1, b 2. With r_max 5 b takes what a may not have.
    assert give_out({"a": 3.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": (1, 16), "b": (1, 16)}, 80) == {"a": 6, "b": 2}
    assert give_out({"a": 3.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": (1, 5), "b": (1, 16)}, 80) == {"a": 5, "b": 3}
    # A site without a gradient has its fewest; where none has one, all are alike.
    assert give_out({"a": 0.0, "b": 1.0}, {"a": 10, "b": 10}, {"a": (1, 16), "b": (1, 16)}, 80) == {"a": 1, "b": 7}
    assert give_out({"a": 0.0, "b": 0.0}, {"a": 10, "b": 10}, {"a": (1, 16), "b": (1, 16)}, 80) == {"a": 4, "b": 4}


sites = st.lists(
    st.tuples(st.floats(1e-12, 1e3), st.integers(8, 5000), st.integers(2, 32)), min_size=1, max_size=40
)  # fmt: skip


@given(sites)
def test_ranks_are_proportional_within_their_limits_and_never_cost_more_than_the_budget(found):
    scores = {str(i): score for i, (score, _, _) in enumerate(found)}
    costs = {str(i): cost for i, (_, cost, _) in enumerate(found)}
    limits = {str(i): GoRA().bounds(r) for i, (_, _, r) in enumerate(found)}
    budget = sum(cost * r for _, cost, r in found)
    ranks = give_out(scores, costs, limits, budget)
    assert all(limits[name][0] <= r <= limits[name][1] for name, r in ranks.items())
    spent = sum(costs[name] * r for name, r in ranks.items())
    assert budget - sum(costs.values()) < spent <= budget
    free = {name: r / scores[name] for name, r in ranks.items() if limits[name][0] < r < limits[name][1]}
    for a in free:  # one t for all, up to a rank of each
        for b in free:
            assert abs(free[a] - free[b]) <= 1 / scores[a] + 1 / scores[b] + 1e-6 * free[a]


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_a_model_costs_what_rank_r_everywhere_would(family):
    model = adapted(family)
    before = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    started = trimtab.initialize_ranks(model, batches(family))
    after = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    dearest = max(sum(layer.widths()) for layer in hosted_layers(model).values())
    assert before - dearest < after <= before
    assert min(started.ranks.values()) >= 2 and max(started.ranks.values()) <= 16
    assert len(set(started.ranks.values())) > 1


# -- what it leaves, and what is refused ------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["peft", "padded", "merged"])
def test_the_first_step_is_part_of_every_export(format, tmp_path):
    model = adapted("bert", rank=GoRA(gamma=5.0))
    before = tiny.logits(model, "bert")
    trimtab.initialize_ranks(model, batches("bert"))
    stepped = tiny.logits(model, "bert")
    assert not torch.allclose(stepped, before, atol=1e-6)
    model.save_pretrained(tmp_path / "saved")
    saved = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "saved")
    assert torch.allclose(tiny.logits(saved, "bert"), stepped, atol=1e-6)
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, "bert"), before)
    model.merge_adapter()
    assert torch.allclose(tiny.logits(model, "bert"), stepped, atol=1e-6)
    model.unmerge_adapter()
    Controller(model, None, total_steps=1).finish()
    trimtab.export(model, tmp_path / "out", format=format)
    if format == "merged":
        loaded = type(tiny.build("bert")).from_pretrained(tmp_path / "out")
    else:
        loaded = peft.PeftModel.from_pretrained(tiny.build("bert"), tmp_path / "out")
    assert torch.allclose(tiny.logits(loaded, "bert"), stepped, atol=1e-6)


def test_labels_are_needed_and_gradients_must_be_finite():
    with pytest.raises(DataError, match="labels are needed"):
        trimtab.initialize_ranks(adapted("bert"), [{k: v for k, v in tiny.batch("bert").items() if k != "labels"}])
    with pytest.raises(DataError, match="there are none"):
        trimtab.initialize_ranks(adapted("bert"), [])
    with pytest.raises(SelectionError, match="gradient of 'a' is not finite"):
        give_out({"a": math.nan}, {"a": 1}, {"a": (1, 2)}, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"gamma": -1}, "rank.gamma=-1: .*at least 0"),
        ({"r_min": 9, "r_max": 4}, "rank.r_min=9: at most r_max=4"),
        ({"r_max": 0}, "rank.r_max=0: .*at least 1"),
        ({"gama": 1}, "gora has .*Did you mean 'gamma'"),
    ],
)
def test_settings_that_cannot_be_are_one_line(options, said):
    with pytest.raises(ConfigError, match=said):
        make("gora", options)


def test_limits_that_the_rank_of_the_config_lies_outside_of_are_refused():
    with pytest.raises(ConfigError, match=r"rank\.r_max=3: r=4 of .* lies outside"):
        trimtab.initialize_ranks(adapted(rank=GoRA(r_max=3)), batches("llama"))
    with pytest.raises(ConfigError, match=r"rank\.r_min=5: r=4 of .* lies outside"):
        trimtab.initialize_ranks(adapted(rank=GoRA(r_min=5)), batches("llama"))
