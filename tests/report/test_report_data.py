"""The data stage: from the files of a run folder to every number and sentence of the page."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import synthetic_runs as runs

from trimtab.app.report import load
from trimtab.app.report.data import Curve
from trimtab.app.report.module_sections import freeze_section
from trimtab.errors import DataError
from trimtab.plans import Plan, Site, SitePlan


def log(step: int, loss: float, **more: float) -> dict:
    return {"event": "log", "step": step, "loss": loss, **more}


def evaluation(step: int, **metrics: float) -> dict:
    return {"event": "eval", "step": step, "metrics": {f"eval_{k}": v for k, v in metrics.items()}}


def ranks(step: int, q: int, v: int, budget: int | None = None, kind: str = "prune", **freed: int) -> dict:
    found = {"event": "rank", "step": step, "kind": kind, "ranks": {"layers.0.q": q, "layers.1.v": v}}
    return found | ({"budget": budget} if budget is not None else {}) | ({"freed": freed} if freed else {})


def small_plan(r: int = 4) -> Plan:
    sites = [Site("layers.0.q", 8, 8, "layers", 0, "q"), Site("layers.1.v", 8, 8, "layers", 1, "v")]
    return Plan(
        "tiny",
        tuple(SitePlan(s, r, 16 * r) for s in sites),
        {"initial": 128.0, "final": 64.0, "average": 90.0},
    )


def folder(tmp_path: Path, *history: dict, **pieces: object) -> Path:
    return runs.write_run(tmp_path / "run", history=list(history), **{"recipe": runs.recipe(), **pieces})  # type: ignore[arg-type]


def test_importing_the_report_imports_neither_torch_nor_plotly() -> None:
    code = "import sys, trimtab.app.report; sys.exit(bool({'torch', 'plotly', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


def test_header_tells_what_the_run_was_and_what_came_out(tmp_path: Path) -> None:
    header = load(
        folder(tmp_path, log(40, 0.5), where=runs.where("011010"), metrics=runs.metrics(seed=3, score=0.57))
    ).header
    assert (header.model, header.task) == ("sentence-transformers/all-MiniLM-L6-v2", "glue/cola")
    assert (header.metric, header.score, header.seed, header.train_samples) == (
        "matthews_correlation",
        0.57,
        3,
        8551,
    )
    assert header.params == {"initial": 1000, "final": 500, "average": 700.0}
    assert (header.seconds, header.peak_memory_bytes, header.steps) == (100.0, 3 * 2**28, 40)
    assert header.chosen == {"encoder.layer": "011010"} and header.is_finished


def test_settings_are_the_recipe_by_dotted_name(tmp_path: Path) -> None:
    settings = dict(load(folder(tmp_path)).settings)
    assert settings["adapter.target_modules"] == "query, value" and settings["train.learning_rate"] == "0.001"


def test_speeds_are_not_shown_among_the_metrics(tmp_path: Path) -> None:
    report = load(folder(tmp_path, metrics=runs.metrics(score=0.57)))
    assert report.metrics == [("loss", 0.6), ("matthews_correlation", 0.57)]


def test_layer_profile_marks_chosen_and_undefined_layers(tmp_path: Path) -> None:
    profile = load(folder(tmp_path, where=runs.where("011010"))).where
    assert profile is not None and profile.score == "CKA"
    [stack] = profile.stacks
    assert stack.scores == [None, 0.42, 0.55, 0.95, 0.61, 0.97]
    assert stack.undefined == [True, False, False, False, False, False]
    assert stack.chosen == [False, True, True, False, True, False]
    assert profile.finding == (
        "CKA chose 3 of 6 layers (1, 2, 4): those that change their input most (lowest CKA); 1 layer undefined"
    )
    assert profile.how == "unbiased estimator, pool cls, 1,024 samples"
    assert profile.warnings == ["layer 0: one input row covers more than half of the samples"]


def test_a_layer_whose_score_is_not_a_number_counts_as_undefined(tmp_path: Path) -> None:
    scores = {"encoder.layer": {"cka": [0.5, float("nan")], "undefined": [False, False]}}
    profile = load(folder(tmp_path, where=runs.where("10", stacks=scores))).where
    assert profile is not None and profile.stacks[0].undefined == [False, True]


def test_a_selection_without_scores_still_shows_its_layers(tmp_path: Path) -> None:
    where = {
        "method": "uniform",
        "stacks": {"encoder.block": "1010", "decoder.block": "0001"},
        "scores": None,
    }
    profile = load(folder(tmp_path, where=where)).where
    assert profile is not None and not profile.score
    assert (
        profile.finding == "Uniform chose 2 of 4 layers of encoder.block (0, 2) and 1 of 4 layers of decoder.block (3)"
    )
    assert [stack.undefined for stack in profile.stacks] == [[False] * 4] * 2


def test_losses_and_penalty_are_kept_apart(tmp_path: Path) -> None:
    report = load(folder(tmp_path, log(10, 0.8, penalty=0.05), log(20, 0.4, penalty=0.01), evaluation(20, loss=0.5)))
    assert report.loss is not None and report.penalty is not None
    assert report.loss.curves == [Curve("training", [10, 20], [0.8, 0.4]), Curve("evaluation", [20], [0.5])]
    assert (
        report.loss.finding == "Training loss fell from 0.8 to 0.4; evaluation loss was 0.5 at step 20, the only point"
    )
    assert report.penalty.curves == [Curve("penalty", [10, 20], [0.05, 0.01])]


def test_score_names_its_best_evaluation(tmp_path: Path) -> None:
    history = [evaluation(s, matthews_correlation=v, runtime=1.0) for s, v in ((10, 0.2), (20, 0.6), (30, 0.5))]
    score = load(folder(tmp_path, *history, metrics=runs.metrics())).score
    assert score is not None
    assert score.finding == "matthews_correlation rose from 0.2 to 0.5; best 0.6 at step 20"
    flat = [evaluation(s, accuracy=1) for s in (10, 20)]
    assert load(folder(tmp_path / "flat", *flat)).score.finding == "accuracy stayed at 1"


def test_best_loss_is_the_lowest(tmp_path: Path) -> None:
    history = [evaluation(10, loss=0.2), evaluation(20, loss=0.6)]
    score = load(folder(tmp_path, *history, metrics={**runs.metrics(), "metric": "loss"})).score
    assert score is not None and score.finding.endswith("best 0.2 at step 10")


def test_a_loss_that_stops_being_a_number_is_said_and_drawn_as_a_gap(tmp_path: Path) -> None:
    report = load(folder(tmp_path, log(10, 0.8), log(20, 0.6), log(30, math.nan), log(40, math.inf)))
    assert report.loss is not None
    assert report.loss.curves[0].values == [0.8, 0.6, None, None]
    assert report.loss.finding == "Training loss fell from 0.8 to 0.6 and was no number from step 30 on"


def test_a_single_overflow_is_counted(tmp_path: Path) -> None:
    report = load(folder(tmp_path, log(10, 0.8), log(20, math.nan), log(30, 0.4)))
    assert report.loss is not None and report.loss.finding == "Training loss fell from 0.8 to 0.4 (no number at 1 step)"


def test_a_score_that_is_not_a_number_is_a_warning(tmp_path: Path) -> None:
    report = load(folder(tmp_path, metrics=runs.metrics(score=math.nan)))
    assert report.header.score is None and report.header.score_is_nan
    assert "The score (matthews_correlation) is not a number." in report.notes


def test_average_parameters_weigh_each_count_by_its_steps(tmp_path: Path) -> None:
    counts = [
        {"event": "params", "step": s, "trainable": n, "total_rank": 1} for s, n in ((0, 1000), (20, 600), (50, 100))
    ]
    report = load(folder(tmp_path, *counts, log(100, 0.5)))  # no metrics.json: (20·1000 + 30·600 + 50·100) / 100
    assert report.header.params == {"initial": 1000, "final": 100, "average": 430.0}
    assert report.trainable is not None
    assert (report.trainable.steps, report.trainable.params) == ([0, 20, 50, 100], [1000, 600, 100, 100])
    assert report.trainable.finding == "Trainable parameters fell from 1,000 to 100 (−90 %), 430 on average"


def test_ranks_start_at_the_plan_and_follow_every_change(tmp_path: Path) -> None:
    history = [ranks(10, 4, 2), ranks(20, 4, 2), ranks(30, 3, 0)]
    found = load(folder(tmp_path, *history, plan=small_plan())).ranks
    assert found is not None
    assert (found.steps, found.totals, found.highest) == (
        [0, 10, 30],
        [8, 6, 3],
        4,
    )  # step 20 changed nothing
    [grid] = found.grids
    assert (grid.stack, grid.layers, grid.labels) == ("layers", [0, 1], ["q", "v"])
    assert grid.cells(dict(found.ranks[-1])) == [[3, None], [None, 0]]  # rows are kinds, columns layers
    assert found.finding == "3 of 8 ranks are left, most of them (3) in q; 1 of 2 modules is at rank 0"


def test_a_module_that_an_event_leaves_out_has_no_rank(tmp_path: Path) -> None:
    gone = ranks(20, 3, 0)
    del gone["ranks"]["layers.1.v"]
    found = load(folder(tmp_path, ranks(10, 4, 2), gone)).ranks
    assert found is not None and found.ranks[-1] == {"layers.0.q": 3, "layers.1.v": 0}


def test_budget_curve_says_whether_it_was_met(tmp_path: Path) -> None:
    met = load(folder(tmp_path / "met", ranks(10, 4, 2, budget=6), ranks(30, 2, 1, budget=3))).budget
    missed = load(folder(tmp_path / "missed", ranks(10, 4, 2, budget=6), ranks(30, 2, 2, budget=3))).budget
    assert met is not None and missed is not None
    assert met.finding == "The budget fell from 6 to 3 ranks between steps 10 and 30, and was met"  # its start unknown
    assert (met.steps, met.budget, met.kept) == ([10, 30], [6, 3], [6, 3])
    assert missed.finding.endswith("; 1 rank above it was kept")


def test_budget_begins_with_the_ranks_at_the_start_and_ends_where_it_falls_no_more(tmp_path: Path) -> None:
    start = {"event": "params", "step": 0, "trainable": 128, "total_rank": 8}
    events = [ranks(10, 4, 2, budget=6), ranks(30, 2, 1, budget=3), ranks(50, 2, 1, budget=3)]
    found = load(folder(tmp_path, start, *events)).budget
    assert found is not None
    assert found.finding == "The budget fell from 8 to 3 ranks between steps 10 and 30, and was met"
    assert (found.steps, found.budget, found.kept) == ([0, 10, 30, 50], [8, 6, 3, 3], [8, 6, 3, 3])
    at_once = load(folder(tmp_path / "at_once", start, ranks(10, 2, 1, budget=3))).budget
    assert at_once is not None
    assert at_once.finding == "The budget fell from 8 to 3 ranks at step 10, and was met"


def test_ranks_are_not_held_against_a_budget_of_parameters(tmp_path: Path) -> None:
    recipe = runs.recipe() | {"budget": {"final_params": 48}}
    found = load(folder(tmp_path, ranks(10, 4, 2, budget=96), ranks(30, 2, 1, budget=48), recipe=recipe)).budget
    assert found is not None and found.finding == "Total rank fell from 6 to 3, under a budget of parameters"
    assert (found.budget, found.kept) == ([None, None], [6, 3])


def test_prunes_are_counted_from_the_rank_at_the_start_and_masks_are_none(tmp_path: Path) -> None:
    start = {"event": "params", "step": 0, "trainable": 128, "total_rank": 8}
    history = [
        start,
        ranks(5, 4, 3, kind="mask"),
        ranks(10, 4, 2, parameters=1024, gradients=1024, moments=2048),
        ranks(30, 2, 1, parameters=512, gradients=512, moments=1024),
    ]
    found = load(folder(tmp_path, *history)).prunes
    assert found is not None
    assert [(row.step, row.kept, row.removed) for row in found.rows] == [(10, 6, 2), (30, 3, 3)]
    assert found.freed == {"parameters": 1536, "gradients": 1536, "moments": 3072}
    assert found.finding == "2 prunes freed 6.0 KiB: 1.5 KiB of parameters, 1.5 KiB of gradients and 3.0 KiB of moments"


def test_a_prune_that_found_nothing_to_cut_is_not_counted(tmp_path: Path) -> None:
    start = {"event": "params", "step": 0, "trainable": 128, "total_rank": 8}
    report = load(folder(tmp_path, start, ranks(10, 4, 4, parameters=0, gradients=0, moments=0)))
    assert report.prunes is None and report.ranks is not None


def test_rank_diagonals_become_bands_and_falling_spectra(tmp_path: Path) -> None:
    events = [
        {"event": "values", "step": 10, "values": {"layers.0.q": [0.1, -0.4, 0.0, 0.2], "layers.1.v": [0.3]}},
        {"event": "values", "step": 20, "values": {"layers.0.q": [0.5], "layers.1.v": []}},
    ]
    found = load(folder(tmp_path, *events, recipe=runs.recipe(rank={"method": "sora"}))).values
    assert found is not None and found.noun == "gate"
    assert found.sites["layers.0.q"] == [[0.4, 0.2, 0.1, 0.0], [0.5]]
    assert found.bands["largest"] == [0.4, 0.5] and found.bands["median"] == [0.3, 0.5]  # of .1 .2 .3 .4
    assert found.bands["zero_ratio"] == [0.2, 0.0]


def test_freezes_tell_when_each_matrix_stopped(tmp_path: Path) -> None:
    events = [
        {
            "event": "freeze",
            "step": 20,
            "frozen": ["base_model.model.layers.0.q.lora_A"],
            "trainable_ratio": 0.75,
        },
        {"event": "freeze", "step": 40, "frozen": ["layers.0.q.lora_B"], "trainable_ratio": 0.5},
    ]
    found = load(folder(tmp_path, *events, log(60, 0.5), plan=small_plan())).freeze
    assert found is not None
    assert found.frozen_at == {
        "layers.0.q.lora_A": 20,
        "layers.0.q.lora_B": 40,
        "layers.1.v.lora_A": None,
        "layers.1.v.lora_B": None,
    }
    assert found.grids[0].labels == ["q A", "q B", "v A", "v B"]
    assert found.finding == (
        "2 of 4 matrices froze between steps 20 and 40, half of them by step 20; 2 trained to the end"
    )


def test_a_matrix_whose_ranks_were_all_cut_did_not_train_to_the_end(tmp_path: Path) -> None:
    events = [
        ranks(10, 4, 0, kind="mask"),  # may come back
        ranks(20, 4, 0),
        {"event": "freeze", "step": 40, "frozen": ["layers.0.q.lora_A"], "trainable_ratio": 0.5},
    ]
    run = folder(tmp_path, *events, log(60, 0.5), plan=small_plan())
    found = load(run).freeze
    assert found is not None
    assert found.cut_at == {"layers.1.v.lora_A": 20, "layers.1.v.lora_B": 20}
    assert found.finding == "1 of 4 matrices froze; 2 were cut to rank 0; 1 trained to the end"
    section = freeze_section(found)
    assert ["layers.1.v.lora_A", "cut to rank 0 at step 20"] in section.tables[0].rows
    assert section.charts[0].data[0]["text"][2:] == [["", "cut"], ["", "cut"]]


@pytest.mark.parametrize(("start", "says"), [("svd", "|e|"), (None, "‖B‖ · ‖A‖ of a rank")])
def test_what_the_size_of_a_value_is_goes_by_the_start(start: str | None, says: str, tmp_path: Path) -> None:
    event = {"event": "values", "step": 10, "values": {"layers.0.q": [0.1]}}
    settings = {"method": "adalora", "target_r": 2} | ({"start": start} if start else {})
    found = load(folder(tmp_path, event, recipe=runs.recipe(rank=settings))).values
    assert found is not None and found.size == says


def test_step_times_skip_the_clock_that_a_resume_starts_again(tmp_path: Path) -> None:
    timing = [{"step": s, "seconds": t} for s, t in ((10, 1.0), (20, 3.0), (30, 0.5), (40, 1.5))]
    found = load(folder(tmp_path, timing=timing)).step_times
    assert found is not None and found.curves == [Curve("seconds per step", [20, 40], [0.2, 0.1])]


def test_sites_without_a_plan_are_read_from_their_names(tmp_path: Path) -> None:
    event = {
        "event": "rank",
        "step": 1,
        "kind": "mask",
        "ranks": {
            "encoder.block.0.layer.0.SelfAttention.q": 1,
            "decoder.block.3.layer.1.EncDecAttention.v": 2,
            "pooler": 1,
        },
    }
    found = load(folder(tmp_path, event)).ranks
    assert found is not None
    assert [(g.stack, g.layers, g.labels) for g in found.grids] == [
        ("encoder.block", [0], ["q"]),
        ("decoder.block", [3], ["v"]),
        ("outside the layers", [0], ["pooler"]),
    ]


def test_long_runs_are_thinned_to_forty_events_with_first_and_last(tmp_path: Path) -> None:
    history = [ranks(step, 2000 - step, 5, budget=2005 - step) for step in range(1000)]
    report = load(folder(tmp_path, *history))
    assert report.ranks is not None and report.budget is not None
    assert len(report.ranks.steps) == 40 and (report.ranks.steps[0], report.ranks.steps[-1]) == (0, 999)
    assert len(report.budget.steps) == 1000


def test_everything_is_strict_json(tmp_path: Path) -> None:
    report = load(runs.full_run(tmp_path / "run", layers=3, events=4))
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["header"]["task"] == "glue/cola"


# What may be missing or damaged ---------------------------------------------------------------------------


def test_a_run_that_only_wrote_its_recipe_has_a_report(tmp_path: Path) -> None:
    report = load(runs.write_run(tmp_path / "run", recipe=runs.recipe()))
    assert (
        report.header.model == "sentence-transformers/all-MiniLM-L6-v2" and report.loss is None and report.where is None
    )
    assert report.notes == ["This run is not finished (no metrics.json). The history ends at step 0."]


def test_an_aborted_run_shows_its_last_evaluation(tmp_path: Path) -> None:
    report = load(folder(tmp_path, log(10, 0.5), evaluation(10, accuracy=0.8)))
    assert (report.header.metric, report.header.score, report.header.is_finished) == ("accuracy", 0.8, False)
    asks = runs.recipe() | {"task": {"name": "text_classification", "metric": "f1_macro"}}
    header = load(folder(tmp_path, evaluation(10, accuracy=0.8, f1_macro=0.6), recipe=asks)).header
    assert (header.metric, header.score) == ("f1_macro", 0.6)


def test_an_empty_history_has_no_charts(tmp_path: Path) -> None:
    report = load(folder(tmp_path))
    assert report.loss is report.trainable is report.ranks is report.step_times is None


def test_the_half_written_last_line_of_a_killed_run_is_skipped_and_said(tmp_path: Path) -> None:
    run = folder(tmp_path, log(10, 0.5))
    with (run / "history.jsonl").open("a") as file:
        file.write('{"event": "log", "st')
    report = load(run)
    assert report.loss is not None and report.loss.curves[0].steps == [10]
    assert any("half-written" in note for note in report.notes)


def test_events_of_a_later_version_are_passed_over(tmp_path: Path) -> None:
    report = load(folder(tmp_path, {"event": "merge", "step": 3}, log(10, 0.5), {"event": "rank", "step": 4}))
    assert report.loss is not None
    assert "history.jsonl line 3: rank event without a usable step or ranks, skipped" in report.notes


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("metrics.json", "{", "metrics.json: not JSON"),
        ("metrics.json", "[1]", "metrics.json: holds a list, expected an object"),
        ("where.json", "{}", "where.json: 'method' is missing"),
        ("where.json", '{"method": "mask", "stacks": {"h": "0120"}}', "where.mask[h]"),
        ("plan.json", '{"model": "x"}', "plan.json: 'sites' is missing"),
        ("recipe.yaml", "a: [", "recipe.yaml: not YAML"),
        ("recipe.yaml", "- a", "recipe.yaml: holds a list"),
        ("history.jsonl", '{"event":\n{}\n', "history.jsonl: line 1 is not JSON"),
    ],
)
def test_a_damaged_file_is_one_line_that_names_it(tmp_path: Path, name: str, text: str, says: str) -> None:
    run = folder(tmp_path)
    (run / name).write_text(text)
    with pytest.raises(DataError) as error:
        load(run)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_scores_that_do_not_fit_the_mask_are_refused(tmp_path: Path) -> None:
    scores = {"encoder.layer": {"cka": [0.1], "undefined": [False]}}
    with pytest.raises(DataError, match=r"1 values of 'cka', mask of 2"):
        load(folder(tmp_path, where=runs.where("10", stacks=scores)))


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder"):
        load(tmp_path / "missing")
    with pytest.raises(DataError, match="is it a run's output_dir"):
        load(tmp_path)
