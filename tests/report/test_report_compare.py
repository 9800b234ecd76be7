"""Several runs in one table: seeds joined, rows named from what differs, costs beside scores."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import synthetic_runs as runs

from trimtab.errors import DataError
from trimtab.report import compare
from trimtab.report.comparing import names_of

CKA = {"method": "cka", "ratio": 0.5, "samples": 512}


def test_two_settings_are_named_by_the_axis_in_which_they_differ(tmp_path: Path) -> None:
    lora = runs.plain_run(tmp_path / "a", score=0.91, params=1000, seconds=60)
    half = runs.plain_run(tmp_path / "b", score=0.90, params=500, seconds=45, where=CKA)
    table = compare([lora, half])
    assert [row.name for row in table.rows] == ["where=all", "where=cka"]
    assert table.finding == (
        "`where=all` scored best: matthews_correlation 0.91; `where=cka` is 0.01 behind "
        "with 50 % of its final parameters and 75 % of its time"
    )
    assert table.rows[1].settings == {"where.method": "cka"}
    assert table.cells[1] == ["where=cka", "0.9", "1", "500", "500", "500", "45.0 s", "768.0 MiB"]


def test_runs_that_differ_only_by_seed_are_one_row(tmp_path: Path) -> None:
    folders = [
        runs.plain_run(tmp_path / str(s), seed=s, score=v, seconds=t)
        for s, v, t in ((0, 0.5, 10.0), (1, 0.6, 20.0), (2, 0.7, 30.0))
    ]
    [row] = compare(folders).rows
    assert row.score == pytest.approx(0.6) and row.score_sd == pytest.approx(0.1)  # n − 1
    assert row.score_text == "0.6 ± 0.1" and row.seeds == [0, 1, 2] and row.seconds == 20.0


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
    assert table.notes == ["`where=all`: no score from s1 (unfinished, or not a number)."]


def test_a_gap_within_the_spread_of_the_seeds_is_called_so(tmp_path: Path) -> None:
    a = [runs.plain_run(tmp_path / f"a{s}", seed=s, score=0.60 + 0.02 * s, params=1000) for s in range(3)]
    b = [runs.plain_run(tmp_path / f"b{s}", seed=s, score=0.59 + 0.02 * s, params=500, where=CKA) for s in range(3)]
    assert "is 0.01 behind (within one standard deviation) with 50 %" in compare([*a, *b]).finding


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
    assert compare(folders).best == 1


def test_markdown_is_a_github_table_with_the_best_in_bold(tmp_path: Path) -> None:
    a = runs.plain_run(tmp_path / "a", score=0.91)
    b = runs.plain_run(tmp_path / "b", score=0.90, where=CKA)
    lines = compare([a, b]).as_markdown().splitlines()
    assert lines[0].startswith("| run | matthews_correlation | seeds |") and lines[1].startswith("| --- | ---: |")
    assert lines[2].startswith("| where=all | **0.91** | 1 |") and lines[3].startswith("| where=cka | 0.9 | 1 |")
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


def test_no_folder_and_the_same_folder_twice_are_refused(tmp_path: Path) -> None:
    run = runs.plain_run(tmp_path / "a")
    with pytest.raises(DataError, match="no run folder given"):
        compare([])
    with pytest.raises(DataError, match="given twice"):
        compare([run, tmp_path / "." / "a"])
