"""Several processes: what is frozen may be sharded, what trains stays whole on every process.

Adapters change shape, so they stay outside of whatever reduces or shards parameters (DDP, FSDP2); `average` brings
their few gradients together in one flat all-reduce. Engines that cannot leave them alone are refused here.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import Any, cast

import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ConfigError, DisagreementError, ModelError
from ..host.adapted import adapter_parameters, peft_model_of
from ..host.layers import REPLICAS
from ..host.sharding import is_dtensor, is_sharded

_FSDP = "fsdp_config"
NO_DEEPSPEED = (
    "DeepSpeed takes gradients away before they can be read, and gives a tensor that was cut its old shape back; with "
    "an adapter ZeRO-1 and 2 shard only what trains, which is little, so use DDP; in place of ZeRO-3 use FSDP2"
)
ON_A_CPU = "accelerate shards on accelerators only, and builds DDP on a CPU without a word; leave fsdp out there"


def whole_parameters(model: nn.Module, adapter_name: str = "default") -> set[nn.Parameter]:
    """What must stay whole on every process when the base is sharded: the adapter, frozen or not, and all that trains.

    For a bare loop with FSDP2, before the optimizer and the `Controller` are made::

        whole = trimtab.whole_parameters(model)
        for block in blocks:
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)

    Args:
        model: a `PeftModel`, as `get_peft_model` gives it.
        adapter_name: PEFT's name of the adapter.
    Raises:
        ModelError: the model holds no PEFT adapter.
    """
    return {*adapter_parameters(model, adapter_name), *(p for p in model.parameters() if p.requires_grad)}


def is_launched() -> bool:
    """Whether there is a process group, be it of one process: then something may wrap the model."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def is_distributed() -> bool:
    """Whether there are other processes."""
    return is_launched() and torch.distributed.get_world_size() > 1


