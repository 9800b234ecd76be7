"""What a report says, as data: a run folder becomes dataclasses with every number and sentence in them.

Data first, rendering second: nothing here knows HTML, nothing in `charts` or `html` computes. A section
is ``None`` when the run has nothing for it. Numbers that are not finite become ``None`` in a curve and
are named in its finding. `Report.to_json()` is strict JSON.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...where import METHODS
from . import modules
from .judged import Judged, judged
from .modules import Budget, Freezes, Prunes, Ranks, Values
from .runfolder import RunFolder, flatten, read
from .troubles import troubles
from .words import change, count, duration, finite, moved, number, plural, progress, ranges, sentence

NOT_SCORES = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time", "epoch", "alloc_delta",
              "peaked_delta")  # fmt: skip
"""Tails of names that Trainer puts among the metrics, but that measure speed or memory."""


@dataclass(frozen=True)
class Curve:
    """A quantity over optimizer steps; a value is ``None`` where it was not finite."""

    name: str
    steps: list[int]
    values: list[float | None]


@dataclass(frozen=True)
class Header:
    """What a run was and what came out, for the top of the page and for `comparing`."""

    model: str | None
    task: str | None
    metric: str | None
    score: float | None
    score_is_nan: bool
    params: dict[str, float | None]
    """Trainable adapter parameters: ``initial``, ``final``, ``average`` over the optimizer steps."""
    planned: dict[str, float | None]
    """The same as the plan said before training; with AFLoRA also ``average_closed_form``."""
    seconds: float | None
    """Of training, evaluations in between included."""
    seconds_per_step: float | None
    """Without evaluating and saving; ``None`` where the run kept no clock."""
    peak_memory_bytes: int | None
    chosen: dict[str, str]
    """Chosen layers per stack as a 0/1 string; empty when every layer is adapted."""
    seed: int | None
    train_samples: int | None
    steps: int
    is_finished: bool
    has_new_head: bool
    """The checkpoint lacked what answers, so that the model without an adapter has no score to speak of."""


@dataclass(frozen=True)
class StackProfile:
    """What each layer of one stack was chosen by; ``None`` where it is undefined."""

    stack: str
    scores: list[float | None]
    undefined: list[bool]
    chosen: list[bool]


@dataclass(frozen=True)
class Profile:
    """Axis ``where``: the layers, their scores if the method has any, and which were chosen."""

    finding: str
    method: str
    how: str
    score: str
    """What the layers' numbers are: CKA, or the method's name; empty where it looked at no data."""
    stacks: list[StackProfile]
    warnings: list[str]


@dataclass(frozen=True)
class Curves:
    """One chart of quantities over steps."""

    finding: str
    curves: list[Curve]


@dataclass(frozen=True)
class Trainable:
    """Trainable adapter parameters over steps; each count holds until the next."""

    finding: str
    steps: list[int]
    params: list[int]
    average: float | None


@dataclass(frozen=True)
class Report:
    """Everything a report page shows."""

    title: str
    header: Header
    settings: list[tuple[str, str]]
    metrics: list[tuple[str, float | None]]
    base_metrics: dict[str, float | None]
    """The same of the model without an adapter; empty where none were taken."""
    same_metrics: dict[str, float | None]
    """The adapter's of the ``first_rows`` that the model without it was scored on; empty where that was all rows."""
    first_rows: int | None
    notes: list[str]
    """What must be known to read the page, the worst first."""
    remarks: list[str] = field(default_factory=list)
    """What is good to know."""
    about: list[tuple[str, str]] = field(default_factory=list)
    """When it began, on which versions and which machine."""
    command: str = ""
    load: str = ""
    """Python that loads what was trained."""
    judged: Judged | None = None
    data: list[str] = field(default_factory=list)
    """What was read, left out and split off."""
    where: Profile | None = None
    loss: Curves | None = None
    penalty: Curves | None = None
    score: Curves | None = None
    trainable: Trainable | None = None
    ranks: Ranks | None = None
    budget: Budget | None = None
    values: Values | None = None
    prunes: Prunes | None = None
    freeze: Freezes | None = None
    step_times: Curves | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def load(folder: str | Path) -> Report:
    """The report of one run folder.

    Raises:
        DataError: if the folder is missing, is no run folder, or holds a damaged file.
    """
    run = read(folder)
    header = header_of(run)
    return Report(
        title=run.path.resolve().name,
        header=header,
        settings=[(key, "…" if key.endswith("hub_token") else _setting(value)) for key, value in flatten(run.recipe)],
        metrics=[(name, finite(value)) for name, value in scores_of(run).items()],
        base_metrics={name: finite(value) for name, value in (run.base.get("metrics") or {}).items()},
        same_metrics={name: finite(value) for name, value in (run.base.get("with_adapter") or {}).items()},
        first_rows=_count(run.base.get("first_rows")),
        notes=_notes(run, header),
        remarks=list(run.plan.notes) if run.plan else [],
        about=_about(run),
        command=str(run.about.get("command") or ""),
        load=str(run.metrics.get("load") or ""),
        judged=judged(run, header.metric),
        data=_data(run),
        where=profile(run),
        loss=losses(run),
        penalty=penalty(run),
        score=score_curve(run, header.metric),
        trainable=trainable(run, header),
        ranks=modules.ranks(run),
        budget=modules.budget(run),
        values=modules.values(run),
        prunes=modules.prunes(run),
        freeze=modules.freezes(run),
        step_times=step_times(run),
    )


