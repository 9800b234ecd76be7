"""The methods of one axis by name: built in, announced by installed packages, or the user's own ``module:name``.

`rank` and `freeze` are two of these; their methods are settings classes. (`where` methods are functions of a
model, which `where` looks up itself.)
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from .errors import ConfigError, did_you_mean

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Method:
    """A method before it is loaded."""

    target: str
    """``module:SettingsClass``."""
    summary: str
    paper: str

    def load(self) -> type[Any]:
        return _load(self.target)


@dataclass(frozen=True)
class Registry(Generic[Settings]):
    """One axis; imports nothing of a method before it is asked for."""

    axis: str
    """The recipe's section, and the end of the entry-point group ``trimtab.<axis>``."""
    base: str
    """``module:Class`` that settings of this axis extend."""
    methods: Mapping[str, Method]
    """Our own, by the name that a recipe uses."""

    def available(self) -> dict[str, Method]:
        """Built-in methods and those of installed packages, by the name a recipe uses."""
        found = dict(self.methods)
        for name, (target, package) in announced(f"trimtab.{self.axis}").items():
            found.setdefault(name, Method(target, f"from {package}", ""))
        return found

    def load(self, name: str) -> type[Settings]:
        """The settings class of a method, by its name or as ``module:SettingsClass``.

        Raises:
            ConfigError: a name nobody provides, or something that is no settings class.
        """
        if name in self.methods:
            return self.methods[name].load()
        known, key = self.available(), f"{self.axis}.method"
        if name not in known and ":" not in str(name):
            raise ConfigError(
                key,
                name,
                f"one of {', '.join(known)}, or your own 'module:SettingsClass'.{did_you_mean(str(name), known)}",
            )
        found = imported(key, name, known[name].target if name in known else name)
        if isinstance(found, type) and is_dataclass(found) and issubclass(found, _load(self.base)):
            return cast("type[Settings]", found)
        raise ConfigError(key, name, f"must be a dataclass that extends {self.base.replace(':', '.')}")

    def make(self, name: str, options: Mapping[str, Any]) -> Settings:
        """Settings from the recipe's section, less its ``method`` key.

        Raises:
            ConfigError: a setting that the method has not, one that it needs, or a value that cannot be.

        >>> from trimtab import freeze
        >>> freeze.make("at", {"at": "2ep"}).at
        '2ep'
        """
        cls: Any = self.load(name)
        allowed = {field.name: field for field in fields(cls) if field.init}
        for key, value in options.items():
            if key not in allowed:
                raise ConfigError(
                    f"{self.axis}.{key}", value, f"{name} has {', '.join(allowed)}.{did_you_mean(key, allowed)}"
                )
        for key, field in allowed.items():
            if key not in options and field.default is MISSING and field.default_factory is MISSING:
                like = f"{self.axis}={{method: {name}, {key}: …}}"
                raise ConfigError(f"{self.axis}.{key}", None, f"needed by {name}: {like}")
        return cls(**options)


def _load(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def announced(group: str) -> dict[str, tuple[str, str]]:
    """What installed packages announce in a group of entry points: name -> (``module:attribute``, package)."""
    points = metadata.entry_points(group=group)
    return {point.name: (point.value, point.dist.name if point.dist else "another package") for point in points}


def imported(key: str, name: str, target: str) -> Any:
    """What ``module:attribute`` names; the module may lie in the current directory.

    Args:
        key, name: the recipe's key and its value, for the error.
    Raises:
        ConfigError: no such module, or nothing of that name in it.
    """
    module_name, _, attribute = target.partition(":")
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise ConfigError(key, name, f"{module_name!r} is no name of a module; write package.module:name")
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:  # the `trimtab` command does not look there by itself
        sys.path.append(here)
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(key, name, f"cannot import {module_name!r}: {error}") from error
    if not hasattr(module, attribute):
        near = did_you_mean(attribute, dir(module))
        raise ConfigError(key, name, f"{module_name!r} has no {attribute!r}.{near}")
    return getattr(module, attribute)
