"""docs/chooser.md: which recipe for so much memory, parameters and time, from the same records and from shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import yaml

from trimtab.app.report.words import byte_size, count, listing, number

from .matrix import ROWS, TASKS
from .page import filled_with
from .results import BASELINE, Cell, Results
from .words import interval, spread, table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "chooser.md"
MODELS = {"RoBERTa-base": ("roberta-base", "float32", ""), "Llama 2 7B": ("llama-2-7b", "bfloat16", "load_in_4bit")}
"""Published configs, the dtype that they train in, and how they are packed where memory is short."""


def write(folder: Path) -> None:
    PAGE.write_text(filled(PAGE.read_text(), Results(folder)))


def filled(page: str, results: Results) -> str:
    return filled_with(page, {name: lambda name=name: BLOCKS[name](results) for name in BLOCKS})


# -- what holds by itself ------------------------------------------------------------------------------


def short(results: Results) -> str:
    """What the records say of plain LoRA and of the plainest ways to have less of it."""
    tasks = results.measured
    apart = {(task, row): results.apart(task, row, BASELINE) for task in tasks for row in TASKS[task].tuned}
    above = [f"{ROWS[row].title} on {TASKS[task].title}" for (task, row), d in apart.items() if d and (d.low or 0) > 0]
    lines = [
        f"- {listing(above)} scored above LoRA r 8 by more than chance."
        if above
        else "- No row scored above LoRA r 8 by more than chance."
    ]
    for row in ("lora-r4", "lora-r2", "cka-lora", "uniform-lora", "budget-late"):
        found = [f"{interval(d)} on {TASKS[task].title}" for task in tasks if (d := apart.get((task, row)))]
        lines.append(f"- {ROWS[row].title}: {listing(found) if found else 'not run yet'}.")
    return "Points to LoRA r 8, with 95 % intervals:\n\n" + "\n".join(lines)


# -- memory --------------------------------------------------------------------------------------------


def memory(results: Results) -> str:
    """What a step takes at its height, forecast from shapes as `trimtab plan --memory` does."""
    rows = []
    for title, (config, dtype, packed) in MODELS.items():
        for quantization in (None, {packed: True}) if packed else (None,):
            for batch in (1, 8):
                found = _forecast(config, dtype, quantization, batch)
                how = f"{dtype}, weights in 4 bits" if quantization else dtype
                cells = [found["weights"], found["peak_without_checkpointing"], found["peak_with_checkpointing"]]
                rows.append([f"{title}, {how}, batch {batch}", *map(byte_size, cells)])
    return table(["LoRA r 8 on all linears, 512 tokens a row", "weights", "peak", "with checkpointing"], rows)


def _forecast(config: str, dtype: str, quantization: dict[str, bool] | None, batch: int) -> dict[str, int]:
    import torch
    from peft import LoraConfig

    from trimtab.app import models
    from trimtab.app.memory import forecast

    is_decoder = "llama" in config
    kind, task = ("CausalLM", "CAUSAL_LM") if is_decoder else ("SequenceClassification", "SEQ_CLS")
    spec = models.ModelSpec(config=str(ROOT / "recipes" / "configs" / f"{config}.json"))
    model = models.meta_model(models.load_config(spec), f"AutoModelFor{kind}")
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type=task)
    found = forecast(model, adapter, batch=batch, tokens=512, dtype=getattr(torch, dtype), quantization=quantization,
                     device="cuda")  # fmt: skip
    assert found
    return found.to_json()


# -- parameters and time -------------------------------------------------------------------------------


def held(results: Results) -> str:
    """Per task: what was best among all that hold no more at the end."""
    return _by_task(results, "held at the end", lambda cell: cell.of("params", "held"), lambda n: count(round(n)))


def average(results: Results) -> str:
    """The same by what trains in the mean over the steps."""
    return _by_task(results, "trained on average", lambda cell: cell.of("params", "average"), lambda n: count(round(n)))


def hours(results: Results) -> str:
    """The same by CPU time of training, as a multiple of LoRA's."""

    def time(cell: Cell) -> float:
        lora = results.cell(cell.task, BASELINE)
        assert lora
        return cell.of("cpu_seconds", "training") / lora.of("cpu_seconds", "training")

    return _by_task(results, "time, LoRA r 8 is 1", time, lambda share: number(share, 2))


def _by_task(results: Results, title: str, size: Callable[[Cell], float], shown: Callable[[float], str]) -> str:
    parts = []
    for task in results.measured:
        cells = [cell for row in TASKS[task].tuned if (cell := results.cell(task, row))]
        best: list[Cell] = []
        for cell in sorted(cells, key=lambda cell: (size(cell), -cell.mean)):
            if not best or cell.mean > best[-1].mean:
                best.append(cell)
        rows = [
            [
                shown(size(cell)), ROWS[cell.row].title, f"`{_recipe(cell)}`", cell.learning_rate,
                f"{spread(cell)} ({len(cell.records)})",
                "–" if cell.row == BASELINE else interval(results.apart(task, cell.row, BASELINE)),
            ]
            for cell in best
        ]  # fmt: skip
        columns = [title, "best of what has no more", "recipe", "rate", "score (seeds)", "points to LoRA r 8"]
        parts.append(f"**{TASKS[task].title}**, {len(cells)} rows compared\n\n{table(columns, rows)}")
    return "\n\n".join(parts) or "Nothing is measured yet."


def _recipe(cell: Cell) -> str:
    """The sections that make a row what it is, as they stand in a recipe: of the row, since defaults may change."""
    row = ROWS[cell.row]
    if row.kind:
        return "–"
    parts: dict[str, dict[str, object]] = {"adapter": {"r": 8}}
    for text in row.overrides:
        key, _, value = text.partition("=")
        section, _, name = key.partition(".")
        given = yaml.safe_load(value.replace("SAMPLES", "0"))
        if "GONE" in value:  # the task's length says how much
            given["prox_threshold"] = cell.records[0]["settings"]["rank"]["prox_threshold"]
        if name:
            parts[section][name] = given
        else:
            parts[section] = given if isinstance(given, dict) else {"method": given}
    for values in parts.values():
        values.pop("samples", None)  # the default, but for some tasks
        values.pop("alpha", None)  # 2 r, the default
    return json.dumps(parts, ensure_ascii=False).replace('"', "")[1:-1]


BLOCKS: dict[str, Callable[[Results], str]] = {
    "short": short,
    "memory": memory,
    "held": held,
    "average": average,
    "hours": hours,
}
