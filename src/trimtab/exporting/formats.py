"""Hand back an ordinary LoRA adapter: `peft`, `padded`, `gguf` or `merged`.

All but `merged` start from PEFT's own state dict and the whole source config, and account for every tensor. Every
scale is put into B, so that ``lora_alpha == r`` and ``alpha_pattern == rank_pattern`` and every module's scale is
exactly 1, whatever the engine rounds. Modules without ranks are left out. What a form cannot hold is refused.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..errors import ExportError, did_you_mean
from ..host.sharding import gathered, is_sharded
from .basemodel import name_base

if TYPE_CHECKING:
    from peft import PeftModel

FORMATS = ("peft", "merged", "padded", "gguf")
# What a LoRA layer may hold, as PEFT names it in a saved adapter. A-like tensors have the rank as their first
# dimension, B-like ones as their second.
_DOWN = ("lora_A.weight", "lora_embedding_A")
_UP = ("lora_B.weight", "lora_embedding_B")
_BESIDE = ("lora_B.bias", "lora_magnitude_vector", "lora_diag")
# Variants that compute with more than these tensors say.
_ONLY_PEFTS_OWN = ("use_bdlora", "arrow_config", "monteclora_config")
# How an adapter started; what it is now is in the tensors.
_STARTS: dict[str, Any] = {"loftq_config": {}, "eva_config": None, "corda_config": None, "lora_ga_config": None}


def export(
    model: torch.nn.Module, out: str | os.PathLike[str], format: str = "peft", adapter_name: str | None = None
) -> Path:
    """Write a trained adapter in a form that needs no Trimtab.

    Args:
        model: a `PeftModel` (possibly wrapped), at any point of training.
        out: folder to write.
        format: ``"peft"`` (ranks per module), ``"padded"`` (one rank for all, zero rows added, for engines
            that know no patterns), ``"gguf"`` (one file for llama.cpp), or ``"merged"`` (a stand-alone model).
        adapter_name: PEFT's name of the adapter; the active one by default, and for ``"merged"`` all active ones.
    Returns:
        The folder.
    Raises:
        ExportError: the method cannot take that form; the message says why.

    Where the base is sharded every process calls it, and process 0 writes; ``"merged"`` then gathers weight by weight.

    A start that changed the base weight (PiSSA and relatives) is exported as rank 2r against the original
    base: ``A' = [A; A0]``, ``B' = [B, -B0]``.
    """
    from ..host.adapted import adapted_modules, peft_model_of

    if format not in FORMATS:
        raise ExportError(f"export.format={format!r}: one of {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    peft_model = peft_model_of(model)
    active = peft_model.active_adapters if adapter_name is None else [adapter_name]
    for name in active:
        if name not in peft_model.peft_config:
            known = list(peft_model.peft_config)
            raise ExportError(f"adapter_name={name!r}: there is {', '.join(known)}.{did_you_mean(name, known)}")
    if len(active) > 1 and format != "merged":
        raise ExportError(
            f"export.format={format!r}: the adapters {', '.join(active)} are active together; name one "
            "as adapter_name, or use format 'merged', which holds them all"
        )
    name, folder = active[0], Path(out)
    if reason := why_no_lora_form(peft_model, name):
        raise ExportError(f"export.format={format!r}: {reason}")
    if any(layer.merged for layer in adapted_modules(peft_model)):
        raise ExportError(f"export.format={format!r}: the adapter is merged already; call unmerge_adapter() first")
    if format == "merged":
        return _export_merged(peft_model, active, folder)
    _write_adapter(peft_model, name, folder, format)
    return folder


def why_no_lora_form(peft_model: PeftModel, adapter_name: str = "default") -> str | None:
    """The reason that no weight can hold this kind of adapter, in words; None for the kinds that fold."""
    config = peft_model.peft_config[adapter_name]
    if config.is_adaption_prompt:
        return (
            "an adaption prompt has no LoRA or merged form: each token mixes the prompt's values by a softmax of "
            "its own query. model.save_pretrained keeps the adapter"
        )
    from ..adapters.bottleneck import BottleneckConfig, why_not_lora

    return why_not_lora(config) if isinstance(config, BottleneckConfig) else None


@dataclasses.dataclass
class Part:
    """One adapted module's or parameter's tensors, by their key in the saved adapter, with every scale inside."""

    name: str
    """As PEFT's patterns call it; "" where another part's pattern counts."""
    r: int
    tensors: dict[str, Tensor]
    experts: int = 1
    is_parameter: bool = False


def _write_adapter(peft_model: PeftModel, name: str, folder: Path, form: str) -> None:
    from peft import LoraConfig, get_peft_model_state_dict
    from safetensors.torch import save_file

    from ..host.config import portable_fields
    from .gguf import write_gguf

    source = peft_model.peft_config[name]
    kind = str(getattr(source.peft_type, "value", "?"))
    if kind not in ("LORA", "VERA"):
        raise ExportError(f"export.format={form!r}: adapter {name!r}: {kind} has no LoRA form")
    for key in _ONLY_PEFTS_OWN:
        if getattr(source, key, None):
            raise ExportError(
                f"export.format={form!r}: {key} makes the update more than a LoRA; "
                "model.save_pretrained keeps it in PEFT's own form"
            )
    tensors = {k: gathered(v) for k, v in get_peft_model_state_dict(peft_model, adapter_name=name).items()}
    if is_sharded(peft_model) and torch.distributed.get_rank():  # the adapter is whole on every process
        return
    _add_the_head_of_a_saved_embedding(peft_model.get_base_model(), tensors)
    parts = list((_vera_parts if kind == "VERA" else _lora_parts)(peft_model, name, tensors, form))
    if not any(part.r for part in parts):
        raise ExportError(f"adapter {name!r}: every module is at rank 0; there is nothing to export")
    if form == "padded":
        widest = max(part.r for part in parts)
        parts = [_padded(part, widest) for part in parts]
    if form == "gguf":
        return write_gguf(peft_model.get_base_model().config, parts, tensors, folder)
    for part in parts:
        tensors.update(part.tensors)
    for key, value in tensors.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"export.format={form!r}: {key} is no tensor; model.save_pretrained keeps it")
    names = [f.name for f in dataclasses.fields(LoraConfig) if hasattr(source, f.name)]
    stock = _stock(portable_fields({part.name: (part.r, 1.0) for part in parts if part.name}))
    experts = {part.name for part in parts if part.is_parameter}
    stock["target_modules"] = [n for n in stock["target_modules"] if n not in experts]
    config = LoraConfig(
        **{n: copy.deepcopy(getattr(source, n)) for n in names}
        | _STARTS
        | stock
        | dict(
            base_model_name_or_path=source.base_model_name_or_path
            or getattr(peft_model.get_base_model(), "name_or_path", None)
            or None,
            target_parameters=sorted(experts) or None,
            peft_type="LORA",
            inference_mode=True,
        )
    )
    tied = [f"base_model.model.{module}.weight" for module in getattr(source, "modules_to_tie", None) or ()]
    if not tied or any(key not in tensors for key in tied):  # then each module has what it holds
        config.ensure_weight_tying = False
    folder.mkdir(parents=True, exist_ok=True)
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    if source.task_type is None:  # as PEFT does, so that AutoPeftModel finds the class
        base = type(peft_model.get_base_model())
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text())
        content["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
        path.write_text(json.dumps(content, indent=2, sort_keys=True))
    name_base(folder)


def _add_the_head_of_a_saved_embedding(base: Any, tensors: dict[str, Any]) -> None:
    """PEFT saves an adapted embedding's base weights, which may have been resized, and forgets the head beside it."""
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    names = {id(module): f"base_model.model.{name}." for name, module in base.named_modules()}
    if head is None or id(head) not in names or not isinstance(getattr(head, "weight", None), nn.Parameter):
        return
    prefix = names[id(head)]
    saved = tensors.get(f"{names.get(id(base.get_input_embeddings()))}base_layer.weight")
    is_there = any(key.startswith(prefix) for key in tensors)
    if saved is not None and saved.data_ptr() != head.weight.data_ptr() and not is_there:
        tensors.update({prefix + key: value for key, value in head.state_dict().items()})


