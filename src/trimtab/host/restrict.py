"""Put a selection of layers on any PEFT config.

PEFT's own ``layers_to_transform`` misses head-less models, hits encoder *and* decoder of an encoder-decoder,
hits the vision tower of a LLaVA, and exists in some configs only. So: ``exclude_modules`` where the config
has it, else ``target_modules`` spelt out as full names. Either way the saved adapter is a stock one.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from torch import nn

from ..errors import ConfigError, ModelError
from ..plans import Where
from ..where.controls import from_mask
from .config import excluding, untie_targets
from .sites import (
    Stack,
    base_of,
    check_where,
    find_stacks,
    idle_layers,
    is_chosen,
    locate,
    matched_names,
    matched_parameters,
    prepared,
)

_NO_BLOCKS = {
    "ADAPTION_PROMPT": "it always takes the last layers; set adapter_layers to their number instead",
    "TRAINABLE_TOKENS": "it trains token embeddings, which lie outside of the layers",
    "XLORA": "it mixes finished adapters and targets no modules; restrict those adapters instead",
}


def restrict(config: PeftConfig, where: Where | str | Mapping[str, str], model: nn.Module) -> PeftConfig:
    """A copy of a PEFT config that adapts the chosen blocks of this model only.

    Args:
        config: any PEFT config that targets modules (LoRA, DoRA, PiSSA, AdaLoRA, VeRA, IA3, OFT, …).
        where: from `trimtab.select_layers` or a control, or a 0/1 mask, one per stack if there are several.
        model: the model the config will be used on; a meta-device one will do.

    Returns:
        A config of the same class. Go on with stock `peft.get_peft_model`.

    Raises:
        ConfigError: the selection is for another model, or the config targets no modules at all.
        ModelError: nothing that the config targets lies in the chosen blocks.
    """
    base = base_of(model)
    if not isinstance(where, Where):
        where = from_mask(base, where)
    stacks = find_stacks(base, include_vision=True)
    check_where(where, stacks)
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if config.is_prompt_learning or kind in _NO_BLOCKS or not hasattr(config, "target_modules"):
        reason = _NO_BLOCKS.get(kind, "it trains prompts and targets no modules in the layers")
        raise ConfigError("where", type(config).__name__, f"layers cannot be chosen for it: {reason}")

    def inside(name: str) -> bool:
        path, block, _ = locate(name, stacks)
        return path is not None and is_chosen(where, path, block)

    chosen = [name for name in matched_names(base, config) if inside(name)]
    parameters = matched_parameters(base, config)
    chosen_parameters = [name for name in parameters if inside(name)]
    if not chosen and not chosen_parameters:
        raise ModelError(
            f"target_modules={_shown(config)}: no match lies in the chosen layers "
            f"({', '.join(f'{path} {mask}' for path, mask in where.stacks.items())})"
        )

    if told := idle_layers(where, base, config, {path: stack.name for path, stack in stacks.items()}):
        warnings.warn(told, stacklevel=2)
    out: Any = copy.deepcopy(config)
    if getattr(out, "layer_replication", None):
        raise ConfigError(
            "layer_replication",
            out.layer_replication,
            "the layers that it makes have other numbers than where was chosen for; drop one",
        )
    untie_targets(out)
    if parameters:  # exclude_modules has no say over fused experts
        out = prepared(base, out)
        out.target_parameters = chosen_parameters
    if hasattr(out, "exclude_modules"):
        user = out.exclude_modules
        out.exclude_modules = excluding(where, user)
        if matched_names(base, out) != chosen:  # another stack's path ends like a chosen one's: anchor the names
            out.exclude_modules = excluding(_anchored(where, stacks), user)
    else:
        for name in ("layers_to_transform", "layers_pattern"):  # they have done their work
            if hasattr(out, name):
                setattr(out, name, None)
        out.target_modules = set(chosen)
        if matched_names(base, out) != chosen:  # a full name is another's ending
            out.target_modules = "|".join(map(re.escape, chosen))
    if matched_names(base, out) != chosen:
        raise ModelError(
            f"{type(config).__name__}: PEFT would adapt other modules than the chosen layers' own; "
            "name target_modules more exactly"
        )
    if not hasattr(out, "where"):  # no field of PEFT's, so never saved; the callback hands its scores to trackers
        out.where = where
    return out


def _anchored(where: Where, stacks: dict[str, Stack]) -> str:
    """`Where.outside` for full names, from the first character on."""
    chosen = []
    for path, mask in where.stacks.items():
        indices = "|".join(str(i) for i, c in enumerate(mask) if c == "1")
        if indices:
            chosen.append(rf"{re.escape(stacks[path].name)}\.(?:{indices})(?:\.|$)")
    return rf"(?!{'|'.join(chosen)}).*"


def _shown(config: Any) -> str:
    targets = config.target_modules
    return repr(sorted(targets) if isinstance(targets, (set, list)) else targets)
