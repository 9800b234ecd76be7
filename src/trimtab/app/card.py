"""The model card of a run's adapter: `README.md` in the hub's format, from what the run's folder holds.

It is read by people who have neither the run nor its machine: no path of it is in there, and no secret. What comes
from data or settings is escaped, so that a class name is text and not a heading.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..plans import Plan, SitePlan
from . import loading
from .about import SECRETS
from .report.words import count, number
from .runfolder import RunFolder, write_text

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

    from .job import Job

CARD = "README.md"
MARK = "<!-- Written by Trimtab, anew with each evaluation and export; without this line it stays as it is. -->"
_PIPELINES = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageTextToText": "image-text-to-text",
}
_ANYWHERE = re.compile(r"(?:[/~\\]|[A-Za-z]:[/\\]|file:)")
_SECRET = re.compile(rf"(?:{SECRETS})$", re.IGNORECASE)


def write(job: Job, folder: RunFolder, target: Path, base: str | None) -> None:
    """Writes the card into ``target``, unless a card there is the user's own.

    Args:
        target: a folder with the adapter.
        base: hub id of the base model; None where only this machine has it.
    """
    from huggingface_hub import ModelCard

    path = target / CARD
    if path.is_file() and MARK not in path.read_text(encoding="utf-8", errors="replace"):
        return
    plan = Plan.from_json(folder.read(folder.plan)) if folder.plan.is_file() else None
    metrics = folder.read(folder.metrics).get("metrics", {}) if folder.is_finished else {}
    parts = [
        f"# {text(folder.path.resolve().name)}",
        MARK,
        _what(job, plan, base),
        _scores(job, folder, metrics),
        _loading(job, base),
        _layers(plan, has_ranks=job.recipe.adapter.type in ("lora", "vera")),
        _recipe(job, base),
        _versions(folder),
    ]
    card = ModelCard(f"---\n{_data(job, folder, metrics, base).to_yaml()}\n---\n\n" + "\n\n".join(filter(None, parts)))
    write_text(path, str(card).rstrip() + "\n")


def text(value: Any) -> str:
    r"""Anything as one line that Markdown shows as it is.

    >>> text("a|b\n# <i>")
    'a\\|b \\# \\<i\\>'
    """
    return re.sub(r"([\\`*_{}\[\]<>#|~$&!])", r"\\\1", " ".join(str(value).split()))


def fenced(code: str, language: str) -> str:
    """A block of code, whatever backticks are in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}{language}\n{code.rstrip()}\n{fence}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _data(job: Job, folder: RunFolder, metrics: Mapping[str, float], base: str | None) -> ModelCardData:
    """The card's head, by which the hub finds and shows a model."""
    from huggingface_hub import EvalResult, ModelCardData

    kind = job.recipe.adapter.type
    pipeline = "summarization" if job.task.name == "summarize" else _PIPELINES.get(job.task.auto_class)
    datasets = _datasets(job)
    scores = {name: value for name, value in metrics.items() if name != "loss" and math.isfinite(value)}
    results = [
        EvalResult(
            task_type=pipeline,
            dataset_type=datasets[0],
            dataset_name=job.task.name,
            dataset_config=job.recipe.data.config,
            metric_type=name,
            metric_value=value,
        )
        for name, value in scores.items()
        if pipeline and datasets
    ]
    return ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag=pipeline,
        tags=[kind, "trimtab", *([f"base_model:adapter:{base}", "transformers"] if base else [])],
        datasets=datasets or None,
        metrics=[job.task.metric] if job.task.metric in metrics else None,
        eval_results=results or None,
        model_name=folder.path.resolve().name if results else None,
    )


def _datasets(job: Job) -> list[str]:
    """Hub ids of the datasets that the rows came from; empty for the user's own files."""
    from .tasks import glue

    data = job.recipe.data
    if data.hub is not None:
        return [] if _ANYWHERE.match(data.hub) else [data.hub]
    if data.has_own:
        return []
    if job.task.name.startswith("glue/"):
        return [glue.HUB_ID]
    return list(dict.fromkeys(source[0] for source in getattr(job.task, "hub_sources", {}).values()))