def _lora_parts(peft_model: PeftModel, name: str, tensors: dict[str, Tensor], form: str) -> Iterator[Part]:
    """Take what belongs to each LoRA layer out of ``tensors``, and put its scale into B."""
    from ..host.adapted import AttentionLora, ParameterLora, adapter_layers
    from ..host.layers import changes_base, without_start

    source: Any = peft_model.peft_config[name]
    inside: set[str] = set()  # the projection inside of an attention has its rank from there
    for module, layer in adapter_layers(peft_model, name):
        prefix = f"base_model.model.{module}."
        own = {k[len(prefix) :]: tensors.pop(k) for k in list(tensors) if k.startswith(f"{prefix}lora_")}
        is_embedding = name in layer.lora_embedding_A
        down, up = _DOWN[is_embedding], _UP[is_embedding]
        if layer.r[name] == 0:
            continue
        for key in sorted({down, up} - set(own) | set(own) - {down, up, *_BESIDE}):
            what = "is no tensor of a LoRA" if key in own else "is not in the state dict"
            raise ExportError(
                f"export.format={form!r}: {module}.{key} {what}; model.save_pretrained keeps PEFT's own form"
            )
        if name in getattr(layer, "initial_factors", {}):
            own[down], own[up] = without_start(cast(Any, layer), name, own[down], own[up])
        elif changes_base(source.init_lora_weights) and own[down].dim() == 2 and not is_embedding:
            raise ExportError(
                f"export.format={form!r}: {module}.{down}: init_lora_weights={source.init_lora_weights!r} changed the "
                "base's weights, and the start is not known here; use format 'merged'"
            )
        own[up] = own[up] * layer.scaling[name]
        if "lora_B.bias" in own:
            own["lora_B.bias"] = own["lora_B.bias"] * layer.scaling[name]
        wrapped = isinstance(layer, ParameterLora)
        site = module.replace(".base_layer", "") + f".{cast(Any, layer).parameter_name}" if wrapped else module
        if isinstance(layer, AttentionLora):
            inside.add(f"{module}.base_layer.out_proj")
        experts = int(getattr(layer, "num_experts", 1)) if wrapped else 1
        yield Part(
            "" if module in inside else site,
            own[down].shape[0] // experts,
            {prefix + key: value for key, value in own.items()},
            experts,
            wrapped,
        )