def header_of(run: RunFolder) -> Header:
    """Model, task, score and cost, from metrics.json first, then from recipe, plan and history."""
    metrics, recipe = run.metrics, run.recipe
    evals = scores_of(run)
    asked = recipe["task"].get("metric") if isinstance(recipe.get("task"), dict) else None
    first = asked if asked in evals else next((name for name in evals if name != "loss"), "")
    metric = str(metrics.get("metric") or first) or None
    metric = metric and metric.removeprefix("eval_")
    raw = evals.get(metric) if metric else None
    where = run.where or (run.plan.where if run.plan else None)
    seed = metrics.get("seed", recipe.get("seed"))
    timed = _intervals(run)
    return Header(
        model=_name(metrics.get("model")) or _name(recipe.get("model")) or (run.plan.model if run.plan else None),
        task=_name(metrics.get("task")) or _name(recipe.get("task")),
        metric=metric,
        score=finite(raw),
        score_is_nan=raw is not None and finite(raw) is None,
        params=_params(run),
        planned=_planned(run),
        seconds=finite(metrics.get("seconds")),
        seconds_per_step=sum(s for _, _, s in timed) / sum(n for _, n, _ in timed) if timed else None,
        peak_memory_bytes=_count(metrics.get("peak_memory_bytes")),
        chosen=dict(where.stacks) if where else {},
        seed=seed if isinstance(seed, int) else None,
        train_samples=_count(metrics.get("train_samples")),
        steps=run.last_step,
        is_finished=run.is_finished,
        has_new_head=bool(metrics.get("new_modules")),
    )


def scores_of(run: RunFolder) -> dict[str, Any]:
    """The final metrics by bare name (no ``eval_``), speeds left out; the last evaluation when unfinished."""
    found = run.metrics.get("metrics")
    if not isinstance(found, dict):
        evals = run.of("eval")
        found = evals[-1]["metrics"] if evals else {}
    bare = {name.removeprefix("eval_").removeprefix("test_"): value for name, value in found.items()}
    return {name: value for name, value in bare.items() if not name.endswith(NOT_SCORES)}


def profile(run: RunFolder) -> Profile | None:
    """Which layers were chosen, and their CKA when the choice was made from it."""
    where = run.where or (run.plan.where if run.plan else None)
    if where is None:
        return None
    scores = where.scores or {}
    by_stack = scores.get("stacks") or {}
    stacks = []
    for path, mask in where.stacks.items():
        scored = by_stack.get(path, {})
        values = [finite(value) for value in where.layer_scores.get(path) or [None] * len(mask)]
        flags = scored.get("undefined", [False] * len(mask))
        # A layer without a number is undefined whatever the flag says: there is nothing to draw.
        undefined = [bool(flag) or (path in by_stack and value is None) for flag, value in zip(flags, values)]
        stacks.append(StackProfile(path, values, undefined, [c == "1" for c in mask]))
    how = ", ".join(
        str(part)
        for part in (
            scores.get("estimator") and f"{scores['estimator']} estimator",
            scores.get("pool") and f"pool {scores['pool']}",
            scores.get("n") and f"{count(scores['n'])} samples",
            scores.get("tokens") and f"{count(scores['tokens'])} tokens",
        )
        if part
    )
    parts = []
    for stack in stacks:
        chosen = [i for i, is_chosen in enumerate(stack.chosen) if is_chosen]
        of = f"{len(chosen)} of {plural(len(stack.chosen), 'layer')}"
        named = f" ({ranges(chosen)})" if len(ranges(chosen)) <= 24 else ""  # the chart shows a longer list better
        parts.append(
            f"{of}{f' of {stack.stack}' if len(stacks) > 1 else ''}{named}" if chosen else f"no layer of {stack.stack}"
        )
    ours = METHODS.get(where.method)
    why = f": {ours.summary.replace('the layers', 'those', 1)}" if by_stack and ours else ""
    n_undefined = sum(sum(stack.undefined) for stack in stacks)
    tail = f"; {plural(n_undefined, 'layer')} undefined" if n_undefined else ""
    method = where.method.upper() if where.method == "cka" else sentence(where.method)
    finding = f"{method} chose {' and '.join(parts)}{why}{tail}"
    return Profile(finding, where.method, how, where.measure, stacks, [str(w) for w in scores.get("warnings") or ()])


