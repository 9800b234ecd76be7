"""Several runs in one table: seeds joined, rows named from what differs, costs beside scores."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import synthetic_runs as runs
from scipy import stats

from trimtab.app.report import compare, pairing
from trimtab.app.report.compare_page import pareto_front
from trimtab.app.report.comparing import names_of
from trimtab.app.report.data import load
from trimtab.app.tasks import classification
from trimtab.errors import ConfigError, DataError

CKA = {"method": "cka", "ratio": 0.5, "samples": 512}


def test_two_settings_are_named_by_the_axis_in_which_they_differ(tmp_path: Path) -> None:
    lora = runs.plain_run(tmp_path / "a", score=0.91, params=1000, seconds=60)
    half = runs.plain_run(tmp_path / "b", score=0.90, params=500, seconds=45, where=CKA)
    table = compare([lora, half])
    assert [row.name for row in table.rows] == ["where=all", "where=cka"]
    assert table.finding == (
        "`where=all` has the highest matthews_correlation, 0.91, which one run alone cannot tell from chance; "
        "`where=cka` is 0.01 behind with 50 % of its final parameters and 75 % of its time"
    )
    assert table.rows[1].settings == {"where.method": "cka"}
    assert table.cells[1] == ["where=cka", "0.9", "1", "500", "500", "500", "45.0 s", "768.0 MiB"]


def test_runs_that_differ_only_by_seed_are_one_row(tmp_path: Path) -> None:
    folders = [
        runs.plain_run(tmp_path / str(s), seed=s, score=v, seconds=t)
        for s, v, t in ((0, 0.5, 10.0), (1, 0.6, 20.0), (2, 0.7, 30.0))
    ]
    [row] = compare(folders).rows
    assert row.score == pytest.approx(0.6) and row.score_se == pytest.approx(0.1 / 3**0.5)  # n − 1
    assert row.score_text == "0.6 ± 0.058" and row.seeds == [0, 1, 2] and row.seconds == 20.0


def test_a_run_that_is_there_twice_is_one_seed(tmp_path: Path) -> None:
    """A folder that was copied, or a recipe that was run again elsewhere."""
    folders = [runs.plain_run(tmp_path / f"s{s}", seed=s, score=v) for s, v in ((0, 0.5), (1, 0.7))]
    again = shutil.copytree(folders[1], tmp_path / "again")
    table = compare([*folders, again])
    assert table.rows[0].seeds == [0, 1] and table.rows[0].score_se == pytest.approx(0.1)
    assert table.notes == [f"Left out: `{again}` has settings and seed of `{folders[1]}`."]


def test_settings_of_one_method_are_told_only_among_its_rows() -> None:
    settings = [
        {"where.method": "all"},
        {"where.method": "cka", "where.ratio": 0.5, "where.samples": 9},
        {"where.method": "cka", "where.ratio": 0.25, "where.samples": 9},
    ]
    assert names_of(settings) == ["where=all", "where=cka, ratio=0.5", "where=cka, ratio=0.25"]


def test_what_a_row_does_without_goes_unsaid_unless_it_is_all_there_is(tmp_path: Path) -> None:
    plain = runs.plain_run(tmp_path / "a")
    rank = runs.plain_run(tmp_path / "b", rank={"method": "sora"})
    half = runs.plain_run(tmp_path / "c", where=CKA, rank={"method": "sora"})
    assert [row.name for row in compare([plain, rank]).rows] == ["rank=none", "rank=sora"]
    assert [row.name for row in compare([plain, rank, half]).rows] == [
        "where=all",
        "where=all, rank=sora",
        "where=cka, rank=sora",
    ]


def test_differing_train_settings_and_adapter_are_named(tmp_path: Path) -> None:
    a = runs.write_run(tmp_path / "a", recipe=runs.recipe(), metrics=runs.metrics())
    changed = runs.recipe()
    changed["train"] = {**changed["train"], "learning_rate": 2e-3}
    changed["adapter"] = {**changed["adapter"], "r": 16}
    b = runs.write_run(tmp_path / "b", recipe=changed, metrics=runs.metrics())
    assert [row.name for row in compare([a, b]).rows] == [
        "r=8, learning_rate=0.001",
        "r=16, learning_rate=0.002",
    ]


@pytest.mark.parametrize(("others", "is_told"), [(1000, False), (2000, True)])
def test_the_fewest_parameters_are_fewer_than_some(tmp_path: Path, others: int, is_told: bool) -> None:
    a = seeds(tmp_path / "a", [0.60, 0.62, 0.64], params=1000)
    b = seeds(tmp_path / "b", [0.59, 0.61, 0.63], params=others, where=CKA)
    assert compare([*a, *b]).finding.endswith("with the fewest final parameters") == is_told


def test_a_single_run_has_its_folder_as_name(tmp_path: Path) -> None:
    table = compare([runs.plain_run(tmp_path / "only", score=0.5)])
    assert table.rows[0].name == "only" and table.best is None
    assert table.finding == "`only` scored 0.5 (matthews_correlation)"


def test_a_missing_recipe_is_made_up_for_by_the_metrics(tmp_path: Path) -> None:
    a = runs.write_run(tmp_path / "a", metrics=runs.metrics(where=None, rank=None))
    b = runs.write_run(tmp_path / "b", metrics=runs.metrics(where="cka", rank={"method": "adalora"}))
    assert [row.name for row in compare([a, b]).rows] == ["where=all", "where=cka, rank=adalora"]


def test_a_seed_without_a_score_is_left_out_of_the_mean_and_said(tmp_path: Path) -> None:
    folders = [runs.plain_run(tmp_path / f"s{s}", seed=s, score=v) for s, v in ((0, 0.5), (1, math.nan), (2, 0.7))]
    other = runs.plain_run(tmp_path / "other", where=CKA, score=0.4)
    table = compare([*folders, other])
    assert table.rows[0].scores == [0.5, None, 0.7] and table.rows[0].score == pytest.approx(0.6)
    assert table.notes == ["`where=all`: no score from s1 (not a number)."]


def test_a_seed_that_was_stopped_takes_nothing_from_one_that_has_ended(tmp_path: Path) -> None:
    """It knows no headline metric, and has pruned nothing yet."""
    asks = {"task": {"name": "glue/cola", "metric": "matthews_correlation"}}
    evaluated = {"event": "eval", "step": 10, "metrics": {"eval_loss": 1.0, "eval_accuracy": 0.9}}
    history = [{"event": "params", "step": 0, "trainable": 9000}, evaluated]
    for name, recipe in (("a", runs.recipe()), ("b", runs.recipe() | asks)):
        stopped = runs.write_run(tmp_path / name / "s0", recipe=recipe, history=history)
        ended = runs.write_run(tmp_path / name / "s1", recipe={**recipe, "seed": 1}, metrics=runs.metrics(1, 0.5))
        [row] = (table := compare([stopped, ended])).rows
        assert table.metric == "matthews_correlation" and row.scores == [None, 0.5]
        assert row.params == {"initial": 1000, "final": 500, "average": 700}


def seeds(folder: Path, scores: list[float], **more: object) -> list[Path]:
    return [runs.plain_run(folder / f"s{s}", seed=s, score=v, **more) for s, v in enumerate(scores)]


def test_a_gap_that_is_the_same_with_every_seed_is_one_however_the_seeds_differ(tmp_path: Path) -> None:
    a = seeds(tmp_path / "a", [0.60, 0.62, 0.64], params=1000)
    b = seeds(tmp_path / "b", [0.59, 0.61, 0.63], params=500, where=CKA)
    table = compare([*a, *b])
    assert table.best == 0 and table.finding.startswith("`where=all` scored best: matthews_correlation 0.62 ± 0.012; ")
    assert table.rows[1].difference_text == "−0.01 (−0.01 to −0.01)"


@pytest.mark.parametrize("n", [2, 3, 5])
def test_an_interval_over_rows_allows_for_how_few_the_seeds_are(n: int) -> None:
    """No narrower than Student's t of the seeds' error and the rows' together, worked out from the rows' answers."""
    draw, rows = np.random.default_rng(n), 400
    right = [draw.random((n, rows)) < share for share in (0.85, np.linspace(0.7, 0.8, n)[:, None])]
    ours, theirs = (
        [pairing.Scored(seed, float(a.mean()), {"rows": rows, "label": [1] * rows, "predicted": a.astype(int).tolist(),
                                                "classes": ["no", "yes"]}) for seed, a in enumerate(one)]
        for one in right
    )  # fmt: skip
    apart = right[0].astype(float) - right[1]
    of_seeds = apart.mean(axis=1).var(ddof=1) / n
    of_rows = apart.mean(axis=0).var(ddof=1) / rows
    freedom = (of_seeds + of_rows) ** 2 / (of_seeds**2 / (n - 1) + of_rows**2 / (rows - 1))
    half = stats.t.ppf(0.975, freedom) * math.sqrt(of_seeds + of_rows)
    found = pairing.difference(ours, theirs, "accuracy", "theirs")
    assert found.mean == pytest.approx(apart.mean())
    assert (found.low, found.high) == pytest.approx((apart.mean() - half, apart.mean() + half), rel=0.08)


def test_a_lead_within_its_interval_is_not_called_best(tmp_path: Path) -> None:
    """Differences 0.01, 0.02, 0.03: mean 0.02, standard error 0.01/√3, Student's t(2) at 97.5 % is 4.303, so that
    the interval is 0.02 ± 0.0248. (The bootstrap's alone would end at the smallest of the three.)"""
    a = seeds(tmp_path / "a", [0.61, 0.62, 0.63], params=1000)
    b = seeds(tmp_path / "b", [0.60, 0.60, 0.60], params=500, where=CKA)
    table = compare([*a, *b])
    assert table.best is None
    found = table.rows[1].difference
    assert (found.mean, found.low, found.high) == pytest.approx((-0.02, -0.04484, 0.00484), abs=1e-5)
    assert (found.seeds, found.rows, found.to) == (3, None, "where=all")
    assert table.finding.startswith(
        "`where=all` has the highest matthews_correlation, 0.62 ± 0.0058, but no more than chance above `where=cka`; "
        "`where=cka` is 0.02 behind (within chance) with 50 %"
    )


def test_two_seeds_have_no_interval_and_no_best(tmp_path: Path) -> None:
    table = compare([*seeds(tmp_path / "a", [0.6, 0.7]), *seeds(tmp_path / "b", [0.5, 0.6], where=CKA)])
    assert table.best is None and table.rows[1].difference.low is None
    assert "which so few seeds cannot tell from chance" in table.finding


def with_rows(
    folder: Path,
    label: list[int],
    predicted: list[int],
    fingerprint: str = "f",
    seed: int = 0,
    metric: str = "accuracy",
    **axes: object,
) -> Path:
    """A finished run that kept what each row was given."""
    kept = {
        "rows": len(label),
        "fingerprint": fingerprint,
        "label": label,
        "predicted": predicted,
        "classes": ["a", "b"],
    }
    score = float(pairing._row_score(kept, metric)(np.ones((1, len(label))))[0])
    found = {**runs.metrics(seed), "metric": metric, "metrics": {metric: score}}
    run = runs.write_run(folder, recipe=runs.recipe(seed, **axes), metrics=found)
    (folder / "predictions.json").write_text(json.dumps({"validation": kept}))
    return run


def test_one_seed_is_compared_row_by_row(tmp_path: Path) -> None:
    """Of 200 rows one run has 40 right that the other has wrong, and no row the other way: the difference is 0.2
    with standard error √(0.2 · 0.8 / 200) = 0.0283, so that the interval is about 0.2 ± 0.055."""
    label = [0, 1] * 100
    better, worse = [*label], [1 - v if i < 40 else v for i, v in enumerate(label)]
    table = compare([with_rows(tmp_path / "a", label, better), with_rows(tmp_path / "b", label, worse, where=CKA)])
    found = table.rows[1].difference
    assert (found.mean, found.seeds, found.rows) == (pytest.approx(-0.2), 1, 200)
    assert (found.low, found.high) == pytest.approx((-0.255, -0.145), abs=0.01)
    assert table.best == 0


def test_a_few_rows_either_way_are_no_lead(tmp_path: Path) -> None:
    label = [0, 1] * 100
    a = [1 - v if i < 11 else v for i, v in enumerate(label)]
    b = [1 - v if 100 <= i < 113 else v for i, v in enumerate(label)]
    table = compare([with_rows(tmp_path / "a", label, a), with_rows(tmp_path / "b", label, b, where=CKA)])
    assert table.best is None and table.rows[1].difference.low < 0 < table.rows[1].difference.high


def test_runs_scored_on_other_rows_stand_apart(tmp_path: Path) -> None:
    label = [0, 1] * 20
    a = with_rows(tmp_path / "a", label, label)
    b = with_rows(tmp_path / "b", label, [0] * 40, "other rows", where=CKA)
    table = compare([a, b], tmp_path / "page.html")
    assert [row.scored_on for row in table.rows] == [0, 1] and table.best is None
    assert [row.difference for row in table.rows] == [None, None]
    assert table.finding == "2 settings side by side"
    assert "not ranked against each other. Apart stand: `where=all`; `where=cka`." in table.notes[0]


def test_a_file_that_changed_between_two_seeds_keeps_them_out_of_one_mean(tmp_path: Path) -> None:
    label = [0, 1] * 20
    a = with_rows(tmp_path / "a", label, label, "before", 0)
    b = with_rows(tmp_path / "b", label, label, "after", 1)
    assert len(compare([a, b]).rows) == 2


def test_without_kept_rows_the_recipes_tell_whether_data_are_the_same(tmp_path: Path) -> None:
    recipes = [{**runs.recipe(), "data": {"train": "t", "validation": v}} for v in ("v", "w")]
    folders = [runs.write_run(tmp_path / v["data"]["validation"], recipe=v, metrics=runs.metrics()) for v in recipes]
    assert [row.scored_on for row in compare(folders).rows] == [0, 1]
    more = {**recipes[0], "data": {**recipes[0]["data"], "train": "more"}}  # scored on the same rows
    other = runs.write_run(tmp_path / "more", recipe=more, metrics=runs.metrics())
    assert [row.scored_on for row in compare([folders[0], other]).rows] == [0, 0]


def test_differences_are_to_a_baseline_named_by_its_row_or_its_folder(tmp_path: Path) -> None:
    a = seeds(tmp_path / "a", [0.61, 0.62, 0.63])
    b = seeds(tmp_path / "b", [0.50, 0.51, 0.52], where=CKA)
    c = seeds(tmp_path / "c", [0.50, 0.52, 0.51], where={"method": "last", "ratio": 0.5})
    table = compare([*a, *b, *c], baseline="where=cka")
    assert table.baseline == "where=cka" and table.rows[1].difference is None
    assert table.rows[0].difference.mean == pytest.approx(0.11)
    assert table.finding == (
        "`where=all` (+0.11, 0.11 to 0.11) is better than `where=cka`; "
        "`where=last` (0, −0.025 to 0.025) is not told apart from `where=cka`"
    )
    assert compare([*a, *b, *c], baseline=str(b[1])).to_json() == table.to_json()
    assert table.columns[2] == "difference" and table.cells[1][2] == "–"
    with pytest.raises(ConfigError, match=r"baseline='where=ckaa': no such row. Did you mean 'where=cka'"):
        compare([*a, *b], baseline="where=ckaa")


def test_seeds_and_rows_are_drawn_together(tmp_path: Path) -> None:
    """Two seeds of which one is right everywhere and one wrong everywhere: the rows alone would say that the mean is
    certain, the seeds drawn again that it is anything between. Student's t(1), which two seeds have, is 12.706 at
    97.5 %, and their standard error 0.5: so few say nothing."""
    label = [0, 1] * 50
    wrong = [1 - v for v in label]
    a = [with_rows(tmp_path / f"a{s}", label, p, seed=s) for s, p in enumerate((label, wrong))]
    b = [with_rows(tmp_path / f"b{s}", label, wrong, seed=s, where=CKA) for s in range(2)]
    found = compare([*a, *b]).rows[1].difference
    assert (found.mean, found.low, found.high) == pytest.approx((-0.5, -6.853, 5.853), abs=1e-3)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "f1_macro", "matthews_correlation"])
