"""The page in a real browser: charts drawn, console silent, network unasked, no sideways scroll."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import synthetic_runs as runs
from chromium_pipe import CHROMIUM, Page

from trimtab.app.report import compare, write

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")]

# Marks of one figure: bars, line segments, single points, heat map images.
MARKS = """Object.fromEntries([...document.querySelectorAll('.plot')].map(plot => [plot.id, plot.querySelectorAll(
    '.bars .point path, .scatterlayer .js-line, .scatterlayer .point, .hm image').length]))"""
FITS = """document.documentElement.scrollWidth <= window.innerWidth &&
    [...document.querySelectorAll('.scroll')].every(table => table.scrollWidth <= table.clientWidth)"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    page = Page(tmp_path_factory.mktemp("profile"))
    yield page
    page.close()


def shown(browser: Page, path: Path, **how: object) -> Page:
    browser.show(f"file://{path}", **how)  # type: ignore[arg-type]
    assert browser.wait_for("document.documentElement?.dataset.charts") == "drawn"
    return browser


def quiet(page: Page) -> bool:
    outside = [url for url in page.requests if not url.startswith(("file:", "data:", "blob:"))]
    return (page.console, outside) == ([], [])


@pytest.fixture(scope="module")
def full_report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(runs.full_run(tmp_path_factory.mktemp("full") / "run"))


@pytest.fixture
def full(browser: Page, full_report: Path) -> Page:
    """The report of a run with everything in it, opened once; each test leaves it as it was."""
    if browser.evaluate("location.pathname") != str(full_report):
        shown(browser, full_report)
    return browser


def scheme(page: Page, value: str, media: str = "") -> None:
    page.call("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": value}])


def test_every_chart_of_a_full_run_is_drawn_in_silence(full: Page) -> None:
    marks = full.evaluate(MARKS)
    assert len(marks) == 12 and all(marks.values()), marks
    assert quiet(full), (full.console, full.requests)


def test_the_charts_follow_when_the_theme_turns_dark(full: Page) -> None:
    color = "getComputedStyle(document.querySelector('#loss .xtick text')).fill"
    light = full.evaluate(color)
    scheme(full, "dark")
    full.wait_for(f"{color} !== {light!r}")
    scheme(full, "light")
    full.wait_for(f"{color} === {light!r}")
    assert quiet(full)


def test_a_module_can_be_picked_and_the_legend_goes_with_the_bands(full: Page) -> None:
    choose = """(option => { const list = document.querySelector('select');
        list.value = option; list.dispatchEvent(new Event('input')); })"""
    full.evaluate(f"{choose}('1')")
    assert full.evaluate("document.querySelector('[data-legend=values]').hidden")
    assert full.evaluate("document.getElementById('values').data[0].name") == "#1"
    assert full.evaluate("document.querySelectorAll('#values .js-line').length") > 1
    full.evaluate(f"{choose}('0')")
    assert not full.evaluate("document.querySelector('[data-legend=values]').hidden") and quiet(full)


def test_print_shows_moments_instead_of_the_slider_on_white(full: Page) -> None:
    scheme(full, "dark", media="print")
    full.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert full.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert full.evaluate("getComputedStyle(document.querySelector('.control')).display") == "none"
    assert full.evaluate("getComputedStyle(document.querySelector('.chart.print')).display") == "block"
    widths = full.evaluate("[...document.querySelectorAll('.main-svg')].map(svg => svg.width.baseVal.value)")
    assert widths and max(widths) <= 680  # what fits between the margins of A4 and US letter
    settings = "document.querySelector('dl.settings').closest('details').open"
    assert full.evaluate(settings)
    full.evaluate("window.dispatchEvent(new Event('afterprint'))")
    scheme(full, "light")
    assert not full.evaluate(settings)
    assert full.pdf()[:5] == b"%PDF-" and quiet(full)


def test_a_phone_needs_no_sideways_scroll_even_for_long_names(browser: Page, tmp_path: Path) -> None:
    long = "self_attention_module.projection_layers." + "a_rather_long_linear_layer_name_" * 2
    kinds = {
        f"{long}.query": (8, 8),
        f"{long}.value": (8, 8),
        "mlp.experts.0.gate_up_projection_linear": (8, 8),
    }
    run = runs.full_run(tmp_path / "run", layers=48, events=5, kinds=kinds)
    page = shown(browser, write(run), width=360)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    assert page.evaluate(FITS) and quiet(page)
    prunes = page.evaluate(
        "(table => [table.scrollHeight, table.clientHeight])(document.querySelector('#prunes-section .scroll'))"
    )
    assert 500 < prunes[0] <= prunes[1] + 1  # whole: each row is a list there


def test_the_slider_moves_the_ranks_of_every_stack(browser: Page, tmp_path: Path) -> None:
    ranks = [{f"{stack}.block.{i}.q": 3 - s for stack in ("encoder", "decoder") for i in range(2)} for s in range(3)]
    history = [{"event": "rank", "step": 10 * s, "kind": "mask", "ranks": now} for s, now in enumerate(ranks)]
    page = shown(browser, write(runs.write_run(tmp_path / "run", history=history)))
    page.evaluate("""(() => { const slider = document.querySelector('input[type=range]');
        slider.value = 0; slider.dispatchEvent(new Event('input')); })()""")
    cells = "[...document.querySelectorAll('.chart.screen .plot')].map(plot => plot.data[0].z.flat())"
    assert page.evaluate(cells) == [[3, 3], [3, 3]]
    assert page.evaluate("document.querySelector('output').textContent") == "step 0 · 12 ranks kept"


def test_runs_with_nan_or_a_single_point_draw_what_they_have(browser: Page, tmp_path: Path) -> None:
    nan = float("nan")
    history = [{"event": "log", "step": s, "loss": v} for s, v in ((10, 0.7), (20, nan), (30, nan))]
    history += [{"event": "eval", "step": 30, "metrics": {"eval_accuracy": 0.5}}]
    run = runs.write_run(tmp_path / "run", history=history, where=runs.where(), metrics=runs.metrics(score=nan))
    page = shown(browser, write(run))
    marks = page.evaluate(MARKS)
    assert marks["loss"] and marks["where-0"] and quiet(page)


def test_the_comparison_is_drawn_in_silence_and_fits_a_phone(browser: Page, tmp_path: Path) -> None:
    folders = [runs.plain_run(tmp_path / f"a{s}", seed=s, score=0.5 + s / 50) for s in range(2)]
    folders += [
        runs.plain_run(tmp_path / "b", where={"method": "cka", "ratio": 0.5}),
        runs.full_run(tmp_path / "c"),
    ]
    compare(folders, out_html=tmp_path / "compare.html")
    page = shown(browser, tmp_path / "compare.html", width=360)
    page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
    marks = page.evaluate(MARKS)
    assert set(marks) == {
        "score",
        "pareto",
        "loss-steps",
        "params-bars",
        "time",
        "memory",
        "score-steps",
        "params-steps",
    } and all(marks.values())
    assert page.evaluate(FITS) and quiet(page)
