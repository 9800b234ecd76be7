"""From any transformer to its stacks of blocks, and from target names to the linears they mean.

A *stack* is a list of repeated blocks (`nn.ModuleList`); an encoder-decoder has two. Its *path* is
relative to the backbone, so that it is the same with and without a head: "encoder.layer" for BERT and
for BertForSequenceClassification. A *site* is one linear that can carry an adapter.

Names are matched by PEFT's own functions, so what Trimtab counts is what PEFT will adapt. Only shapes
are read: a model on the meta device will do.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, ModelError, TrimtabError, did_you_mean
from ..plans import Site, Where

HEADS = {"SEQ_CLS": ["classifier", "score"], "TOKEN_CLS": ["classifier", "score"], "QUESTION_ANS": ["qa_outputs"]}
"""What PEFT adds to ``modules_to_save`` by itself for a task type, and therefore never adapts."""
_TIME_FIRST = ("xlnet", "fsmt")


@dataclass(frozen=True, eq=False)
class Stack:
    """One list of repeated blocks."""

    path: str
    """Name below the backbone, the key in `Where.stacks`."""
    name: str
    """Full name in the base model (``"bert.encoder.layer"``)."""
    module: nn.ModuleList = field(repr=False)
    owner: nn.Module = field(repr=False)
    """The module that runs the blocks and, in many models, a final norm after them."""
    hidden_size: int

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        return tuple(self.module)

    def __len__(self) -> int:
        return len(self.module)


def base_of(model: Any) -> Any:
    """The model under a `PeftModel`, a data-parallel wrapper or `torch.compile`; else the model itself.

    Module names in here are the ones that PEFT matches and that `Site.name` holds.
    """
    while True:
        if hasattr(model, "get_base_model"):
            inner = model.get_base_model()
        elif isinstance(model, BaseTuner) or hasattr(model, "_orig_mod"):
            inner = getattr(model, "_orig_mod", None) or model.model
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            inner = model.module
        else:
            return model
        if inner is model:
            return model
        model = inner


def backbone_of(base: Any) -> tuple[str, Any]:
    """Prefix and module of the part below the head (``("bert.", BertModel)``); ``("", base)`` without one."""
    name = getattr(base, "base_model_prefix", "") or ""
    inner = getattr(base, name, None) if name else None
    return (f"{name}.", inner) if isinstance(inner, nn.Module) else ("", base)


def find_stacks(model: nn.Module, include_vision: bool = False) -> dict[str, Stack]:
    """The stacks of blocks of a model, by path below its backbone, in the order of the model.

    A model of several modalities yields its language model only, unless ``include_vision``.

    Raises:
        ModelError: the model has no list of repeated blocks.
    """
    base = base_of(model)
    prefix, backbone = backbone_of(base)
    found = [
        (Stack(path, prefix + path, module, owner, _hidden_size(near, base, module)), near)
        for path, module, owner, near in _block_lists(backbone, "", backbone)
    ]
    # A selection matches any name that holds the path: it must tell the lists apart (Phi-4's towers have layers, too).
    names = [stack.name for stack, _ in found]
    found = [
        (replace(s, path=s.name) if any(f".{s.path}." in f"{n}." for n in names if n != s.name) else s, near)
        for s, near in found
    ]
    if not include_vision:
        towers = tuple(f"{name}." for name, module in base.named_modules() if name and _is_tower(module, base))
        found = [
            (s, near) for s, near in found if _is_language(near, base) and not s.name.startswith(towers or "\0")
        ] or found
        found = [(s, near) for s, near in found if s.owner is _decoder_alone(base)] or found
    if not found:
        raise ModelError(f"model: {type(base).__name__} has no list of repeated blocks (nn.ModuleList) to choose from.")
    return {stack.path: stack for stack, _ in found}


def check_where(where: Where, stacks: dict[str, Stack]) -> None:
    """Raise `ConfigError` when a selection was made for another model than the one with these stacks."""
    for path, mask in where.stacks.items():
        if path not in stacks:
            raise ConfigError(
                "where.stacks",
                path,
                f"the model has no such stack; it has {', '.join(stacks)}.{did_you_mean(path, stacks)}",
            )
        if len(mask) != len(stacks[path]):
            raise ConfigError(
                f"where.mask[{path}]",
                mask,
                f"{len(mask)} characters, but {path} has {len(stacks[path])} layers; select again for this model",
            )


def lists_meant(where: Where, base: nn.Module) -> dict[str, str]:
    """A selection's stacks -> full names of the lists whose layers PEFT would take for them: it matches by endings.

    Raises:
        ConfigError: the selection was made for another model.
    """
    lists = {name: len(module) for name, module in base.named_modules() if isinstance(module, nn.ModuleList)}
    meant = {}
    for path, mask in where.stacks.items():
        found = [name for name in lists if f".{name}".endswith(f".{path}")]
        found = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
        if len(found) != 1 or len(mask) != lists[found[0]]:
            stacks = find_stacks(base, include_vision=True)
            check_where(where, stacks)
            raise ConfigError("where.stacks", path, f"ends the names of {', '.join(found)}; say which, in full")
        meant[path] = found[0]
    return meant


def find_sites(
    model: nn.Module,
    target_modules: Any = None,
    where: Where | None = None,
    *,
    exclude_modules: list[str] | str | None = None,
    modules_to_save: list[str] | None = None,
    task_type: str | None = None,
) -> list[Site]:
    """The linears that a PEFT config would adapt, in the order of the model.

    Args:
        target_modules: as in `LoraConfig`: names or name endings, one regex for whole names,
            ``"all-linear"``, or ``None`` for PEFT's default for the model type. A PEFT config also
            serves; every setting that has a say in matching is then taken from it.
        where: keep only the sites inside the chosen blocks.
        exclude_modules, modules_to_save, task_type: as in `LoraConfig`; all three keep PEFT from
            adapting what would match otherwise.

    Raises:
        ModelError: a target matches nothing, or something that is not a linear.
        ConfigError: ``where`` belongs to another model.
    """
    base = base_of(model)
    config = target_modules
    if not isinstance(config, PeftConfig):
        config = LoraConfig(
            target_modules=target_modules,
            exclude_modules=exclude_modules,
            modules_to_save=modules_to_save,
            task_type=task_type,
        )
    modules = dict(base.named_modules())
    linears = {name: module for name, module in outside_adapters(base) if is_linear(module)}
    _check_targets(config.target_modules, linears)

    stacks = find_stacks(base, include_vision=True)
    if where is not None:
        check_where(where, stacks)
    sites = []
    for name in matched_names(base, config):
        stack, block, kind = locate(name, stacks)
        if where is not None and (stack is None or not is_chosen(where, stack, block)):
            continue
        if name not in linears:
            raise ModelError(
                f"target_modules: {name!r} is a {type(modules[name]).__name__}, not a linear. "
                f"Linears here are {', '.join(_endings(linears))}."
            )
        sites.append(Site(name, *features(modules[name]), stack, block, kind))
    if not sites:
        raise ModelError(
            f"target_modules={_shown(config.target_modules)}: every match is excluded"
            f"{' or lies outside the chosen layers' if where else ''}."
        )
    return sites


def matched_names(base: nn.Module, config: Any) -> list[str]:
    """Names of the modules of a base model that PEFT would adapt under this config, in model order."""
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    config = prepared(base, config)
    if heads := HEADS.get(str(getattr(config.task_type, "value", config.task_type)), []):
        config.modules_to_save = [*(getattr(config, "modules_to_save", None) or []), *heads]
    return [name for name, _ in outside_adapters(base) if tuner._check_target_module_exists(config, name)]


def matched_parameters(base: nn.Module, config: Any) -> list[str]:
    """Full names of the parameters, such as fused experts, that LoRA's ``target_parameters`` would match."""
    if not hasattr(config, "target_parameters"):
        return []
    targets = prepared(base, config).target_parameters or ()
    return [
        name
        for name, _ in base.named_parameters()
        if any(name == target or name.endswith(f".{target}") for target in targets)
    ]


