"""Sections -> one HTML file that needs nothing else: no network, no folder beside it.

Plotly's JavaScript is 4.8 MB and names some 70 addresses in its text (map tiles, licence pages; none is
asked for by the charts here). It is put into the page once, packed (gzip, base64: 1.9 MB), and unpacked by
the browser itself (`DecompressionStream`: Chrome 80, Safari 16.4, Firefox 113). Where that fails, the
headings and tables still tell everything and the page says so.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import re
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import words
from .charts import Section
from .data import Report, load
from .sections import sections


def write(run_folder: str | Path) -> Path:
    """Writes ``report.html`` into a run folder, finished or not, and returns its path.

    Raises:
        DataError: if the folder is missing, is no run folder, or holds a damaged file.
    """
    report = load(run_folder)
    path = Path(run_folder) / "report.html"
    metrics = [[name, _score(value)] for name, value in report.metrics]
    columns = ["metric", "value"]
    beside = {"without adapter": report.base_metrics}
    if report.first_rows:
        few = f"first {words.plural(report.first_rows, 'row')}"
        beside = {few: report.same_metrics, f"{few} without adapter": report.base_metrics}
    for column, scores in beside.items():
        if scores:
            columns.append(column)
            metrics = [[*row, _score(scores[row[0]]) if row[0] in scores else words.NOTHING] for row in metrics]
    save(
        path,
        page(
            "report.html",
            report.title,
            sections(report),
            report=report,
            subtitle=" · ".join(part for part in (report.header.model, report.header.task, *_when(report)) if part),
            tiles=tiles(report),
            metric_columns=columns,
            metric_rows=metrics,
        ),
    )
    return path


def _when(report: Report) -> list[str]:
    about = dict(report.about)
    version = re.search(r"trimtab (\S+?)(?:,|$)", about.get("versions", ""))
    return [about.get("began", ""), f"Trimtab {version[1]}" if version else ""]


def _against(report: Report) -> list[str]:
    """What a score is to be read against."""
    header, base = report.header, report.base_metrics.get(report.header.metric or "")
    found = [report.judged.constant] if report.judged and report.judged.constant else []
    if base is not None and report.first_rows:
        same = report.same_metrics.get(header.metric or "")
        rows = words.plural(report.first_rows, "row")
        found.append(f"without adapter: {words.number(base)} on the first {rows}, where with it: {words.number(same)}")
    elif base is not None:
        found.append(f"without adapter: {words.number(base)}")
    elif header.is_finished and header.has_new_head:
        found.append("without adapter: none, the head is new")
    elif header.is_finished:
        found.append("without adapter: see trimtab eval --base")
    return found


def _score(value: float | None) -> str:
    return words.number(value) if value is not None else "not a number"


def tiles(report: Report) -> list[tuple[str, str, str]]:
    """The summary's figures: name, value, and what stands small beneath it."""
    header = report.header
    params = header.params
    chosen = sum(mask.count("1") for mask in header.chosen.values())
    layers = sum(map(len, header.chosen.values()))
    score = "NaN" if header.score_is_nan else words.number(header.score)
    so_far = "" if header.is_finished else ", so far"
    against = "; ".join([f"{header.metric}{so_far}", *_against(report)])
    found = [("score", score, against if header.metric else "no evaluation yet")]
    if params["initial"] is not None:
        fell = words.change(params["initial"], params["final"])
        average, mean = words.short_count(params["average"]), header.planned.get("average")
        found.append(
            (
                "trainable parameters",
                words.short_count(params["final"]),
                (
                    f"from {words.short_count(params['initial'])} ({fell}), {average} on average"
                    + (f" ({words.short_count(mean)} planned)" if mean and mean != params["average"] else "")
                    if fell
                    else "from start to end"
                ),
            )
        )
    found.append(
        (
            "time",
            words.duration(header.seconds),
            f"{words.plural(header.steps, 'step')}"
            + (f", {words.duration(header.seconds_per_step)} each" if header.seconds_per_step else ""),
        )
    )
    found.append(("peak memory", words.byte_size(header.peak_memory_bytes), ""))
    found.append(
        (
            "layers adapted",
            f"{chosen} of {layers}" if layers else "all",
            f"chosen by {report.where.method}" if report.where else "no selection",
        )
    )
    samples = f"{words.plural(header.train_samples, 'training sample')}" if header.train_samples else ""
    found.append(("seed", words.NOTHING if header.seed is None else str(header.seed), samples))
    return found


def page(template: str, title: str, body: list[Section], **context: Any) -> str:
    """A whole page from a template: sections, figures and Plotly in it."""
    figures = [asdict(chart) for section in body for chart in section.charts]
    environment = Environment(
        loader=PackageLoader("trimtab.app.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"breakable": _breakable, "prose": _prose}
    return environment.get_template(template).render(
        title=title,
        sections=body,
        css=_asset("page.css"),
        script=_asset("page.js"),
        figures=embed(figures),
        plotly=packed_plotly() if figures else "",
        **context,
    )


def embed(data: Any) -> str:
    """Strict JSON that cannot end the script element it stands in."""
    return json.dumps(data, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def save(path: Path, text: str) -> None:
    """Writes a page whole or not at all, so that a killed process leaves no half page."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".tmp")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


@cache
def packed_plotly() -> str:
    from plotly.offline import get_plotlyjs  # half a second that the other commands need not spend

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), compresslevel=9, mtime=0)).decode()


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def _breakable(text: str) -> str:
    """Lets a long name break after its dots and slashes, and no number lose its unit."""
    text = re.sub(r"(?<=\D)([._/])(?=\w)", "\\1\u200b", text)  # zero-width space
    return re.sub(r"(\d) (?=(ms|s|min|h|B|KiB|MiB|GiB|M)\b|%)", "\\1\u00a0", text)


def _prose(text: str) -> Markup:
    """A sentence for the page: names in backticks become code, as they do in Markdown."""
    parts = text.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(_breakable(part)) if i % 2 else _breakable(part)
        for i, part in enumerate(parts)
    )
