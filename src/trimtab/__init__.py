"""Trimtab decides where a transformer is adapted, at which rank, and for how long.

Names are imported on first use, so that `trimtab --help` and reading a run folder need no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "AFLoRA": "freeze.aflora",
    "AdaLoRA": "rank.adalora",
    "AdapterSwitch": "exporting.switching",
    "BottleneckConfig": "adapters.bottleneck",
    "Budget": "plans",
    "Controller": "train.controller",
    "FreezeAt": "freeze.controls",
    "LayerScores": "where.cka",
    "Plan": "plans",
    "SalientLoRA": "rank.salientlora",
    "Site": "plans",
    "SoRA": "rank.sora",
    "TrimCallback": "train.callback",
    "TrimConfig": "host.layers",
    "TrimtabError": "errors",
    "Where": "plans",
    "export": "exporting.formats",
    "last_checkpoint": "train.checkpoint",
    "layer_similarity": "where.cka",
    "parameter_groups": "train.rates",
    "plan": "app.planning",
    "restrict": "host.restrict",
    "select_layers": "where.cka",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    if name in {"where", "rank", "freeze", "adapters"}:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


class _AfterPeft(MetaPathFinder):
    """Makes our bottleneck adapters known to PEFT as soon as both are imported, in whichever order.

    `PeftModel.from_pretrained` then reads a saved one like any other, and `import trimtab` stays without torch.
    """

    is_trimtabs = True

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = _other_finders()  # a reloaded trimtab has left one like this: the two would ask each other for ever
        spec = next((s for f in others if (s := f.find_spec(name, path, target))), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                sys.meta_path[:] = _other_finders()
                import_module(".adapters.bottleneck", __name__)

            loader.exec_module = exec_module
        return spec


def _other_finders() -> list[Any]:
    return [finder for finder in sys.meta_path if not getattr(finder, "is_trimtabs", False)]


if "peft" in sys.modules:
    import_module(".adapters.bottleneck", __name__)
else:
    sys.meta_path.insert(0, _AfterPeft())
