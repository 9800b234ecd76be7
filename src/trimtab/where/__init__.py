"""Which blocks of a model are adapted, decided before training.

`METHODS` is what the recipe, the command line and the report read; no torch is imported here. Other packages add
methods through the entry-point group ``trimtab.where``: ``name = "package.module:function"``, see `choose_own`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..plans import Where
from ..registry import announced, imported
from .controls import Among, first, from_mask, last, random, uniform, with_targets

__all__ = ["METHODS", "Method", "choose_own", "first", "from_mask", "last", "random", "uniform", "with_targets"]

ENTRY_POINTS = "trimtab.where"


@dataclass(frozen=True)
class Method:
    """One way of choosing layers, as `trimtab methods` lists it."""

    name: str
    summary: str
    paper: str = "control"
    needs_scores: bool = False
    """Needs a pass over data."""
    needs_labels: bool = False
    """Needs the rows with their labels, as they are trained on."""
    settings: tuple[str, ...] = ("ratio", "count")
    """Recipe keys under ``where`` that it reads, beside ``method``."""
    target: str = ""
    """``module:function``, as of other packages' methods; empty for those that the application calls itself."""


MEASURED = ("ratio", "count", "samples", "batch_size", "exclude")
METHODS: dict[str, Method] = {
    m.name: m
    for m in (
        Method(
            "cka",
            "the layers that change their input most (lowest CKA)",
            "arXiv 2602.05988",
            needs_scores=True,
            settings=("ratio", "count", "samples", "pool", "estimator", "batch_size", "exclude", "degenerate"),
        ),
        Method(
            "gradient",
            "the layers of the largest gradient, on labelled batches",
            needs_scores=True,
            needs_labels=True,
            settings=MEASURED,
            target="trimtab.where.gradients:gradient",
        ),
        Method(
            "fisher",
            "the layers of the highest Fisher information per weight",
            "arXiv 2602.05988, as a rival",
            needs_scores=True,
            needs_labels=True,
            settings=MEASURED,
            target="trimtab.where.gradients:fisher",
        ),
        Method(
            "influence",
            "the layers that turn their tokens' hidden states most",
            "ShortGPT, arXiv 2403.03853",
            needs_scores=True,
            settings=MEASURED,
            target="trimtab.where.influence:influence",
        ),
        Method("uniform", "evenly spaced layers"),
        Method("first", "the lowest layers"),
        Method("last", "the highest layers"),
        Method("random", "layers drawn with where.seed", settings=("ratio", "count", "seed")),
        Method("mask", "the layers of a 0/1 string", settings=("mask",)),
    )
}


# -- methods of other packages, and the user's own ------------------------------------------------------


def available() -> dict[str, str]:
    """Every method's name, and the package that it is from ("" for our own)."""
    others = {name: package for name, (_, package) in announced(ENTRY_POINTS).items()}
    return {**others, **dict.fromkeys(METHODS, "")}


def check_name(method: str) -> None:
    """Raise `ConfigError` for a method that nobody provides."""
    known = available()
    if method not in known and ":" not in method:
        near = did_you_mean(method, known)
        raise ConfigError(
            "where.method", method, f"must be one of {', '.join(known)}, or your own 'module:function'.{near}"
        )


def load_own(method: str) -> Callable[..., Where | str | Mapping[str, str]]:
    """The function behind a method."""
    known = {**announced(ENTRY_POINTS), **{name: (own.target, "") for name, own in METHODS.items() if own.target}}
    found = imported("where.method", method, known[method][0] if method in known else method)
    if not callable(found):
        raise ConfigError("where.method", method, f"must be a function of the model; it is a {type(found).__name__}")
    return found


def _parameters(method: str) -> list[inspect.Parameter]:
    """What a function takes beside the model, which is its first, whatever it is called there."""
    own = load_own(method)
    try:
        parameters = list(inspect.signature(own).parameters.values())
    except (TypeError, ValueError):  # some builtins have none
        parameters = []
    if not parameters:
        raise ConfigError("where.method", method, "must be a function of the model, and by name of its settings")
    return parameters[1:]


def reads_batches(method: str) -> bool:
    """Whether a method needs weights and data; the others choose by the model's shape alone."""
    if method in METHODS:
        return METHODS[method].needs_scores
    return any(p.name == "batches" for p in _parameters(method))


def own_settings(method: str) -> dict[str, Any]:
    """Settings of a method's function, with their defaults (`inspect.Parameter.empty` for none)."""
    return {
        p.name: p.default
        for p in _parameters(method)
        if p.name not in ("batches", "among") and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    }


def choose_own(
    method: str,
    model: Any,
    settings: Mapping[str, Any],
    batches: Iterable[Any] | None = None,
    among: Among | None = None,
) -> Where:
    """A selection by a method's function, built in or not.

    It takes the model and, by name, whatever settings it has: ``ratio``, ``count``, ``seed`` and its own
    keys of the recipe's ``where:``. With a parameter ``batches`` it is given padded batches of training rows, on the
    model's device; without, the model may be one without weights (a plan). With a parameter ``among`` it is given the
    layers of each stack that hold a target, or None where all do. With ``**settings`` it takes any key. It answers
    with a `Where`, or one 0/1 string, or one for each stack.

    Raises:
        ConfigError: settings that it does not take or lacks, or an answer that does not fit the model.
    """
    takes = own_settings(method)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in _parameters(method))
    for key, value in settings.items():
        if key not in takes and not takes_any:
            has = ", ".join(takes) or "no settings"
            raise ConfigError(f"where.{key}", value, f"{method} has {has}.{did_you_mean(key, takes)}")
    for key, default in takes.items():
        if default is inspect.Parameter.empty and key not in settings:
            raise ConfigError(f"where.{key}", None, f"needed by {method}: where={{method: {method}, {key}: …}}")
    given = dict(settings) if batches is None else {**settings, "batches": batches}
    if any(p.name == "among" for p in _parameters(method)):
        given["among"] = among
    chosen = load_own(method)(model, **given)
    if isinstance(chosen, Where):
        from_mask(model, chosen.stacks)  # refuses masks of another model
        return replace(chosen, method=method)
    return replace(from_mask(model, chosen), method=method)
