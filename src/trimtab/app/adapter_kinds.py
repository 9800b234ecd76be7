"""The adapter types of a recipe: whose PEFT config carries each, and what its keys may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, did_you_mean
from .lookup import dataclass_fields, refuse_if_elsewhere, unknown_key

if TYPE_CHECKING:
    from .recipe import Adapter

# Which PEFT config carries each adapter type, and what the recipe's words are called there.
ADAPTERS: dict[str, tuple[str, str, dict[str, str]]] = {
    "lora": (
        "peft.tuners.lora.config",
        "LoraConfig",
        {
            "r": "r",
            "alpha": "lora_alpha",
            "dropout": "lora_dropout",
            "init": "init_lora_weights",
            "target_modules": "target_modules",
            "modules_to_save": "modules_to_save",
        },
    ),
    "vera": (
        "peft.tuners.vera.config",
        "VeraConfig",
        {
            "r": "r",
            "dropout": "vera_dropout",
            "init": "init_weights",
            "target_modules": "target_modules",
            "modules_to_save": "modules_to_save",
        },
    ),
    "bottleneck": (
        "trimtab.adapters.bottleneck",
        "BottleneckConfig",
        {"init": "init", "modules_to_save": "modules_to_save"},
    ),
    "adaption_prompt": ("peft.tuners.adaption_prompt.config", "AdaptionPromptConfig", {}),
}
_INSTEAD = {
    ("bottleneck", "r"): "; its width is bottleneck_size, or reduction_factor",
    ("bottleneck", "alpha"): "; scale is for variant=parallel",
    ("bottleneck", "target_modules"): "; variant says where adapters sit, where chooses layers",
    ("adaption_prompt", "r"): "; its size is adapter_len, the number of prompt tokens",
    ("adaption_prompt", "target_modules"): "; it takes the attention of the last adapter_layers layers",
    ("adaption_prompt", "modules_to_save"): "; PEFT saves the prompts alone",
}
PATTERNS = ("rank_pattern", "alpha_pattern")
_OWN_CALL = {
    "eva": "set rank.method=eva, which chooses the ranks and factors in the run",
    "corda": "needs PEFT's preprocess_corda, which no command calls; pissa needs nothing but the weights",
}
"""Starts of factors that PEFT leaves to a call of one's own."""
# What people call an adapter type that is one of ours with a setting.
_TYPES = {
    "qlora": "lora, with model.quantization: {load_in_4bit: true}",
    "dora": "lora, with adapter.use_dora: true",
    "rslora": "lora, with adapter.use_rslora: true",
    "pissa": "lora, with adapter.init: pissa",
    "elora": "vera",
    "houlsby": "bottleneck, with adapter.variant: houlsby",
    "pfeiffer": "bottleneck, with adapter.variant: pfeiffer",
    "llama_adapter": "adaption_prompt",
    "llama-adapter": "adaption_prompt",
    **{name: f"lora, with rank.method: {name}" for name in ("adalora", "salientlora", "sora", "eva", "gora")},
    "aflora": "lora, with freeze.method: aflora",
}


def check_adapter(adapter: Adapter) -> None:
    """Raises `ConfigError` for a type that is not there, or a key or value that it does not take."""
    if adapter.type not in ADAPTERS:
        instead = _TYPES.get(adapter.type.lower())
        near = f" Did you mean {instead}?" if instead else did_you_mean(adapter.type, ADAPTERS)
        raise ConfigError("adapter.type", adapter.type, f"must be one of {', '.join(ADAPTERS)}.{near}")
    module, name, words = ADAPTERS[adapter.type]
    fields = dataclass_fields(module, name)
    theirs_to_ours = {theirs: ours for ours, theirs in words.items() if ours != theirs}
    for key, value in adapter.options.items():
        if key in theirs_to_ours:
            raise ConfigError(f"adapter.{key}", value, f"in a recipe this is adapter.{theirs_to_ours[key]}")
        refuse_if_elsewhere("adapter", key, value)
        if key not in fields:
            raise unknown_key(f"adapter.{key}", value, ["type", *words, *fields])
        _check_value(key, value, fields[key])
        if key in PATTERNS:
            _check_pattern(f"adapter.{key}", value, is_whole=key == "rank_pattern")
    _check_targets(adapter.target_modules)
    if adapter.init in _OWN_CALL:
        raise ConfigError("adapter.init", adapter.init, _OWN_CALL[adapter.init])
    if adapter.type in ("lora", "vera"):
        _check_value("init", adapter.init, fields[words["init"]])
    for ours in type(adapter).model_fields:
        if ours in adapter.model_fields_set and ours not in ("type", *words):
            cure = f"{adapter.type} has no such setting{_INSTEAD.get((adapter.type, ours), '')}"
            raise ConfigError(f"adapter.{ours}", getattr(adapter, ours), cure)


def _check_value(key: str, value: Any, kind: str) -> None:
    """Of PEFT's fields those that are one of some words, or true or false: PEFT itself takes anything for true."""
    words = re.findall(r"'([^']*)'", kind) if "Literal[" in kind else []
    can_be = set(re.findall(r"\w+", re.sub(r"Literal\[[^]]*\]", "", kind.replace("[number of iters]", ""))))
    if isinstance(value, str) and words and "str" not in can_be:
        if not any(
            re.fullmatch(re.sub(r"\[.*]", r"\\d+", word), value) for word in words
        ):  # pissa_niter_[number of iters]
            raise ConfigError(
                f"adapter.{key}", value, f"must be one of {', '.join(words)}.{did_you_mean(value, words)}"
            )
    elif can_be == {"bool"} and not isinstance(value, bool):
        raise ConfigError(f"adapter.{key}", value, "must be true or false")


def _check_pattern(key: str, pattern: Any, is_whole: bool) -> None:
    """Ranks or alphas by the names of modules, or by regexes that their names end in."""
    if not isinstance(pattern, Mapping):
        raise ConfigError(key, pattern, "names of modules, each with its own: {q_proj: 4}")
    for name, value in pattern.items():
        is_number = isinstance(value, int if is_whole else (int, float)) and not isinstance(value, bool)
        if not is_number or value <= 0:
            raise ConfigError(f"{key}.{name}", value, f"a {'whole ' * is_whole}number above 0")
        try:
            re.compile(name)
        except re.error as error:
            raise ConfigError(key, name, f"neither a name nor a regex ({error})") from None


def _check_targets(targets: list[str] | str | None) -> None:
    if targets == []:
        raise ConfigError("adapter.target_modules", targets, "names nothing; leave it out for PEFT's own choice")
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            cure = f"not a regex ({error}); names go into a list: [q_proj, v_proj]; for all linears: all-linear"
            raise ConfigError("adapter.target_modules", targets, cure) from None
