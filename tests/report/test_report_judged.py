"""The top of a report and the judged rows: what a reader needs to believe a score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import synthetic_runs as runs
from datasets import Dataset, DatasetDict

from trimtab.app import about, judging
from trimtab.app.report import load, troubles, write
from trimtab.app.report.comparing import table_of_runs
from trimtab.app.report.runfolder import read
from trimtab.app.storage import alone
from trimtab.app.tasks import get_task

PREDICTIONS: dict[str, Any] = {
    "validation": {
        "rows": 6,
        "classes": ["bad", "good", "so-so"],
        "label": [0, 0, 0, 1, 1, 2],
        "predicted": [0, 0, 1, 1, 0, 0],
        "probability": [0.9, 0.8, 0.3, 0.7, 0.01, 0.2],
        "constant": {"answer": "bad", "metrics": {"accuracy": 0.5}},
        "worst": [{"row": 5, "text": "never <b>again</b>", "label": "good", "predicted": "bad", "probability": 0.01}],
    }
}
ABOUT = {
    "began": "2026-11-25T21:08:00+0000",
    "command": "trimtab run r.yaml seed=1",
    "versions": {"python": "3.11.7", "trimtab": "0.1.0", "torch": "2.13.0"},
    "machine": {"system": "Linux x86_64", "cores": 2, "device": "cpu"},
}


def a_run(folder: Path, **pieces: Any) -> Path:
    found = {**runs.metrics(), "metrics": {"accuracy": 0.5}, "metric": "accuracy", "load": "import peft"}
    pieces = {"metrics": found, "predictions": PREDICTIONS, "about": ABOUT, "recipe": runs.recipe(), **pieces}
    return runs.write_run(folder, **pieces)


def test_each_class_has_its_scores_and_what_it_was_taken_for(tmp_path: Path) -> None:
    found = load(a_run(tmp_path / "run")).judged
    assert found is not None and found.confusion == [[2, 1, 0], [1, 1, 0], [1, 0, 0]]
    assert [(one.name, one.rows, one.precision, one.recall) for one in found.classes] == [
        ("bad", 3, 0.5, 2 / 3),
        ("good", 2, 0.5, 0.5),
        ("so-so", 1, None, 0.0),  # never given
    ]
    assert found.classes[0].f1 == pytest.approx(2 * 0.5 * (2 / 3) / (0.5 + 2 / 3))
    assert found.finding.startswith("3 of 6 validation rows are right; fewest of 'so-so' (0 %)")


def test_the_page_says_what_made_the_run_what_to_hold_the_score_against_and_how_to_load_it(tmp_path: Path) -> None:
    page = write(a_run(tmp_path / "reviews")).read_text(encoding="utf-8")
    top = page[: page.index("<section")]
    for said in ("reviews</h1>", "2026-11-25 21:08", "torch 2.13.0", "trimtab run r.yaml seed=1", "import peft"):
        assert said.replace(".", ".\u200b") in top or said in top, said
    assert "always &#39;bad&#39;: 0.5" in top
    assert "never &lt;b&gt;again" in page and "never <b>" not in page


@pytest.mark.parametrize(
    ("metrics", "base", "says"),
    [
        ({}, {"metrics": {"accuracy": 0.25}}, "without adapter: 0.25"),
        ({"new_modules": ["classifier"]}, None, "without adapter: none, the head is new"),
        ({}, None, "without adapter: see trimtab eval --base"),
    ],
)
def test_the_base_models_score_is_told_where_there_is_one(tmp_path: Path, metrics: Any, base: Any, says: str) -> None:
    found = {**runs.metrics(), "metrics": {"accuracy": 0.5}, "metric": "accuracy", **metrics}
    folder = a_run(tmp_path / "run", metrics=found)
    if base:
        (folder / "base.json").write_text(__import__("json").dumps(base))
    assert says in write(folder).read_text(encoding="utf-8")


def test_a_run_at_work_is_told_from_one_that_was_stopped(tmp_path: Path) -> None:
    folder = runs.write_run(tmp_path / "run", recipe=runs.recipe(), plan=runs.plan())
    with alone(folder):
        assert load(folder).notes[0].startswith("This run is at work: step 0")
    assert load(folder).notes[0].startswith("This run is not finished")


def test_what_matters_stands_on_top_and_the_plans_remarks_are_folded_away(tmp_path: Path) -> None:
    plan = runs.plan()
    object.__setattr__(plan, "notes", ("the head trains 5 parameters more",))
    report = load(a_run(tmp_path / "run", plan=plan))
    assert report.remarks == ["the head trains 5 parameters more"] and report.notes == []


def test_seconds_per_step_leave_out_what_was_spent_on_evaluating_and_saving(tmp_path: Path) -> None:
    timing = [
        {"step": 0, "seconds": 0.0, "aside": 0.0},
        {"step": 10, "seconds": 10.0, "aside": 0.0},
        {"step": 20, "seconds": 50.0, "aside": 30.0},
    ]
    report = load(a_run(tmp_path / "run", timing=timing))
    assert report.step_times is not None and report.step_times.curves[0].values == [1.0, 1.0]
    assert report.header.seconds_per_step == 1.0


def test_runs_side_by_side_have_names_loss_curves_and_the_rank_of_each_layer(tmp_path: Path) -> None:
    folders = [runs.full_run(tmp_path / name, layers=3, events=4, rank=name) for name in ("salientlora", "adalora")]
    rows = table_of_runs(folders).rows
    assert [row.runs for row in rows] == ["salientlora", "adalora"]
    for row in rows:
        assert row.loss_curve is not None and row.loss_curve.steps
        assert [len(ranks) for ranks in row.layers.values()] == [3]


def test_one_answer_for_all_rows_is_scored_by_the_tasks_own_metrics() -> None:
    task = get_task({"name": "text_classification", "text": "t", "label": "y", "labels": ["bad", "good"]})
    rows = DatasetDict(train=Dataset.from_dict({"y": [1, 1, 0]}), test=Dataset.from_dict({"y": [1, 0, 0, 0]}))
    found = judging.constant(task, rows, "test")
    assert found is not None and found["answer"] == "good" and found["metrics"]["accuracy"] == 0.25
    task = get_task({"name": "text_classification", "text": "t", "label": "y", "regression": True})
    rows = DatasetDict(train=Dataset.from_dict({"y": [1.0, 3.0]}), test=Dataset.from_dict({"y": [2.0, 4.0]}))
    found = judging.constant(task, rows, "test")
    assert found is not None and (found["answer"], found["metrics"]["mse"]) == (2.0, 2.0)


def test_the_worst_row_is_the_one_whose_own_class_was_thought_least_likely() -> None:
    task = get_task({"name": "text_classification", "text": "t", "label": "y", "labels": ["bad", "good"]})
    logits, labels = np.array([[3.0, 0.0], [0.0, 5.0], [0.1, 0.0]]), np.array([0, 0, 0])
    kept = task.row_scores((logits, labels))
    assert kept["probability"] == pytest.approx([0.9526, 0.0067, 0.525], abs=1e-4)
    found = judging.worst(task, kept, Dataset.from_dict({"t": ["a", "b " * 400, "c"], "y": [0, 0, 0]}))
    assert [row["row"] for row in found] == [2, 3, 1]
    assert found[0]["predicted"] == "good" and found[0]["text"].endswith(" …") and len(found[0]["text"]) <= 301


@pytest.mark.parametrize(("method", "steps", "says"), [
    ("aflora", 8, "it ended at step 8 of 48"),
    ("aflora", 48, "try a smaller freeze.interval_steps"),
    ("grades", 48, "try a larger freeze.tau"),
])  # fmt: skip
def test_a_run_in_which_nothing_froze_is_told_why_by_its_own_method(
    method: str, steps: int, says: str, tmp_path: Path
) -> None:
    plan = replace(runs.plan(), settings={"total_steps": 48})
    history = [{"event": "params", "step": steps, "trainable": 8}]
    recipe = runs.recipe(freeze={"method": method})
    run = runs.write_run(tmp_path, recipe=recipe, plan=plan, history=history, metrics=runs.metrics())
    assert any("no projection ever froze" in told and told.endswith(says) for told in troubles.troubles(read(run)))


def test_a_secret_on_the_command_line_is_not_kept() -> None:
    assert (
        about.hidden("trimtab run r.yaml train.hub_token=hf_x seed=1") == "trimtab run r.yaml train.hub_token=… seed=1"
    )


@pytest.mark.parametrize("predicted, is_told", [
    ([2.75, 2.76, 2.74, 2.75], True),
    ([2.0, 2.9, 1.2, 3.3], False),
])  # fmt: skip
def test_numbers_that_hardly_differ_are_told_as_one_class_for_all_is(predicted, is_told):
    kept = {"validation": {"label": [0.0, 2.5, 4.0, 5.0], "predicted": predicted}}
    run = SimpleNamespace(predictions=kept, recipe={"train": {"learning_rate": 1e-3}}, plan=None, last_step=100)
    told = troubles._one_answer(run)
    assert bool(told) == is_told
    if told:
        assert "every one of 4 validation rows was given nearly the same number, 2.74 to 2.76 for labels" in told
        assert "try a train.learning_rate ten times higher or lower (it is 0.001), or train.warmup_steps=0.2" in told


@pytest.mark.parametrize("settings, is_told", [
    ({}, True),
    ({"warmup_steps": 0.06}, True),
    ({"warmup_steps": 19}, True),
    ({"warmup_steps": 20}, False),
    ({"warmup_steps": 0.2}, False),
    ({"lr_scheduler_type": "constant"}, False),
])  # fmt: skip
def test_a_longer_warm_up_is_told_to_a_run_with_a_shorter_one(settings, is_told):
    run = SimpleNamespace(recipe={"train": settings}, plan=None, last_step=100)
    assert ("train.warmup_steps=0.2" in troubles._another_rate(run)) == is_told
