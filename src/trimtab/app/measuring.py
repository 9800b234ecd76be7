"""How long a run will take: a few steps of it, taken here, in a folder that is thrown away."""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..plans import Plan
from .peft_config import adapted, adapter_config, choose_without_data, layers_to_choose_from, reads_rows
from .recipe import Recipe
from .screen import Screen

STEPS = 4
"""Optimizer steps; the first one, which meets everything for the first time, does not count."""


def with_time(plan: Plan, recipe: Recipe, screen: Screen) -> Plan:
    """The plan with ``settings["measured"]``: seconds of a step, and of as many as the run has.

    Layers that only data can choose are as many of the first ones; nothing is pruned or frozen yet, which makes later
    steps cheaper.
    """
    import torch
    from transformers import TrainerCallback

    from .job import load
    from .runfolder import RunFolder
    from .spent import peak_memory
    from .trainer import make_trainer

    short = {"max_steps": STEPS, "eval_strategy": "no", "save_strategy": "no", "logging_steps": STEPS}
    left_out = ("load_best_model_at_end", "push_to_hub", "report_to")
    train = {**{key: value for key, value in recipe.train.items() if key not in left_out}, **short}
    chosen = recipe.model_copy(update={"train": train, "early_stopping": None, "rank": None, "freeze": None})
    chosen = chosen.model_copy(update={"budget": None})
    job = load(chosen, screen)
    where = None
    if recipe.where is not None:
        stand_in = recipe.where.model_copy(update={"method": "first"} if reads_rows(recipe.where) else {})
        where = choose_without_data(
            job.model, stand_in, recipe.seed, layers_to_choose_from(recipe, recipe.where, job.model, job.task.task_type)
        )
    config = adapter_config(
        chosen, job.model, where=where, task_type=job.task.task_type, modules_to_save=job.modules_to_save
    )
    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder, screen.stage("measure") as stage:
        model = adapted(job.model, config)
        make_trainer(job, model, RunFolder(Path(folder)), [Clock()]).train()
        each = [after - before for before, after in itertools.pairwise(ends)]
        stage.result = f"{len(ends)} steps"
    step = statistics.median(each)
    total = plan.settings.get("total_steps")
    measured = {
        "steps": len(each),
        "step_seconds": step,
        "training_seconds": None if total is None else step * total,
        "peak_memory_bytes": peak_memory(),
    }
    return replace(plan, settings={**plan.settings, "measured": measured})
