"""What goes to `peft.get_peft_model`: a `LoraConfig` that also says where, at which rank and for how long.

A config is a value: nothing that training does is written into it. What is saved describes the layers as they are at
that moment; `Live` keeps track of them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig
from peft.utils.constants import EMBEDDING_LAYER_NAMES, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ..errors import ConfigError, ModelError
from ..plans import Budget, Where
from ..schedule import plain_numbers
from .adapted import calls_of_peft, peft_model_of
from .layers import PROJECTIONS, ParamWrapper, TrimLayer, host, hosted_layers, is_drawn, without_start
from .sites import idle_layers, lists_meant

# Initialisations that change the base weight or train only one factor; a rank or freeze method would
# overwrite what they set up.
_PLAIN_INITS = (True, "gaussian")


@dataclass
class TrimConfig(LoraConfig):
    """A `peft.LoraConfig` that also says where, at which rank and for how long.

    Goes to stock `peft.get_peft_model`. ``peft_type`` stays LORA, and `to_dict` emits stock `LoraConfig`
    fields only, derived from the live layers at that moment, so what is saved beside an adapter always
    matches its tensors.

    Args:
        where: a selection from `trimtab.select_layers` or a control; None adapts every layer.
        rank: `SalientLoRA(...)`, `AdaLoRA(...)`, `SoRA(...)`; `EVA(...)`, `GoRA(...)`, whose ranks and factors
            `trimtab.initialize_ranks(model, batches)` chooses before training; or None for a fixed rank ``r``.
        freeze: `AFLoRA(...)`, `FreezeAt(...)`, or None.
        budget: `Budget(final_params=…)` or `Budget(average_params=…)`; solved when training starts and its
            length is known. ``budget_frees`` names what it may choose; the rest stays as set.
    Raises:
        ConfigError: a pair of settings that cannot work together.
    """

    where: Where | None = field(default=None, metadata={"help": "which layers are adapted"})
    rank: Any = field(default=None, metadata={"help": "rank method settings"})
    freeze: Any = field(default=None, metadata={"help": "freeze method settings"})
    budget: Budget | None = field(default=None, metadata={"help": "one limit over ranks and freezing"})
    budget_frees: tuple[str, ...] = field(
        default=("rank.target_r", "freeze.ramp"), metadata={"help": "what the budget may choose"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.exclude_modules = without_where(self.exclude_modules)  # of the config that this one was copied from
        plain_numbers(self)
        self._check_kinds()
        if not isinstance(self.r, int) or isinstance(self.r, bool) or self.r < 1:
            raise ConfigError("adapter.r", self.r, "a whole number of at least 1")
        if not 0 < self.lora_alpha < float("inf"):
            raise ConfigError("adapter.alpha", self.lora_alpha, "a finite number above 0")
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError("adapter.dropout", self.lora_dropout, "in [0, 1)")
        if self.is_adaptive:
            self._refuse_what_cannot_adapt()
        if self.where is not None:
            if self.layer_replication:
                raise ConfigError(
                    "layer_replication",
                    self.layer_replication,
                    "the layers that it makes have other numbers than where was chosen for; drop one",
                )
            self.exclude_modules = excluding(self.where, self.exclude_modules)
            untie_targets(self)
            self._refuse_a_join_of_other_layers()
        self._live = Live()
        self._register_custom_module(cast(Any, {nn.Module: host}))  # PEFT calls it; a class would do no more

    def __getstate__(self) -> dict[str, Any]:
        """A copy and a pickle hold the settings alone; layers that are copied with it find it again."""
        return {key: value for key, value in self.__dict__.items() if key != "_live"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._live = Live()

    def _check_kinds(self) -> None:
        """Refuse what a script of another library, or a recipe, would give; it would fail far from here."""
        if self.where is not None and not isinstance(self.where, Where):
            cure = "a bare mask needs the model: trimtab.where.from_mask(model, mask)"
            raise ConfigError("where", self.where, cure)
        kinds = (
            ("rank", self.rank, "has_e", "trimtab.SalientLoRA(target_r=4)"),
            ("freeze", self.freeze, "needs_output_diagonal", "trimtab.AFLoRA()"),
        )
        for key, value, mark, example in kinds:
            if value is not None and (isinstance(value, type) or not hasattr(value, mark)):
                raise ConfigError(key, value, f"settings of a {key} method, such as {example}, or None")
        if self.budget is not None and not isinstance(self.budget, Budget):
            raise ConfigError("budget", self.budget, "trimtab.Budget(final_params=…) or Budget(average_params=…)")
        if self.budget is not None and not self.is_adaptive:
            raise ConfigError("budget", self.budget, "needs rank or freeze, over which it decides; else r is the size")
        for key, number in (("adapter.alpha", self.lora_alpha), ("adapter.dropout", self.lora_dropout)):
            if isinstance(number, str):
                raise ConfigError(key, number, "a number, without quotes")

    def _refuse_a_join_of_other_layers(self) -> None:
        """PEFT's `add_weighted_adapter` copies the first adapter's config, with what is excluded there.

        Raises:
            ConfigError: this is such a config, and the adapters lie in different layers.
        """
        for function, its in calls_of_peft():
            if function == "add_weighted_adapter":
                model, (first, *others) = its["self"].model, its["adapters"]
                held = [getattr(module, "lora_A", ()) for module in model.modules()]
                if any(name in adapters and first not in adapters for adapters in held for name in others):
                    raise ConfigError(
                        "adapters",
                        [first, *others],
                        "they lie in different layers, and PEFT would take those of the first one alone; make them "
                        "active together, model.base_model.set_adapter([…]), or merge them, model.merge_adapter([…])",
                    )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """PEFT's, which has written the tensors by now.

        Raises:
            ModelError: they are raw parameters (``state_dict=dict(model.named_parameters())``), in which the diagonals
                are not folded: stock PEFT would read another function out of them; or a start that is drawn was to be
                undone in a pickle.
        """
        files = [Path(save_directory) / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)]
        if self._holds_a_start():
            if not files[0].is_file():
                self.inference_mode = False
                start = f"init_lora_weights={self.init_lora_weights!r}"
                raise ModelError(
                    f"safe_serialization=False: {start} is undone in what is saved, which is a safetensors file"
                )
            _write_without_start(files[0], self._live)
        for weights in filter(Path.is_file, files if self.is_adaptive else ()):
            raw = [key for key in _keys(weights) if re.search(r"\.lora_[eb](\.|$)", key)]
            if raw:
                self.inference_mode = False  # PEFT has set it for the file, and would set it back after this call
                raise ModelError(
                    f"state_dict: {raw[0]} and {len(raw) - 1} more are raw parameters of an adapter that adapts; leave "
                    f"state_dict out, or give model.state_dict(), which is plain LoRA. {weights} is not"
                )
        super().save_pretrained(save_directory, **kwargs)

    def _holds_a_start(self) -> bool:
        """Whether what is saved has to undo a start. An untrained adapter is kept as PEFT keeps it, whose
        ``path_initial_model_for_weight_conversion`` reads it."""
        layers = [(layer, name) for layer, name in self._live.layers() if name in layer.initial_factors]
        return is_drawn(self.init_lora_weights) and any(
            not torch.equal(trained, start.to(trained))
            for layer, name in layers
            for trained, start in zip(layer.factors(name), layer.initial_factors[name])
        )

    def check_model(self, model: nn.Module | None = None) -> None:
        """Hold the selection of layers against the base model, once for each.

        Args:
            model: None where PEFT is putting the adapter in, module by module; no argument there says of which model.
        Raises:
            ConfigError: ``where`` was chosen for another model.
        """
        if self.where is None:
            return
        if model is None:
            model = next((its["model"] for name, its in calls_of_peft() if name == "inject_adapter"), None)
        if model is None or self._live.model() is model:
            return
        self._live.model = weakref.ref(model)
        if told := self.idle_layers(model):
            warnings.warn(told, stacklevel=2)

    def idle_layers(self, base: nn.Module) -> str | None:
        """Chosen layers in which nothing would be adapted, in words; None if there are none."""
        if self.where is None:
            return None
        whole = copy.copy(self)
        whole.exclude_modules = without_where(self.exclude_modules)
        return idle_layers(self.where, base, whole, lists_meant(self.where, base))

    def put_to_work(self) -> None:
        """From now on this is a model's own config, whose adapter adapts."""
        self._live.is_at_work = True

    @property
    def is_adaptive(self) -> bool:
        """Whether anything is decided during training."""
        return self.rank is not None or self.freeze is not None

    def _refuse_what_cannot_adapt(self) -> None:
        word = "rank" if self.rank is not None else "freeze"
        if self.init_lora_weights not in _PLAIN_INITS:
            raise ConfigError(
                "adapter.init",
                self.init_lora_weights,
                f"{word} methods start from LoRA's own factors or the paper's; use true, or drop {word}",
            )
        if self.use_rslora and self.rank is None and self.freeze.has_no_scale:
            raise ConfigError("use_rslora", True, "freeze.scaling=alpha/r or freeze.start=lora; 'none' has no scale")
        for name in (
            "use_dora",
            "lora_bias",
            "use_bdlora",
            "arrow_config",
            "alora_invocation_tokens",
            "velora_config",
            "monteclora_config",
            "kasa_config",
            "target_parameters",
            "layer_replication",
        ):
            if getattr(self, name, None):
                raise ConfigError(name, getattr(self, name), f"does not go together with {word}; drop one of them")
        if self.rank is not None and self.bias != "none":
            raise ConfigError(
                "bias",
                self.bias,
                "a module that is cut to rank 0 is not in the saved adapter, and its "
                "bias would be lost; use 'none', or drop rank",
            )

    def live_ranks(self) -> dict[str, tuple[int, float]]:
        """Site name -> (rank, scale) of the live layers that carry this config's adapter; rank 0 where it was pruned.

        Raises:
            ConfigError: the object serves two adapters whose ranks differ.
        """
        found: dict[str, tuple[int, float]] = {}
        for layer, name in self._live.layers():
            here = layer.r.get(name, 0), layer.scaling.get(name, 1.0)
            if found.setdefault(layer.site_name, here) != here:
                raise ConfigError(
                    "TrimConfig",
                    "one object",
                    "it serves two adapters whose ranks differ; give each a config of its own (copy.deepcopy)",
                )
        return found

    def to_dict(self) -> dict[str, Any]:
        """Stock `LoraConfig` fields that describe the live layers: ranks, alphas and targets match the tensors."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(LoraConfig)}
        out = {k: (dataclasses.asdict(cast(Any, v)) if dataclasses.is_dataclass(v) else v) for k, v in out.items()}
        out.pop("runtime_config")  # as LoraConfig.to_dict does: it holds for one process only
        tied = {*(getattr(self, "target_modules_to_tie", None) or ()), *(getattr(self, "modules_to_tie", None) or ())}
        live = self.live_ranks()
        if (live and not tied) or any(".base_layer" in name for name in tied):
            out["ensure_weight_tying"] = False  # PEFT finds no head inside of another adapter's, and ties nothing
        if self.where is not None:  # PEFT applies the exclusion to modules, and not to parameters
            out["exclude_modules"] = out["exclude_modules"].replace(_WHERE, "")
            parameters = {layer.site_name for layer, _ in self._live.layers() if isinstance(layer, ParamWrapper)}
            if live and self.target_parameters:
                out["target_parameters"] = sorted(parameters) or None
        if live and self.is_adaptive:
            out.update(portable_fields(live))
        elif self._holds_a_start():
            out.update(init_lora_weights=True, **self._patterns_without_start(live))
        elif live:
            out.update({key: _in_any_order(out[key], live) for key in ("rank_pattern", "alpha_pattern") if out[key]})
        return out

    def _patterns_without_start(self, live: dict[str, tuple[int, float]]) -> dict[str, Any]:
        """Twice the rank at the same scale, for the sites that took a part of the base."""
        of_rank = (lambda r: math.sqrt(2 * r)) if self.use_rslora else (lambda r: 2 * r)
        started = {layer.site_name for layer, name in self._live.layers() if name in layer.initial_factors}
        patterns: dict[str, dict[str, Any]] = {
            "rank_pattern": {f"^{re.escape(site)}": 2 * live[site][0] for site in sorted(started)},
            "alpha_pattern": {
                f"^{re.escape(site)}": live[site][1] * of_rank(live[site][0]) for site in sorted(started)
            },
        }
        return {key: _in_any_order(own | getattr(self, key), live) for key, own in patterns.items()}


def _in_any_order(pattern: dict[str, Any], sites: Iterable[str]) -> dict[str, Any]:
    """The same for PEFT, which takes the first key that matches a site, and sorts keys when it writes them."""
    keys = list(pattern)
    if all(get_pattern_key(keys, site) == get_pattern_key(sorted(keys), site) for site in sites):
        return pattern
    made = {}
    for n, key in enumerate(keys):  # each leaves out what those before it take
        taken = "|".join(keys[:n])
        made[rf"^(?!(?:.*\.)?(?:{taken})$)(?:.*\.)?(?:{key})" if taken else key] = pattern[key]
    return made


def _write_without_start(weights: Path, live: Live) -> None:
    """Give a saved adapter twice the rank, on the base as it was; see `without_start`."""
    tensors = load_file(weights)
    for layer, name in live.layers():
        keys = [f"base_model.model.{layer.site_name}.{which}.weight" for which in PROJECTIONS]
        if name in layer.initial_factors and keys[0] in tensors:
            tensors.update(zip(keys, without_start(layer, name, *(tensors[key] for key in keys))))
    save_file(tensors, weights, metadata={"format": "pt"})


def _keys(weights: Path) -> list[str]:
    if weights.name == WEIGHTS_NAME:  # safe_serialization=False
        return list(torch.load(weights, map_location="meta", weights_only=True))
    with safe_open(weights, "pt") as saved:
        return list(cast(Any, saved).keys())


class Live:
    """The layers that carry a config's adapters, held weakly: what they look like now is what is saved."""

    def __init__(self) -> None:
        self._refs: list[tuple[weakref.ref[TrimLayer], str]] = []
        self.model: Callable[[], nn.Module | None] = lambda: None
        """Which model the selection of layers was last held against."""
        self.is_at_work = False
        """Whether the config is a model's own, whose adapter adapts. A copy of it is an ordinary one."""
        self.is_told = False
        """Whether it was said that nobody decides on them."""

    def add(self, layer: TrimLayer, adapter_name: str) -> None:
        self._refs = [(ref, name) for ref, name in self._refs if ref() is not None]
        self._refs.append((weakref.ref(layer), adapter_name))

    def layers(self) -> Iterator[tuple[TrimLayer, str]]:
        """Layers, with the name that the adapter has in them; without those from which it was deleted."""
        for ref, name in self._refs:
            if (layer := ref()) is not None and name in layer.configs:
                yield layer, name

    def keys(self) -> set[tuple[int, str]]:
        return {(id(layer), name) for layer, name in self.layers()}

    def take(self, keys: set[tuple[int, str]]) -> Live:
        """Move some layers, by identity and adapter name, to a registry of their own."""
        taken = Live()
        taken.model = self.model
        kept: list[tuple[weakref.ref[TrimLayer], str]] = []
        for ref, name in self._refs:
            (taken._refs if (id(ref()), name) in keys else kept).append((ref, name))
        self._refs = kept
        return taken