def losses(run: RunFolder) -> Curves | None:
    """The task loss in training and in evaluation; the penalty is not in it."""
    train = _curve("training", run.of("log"), "loss")
    held_out = _curve("evaluation", [{"step": e["step"], **e["metrics"]} for e in run.of("eval")], "eval_loss")
    curves = [curve for curve in (train, held_out) if curve.steps]
    if not curves:
        return None
    return Curves(sentence("; ".join(_trend(f"{c.name} loss", c) for c in curves)), curves)


def penalty(run: RunFolder) -> Curves | None:
    """The orthogonality (or L1) penalty, which is logged apart from the task loss."""
    curve = _curve("penalty", run.of("log"), "penalty")
    if not curve.steps:
        return None
    return Curves(sentence(f"{_trend('penalty', curve)}, logged apart from the loss"), [curve])


def score_curve(run: RunFolder, metric: str | None) -> Curves | None:
    """The headline metric at every evaluation."""
    if metric is None:
        return None
    bare = [
        {"step": e["step"], **{k.removeprefix("eval_"): v for k, v in e["metrics"].items()}} for e in run.of("eval")
    ]
    curve = _curve(metric, bare, metric)
    if not curve.steps:
        return None
    known = [(value, step) for value, step in zip(curve.values, curve.steps) if value is not None]
    finding = _trend(metric, curve)
    if len({value for value, _ in known}) > 1:
        best, step = min(known) if lower_is_better(run, metric) else max(known, key=lambda pair: (pair[0], -pair[1]))
        finding += f"; best {number(best)} at step {count(step)}"
    return Curves(finding, [curve])


def lower_is_better(run: RunFolder, metric: str) -> bool:
    """As the task says of its headline metric; of another, or of a run without scores, its name tells."""
    says = run.metrics.get("greater_is_better") if metric == run.metrics.get("metric") else None
    return metric.endswith(("loss", "perplexity", "error", "wer", "mse", "mae")) if says is None else not says


def trainable(run: RunFolder, header: Header) -> Trainable | None:
    """Trainable adapter parameters from step to step, closed with the last step of the run."""
    events = run.of("params")
    if not events:
        return None
    steps, params = [e["step"] for e in events], [int(e["trainable"]) for e in events]
    if run.last_step > steps[-1]:
        steps.append(run.last_step)
        params.append(params[-1])
    first, last = params[0], params[-1]
    average = header.params["average"]
    if min(params) == max(params):
        finding = f"{count(first)} parameters were trained from the first step to the last"
    else:
        finding = f"Trainable parameters {moved(first, last)} from {count(first)} to {count(last)}"
        finding += f" ({change(first, last)})" if change(first, last) else ""
        finding += f", {count(average)} on average" if average is not None else ""
    return Trainable(finding, steps, params, average)


