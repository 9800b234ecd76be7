"""One run -> one record. The stages are those of `trimtab run`, but for the export and the report.

Full fine-tuning and PEFT's own AdaLoRA, which no recipe says, train in the same Trainer with the same settings.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import resource
import subprocess
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .matrix import BASES, Run

if TYPE_CHECKING:
    from trimtab.app.job import Job

PRELOAD = ["trimtab.app.run", "transformers", "peft", "datasets", "sklearn.metrics", "scipy.stats"]
"""What every run imports: seconds, if each did."""


def record(run: Run, data: Path, target: Path) -> None:
    """Trains, scores, and writes ``target``, whole or not at all."""
    import torch

    if run.task.base and not (BASES / run.task.base).is_dir():
        make_base(run.task.base, data)

    from trimtab.app import recipe as recipes
    from trimtab.app import run as stages
    from trimtab.app import scoring
    from trimtab.app.job import load
    from trimtab.app.malloc import keep_freed_memory
    from trimtab.app.runfolder import RunFolder, write_text
    from trimtab.app.screen import Screen

    torch.set_num_threads(1)
    keep_freed_memory()
    screen = Screen(quiet=True)
    source = Path(__file__).with_name(run.task.recipe)
    recipe = recipes.load(source, run.overrides(data, held_back=bool(run.task.held_back)))
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        job = load(recipe, screen)
        where = stages.select(job, folder, screen)
        began = time.process_time()
        if run.row.kind:
            model, params, curve = _stock(run.row.kind, job, folder)
        else:
            trained = stages.train(job, where, folder, screen)
            model, params = trained.model, trained.plan.params
            curve = [json.loads(line) for line in folder.history.read_text().splitlines()]
        training = time.process_time() - began
        train_rows = len(job.ready["train"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # of Linux
        choosing = {}
        if run.task.held_back:
            choice, job = _choosing_and_scored(job, run, data)
            if run.seed == 0:  # by which the rate is chosen
                metrics = scoring.score(choice, model, folder, screen, folder.answers, folder.predictions)
                choosing = {"chooses": {"score": metrics[job.task.metric], "loss": metrics["loss"]}}
        metrics = scoring.score(job, model, folder, screen, folder.answers, folder.predictions)
        kept = next(iter(folder.read(folder.predictions).values()))
    settings = json.loads(recipe.model_dump_json(exclude_none=True, exclude={"output_dir", "data", "export"}))
    if run.task.base:
        settings["model"]["name_or_path"] = f"MiniLM, all of it tuned on {run.task.base}"
    found = {
        "task": run.task.name,
        "row": run.row.name,
        "seed": run.seed,
        "tuning": run.tuning,
        "rate": run.rate,
        "learning_rate": recipe.train["learning_rate"],
        "settings": settings,
        "train_rows": train_rows,
        "layers": where and dict(where.stacks),
        "metric": job.task.metric,
        "score": metrics[job.task.metric],
        "loss": metrics.get("loss"),
        **choosing,
        "metrics": metrics,
        "curve": [[one["step"], round(one["loss"], 4)] for one in curve if "loss" in one],
        "held_out": [
            [one["step"], round(one["metrics"]["loss"], 5)]
            for one in curve
            if one.get("event") == "eval" and "loss" in one["metrics"]
        ],
        "params": {name: params[name] for name in ("initial", "final", "average")}
        | {"held": params.get("held", params["final"])},
        "cpu_seconds": {"training": round(training, 1), "whole": round(time.process_time(), 1)},
        "peak_memory_bytes": peak,
        "versions": {name: version(name) for name in ("trimtab", "torch", "transformers", "peft")}
        | {"python": platform.python_version()},
        "commit": commit(),
        "rows": {key: _short(value) for key, value in kept.items()},
    }
    write_text(target, json.dumps(found) + "\n")


def make_base(name: str, data: Path) -> None:
    """All of the encoder is tuned on a data set of sentence pairs; what is kept is the encoder, without its head.

    Two epochs over every row at hand; two processes that make it at the same time make the same one.
    """
    import torch

    from trimtab.app import recipe as recipes
    from trimtab.app.job import load
    from trimtab.app.runfolder import RunFolder, write_text
    from trimtab.app.screen import Screen

    torch.set_num_threads(1)
    files = ", ".join(str(data / name / f"{file}.jsonl") for file in ("validation", "test"))
    settings = ["task.name=glue/mnli", f"data.train=[{files}]", "train.num_train_epochs=2", "train.learning_rate=1e-4",
                "train.warmup_steps=0.1"]  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        folder = RunFolder(Path(place))
        job = load(recipes.load(Path(__file__).with_name("minilm.yaml"), settings), Screen(quiet=True))
        model, _, curve = _stock("full", job, folder)
        BASES.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BASES) as made:
            whole = Path(made) / name
            model.base_model.save_pretrained(whole)
            job.tokenizer.save_pretrained(whole)
            write_text(whole / "curve.json", json.dumps(curve))
            with contextlib.suppress(OSError):  # another process was faster
                whole.rename(BASES / name)


def _choosing_and_scored(job: Job, run: Run, data: Path) -> tuple[Job, Job]:
    """With the rows by which a rate is chosen, and with those that are reported, as what there is to score."""
    from datasets import DatasetDict

    from trimtab.app import recipe as recipes
    from trimtab.app.rows import load_rows

    held, task = job.rows["validation"], run.task
    if task.splits[1]:
        scored = load_rows(recipes.load(Path(__file__).with_name(task.recipe), run.overrides(data)), job.task)
        parts = held, scored["validation"]
    else:
        parts = held.select(range(task.held_back)), held.select(range(task.held_back, len(held)))
    jobs = []
    for part in parts:
        ready = job.task.prepare(DatasetDict(validation=part), job.tokenizer, job.model)
        jobs.append(replace(job, rows=DatasetDict(train=job.rows["train"], validation=part), ready=ready))
    return jobs[0], jobs[1]


def _short(value: Any) -> Any:
    """Predicted numbers to five places: the rest is noise, and half of the file."""
    return (
        [round(x, 5) for x in value] if isinstance(value, list) and any(isinstance(x, float) for x in value) else value
    )


def commit() -> str:
    """Of the code that runs; marked where it was changed since."""
    here = Path(__file__).parent
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        said = ["git", "-C", str(here), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=10"]
        return subprocess.run(said, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _stock(kind: str, job: Any, folder: Any) -> tuple[Any, dict[str, float], list[dict[str, Any]]]:
    """A model that was trained without Trimtab, what it trained, and the Trainer's log.

    The head is left out of the counts, as it is in ours.
    """
    from transformers import set_seed

    from trimtab.app.planning import horizon_of
    from trimtab.app.trainer import make_trainer

    recipe = job.recipe
    horizon = horizon_of(recipe, len(job.ready["train"]))
    set_seed(recipe.seed)
    if kind == "full":
        model = job.model.requires_grad_(True)
        trainer = make_trainer(job, model, folder, [])
        trainer.train()
        heads = [p for name in job.modules_to_save for p in model.get_submodule(name).parameters()]
        n = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in heads)
        return model, {"initial": n, "final": n, "average": n}, trainer.state.log_history
    model = _peft_adalora(kind, job, horizon.total_steps)
    initial = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and ".lora_" in name)
    trainer = make_trainer(job, model, folder, [_allocating(model)])
    trainer.train()
    final = sum(
        int(site.lora_E["default"].ne(0).sum()) * (site.in_features + site.out_features + 1)
        for site in model.modules()
        if hasattr(site, "lora_E") and "default" in site.lora_E
    )
    # Its masks stop nothing from training. Merged, so that the penalty which its forward pass adds is not in the loss.
    params = {"initial": initial, "final": final, "average": initial}
    return model.merge_and_unload(), params, trainer.state.log_history


def _peft_adalora(kind: str, job: Any, total_steps: int) -> Any:
    import peft

    scaled = {
        "init_r": 8, "target_r": 4, "lora_alpha": 160, "orth_reg_weight": 0.1,
        "tinit": total_steps // 10, "tfinal": 4 * total_steps // 10,
    }  # fmt: skip
    config = peft.AdaLoraConfig(
        task_type=job.task.task_type,
        target_modules=job.recipe.adapter.target_modules,
        modules_to_save=list(job.modules_to_save),
        total_step=total_steps,
        **(scaled if kind == "peft_adalora_scaled" else {}),
    )
    return peft.get_peft_model(job.model, config)


def _allocating(model: Any) -> Any:
    """What PEFT asks a training loop to call."""
    from transformers import TrainerCallback

    class Allocating(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            model.base_model.update_and_allocate(state.global_step)

    return Allocating()


def in_own_process(run: Run, data: Path, target: Path) -> None:
    """`record` for a process of its own: what it prints goes to a file beside the record until the run is done."""
    target.parent.mkdir(parents=True, exist_ok=True)
    log = target.with_suffix(".log")
    with log.open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
        record(run, data, target)
    log.unlink()