def own_config(model: nn.Module, adapter_name: str) -> LoraConfig:
    """The adapter's config; a `TrimConfig` with an adaptive adapter becomes this model's own, so that whoever made it
    can use it for other models and adapters."""
    peft_model = peft_model_of(model)
    config = peft_model.peft_config[adapter_name]
    layers = list(hosted_layers(model, adapter_name).values())
    if not isinstance(config, TrimConfig) or not layers:
        return cast(LoraConfig, config)
    mine = {(id(layer), adapter_name) for layer in layers}
    if config._live.is_at_work and config._live.keys() == mine:
        return config
    own = copy.copy(config)
    own._live = config._live.take(mine)
    own.put_to_work()
    for layer in layers:
        layer.configs[adapter_name] = own
    peft_model.peft_config[adapter_name] = own
    return own


def settle(model: nn.Module, adapter_name: str) -> None:
    """The ranks are final and the layers hold plain factors: the model's config becomes the stock one of plain LoRA.

    One of a class of the user's own stays of it, with nothing left that decides.
    """
    config = peft_model_of(model).peft_config[adapter_name]
    assert isinstance(config, TrimConfig) and config._live.is_at_work
    fields = portable_fields(config.live_ranks())
    for layer, name in config._live.layers():
        del layer.configs[name]
    config.__dict__.update(fields | {"target_modules": set(fields["target_modules"])})  # as LoraConfig holds them
    if type(config) is not TrimConfig:
        config.where = config.rank = config.freeze = config.budget = None
        config._live = Live()
        return
    for name in {f.name for f in dataclasses.fields(TrimConfig)} - {f.name for f in dataclasses.fields(LoraConfig)}:
        config.__dict__.pop(name, None)
    del config._live
    config._custom_modules = None
    config.__class__ = cast(Any, LoraConfig)