def test_scores_of_drawn_rows_are_those_of_the_tasks(metric: str) -> None:
    rng = np.random.default_rng(0)
    for classes in (2,) if metric == "f1" else (2, 4):
        label, predicted = rng.integers(classes, size=(2, 60))
        kept = {"label": label, "predicted": predicted, "classes": list(range(classes))}
        for rows in (np.arange(60), rng.integers(60, size=60), np.flatnonzero(predicted == 0)):
            score = getattr(classification, metric)(predicted[rows], label[rows])
            times = np.bincount(rows, minlength=60)[None]
            assert pairing._row_score(kept, metric)(times) == pytest.approx(score)


@pytest.mark.parametrize("metric", ["pearson", "spearmanr", "mse"])
def test_scores_of_drawn_numbers_are_those_of_the_tasks(metric: str) -> None:
    rng = np.random.default_rng(0)
    label, predicted = rng.integers(5, size=60).astype(float), rng.normal(size=60).round(1)
    draws = [rng.integers(60, size=60), np.arange(60), np.full(60, 7), np.flatnonzero(label == 3)]
    times = np.stack([np.bincount(rows, minlength=60) for rows in draws])
    score = pairing._row_score({"label": label, "predicted": predicted}, metric)
    each = [getattr(classification, metric)(predicted[rows], label[rows]) for rows in draws]
    assert score(times) == pytest.approx(each, abs=1e-12)