def prepared(base: nn.Module, config: Any) -> Any:
    """A copy of the config with the model type's defaults filled in and "all-linear" spelt out, by PEFT.

    Names of experts, which transformers 5 fuses into parameters, become ``target_parameters``.
    """
    config = copy.deepcopy(config)
    if any(p.ndim > 2 for p in base.parameters()):  # fused experts; without any, asking costs most of a second
        convert_peft_config_for_transformers(config, base, None)
    tuner_class = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    tuner = tuner_class.__new__(tuner_class)  # not initialised: we ask it a question, it must not inject anything
    nn.Module.__init__(tuner)
    tuner.__dict__["model"] = base  # not as a submodule
    try:
        config = tuner._prepare_adapter_config(config, BaseTuner.get_model_config(base))
    except TrimtabError:  # ours say what is wrong themselves
        raise
    except ValueError as error:
        kind = getattr(getattr(base, "config", None), "model_type", type(base).__name__)
        raise ModelError(
            f"target_modules: PEFT has no default for {kind!r}; name the modules or say 'all-linear'."
        ) from error
    return _maybe_include_all_linear_layers(config, base)


def layers_with_targets(base: nn.Module, config: Any, lists: Mapping[str, str]) -> dict[str, list[int]]:
    """Stack -> its layers in which PEFT would adapt something under a config; of a hybrid not all do.

    Args:
        lists: stack -> full name of its list.
    """
    names = [*matched_names(base, config), *matched_parameters(base, config)]
    found = {}
    for path, name in lists.items():
        inside = (own[len(name) + 1 :].partition(".")[0] for own in names if own.startswith(f"{name}."))
        found[path] = sorted({int(index) for index in inside})
    return found