def of_process_0(value: Any) -> Any:
    """What process 0 holds, on every process."""
    if not is_distributed():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def broadcast(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the values of process 0, wherever they lie: NCCL carries nothing that is on a CPU, as a model
    is before accelerate prepares it."""
    carried = [part.partition(":")[0] for part in torch.distributed.get_backend_config().split(",")]
    for p in parameters:
        tensor = p.data if p.device.type in carried else p.data.to(carried[0])
        torch.distributed.broadcast(tensor, src=0)
        p.data.copy_(tensor)


# -- before the model is wrapped ------------------------------------------------------------------------------


def keep_whole(model: nn.Module, adapter_name: str) -> None:
    """Have DDP, or accelerate's FSDP2 where it is going to shard, leave alone what changes shape."""
    plugin = accelerates_fsdp()
    if is_sharded(model):
        return
    if plugin is None:
        return leave_out_of_ddp(model, adapter_parameters(model, adapter_name))
    whole = whole_parameters(model, adapter_name)
    for p in whole:  # FSDP does not move what it ignores
        p.data = p.data.to(AcceleratorState().device)
    others = [module for module in plugin.ignored_modules or () if not isinstance(module, _Whole)]
    plugin.ignored_modules = [*others, _Whole(p for p in model.parameters() if p in whole)]


class _Whole(nn.ParameterList):
    """What accelerate's FSDP2 is told to leave alone, apart from what the user tells it."""


def accelerates_fsdp() -> Any:
    """accelerate's plugin if it is going to shard by FSDP2, else None.

    Raises:
        ConfigError: accelerate is set to an engine, or to a way of sharding, that cannot leave adapters alone.
    """
    state = AcceleratorState._shared_state
    kind = getattr(state.get("distributed_type"), "value", "")
    if kind == "DEEPSPEED" or state.get("deepspeed_plugins") or _is_asked_for("DEEPSPEED"):
        raise ConfigError("deepspeed", "accelerate's plugin" if state else "from the environment", NO_DEEPSPEED)
    if kind == "MEGATRON_LM":
        raise ConfigError("megatron_lm", True, "it shards the adapters, too; use DDP or FSDP2")
    plugin = state.get("fsdp_plugin")
    if plugin is None:
        if _is_asked_for("FSDP") and kind == "MULTI_CPU":
            raise ConfigError("fsdp", True, ON_A_CPU)
        return None
    if plugin.fsdp_version != 2:
        raise ConfigError(f"{_FSDP}.version", plugin.fsdp_version, "FSDP1 flattens adapters into its shards; use 2")
    if plugin.cpu_ram_efficient_loading:
        raise ConfigError(f"{_FSDP}.cpu_ram_efficient_loading", True, "it shards the adapters, too; set it to false")
    if isinstance(plugin.ignored_modules, str):
        cure = "a pattern cannot be joined with the adapters that stay whole; give a list of modules, or leave it out"
        raise ConfigError(f"{_FSDP}.ignored_modules", plugin.ignored_modules, cure)
    for package, least in (("torch", (2, 7)), ("accelerate", (1, 11))):
        if tuple(int(part) for part in version(package).split(".")[:2]) < least:
            cure = f"needs {package} {least[0]}.{least[1]} or later, where FSDP2 can leave adapters whole; or use DDP"
            raise ConfigError("fsdp", f"{package} {version(package)}", cure)
    return plugin


def _is_asked_for(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "").lower() in ("1", "true")


def leave_out_of_ddp(model: nn.Module, ours: Iterable[nn.Parameter]) -> None:
    """Name parameters in what DDP reads on the module that it is going to wrap."""
    ids, peft_model = {id(p) for p in ours}, peft_model_of(model)
    for module in {id(m): m for m in (model, peft_model)}.values():
        names = [n for n, p in module.named_parameters() if id(p) in ids]
        module._ddp_params_and_buffers_to_ignore = cast(Any, names)
    if not any(p.requires_grad and id(p) not in ids for p in model.parameters()):
        # DDP refuses a module in which every trainable parameter is ignored: give it one that nothing uses.
        device = next(peft_model.parameters()).device
        peft_model.register_parameter("trim_anchor", nn.Parameter(torch.zeros(1, device=device)))
        peft_model.register_state_dict_post_hook(_leave_anchor_out)
        peft_model.register_load_state_dict_pre_hook(_expect_no_anchor)


def _leave_anchor_out(module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """What is saved in mid-run goes into a model that has none."""
    state_dict.pop(f"{prefix}trim_anchor", None)


def _expect_no_anchor(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: Any) -> None:
    if (anchor := module._parameters.get("trim_anchor")) is not None:
        state_dict[f"{prefix}trim_anchor"] = anchor.data


def give_back_to_ddp(model: nn.Module) -> None:
    """What is left is a plain LoRA, whose gradients DDP has to average if it is trained on."""
    for module in (model, peft_model_of(model)):
        if "_ddp_params_and_buffers_to_ignore" in module.__dict__:
            del module._ddp_params_and_buffers_to_ignore
        if "trim_anchor" in module._parameters:
            del module.trim_anchor


# -- what cannot work -----------------------------------------------------------------------------------------


def refuse_engines(model: nn.Module, ours: Iterable[nn.Parameter], *optimizers: Any) -> None:
    """Raise `ModelError` where something holds the adapters that cannot follow a cut or a freeze."""
    for module in model.modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if "DeepSpeedEngine" in names:
            raise ModelError(f"model: it is in a DeepSpeedEngine; {NO_DEEPSPEED}")
        if isinstance(module, nn.DataParallel):
            raise ModelError(f"model: it is in {REPLICAS}")
        if "FullyShardedDataParallel" in names:
            raise ModelError("model: it is in FSDP1, which flattens adapters into its shards; use FSDP2 (fully_shard)")
    if any(type(one).__module__.split(".")[0] == "deepspeed" for one in optimizers) or any(
        hasattr(p, "ds_id") for p in model.parameters()
    ):
        raise ModelError(f"model: its parameters are DeepSpeed's; {NO_DEEPSPEED}")
    ours = list(ours)
    if any(is_dtensor(p) for p in ours):
        if is_sharded(model):
            raise ModelError(
                "model: FSDP2 shards the adapters with the base, and a shard cannot be cut: make the Controller before "
                "accelerator.prepare (with a Trainer: pass TrimCallback in callbacks=[...]); with fully_shard pass "
                "ignored_params=trimtab.whole_parameters(model)"
            )
        raise ModelError(
            "model: its adapters are DTensors, as tensor parallelism makes them, and a shard cannot be cut; shard the "
            "base by FSDP2 instead, or drop rank and freeze"
        )
    refuse_if_in_ddp(ours)


def refuse_if_in_ddp(ours: Iterable[nn.Parameter]) -> None:
    """Raise `ModelError` where a DDP averages adapters, whichever module it wraps: around the user's own, with the
    `PeftModel` within, it reads nothing of what it is to leave alone, and no module knows who wraps it."""
    if not is_launched():
        return
    ids = {id(p) for p in ours}
    held = [
        name
        for ddp in [one for one in gc.get_objects() if issubclass(type(one), DistributedDataParallel)]
        if "module" in ddp._modules  # else it refused its module when it was made
        for name, p in ddp.module.named_parameters()
        if id(p) in ids and name not in ddp.parameters_to_ignore
    ]
    if held:
        raise ModelError(
            f"{held[0]!r} and {len(held) - 1} more adapter tensors are in DistributedDataParallel, which cannot follow "
            "a cut or a freeze: make the Controller before DistributedDataParallel or accelerator.prepare wraps the "
            "model, of the very module that is wrapped "
            "(with a Trainer: pass TrimCallback in callbacks=[...])"
        )


def refuse_sharded_heads(model: nn.Module) -> None:
    """Raise `ModelError` where PEFT copied a head from a base that was sharded: FSDP2 does not see the copy."""
    if heads := [name for name, p in model.named_parameters() if p.requires_grad and is_dtensor(p)]:
        raise ModelError(
            f"{heads[0]!r} trains and is a shard, whose gradients nobody averages; put a whole copy of this module "
            "into the base before get_peft_model (the page on a sharded base shows how)"
        )


def refuse_other_sites(sites: dict[str, tuple[int, ...]]) -> None:
    """Raise `ModelError`, on every process, where another one holds other sites (the stages of a pipeline)."""
    theirs: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(theirs, sites)
    for process, other in enumerate(theirs):
        if other != theirs[0]:
            differing = sorted(key for key in {*other, *theirs[0]} if other.get(key) != theirs[0].get(key))
            raise ModelError(
                f"model: process {process} holds other adapters than process 0 ({len(differing)} differ, first "
                f"{differing[0]!r}), as under pipeline parallelism or where each chose its own layers; give every "
                "process the same adapter (DDP or FSDP2, and one `where` for all)"
            )


# -- gradients ------------------------------------------------------------------------------------------------


def average(parameters: Iterable[nn.Parameter], bits: list[int] | None = None) -> bool:
    """Replace gradients by their mean over processes, in one flat all-reduce a dtype.

    What no process used keeps no gradient, as with one process: the optimizer leaves it alone.

    Args:
        parameters: the same ones on every process, in the same order.
        bits: zeros and ones that ought to be the same on every process.
    Returns:
        Whether they are; True as well where they could not be compared.
    """
    world, bits, agreed = torch.distributed.get_world_size(), bits or [], True
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
    for p in parameters:
        by_dtype.setdefault(p.dtype, []).append(p)
    for dtype, group in by_dtype.items():
        if 2 / torch.finfo(dtype).eps < world:
            bits = []  # bfloat16 cannot count that many processes
        has_gradient = [p.grad is not None for p in group]
        extra = torch.tensor([*has_gradient, *bits], dtype=dtype, device=group[0].device)
        pieces = [(p.grad if p.grad is not None else torch.zeros_like(p)).reshape(-1) for p in group]
        flat = torch.cat([*pieces, extra])
        torch.distributed.all_reduce(flat)
        *pieces, counts, sums = flat.split([*(p.numel() for p in group), len(group), len(bits)])
        agreed = agreed and not (bits and bool(((sums != 0) & (sums != world)).any()))
        bits = []
        for i, (p, piece) in enumerate(zip(group, pieces)):
            if has_gradient[i] or bool(counts[i]):
                p.grad = (piece / world).view_as(p)
    return agreed


class AverageAfterBackward:
    """At the end of every backward pass that reaches one of these parameters, average all that then train.

    For adapters that are finished and train on: whatever wrapped the model was told to leave them alone. Where DDP was
    made anew, they are the same already, and stay so.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self._last = -1
        for p in self.parameters:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(self._reached)

    def _reached(self, parameter: Tensor) -> None:
        this = torch._C._current_graph_task_id()  # a pass that failed in the middle must not stop the next one
        if this != self._last and is_distributed():
            self._last = this
            torch.autograd.Variable._execution_engine.queue_callback(self._average)

    def _average(self) -> None:
        average(p for p in self.parameters if p.requires_grad and p.numel())


# -- decisions ------------------------------------------------------------------------------------------------


def agree(what: str, step: int, decision: Mapping[str, Tensor] | list[str]) -> None:
    """Every process compares its decision with the others'; all stop when one differs.

    Args:
        decision: site -> (r,) bool, what stays; or the names that freeze.
    Raises:
        DisagreementError: on every process, with what differs.
    """
    if not is_distributed():
        return
    mine = _plain(decision)
    digests: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(digests, _digest(mine))
    if len(set(digests)) == 1:
        return
    plans: list[Any] = [None] * len(digests)
    torch.distributed.all_gather_object(plans, mine)
    differing = sorted(key for key in set().union(*plans) if len({plan.get(key, "nothing") for plan in plans}) > 1)
    shown = "; ".join(
        f"process {i}: " + ", ".join(f"{key} {plan.get(key, 'nothing')}" for key in differing[:5])
        for i, plan in enumerate(plans)
    )
    raise DisagreementError(f"{what} decisions differ at step {step} in {len(differing)} places: {shown}")


def _plain(decision: Mapping[str, Tensor] | list[str]) -> dict[str, str]:
    """A decision as text: ``{site: "keeps 0110"}`` or ``{projection: "freezes"}``."""
    if isinstance(decision, Mapping):
        return {name: "keeps " + "".join("01"[int(k)] for k in keep.tolist()) for name, keep in decision.items()}
    return dict.fromkeys(decision, "freezes")


def _digest(plain: dict[str, str]) -> str:
    return hashlib.sha256(repr(sorted(plain.items())).encode()).hexdigest()


def decision_bits(decision: Mapping[str, Tensor]) -> list[int]:
    """32 bits of its hash: their sum over equal processes is 0 or the number of processes, in any dtype."""
    number = int(_digest(_plain(decision))[:8], 16)
    return [number >> i & 1 for i in range(32)]
