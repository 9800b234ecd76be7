"""The recipe's `adapter`, `where`, `rank` and `freeze` -> one PEFT config."""

from __future__ import annotations

import dataclasses
import inspect
import re
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, TrimtabError, did_you_mean
from ..plans import Budget, Where
from . import recipe as recipes
from .adapter_kinds import ADAPTERS, PATTERNS
from .recipe import Adapter, Rank, Recipe

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from torch import nn

    from ..where.controls import Among


WITHOUT_LORA_FORM = ("bottleneck", "adaption_prompt")
"""Adapter types that nothing but their own layers can compute."""
NOT_STOCK_PEFT = ("bottleneck",)
"""Adapter types that PEFT reads only where Trimtab is imported too."""


def method_settings(axis: str, section: Rank | None, defaults: dict[str, Any] | None = None) -> Any:
    """The settings object that ``rank:`` or ``freeze:`` describes; None for none.

    Args:
        defaults: values for settings that the recipe leaves open.
    Raises:
        ConfigError: an unknown method or setting, or a value that cannot work.
    """
    if section is None:
        return None
    try:
        return import_module(f"trimtab.{axis}").make(section.method, dict(section.options) | (defaults or {}))
    except TypeError as error:  # a value of a type that cannot be compared
        raise ConfigError(axis, section.options, " ".join(str(error).split())) from None


def free_settings(recipe: Recipe) -> tuple[str, ...]:
    """What a budget may choose: whatever the recipe leaves open."""
    free = []
    where = recipe.where
    if where is not None and where.ratio is None and where.count is None and _takes_ratio(where):
        free.append("where.ratio")
    if recipe.rank is not None and "target_r" not in recipe.rank.options and _has_target(recipe.rank.method):
        free.append("rank.target_r")
    if recipe.freeze is not None and not {"warmup", "final", "at"} & set(recipe.freeze.options):
        free.append("freeze.ramp")
    return tuple(free)


def _has_target(method: str) -> bool:
    from .. import rank

    return any(field.name == "target_r" for field in dataclasses.fields(rank.load(method)))  # type: ignore[arg-type]


def _takes_ratio(settings: recipes.Where) -> bool:
    from ..where import METHODS, own_settings

    return settings.method != "mask" if settings.method in METHODS else "ratio" in own_settings(settings.method)


def settings_of(recipe: Recipe) -> dict[str, Any]:
    """The settings objects of ``rank:`` and ``freeze:``; under a budget a target it will choose may be left out."""
    stands_in = recipe.budget is not None and "rank.target_r" in free_settings(recipe)
    return {
        "rank": method_settings("rank", recipe.rank, {"target_r": 1} if stands_in else None),
        "freeze": method_settings("freeze", recipe.freeze),
    }


def budget_of(recipe: Recipe) -> Budget | None:
    return None if recipe.budget is None else Budget(**recipe.budget.model_dump())


def layers_to_choose_from(
    recipe: Recipe,
    settings: recipes.Where,
    model: nn.Module,
    task_type: str | None = None,
    modules_to_save: tuple[str, ...] = (),
) -> dict[str, tuple[int, ...]] | None:
    """Those of each stack that hold a target of the recipe's adapter, of a hybrid not all; None where all do.

    Args:
        settings: of the selection; a mask is the user's own choice.
        task_type, modules_to_save: as for `adapter_config`.
    """
    from ..where import controls

    if settings.method == "mask" or recipe.adapter.type in WITHOUT_LORA_FORM:
        return None
    config = adapter_config(recipe, model, task_type=task_type, modules_to_save=modules_to_save)
    found, depths = controls.with_targets(model, config), controls.depths_of(model)
    return None if all(len(layers) == depths[path] for path, layers in found.items()) else found