def _vera_parts(peft_model: PeftModel, name: str, tensors: dict[str, Tensor], form: str) -> Iterator[Part]:
    from ..adapters.vera import vera_to_lora

    for key in [k for k in tensors if ".vera_" in k]:
        del tensors[key]
    for module, (A, B) in vera_to_lora(peft_model, name).items():
        prefix = f"base_model.model.{module}."
        yield Part(module, A.shape[0], {f"{prefix}lora_A.weight": A, f"{prefix}lora_B.weight": B})


def _stock(fields: dict[str, Any]) -> dict[str, Any]:
    fields["lora_alpha"] = fields["r"]
    fields["alpha_pattern"] = dict(fields["rank_pattern"])
    return fields


def _padded(part: Part, r: int) -> Part:
    missing = r - part.r
    if not missing:
        return part
    padded = {}
    for key, value in part.tensors.items():
        if key.endswith("lora_diag"):  # KaSA: the rank says how much of the base is cut off
            raise ExportError(
                f"export.format='padded': {key} has rank {part.r}, and at rank {r} KaSA would change the "
                "base in another way; use format 'peft'"
            )
        if key.endswith(_DOWN):
            each = value.reshape(part.experts, part.r, *value.shape[1:])  # experts lie one after the other
            zeros = each.new_zeros(part.experts, missing, *value.shape[1:])
            value = torch.cat([each, zeros], dim=1).reshape(part.experts * r, *value.shape[1:])
        elif key.endswith(_UP):
            each = value.reshape(value.shape[0], part.r, part.experts, *value.shape[2:])  # experts alternate
            zeros = each.new_zeros(value.shape[0], missing, part.experts, *value.shape[2:])
            value = torch.cat([each, zeros], dim=1).reshape(value.shape[0], r * part.experts, *value.shape[2:])
        padded[key] = value
    return dataclasses.replace(part, r=r, tensors=padded)


