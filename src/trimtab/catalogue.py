"""What exists on each axis: name, one line, paper, defaults. Read from the tables that the run reads."""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any

from . import recipe as recipes

LORA_PAPER, VERA_PAPER = "arXiv 2106.09685", "arXiv 2310.11454"
_ADAPTERS = {
    "lora": ("a low-rank update B A beside each chosen linear", LORA_PAPER),
    "vera": ("two small vectors around one random pair of matrices, frozen and shared", VERA_PAPER),
}
_WHERE = {
    "cka": ("the layers that change their input most, by centred kernel alignment", "arXiv 2602.05988"),
    "uniform": ("evenly spaced layers", "control"),
    "first": ("the lowest layers", "control"),
    "last": ("the highest layers", "control"),
    "random": ("layers drawn with where.seed", "control"),
    "mask": ("the layers of a 0/1 string", "control"),
}


@dataclass(frozen=True)
class Entry:
    """One method."""

    axis: str
    name: str
    summary: str
    paper: str = ""
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    needed: list[str] = dataclasses.field(default_factory=list)
    """Settings without a default."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def catalogue() -> list[Entry]:
    """Every method, axis by axis, in the order in which a recipe names the axes."""
    return [*_tasks(), *_adapters(), *_where(), *_methods("rank"), *_methods("freeze")]


def _tasks() -> list[Entry]:
    from .tasks import known_tasks

    return [Entry("task", name, f"from {target.partition(':')[0]}" if not target.startswith("trimtab.") else "")
            for name, target in known_tasks().items()]


def _adapters() -> list[Entry]:
    defaults = {name: field.get_default() for name, field in recipes.Adapter.model_fields.items() if name != "type"}
    return [Entry("adapter", name, *_ADAPTERS[name], _said(defaults)) for name in recipes.ADAPTERS]


def _where() -> list[Entry]:
    fields = {name: field.get_default() for name, field in recipes.Where.model_fields.items()}
    own = {"cka": ("samples", "estimator", "pool", "batch_size", "exclude", "degenerate")}
    return [Entry("where", name, summary, paper, {key: fields[key] for key in own.get(name, ())})
            for name, (summary, paper) in _WHERE.items()]


def _methods(axis: str) -> list[Entry]:
    found = []
    for name, method in import_module(f".{axis}", __package__).available().items():
        fields = [field for field in dataclasses.fields(method.load()) if field.init]
        needed = [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]
        defaults = {f.name: f.default for f in fields if f.name not in needed}
        found.append(Entry(axis, name, method.summary, method.paper, defaults, needed))
    return found


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
