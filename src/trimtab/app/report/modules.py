"""What happened to each adapted module: ranks, rank diagonals, prunes, freezes, as data for the page.

Modules are laid out as a grid per stack, layers × kinds (the module's name inside its layer). Long runs
are thinned to a bounded number of events, the first and the last always among them, so that a report of
many steps stays small; sums and findings are always over all events.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from .runfolder import RunFolder
from .words import byte_size, count, finite, listing, moved, number, plural, short_labels, thin

MOST_FRAMES = 40
"""Events of a grid or a spectrum that reach the page."""
MOST_NUMBERS = 40_000
"""Entries of rank diagonals that reach the page (they are most of its size)."""
MOST_PER_SITE = 16
"""Largest entries shown for one module."""


@dataclass(frozen=True)
class Grid:
    """The modules of one stack, layers × kinds; a cell's name is ``None`` where there is no such module."""

    stack: str
    layers: list[int]
    kinds: list[str]
    labels: list[str]
    """The kinds, as short as they can be told apart."""
    names: list[list[str | None]]
    """By kind, then layer, like every table of cells."""

    def cells(self, values: dict[str, float]) -> list[list[float | None]]:
        """A value per module as rows of kinds, columns of layers."""
        return [[None if name is None else values.get(name) for name in row] for row in self.names]


@dataclass(frozen=True)
class Ranks:
    """The rank of every module after each event that changed one."""

    finding: str
    grids: list[Grid]
    steps: list[int]
    totals: list[int]
    ranks: list[dict[str, int]]
    highest: int
    how: str = ""
    """How the first ones were chosen, where a probe did."""


@dataclass(frozen=True)
class Budget:
    """Scheduled and kept total rank over steps, every event."""

    finding: str
    steps: list[int]
    budget: list[int | None]
    kept: list[int]


@dataclass(frozen=True)
class Values:
    """Entries of the rank diagonals by magnitude (singular values, or SoRA's gates)."""

    finding: str
    noun: str
    nouns: str
    size: str
    """What the magnitude of one is, as a formula."""
    steps: list[int]
    bands: dict[str, list[float]]
    """``largest``, ``upper tenth``, ``median``, ``lower tenth`` over all modules, and ``zero_ratio``."""
    sites: dict[str, list[list[float]]]
    """Per module and step, its largest entries in falling order."""


@dataclass(frozen=True)
class Prune:
    """One event that cut ranks for good."""

    step: int
    kept: int
    removed: int
    freed: dict[str, int]
    """Bytes of ``parameters``, ``gradients`` and ``moments``."""


@dataclass(frozen=True)
class Prunes:
    finding: str
    rows: list[Prune]
    freed: dict[str, int]


@dataclass(frozen=True)
class Freezes:
    """The step at which each matrix froze; ``None`` where it did not."""

    finding: str
    grids: list[Grid]
    frozen_at: dict[str, int | None]
    cut_at: dict[str, int]
    """Of those that did not: the step at which the last of their ranks was cut. The others trained to the end."""
    last_step: int
    steps: list[int]
    trainable_ratio: list[float | None]