def test_written_answers_are_compared_by_their_tokens() -> None:
    kept = {"answer_loss": [2.0, 1.0, 9.0], "tokens": [4, 2, 3], "right": [3, 1, 0]}
    times = np.array([[1, 1, 0]])
    assert pairing._row_score(kept, "answer_loss")(times) == pytest.approx(3 / 6)
    assert pairing._row_score(kept, "token_accuracy")(times) == pytest.approx(4 / 6)
    assert pairing._row_score(kept, "rougeL") is None


def test_the_front_has_the_rows_that_none_beats_with_as_few_parameters() -> None:
    points = [(100, 0.8), (50, 0.7), (80, 0.6), (50, 0.65), (200, 0.8)]
    assert pareto_front(points) == [1, 0]
    assert pareto_front(points, lower_is_better=True) == [3, 2]


def test_different_tasks_are_not_ranked(tmp_path: Path) -> None:
    a = runs.plain_run(tmp_path / "a", score=0.9)
    b = runs.write_run(
        tmp_path / "b",
        recipe={**runs.recipe(), "task": {"name": "glue/mrpc", "max_length": 64}},
        metrics={**runs.metrics(), "task": "glue/mrpc", "metric": "f1", "metrics": {"eval_f1": 0.8}},
    )
    table = compare([a, b])
    assert table.best is None and table.metric is None
    assert [row.name for row in table.rows] == ["task=glue/cola", "task=glue/mrpc"]
    assert [cells[1] for cells in table.cells] == ["0.9 matthews_correlation", "0.8 f1"]


