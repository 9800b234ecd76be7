"""One number over all axes: counts in closed form, the choice, and runs that end below the number."""

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from trimtab.budget import Purse, figures, rank_cost, solve
from trimtab.errors import BudgetError, ConfigError
from trimtab.freeze.aflora import AFLoRA
from trimtab.freeze.base import keep_by_cost
from trimtab.freeze.controls import FreezeAt
from trimtab.plans import Budget, Site
from trimtab.rank.adalora import AdaLoRA
from trimtab.rank.salientlora import SalientLoRA
from trimtab.rank.sora import SoRA

PAPER = {"start": "svd", "warmup": "auto", "final": 0.7}
FFN = ("intermediate.dense", r"layer\.\d+\.output.dense")


def encoder(width=768, layers=12, wide=4):
    """The linears of a BERT-like encoder."""
    kinds = {
        **dict.fromkeys(
            (
                "attention.self.query_proj",
                "attention.self.key_proj",
                "attention.self.value_proj",
                "attention.output.dense",
            ),
            (width, width),
        ),
        "intermediate.dense": (width, wide * width),
        "output.dense": (wide * width, width),
    }
    return [
        Site(f"bert.encoder.layer.{i}.{kind}", n_in, n_out, "encoder.layer", i, kind)
        for i in range(layers)
        for kind, (n_in, n_out) in kinds.items()
    ]


@dataclass(frozen=True)
class Cubic:
    """A rank method as a budget sees it: cuts every ten steps from 20 % to 60 % of the run."""

    method: ClassVar[str] = "cubic"
    target_r: float = 2
    prune: bool = True
    has_e: ClassVar[bool] = True
    starter: ClassVar[None] = None

    def prune_curve(self, total_steps, steps_per_epoch, initial_total, modules, final_total=None):
        final = math.floor(self.target_r * modules) if final_total is None else final_total
        start, end = total_steps // 5, total_steps * 3 // 5
        steps = [*range(start + 10, end, 10), end]
        return [(s, int(final + (initial_total - final) * (1 - (s - start) / (end - start)) ** 3)) for s in steps]

    budget_curve = prune_curve


# -- counts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs, average", [(20, 124_704), (10, 138_528)])
def test_closed_form_is_the_papers_average_for_deberta(epochs, average):
    steps = 134 * epochs  # CoLA
    paper = AFLoRA(**PAPER, trainable_projections=FFN)
    found = figures(encoder(), 4, None, paper, steps, 134)
    vectors, projections = 83_232, 368_640
    assert found.initial == vectors + projections
    assert found.final == vectors
    assert found.size == vectors + projections + 294_912  # the frozen attention projections are held, too
    assert found.average_closed_form == pytest.approx(average)
    assert found.average == pytest.approx(vectors + projections * paper.average_fraction(steps, 134))
    assert found.average == pytest.approx(average, rel=0.02)  # events every ten steps


def test_average_with_attention_trainable_is_the_other_published_figure():
    for epochs, average in ((20, 157_882), (10, 182_765)):
        assert round(figures(encoder(), 4, None, AFLoRA(**PAPER), 100 * epochs, 100).average_closed_form) == average


def test_plain_lora_has_one_number():
    found = figures(encoder(), 8, None, None, 100)
    assert found.initial == found.final == found.size == found.average == found.average_closed_form == 1_327_104


def test_a_rank_costs_its_row_its_column_and_its_diagonal_entry():
    assert rank_cost(Site("a", 3, 5), has_e=False) == 8 and rank_cost(Site("a", 3, 5), has_e=True) == 9


def test_cut_ranks_count_from_the_step_after_the_cut():
    site = Site("a", 10, 10)

    class Once(Cubic):
        def prune_curve(self, *args):
            return [(40, args[-1] if args[-1] is not None else 2)]

    found = figures([site], 8, Once(target_r=2), None, 100)
    assert found.initial == 8 * 21 and found.final == found.size == 2 * 21
    assert found.average == (40 * 8 * 21 + 60 * 2 * 21) / 100


# -- the choice ----------------------------------------------------------------------------------------


