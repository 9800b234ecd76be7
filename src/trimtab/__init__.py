"""Trimtab decides where a transformer is adapted, at which rank, and for how long.

Names are imported on first use, so that `trimtab --help` and reading a run folder need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AFLoRA": "freeze.aflora",
    "AdaLoRA": "rank.adalora",
    "AdapterSwitch": "switching",
    "Budget": "plans",
    "Controller": "controller",
    "FreezeAt": "freeze.controls",
    "LayerScores": "where.cka",
    "Plan": "plans",
    "SalientLoRA": "rank.salientlora",
    "Site": "plans",
    "SoRA": "rank.sora",
    "TrimCallback": "callback",
    "TrimConfig": "peft_host",
    "TrimtabError": "errors",
    "Where": "plans",
    "export": "exporting",
    "last_checkpoint": "checkpoint",
    "layer_similarity": "where.cka",
    "plan": "planning",
    "restrict": "where.restrict",
    "select_layers": "where.cka",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in {"where", "rank", "freeze", "adapters", "tasks", "report"}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
