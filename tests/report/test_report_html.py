"""The page: one file, no address in it, strict data, valid figures."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest
import synthetic_runs as runs

from trimtab.app.report import compare, load, write
from trimtab.app.report.charts import Section
from trimtab.app.report.compare_page import sections as compare_sections
from trimtab.app.report.sections import sections


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(runs.full_run(tmp_path_factory.mktemp("html") / "run", layers=4, events=6)).read_text()


class Elements(HTMLParser):
    """Start tags with their attributes, and how often each id occurs."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_names_no_address_at_all(page: str) -> None:
    assert "http:" not in page and "https:" not in page
    unpacked = re.sub(r'id="plotly">[^<]*', "", page)  # base64, in which any few letters may stand
    assert "http" not in unpacked.lower() and not re.findall(r"[\"'(]//\w", unpacked)


def test_nothing_is_loaded_from_outside_the_file(page: str) -> None:
    loading = {"src", "href", "srcset", "data", "poster", "action"}
    addresses = [v for _, attrs in Elements(page).found for k, v in attrs.items() if k in loading]
    assert addresses == ["data:,"]  # an empty icon, so that no browser asks for /favicon.ico
    assert "@import" not in page and "url(" not in page


def test_plotly_is_in_the_page_once(page: str) -> None:
    assert page.count('id="plotly"') == 1 and len(page) < 3_000_000


def test_ids_are_unique_and_every_figure_has_its_place(page: str) -> None:
    ids = [attrs["id"] for _, attrs in Elements(page).found if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {figure["id"] for figure in figures(page)} <= set(ids)


def test_every_section_has_a_finding_and_its_numbers(page: str) -> None:
    parts = page.split('<section id="')[1:]
    assert len(parts) == 11
    for part in parts:
        assert re.search(r"<h2>[^<]*\d", part), part[:80]
        assert "<table" in part


def test_names_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = '</script><script>alert("x")</script>&<b>'
    recipe = {**runs.recipe(), "model": {"name_or_path": evil}}
    event = {"event": "rank", "step": 1, "kind": "mask", "ranks": {f"layers.0.{evil}": 1, "layers.1.q": 2}}
    text = write(runs.write_run(tmp_path / "run", recipe=recipe, history=[event])).read_text()
    assert "<script>alert" not in text
    assert any(evil in kind for kind in figures(text)[0]["data"][0]["y"])


def test_a_run_without_history_has_a_page_without_plotly(tmp_path: Path) -> None:
    text = write(runs.write_run(tmp_path / "run", recipe=runs.recipe())).read_text()
    assert "Nothing was logged yet" in text and 'id="plotly"' not in text and len(text) < 30_000


def test_the_same_run_gives_the_same_page(tmp_path: Path) -> None:
    run = runs.full_run(tmp_path / "run", layers=2, events=3)
    assert write(run).read_bytes() == write(run).read_bytes()
    assert [p.name for p in run.iterdir() if "tmp" in p.name] == []


def test_seventy_two_modules_over_forty_events_fit_in_three_megabytes(tmp_path: Path) -> None:
    assert write(runs.full_run(tmp_path / "run", layers=12, events=40)).stat().st_size < 3_000_000


def every_section(tmp_path: Path) -> list[Section]:
    full, plain = runs.full_run(tmp_path / "full", layers=3, events=4), runs.plain_run(tmp_path / "plain")
    seed = runs.plain_run(tmp_path / "seed", seed=1, score=0.6)
    return [*sections(load(full)), *compare_sections(compare([full, plain, seed]))]


def test_every_figure_is_valid_plotly(tmp_path: Path) -> None:
    for section in every_section(tmp_path):
        for chart in section.charts:
            go.Figure(coloured(chart.data), coloured(chart.layout))
            for option in chart.control.traces if chart.control else []:
                go.Figure(coloured([{**base, **trace} for base, trace in zip(chart.data, option)]))


def test_every_colour_is_a_variable_of_the_style_sheet(tmp_path: Path) -> None:
    css = (Path(load.__code__.co_filename).parent / "page.css").read_text()
    used = {
        c
        for s in every_section(tmp_path)
        for chart in s.charts
        for c in re.findall(r'"(--[\w-]+)"', json.dumps([chart.data, chart.layout]))
    }
    used |= {key.color for s in every_section(tmp_path / "again") for chart in s.charts for key in chart.legend}
    assert used and all(f"{name}:" in css for name in used)


def figures(text: str) -> list[dict[str, Any]]:
    found = re.search(r'id="figures">(.*?)</script>', text, re.S)
    assert found
    return json.loads(found[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def coloured(value: Any) -> Any:
    """What page.js does with colours, so that Plotly can check the rest."""
    if isinstance(value, str):
        return "#123456" if value.startswith("--") else value
    if isinstance(value, list):
        return [coloured(item) for item in value]
    return {k: coloured(v) for k, v in value.items()} if isinstance(value, dict) else value