def choose_without_data(model: nn.Module, settings: recipes.Where, seed: int, among: Among | None = None) -> Where:
    """The selection of a method that looks at no data: a control, the user's own mask or function."""
    from ..where import METHODS, controls

    if settings.method not in METHODS:
        return choose_own(model, settings, seed, among=among)
    if settings.method == "mask":
        return controls.from_mask(model, settings.mask or "")
    size = {"ratio": settings.ratio, "count": settings.count, "among": among}
    if settings.method == "random":
        size["seed"] = seed if settings.seed is None else settings.seed
    return getattr(controls, settings.method)(model, **size)


def choose_own(
    model: nn.Module, settings: recipes.Where, seed: int, batches: Any = None, among: Among | None = None
) -> Where:
    """The selection of a method that is not built in."""
    from .. import where

    takes = where.own_settings(settings.method)
    rows = ("samples", "batch_size", "seed") if reads_rows(settings) else ()  # which batches there are
    given = settings.options
    for key, field in recipes.Where.model_fields.items():
        value = getattr(settings, key)
        # A run folder's recipe holds every default; only what differs from it was asked for.
        if key != "method" and value is not None and (key in takes or (key not in rows and value != field.default)):
            given[key] = value
    if "seed" in takes:
        given.setdefault("seed", seed)
    return where.choose_own(settings.method, model, given, batches, among)


def reads_rows(settings: recipes.Where) -> bool:
    """Whether the selection has to wait for weights and data."""
    from ..where import reads_batches

    return reads_batches(settings.method)


def _refuse_unknown_modules(adapter: Adapter, model: nn.Module) -> None:
    """PEFT passes over a name in ``modules_to_save`` that matches nothing, and the module is not trained."""
    modules = [name for name, _ in model.named_modules() if name]
    for name in adapter.modules_to_save or ():
        if not any(f".{module}".endswith(f".{name}") for module in modules):
            near = did_you_mean(name, dict.fromkeys(module.rpartition(".")[2] for module in modules))
            raise ConfigError("adapter.modules_to_save", name, f"no module of this name in the model.{near}")


def _refuse_what_matches_nothing(adapter: Adapter, model: nn.Module, config: PeftConfig) -> None:
    """A name in a pattern that no adapted module has, which PEFT passes over, and tokens that there are none of."""
    from ..host.sites import base_of, matched_names, matched_parameters

    for field in PATTERNS:
        for name in adapter.options.get(field) or ():
            experts = matched_parameters(base_of(model), config)
            adapted = [*matched_names(base_of(model), config), *experts, *(one.rpartition(".")[0] for one in experts)]
            if not any(re.fullmatch(rf"(.*\.)?({name})", one) for one in adapted):
                near = did_you_mean(name, dict.fromkeys(one.rpartition(".")[2] for one in adapted))
                raise ConfigError(f"adapter.{field}", name, f"no module that is adapted is called so.{near}")
    tokens = adapter.options.get("trainable_token_indices")
    n = model.get_input_embeddings().num_embeddings if isinstance(tokens, list) else 0  # type: ignore[operator]
    for token in tokens if isinstance(tokens, list) else ():
        if not isinstance(token, int) or not 0 <= token < n:
            raise ConfigError("adapter.trainable_token_indices", token, f"ids of tokens, from 0 to {n - 1}")