# -- merged -----------------------------------------------------------------------------------------------


def _export_merged(peft_model: PeftModel, names: list[str], folder: Path) -> Path:
    base = peft_model.get_base_model()
    if getattr(base, "is_quantized", False) or getattr(base, "is_loaded_in_8bit", False):
        raise ExportError(
            "export.format='merged': merging into quantised weights loses digits; load the base in "
            "bf16 or f32, put the adapter on it with PeftModel.from_pretrained, and merge there"
        )
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kind = str(getattr(peft_model.peft_config[names[0]].peft_type, "value", "?"))
        raise ExportError(f"export.format='merged': {kind} changes the function in a way that no weight holds")
    if not hasattr(base, "save_pretrained"):
        raise ExportError(
            f"export.format='merged': {type(base).__name__} has no save_pretrained; use format 'peft', "
            "or merge_and_unload() and torch.save"
        )
    refuse_what_cannot_merge(peft_model, names, "export.format='merged'")
    if is_sharded(peft_model):
        return _merge_shards(peft_model, names, folder)
    for layer in peft_model.modules():
        if isinstance(spent := getattr(layer, "kwargs", None), dict):
            spent.pop("tied_adapter", None)  # views of the embedding's factors, of which torch makes no copy
    alone = copy.deepcopy(peft_model)
    if names != alone.active_adapters:
        cast(Any, alone.base_model).set_adapter(names[0])
    untie(alone)
    keeps_tie = _is_tied_elsewhere(alone.get_base_model())
    if keeps_tie:
        cast(Any, alone.get_base_model()).config.tie_word_embeddings = False  # so that PEFT says nothing of it
    try:
        merged = cast(Any, alone).merge_and_unload(safe_merge=True)  # each layer's own active adapters
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise ExportError(f"export.format='merged': adapter {', '.join(names)}: {error}; use format 'peft'") from error
    if keeps_tie:
        merged.config.tie_word_embeddings = True
    _check_ties(merged, dict(merged.named_parameters(remove_duplicate=False)))
    merged.save_pretrained(str(folder))
    return folder


@torch.no_grad()
def _merge_shards(peft_model: PeftModel, names: list[str], folder: Path) -> Path:
    """Merge a sharded model weight by weight: one at a time is whole on every process, and process 0 keeps it.

    Every process must call it; process 0 writes.
    """
    from ..host.adapted import adapter_layers

    base: Any = peft_model.get_base_model()
    layers: dict[str, Any] = {path: layer for name in names for path, layer in adapter_layers(peft_model, name)}
    for path, layer in layers.items():
        if any(n in layer.lora_variant or getattr(layer, "lora_bias", {}).get(n) for n in names):
            raise ExportError(
                f"export.format='merged': {path} is more than a LoRA, and the base is sharded; load base and adapter "
                "in one process, and merge there"
            )
    is_writer = torch.distributed.get_rank() == 0
    tensors: dict[str, Tensor] = {}
    for key, shard in base.state_dict().items():
        if ".lora_" in key or ".original_module." in key:
            continue
        path, is_base, rest = key.rpartition(".base_layer.")
        weight = gathered(shard)
        if is_writer:
            if is_base and rest == "weight" and path in layers:
                layer = layers[path]
                for name in (n for n in names if n in layer.scaling and layer.r[n]):
                    weight = weight + layer.get_delta_weight(name).to(weight)
            key = key.replace(".base_layer.", ".").replace(f".modules_to_save.{names[0]}.", ".")
            tensors[key] = weight.to("cpu", copy=True)
        del weight
    if is_writer:
        with torch.device("meta"):
            empty = type(base)(type(base.config).from_dict(base.config.to_dict()))
        _check_ties(base, tensors)
        empty.save_pretrained(str(folder), state_dict=tensors)
    return folder


