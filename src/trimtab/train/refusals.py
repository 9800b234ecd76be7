"""What is refused before the first step: adapters that nobody would decide on, and starts that train nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigError, ModelError, StaleAdapterError
from ..host.adapted import adapter_layers, peft_model_of
from ..host.layers import Hosted, hosted_layers
from .tensors import AdapterTensors

if TYPE_CHECKING:
    from ..freeze.base import FreezeSettings


def refuse_plain_layers(adapter: AdapterTensors) -> None:
    """Raise `ModelError` where PEFT's own layers hold a part of an adapter that decides.

    PEFT puts a second adapter into the layers that the first one made, whatever kind they are.
    """
    name = adapter.adapter_name
    plain = [site for site, _ in adapter_layers(adapter.model, name) if site not in adapter.layers]
    if plain:
        raise ModelError(
            f"{plain[0]!r} and {len(plain) - 1} more modules carry {name!r} in PEFT's own layers, "
            "which another adapter brought there; add the adapter with a rank or freeze method before the others"
        )


def refuse_a_second_adapter(adapter: AdapterTensors) -> None:
    """Raise `ConfigError` where another adapter that decides is active as well."""
    for other in peft_model_of(adapter.model).active_adapters:
        if other != adapter.adapter_name and hosted_layers(adapter.model, other):
            raise ConfigError(
                "adapter_name",
                adapter.adapter_name,
                f"{other!r} is active as well and adapts, too, and nobody would decide on it; activate one with "
                "model.set_adapter",
            )


def refuse_while_merged(adapter: AdapterTensors) -> None:
    """Raise `ModelError` where the adapter lies in the base's weights: once it has changed, it cannot be taken out."""
    if any(adapter.adapter_name in layer.merged_adapters for layer in adapter.layers.values()):
        raise ModelError(
            f"adapter {adapter.adapter_name!r}: it is merged into the base's weights, which could not be had back from "
            "an adapter that was cut or folded since; call model.unmerge_adapter() first"
        )


def refuse_tensors_made_anew(adapter: AdapterTensors) -> None:
    """Raise `StaleAdapterError` where other parameters stand in the place of those that there were at the start."""
    layer = next(iter(adapter.layers.values()), None)
    if layer is not None and not any(p is layer.factors(adapter.adapter_name)[0] for p in adapter.parameters):
        raise StaleAdapterError(
            f"adapter {adapter.adapter_name!r} was made anew (added again, loaded with low_cpu_mem_usage or "
            "assign=True), and the optimizer trains the tensors that were there before: make an optimizer and a "
            "Controller for it"
        )


def refuse_lora_fa(
    adapter: AdapterTensors, freeze: FreezeSettings | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """Raise `ConfigError` for PEFT's LoRA-FA where a layer holds more than A, and a B that trains to the end."""
    if type(optimizer).__name__ == "LoraFAOptimizer" and (freeze is not None or adapter.diagonals()):
        raise ConfigError(
            "optimizer",
            "LoraFAOptimizer",
            "it trains the B of every layer and knows nothing else, so no diagonals that a rank method adds and "
            "nothing that freezes; use torch's AdamW, Adam or SGD",
        )


def refuse_what_is_no_optimizer(given: Any, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `ConfigError` where something was handed over in which there is no torch optimizer: a list of several."""
    if given is None or optimizer is not None:
        return
    cure = "moments are cut with the ranks, so it takes one torch optimizer, or a wrapper with .optimizer"
    if isinstance(given, (list, tuple, dict)):
        cure += "; give one with several parameter groups in place of several optimizers"
    raise ConfigError("optimizer", type(given).__name__, cure)


def take_charge(adapter: AdapterTensors, mark: object) -> None:
    """From here on this controller decides: it has taken a step, or the state of a run."""
    if (own := _first_hosted(adapter)) is not None:
        own.in_charge = mark


def refuse_a_second_controller(adapter: AdapterTensors, mark: object) -> None:
    """Raise `StaleAdapterError` where another one took the steps so far: this one knows nothing of them."""
    if (own := _first_hosted(adapter)) is not None and own.in_charge not in (None, mark):
        raise StaleAdapterError(
            "another Controller has taken steps on this adapter, and this one knows neither its scores nor its place "
            "in the schedule: make one Controller for the whole run, with the total number of steps, or give the new "
            "one the old one's state (load_state_dict)"
        )


def _first_hosted(adapter: AdapterTensors) -> Hosted | None:
    layer = next(iter(adapter.layers.values()), None)
    return None if layer is None else layer.hosted.get(adapter.adapter_name)


def refuse_groups_that_leave_out(adapter: AdapterTensors, optimizer: torch.optim.Optimizer | None) -> None:
    """Raise `ConfigError` where a tensor of the adapter is to train and no parameter group holds it."""
    if optimizer is None:
        return
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not adapter.layers and not any(id(p) in held for p in adapter.model.parameters()):
        return  # an optimizer that shards (ZeRO) holds flat copies: nothing can be told from those
    missing = {id(p) for p in adapter.parameters if p.requires_grad} - held
    left = [name for name, p in adapter.model.named_parameters() if id(p) in missing]
    if left:
        raise ConfigError(
            "optimizer",
            type(optimizer).__name__,
            f"no parameter group holds {left[0]!r} and {len(left) - 1} more adapter tensors, so they "
            "would not train; make the groups with trimtab.parameter_groups(model, learning_rate)",
        )


def refuse_dead_start(adapter: AdapterTensors, freeze: FreezeSettings | None) -> None:
    """Raise `ConfigError` where a gradient could never arrive, or where nothing would train to the end."""
    if any(p.is_meta for p in adapter.parameters):
        raise ConfigError("low_cpu_mem_usage", True, "is for adapters that are loaded: leave it out of get_peft_model")
    if freeze is not None and freeze.freezes_all and adapter.layers and not _trains_to_the_end(adapter):
        raise ConfigError(
            "freeze.method",
            freeze.method,
            "nothing would be left to train once all projections froze; use aflora, whose vectors train on, a "
            "rank method with start=svd, or train a head (modules_to_save)",
        )
    for name, layer in adapter.layers.items():
        zero = [p.numel() > 0 and not bool(p.detach().any()) for p in adapter.named(layer).values()]
        if sum(zero) > 1:
            raise ConfigError(
                "adapter.init",
                name,
                "two of A, e, B, b are all zero: no gradient can ever reach them; start at most one at zero",
            )


def _trains_to_the_end(adapter: AdapterTensors) -> bool:
    projections = {id(p) for p in adapter.projections().values()}
    return any(
        p.requires_grad and id(p) not in projections
        for name, p in adapter.model.named_parameters()
        if not name.endswith("trim_anchor")  # DDP's, and part of nothing
    )