def portable_fields(ranks: dict[str, tuple[int, float]]) -> dict[str, Any]:
    """Config fields for sites of given rank and scale; sites of rank 0 are left out.

    ``lora_alpha / r`` equals the scale of every module even for an engine that ignores the patterns,
    as long as all scales are equal. Pattern keys are full module names, escaped, as PEFT matches regexes.

    Raises:
        ModelError: no site has a rank left; stock PEFT refuses an empty adapter.
    """
    kept = {name: rank_scale for name, rank_scale in ranks.items() if rank_scale[0] > 0}
    if not kept:
        raise ModelError("adapter: every site is at rank 0; stock PEFT cannot load an empty adapter")
    r, scale = max(kept.values())

    def key(name: str) -> str:
        return ("^" if any(other.endswith(f".{name}") for other in kept) else "") + re.escape(name)

    return {
        "r": r,
        "lora_alpha": scale * r,
        "use_rslora": False,
        "init_lora_weights": True,
        "layers_to_transform": None,
        "layers_pattern": None,
        "exclude_modules": None,
        "target_modules": sorted(kept),
        "rank_pattern": {key(n): k for n, (k, _) in sorted(kept.items()) if k != r},
        "alpha_pattern": {key(n): s * k for n, (k, s) in sorted(kept.items()) if s * k != scale * r},
    }


