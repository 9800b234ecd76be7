"""Run folders in the format of the real ones, made from numbers that a test can work out by hand."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

from trimtab.plans import Plan, Site, SitePlan, Where

KINDS = {
    "attention.self.query": (384, 384),
    "attention.self.key": (384, 384),
    "attention.self.value": (384, 384),
    "attention.output.dense": (384, 384),
    "intermediate.dense": (384, 1536),
    "output.dense": (1536, 384),
}


def write_run(
    folder: Path,
    *,
    recipe: dict | None = None,
    where: dict | None = None,
    plan: Plan | None = None,
    history: list[dict] | None = None,
    timing: list[dict] | None = None,
    metrics: dict | None = None,
    predictions: dict | None = None,
    about: dict | None = None,
) -> Path:
    """A run folder with exactly the given pieces."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in (
        ("where.json", where),
        ("metrics.json", metrics),
        ("predictions.json", predictions),
        ("run.json", about),
        ("plan.json", plan and plan.to_json()),
    ):
        if data is not None:
            (folder / name).write_text(json.dumps(data))
    if recipe is not None:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    for name, rows in (("history.jsonl", history), ("timing.jsonl", timing)):
        if rows is not None:
            (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(seed: int = 0, **axes: Any) -> dict[str, Any]:
    return {
        "model": {"name_or_path": "sentence-transformers/all-MiniLM-L6-v2"},
        "task": {"name": "glue/cola", "max_length": 64},
        "adapter": {"type": "lora", "r": 8, "alpha": 16, "target_modules": ["query", "value"]},
        **axes,
        "train": {"num_train_epochs": 5, "learning_rate": 1e-3},
        "output_dir": f"runs/{seed}",
        "seed": seed,
    }


def metrics(
    seed: int = 0,
    score: float = 0.5,
    initial: int = 1000,
    final: int = 500,
    average: float = 700.0,
    seconds: float = 100.0,
    **more: Any,
) -> dict[str, Any]:
    return {
        "metrics": {"eval_loss": 0.6, "eval_matthews_correlation": score, "eval_runtime": 2.0},
        "metric": "matthews_correlation",
        "params": {"initial": initial, "final": final, "average": average},
        "seconds": seconds,
        "peak_memory_bytes": 3 * 2**28,
        "model": "sentence-transformers/all-MiniLM-L6-v2",
        "task": "glue/cola",
        "train_samples": 8551,
        "seed": seed,
        **more,
    }


def where(mask: str = "011010", **scores: Any) -> dict[str, Any]:
    cka = [None, 0.42, 0.55, 0.95, 0.61, 0.97, *[0.9] * (len(mask) - 6)]
    undefined = [True, *[False] * (len(mask) - 1)]
    found = {
        "estimator": "unbiased",
        "pool": "cls",
        "n": 1024,
        "stacks": {"encoder.layer": {"cka": cka, "undefined": undefined}},
        "warnings": ["layer 0: one input row covers more than half of the samples"],
        **scores,
    }
    return {"method": "cka", "stacks": {"encoder.layer": mask}, "scores": found}


def plan(layers: int = 12, r: int = 15, prefix: str = "bert.encoder.layer", kinds: dict | None = None) -> Plan:
    sites = [
        SitePlan(Site(f"{prefix}.{layer}.{kind}", i, o, "encoder.layer", layer, kind), r, r * (i + o))
        for layer in range(layers)
        for kind, (i, o) in (kinds or KINDS).items()
    ]
    size = float(sum(s.trainable_params for s in sites))
    return Plan(
        "MiniLM",
        tuple(sites),
        {"initial": size, "final": size / 7, "average": size / 2},
        Where("first", {"encoder.layer": "1" * layers}),
    )


def full_run(
    folder: Path,
    *,
    layers: int = 12,
    events: int = 40,
    r: int = 15,
    target: int = 2,
    seed: int = 0,
    score: float = 0.57,
    rank: str = "salientlora",
    kinds: dict | None = None,
    ckas: bool = True,
) -> Path:
    """A run with everything in it: CKA, prunes like SalientLoRA's, freezes like AFLoRA's."""
    rng = random.Random(seed)
    the_plan = plan(layers, r, kinds=kinds)
    sites = [s.site for s in the_plan.sites]
    steps, size = 1000, {s.name: s.in_features + s.out_features for s in sites}
    weight = {
        s.name: rng.random() ** 2
        * (2 if "output" in s.name or "inter" in s.name else 1)
        * (0.3 + (s.block or 0) / layers)
        for s in sites
    }
    ranks = {s.name: r for s in sites}
    params = sum(r * size[name] for name in ranks)
    history: list[dict[str, Any]] = [{"event": "params", "step": 0, "trainable": params, "total_rank": r * len(sites)}]
    at = [100 + round(500 * i / max(1, events - 1)) for i in range(events)]
    frozen_order = sorted(
        (f"{s.name}.lora_{ab}" for s in sites for ab in "AB"),
        key=lambda name: rng.random() + 0.08 * int(name.split(".")[3]),
    )
    frozen_order = frozen_order[:-9]
    done = 0
    curve = []
    for step in range(10, steps + 1, 10):
        loss = 0.2 + 0.5 * math.exp(-step / 300) + rng.gauss(0, 0.02)
        history.append(
            {
                "event": "log",
                "step": step,
                "epoch": step / 200,
                "loss": loss,
                "learning_rate": 1e-3 * (1 - step / steps),
                "grad_norm": rng.random(),
                "penalty": 0.05 * math.exp(-step / 150),
            }
        )
        for event in [s for s in at if step - 10 < s <= step]:
            i = at.index(event)
            budget = round(target * len(sites) + (r - target) * len(sites) * (1 - (i + 1) / events) ** 3)
            before = dict(ranks)
            while sum(ranks.values()) > budget:
                name = min(
                    (n for n in ranks if ranks[n]),
                    key=lambda n: weight[n] / ranks[n] ** 0.8 + rng.random() * 0.05,
                )
                ranks[name] -= 1
            cut = sum((before[n] - ranks[n]) * size[n] for n in ranks)
            history.append(
                {
                    "event": "rank",
                    "step": event,
                    "kind": "prune",
                    "budget": budget,
                    "ranks": dict(ranks),
                    "freed": {"parameters": 4 * cut, "gradients": 4 * cut, "moments": 8 * cut},
                }
            )
            params = sum(ranks[n] * size[n] for n in ranks)
            history.append({"event": "params", "step": event, "trainable": params, "total_rank": sum(ranks.values())})
            history.append(
                {
                    "event": "values",
                    "step": event,
                    "values": {
                        n: [
                            weight[n] * (1 - math.exp(-event / 300)) * 0.8**k * (0.9 + 0.2 * rng.random())
                            for k in range(ranks[n])
                        ]
                        for n in ranks
                    },
                }
            )
        if step % 20 == 0 and 200 <= step <= 800:
            upto = round(len(frozen_order) * (1 - (1 - (step - 180) / 620) ** 3))
            if upto > done:
                history.append(
                    {
                        "event": "freeze",
                        "step": step,
                        "frozen": frozen_order[done:upto],
                        "trainable_ratio": 1 - upto / (len(frozen_order) + 9),
                    }
                )
                done = upto
        if step % 100 == 0:
            curve.append(score * (1 - math.exp(-step / 250)) + rng.gauss(0, 0.01))
            history.append(
                {
                    "event": "eval",
                    "step": step,
                    "epoch": step / 200,
                    "metrics": {
                        "eval_loss": loss + 0.05 + step / 8000,
                        "eval_matthews_correlation": curve[-1],
                        "eval_runtime": 1.5,
                    },
                }
            )
    timing, clock = [], 0.0
    for step in range(10, steps + 1, 10):
        clock += 10 * (0.055 + 0.05 * math.exp(-step / 350) + rng.random() * 0.006)
        timing.append({"step": step, "seconds": round(clock, 3)})
    average = sum(h["trainable"] for h in history if h["event"] == "params") / (events + 1)
    mask = "".join(str(int(i % 2 == 1 or i > layers * 0.7)) for i in range(layers))
    scores = [None, *[round(0.98 - 0.6 * rng.random() ** 3, 4) for _ in range(layers - 1)]]
    return write_run(
        folder,
        plan=the_plan,
        history=history,
        timing=timing,
        where=where(mask, stacks={"encoder.layer": {"cka": scores, "undefined": [s is None for s in scores]}})
        if ckas
        else None,
        recipe=recipe(
            seed,
            where={"method": "cka", "ratio": 0.5, "samples": 1024},
            rank={"method": rank, "target_r": target},
            freeze={"method": "aflora"},
        ),
        metrics=metrics(
            seed,
            score=curve[-1],
            initial=r * sum(size.values()),
            final=params,
            average=average,
            seconds=clock,
        ),
    )


def plain_run(
    folder: Path,
    *,
    seed: int = 0,
    score: float = 0.55,
    params: int = 294912,
    seconds: float = 80.0,
    **axes: Any,
) -> Path:
    """Plain LoRA: no selection, no ranks, no freezing."""
    history: list[dict[str, Any]] = [{"event": "params", "step": 0, "trainable": params, "total_rank": 144}]
    for step in range(10, 201, 10):
        history.append(
            {
                "event": "log",
                "step": step,
                "epoch": step / 40,
                "loss": 0.2 + 0.5 * math.exp(-step / 60),
                "learning_rate": 1e-3,
            }
        )
        if step % 40 == 0:
            history.append(
                {
                    "event": "eval",
                    "step": step,
                    "epoch": step / 40,
                    "metrics": {"eval_loss": 0.4, "eval_matthews_correlation": score * step / 200},
                }
            )
    return write_run(
        folder,
        recipe=recipe(seed, **axes),
        history=history,
        metrics=metrics(seed, score, params, params, params, seconds),
        timing=[{"step": s, "seconds": s * seconds / 200} for s in range(10, 201, 10)],
    )
