"""Learning rates by role: multiples of the run's rate, as groups for any torch optimizer.

LoRA+ (arXiv 2402.12354) is one line: ``{"B": 16}``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast

from ..errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

ROLES = {
    "A": "projections that read the input: lora_A, a bottleneck's down",
    "B": "projections that write the output: lora_B, a bottleneck's up",
    "vectors": "whatever else an adapter holds: e, b, VeRA's two, DoRA's magnitudes, prompts and gates, tokens",
    "head": "modules_to_save, and other modules of the model that train",
}
# The order of groups is fixed, so that a checkpoint's optimizer state finds its place again. The last one trains at
# the run's own rate: biases of frozen modules (``bias="all"``), and norms that train inside adapted layers.
_ORDER = (*ROLES, "other")
# Where a tuner's own word says more than its ending (``lora_A``, ``lora_embedding_B`` …).
_HOLDERS = {"bottleneck_down": "A", "bottleneck_up": "B", "bottleneck_norm": "other"}


def parameter_groups(
    model: nn.Module, learning_rate: float, rates: Mapping[str, float] | None = None, *, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Every parameter that trains, in exactly one group of its role, with the rate of that role.

    For stock Trainer, which then makes the schedule over all groups::

        groups = trimtab.parameter_groups(model, 1e-3, {"B": 16, "head": 8}, weight_decay=0.01)
        Trainer(model, args, optimizers=(torch.optim.AdamW(groups, lr=1e-3), None), …)

    Args:
        model: a model with a PEFT adapter, as it is before training.
        learning_rate: the run's rate.
        rates: role -> multiple of it, 1 where there is none. Roles: A, B, vectors, head.
        weight_decay: for what Trainer decays, which biases and norms are not.
    Returns:
        Groups in a fixed order, each with ``params``, ``lr``, ``weight_decay`` and ``role``.
    Raises:
        ConfigError: an unknown role, one that nothing in the model has, or a rate that is no finite number above 0.
    """
    from transformers import Trainer

    multiples = check_rates(rates or {})
    role_of = roles(model)
    check_roles(multiples, set(role_of.values()))
    decays = set(Trainer.get_decay_parameter_names(cast(Any, None), model))  # it reads nothing of the trainer
    parameters = dict(model.named_parameters())
    groups = []
    for role in _ORDER:
        for is_decayed in (True, False):
            held = [parameters[n] for n, its in role_of.items() if its == role and (n in decays) is is_decayed]
            if held:
                groups.append({
                    "params": held,
                    "lr": learning_rate * multiples.get(role, 1.0),
                    "weight_decay": weight_decay if is_decayed else 0.0,
                    "role": role,
                })  # fmt: skip
    return groups


def roles(model: nn.Module) -> dict[str, str]:
    """Name of every parameter that trains -> its role, in the model's order. Found by type, of any PEFT adapter."""
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

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
            found.update((id(p), "vectors") for name, p in own.items() if name.startswith("adaption_"))
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
    return _HOLDERS.get(holder) or next((role for role in ("A", "B") if role in words), "vectors")


def check_rates(rates: Mapping[str, Any]) -> dict[str, float]:
    """The rates as numbers. Raises `ConfigError` for a role that there is not, or a value that is no rate."""
    checked = {}
    for role, rate in rates.items():
        if role not in ROLES:
            near = did_you_mean(str(role).removeprefix("lora_"), ROLES)
            raise ConfigError(f"rates.{role}", rate, f"no such role; there are {', '.join(ROLES)}.{near}")
        is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
        if not is_number or not math.isfinite(rate) or rate <= 0:
            raise ConfigError(f"rates.{role}", rate, "must be a finite number above 0: a multiple of the learning rate")
        checked[role] = float(rate)
    return checked


def check_roles(rates: Mapping[str, float], present: Iterable[str]) -> None:
    """Raises `ConfigError` for a rate of a role that nothing in the model has."""
    there = [role for role in ROLES if role in set(present)]
    for role, rate in rates.items():
        if role not in there:
            raise ConfigError(f"rates.{role}", rate, f"nothing with this role trains here; there is {', '.join(there)}")
