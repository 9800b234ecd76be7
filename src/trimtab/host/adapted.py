"""A model that holds a PEFT adapter: which of its modules, parameters, ranks and names belong to the adapter."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.adaption_prompt.layer import _BaseAdaptedAttention as PromptedAttention
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import MultiheadAttention as AttentionLora  # noqa: F401  for exporting
from peft.tuners.lora.layer import ParamWrapper as ParameterLora  # noqa: F401
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, get_pattern_key
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ..errors import ModelError
from ..plans import Site

# Where a tuner's own word says more than its ending (``lora_A``, ``lora_embedding_B`` …).
_ROLES = {"bottleneck_down": "A", "bottleneck_up": "B", "bottleneck_norm": "other"}


def callers() -> Iterator[FrameType]:
    """Who is calling, nearest first. Only for what no event and no argument tells."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


KNOWN_BY_NAME = {
    "add_weighted_adapter": ("self", "adapters", "adapter_name"),
    "hotswap_adapter_from_state_dict": ("adapter_name",),
    "inject_adapter": ("model",),
    "reduce_intruder_dimension": ("old_adapter_name",),
    "set_peft_model_state_dict": ("adapter_name",),
}
"""Functions of PEFT by whose name a layer or a config knows who is calling -> their variables that are read."""


def calls_of_peft() -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and variables of those functions of PEFT that are calling, nearest first."""
    for frame in callers():
        name = frame.f_code.co_name
        if name in KNOWN_BY_NAME and str(frame.f_globals.get("__name__")).startswith("peft."):
            yield name, frame.f_locals


def peft_model_of(model: nn.Module) -> PeftModel:
    """The `PeftModel` inside whatever holds it: DDP, accelerate, compile, a sentence encoder, a module of the user's.

    Raises:
        ModelError: there is none, or more than one.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"model: {type(model).__name__} is no torch module; hand over the model in it, or train that one with a "
            "Trainer which shows its callbacks the model itself (in place of SetFit's, sentence-transformers' on "
            "model.model_body)"
        )
    found = [m for m in model.modules() if isinstance(m, PeftModel)]
    if not found:
        if any(is_adapted(module) for module in model.modules()):
            raise ModelError(
                f"model: {type(model).__name__} holds an adapter without its PeftModel (add_adapter, "
                "inject_adapter_in_model); put it on with peft.get_peft_model, in a SentenceTransformer on the model "
                "inside: encoder[0].model = peft.get_peft_model(encoder[0].model, config)"
            )
        raise ModelError(f"model: {type(model).__name__} holds no PEFT adapter; call peft.get_peft_model first")
    if any(inner in found[1:] for inner in found[0].modules()):
        raise ModelError(
            "model: a PeftModel was given to peft.get_peft_model once more, as by a notebook's cell that is run twice; "
            "make the base model anew (or model.unload() it) before, and add a second adapter by model.add_adapter"
        )
    if len(found) > 1:
        raise ModelError(
            f"model: {type(model).__name__} holds {len(found)} PEFT models; hand over the one that is meant, or put "
            "one adapter on the module that holds both"
        )
    return found[0]


def running_averages(model: nn.Module) -> list[str]:
    """Names of the base's modules that keep averages of what they see in training, which no adapter holds."""
    base = peft_model_of(model).get_base_model()
    kept = {m for wrapper in base.modules() if isinstance(wrapper, ModulesToSaveWrapper) for m in wrapper.modules()}
    norms = ((name, m) for name, m in base.named_modules() if isinstance(m, _NormBase) and m not in kept)
    return [name for name, m in norms if m.track_running_stats]


def adapter_config(model: nn.Module, adapter_name: str = "default") -> LoraConfig:
    return cast(LoraConfig, peft_model_of(model).peft_config[adapter_name])


def adapter_layers(model: nn.Module, adapter_name: str = "default") -> Iterator[tuple[str, LoraLayer]]:
    """Every LoRA layer that holds the adapter, adaptive or not, with its name in the base model."""
    for name, module in peft_model_of(model).get_base_model().named_modules():
        if isinstance(module, LoraLayer) and (adapter_name in module.lora_A or adapter_name in module.lora_embedding_A):
            yield _own_name(name), module


def entrances(model: nn.Module, adapter_name: str = "default", is_compiled: bool = False) -> list[nn.Module]:
    """Modules by which a forward pass may come to an adapter: the `PeftModel`, and all in it that hold adapted layers.

    Libraries call a method of the model's own, or the encoder in it, or ``forward`` by name, of which the `PeftModel`'s
    hooks never learn. Repeated blocks are left out: whoever runs one came in by what holds them.

    Args:
        is_compiled: somebody compiles the model; hooks further in would cut its graph in pieces. Looked for here, too.
    """
    outer = peft_model_of(model)
    base = outer.get_base_model()
    if is_compiled or any(m._compiled_call_impl is not None or hasattr(m, "_orig_mod") for m in model.modules()):
        return [outer]
    found: dict[int, nn.Module] = {id(m): m for m in (outer, outer.base_model, base)}
    for name, _ in adapter_layers(model, adapter_name):
        module = base
        for part in name.split(".")[:-1]:
            inner = getattr(module, "_checkpoint_wrapped_module", module)
            if isinstance(inner, (nn.ModuleList, nn.ModuleDict, nn.Sequential)):
                break
            found[id(module)] = module
            module = inner.get_submodule(part)
    return list(found.values())