def step_times(run: RunFolder) -> Curves | None:
    """Seconds per optimizer step between two entries of timing.jsonl, evaluating and saving left out."""
    found = _intervals(run)
    steps, values = [step for step, _, _ in found], [seconds / n for _, n, seconds in found]
    if not steps:
        return None
    part = max(1, len(values) // 5)
    first, last = statistics.median(values[:part]), statistics.median(values[-part:])
    if len(values) < 5:
        finding = f"A step took {duration(statistics.median(values))}"
    else:
        finding = f"A step took {duration(first)} in the first fifth of the run and {duration(last)} in the last"
        finding += f" ({change(first, last)})" if change(first, last) else ""
    return Curves(finding, [Curve("seconds per step", steps, list(values))])


def _intervals(run: RunFolder) -> list[tuple[int, int, float]]:
    """Between two entries of timing.jsonl: the later step, how many steps they are apart, and the seconds of training.

    A resumed run starts its clock again, so an interval counts only where step and clock both advance.
    """
    rows = [(row["step"], finite(row.get("seconds")), finite(row.get("aside")) or 0.0) for row in run.timing]
    found = []
    for (step, second, aside), (next_step, next_second, next_aside) in itertools.pairwise(rows):
        if second is not None and next_second is not None and next_step > step and next_second >= second:
            trained = next_second - second - max(0.0, next_aside - aside)
            found.append((next_step, next_step - step, max(0.0, trained)))
    return found


def _curve(name: str, events: list[dict[str, Any]], key: str) -> Curve:
    found = [event for event in events if isinstance(event.get(key), (int, float))]
    return Curve(name, [event["step"] for event in found], [finite(event[key]) for event in found])


def _trend(what: str, curve: Curve) -> str:
    """How a curve went, in words."""
    known = [(step, value) for step, value in zip(curve.steps, curve.values) if value is not None]
    lost = [step for step, value in zip(curve.steps, curve.values) if value is None]
    if not known:
        return f"{what} was never a number"
    (_, first), (last_step, last) = known[0], known[-1]
    if len(curve.values) == 1:
        return f"{what} was {number(first)} at step {count(last_step)}, the only point"
    if len(known) == 1:
        told = f"{what} was {number(first)} at step {count(last_step)}"
    elif first == last:
        told = f"{what} stayed at {number(first)}"
    else:
        told = f"{what} {moved(first, last)} from {number(first)} to {number(last)}"
    if lost and lost[0] > last_step:
        return f"{told} and was no number from step {count(lost[0])} on"
    return told + (f" (no number at {plural(len(lost), 'step')})" if lost else "")


def _params(run: RunFolder) -> dict[str, float | None]:
    """Initial, final and average: measured, else summed from the history, else predicted by the plan."""
    given: Any = run.metrics.get("params")
    given = given if isinstance(given, dict) else {}
    counted = run.measured_params(run.last_step)
    planned = dict(run.plan.params) if run.plan else {}
    return {
        k: next((finite(d[k]) for d in (given, counted, planned) if finite(d.get(k)) is not None), None)
        for k in ("initial", "final", "average")
    }


def _planned(run: RunFolder) -> dict[str, float | None]:
    found: Any = run.plan.settings.get("predicted_params") if run.plan else None
    return {key: finite(value) for key, value in found.items()} if isinstance(found, dict) else {}


def _notes(run: RunFolder, header: Header) -> list[str]:
    notes = []
    total = run.plan.settings.get("total_steps") if run.plan else None
    of = f" of {count(total)}" if total else ""
    if run.is_at_work and not header.is_finished:
        notes.append(f"This run is at work: step {count(header.steps)}{of} so far. `trimtab report` shows it anew.")
    elif not header.is_finished:
        why = f"its scores are of {progress(run.metrics)}" if run.metrics else "no metrics.json"
        notes.append(f"This run is not finished ({why}). The history ends at step {count(header.steps)}{of}.")
    if header.score_is_nan:
        notes.append(f"The score ({header.metric}) is not a number.")
    return [*notes, *(f"{sentence(trouble)}." for trouble in troubles(run)), *run.notes]


def _about(run: RunFolder) -> list[tuple[str, str]]:
    found = []
    if began := run.about.get("began"):
        found.append(("began", _date(began)))
    found += [("resumed", _date(again.get("began", ""))) for again in run.about.get("resumed", ())]
    if versions := run.about.get("versions"):
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if machine := run.about.get("machine"):
        device = "" if machine.get("device") in (None, "cpu") else f", {machine['device']}"
        found.append(("machine", f"{machine.get('system')}, {plural(machine.get('cores') or 1, 'core')}{device}"))
    return found


def _date(text: str) -> str:
    """``2026-11-25 21:08 +0000``, from what `about.facts` wrote."""
    day, _, hour = str(text).partition("T")
    return f"{day} {hour[:5]} {hour[8:]}".strip()


def _data(run: RunFolder) -> list[str]:
    found: Any = run.metrics.get("data") or (run.plan.settings.get("data") if run.plan else None)
    if not isinstance(found, dict):
        return []
    rows = found.get("rows") or {}
    counted = ", ".join(f"{count(n)} {split}" for split, n in rows.items())
    return [*([f"rows: {counted}"] if counted else []), *map(str, found.get("notes") or ())]


def _name(value: Any) -> str | None:
    """The name in a ``model`` or ``task`` entry, which may be text or a mapping."""
    if isinstance(value, dict):
        value = value.get("name_or_path") or value.get("name")
    return str(value) if value else None


def _count(value: Any) -> int | None:
    number_or_none = finite(value)
    return None if number_or_none is None else int(number_or_none)


def _setting(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "none" if value is None else str(value)
