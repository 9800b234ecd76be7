import pytest
import torch

from trimtab.errors import TrimtabError
from trimtab.rank.topk import keep_top


def test_exactly_the_budget_survives_a_tie_and_the_lower_index_wins():
    assert keep_top(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]
    assert keep_top(torch.zeros(1000), 7).nonzero().flatten().tolist() == list(range(7))


@pytest.mark.parametrize("budget", [0, 1, 37, 99, 100, 250])
def test_the_highest_scores_survive(budget):
    scores = torch.randn(100, generator=torch.Generator().manual_seed(budget))
    keep = keep_top(scores, budget)
    assert keep.sum() == min(budget, 100)
    if 0 < budget < 100:
        assert scores[keep].min() >= scores[~keep].max()


def test_infinite_scores_are_ranked_and_nan_is_refused():
    assert keep_top(torch.tensor([-torch.inf, 0.0, torch.inf]), 1).tolist() == [False, False, True]
    with pytest.raises(TrimtabError, match="1 of 3 scores are NaN"):
        keep_top(torch.tensor([0.0, torch.nan, 1.0]), 1)


@pytest.mark.parametrize("scores, budget", [(torch.zeros(2, 2), 1), (torch.zeros(3), -1), (torch.zeros(3), 1.5),
                                            (torch.zeros(3), True)])  # fmt: skip
def test_what_is_no_scores_or_no_budget_is_refused(scores, budget):
    with pytest.raises(TrimtabError):
        keep_top(scores, budget)


def test_with_costs_the_best_stay_while_they_fit_and_the_cheapest_fill_the_rest():
    scores, costs = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0]), [5, 5, 5, 3, 1, 3]
    # 5 + 5 fit into 12, the third would not; 2 are left and only the entry of cost 1 goes in
    assert keep_top(scores, 12, costs).tolist() == [True, True, False, False, True, False]
    # 14: 1 and then, of the two of cost 3, the better one
    assert keep_top(scores, 14, costs).tolist() == [True, True, False, True, True, False]
    assert keep_top(scores, 22, costs).all()
    assert not keep_top(scores, 0, costs).any()


def test_with_equal_costs_the_budget_counts_ranks():
    scores = torch.randn(50, generator=torch.Generator().manual_seed(0))
    for ranks in range(0, 51, 10):
        assert torch.equal(keep_top(scores, 7 * ranks + 3, [7] * 50), keep_top(scores, ranks))


def test_costs_are_never_exceeded_and_nothing_that_fits_is_left_out():
    g = torch.Generator().manual_seed(1)
    for _ in range(50):
        scores, costs = torch.randn(40, generator=g), torch.randint(1, 9, (40,), generator=g)
        budget = int(torch.randint(0, 200, (), generator=g))
        keep = keep_top(scores, budget, costs)
        spent = int(costs[keep].sum())
        assert spent <= budget
        assert keep.all() or spent + int(costs[~keep].min()) > budget


@pytest.mark.parametrize("costs", [[1, 0, 1], [1, 1], [1.0, 1.0, 1.0]])
def test_costs_that_make_no_sense_are_refused(costs):
    with pytest.raises(TrimtabError, match="costs"):
        keep_top(torch.zeros(3), 1, costs)