def ranks(run: RunFolder) -> Ranks | None:
    """Ranks per module over time, with the plan's initial ranks in front when the history starts later."""
    frames: list[tuple[int, dict[str, int]]] = []
    events = run.of("rank")
    how = str((run.plan.settings.get("start") or {}).get("told", "")) if run.plan else ""
    if run.plan and (events or how):
        start = {s.site.name: s.r for s in run.plan.sites}
        if not events or (set(start) == set(map(bare, events[0]["ranks"])) and events[0]["step"] > 0):
            frames.append((0, start))
    for event in events:
        now = {bare(name): int(r) for name, r in event["ranks"].items() if finite(r) is not None}
        now = {**dict.fromkeys(frames[-1][1] if frames else {}, 0), **now}  # a module left out has no rank
        if not frames or now != frames[-1][1]:
            frames.append((event["step"], now))
    if not frames:
        return None
    first, last = frames[0][1], frames[-1][1]
    shown = [frames[i] for i in thin(len(frames), MOST_FRAMES)]
    grids = grids_of(run, (name for _, now in frames for name in now))
    gone = sum(1 for r in last.values() if r == 0)
    finding = f"{count(sum(last.values()))} of {count(sum(first.values()))} ranks are left"
    if not events:
        finding = f"{plural(sum(last.values()), 'rank')}, given out before training"
    by_kind = {
        (label, grid.stack): sum(last.get(name, 0) for name in row if name)
        for grid in grids
        for label, row in zip(grid.labels, grid.names)
    }
    if sum(last.values()) < sum(first.values()) and len(by_kind) > 1:
        (label, stack), most = max(by_kind.items(), key=lambda item: item[1])
        finding += f", most of them ({count(most)}) in {label}{f' of {stack}' if len(grids) > 1 else ''}"
    if gone:
        finding += f"; {gone} of {plural(len(last), 'module')} {'is' if gone == 1 else 'are'} at rank 0"
    return Ranks(
        finding,
        grids,
        [step for step, _ in shown],
        [sum(now.values()) for _, now in shown],
        [now for _, now in shown],
        max((r for _, now in frames for r in now.values()), default=0),
        how,
    )


def budget(run: RunFolder) -> Budget | None:
    """Total rank allowed by the schedule and total rank kept: at the start, where that is known, and at each event.

    Under the recipe's ``budget`` the schedule allows parameters, which ranks are not held against.
    """
    events = run.of("rank")
    if not events:
        return None
    of_params = bool(run.recipe.get("budget"))
    steps = [e["step"] for e in events]
    allowed = [int(e["budget"]) if finite(e.get("budget")) is not None and not of_params else None for e in events]
    kept = [sum(int(r) for r in e["ranks"].values() if finite(r) is not None) for e in events]
    if (first := _total_at_start(run)) is not None and steps[0] > 0:
        steps, kept = [0, *steps], [first, *kept]
        allowed = [first if any(b is not None for b in allowed) else None, *allowed]
    given = [(step, b) for step, b in zip(steps, allowed) if b is not None]
    if not given:
        finding = f"Total rank {moved(kept[0], kept[-1])} from {count(kept[0])} to {count(kept[-1])}"
        held = "under a budget of parameters" if of_params else "without a budget"
        return Budget(f"{finding}, {held}", steps, allowed, kept)
    (_, before), (_, after) = given[0], given[-1]
    finding = f"The budget {moved(before, after)} "
    finding += f"from {count(before)} to {count(after)} ranks" if before != after else f"at {count(after)} ranks"
    changes = [step for (_, old), (step, new) in pairwise(given) if old != new]
    if changes and given[0][0] > 0:  # where it was at the start is not known
        changes.insert(0, given[0][0])
    if changes:
        one = changes[0] == changes[-1]
        finding += (
            f" at step {count(changes[0])}" if one else f" between steps {count(changes[0])} and {count(changes[-1])}"
        )
    above = kept[-1] - after
    missed = f"; {plural(abs(above), 'rank')} {'above' if above > 0 else 'below'} it"
    finding += f"{missed} {'was' if abs(above) == 1 else 'were'} kept" if above else ", and was met"
    return Budget(finding, steps, allowed, kept)


def _total_at_start(run: RunFolder) -> int | None:
    started = finite(next((e.get("total_rank") for e in run.of("params")), None))
    return int(started) if started is not None else sum(s.r for s in run.plan.sites) if run.plan else None