def excluding(where: Where | str, user: str | Iterable[str] | None) -> str:
    """The ``exclude_modules`` regex for a selection, joined with what the user already excludes."""
    outside = _WHERE + (where if isinstance(where, str) else where.outside)
    if not user:
        return outside
    if not isinstance(user, str):
        user = rf"(?:.*\.)?(?:{'|'.join(re.escape(u) for u in user)})"
    elif flags := re.match(r"\(\?([aiLmsux]+)\)", user):  # global flags may stand at the start only: make them local
        user = f"(?{flags[1]}:{user[flags.end() :]})"
    return rf"(?:{user})|{outside}"


def untie_targets(config: Any) -> None:
    """With a selection of layers no adapter lies on the embedding, from which the head could have its own."""
    saved = getattr(config, "modules_to_save", None) or ()
    if hasattr(config, "ensure_weight_tying") and not any(m.split(".")[-1] in EMBEDDING_LAYER_NAMES for m in saved):
        config.ensure_weight_tying = False


_WHERE = "(?#where)"  # a comment, to the regex


def without_where(exclude: str | Iterable[str] | None) -> Any:
    """What the user excludes, without what a selection of layers has added to it."""
    if not isinstance(exclude, str) or _WHERE not in exclude:
        return exclude
    return exclude.partition(_WHERE)[0].removeprefix("(?:").removesuffix(")|") or None  # see `excluding`
