"""Until when each projection trains: one file per method, one line each in `METHODS`.

No torch is imported before a method is loaded. Other packages add methods through the entry-point group
``trimtab.freeze``: ``name = "package.module:SettingsClass"``, a subclass of
`trimtab.freeze.base.FreezeSettings` that is a frozen dataclass.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Method, Registry

if TYPE_CHECKING:
    from .base import FreezeSettings

METHODS: dict[str, Method] = {
    "aflora": Method(
        "trimtab.freeze.aflora:AFLoRA",
        "freezes projections one by one, those whose gradients fade first; two small vectors train on",
        "arXiv 2403.13269",
    ),
    "grades": Method(
        "trimtab.freeze.grades:GradES",
        "freezes the projections of a site once they have settled: their gradients hardly change any more",
        "arXiv 2509.01842",
    ),
    "at": Method("trimtab.freeze.controls:FreezeAt", "freezes every projection at one fixed step", "control"),
}

_REGISTRY: Registry[FreezeSettings] = Registry("freeze", "trimtab.freeze.base:FreezeSettings", METHODS)
available, load, make = _REGISTRY.available, _REGISTRY.load, _REGISTRY.make
