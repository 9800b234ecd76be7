"""The tensors of one adapter, by what is done with them; found by type, never by their names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from ..host.adapted import adapter_parameters, peft_model_of
from ..host.layers import PROJECTIONS, TrimLayer, hosted_layers
from ..host.sharding import is_dtensor

if TYPE_CHECKING:
    from ..rank.base import Factors


def active_adapter(model: nn.Module) -> str:
    """PEFT's name of the active adapter; of the first one where several are."""
    active = peft_model_of(model).active_adapter
    return active if isinstance(active, str) else active[0]


class AdapterTensors:
    """Views of an adapter as it is at the moment; a cut keeps the `Parameter` objects.

    Args:
        model: holds a `PeftModel`.
        adapter_name: PEFT's name of the adapter.
    """

    def __init__(self, model: nn.Module, adapter_name: str) -> None:
        self.model, self.adapter_name = model, adapter_name
        self.layers: dict[str, TrimLayer] = hosted_layers(model, adapter_name)
        self.parameters = adapter_parameters(model, adapter_name)
        """All of the adapter, of any kind; heads and other saved modules are not among them."""
        self._ones: dict[str, Tensor] = {}

    # -- one by one ---------------------------------------------------------------------------------

    def named(self, layer: TrimLayer) -> dict[str, nn.Parameter]:
        """What a layer has of ``lora_A``, ``lora_B``, ``lora_e``, ``lora_b``."""
        A, B = layer.factors(self.adapter_name)
        e, b = layer.diagonals(self.adapter_name)
        named = {"lora_A": A, "lora_B": B, "lora_e": e, "lora_b": b}
        return {key: p for key, p in named.items() if p is not None}

    def trained(self) -> list[nn.Parameter]:
        """What of the adaptive layers gets a gradient."""
        return [p for la in self.layers.values() for p in self.named(la).values() if p.requires_grad and p.numel()]

    def projections(self) -> dict[str, nn.Parameter]:
        """``<site>.lora_A`` or ``<site>.lora_B`` -> parameter, frozen or not."""
        return {
            f"{name}.{which}": parameter
            for name, layer in self.layers.items()
            for which, parameter in zip(PROJECTIONS, layer.factors(self.adapter_name))
        }

    def projections_at_start(self) -> dict[str, int]:
        """Elements of every projection that trains at the start of the run, also when this is a resumed one."""
        found = {}
        for name, layer in self.layers.items():
            for which, p, width in zip(PROJECTIONS, layer.factors(self.adapter_name), layer.widths()):
                if p.requires_grad:
                    found[f"{name}.{which}"] = layer.hosted[self.adapter_name].initial_r * width
        return found

    def weights(self) -> dict[str, Tensor]:
        """Those projections that still train, detached."""
        return {name: p.detach() for name, p in self.projections().items() if p.requires_grad}

    def diagonals(self) -> dict[str, nn.Parameter]:
        """Site -> its ``e``, where it has one."""
        return {n: e for n, la in self.layers.items() if (e := la.diagonals(self.adapter_name)[0]) is not None}

    def factors(self, has_values: bool) -> dict[str, Factors]:
        """Site -> what a rank method is handed.

        Args:
            has_values: whether ``e`` holds the values that ranks are judged by.
        """
        from ..rank.base import Factors

        found = {}
        for name, layer in self.layers.items():
            A, B = layer.factors(self.adapter_name)
            e, _ = layer.at_work(self.adapter_name)
            found[name] = Factors(name, A, self._ones_of(name, A) if e is None else e, B, has_values)
        return found

    def _ones_of(self, name: str, A: Tensor) -> Tensor:
        """(r,); asked for at every step, and the same until a cut."""
        ones = self._ones.get(name)
        if ones is None or (ones.shape[0], ones.dtype, ones.device) != (A.shape[0], A.dtype, A.device):
            self._ones[name] = ones = A.new_ones(A.shape[0])
        return ones

    def at_rest(self) -> list[nn.Parameter]:
        """What waits until it is needed, and is not at work yet."""
        return [
            p
            for layer in self.layers.values()
            if layer.is_adaptive(self.adapter_name)
            for p in layer.resting(self.adapter_name)
        ]

    def beside(self) -> list[nn.Parameter]:
        """Whatever trains beside the adapter and is whole on this process: heads, biases."""
        ours = {id(p) for p in self.parameters}
        return [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours and not is_dtensor(p)]

    def keep_frozen(self) -> None:
        """What froze stays so, whoever has set ``requires_grad`` of all parameters since; PEFT itself heeds it."""
        for layer in self.layers.values():
            for which in layer.hosted[self.adapter_name].frozen:
                if getattr(layer, which)[self.adapter_name].weight.requires_grad:
                    layer.freeze(self.adapter_name, which)

    # -- counted ------------------------------------------------------------------------------------

    def trainable_params(self) -> int:
        at_rest = {id(p) for p in self.at_rest()}
        return sum(p.numel() for p in self.parameters if p.requires_grad and id(p) not in at_rest)

    def held_params(self) -> int:
        return sum(p.numel() for p in self.parameters) - sum(p.numel() for p in self.at_rest())

    def params_at_no_site(self) -> int:
        """Of the adapter, but of no layer that adapts: tokens that train."""
        at_sites = {id(p) for layer in self.layers.values() for p in self.named(layer).values()}
        return sum(p.numel() for p in self.parameters if p.requires_grad and id(p) not in at_sites)

    def ranks(self) -> dict[str, int]:
        return {name: layer.r.get(self.adapter_name, 0) for name, layer in self.layers.items()}

    def frozen(self) -> set[str]:
        return {
            f"{name}.{which}"
            for name, layer in self.layers.items()
            if layer.is_adaptive(self.adapter_name)
            for which in layer.hosted[self.adapter_name].frozen
        }

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Adapter tensor -> its shape, and whether it trains, as every process must hold it."""
        return {
            f"{name}.{key}": (*p.shape, int(p.requires_grad))
            for name, layer in self.layers.items()
            for key, p in self.named(layer).items()
        }