def test_lower_is_better_for_a_loss(tmp_path: Path) -> None:
    a, b = ({**runs.metrics(), "metric": "perplexity", "metrics": {"eval_perplexity": v}} for v in (9.0, 7.0))
    folders = [
        runs.write_run(tmp_path / "a", recipe=runs.recipe(), metrics=a),
        runs.write_run(tmp_path / "b", recipe=runs.recipe(where=CKA), metrics=b),
    ]
    assert compare(folders).finding.startswith("`where=cka` has the lowest perplexity, 7")


def test_which_way_is_better_is_asked_of_each_metric_on_its_own(tmp_path: Path) -> None:
    losses = {"metric": "perplexity", "metrics": {"eval_perplexity": 7.0}, "greater_is_better": False}
    other = {**runs.recipe(), "task": {"name": "text"}}
    text = runs.write_run(tmp_path / "c", recipe=other, metrics={**runs.metrics(), "task": "text", **losses})
    low, high = seeds(tmp_path / "a", [0.7, 0.71, 0.7]), seeds(tmp_path / "b", [0.9, 0.91, 0.9], where=CKA)
    found = {row.name: row.difference for row in compare([*low, *high, text]).rows}
    assert [d and round(d.mean, 2) for d in found.values()] == [-0.2, None, None]