def test_final_budget_sets_the_cost_of_the_ranks():
    choice = solve(Budget(final_params=300_000), encoder(), 8, rank=Cubic(), total_steps=1000)
    assert choice.rank_params == choice.figures.size == 300_000
    assert choice.rank.target_r == pytest.approx(300_000 / (8 * 165_888 + 8 * 72) * 8)
    assert choice.purse is None and choice.ratio is None
    assert "a mean rank of 1.81" in " ".join(choice.explanation)


def test_final_budget_pays_for_output_diagonals_first():
    freeze = AFLoRA(**PAPER, rule="tensor_rank")
    choice = solve(Budget(final_params=300_000), encoder(), 8, rank=Cubic(), freeze=freeze, total_steps=1000)
    assert choice.rank_params == 300_000 - 82_944
    assert choice.freeze == freeze and choice.purse is None  # freezing saves work, not size


@pytest.mark.parametrize("limit, layers", [(1_327_104, 12), (1_327_103, 11), (700_000, 6), (110_592, 1)])
def test_layers_are_the_most_that_fit(limit, layers):
    choice = solve(Budget(final_params=limit), encoder(), 8, ratio=(0.01, 1), total_steps=100)
    assert choice.layers == {"encoder.layer": layers}
    assert math.floor(choice.ratio * 12 + 1e-9) == layers
    assert choice.figures.size == layers * 110_592