def blocks_with_targets(model: nn.Module, target_modules: Any) -> dict[str, tuple[int, ...]]:
    """See `trimtab.where.with_targets`."""
    base = base_of(model)
    config: Any = target_modules
    if not isinstance(config, PeftConfig):
        config = LoraConfig(target_modules=target_modules)
    stacks = find_stacks(base)
    found = layers_with_targets(base, config, {path: stack.name for path, stack in stacks.items()})
    if not any(found.values()):
        linears = {name: module for name, module in outside_adapters(base) if is_linear(module)}
        _check_targets(config.target_modules, linears)
        raise ModelError(f"target_modules={_shown(config.target_modules)}: no layer of {', '.join(stacks)} holds any")
    return {path: tuple(blocks) for path, blocks in found.items()}


def idle_layers(where: Where, base: nn.Module, config: Any, lists: Mapping[str, str]) -> str | None:
    """Chosen layers in which nothing is adapted, in words; None if there are none.

    Args:
        config: without the selection.
        lists: as in `layers_with_targets`.
    """
    holding = layers_with_targets(base, config, lists)
    told = []
    for path, mask in where.stacks.items():
        chosen = [i for i, c in enumerate(mask) if c == "1"]
        if idle := [i for i in chosen if i not in holding[path]]:
            others = f"{', '.join(map(str, holding[path]))} hold some" if holding[path] else "no other holds any"
            told.append(
                f"{len(idle)} of the {len(chosen)} chosen layers of {path} ({', '.join(map(str, idle))}; {others})"
            )
    if not told:
        return None
    cure = "to choose among the others: among=trimtab.where.with_targets(model, target_modules)"
    return f"where: target_modules={_shown(config.target_modules)} match nothing in {' and '.join(told)}; {cure}"


def locate(name: str, stacks: dict[str, Stack]) -> tuple[str | None, int | None, str]:
    """Stack path, block index and name inside the block; ``(None, None, name)`` outside of all stacks."""
    for path, stack in stacks.items():
        if name.startswith(f"{stack.name}."):
            index, _, kind = name[len(stack.name) + 1 :].partition(".")
            return path, int(index), kind
    return None, None, name


def is_chosen(where: Where, stack: str, block: int | None) -> bool:
    """Is this block of this stack among the chosen ones?"""
    return block is not None and stack in where.stacks and where.stacks[stack][block] == "1"


# ---------------------------------------------------------------------------------------- blocks of a model


def _block_lists(
    module: nn.Module, name: str, near: nn.Module
) -> Iterator[tuple[str, nn.ModuleList, nn.Module, nn.Module]]:
    """Outermost module lists whose items are blocks, with their owner and the nearest model with a config."""
    for child_name, child in module.named_children():
        child_path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, BaseTunerLayer):
            continue
        if isinstance(child, nn.ModuleList) and len(child) and all(_is_block(item) for item in child):
            yield child_path, child, module, near
        else:
            yield from _block_lists(child, child_path, child if hasattr(child, "config") else near)


def _is_block(module: nn.Module) -> bool:
    if isinstance(module, nn.ModuleList) or is_linear(module):
        return False
    return any(is_linear(inner) for inner in module.modules())


def _is_language(near: Any, base: Any) -> bool:
    """Is the model nearest to a stack the language model of its composite?"""
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config"):
        return True
    text_config = _text_config_of(config)
    if text_config is config:
        return True
    if not _reads_text(near):
        return False
    return text_config is None or config.is_encoder_decoder or type(near.config) is type(text_config)


def _text_config_of(config: Any) -> Any:
    try:
        return config.get_text_config()
    except ValueError:  # several text parts: their modality has to tell
        return None


def _decoder_alone(base: Any) -> nn.Module | None:
    """What runs the layers of a language model that is a decoder and all of its model's config: what is elsewhere reads
    something else for it, whatever transformers says of it (Evolla's protein encoder). It embeds the tokens itself:
    Funnel's and LW-DETR's decoders go on from an encoder that is part of the model."""
    config: Any = getattr(base, "config", None)
    if not hasattr(config, "get_text_config") or not hasattr(base, "get_decoder"):
        return None
    if config.is_encoder_decoder or _text_config_of(config) is not config:
        return None
    decoder = base.get_decoder()
    try:
        embeds = base.get_input_embeddings()
    except NotImplementedError:  # it reads no tokens
        return None
    return decoder if any(module is embeds for module in decoder.modules()) else None


