"""Which tensors and modules FSDP2 holds. By name of class, so that nothing of torch.distributed is loaded to ask."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn


def is_dtensor(tensor: Tensor) -> bool:
    return type(tensor.data).__name__ == "DTensor"


def gathered(value: Any) -> Any:
    """The whole of a tensor that may be a shard; then every process must ask. Anything else comes back as it is."""
    return cast(Any, value).full_tensor() if isinstance(value, Tensor) and is_dtensor(value) else value


def is_fsdp2(module: nn.Module) -> bool:
    return any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__)


def is_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 holds a part of the model."""
    return any(is_fsdp2(module) for module in model.modules())


def reshard(model: nn.Module) -> None:
    """Let go of what FSDP2 has gathered for a forward pass without a backward one.

    `state_dict` does so on the process that calls it, which is the one that saves; left whole on the others, the next
    forward pass would gather on one process alone.
    """
    for module in model.modules():
        if is_fsdp2(module):
            cast(Any, module).reshard()
