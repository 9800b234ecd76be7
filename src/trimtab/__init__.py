"""Trimtab decides where a transformer is adapted, at which rank, and for how long.

Names are imported on first use, so that `trimtab --help` and reading a run folder need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .errors import missing_extra

__version__ = "0.2.0"

_PUBLIC = {
    "AFLoRA": "freeze.aflora",
    "AdaLoRA": "rank.adalora",
    "AdapterSwitch": "exporting.switching",
    "BottleneckConfig": "adapters.bottleneck",
    "Budget": "plans",
    "Controller": "train.controller",
    "EVA": "rank.eva",
    "FreezeAt": "freeze.controls",
    "GoRA": "rank.gora",
    "GradES": "freeze.grades",
    "LayerScores": "where.cka",
    "Plan": "plans",
    "SalientLoRA": "rank.salientlora",
    "Site": "plans",
    "SoRA": "rank.sora",
    "TrimCallback": "train.callback",
    "TrimConfig": "host.config",
    "TrimtabError": "errors",
    "Where": "plans",
    "export": "exporting.formats",
    "initialize_ranks": "train.initialize",
    "last_checkpoint": "train.checkpoint",
    "layer_similarity": "where.cka",
    "parameter_groups": "train.rates",
    "plan": "app.planning",
    "restrict": "host.restrict",
    "select_layers": "where.cka",
    "whole_parameters": "train.parallel",
}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return sorted(set(_PUBLIC) - _without_the_extra())
    if name in _PUBLIC:
        try:
            return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        except ModuleNotFoundError as error:
            raise missing_extra(f"trimtab.{name}", error) or error from None
    if name in {"where", "rank", "freeze", "adapters"}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _without_the_extra() -> set[str]:
    """Names that cannot be had here: `from trimtab import *` takes the others, and each says why when asked for."""
    try:
        import_module(f".{_PUBLIC['plan']}", __name__)
    except ModuleNotFoundError as error:
        if missing_extra("trimtab.plan", error) is not None:
            return {"plan"}
    return set()


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]
