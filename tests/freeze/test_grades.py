"""GradES against a plain loop over steps, and against what the paper and its package say."""

import math

import pytest
import torch

from trimtab import Budget, GradES, TrimConfig
from trimtab.errors import ConfigError, TrimtabError
from trimtab.freeze.grades import MOVEMENTS

STEPS, INTERVAL, BEFORE = 60, 5, 20
SHAPES = {f"{site}.lora_{which}": shape for site in "abc" for which, shape in (("A", (2, 5)), ("B", (4, 2)))}
NUMELS = {name: math.prod(shape) for name, shape in SHAPES.items()}


def course(seed=0):
    """Gradients and weights of three sites, of which each settles at another time, and one (c) never does."""
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    for step in range(STEPS):
        size = {"a": 1 if step < 22 else 0.1, "b": math.exp(-step / 20), "c": 1.0}
        gradients = {n: size[n[0]] * torch.randn(s, generator=generator) for n, s in SHAPES.items()}
        weights = {name: weights[name] - 0.1 * gradients[name] for name in weights}
        yield step, gradients, weights


def plainly(movement, tau):
    """Site -> step after which it is frozen: a mean per element over each window, against that of the start."""
    moved = {site: [] for site in "abc"}
    before = None
    for _, gradients, weights in course():
        now = weights if movement == "weight_change" else gradients
        for site in "abc":
            names = [name for name in SHAPES if name[0] == site]
            if movement == "gradient":
                total = sum(float(now[n].abs().sum()) for n in names)
            else:
                total = math.nan if before is None else sum(float((now[n] - before[n]).abs().sum()) for n in names)
            moved[site].append(total / sum(NUMELS[n] for n in names))
        before = now
    frozen = {}
    first = 0 if movement == "gradient" else 1  # a change needs two steps
    for end in range(INTERVAL, STEPS + 1, INTERVAL):
        if end <= BEFORE:
            continue
        for site, values in moved.items():
            early = values[first:BEFORE]
            late = values[end - INTERVAL : end]
            if site not in frozen and sum(late) / len(late) < tau * sum(early) / len(early):
                frozen[site] = end - 1
    return frozen


@pytest.mark.parametrize("movement", MOVEMENTS)
@pytest.mark.parametrize("tau", [0.2, 0.5])
def test_sites_freeze_when_a_plain_loop_says_so(movement, tau):
    settings = GradES(movement=movement, tau=tau, alpha=BEFORE, interval_steps=INTERVAL)
    freezer = settings.build(NUMELS, STEPS, None)
    found = {}
    for step, gradients, weights in course():
        freezer.observe(step, weights if freezer.reads_weights else gradients)
        is_due = freezer.is_due(step)
        for name in freezer.decide(step):
            assert is_due  # processes compare their answers
            found.setdefault(name[0], set()).add((name, step))
    expected = plainly(movement, tau)
    assert "c" not in expected and "a" in expected
    assert found == {site: {(n, step) for n in SHAPES if n[0] == site} for site, step in expected.items()}


def test_neither_the_size_of_a_tensor_nor_that_of_the_loss_moves_the_threshold():
    frozen = []
    for factor in (1.0, 1e-3):
        freezer = GradES(alpha=BEFORE, interval_steps=INTERVAL).build(NUMELS, STEPS, None)
        events = []
        for step, gradients, _ in course():
            freezer.observe(step, {name: factor * g for name, g in gradients.items()})
            events += [(step, name) for name in sorted(freezer.decide(step))]
        frozen.append(events)
    assert frozen[0] == frozen[1] != []


def test_the_site_that_moves_most_trains_on_where_all_have_settled():
    freezer = GradES(tau=100, alpha=BEFORE, interval_steps=INTERVAL).build(NUMELS, STEPS, None)
    for step, gradients, _ in course():
        freezer.observe(step, gradients)
        freezer.decide(step)
    assert {name[0] for name in freezer.trainable} == {"c"}


def test_from_the_latest_step_on_everything_is_frozen():
    freezer = GradES(tau=1e-9, alpha=BEFORE, interval_steps=INTERVAL, latest=41).build(NUMELS, STEPS, None)
    for step, gradients, _ in course():
        freezer.observe(step, gradients)
        freezer.decide(step)
        assert bool(freezer.trainable) == (step < 40)


@pytest.mark.parametrize("movement", MOVEMENTS)
def test_a_resumed_freezer_decides_as_the_one_that_went_on(movement):
    settings = GradES(movement=movement, alpha=BEFORE, interval_steps=INTERVAL)
    whole, part = (settings.build(NUMELS, STEPS, None) for _ in range(2))
    decided, again = [], []
    for step, gradients, weights in course():
        values = weights if whole.reads_weights else gradients
        if step == 23:
            tensors, meta = part.state_dict()
            part = settings.build(NUMELS, STEPS, None)
            part.load_state_dict(tensors, meta)
        for freezer, events in ((whole, decided), (part, again)):
            freezer.observe(step, values)
            events.append(freezer.decide(step))
    assert decided == again and any(decided)


def test_a_cut_of_ranks_is_followed():
    freezer = GradES(alpha=BEFORE, interval_steps=INTERVAL).build(NUMELS, STEPS, None)
    keep = torch.tensor([True, False])
    for step, gradients, _ in course():
        if step > 30:
            gradients = {
                name: (g[keep] if name.endswith("A") else g[:, keep]) if name[0] == "c" else g
                for name, g in gradients.items()
            }
        freezer.observe(step, gradients)
        freezer.decide(step)
        if step == 30:
            freezer.pruned({"c": keep})
    assert freezer.numels["c.lora_A"] == 5 and {name[0] for name in freezer.trainable} == {"c"}
    assert 0.5 < freezer.movements()["c.lora_A"] < 2  # per element: half as many are no settling


def test_gradients_that_are_no_numbers_are_said():
    freezer = GradES(alpha=BEFORE, interval_steps=INTERVAL).build(NUMELS, STEPS, None)
    with pytest.raises(TrimtabError, match=r"movement of 'a\.lora_A' is not finite"):
        for step, gradients, _ in course():
            freezer.observe(step, {name: g * (math.nan if step == 24 else 1) for name, g in gradients.items()})
            freezer.decide(step)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"movement": "weights"}, "gradient_change or gradient or weight_change"),
        ({"tau": 0}, "a number above 0"),
        ({"tau": True}, "a number above 0"),
        ({"interval_steps": 0}, "at least 1"),
        ({"alpha": 1}, "2 to 59 can be met"),
        ({"alpha": "100%"}, "2 to 59 can be met"),
        ({"latest": "200%"}, r"freeze\.latest"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        GradES(**options).build(NUMELS, STEPS, None)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_is_too_short_for_any_setting_is_told_how_long_one_is(steps):
    with pytest.raises(ConfigError, match=f"of the run's {steps} steps; it takes a run of at least 3"):
        GradES().build(NUMELS, steps, None)


def test_a_budget_holds_whether_sites_settle_or_not():
    settings = GradES(tau=1e-9, alpha=BEFORE, interval_steps=INTERVAL)
    for k in (10, 30, 59):
        assert settings.ramp(k, STEPS, None).average_fraction(STEPS, None) == pytest.approx((k + 1) / STEPS)
    config = TrimConfig(freeze=settings, budget=Budget(average_params=100))
    assert config.freeze.n_ramps(STEPS, None) == STEPS
