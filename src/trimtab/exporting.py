"""Hand back an ordinary LoRA adapter: `peft`, `padded` or `merged`.

`peft` puts every scale into B, so that ``lora_alpha == r`` and ``alpha_pattern == rank_pattern`` and every
module's scale is exactly 1, whatever the engine rounds. Modules without ranks are left out.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .errors import ExportError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel

FORMATS = ("peft", "merged", "padded")
# Any LoRA parameter beyond A and B that makes the update something else than B·A.
_NOT_LOW_RANK = ("lora_magnitude_vector", "lora_embedding_A")


def export(
    model: torch.nn.Module, out: str | os.PathLike[str], format: str = "peft", adapter_name: str | None = None
) -> Path:
    """Write a trained adapter in a form that needs no Trimtab.

    Args:
        model: a `PeftModel` (possibly wrapped), at any point of training.
        out: folder to write.
        format: ``"peft"`` (ranks per module), ``"padded"`` (one rank for all, zero rows added, for engines
            that know no patterns), or ``"merged"`` (a stand-alone model).
        adapter_name: PEFT's name of the adapter; the active one by default.
    Returns:
        The folder.
    Raises:
        ExportError: the method cannot take that form; the message says why.

    A start that changed the base weight (PiSSA and relatives) is exported as rank 2r against the original
    base: ``A' = [A; A0]``, ``B' = [B, -B0]``.
    """
    from .peft_host import peft_model_of

    if format not in FORMATS:
        raise ExportError(f"export.format={format!r}: one of {', '.join(FORMATS)}.{did_you_mean(format, FORMATS)}")
    peft_model = peft_model_of(model)
    active = peft_model.active_adapter
    name = adapter_name or (active if isinstance(active, str) else active[0])
    folder = Path(out)
    if reason := why_no_lora_form(peft_model, name):
        raise ExportError(f"export.format={format!r}: {reason}")
    if format == "merged":
        return _export_merged(peft_model, name, folder)
    pairs = lora_pairs(peft_model, name)
    if not pairs:
        raise ExportError(f"adapter {name!r}: every module is at rank 0; there is nothing to export")
    _write_adapter(peft_model, name, pairs, folder, is_padded=format == "padded")
    return folder


def why_no_lora_form(peft_model: PeftModel, adapter_name: str = "default") -> str | None:
    """The reason that no weight can hold this kind of adapter, in words; None for the kinds that fold."""
    config = peft_model.peft_config[adapter_name]
    if config.is_adaption_prompt:
        return ("an adaption prompt has no LoRA or merged form: each token mixes the prompt's values by a softmax of "
                "its own query. model.save_pretrained keeps the adapter")
    from .adapters.bottleneck import BottleneckConfig, why_not_lora

    return why_not_lora(config) if isinstance(config, BottleneckConfig) else None


def lora_pairs(peft_model: PeftModel, adapter_name: str = "default") -> Mapping[str, tuple[Tensor, Tensor]]:
    """Module name in the base model -> ``(A (r, in), B (out, r))`` with every scale inside B; rank 0 left out.

    Raises:
        ExportError: the adapter has no LoRA form.
    """
    from .peft_host import TrimLayer, adapter_layers

    kind = str(getattr(peft_model.peft_config[adapter_name].peft_type, "value", "?"))
    if kind == "VERA":
        from .adapters.vera import vera_to_lora

        return vera_to_lora(peft_model, adapter_name)
    if kind not in ("LORA",):
        reason = why_no_lora_form(peft_model, adapter_name) or f"{kind} has no LoRA form"
        raise ExportError(f"adapter {adapter_name!r}: {reason}")
    pairs = {}
    for name, layer in adapter_layers(peft_model, adapter_name):
        for attribute in _NOT_LOW_RANK:
            if adapter_name in getattr(layer, attribute, {}):
                raise ExportError(
                    f"{name}: {attribute} makes the update more than B·A; use format 'merged', or "
                    "model.save_pretrained, which keeps it in PEFT's own form"
                )
        if layer.lora_bias.get(adapter_name):
            raise ExportError(f"{name}: lora_bias=True cannot be put into a LoRA without a bias; use format 'merged'")
        if isinstance(layer, TrimLayer) and layer.is_adaptive(adapter_name):
            A, B = layer.folded(adapter_name)
        else:
            A, B = (cast(Tensor, part[adapter_name].weight).detach() for part in (layer.lora_A, layer.lora_B))
        B = B * layer.scaling[adapter_name]
        start = getattr(layer, "initial_factors", {}).get(adapter_name)
        if start is not None:
            A0, B0 = (t.to(A.device, A.dtype) for t in start)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0 * layer.scaling[adapter_name]], dim=1)
        if A.shape[0]:
            pairs[name] = A.cpu().contiguous(), B.cpu().contiguous()
    return pairs


def _write_adapter(
    peft_model: PeftModel, name: str, pairs: Mapping[str, tuple[Tensor, Tensor]], folder: Path, is_padded: bool
) -> None:
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    from .peft_host import portable_fields

    widest = max(A.shape[0] for A, _ in pairs.values())
    if is_padded:
        pairs = {n: _pad(A, B, widest) for n, (A, B) in pairs.items()}
    prefix = peft_model.base_model.prefix
    tensors = {
        k: v.contiguous()
        for k, v in get_peft_model_state_dict(peft_model, adapter_name=name).items()
        if prefix not in k
    }  # saved heads and poolers
    for module, (A, B) in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = A
        tensors[f"base_model.model.{module}.lora_B.weight"] = B
    source = peft_model.peft_config[name]
    config = LoraConfig(
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path
        or getattr(peft_model.get_base_model(), "name_or_path", None)
        or None,
        revision=getattr(source, "revision", None),
        modules_to_save=getattr(source, "modules_to_save", None),
        fan_in_fan_out=bool(getattr(source, "fan_in_fan_out", False)),
        bias=getattr(source, "bias", "none"),
        lora_dropout=float(getattr(source, "lora_dropout", 0.0)),
        inference_mode=True,
        **_stock(portable_fields({n: (A.shape[0], 1.0) for n, (A, _) in pairs.items()})),
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "adapter_model.safetensors"), metadata={"format": "pt"})
    config.save_pretrained(str(folder))
    if source.task_type is None:  # as PEFT does, so that AutoPeftModel finds the class
        base = type(peft_model.get_base_model())
        path = folder / "adapter_config.json"
        content = json.loads(path.read_text())
        content["auto_mapping"] = {"base_model_class": base.__name__, "parent_library": base.__module__}
        path.write_text(json.dumps(content, indent=2, sort_keys=True))


def _stock(fields: dict[str, Any]) -> dict[str, Any]:
    fields["lora_alpha"] = fields["r"]
    fields["alpha_pattern"] = dict(fields["rank_pattern"])
    return fields


def _pad(A: Tensor, B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    missing = r - A.shape[0]
    return (
        torch.cat([A, A.new_zeros(missing, A.shape[1])]).contiguous(),
        torch.cat([B, B.new_zeros(B.shape[0], missing)], dim=1).contiguous(),
    )


def _export_merged(peft_model: PeftModel, name: str, folder: Path) -> Path:
    base = peft_model.get_base_model()
    if getattr(base, "is_quantized", False) or getattr(base, "is_loaded_in_8bit", False):
        raise ExportError(
            "export.format='merged': merging into quantised weights loses digits; load the base in "
            "bf16 or f32, put the adapter on it with PeftModel.from_pretrained, and merge there"
        )
    if not hasattr(peft_model.base_model, "merge_and_unload"):
        kind = str(getattr(peft_model.peft_config[name].peft_type, "value", "?"))
        raise ExportError(f"export.format='merged': {kind} changes the function in a way that no weight holds")
    if any(layer.merged for layer in peft_model.modules() if hasattr(layer, "merged")):
        raise ExportError("export.format='merged': the adapter is merged already; call unmerge_adapter() first")
    merged = cast(Any, copy.deepcopy(peft_model)).merge_and_unload(adapter_names=[name], safe_merge=True)
    merged.save_pretrained(str(folder))
    return folder
