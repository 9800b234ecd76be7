"""Adapters that change shape stay outside DDP's reducer; the controller averages their few gradients itself."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import ModelError
from ..host.adapted import peft_model_of


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


def give_back_to_ddp(model: nn.Module) -> None:
    """What is left is a plain LoRA, whose gradients DDP has to average if it is trained on."""
    for module in (model, peft_model_of(model)):
        if "_ddp_params_and_buffers_to_ignore" in module.__dict__:
            del module._ddp_params_and_buffers_to_ignore
        if "trim_anchor" in module._parameters:
            del module.trim_anchor


def refuse_if_in_ddp(ddp: nn.Module | None, ours: Iterable[nn.Parameter]) -> None:
    """Raise `ModelError` where DDP's reducer holds parameters whose shapes will change."""
    if not isinstance(ddp, DistributedDataParallel):
        return
    ids = {id(p) for p in ours}
    held = [n for n, p in ddp.module.named_parameters() if id(p) in ids and n not in ddp.parameters_to_ignore]
    if held:
        raise ModelError(
            f"{held[0]!r} and {len(held) - 1} more adapter tensors are in DistributedDataParallel, which cannot follow "
            "a cut or a freeze: make the Controller before DistributedDataParallel or accelerator.prepare wraps the "
            "model (with a Trainer: pass TrimCallback in callbacks=[...])"
        )