def test_a_task_says_which_way_its_own_metric_is_better(tmp_path: Path) -> None:
    history = [{"event": "eval", "step": s, "metrics": {"eval_edits": v}} for s, v in ((10, 3.0), (20, 5.0))]
    made = {"metric": "edits", "metrics": {"edits": 5.0}, "greater_is_better": False}
    a = runs.write_run(tmp_path / "a", recipe=runs.recipe(), metrics={**runs.metrics(), **made}, history=history)
    score = load(a).score
    assert score is not None and score.finding.endswith("best 3 at step 10")


def test_markdown_is_a_github_table_with_the_best_in_bold(tmp_path: Path) -> None:
    a = seeds(tmp_path / "a", [0.91, 0.91, 0.91])
    b = seeds(tmp_path / "b", [0.90, 0.90, 0.90], where=CKA)
    lines = compare([*a, *b]).as_markdown().splitlines()
    assert lines[0].startswith("| run | matthews_correlation | difference | seeds |")
    assert lines[1].startswith("| --- | ---: |")
    assert lines[2].startswith("| where=all | **0.91 ± 0** | – | 3 |")
    assert lines[3].startswith("| where=cka | 0.9 ± 0 | −0.01 (−0.01 to −0.01) | 3 |")
    assert lines[5].startswith("`where=all` scored best")


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    table = compare([runs.plain_run(tmp_path / "a", score=math.nan), runs.full_run(tmp_path / "b", layers=2, events=2)])
    data = json.loads(json.dumps(table.to_json(), allow_nan=False))
    assert data["rows"][0]["score"] is None and data["rows"][1]["params"].keys() == {
        "initial",
        "final",
        "average",
    }


