"""What exists on each axis: name, one line, paper, defaults. Read from the tables that the run reads."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from typing import Any

from ..errors import ConfigError
from ..train.rates import ROLES
from . import recipe as recipes
from .adapter_kinds import ADAPTERS

_NO_DEFAULT = (dataclasses.MISSING, inspect.Parameter.empty)
LORA_PAPER, VERA_PAPER = "arXiv 2106.09685", "arXiv 2310.11454"
_ADAPTERS = {
    "lora": ("a low-rank update B A beside each chosen linear", LORA_PAPER),
    "vera": ("two small vectors around one random pair of matrices, frozen and shared", VERA_PAPER),
    "bottleneck": (
        "two dense layers with a non-linearity between, in each block: houlsby, pfeiffer, parallel",
        "arXiv 1902.00751, 2005.00247, 2110.04366",
    ),
    "adaption_prompt": ("LLaMA-Adapter: learned prompts in the last layers, gated from zero", "arXiv 2303.16199"),
}
_OWN_DEFAULTS: dict[str, dict[str, Any]] = {"bottleneck": {"variant": "houlsby"}}
_OWN_NEEDS = {"adaption_prompt": ["adapter_len", "adapter_layers"]}


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
    rates = [Entry("rates", role, held) for role, held in ROLES.items()]
    return [*_tasks(), *_adapters(), *_where(), *_methods("rank"), *_methods("freeze"), *rates]


def _tasks() -> list[Entry]:
    from .tasks import known_tasks

    return [
        Entry("task", name, f"from {target.partition(':')[0]}" if not target.startswith("trimtab.") else "")
        for name, target in known_tasks().items()
    ]


def _adapters() -> list[Entry]:
    defaults = {name: field.get_default() for name, field in recipes.Adapter.model_fields.items() if name != "type"}
    return [
        Entry(
            "adapter",
            name,
            *_ADAPTERS[name],
            {**_OWN_DEFAULTS.get(name, {}), **_without_none({k: v for k, v in defaults.items() if k in words})},
            _OWN_NEEDS.get(name, []),
        )
        for name, (_, _, words) in ADAPTERS.items()
    ]


def _where() -> list[Entry]:
    from .. import where

    fields = {name: field.get_default() for name, field in recipes.Where.model_fields.items()}
    sizes = ("ratio", "count", "mask", "seed")
    found = [
        Entry("where", m.name, m.summary, m.paper, {key: fields[key] for key in m.settings if key not in sizes})
        for m in where.METHODS.values()
    ]
    for name, package in where.available().items():
        if package:
            found.append(_plugin_entry("where", name, package, partial(where.own_settings, name)))
    return found


def _methods(axis: str) -> list[Entry]:
    methods = import_module(f"trimtab.{axis}")
    found = []
    for name, method in methods.available().items():

        def settings(name: str = name) -> dict[str, Any]:
            return {
                f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
                for f in dataclasses.fields(methods.load(name))
                if f.init
            }

        if name in methods.METHODS:
            found.append(_entry(axis, name, method.summary, method.paper, settings()))
        else:
            found.append(_plugin_entry(axis, name, method.summary.removeprefix("from "), settings))
    return found


def _plugin_entry(axis: str, name: str, package: str, settings: Callable[[], dict[str, Any]]) -> Entry:
    """A method of another package; one that cannot be imported says so, and the others are listed all the same."""
    try:
        return _entry(axis, name, f"from {package}", "", settings())
    except Exception as error:  # whatever another package's module does while it is imported
        why = error.cure if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        return Entry(axis, name, f"from {package}, but {why}")


def _entry(axis: str, name: str, summary: str, paper: str, settings: dict[str, Any]) -> Entry:
    needed = [key for key, value in settings.items() if value in _NO_DEFAULT]
    return Entry(
        axis, name, summary, paper, {key: value for key, value in settings.items() if key not in needed}, needed
    )


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}