def _reads_text(module: Any) -> bool:
    modalities = getattr(module, "input_modalities", "text")
    return "text" in ((modalities,) if isinstance(modalities, str) else modalities)


def _is_tower(module: Any, base: Any) -> bool:
    """Whether it sees or hears for a model that reads text: inside of it, of a kind with a config of its own."""
    config, own = getattr(base, "config", None), getattr(module, "config", None)
    if not hasattr(module, "input_modalities") or not _reads_text(base) or _reads_text(module) or own is None:
        return False
    is_encoder = getattr(config, "is_encoder_decoder", False) and module is base.get_encoder()
    return type(own) is not type(config) and not is_encoder


def decoder_of(base: Any) -> nn.Module | None:
    """The decoder of an encoder-decoder, without its encoder; None of any other model.

    An encoder alone may say in its config that it is an encoder-decoder (Whisper's and UMT5's classifiers), and the
    decoder that a model names may be all of its language model (Florence-2).
    """
    if not getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return None
    encoder, decoder = base.get_encoder(), base.get_decoder()
    while encoder in set(decoder.modules()):
        if (inner := getattr(decoder, "get_decoder", lambda own=decoder: own)()) is decoder:
            return None
        decoder = inner
    return decoder


def is_time_first(base: Any) -> bool:
    """Whether hidden states are (t, b, d) inside the model, and not (b, t, d); a batch of t rows does not show it."""
    return getattr(getattr(base, "config", None), "model_type", None) in _TIME_FIRST


def _hidden_size(near: nn.Module, base: nn.Module, blocks: nn.ModuleList) -> int:
    for owner in (near, base):
        size = getattr(getattr(owner, "config", None), "hidden_size", None)
        if isinstance(size, int):
            return size
    first = next(m for m in blocks.modules() if is_linear(m))
    return features(first)[0]


# --------------------------------------------------------------------------------------------- linears


def outside_adapters(base: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Named modules, without the inside of adapter layers that are already there (as PEFT skips them)."""
    inside: tuple[str, ...] = ()
    for name, module in base.named_modules():
        if not name or name.startswith(inside or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside += (f"{name}.",)
        yield name, module


def bare(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def is_linear(module: nn.Module) -> bool:
    layer = bare(module)
    if isinstance(layer, (nn.Linear, Conv1D)):
        return True
    names = ("in_features", "out_features"), ("infeatures", "outfeatures")  # quantised linears of several makers
    return any(all(isinstance(getattr(layer, n, None), int) for n in pair) for pair in names)


def features(linear: nn.Module) -> tuple[int, int]:
    """Numbers of inputs and outputs of a linear of any make."""
    inputs, outputs = _get_in_out_features(bare(linear))
    assert inputs is not None and outputs is not None  # `is_linear` saw them
    return int(inputs), int(outputs)


def _endings(linears: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in linears))


def _shown(target_modules: Any) -> str:
    if not isinstance(target_modules, str) and len(target_modules) > 8:  # as of "all-linear", once spelt out
        return f"{len(target_modules)} names"
    return repr(sorted(target_modules) if isinstance(target_modules, set) else target_modules)


def _check_targets(target_modules: Any, linears: dict[str, nn.Module]) -> None:
    """Every named target must be there: PEFT only complains when all of them are missing."""
    if target_modules is None or (isinstance(target_modules, str) and target_modules.lower() == "all-linear"):
        return
    known = _endings(linears)
    if isinstance(target_modules, str):
        if not any(re.fullmatch(target_modules, name) for name in linears):
            names = re.split(r"[,\s]+", target_modules.strip())
            near = f" As names they go into a list: [{', '.join(names)}]" if set(names) <= set(known) else ""
            raise ModelError(
                f"target_modules: no linear matches {target_modules!r} as a regex for the whole name. "
                f"Linears here end in {', '.join(known)}.{near}"
            )
        return
    for target in sorted(target_modules):
        if target == "all-linear":
            raise ModelError("target_modules: 'all-linear' stands alone, not in a list")
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            raise ModelError(
                f"target_modules: no linear named {target!r} in this model. "
                f"It has {', '.join(known)}.{did_you_mean(target, known)}"
            )


def base_with_weights(model: nn.Module) -> nn.Module:
    """The base model, to compute with. Raises `ModelError` where its weights are not there (meta device)."""
    base = base_of(model)
    if is_on_meta(base):
        raise ModelError("model: it has no weights (meta device); load them before scoring its layers")
    return base


def is_on_meta(model: nn.Module) -> bool:
    """Does any weight live on the meta device, so that nothing can be computed?"""
    return any(p.device == torch.device("meta") for p in model.parameters())
