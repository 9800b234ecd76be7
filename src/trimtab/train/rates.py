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

    from ..host.adapted import roles

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
