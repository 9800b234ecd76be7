"""LLaMA-Adapter ("adaption prompt") as PEFT trains it: what it needs of a model, and what it costs.

Zhang et al., arXiv 2303.16199. In each of the last L layers K learned vectors are attended to beside the words,
gated from zero. The layers are PEFT's own, which differ from the authors': one gate for all heads of a layer and
no tanh on it, so that neither reads the other's checkpoints.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..host.sites import base_of, find_stacks, locate
from ..plans import Site


def model_types() -> dict[str, Any]:
    """The ``model_type``s that PEFT puts prompts into, with where."""
    from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG

    return TRANSFORMERS_MODEL_CONFIG


def check(model: nn.Module, config: Any, task_type: str | None) -> None:
    """Raise `ConfigError` where PEFT could not place the prompts, or would lose a part of what is trained."""
    kind = getattr(getattr(base_of(model), "config", None), "model_type", type(model).__name__)
    if kind not in model_types():
        known = ", ".join(model_types())
        raise ConfigError("adapter.type", "adaption_prompt", f"PEFT has it for {known}; this model is a {kind}")
    _refuse_head_widths(base_of(model).config)
    if task_type not in (None, "CAUSAL_LM"):
        cure = f"PEFT saves no head beside it, as {task_type} needs; use a task that writes text, or adapter.type=lora"
        raise ConfigError("adapter.type", "adaption_prompt", cure)
    sizes = {"adapter_len": "the number of prompt tokens", "adapter_layers": "the number of last layers"}
    for key, meaning in sizes.items():
        value = getattr(config, key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"adapter.{key}", value, f"{meaning}, at least 1")
    names = _attentions(model, config)
    _refuse_half_precision(base_of(model).get_submodule(names[-1]))
    there = len(names)
    if config.adapter_layers > there:
        raise ConfigError("adapter.adapter_layers", config.adapter_layers, f"at most {there}, the layers of this model")


def _refuse_head_widths(config: Any) -> None:
    """PEFT takes the groups of keys from the widths of the projections, which must then follow from the heads."""
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width = (getattr(config, "head_dim", None) or config.hidden_size // heads) * heads
    if width != config.hidden_size or heads % groups:
        raise ConfigError(
            "adapter.type",
            "adaption_prompt",
            f"PEFT's needs heads that fill the hidden width; this model has {heads} of "
            f"{width // heads} over {config.hidden_size}, in {groups} groups",
        )


def prompt_sites(model: nn.Module, config: Any) -> list[Site]:
    """The attention modules that get prompts; each trains ``adapter_len`` · width + 1 (the gate) numbers."""
    base = base_of(model)
    stacks = find_stacks(base)
    width = int(base.config.hidden_size)
    return [
        Site(name, width, width, *locate(name, stacks)) for name in _attentions(base, config)[-config.adapter_layers :]
    ]


def _refuse_half_precision(attention: nn.Module) -> None:
    """PEFT makes the prompts, of size 1, in the dtype of the projections: steps of 1e-3 are lost in it."""
    weight = next(p for p in attention.parameters() if p.dim() > 1)
    if weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type != "meta":
        raise ConfigError(
            "model.dtype",
            str(weight.dtype).removeprefix("torch."),
            "adaption_prompt trains in the "
            "model's dtype, where its small steps round away; use float32, or a quantised model",
        )


def _attentions(model: nn.Module, config: Any) -> list[str]:
    base = base_of(model)
    word = config.target_modules or model_types()[base.config.model_type].target_modules
    return [name for name, _ in base.named_modules() if name.endswith(f".{word}")]
