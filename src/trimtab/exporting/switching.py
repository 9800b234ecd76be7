"""Several adapters on one base, one of them merged at a time, and the base back bit for bit.

LoRA's papers switch tasks by subtracting one merged update and adding another, ``W − BA + B'A'``. In floating point
that does not return to ``W``: every switch leaves a rounding error behind, and PEFT's ``unmerge`` does just that. Here
a copy of the weights that an adapter merges into is kept while it is merged, and every switch starts from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import ExportError, ModelError, did_you_mean
from .formats import refuse_a_changed_base, refuse_what_cannot_merge

if TYPE_CHECKING:
    from types import TracebackType


class AdapterSwitch:
    """Switches a `PeftModel` between its adapters by name, each merged into the base: no cost in a forward pass.

    Memory: one copy of the adapted layers' weights, while one is merged. Heads and poolers that were saved with an
    adapter come and go with it. From the start the model computes what its base does, until `to` merges an adapter,
    and nothing trains afterwards; take a fresh model for that.

    As a context manager it leaves the base as it was::

        with AdapterSwitch(model) as switch:
            switch.to("summarise")
            ...
            switch.to("translate")
    """

    def __init__(self, model: torch.nn.Module) -> None:
        """
        Args:
            model: a `PeftModel` that holds the adapters (`PeftModel.from_pretrained`, then `load_adapter`).
        Raises:
            ModelError: it holds no adapter, one is merged already, or the base is quantised.
            ExportError: adapters of this type cannot be merged, or one has changed the base itself.
        """
        from ..host.adapted import adapted_modules, peft_model_of

        self.model = peft_model_of(model)
        self._tuner: Any = self.model.base_model
        kind = next(iter(self.model.peft_config.values())).peft_type
        if not hasattr(self._tuner, "merge_adapter"):
            name = getattr(kind, "value", kind)
            raise ExportError(
                f"adapter type {name}: it changes the function in a way that no weight holds; "
                "model.set_adapter switches it without merging"
            )
        layers = adapted_modules(self.model)
        if any(getattr(layer, "merged", False) for layer in layers):
            raise ModelError(
                "model: an adapter is merged already, and unmerging it would not give back the base bit "
                "for bit; load the base anew"
            )
        self._layers = layers
        if any(not p.is_floating_point() for layer in layers for p in layer.get_base_layer().parameters(recurse=False)):
            raise ModelError("model: merging into quantised weights loses digits; load the base in bf16 or f32")
        for name in self.names:
            refuse_a_changed_base(self.model, name)
        self._kept: list[tuple[Any, str, Any]] = []
        self.active: str | None = None
        """The adapter that is merged now."""
        self._restore()

    @property
    def names(self) -> tuple[str, ...]:
        """The adapters that there are."""
        return tuple(self.model.peft_config)

    def to(self, name: str | None) -> None:
        """Put the base back, then merge an adapter; None is the base alone.

        Raises:
            ModelError: there is no adapter of that name.
            ExportError: it cannot be merged; the base is back all the same.
        """
        if name is not None and name not in self.names:
            raise ModelError(
                f"adapter {name!r}: not loaded; there is {', '.join(self.names)}.{did_you_mean(str(name), self.names)}"
            )
        self._restore()
        if name is None:
            return
        refuse_what_cannot_merge(self.model, [name], f"adapter {name!r}")
        self._tuner.enable_adapter_layers()
        self.model.set_adapter(name, inference_mode=True)
        self._set_aside(name)
        try:
            self._tuner.merge_adapter(adapter_names=[name])
        except BaseException:
            self._restore()
            raise
        self.active = name

    def _set_aside(self, name: str) -> None:
        """Give every module that the adapter merges into weights of its own: it may share them (tied, replicated)."""
        for layer in self._layers:
            module = layer.get_base_layer()
            if _holds(layer, name) and not any(module is kept for kept, _, _ in self._kept):
                for key, parameter in module.named_parameters(recurse=False):
                    self._kept.append((module, key, parameter))
                    module._parameters[key] = nn.Parameter(parameter.detach().clone(), requires_grad=False)

    def _restore(self) -> None:
        for module, key, parameter in self._kept:
            module.__dict__.pop(key, None)  # some layers put a tensor in its place
            module._parameters[key] = parameter
        for layer in self._layers:
            if hasattr(layer, "merged_adapters"):
                layer.merged_adapters.clear()
        self._kept, self.active = [], None
        self._tuner.disable_adapter_layers()

    def __enter__(self) -> AdapterSwitch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.to(None)


def _holds(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, attribute, {}) for attribute in layer.adapter_layer_names)
