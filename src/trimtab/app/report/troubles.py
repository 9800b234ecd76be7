"""What went wrong in a run without an error: one line each, with what to try.

A score alone does not tell a model that always gives the same answer from one that learned little.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from .runfolder import RunFolder
from .words import count, number, plural

QUARTER = 0.25
WARMUP = 0.2
"""Share of a run after which the full rate throws hardly any model back (docs/evidence.md)."""
FLAT = 0.1
"""Spread of predicted numbers, as a share of the labels': the best guesses of a model that correlates by as much."""


def troubles(run: RunFolder) -> list[str]:
    """Every one of them, the worst first; empty for a run as it should be."""
    kinds = (not_finite, _lost_for_a_while, _one_answer, _froze_early, _never_froze, _never_fell)
    return [text for kind in kinds if (text := kind(run))]


def not_finite(run: RunFolder) -> str | None:
    """Where the loss ended as NaN or infinity, in training or in evaluation: nothing that came out can be used."""
    logs, evals = _losses(run), _held_out_losses(run)
    ends = [values[-1][1] for values in (logs, evals) if values]
    ends += [value for name, value in (run.metrics.get("metrics") or {}).items() if _is_loss(name)]
    if all(map(math.isfinite, ends)):
        return None
    lost = sorted({step for step, value in (*logs, *evals) if not math.isfinite(value)})
    known = [step for step, value in (*logs, *evals) if math.isfinite(value) and lost and step > lost[0]]
    since = f" from step {count(lost[0])} on" if lost and not known else ""
    return f"the loss is not a number (NaN or infinity){since}: {_steadier(run)}"


def _lost_for_a_while(run: RunFolder) -> str | None:
    logs = _losses(run)
    lost = [step for step, value in logs if not math.isfinite(value)]
    if not lost or not_finite(run):
        return None
    return f"the loss was not a number at {plural(len(lost), 'point')} of {len(logs)}: {_steadier(run)}"


def _one_answer(run: RunFolder) -> str | None:
    """One class for every row; of numbers, ones that hardly differ where the labels do."""
    for split, kept in run.predictions.items():
        labels, predicted = kept.get("label", []), kept.get("predicted", [])
        if len(set(labels)) < 2 or len(predicted) != len(labels):
            continue
        if names := kept.get("classes"):
            answer = f"class {names[predicted[0]]!r}" if len(set(predicted)) == 1 else ""
        else:
            flat = statistics.pstdev(predicted) < FLAT * statistics.pstdev(labels)
            ends = f"{number(min(predicted))} to {number(max(predicted))}"
            answer = (
                f"nearly the same number, {ends} for labels from {min(labels):g} to {max(labels):g}" if flat else ""
            )
        if answer:
            told = f"every one of {count(len(labels))} {split} rows was given {answer}"
            return f"{told}: nothing was learned that tells rows apart; {_another_rate(run)}, or train for longer"
    return None


def _froze_early(run: RunFolder) -> str | None:
    frozen = [event["step"] for event in run.of("freeze") if event.get("trainable_ratio") == 0]
    steps = run.plan.settings.get("total_steps") if run.plan else None
    steps = steps or run.last_step
    if not frozen or not steps or frozen[0] > QUARTER * steps:
        return None
    method = str((run.recipe.get("freeze") or {}).get("method"))
    cure = {"aflora": "a smaller freeze.final", "at": "a larger freeze.at"}.get(method, "a later end of freezing")
    return (
        f"every projection froze by step {count(frozen[0])} of {count(steps)}, in the first quarter of the run: "
        f"try {cure}, or more epochs"
    )


def _never_froze(run: RunFolder) -> str | None:
    if not run.recipe.get("freeze") or not run.metrics or any(True for _ in run.of("freeze")):
        return None
    told = "no projection ever froze, so that the run was that of an adapter without freeze"
    total = run.plan.settings.get("total_steps") if run.plan else None
    if total and run.last_step < total:
        return f"{told}: it ended at step {count(run.last_step)} of {count(total)}"
    cures = {"grades": "a larger freeze.tau", "aflora": "a smaller freeze.interval_steps"}
    return f"{told}: try {cures.get(str(run.recipe['freeze'].get('method')), 'an earlier start of freezing')}"


def _never_fell(run: RunFolder) -> str | None:
    """The last third of the logged losses against the first, by as much as chance moves such means."""
    values = [value for _, value in _losses(run)]
    if len(values) < 4 or not all(map(math.isfinite, values)):
        return None
    part = len(values) // 3
    first, last = (values[:part], values[-part:]) if part > 1 else (values[:1], values[-1:])
    fell = statistics.fmean(first) - statistics.fmean(last)
    chance = math.sqrt(sum(statistics.variance(some) / part for some in (first, last))) if part > 1 else 0.0
    if fell > chance:
        return None
    means = " → ".join(number(statistics.fmean(some)) for some in (first, last))
    return (
        f"the training loss never fell by more than chance ({means}): {_another_rate(run)}, or look whether the "
        "labels fit the rows"
    )


# -- what to try ---------------------------------------------------------------------------------------


def _steadier(run: RunFolder) -> str:
    """What keeps a loss finite, by what the recipe has."""
    train: dict[str, Any] = run.recipe.get("train") or {}
    dtype = (run.recipe.get("model") or {}).get("dtype") if isinstance(run.recipe.get("model"), dict) else None
    tries = [f"a lower train.learning_rate{_is(train.get('learning_rate'))}"]
    if train.get("max_grad_norm") == 0:
        tries.append("train.max_grad_norm=1.0")
    if train.get("fp16") or dtype == "float16":
        tries.append("bfloat16 or float32 in place of float16")
    return "try " + " and ".join(tries)


def _another_rate(run: RunFolder) -> str:
    train: dict[str, Any] = run.recipe.get("train") or {}
    steps = run.plan.settings.get("total_steps") if run.plan else None
    warmup = train.get("warmup_steps", 0)
    share = warmup if warmup < 1 else warmup / (steps or run.last_step or warmup)
    is_flat = train.get("lr_scheduler_type") == "constant"  # which has no warm-up
    later = f", or train.warmup_steps={WARMUP:g}" if share < WARMUP and not is_flat else ""
    return f"try a train.learning_rate ten times higher or lower{_is(train.get('learning_rate'))}{later}"


def _is(rate: Any) -> str:
    return f" (it is {number(rate)})" if isinstance(rate, (int, float)) else ""


def _losses(run: RunFolder) -> list[tuple[int, float]]:
    return [(event["step"], float(event["loss"])) for event in run.of("log")]


def _held_out_losses(run: RunFolder) -> list[tuple[int, float]]:
    return [
        (event["step"], float(value))
        for event in run.of("eval")
        for name, value in event["metrics"].items()
        if _is_loss(name) and isinstance(value, (int, float))
    ]


def _is_loss(name: str) -> bool:
    return name == "loss" or name.endswith("_loss")
