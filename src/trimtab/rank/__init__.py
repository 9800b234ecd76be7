"""Which rank each site keeps, decided during training: one file per method, one line each in `METHODS`.

No torch is imported before a method is loaded. Other packages add methods through the entry-point group
``trimtab.rank``: ``name = "package.module:SettingsClass"``, a subclass of `trimtab.rank.base.RankSettings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..lookup import announced, imported

if TYPE_CHECKING:
    from .base import RankSettings

ENTRY_POINTS = "trimtab.rank"


@dataclass(frozen=True)
class Method:
    """A rank method before it is loaded."""

    target: str
    """``module:SettingsClass``."""
    summary: str
    paper: str

    def load(self) -> type[RankSettings]:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


METHODS: dict[str, Method] = {
    "salientlora": Method(
        "trimtab.rank.salientlora:SalientLoRA",
        "prunes singular values whose course over a growing window neither is large nor drives others",
        "NeurIPS 2024, Unveiling LoRA Intrinsic Ranks via Salience Analysis",
    ),
    "adalora": Method(
        "trimtab.rank.adalora:AdaLoRA",
        "moves a shrinking rank budget between sites by loss sensitivity",
        "arXiv 2303.10512",
    ),
    "sora": Method(
        "trimtab.rank.sora:SoRA",
        "shrinks a gate per rank by a proximal step, so that ranks reach zero by themselves",
        "arXiv 2311.11696",
    ),
}


def available() -> dict[str, Method]:
    """Built-in methods and those of installed packages, by the name a recipe uses."""
    found = dict(METHODS)
    for name, (target, package) in announced(ENTRY_POINTS).items():
        found.setdefault(name, Method(target, f"from {package}", ""))
    return found


def load(name: str) -> type[RankSettings]:
    """The settings class of a method, by its name or as ``module:SettingsClass``.

    Raises:
        ConfigError: a name nobody provides, or something that is no settings class.
    """
    known = available()
    if name in METHODS:
        return METHODS[name].load()
    if name not in known and ":" not in str(name):
        raise ConfigError("rank.method", name, f"one of {', '.join(known)}, or your own 'module:SettingsClass'."
                          f"{did_you_mean(str(name), known)}")
    from .base import RankSettings

    found = imported("rank.method", name, known[name].target if name in known else name)
    if not (is_dataclass(found) and isinstance(found, type) and issubclass(found, RankSettings)):
        raise ConfigError("rank.method", name, "must be a dataclass that extends trimtab.rank.base.RankSettings")
    return found


def make(name: str, options: Mapping[str, Any]) -> RankSettings:
    """Settings from a recipe's ``rank:`` section, less its ``method`` key.

    >>> make("adalora", {"target_r": 2}).target_r
    2
    """
    cls = load(name)
    allowed = {field.name: field for field in fields(cls)}
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(f"rank.{key}", value, f"{name} has {', '.join(allowed)}.{did_you_mean(key, allowed)}")
    for key, field in allowed.items():
        if key not in options and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"rank.{key}", None, f"needed by {name}")
    return cls(**options)
