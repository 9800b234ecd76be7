"""Which rank each site has, decided before or during training: one file per method, one line each in `METHODS`.

No torch is imported before a method is loaded. Other packages add methods through the entry-point group
``trimtab.rank``: ``name = "package.module:SettingsClass"``, a subclass of `trimtab.rank.base.RankSettings`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..registry import Method, Registry

if TYPE_CHECKING:
    from .base import RankSettings

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
    "eva": Method(
        "trimtab.rank.eva:EVA",
        "gives ranks, before training, to the sites whose inputs few directions explain, and starts A there",
        "arXiv 2410.07170",
    ),
    "gora": Method(
        "trimtab.rank.gora:GoRA",
        "gives ranks, before training, to the weights that the loss is most sensitive to; starts along their gradient",
        "arXiv 2502.12171",
    ),
}

_REGISTRY: Registry[RankSettings] = Registry("rank", "trimtab.rank.base:RankSettings", METHODS)
available, load, make = _REGISTRY.available, _REGISTRY.load, _REGISTRY.make