def _own_name(path: str) -> str:
    """A module's name as it is without the wrappers of torch's activation checkpointing (which FSDP sets, too)."""
    return path.replace("_checkpoint_wrapped_module.", "")


_INPUT_HOOKS = ("make_inputs_require_grads", "make_inputs_require_grad")  # transformers' name for it, and PEFT's


def keep_inputs_out_of_the_graph(model: nn.Module) -> None:
    """Undo what transformers, PEFT and TRL do to embeddings for checkpointing, where checkpointing does not need it.

    They make the embeddings' output want a gradient, without which reentrant checkpointing finds no adapter. Every
    block below the lowest adapter is then run a second time, and gone through backwards, for a gradient that nobody
    reads. Non-reentrant checkpointing has no need of that. Where any is reentrant, nothing changes.
    """
    kinds = [vars(m).get("_gradient_checkpointing_func") for m in model.modules()]
    kinds = [getattr(kind, "keywords", {}).get("use_reentrant") for kind in kinds if kind is not None]
    if not kinds or any(kind is not False for kind in kinds):
        return
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") in _INPUT_HOOKS:
                del module._forward_hooks[key]


def is_adapted(module: nn.Module) -> bool:
    """Whether PEFT has put a layer of a tuner, of any type, in this module's place."""
    return isinstance(module, BaseTunerLayer)


def adapted_modules(model: nn.Module) -> list[Any]:
    """Every layer that a tuner of PEFT, of any type, has put in place of a module."""
    return [module for module in model.modules() if is_adapted(module)]


def adapter_parameters(model: nn.Module, adapter_name: str = "default") -> list[nn.Parameter]:
    """Every parameter that belongs to the adapter, of any PEFT tuner; saved modules (heads) are not among them."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            for attribute in module.adapter_layer_names:
                holder = getattr(module, attribute, None)
                if holder is None or adapter_name not in getattr(holder, "keys", list)():
                    continue
                item = holder[adapter_name]
                for p in item.parameters() if isinstance(item, nn.Module) else [item]:
                    if isinstance(p, nn.Parameter):
                        found[id(p)] = p
        elif isinstance(module, PromptedAttention):  # no layer of a tuner, and without adapter names
            found.update((id(p), p) for p in module.parameters(recurse=False))
    return list(found.values())


def roles(model: nn.Module) -> dict[str, str]:
    """Name of every parameter that trains -> its role, in the model's order. Found by type, of any PEFT adapter."""
    found: dict[int, str] = {}
    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            for name, p in cast("nn.Module", module).named_parameters():
                holder = name.partition(".")[0]
                if holder != "base_layer":
                    found.setdefault(id(p), _role_of_holder(holder))
        elif isinstance(module, ModulesToSaveWrapper):
            found.update((id(p), "head") for p in module.modules_to_save.parameters())
        else:
            own = dict(module.named_parameters(recurse=False))
            if isinstance(module, PromptedAttention):
                found.update((id(p), "vectors") for p in own.values())
            if isinstance(module, PeftModel) and hasattr(module, "prompt_encoder"):
                found.update((id(p), "vectors") for p in module.prompt_encoder.parameters())
            # Where only biases train (PEFT's bias="all", which goes by that word), or DDP's anchor, is no head.
            trains = [name for name, p in own.items() if p.requires_grad and name != "trim_anchor"]
            its = "head" if any("bias" not in f"{path}.{name}" for name in trains) else "other"
            for p in own.values():
                found.setdefault(id(p), its)
    return {name: found[id(p)] for name, p in model.named_parameters() if p.requires_grad}


def _role_of_holder(holder: str) -> str:
    words = holder.split("_")
    return _ROLES.get(holder) or next((role for role in ("A", "B") if role in words), "vectors")


def adapter_ranks(model: PeftModel) -> dict[str, int]:
    """Site name -> rank of its adapter now; sites without one are left out."""
    ranks = {}
    for name, module in model.get_base_model().named_modules():
        r = getattr(module, "r", None)
        if isinstance(module, BaseTunerLayer) and isinstance(r, dict):
            ranks[_own_name(name)] = int(next((r[a] for a in model.active_adapters if a in r), 0))
    return ranks


def site_rank(site: Site, config: PeftConfig) -> int:
    """The rank that a config gives a site, its ``rank_pattern`` included."""
    pattern = getattr(config, "rank_pattern", None)
    if pattern:
        return pattern.get(get_pattern_key(pattern.keys(), site.name), config.r)  # type: ignore[attr-defined]
    return config.r  # type: ignore[attr-defined]
