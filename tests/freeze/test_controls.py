"""Freezing at a fixed step, the table of methods, and freezing by cost."""

import doctest
import importlib
import subprocess
import sys

import pytest

from trimtab import freeze
from trimtab.errors import ConfigError
from trimtab.freeze.base import CurveSums, keep_by_cost
from trimtab.freeze.controls import FreezeAt


@pytest.mark.parametrize("at, steps", [(30, 30), (0.25, 50), ("2ep", 20), ("50%", 100)])
def test_everything_trains_for_exactly_that_many_steps(at, steps):
    settings = FreezeAt(at=at)
    freezer = settings.build({"a.lora_A": 8, "a.lora_B": 8}, 200, 10)
    frozen_at = {name: step for step in range(200) for name in freezer.decide(step)}
    assert frozen_at == {"a.lora_A": steps - 1, "a.lora_B": steps - 1}  # still updated in that step
    for closed_form in (False, True):
        assert settings.average_fraction(200, 10, closed_form) == steps / 200


@pytest.mark.parametrize("at", [0, 200, "100%", 1.0, "20ep"])
def test_a_step_outside_the_run_is_refused(at):
    with pytest.raises(ConfigError, match=r"freeze\.at"):
        FreezeAt(at=at).build({}, 200, 10)


def test_resumed_control_stays_frozen():
    freezer = FreezeAt(at=5).build({"a.lora_A": 8}, 20, 10)
    for step in range(6):
        freezer.decide(step)
    again = FreezeAt(at=5).build({"a.lora_A": 8}, 20, 10)
    again.load_state_dict(*freezer.state_dict())
    assert again.frozen == {"a.lora_A"} and again.decide(6) == set()


@pytest.mark.parametrize("name", freeze.METHODS)
def test_every_method_in_the_table_exists_and_knows_its_name_and_source(name):
    found = freeze.load(name)
    assert found.method == name and found.paper == freeze.METHODS[name].paper


def test_unknown_method_names_the_nearest():
    with pytest.raises(ConfigError, match="Did you mean 'aflora'"):
        freeze.load("afora")
    with pytest.raises(ConfigError, match="Did you mean 'interval_steps'"):
        freeze.make("aflora", {"interval": 5})
    with pytest.raises(ConfigError, match=r"freeze\.at.*needed"):
        freeze.make("at", {})


def test_reading_the_table_needs_no_torch():
    code = "import sys, trimtab.freeze; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "scores, costs, limit, kept",
    [
        ([3, 2, 1], [5, 5, 5], 15, [1, 1, 1]),
        ([3, 2, 1], [5, 5, 5], 14, [1, 1, 0]),
        ([3, 2, 1], [5, 8, 2], 7, [1, 0, 1]),  # the second does not fit: filled with the cheapest
        ([1, 2, 3], [1, 9, 4], 6, [1, 0, 1]),
        ([0, 0, 0], [4, 4, 4], 8, [1, 1, 0]),  # ties go to the first
        ([1, 1], [4, 4], 3, [0, 0]),
    ],
)
def test_items_are_kept_by_score_while_they_fit_then_the_cheapest(scores, costs, limit, kept):
    assert keep_by_cost(scores, costs, limit) == [bool(k) for k in kept]


@pytest.mark.parametrize(
    "module",
    ["trimtab.registry", "trimtab.freeze.base", "trimtab.freeze.aflora", "trimtab.budget", "trimtab.adapters.vera"],
)
def test_examples_in_docstrings_hold(module):
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted and not result.failed


def test_sums_of_a_step_function():
    sums = CurveSums([(0, 1.0), (3, 0.5), (7, 0.0)], 10)
    values = [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0, 0, 0]
    assert [sums.at(s) for s in range(10)] == values
    assert [sums.after(s) for s in range(11)] == [sum(values[s:]) for s in range(11)]