def values(run: RunFolder) -> Values | None:
    """Rank diagonals over time: bands over all modules, and each module's largest entries."""
    events = [e for e in run.of("values") if any(e["values"].values())]
    if not events:
        return None
    sites = list(dict.fromkeys(name for e in events for name in e["values"]))
    longest = min(MOST_PER_SITE, max(len(v) for e in events for v in e["values"].values()))
    frames = thin(len(events), max(2, min(MOST_FRAMES, MOST_NUMBERS // max(1, len(sites) * longest))))
    shown = [events[i] for i in frames]
    falling = [
        {
            name: sorted((abs(x) for x in e["values"].get(name, ()) if finite(x) is not None), reverse=True)
            for name in sites
        }
        for e in shown
    ]
    bands: dict[str, list[float]] = {k: [] for k in ("largest", "upper tenth", "median", "lower tenth", "zero_ratio")}
    for frame in falling:
        entries = sorted(x for entries in frame.values() for x in entries)
        alive = [x for x in entries if x > 0] or [0.0]
        for name, at in (("largest", 1.0), ("upper tenth", 0.9), ("median", 0.5), ("lower tenth", 0.1)):
            bands[name].append(_round(alive[min(len(alive) - 1, int(at * len(alive)))]))
        bands["zero_ratio"].append(_round(1 - len([x for x in entries if x > 0]) / max(1, len(entries))))
    settings = run.recipe.get("rank")
    settings = settings if isinstance(settings, dict) else {}
    method = str(settings.get("method", ""))
    nouns = {"sora": ("gate", "gates"), "salientlora": ("singular value", "singular values")}
    nouns["adalora"] = nouns["salientlora"]
    noun, plural_noun = nouns.get(method, ("rank diagonal entry", "rank diagonal entries"))
    # Of a plain LoRA start no diagonal is trained: a rank's value is the size of its two vectors.
    of_vectors = noun == "singular value" and settings.get("start", "lora") != "svd"
    size = "‖B‖ · ‖A‖ of a rank" if of_vectors else "|e|"
    first, last = bands["median"][0], bands["median"][-1]
    if len(shown) == 1:
        finding = f"The median {noun} was {number(last)} at step {count(shown[0]['step'])}"
    else:
        finding = f"The median {noun} {moved(first, last)} " + (
            f"from {number(first)} to {number(last)}" if first != last else f"at {number(last)}"
        )
    finding += f"; {100 * bands['zero_ratio'][-1]:.0f} % are zero at the end" if bands["zero_ratio"][-1] else ""
    by_site = {bare(name): [[_round(x) for x in frame[name][:longest]] for frame in falling] for name in sites}
    return Values(finding, noun, plural_noun, size, [e["step"] for e in shown], bands, by_site)


def prunes(run: RunFolder) -> Prunes | None:
    """The events that cut shapes, with the bytes that each freed."""
    rows = []
    before = _total_at_start(run)
    for event in run.of("rank"):
        kept = sum(int(r) for r in event["ranks"].values() if finite(r) is not None)
        if event.get("kind") == "prune":
            freed = event.get("freed") or {}
            sizes = {k: int(finite(freed.get(k)) or 0) for k in ("parameters", "gradients", "moments")}
            removed = max(0, before - kept) if before is not None else 0
            if removed or any(sizes.values()):  # an event may find nothing to cut
                rows.append(Prune(event["step"], kept, removed, sizes))
            before = kept
    if not rows:
        return None
    total = {k: sum(row.freed[k] for row in rows) for k in ("parameters", "gradients", "moments")}
    finding = f"{plural(len(rows), 'prune')} freed {byte_size(sum(total.values()))}: " + listing(
        [f"{byte_size(size)} of {what}" for what, size in total.items()]
    )
    return Prunes(finding, rows, total)


def freezes(run: RunFolder) -> Freezes | None:
    """When each matrix froze."""
    events = run.of("freeze")
    if not events:
        return None
    matrices = [f"{s.site.name}.{ab}" for s in run.plan.sites for ab in ("lora_A", "lora_B")] if run.plan else []
    frozen_at: dict[str, int | None] = dict.fromkeys(matrices)
    for event in events:
        for name in map(bare, map(str, event["frozen"])):
            if frozen_at.get(name) is None:
                frozen_at[name] = event["step"]
    when = sorted(step for step in frozen_at.values() if step is not None)
    finding = f"{len(when)} of {plural(len(frozen_at), 'matrix', 'matrices')} froze"
    if len(when) > 1:
        finding += (
            f", all at step {count(when[0])}"
            if when[0] == when[-1]
            else f" between steps {count(when[0])} and {count(when[-1])}, half of them by step "
            f"{count(statistics.median_low(when))}"
        )
    cut_at = {name: step for name, step in _cut_away(run).items() if frozen_at.get(name, step) is None}
    left = len(frozen_at) - len(when) - len(cut_at)
    finding += f"; {len(cut_at)} {'was' if len(cut_at) == 1 else 'were'} cut to rank 0" if cut_at else ""
    finding += f"; {left} trained to the end" if left else ""
    return Freezes(
        finding,
        grids_of(run, frozen_at),
        frozen_at,
        cut_at,
        max(run.last_step, when[-1] if when else 0),
        [e["step"] for e in events],
        [finite(e.get("trainable_ratio")) for e in events],
    )


def _cut_away(run: RunFolder) -> dict[str, int]:
    """Matrix of a site that ends without ranks -> the step at which the last of them was cut."""
    since: dict[str, int] = {}
    for event in run.of("rank"):
        for name, r in event["ranks"].items():
            if r == 0 and event.get("kind") == "prune":
                since.setdefault(bare(name), event["step"])
            else:
                since.pop(bare(name), None)
    return {f"{name}.{ab}": step for name, step in since.items() for ab in ("lora_A", "lora_B")}


def grids_of(run: RunFolder, names: Iterable[str]) -> list[Grid]:
    """Lays names out by stack, kind and layer, in the order in which they come.

    The plan knows where each site sits; a name that it lacks is read as ``stack.<layer>.kind``. What lies
    outside of every stack becomes a stack of its own with a single layer 0.
    """
    known = {s.site.name: s.site for s in run.plan.sites} if run.plan else {}
    stacks: dict[str, dict[tuple[str, int], str]] = {}
    for name in dict.fromkeys(names):
        matrix = re.fullmatch(r"(.*)(\.lora_[AB])", name)
        site = known.get(matrix[1] if matrix else name)
        if site is not None and site.block is not None:
            stack, layer, kind = site.stack or "", site.block, site.kind or name
            kind += matrix[2] if matrix else ""
        else:
            parts = re.fullmatch(r"(.*?)\.(\d+)\.(.*)", name)
            stack, layer, kind = (parts[1], int(parts[2]), parts[3]) if parts else ("outside the layers", 0, name)
        stacks.setdefault(stack, {})[kind, layer] = name
    grids = []
    for stack, cells in stacks.items():
        kinds = list(dict.fromkeys(kind for kind, _ in cells))
        layers = sorted({layer for _, layer in cells})
        table = [[cells.get((kind, layer)) for layer in layers] for kind in kinds]
        grids.append(Grid(stack, layers, kinds, _labels(kinds), table))
    return grids


def bare(name: str) -> str:
    """A module's name in the base model, whatever PEFT put before it."""
    return name.removeprefix("base_model.model.")


def _labels(kinds: list[str]) -> list[str]:
    """Short names; a matrix is told from its twin by a trailing A or B."""
    pairs = [re.fullmatch(r"(.*)\.lora_([AB])", kind) for kind in kinds]
    if not all(pairs):
        return short_labels(kinds)
    sites = list(dict.fromkeys(pair[1] for pair in pairs if pair))
    short = dict(zip(sites, short_labels(sites)))
    return [f"{short[pair[1]]} {pair[2]}" for pair in pairs if pair]


def _round(value: float) -> float:
    """Four significant digits: what a curve can show."""
    return float(f"{value:.4g}")
