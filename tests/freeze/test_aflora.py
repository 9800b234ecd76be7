"""AFLoRA: the published schedule and rule, the released code's decisions, and its defects avoided."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.adapters.lowrank import delta_weight, fold, lowrank_delta
from trimtab.errors import ConfigError, TrimtabError
from trimtab.freeze.aflora import (
    AFLoRA,
    FreezingRule,
    below_quantile,
    lowest_ranked,
    mean_scores,
    trainable_fraction,
)

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).parents[3] / "shared/data")
PARITY = DATA / "parity/aflora"
PAPER = {"start": "svd", "warmup": "auto", "final": 0.7}


def freezer(gradients, total_steps=200, steps_per_epoch=10, **settings):
    sizes = {name: g[0].numel() for name, g in gradients.items()}
    return AFLoRA(**PAPER | settings).build(sizes, total_steps, steps_per_epoch)


def run(rule, gradients, steps):
    """Step at which each tensor freezes."""
    frozen_at = {}
    for step in steps:
        rule.observe(step, {name: g[step] for name, g in gradients.items() if name not in frozen_at})
        frozen_at |= dict.fromkeys(rule.decide(step), step)
    return frozen_at


def random_gradients(total_steps=200, sites=3, r=4, dim=6, seed=0):
    """Gradients of a toy run: every tensor has its own size and fades at its own pace."""
    generator = torch.Generator().manual_seed(seed)
    time = torch.arange(total_steps)[:, None, None]
    gradients = {}
    for i in range(sites):
        for j, (part, shape) in enumerate((("lora_A", (r, dim)), ("lora_B", (dim + i, r)))):
            noise = torch.randn(total_steps, *shape, generator=generator)
            gradients[f"layer.{i}.dense.{part}"] = noise * (1 + j + i) * torch.exp(-time / (20 + 30 * i))
    return gradients


# -- oracles -------------------------------------------------------------------------------------------


def test_delta_of_a_small_layer_is_the_one_worked_out_by_hand():
    A, B = torch.tensor([[1.0, 0, 2], [0, 1, -1]]), torch.tensor([[1.0, 0], [2, 1], [0, -3]])
    e, b, x = torch.tensor([0.1, 0.1]), torch.tensor([0.5, -1, 2]), torch.tensor([1.0, -2, 3])
    # A x = [7, -5]; e ⊙ = [.7, -.5]; B · = [.7, .9, 1.5]; b ⊙ = [.35, -.9, 3]
    scale = AFLoRA(**PAPER).scale(alpha=16, r=2)
    torch.testing.assert_close(lowrank_delta(x, A, B, scale, e, b), torch.tensor([0.35, -0.9, 3]))
    expected = torch.tensor([[0.05, 0, 0.1], [-0.2, -0.1, -0.3], [0, -0.6, 0.6]])
    torch.testing.assert_close(delta_weight(A, B, scale, e, b), expected)
    folded_A, folded_B = fold(A.double(), B.double(), e.double(), b.double())
    torch.testing.assert_close(folded_B @ folded_A, expected.double(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "step, left", [(10, 1), (11, 0.941192), (20, 0.512), (35, 0.125), (50, 0.008), (60, 0), (61, 0)]
)
def test_cubic_schedule_of_twenty_epochs(step, left):
    assert trainable_fraction(step, 200, 10, 140) == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("step, left", [(300, 1), (400, 0.9375), (500, 0.75), (600, 0.4375), (700, 0), (701, 0)])
def test_quadratic_schedule(step, left):
    assert trainable_fraction(step, 1000, 300, 300, "quadratic") == pytest.approx(left)


def test_defaults_are_the_phases_of_the_papers_runs():
    assert AFLoRA(**PAPER).phases(200, 10) == (10, 140)  # 20 epochs: 1 and 14
    assert AFLoRA(**PAPER).phases(100, 10) == (10, 70)  # 10 epochs: 1 and 7


def test_score_of_one_scalar_over_three_windows():
    gradients = [1.0, -3, 2, 4, -4, 4, 0, 0, 0, 1]
    rule = AFLoRA(**PAPER, interval_steps=3).build({"p": 1}, 100, 10)
    seen = {}
    for step, g in enumerate(gradients):
        rule.observe(step, {"p": torch.tensor([g], dtype=torch.float64)})
        seen[step] = [float(state["p"]) for state in (rule._mean, rule._uncertainty)]
    assert seen[3] == pytest.approx([0.3, 0.085])
    assert seen[6] == pytest.approx([0.855, 0.238])
    assert seen[9] == pytest.approx([0.72675, 0.2624375])
    assert rule._means(["p"])["p"] == pytest.approx(0.1907264531)


SCORES = {
    "A1": torch.full((4,), 0.1),
    "B1": torch.tensor([0.2, 0.2, 0.2, 5]),
    "A2": torch.full((4,), 1.0),
    "B2": torch.tensor([0.3, 0.4, 0.5, 0.6]),
}


@pytest.mark.parametrize("left, frozen", [(0.75, set()), (0.5, {"A1"}), (0.25, {"A1", "B2"}), (0, set(SCORES))])
def test_element_quantile_freezes_the_tensors_whose_mean_is_below_it(left, frozen):
    assert set(below_quantile(SCORES, left)) == frozen


def test_tensor_rank_freezes_an_exact_number_of_tensors():
    means = mean_scores(SCORES)
    assert lowest_ranked(means, 0, 4, 0.25) == ["A1", "B2", "A2"]  # 3 of 4; means .1, .45, 1, 1.4
    assert lowest_ranked(means, 2, 6, 0.4) == ["A1"]  # ⌊3.6⌋ in all, two of them long frozen
    assert lowest_ranked({"a": 0.0, "b": 0.0}, 0, 2, 0.3) == ["a"]  # ⌊(1 - .3) 2⌋; the tie goes to the first


def test_first_backward_reaches_only_the_output_vector():
    A, B, e, b = torch.empty(4, 12), torch.empty(8, 4), torch.empty(4), torch.empty(8)
    AFLoRA(**PAPER).init_factors(A, e, b, B, torch.Generator().manual_seed(0))
    for p in (A, B, e, b):
        p.requires_grad_()
    y = b * (torch.randn(5, 12) @ A.T * e @ B.T)
    assert not y.any()
    (y - 1).square().sum().backward()
    assert not A.grad.any() and not B.grad.any() and not e.grad.any()
    assert b.grad.all()


def test_start_values_have_the_papers_bounds():
    A, B, e, b = torch.empty(4, 768), torch.empty(768, 4), torch.empty(4), torch.empty(768)
    AFLoRA(**PAPER).init_factors(A, e, b, B, torch.Generator().manual_seed(0))
    assert 0.087 < A.abs().max() <= 0.0883884
    assert 1.22 < B.abs().max() <= 1.2247449
    assert e.tolist() == pytest.approx([0.1] * 4) and not b.any()


def test_scale_ignores_alpha_unless_asked():
    assert AFLoRA(**PAPER).scale(64, 32) == 1
    assert AFLoRA(**PAPER, scaling="alpha/r").scale(64, 32) == 2


# -- the released code ---------------------------------------------------------------------------------


def parity_settings(released):
    s = released["settings"]
    return (
        AFLoRA(
            warmup=f"{s['initial_warmup_epochs']}ep",
            final=f"{s['final_warmup_epochs']}ep",
            interval_steps=s["interval_steps"],
            beta1=s["beta1"],
            beta2=s["beta2"],
        ),
        s["total_steps"],
        s["total_steps"] // s["epochs"],
    )


@pytest.mark.skipif(not PARITY.exists(), reason="needs shared/data beside the checkout, or $TRIMTAB_DATA")
@pytest.mark.parametrize("case", ["a", "b"])
def test_every_tensor_freezes_at_the_step_at_which_the_released_code_freezes_it(case):
    gradients = load_file(PARITY / case / "gradients.safetensors")
    released = json.loads((PARITY / case / "released.json").read_text())
    settings, total_steps, steps_per_epoch = parity_settings(released)
    rule = FreezingRule(settings, total_steps, steps_per_epoch)
    frozen_at = {}
    for step in range(total_steps):
        frozen_at |= dict.fromkeys(rule.observe(step, {name: g[step] for name, g in gradients.items()}), step)
    assert frozen_at == released["frozen_at"]


def plain_rule(gradients, total, t_i, t_f, dt, b1, b2):
    """The rule once more, written from the paper's formulas without tensors or shared code."""
    state = {name: [[0.0] * len(g[0]), [0.0] * len(g[0]), [0.0] * len(g[0])] for name, g in gradients.items()}
    frozen_at = {}
    for t in range(total):
        for name, (window, mean, dev) in state.items():
            for i, value in enumerate(gradients[name][t]):
                if t % dt == 0:
                    mean[i] = b1 * mean[i] + (1 - b1) * window[i]
                    dev[i] = b2 * dev[i] + (1 - b2) * abs(window[i] - mean[i])
                    window[i] = abs(value)
                else:
                    window[i] = (window[i] * (t % dt) + abs(value)) / (t % dt + 1)
        r = 1 if t <= t_i else 0 if t > total - t_f else (1 - (t - t_i) / (total - t_i - t_f)) ** 3
        if not (r == 0 or (r < 1 and t % dt == 0)):
            continue
        score = {name: [m * d for m, d in zip(mean, dev)] for name, (_, mean, dev) in state.items()}
        pool = sorted(s for values in score.values() for s in values)
        k = int(len(pool) * (1 - r))
        for name, values in score.items():
            if r == 0 or (k > 0 and sum(values) / len(values) < pool[k - 1]):
                frozen_at[name] = t
        state = {name: s for name, s in state.items() if name not in frozen_at}
    return frozen_at