def test_the_page_is_written_where_asked_and_names_no_address(tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    compare([runs.plain_run(tmp_path / "a"), runs.plain_run(tmp_path / "b", where=CKA)], out_html=out)
    text = out.read_text()
    assert "where=cka" in text and "http:" not in text and "https:" not in text


def test_a_folder_that_holds_runs_is_left_out_and_said(tmp_path: Path) -> None:
    run = runs.plain_run(tmp_path / "run", score=0.5)
    for place in ("tuned/trials/a", "tuned/trials/b", "demo/lora"):
        runs.plain_run(tmp_path / place, score=0.5)
    table = compare([run, tmp_path / "tuned", tmp_path / "demo"])
    assert len(table.rows) == 1
    assert table.notes == [
        f"Left out: `{tmp_path / 'tuned'}` is no run, but holds 2 runs.",
        f"Left out: `{tmp_path / 'demo'}` is no run, but holds 1 run.",
    ]
    with pytest.raises(DataError, match=re.escape(f"name {tmp_path / 'tuned/trials/*'}")):
        compare([tmp_path / "tuned"])


def test_no_folder_and_the_same_folder_twice_are_refused(tmp_path: Path) -> None:
    run = runs.plain_run(tmp_path / "a")
    with pytest.raises(DataError, match="no run folder given"):
        compare([])
    with pytest.raises(DataError, match="given twice"):
        compare([run, tmp_path / "." / "a"])


def test_settings_that_do_the_same_are_all_on_the_front_and_none_is_called_highest(tmp_path: Path) -> None:
    folders = [runs.full_run(tmp_path / name, layers=3, events=4, rank=name) for name in ("salientlora", "adalora")]
    assert compare(folders).finding.startswith("All 2 settings have the same matthews_correlation")
    compare(folders, tmp_path / "compare.html")
    assert "give the best mean" in (tmp_path / "compare.html").read_text(encoding="utf-8")


def test_settings_of_one_score_and_other_sizes_are_told_by_what_one_saves(tmp_path: Path) -> None:
    folders = [runs.full_run(tmp_path / name, layers=3, events=4, rank=name) for name in ("salientlora", "adalora")]
    file = folders[0] / "metrics.json"
    metrics = json.loads(file.read_text())
    metrics["params"]["final"] //= 2
    file.write_text(json.dumps(metrics))
    said = compare(folders).finding
    assert said.startswith("All 2 settings have the same matthews_correlation") and "highest" not in said
    assert "% of `" in said and "final parameters" in said