def _what(job: Job, plan: Plan | None, base: str | None) -> str:
    kind = {"lora": "LoRA"}.get(job.recipe.adapter.type, job.recipe.adapter.type)
    of = f"[{text(base)}](https://huggingface.co/{base})" if base else text(_bare(job.recipe.model.name_or_path or ""))
    told = [f"A {kind} adapter of {of} for {text(job.task.name)}."]
    if base is None:
        told.append(
            "The base model was a folder on the machine that trained: `base_model_name_or_path` in "
            "`adapter_config.json` may have to be changed to where you have that model."
        )
    if plan is not None and (final := plan.params.get("final")) is not None:
        told.append(f"It has {count(final)} adapter parameters, {count(plan.params.get('average'))} in the mean "
                    "over training.")  # fmt: skip
    if job.modules_to_save:
        told.append(f"Trained and saved with it, in whole: {', '.join(map(text, job.modules_to_save))}.")
    if names := getattr(job.task, "label_names", None):
        told.append(f"Classes: {', '.join(map(text, names))}.")
    return " ".join(told)


def _scores(job: Job, folder: RunFolder, metrics: Mapping[str, float]) -> str:
    if not metrics:
        return ""
    taken = folder.read(folder.base) if folder.base.is_file() else {}
    few = f"first {taken['first_rows']} rows" if "first_rows" in taken else ""
    beside = {few: taken.get("with_adapter", {}), f"base model alone{few and ', '}{few}": taken.get("metrics", {})}
    beside = {name: scores for name, scores in beside.items() if scores}
    head = ["score", "adapter", *beside]
    rows = [
        [text(name), number(value), *(number(scores.get(name)) for scores in beside.values())]
        for name, value in metrics.items()
    ]
    return "## Scores\n\n" + _table(head, rows)


def _loading(job: Job, base: str | None) -> str:
    code = loading.adapter_lines(job, base or "path/to/the/base/model", "path/to/this/folder")
    return (
        code and f"## How to load\n\nThe adapter's place is a folder, or its id on the hub.\n\n{fenced(code, 'python')}"
    )


def _layers(plan: Plan | None, has_ranks: bool) -> str:
    """A row a layer: what it was chosen by, and the rank of each kind of module that is left."""
    if plan is None or not plan.sites:
        return ""
    kinds = list(dict.fromkeys(p.site.kind for p in plan.sites if p.site.block is not None)) if has_ranks else []
    scored = plan.where.layer_scores if plan.where else {}
    places: dict[tuple[str, int], dict[str, SitePlan]] = {}
    for p in plan.sites:
        if p.site.stack is not None and p.site.block is not None:
            places.setdefault((p.site.stack, p.site.block), {})[p.site.kind] = p
    depth = {(path, i) for path, mask in plan.where.stacks.items() for i in range(len(mask))} if plan.where else set()
    rows = []
    for stack, block in sorted({*places, *depth}):
        score = scored[stack][block] if stack in scored else None
        here = places.get((stack, block), {})
        ranks = [str(here[kind].rank_left) if kind in here else "" for kind in kinds] or ["yes" if here else ""]
        rows.append([text(f"{stack}.{block}"), *([number(score)] if scored else []), *ranks])
    for p in plan.sites if has_ranks else ():
        if p.site.block is None:
            rows.append([text(p.site.name), *([""] if scored else []), *[""] * len(kinds[1:]), str(p.rank_left)])
    method = plan.where.method if plan.where else ""
    head = [
        "layer",
        *([text(plan.where.measure)] if plan.where and scored else []),
        *map(text, kinds or ["rank" if has_ranks else "adapted"]),
    ]
    how = f" Layers were chosen by {text(method)}." if method else ""
    total = (
        f"Total rank {count(sum(p.rank_left for p in plan.sites))} over {len(plan.sites)} modules." if has_ranks else ""
    )
    title = "Layers and ranks" if has_ranks else "Layers"
    return f"## {title}\n\n{f'{total}{how}'.strip()}\n\n{_table(head, rows)}"


def _recipe(job: Job, base: str | None) -> str:
    """What was set, as a recipe; of a path only its last part."""
    settings = job.recipe.model_dump(mode="json", exclude_defaults=True, exclude={"output_dir", "export"})
    if base is not None:
        settings["model"]["name_or_path"] = base
    code = yaml.safe_dump(_bare(settings), sort_keys=False, allow_unicode=True)
    return f"## Training\n\n{fenced(code, 'yaml')}"


def _bare(value: Any) -> Any:
    """Settings without what is of one machine, or secret."""
    if isinstance(value, Mapping):
        return {key: _bare(part) for key, part in value.items() if not _SECRET.search(str(key))}
    if isinstance(value, list):
        return [_bare(part) for part in value]
    if isinstance(value, str) and _ANYWHERE.match(value):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def _versions(folder: RunFolder) -> str:
    found = folder.read(folder.about).get("versions", {}) if folder.about.is_file() else {}
    return f"Made with {', '.join(f'{name} {text(version)}' for name, version in found.items())}." if found else ""
