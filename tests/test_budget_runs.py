"""A budget is met by what a real run measured, within one per cent below."""

from __future__ import annotations

import pytest

import short_runs as runs
from marks import slow
from trimtab import AdaLoRA, AFLoRA, Budget, SalientLoRA
from trimtab.errors import BudgetError, ConfigError

SALIENT = SalientLoRA(target_r=1, warmup=4, allocation=24, initial_window=4, final_window=8)
AFLORA = AFLoRA(warmup=4, final=12, interval_steps=2, rule="tensor_rank")


@pytest.mark.parametrize(
    ("budget", "methods"),
    [
        (Budget(final_params=9000), {"rank": SALIENT}),
        slow(Budget(final_params=9000), {"rank": AdaLoRA(target_r=1, warmup=4, final=14, interval_steps=5)}),
        slow(Budget(average_params=7000), {"freeze": AFLORA}),
        slow(Budget(average_params=9500), {"rank": SALIENT}),
        (Budget(average_params=6000), {"rank": SALIENT, "freeze": AFLORA}),
        (Budget(final_params=9000), {"rank": SALIENT, "trainable_token_indices": [1, 2, 3]}),
    ],
)
def test_the_measured_figure_is_at_most_the_budget_and_nearly_all_of_it(tmp_path, budget, methods):
    # one rank costs less than a hundredth of the budget, so that a miss is no matter of granularity
    options = {"rank": None, "freeze": None} | methods
    model = runs.model_for("bert", "salientlora", r=12, budget=budget, **options)
    callback, _ = runs.train(model, "bert", tmp_path, save_strategy="no")
    figures = callback.controller.figures()
    limit = budget.final_params or budget.average_params
    measured = figures["held"] if budget.final_params else figures["average"]
    assert 0.99 * limit <= measured <= limit, figures


def test_an_infeasible_budget_names_the_smallest_that_can_be_met(tmp_path):
    model = runs.model_for("bert", "salientlora", budget=Budget(final_params=10))
    with pytest.raises(BudgetError, match=r"budget.final_params=10: at least \d+"):
        runs.train(model, "bert", tmp_path)


@pytest.mark.parametrize("method", ["sora", "aflora"])  # aflora's default rule is element_quantile
def test_methods_that_cannot_be_held_to_a_number_are_refused(tmp_path, method):
    model = runs.model_for("bert", method, budget=Budget(average_params=3000))
    with pytest.raises(ConfigError, match=r"rank.method|freeze.rule"):
        runs.train(model, "bert", tmp_path)