def test_ranks_give_way_before_layers_do():
    one_each = 166_000  # 165 888 + 72 is a rank on every site of all layers
    choice = solve(Budget(final_params=one_each), encoder(), 8, rank=Cubic(), ratio=(0.25, 1), total_steps=100)
    assert choice.layers == {"encoder.layer": 12}
    choice = solve(Budget(final_params=one_each // 2), encoder(), 8, rank=Cubic(), ratio=(0.25, 1), total_steps=100)
    assert choice.layers == {"encoder.layer": 6}
    choice = solve(Budget(final_params=20_000), encoder(), 8, rank=Cubic(), ratio=(0.25, 1), total_steps=100)
    assert choice.layers == {"encoder.layer": 3} and "fewest" in choice.explanation[1]
    assert choice.rank_params == 20_000


def test_where_layers_differ_in_cost_the_dearest_are_counted():
    sites = [Site(f"layers.{i}.up", 8, width, "layers", i) for i, width in enumerate((8, 8, 40, 40))]
    choice = solve(Budget(final_params=250), sites, 4, ratio=(0.25, 1), total_steps=10)  # two may cost 2 · 4 · 48
    assert choice.layers == {"layers": 1}


def test_ratio_keeps_within_its_limits():
    choice = solve(Budget(final_params=10**9), encoder(), 8, ratio=(0.25, 0.5), total_steps=100)
    assert choice.layers == {"encoder.layer": 6} and choice.ratio == 0.5
    assert "not used" in choice.explanation[-1]


def test_two_stacks_share_one_ratio():
    sites = [Site(f"{s}.{i}.q", 8, 8, s, i, "q") for s, n in (("encoder", 4), ("decoder", 6)) for i in range(n)]
    choice = solve(Budget(final_params=5 * 16), sites, 1, ratio=(0.1, 1), total_steps=10)
    assert choice.layers == {"encoder": 2, "decoder": 3}


def test_average_budget_moves_the_ranks_before_the_ramp():
    freeze = AFLoRA(start="svd", rule="tensor_rank", warmup=0.5, final=0.1)
    choice = solve(
        Budget(average_params=700_000), encoder(), 8, rank=Cubic(), freeze=freeze, total_steps=1000, steps_per_epoch=100
    )
    assert choice.freeze == freeze
    assert 0.999 * 700_000 <= choice.figures.average <= 700_000
    assert choice.purse == Purse(700_000_000)


@pytest.mark.parametrize("rank", [SalientLoRA(start="svd", target_r=2), AdaLoRA(start="svd", target_r=2)])
def test_average_budget_reckons_with_when_each_method_cuts(rank):
    choice = solve(Budget(average_params=900_000), encoder(), 8, rank=rank, total_steps=1000, steps_per_epoch=100)
    assert 0.9999 * 900_000 <= choice.figures.average <= 900_000
    cuts = rank.prune_curve(1000, 100, 8 * 165_960, 72, choice.rank_params)
    sizes = [8 * 165_960] * 1000
    for step, size in cuts:
        sizes[step:] = [size] * len(sizes[step:])
    assert sum(sizes) / 1000 == pytest.approx(choice.figures.average)
    limit = choice.cost_limit()
    assert limit.final == choice.rank_params and limit.costs[encoder()[0].name] == 1537


def test_average_budget_moves_the_ramp_where_ranks_cannot():
    freeze = AFLoRA(**PAPER, rule="tensor_rank")
    common = {"sites": encoder(), "r": 4, "freeze": freeze, "total_steps": 2000, "steps_per_epoch": 100}
    set_figure = solve(Budget(average_params=10**9), free=(), **common).figures.average
    for limit in (100_000, 130_000, 200_000, 400_000, 700_000):
        choice = solve(Budget(average_params=limit), **common)
        assert 0.99 * limit <= choice.figures.average <= limit
        warmup, final = choice.freeze.phases(2000, 100)
        assert (warmup + final < 2000 - 100) == (limit > set_figure) or warmup <= 100
        assert "chosen" in " ".join(choice.explanation)
    sooner, later = (solve(Budget(average_params=n), **common).freeze.final for n in (130_000, 200_000))
    assert sooner > later


def test_average_budget_moves_a_fixed_freeze():
    choice = solve(Budget(average_params=100_000), encoder(), 4, freeze=FreezeAt(at=0.5), total_steps=1000)
    assert choice.freeze.at == 150  # of 663 552 all the time


def test_settings_that_are_not_free_stay():
    choice = solve(
        Budget(average_params=10**6),
        encoder(),
        8,
        rank=Cubic(target_r=3),
        freeze=AFLoRA(**PAPER, rule="tensor_rank"),
        total_steps=1000,
        steps_per_epoch=100,
        free=(),
    )
    assert choice.rank.target_r == 3 and choice.freeze == AFLoRA(**PAPER, rule="tensor_rank")
    assert choice.rank_params == 3 * (165_888 + 72)
    assert choice.purse.total == math.floor(choice.figures.average * 1000)  # far below: its own figure is held


def test_choosing_needs_no_torch():
    code = (
        "import sys, trimtab.budget as b, trimtab.plans as p;"
        "b.solve(p.Budget(final_params=99), [p.Site('a', 4, 4)], 2, total_steps=9);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# -- what is refused -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda n: solve(Budget(final_params=n), encoder(), 8, total_steps=100),
        lambda n: solve(Budget(final_params=n), encoder(), 8, ratio=(0.5, 0.5), total_steps=100),
        lambda n: solve(Budget(final_params=n), encoder(), 8, rank=Cubic(), total_steps=100),
        lambda n: solve(Budget(average_params=n), encoder(), 8, rank=Cubic(), total_steps=100),
        lambda n: solve(Budget(average_params=n), encoder(), 8, rank=Cubic(), ratio=(0.1, 0.9), total_steps=100),
        lambda n: solve(
            Budget(average_params=n), encoder(), 4, freeze=AFLoRA(**PAPER, rule="tensor_rank"), total_steps=100
        ),
        lambda n: solve(Budget(average_params=n), encoder(), 4, freeze=FreezeAt(at=5), total_steps=100),
        lambda n: solve(
            Budget(average_params=n),
            encoder(),
            8,
            rank=Cubic(),
            freeze=AFLoRA(**PAPER, rule="tensor_rank"),
            total_steps=100,
            free=("rank.target_r",),
        ),
    ],
)
def test_an_infeasible_number_is_refused_with_the_smallest_feasible_one(make):
    with pytest.raises(BudgetError) as error:
        make(1)
    smallest = int(error.value.cure.split()[2])
    choice = make(smallest)
    assert max(choice.figures.size if choice.purse is None else 0, 1) <= smallest or choice.figures.average <= smallest
    with pytest.raises(BudgetError, match=str(smallest)):
        make(smallest - 1)


@pytest.mark.parametrize(
    "settings, key, cure",
    [
        ({"rank": SoRA(prox_threshold=1e-4)}, "rank.method", "salientlora or adalora"),
        ({"rank": Cubic(prune=False)}, "rank.prune", "true"),
        ({"freeze": AFLoRA(**PAPER)}, "freeze.rule", "tensor_rank"),
    ],
)
@pytest.mark.parametrize("budget", [Budget(final_params=500_000), Budget(average_params=500_000)])
def test_methods_that_cannot_be_held_to_a_number_are_refused(settings, key, cure, budget):
    with pytest.raises(ConfigError, match=cure) as error:
        solve(budget, encoder(), 8, total_steps=100, **settings)
    assert error.value.key == key and not isinstance(error.value, BudgetError)


@pytest.mark.parametrize("budget", [Budget(), Budget(1, 1), Budget(final_params=0), Budget(average_params=0.5)])
def test_a_budget_is_one_whole_number(budget):
    with pytest.raises(ConfigError, match="budget"):
        solve(budget, encoder(), 8, total_steps=100)


# -- runs ----------------------------------------------------------------------------------------------


def simulated_run(choice, sites, r, total_steps, steps_per_epoch=None, seed=0, skipped=0.0):
    """What the controller does with a choice, on numbers alone: random scores, real cuts and freezes.

    Returns trainable parameters in every step, and the size in the end.
    """
    generator = torch.Generator().manual_seed(seed)
    importance = torch.rand(len(sites), generator=generator) ** 4  # sites differ widely
    ranks = {site.name: r for site in sites}
    has_b = choice.freeze is not None and choice.freeze.needs_output_diagonal
    has_e = choice.rank is not None or has_b
    sizes = {f"{s.name}.lora_{m}": r * n for s in sites for m, n in (("A", s.in_features), ("B", s.out_features))}
    trains = {
        n: k
        for n, k in sizes.items()
        if choice.freeze is None or not choice.freeze.initially_frozen(n.rpartition(".")[0])
    }
    freezer = None
    if choice.freeze is not None:
        freezer = choice.freeze.build(trains, total_steps, steps_per_epoch)
        freezer.follow(list(choice.levels))
    cuts = {}
    if choice.rank is not None:
        start = sum(r * cost for cost in choice.rank_costs.values())
        cuts = dict(choice.rank.prune_curve(total_steps, steps_per_epoch, start, len(sites), choice.rank_params))
    spent, history = 0, []
    for step in range(total_steps):
        live = sum(n for n in freezer.numels.values()) if freezer else None
        projections = (
            sum(freezer.numels[n] for n in freezer.trainable)
            if freezer
            else sum(ranks[s.name] * (s.in_features + s.out_features) for s in sites)
        )
        diagonals = sum(ranks.values()) * has_e + sum(s.out_features for s in sites) * has_b
        history.append(projections + diagonals)
        spent += history[-1]
        if torch.rand((), generator=generator) < skipped:
            continue
        if freezer is not None and freezer.reads_gradients:
            freezer.observe(
                step,
                {n: torch.randn(4, generator=generator) * (1 + i) for i, n in enumerate(freezer.trainable)}
                if live
                else {},
            )
        if step + 1 in cuts:
            entries = [(site.name, choice.rank_costs[site.name]) for site in sites for _ in range(ranks[site.name])]
            scores = torch.rand(len(entries), generator=generator) * importance.repeat_interleave(
                torch.tensor([ranks[site.name] for site in sites])
            )
            kept = keep_by_cost(scores.tolist(), [cost for _, cost in entries], cuts[step + 1])
            masks = {
                site.name: torch.tensor([k for (n, _), k in zip(entries, kept) if n == site.name], dtype=torch.bool)
                for site in sites
            }
            ranks = {name: int(mask.sum()) for name, mask in masks.items()}
            if freezer is not None:
                freezer._window.clear(), freezer._mean.clear(), freezer._uncertainty.clear()
                freezer.pruned({name: mask for name, mask in masks.items() if len(mask)})
            diagonals = sum(ranks.values()) * has_e + sum(s.out_features for s in sites) * has_b
        if freezer is not None:
            allowance = None
            if choice.purse is not None:
                allowance = choice.purse.allowance(spent, diagonals, total_steps - 1 - step)
            freezer.decide(step, allowance)
    size = sum(ranks[s.name] * choice.rank_costs[s.name] for s in sites) + sum(s.out_features for s in sites) * has_b
    return history, size


TENSOR = AFLoRA(**PAPER, rule="tensor_rank")
SMALL = encoder(384, 6)
RUNS = {
    "freeze alone, MiniLM": (SMALL, 4, {"freeze": TENSOR, "total_steps": 300, "steps_per_epoch": 30}, 45_000),
    "freeze alone, few steps": (SMALL, 4, {"freeze": TENSOR, "total_steps": 60, "steps_per_epoch": 20}, 60_000),
    "freeze late": (SMALL, 8, {"freeze": TENSOR, "total_steps": 300, "steps_per_epoch": 30}, 250_000),
    "feed-forward only": (
        SMALL,
        4,
        {"freeze": replace(TENSOR, trainable_projections=FFN), "total_steps": 300, "steps_per_epoch": 30},
        35_000,
    ),
    "fixed step": (SMALL, 4, {"freeze": FreezeAt(at=0.5), "total_steps": 100}, 30_000),
    "ranks alone": (SMALL, 8, {"rank": Cubic(), "total_steps": 300}, 150_000),
    "ranks and freezing": (
        SMALL,
        12,
        {"rank": Cubic(), "freeze": TENSOR, "total_steps": 300, "steps_per_epoch": 30},
        100_000,
    ),
    "ranks as set, freezing chosen": (
        SMALL,
        12,
        {
            "rank": Cubic(target_r=3),
            "freeze": TENSOR,
            "total_steps": 400,
            "steps_per_epoch": 40,
            "free": ("freeze.ramp",),
        },
        90_000,
    ),
    "layers, ranks and freezing": (
        SMALL,
        12,
        {"rank": Cubic(), "freeze": TENSOR, "total_steps": 300, "steps_per_epoch": 30, "ratio": (0.5, 0.5)},
        60_000,
    ),
    "quadratic, base size": (
        encoder(),
        6,
        {"rank": Cubic(), "total_steps": 200, "steps_per_epoch": 40, "freeze": replace(TENSOR, schedule="quadratic")},
        400_000,
    ),
}


@pytest.mark.parametrize("seed, skipped", [(0, 0), (1, 0.05)])
@pytest.mark.parametrize("case", RUNS)
def test_measured_average_is_below_the_budget_by_less_than_one_percent(case, seed, skipped):
    sites, r, settings, limit = RUNS[case]
    choice = solve(Budget(average_params=limit), sites, r, **settings)
    assert choice.figures.average <= limit
    if "ratio" in settings:
        sites = [site for site in sites if site.block in (1, 3, 4)]
    history, _ = simulated_run(
        choice,
        sites,
        r,
        settings["total_steps"],
        settings.get("steps_per_epoch"),
        seed,
        skipped if "freeze" in settings else 0,
    )
    measured = sum(history) / len(history)
    assert 0.99 * limit <= measured <= limit
    assert history == sorted(history, reverse=True)


@pytest.mark.parametrize("seed", range(3))
def test_measured_size_is_below_the_budget_by_less_than_the_cheapest_rank(seed):
    choice = solve(Budget(final_params=120_000), SMALL, 12, rank=Cubic(), freeze=TENSOR, total_steps=300)
    _, size = simulated_run(choice, SMALL, 12, 300, None, seed)
    assert 120_000 - 769 < size <= 120_000


def test_predicted_figures_are_those_of_a_run_where_nothing_depends_on_gradients():
    choice = solve(Budget(average_params=10**7), SMALL, 4, freeze=FreezeAt(at=30), total_steps=100, free=())
    history, _ = simulated_run(choice, SMALL, 4, 100)
    assert sum(history) / 100 == choice.figures.average
    assert history[0] == choice.figures.initial and history[-1] == choice.figures.final
