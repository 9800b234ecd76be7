"""Until when each projection trains: one file per method, one line each in `METHODS`.

No torch is imported before a method is loaded. Other packages add methods through the entry-point group
``trimtab.freeze``: ``name = "package.module:SettingsClass"``, a subclass of
`trimtab.freeze.base.FreezeSettings` that is a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from ..lookup import announced, imported

if TYPE_CHECKING:
    from .base import FreezeSettings

ENTRY_POINTS = "trimtab.freeze"


@dataclass(frozen=True)
class Method:
    """A freeze method before it is loaded."""

    target: str
    """``module:SettingsClass``."""
    summary: str
    paper: str

    def load(self) -> type[FreezeSettings]:
        module, _, name = self.target.partition(":")
        return getattr(import_module(module), name)


METHODS: dict[str, Method] = {
    "aflora": Method(
        "trimtab.freeze.aflora:AFLoRA",
        "freezes projections one by one, those whose gradients fade first; two small vectors train on",
        "arXiv 2403.13269",
    ),
    "at": Method("trimtab.freeze.controls:FreezeAt", "freezes every projection at one fixed step", "control"),
}


def available() -> dict[str, Method]:
    """Built-in methods and those of installed packages, by the name a recipe uses."""
    found = dict(METHODS)
    for name, (target, package) in announced(ENTRY_POINTS).items():
        found.setdefault(name, Method(target, f"from {package}", ""))
    return found


def load(name: str) -> type[FreezeSettings]:
    """The settings class of a method, by its name or as ``module:SettingsClass``.

    Raises:
        ConfigError: a name nobody provides, or something that is no settings class.
    """
    known = available()
    if name in METHODS:
        return METHODS[name].load()
    if name not in known and ":" not in str(name):
        raise ConfigError("freeze.method", name, f"one of {', '.join(known)}, or your own 'module:SettingsClass'."
                          f"{did_you_mean(str(name), known)}")
    from .base import FreezeSettings

    found = imported("freeze.method", name, known[name].target if name in known else name)
    if not (is_dataclass(found) and isinstance(found, type) and issubclass(found, FreezeSettings)):
        raise ConfigError("freeze.method", name, "must be a dataclass that extends trimtab.freeze.base.FreezeSettings")
    return found


def make(name: str, options: Mapping[str, Any]) -> FreezeSettings:
    """Settings from a recipe's ``freeze:`` section, less its ``method`` key.

    >>> make("at", {"at": "2ep"}).at
    '2ep'
    """
    cls = load(name)
    allowed = {field.name: field for field in fields(cls)}  # type: ignore[arg-type]
    for key, value in options.items():
        if key not in allowed:
            raise ConfigError(f"freeze.{key}", value, f"{name} has {', '.join(allowed)}.{did_you_mean(key, allowed)}")
    for key, field in allowed.items():
        if key not in options and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"freeze.{key}", None, f"needed by {name}")
    return cls(**options)