@pytest.mark.parametrize("seed", range(4))
def test_freezes_as_the_formulas_say(seed):
    gradients = {name: g.double() for name, g in random_gradients(seed=seed).items()}
    flat = {name: g.flatten(1).tolist() for name, g in gradients.items()}
    expected = plain_rule(flat, 200, 10, 100, 7, 0.85, 0.95)
    rule = freezer(gradients, warmup="1ep", final=0.5, interval_steps=7)
    assert run(rule, gradients, range(200)) == expected
    assert len(set(expected.values())) > 2  # several events took part


# -- what the released code gets wrong -----------------------------------------------------------------


def test_nothing_freezes_where_the_quantile_is_below_the_first_element():
    assert below_quantile({"p": torch.ones(3)}, 0.9) == []  # k = ⌊0.3⌋


def test_scores_that_all_tie_still_freeze_at_the_end():
    gradients = {"a.lora_A": torch.zeros(200, 4, 3), "a.lora_B": torch.zeros(200, 3, 4)}
    rule = freezer(gradients)
    assert run(rule, gradients, range(200)) == {"a.lora_A": 60, "a.lora_B": 60}  # T - t_f: r = 0


@pytest.mark.parametrize("total_steps", [3, 5, 9, 10, 11, 37, 200, 1001])
@pytest.mark.parametrize("rule", ["element_quantile", "tensor_rank"])
def test_default_phases_fit_any_run_and_end_with_everything_frozen(total_steps, rule):
    gradients = random_gradients(total_steps, sites=1)
    built = freezer(gradients, total_steps, max(total_steps // 3, 1), rule=rule)
    frozen_at = run(built, gradients, range(total_steps))
    last = total_steps - math.floor(0.7 * total_steps + 1e-9) + 1
    assert set(frozen_at) == set(gradients)
    assert max(frozen_at.values()) <= last


def test_a_projection_without_gradient_freezes_first():
    gradients = random_gradients()
    del gradients["layer.0.dense.lora_A"]
    sizes = {name: g[0].numel() for name, g in gradients.items()}
    rule = AFLoRA(**PAPER, rule="tensor_rank").build({"layer.0.dense.lora_A": 24, **sizes}, 200, 10)
    frozen_at = run(rule, gradients, range(200))
    assert frozen_at.pop("layer.0.dense.lora_A") == 20  # the first event
    assert 20 in frozen_at.values()  # ⌊(1 - .512) 6⌋ = 2 of them
    assert max(frozen_at.values()) > 20


def test_gradients_that_are_not_finite_are_named():
    gradients = random_gradients()
    gradients["layer.1.dense.lora_B"][5, 0, 0] = math.nan
    with pytest.raises(TrimtabError, match=r"layer\.1\.dense\.lora_B"):
        run(freezer(gradients), gradients, range(200))


def test_a_skipped_step_at_an_event_delays_it():
    gradients = random_gradients()
    assert 20 in run(freezer(gradients, rule="tensor_rank"), gradients, range(200)).values()
    steps = [step for step in range(200) if step != 20]
    assert 21 in run(freezer(gradients, rule="tensor_rank"), gradients, steps).values()


def test_accumulated_micro_batches_decide_like_one_large_batch():
    """4 micro-batches of 8 rows and one batch of 32 give the same gradient, and the same freezes."""
    torch.manual_seed(0)
    x, y = torch.randn(60, 32, 6, dtype=torch.float64), torch.randn(60, 32, 6, dtype=torch.float64)

    def train(n_micro):
        torch.manual_seed(1)
        factors = {
            f"{site}.lora_{m}": torch.randn(shape, dtype=torch.float64, requires_grad=True)
            for site in ("fc1", "fc2")
            for m, shape in (("A", (2, 6)), ("B", (6, 2)))
        }
        sizes = {name: p.numel() for name, p in factors.items()}
        rule = AFLoRA(warmup=5, final=20, interval_steps=5).build(sizes, 60, 10)
        scale = torch.ones(6, dtype=torch.float64, requires_grad=True)  # trains to the end
        frozen_at = {}
        for step in range(60):
            for xs, ys in zip(x[step].chunk(n_micro), y[step].chunk(n_micro)):
                hidden = torch.tanh(xs @ factors["fc1.lora_A"].T @ factors["fc1.lora_B"].T)
                out = hidden @ factors["fc2.lora_A"].T @ factors["fc2.lora_B"].T * scale
                ((out - ys).square().mean() / n_micro).backward()
            gradients = {n: p.grad.clone() for n, p in factors.items() if n not in frozen_at}
            with torch.no_grad():
                for p in factors.values():
                    if p.grad is not None:
                        p -= 0.1 * p.grad
                    p.grad = None
            rule.observe(step, gradients)
            for name in rule.decide(step):
                frozen_at[name] = step
                factors[name].requires_grad_(False)
        return frozen_at

    assert train(4) == train(1)
    assert len(set(train(1).values())) > 1


# -- sites, phases, settings ---------------------------------------------------------------------------


def test_only_named_projections_train():
    paper = AFLoRA(trainable_projections=["intermediate.dense", r"layer\.\d+\.output.dense"])
    assert not paper.initially_frozen("deberta.encoder.layer.3.intermediate.dense")
    assert not paper.initially_frozen("deberta.encoder.layer.11.output.dense")
    assert paper.initially_frozen("deberta.encoder.layer.3.attention.output.dense")
    assert paper.initially_frozen("deberta.encoder.layer.3.attention.self.query_proj")
    assert not AFLoRA(trainable_projections=["up_proj"]).initially_frozen("layers.0.mlp.up_proj")
    assert AFLoRA(trainable_projections=["up_proj"]).initially_frozen("layers.0.mlp.setup_proj")
    assert AFLoRA(trainable_projections=[]).initially_frozen("anything")
    assert not AFLoRA(**PAPER).initially_frozen("anything")


def test_a_pattern_that_matches_no_site_is_refused():
    with pytest.raises(ConfigError, match="matches none of the 1 adapted sites"):
        AFLoRA(trainable_projections=["up_proj"]).check_sites(["layers.0.mlp.down_proj"])


@pytest.mark.parametrize(
    "wrong, key",
    [
        ({"final": 1.0}, "freeze.final"),
        ({"warmup": 1.0}, "freeze.warmup"),
        ({"warmup": "soon"}, "freeze.warmup"),
        ({"interval_steps": 0}, "freeze.interval_steps"),
        ({"beta1": 1.0}, "freeze.beta1"),
        ({"beta2": -0.1}, "freeze.beta2"),
        ({"schedule": "linear"}, "freeze.schedule"),
        ({"rule": "mean"}, "freeze.rule"),
        ({"scaling": "r"}, "freeze.scaling"),
        ({"trainable_projections": "mlp"}, "freeze.trainable_projections"),
        ({"trainable_projections": ["("]}, "freeze.trainable_projections"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(wrong, key):
    with pytest.raises(ConfigError) as error:
        AFLoRA(**wrong)
    assert error.value.key == key


def test_phases_that_do_not_fit_are_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"60 \+ final 140 .* 200"):
        AFLoRA(**PAPER | {"warmup": 60}).build({}, 200, 10)


def test_predicted_fractions_in_closed_form():
    assert AFLoRA(**PAPER).average_fraction(2000, 100, closed_form=True) == pytest.approx(0.1125)  # 20 epochs
    assert AFLoRA(**PAPER).average_fraction(2000, 200, closed_form=True) == pytest.approx(0.15)  # 10 epochs
    gsm8k = AFLoRA(warmup=0.3, final=0.3, schedule="quadratic")
    assert gsm8k.average_fraction(1000, 333, closed_form=True) == pytest.approx(0.5667, abs=5e-5)


def test_predicted_curve_counts_the_discrete_events():
    # events at 20, 30, 40, 50 and 60, each in force from the next step on
    curve = AFLoRA(**PAPER).trainable_curve(200, 10)
    assert curve == [
        (0, 1.0),
        *((step, pytest.approx(left)) for step, left in ((21, 0.512), (31, 0.216), (41, 0.064), (51, 0.008), (61, 0))),
    ]
    assert AFLoRA(**PAPER).average_fraction(200, 10) == pytest.approx((21 + 10 * 0.8) / 200)


def test_discrete_average_nears_the_closed_form_in_long_runs():
    assert AFLoRA(**PAPER).average_fraction(100_000, 5_000) == pytest.approx(0.1125, abs=1e-4)


# -- ranks, resume -------------------------------------------------------------------------------------


def test_scores_of_a_pruned_rank_vanish_with_it():
    """Cutting a rank leaves the very scores of a run that never had it."""
    gradients = random_gradients(sites=2)
    keep = torch.tensor([True, False, True, False])
    small = {n: g[:, keep] if n.endswith("A") else g[:, :, keep] for n, g in gradients.items()}
    cut, never = freezer(gradients), freezer(small)
    for step in range(34):
        now = gradients if step < 25 else small
        cut.observe(step, {n: g[step] for n, g in now.items()})
        never.observe(step, {n: g[step] for n, g in small.items()})
        if step == 24:
            cut.pruned({"layer.0.dense": keep, "layer.1.dense": keep})
    ours, theirs = cut._scores(cut.trainable), never._scores(never.trainable)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert cut.numels == never.numels


def test_a_site_cut_to_rank_zero_is_neither_scored_nor_frozen():
    gradients = random_gradients(sites=2)
    rule = freezer(gradients, rule="tensor_rank")
    for step in range(15):
        rule.observe(step, {n: g[step] for n, g in gradients.items()})
        rule.decide(step)
    rule.pruned({"layer.0.dense": torch.zeros(4, dtype=torch.bool)})
    rule.pruned({"layer.0.dense": torch.zeros(0, dtype=torch.bool)})  # a later cut elsewhere
    rest = {n: g for n, g in gradients.items() if "layer.1" in n}
    assert set(run(rule, rest, range(15, 200))) == set(rest)


@pytest.mark.parametrize("rule", ["element_quantile", "tensor_rank"])
def test_a_run_resumed_inside_a_window_freezes_as_the_unbroken_one(rule, tmp_path):
    gradients = random_gradients()
    whole = run(freezer(gradients, rule=rule), gradients, range(200))
    first = freezer(gradients, rule=rule)
    before = run(first, gradients, range(37))  # the open window holds seven steps
    assert before and set(before) != set(whole)
    tensors, meta = first.state_dict()
    save_file(tensors, tmp_path / "state.safetensors")
    (tmp_path / "state.json").write_text(json.dumps(meta))
    second = freezer(gradients, rule=rule)
    meta = json.loads((tmp_path / "state.json").read_text())
    second.load_state_dict(load_file(tmp_path / "state.safetensors"), meta)
    assert second.frozen == set(before)
    rest = {name: g for name, g in gradients.items() if name not in before}
    assert before | run(second, rest, range(37, 200)) == whole


def test_frozen_tensors_hold_no_state():
    gradients = random_gradients()
    rule = freezer(gradients)
    run(rule, gradients, range(200))
    assert rule.state_dict()[0] == {}


def test_low_precision_gradients_are_averaged_in_float32():
    rule = AFLoRA(**PAPER).build({"p": 2}, 200, 10)
    rule.observe(0, {"p": torch.ones(2, dtype=torch.bfloat16)})
    assert rule._window["p"].dtype == torch.float32