def refuse_what_cannot_merge(peft_model: PeftModel, names: list[str], where: str) -> None:
    """Raise `ExportError` for adapters whose function no weight of the base can hold."""
    for name in names:
        config: Any = peft_model.peft_config[name]
        if getattr(config, "alora_invocation_tokens", None):
            raise ExportError(
                f"{where}: alora_invocation_tokens={config.alora_invocation_tokens}: the update acts on "
                "the tokens from these on, and no weight does that; use format 'peft'"
            )
    for path, layer in peft_model.get_base_model().named_modules():
        here = [n for n in names if n in getattr(layer, "lora_bias", {})]
        if any(layer.lora_bias[n] for n in here) and getattr(layer.get_base_layer(), "bias", None) is None:
            raise ExportError(f"{where}: {path}.lora_B.bias: the base has no bias to merge it into; use format 'peft'")
        if len(here) > 1 and any(n in layer.lora_variant for n in here):
            raise ExportError(
                f"{where}: {path}: {', '.join(here)} are active together, and with DoRA and the like one "
                "changes what the other is added to; export them one by one, by adapter_name"
            )


def refuse_a_changed_base(peft_model: PeftModel, name: str) -> None:
    """Raise `ExportError` for an adapter without which the base is not what it was."""
    from ..host.layers import changes_base

    config: Any = peft_model.peft_config[name]
    for key, value, is_so in (
        ("init_lora_weights", start := getattr(config, "init_lora_weights", True), changes_base(start)),
        ("layer_replication", layers := getattr(config, "layer_replication", None), bool(layers)),
        ("kasa_config", kasa := getattr(config, "kasa_config", None), kasa is not None),
        ("bias", bias := getattr(config, "bias", "none"), bias != "none"),
    ):
        if is_so:
            raise ExportError(
                f"adapter {name!r}: {key}={value!r} changed the base itself, so that there is no base to "
                "switch to; export it (format 'peft' undoes a start, 'merged' holds all) and load that"
            )


def untie(peft_model: PeftModel) -> None:
    """Give each adapted module weights of its own, where it shares them with another module: tied, or replicated."""
    from ..host.adapted import is_adapted

    model: Any = peft_model.get_base_model()
    uses = Counter(id(p) for m in model.modules() for p in m.parameters(recurse=False))
    replicated = any(getattr(c, "layer_replication", None) for c in peft_model.peft_config.values())
    for module in list(model.modules()):
        if replicated or is_adapted(module):
            module = module.get_base_layer() if is_adapted(module) else module
            for key, parameter in list(module.named_parameters(recurse=False)):
                if uses[id(parameter)] > 1:
                    setattr(module, key, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def _is_tied_elsewhere(base: Any) -> bool:
    """Whether the head is tied, and to another embedding than the input's (T5Gemma: its decoder's). PEFT takes it for
    untied after merging, and would write a model without a head."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return False
    try:
        head, inputs = base.get_output_embeddings(), base.get_input_embeddings()
    except (NotImplementedError, AttributeError):  # PEFT then says nothing either
        return False
    weight = getattr(head, "weight", None)
    if weight is None or inputs is None:
        return False
    own = inputs.parameters()  # of a saved one, the original's too
    uses = sum(p is weight for _, p in base.named_parameters(remove_duplicate=False))
    return all(p is not weight for p in own) and uses > 1


def _check_ties(merged: Any, parameters: dict[str, Any]) -> None:
    """What a reload ties together must be the same here, or one of the two would be lost."""
    config = type(merged.config).from_dict(merged.config.to_dict())
    with torch.device("meta"):
        twin = type(merged)(config)
    twin.tie_weights()
    first: dict[int, str] = {}
    for name, parameter in twin.named_parameters(remove_duplicate=False):
        other = first.setdefault(id(parameter), name)
        if name in parameters and other in parameters and not torch.equal(parameters[name], parameters[other]):
            raise ExportError(
                f"export.format='merged': {name} is tied to {other} in a {type(twin).__name__}, and "
                "only one of them is adapted; use format 'peft'"
            )