def adapter_config(
    recipe: Recipe,
    model: nn.Module,
    *,
    where: Where | None = None,
    task_type: str | None = None,
    modules_to_save: tuple[str, ...] = (),
) -> PeftConfig:
    """What goes to `peft.get_peft_model`.

    Args:
        model: the base model, on any device; adapters other than `lora` need it to apply ``where``.
        where: the selection; None adapts every layer.
        modules_to_save: what the checkpoint lacked; joined with the recipe's own.
    Raises:
        ConfigError: settings that cannot work, alone or together.
    """
    adapter = recipe.adapter
    settings = settings_of(recipe)
    _refuse_unknown_modules(adapter, model)
    kept = list(dict.fromkeys([*modules_to_save, *(adapter.modules_to_save or ())]))
    values = {"task_type": task_type, **_own_words(adapter), **adapter.options}
    if "modules_to_save" in values:
        values["modules_to_save"] = kept or None
    if adapter.type in WITHOUT_LORA_FORM:
        _refuse_what_needs_lora(recipe)
    if recipe.export.format == "gguf":
        _refuse_what_llama_cpp_has_not(model, kept)
    if adapter.type == "lora":
        from ..host.config import TrimConfig

        frees = tuple(key for key in free_settings(recipe) if key != "where.ratio")
        limits = {"budget": budget_of(recipe), "budget_frees": frees} if any(settings.values()) else {}
        _refuse_what_matches_nothing(adapter, model, _built(TrimConfig, values))
        return _built(TrimConfig, {**values, **settings, **limits, "where": where})
    for axis, value in settings.items():
        if value is not None:
            cure = f"works on adapter.type=lora; {adapter.type} has no ranks or projections to decide on"
            raise ConfigError(f"{axis}.method", getattr(recipe, axis).method, cure)
    module, name, _ = ADAPTERS[adapter.type]
    config = _built(getattr(import_module(module), name), values)
    if adapter.type == "adaption_prompt":
        from ..adapters.prompts import check

        if recipe.where is not None:
            raise ConfigError(
                "where.method",
                recipe.where.method,
                "adaption_prompt always takes the last layers; drop "
                "where, and set adapter.adapter_layers to their number",
            )
        check(model, config, task_type)
    if adapter.type == "bottleneck":
        config.where = where  # type: ignore[attr-defined]
        return config
    if where is None:
        return config
    from ..host.restrict import restrict

    return restrict(config, where, model)


def _refuse_what_needs_lora(recipe: Recipe) -> None:
    kind = recipe.adapter.type
    if recipe.budget is not None:
        limits = recipe.budget.model_dump(exclude_none=True)
        size = "adapter.bottleneck_size or where.ratio" if kind == "bottleneck" else "adapter.adapter_len"
        raise ConfigError("budget", limits, f"works on adapter.type=lora; the size of {kind} is set by {size}")
    if recipe.export.format != "peft":
        cure = f"{kind} has no LoRA or merged form; drop it, and the run keeps the adapter in its own"
        raise ConfigError("export.format", recipe.export.format, cure)
    if kind == "adaption_prompt" and recipe.model.dtype in ("bfloat16", "float16") and not recipe.model.quantization:
        cure = "adaption_prompt trains in the model's dtype, where its small steps round away; use float32"
        raise ConfigError("model.dtype", recipe.model.dtype, cure)


def _refuse_what_llama_cpp_has_not(model: nn.Module, kept: list[str]) -> None:
    from ..exporting.gguf import architecture

    architecture(getattr(model, "config", None))
    if kept:
        cure = f"llama.cpp takes A and B alone, and {kept[0]} is saved with the adapter; use merged"
        raise ConfigError("export.format", "gguf", cure)


def _own_words(adapter: Adapter) -> dict[str, Any]:
    values = {
        "r": adapter.r,
        "alpha": adapter.alpha or 2 * adapter.r,
        "dropout": adapter.dropout,
        "init": adapter.init,
        "target_modules": adapter.target_modules,
        "modules_to_save": None,
    }
    return {theirs: values[ours] for ours, theirs in ADAPTERS[adapter.type][2].items()}


def _built(config: type[PeftConfig], values: dict[str, Any]) -> PeftConfig:
    known = inspect.signature(config).parameters
    for key in values:
        if key not in known:  # the installed PEFT is older than the one the recipe was written for
            cure = f"this version of PEFT's {config.__name__} has no such field"
            raise ConfigError(f"adapter.{key}", values[key], cure)
    try:
        return config(**values)
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError("adapter", values, " ".join(str(error).split())) from None


def adapted(model: Any, config: PeftConfig) -> PeftModel:
    """`peft.get_peft_model`.

    Raises:
        ModelError: PEFT refuses the config for this model.
    """
    import peft

    try:
        return peft.get_peft_model(model, config)
    except TrimtabError:
        raise
    except ValueError as error:
        raise ModelError(f"adapter: {' '.join(str(error).split())}") from error
