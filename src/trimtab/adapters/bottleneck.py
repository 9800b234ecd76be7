"""Bottleneck adapters: two small dense layers with a non-linearity between them, in each block.

    a(h) = U φ(D h + b1) + b2          D (m, d), U (d, m)

    houlsby    x + f + a(f)            after attention and after the feed-forward; norms train too   1902.00751
    pfeiffer   z = LN(x + f)           after the feed-forward only                                   2005.00247
               LN(x + f + a(z))        with the same norm twice; without one there (pre-LN): x + f + a(f)
    parallel   x + f + s a(x)          beside the feed-forward                                       2110.04366

x enters the sublayer, f leaves it (its dropout included). In a post-LN block a norm follows the sum, as it did
before. For `parallel` x is what enters the feed-forward's first linear: in a pre-LN block that is the normed input.

To its user this is a `PeftModel` of a type of its own: `peft` learns it when both it and `trimtab` are imported,
and without `trimtab` it refuses the saved folder by the name of that type.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers.activations import ACT2FN

from ..errors import ConfigError, ExportError, ModelError, did_you_mean
from ..plans import Where

if TYPE_CHECKING:  # this file is imported while others are still being: as soon as PEFT is
    from .places import Place


class _PeftKind(str):
    """A PEFT type outside of PEFT's own enumeration, which cannot be extended; like its members it has a value."""

    @property
    def value(self) -> str:
        return str(self)


KIND = _PeftKind("TRIMTAB_BOTTLENECK")


class _Defaults(NamedTuple):
    """What a variant does where the user is silent; the papers' own settings."""

    non_linearity: str
    init: str
    init_scale: float
    size: int | None
    reduction_factor: int | None
    scale: float
    train_layer_norms: bool


VARIANTS = {
    "houlsby": _Defaults("gelu", "truncated_normal", 0.01, 64, None, 1.0, True),
    "pfeiffer": _Defaults("relu", "normal", 0.02, None, 16, 1.0, False),
    "parallel": _Defaults("relu", "zero_up", 0.02, None, 2, 4.0, False),
}
INITS = ("truncated_normal", "normal", "zero_up")


# -- the maths -----------------------------------------------------------------------------------------


def bottleneck(h: Tensor, D: Tensor, b1: Tensor, U: Tensor, b2: Tensor, non_linearity: str = "gelu") -> Tensor:
    """``U φ(D h + b1) + b2`` over the last axis of ``h (..., d)``, with ``D (m, d)`` and ``U (d, m)``.

    >>> one = torch.ones(1)
    >>> bottleneck(torch.tensor([[2.0]]), one[:, None], -3 * one, one[:, None], one, "relu")
    tensor([[1.]])
    """
    z = activation(non_linearity)(nn.functional.linear(h, D, b1))  # (..., m)
    return nn.functional.linear(z, U, b2)


class LoraWithBias(NamedTuple):
    """A linear's update as LoRA with scale 1, and what has to be added to its bias."""

    lora_A: Tensor  # (m, in)
    lora_B: Tensor  # (d, m)
    bias: Tensor  # (d,)


def fold(
    W: Tensor, c: Tensor | None, D: Tensor, b1: Tensor, U: Tensor, b2: Tensor, non_linearity: str = "identity"
) -> LoraWithBias:
    """The one bottleneck that is a LoRA: a linear φ, right after a linear ``f = W h + c``, no dropout between.

    ``f + U (D f + b1) + b2 = (W + U D W) h + c + U (D c + b1) + b2``; W is ``(d, in)``.

    Raises:
        ExportError: φ is not linear, so that no weight gives the same function.
    """
    if non_linearity not in ("identity", "linear"):
        raise ExportError(
            f"adapter.non_linearity={non_linearity!r}: a non-linear update fits no weight; "
            "only 'identity' folds into a linear"
        )
    inner = b1 if c is None else D @ c + b1
    return LoraWithBias(D @ W, U, U @ inner + b2)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def activation(name: str) -> nn.Module:
    """A non-linearity by its name: ``identity``, or one of transformers'."""
    return nn.Identity() if name == "identity" else cast(nn.Module, ACT2FN[name])


# -- settings ------------------------------------------------------------------------------------------


@dataclass
class BottleneckConfig(PeftConfig):
    """Settings of bottleneck adapters; goes to stock `peft.get_peft_model`.

    Args:
        variant: ``houlsby``, ``pfeiffer`` or ``parallel``.
        bottleneck_size: the width m; or
        reduction_factor: m is the hidden width divided by this, rounded down, at least 1. Without either:
            64 (houlsby), d/16 (pfeiffer), d/2 (parallel).
        non_linearity: ``gelu`` (houlsby), ``relu`` (the others), ``identity``, or any other of transformers'.
        init: ``truncated_normal`` (houlsby; cut at two standard deviations), ``normal`` (pfeiffer), ``zero_up``
            (parallel; the adapter is nothing at the start). True takes the variant's.
        init_scale: standard deviation of the normal ones: 0.01 (houlsby), 0.02.
        scale: s, for ``parallel``: 4.
        train_layer_norms: the norms of adapted blocks train too; True for houlsby.
        where: a selection of layers; None adapts every layer.
        layers_to_transform: the same by block index, in every stack.
        target_modules: set when the adapter is put on a model: the modules that are wrapped.
        modules_to_save: trained and saved beside the adapter, such as a new head.
    Raises:
        ConfigError: a value that cannot work, alone or together with another.
    """

    variant: str = field(default="houlsby", metadata={"help": "houlsby, pfeiffer or parallel"})
    bottleneck_size: int | None = field(default=None, metadata={"help": "width m of the bottleneck"})
    reduction_factor: int | None = field(default=None, metadata={"help": "m = hidden width // this"})
    non_linearity: str | None = field(default=None, metadata={"help": "between the two dense layers"})
    init: bool | str = field(default=True, metadata={"help": "truncated_normal, normal or zero_up"})
    init_scale: float | None = field(default=None, metadata={"help": "standard deviation at the start"})
    scale: float | None = field(default=None, metadata={"help": "s of the parallel variant"})
    train_layer_norms: bool | None = field(default=None, metadata={"help": "train the norms of adapted blocks"})
    target_modules: Any = field(default=None, metadata={"help": "set by Trimtab: the modules that are wrapped"})
    exclude_modules: Any = field(default=None, metadata={"help": "names or regex of places to leave out"})
    layers_to_transform: Any = field(default=None, metadata={"help": "indices of blocks, in every stack"})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "trained and saved whole"})
    where: Where | None = field(default=None, metadata={"help": "which layers are adapted"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = KIND
        if self.variant not in VARIANTS:
            raise ConfigError(
                "adapter.variant",
                self.variant,
                f"one of {', '.join(VARIANTS)}.{did_you_mean(str(self.variant), VARIANTS)}",
            )
        if isinstance(self.where, str):
            raise ConfigError("where", self.where, "a bare mask needs the model: trimtab.where.from_mask(model, mask)")
        for key in ("bottleneck_size", "reduction_factor"):
            value = getattr(self, key)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"adapter.{key}", value, "a whole number of at least 1")
        if self.bottleneck_size is not None and self.reduction_factor is not None:
            raise ConfigError(
                "adapter.reduction_factor",
                self.reduction_factor,
                f"adapter.bottleneck_size={self.bottleneck_size} is set too; keep one of them",
            )
        if self.non_linearity is not None and self.non_linearity != "identity" and self.non_linearity not in ACT2FN:
            near = did_you_mean(str(self.non_linearity), ["identity", *ACT2FN])
            raise ConfigError(
                "adapter.non_linearity",
                self.non_linearity,
                f"identity, relu, gelu, silu, tanh or another of transformers' activations.{near}",
            )
        if any(True for _ in activation(self.activation_name).parameters()):
            raise ConfigError(
                "adapter.non_linearity",
                self.non_linearity,
                "it has parameters of its own, which would neither train nor be saved; take another",
            )
        if self.init is not True and self.init not in INITS:
            near = did_you_mean(str(self.init), INITS)
            raise ConfigError("adapter.init", self.init, f"true (the variant's) or one of {', '.join(INITS)}.{near}")
        for key in ("init_scale", "scale"):
            value = getattr(self, key)
            if value is not None and not (_is_number(value) and 0 < value < float("inf")):
                raise ConfigError(f"adapter.{key}", value, "a finite number above 0")
        if self.train_layer_norms not in (None, True, False):
            raise ConfigError("adapter.train_layer_norms", self.train_layer_norms, "must be true or false")
        if self.scale is not None and self.variant != "parallel":
            raise ConfigError("adapter.scale", self.scale, f"{self.variant} has none; it is for variant=parallel")
        if isinstance(self.target_modules, str):
            raise ConfigError(
                "adapter.target_modules",
                self.target_modules,
                "the variant says where adapters sit; choose layers with where",
            )

    @property
    def habits(self) -> _Defaults:
        return VARIANTS[self.variant]

    @property
    def activation_name(self) -> str:
        return self.non_linearity or self.habits.non_linearity

    @property
    def trains_norms(self) -> bool:
        return self.habits.train_layer_norms if self.train_layer_norms is None else self.train_layer_norms

    def width(self, hidden_size: int) -> int:
        """The width m of adapters on hidden states of a width.

        >>> BottleneckConfig(variant="pfeiffer").width(768), BottleneckConfig(reduction_factor=100).width(32)
        (48, 1)
        """
        size = self.bottleneck_size
        factor = self.reduction_factor
        if size is None and factor is None:
            size, factor = self.habits.size, self.habits.reduction_factor
        return size if size is not None else max(1, hidden_size // cast(int, factor))

    def places(self, model: nn.Module) -> dict[str, Place]:
        """What this config wraps in a model, by module name.

        Raises:
            ModelError: the model has no such places.
            ConfigError: ``where`` belongs to another model.
        """
        from .places import find_places

        indices = self.layers_to_transform
        layers = None if indices is None else (indices,) if isinstance(indices, int) else tuple(indices)
        found = find_places(model, cast(Any, self.variant), self.trains_norms, self.where, layers)
        if self.target_modules is None and not self.exclude_modules:
            return found
        chosen = copy.copy(self)
        chosen.target_modules = set(found) if self.target_modules is None else set(self.target_modules)
        for target in sorted(chosen.target_modules):
            if not any(name == target or name.endswith(f".{target}") for name in found):
                raise ModelError(
                    f"target_modules: {target!r} is no place of variant={self.variant} in this model; "
                    "leave target_modules unset, and choose layers with where"
                )
        return {n: p for n, p in found.items() if BottleneckModel._check_target_module_exists(chosen, n)}

    def to_dict(self) -> dict[str, Any]:
        """As PEFT saves it: the modules that are wrapped say where the adapters sit."""
        out = asdict(self) | {"peft_type": str(KIND)}
        del out["where"]
        if self.target_modules is not None:
            out["target_modules"] = sorted(self.target_modules)
        return out


def why_not_lora(config: BottleneckConfig) -> str:
    """The reason that an adapter cannot be folded into the model's weights, in words."""
    reason = f"its {config.activation_name} is not linear, so that no weight gives the same function"
    if config.activation_name in ("identity", "linear"):
        reason = {
            "houlsby": "it changes biases too, which a LoRA does not hold (adapters.bottleneck.fold gives both)",
            "pfeiffer": "a norm stands between it and the weights",
            "parallel": "it goes round the feed-forward, which is not linear",
        }[config.variant]
    return f"bottleneck adapters have no LoRA or merged form: {reason}. model.save_pretrained keeps the adapter"


# -- inside PEFT ---------------------------------------------------------------------------------------


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Around one module: its output, or the norm that it is, with an adapter."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up", "bottleneck_norm")
    other_param_names = ("r", "places", "scaling", "activations")

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.ModuleDict()
        self.bottleneck_up = nn.ModuleDict()
        self.bottleneck_norm = nn.ModuleDict()
        self.r: dict[str, int] = {}
        """Width m by adapter; 0 where only a norm trains."""
        self.places: dict[str, Place] = {}
        self.scaling: dict[str, float] = {}
        self.activations: dict[str, nn.Module] = {}
        self.merged_adapters: list[str] = []
        self._beside: Tensor | None = None
        self._hooks: dict[str, Any] = {}

    def add(
        self,
        adapter_name: str,
        place: Place,
        config: BottleneckConfig,
        first: nn.Module | None,
        device: torch.device | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Give the module one more adapter, at its start.

        Args:
            first: the linear whose input a `parallel` adapter reads.
        """
        self.places[adapter_name] = place
        self.scaling[adapter_name] = config.scale or config.habits.scale
        self.activations[adapter_name] = activation(config.activation_name)
        self.r[adapter_name] = 0
        if place.how is not None:
            m = self.r[adapter_name] = config.width(place.size)
            down = nn.Linear(place.size, m, device=device, dtype=dtype)
            up = nn.Linear(m, place.size, device=device, dtype=dtype)
            _start(down, up, config)
            self.bottleneck_down[adapter_name], self.bottleneck_up[adapter_name] = down, up
        if place.trains_norm:
            self.bottleneck_norm[adapter_name] = copy.deepcopy(self.base_layer)
        if first is not None:
            self._hooks[adapter_name] = first.register_forward_pre_hook(self._keep_input)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def let_go(self, adapter_name: str | None = None) -> None:
        """Take the hooks of one adapter, or of all, off the modules beside this one."""
        for name in [adapter_name] if adapter_name else list(self._hooks):
            if name in self._hooks:
                self._hooks.pop(name).remove()
        self._beside = None

    def delete_adapter(self, adapter_name: str) -> None:
        self.let_go(adapter_name)
        super().delete_adapter(adapter_name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name = self._active()
        if name is None:
            return self.base_layer(*args, **kwargs)
        how = self.places[name].how
        if how == "around":
            u = args[0]  # x + f
            return self._norm(name, u + self._adapter(name, self._norm(name, u)))
        f = self._norm(name, *args, **kwargs)
        if how is None:
            return f
        x = f
        if how == "beside":
            if self._beside is None:
                raise ModelError(
                    f"{self.places[name].name}: the feed-forward was left without its first linear "
                    "being called; variant=parallel does not fit this model"
                )
            x, self._beside = self._beside, None
        return f + (self.scaling[name] * self._adapter(name, x)).to(f.dtype)

    def _active(self) -> str | None:
        names = [n for n in self.active_adapters if n in self.r]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ModelError(f"adapters {', '.join(names)}: one bottleneck adapter at a time; set_adapter to one")
        return names[0]

    def _norm(self, name: str, *args: Any, **kwargs: Any) -> Tensor:
        """The base module, or the adapter's own copy of the norm that it is."""
        if name not in self.bottleneck_norm:
            return self.base_layer(*args, **kwargs)
        norm, u = self.bottleneck_norm[name], args[0]
        return norm(u.to(cast(Tensor, norm.weight).dtype)).to(u.dtype)

    def _adapter(self, name: str, h: Tensor) -> Tensor:
        down, up = self.bottleneck_down[name], self.bottleneck_up[name]
        z = self.activations[name](down(self._cast_input_dtype(h, cast(Tensor, down.weight).dtype)))
        return up(z).to(h.dtype)

    def _keep_input(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self._active()
        if name is not None and self.places[name].how == "beside":
            self._beside = args[0]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        raise ExportError(
            why_not_lora(
                BottleneckConfig(
                    variant={"after": "houlsby", "around": "pfeiffer", "beside": "parallel"}.get(
                        str(next(iter(self.places.values())).how), "houlsby"
                    )
                )
            )
        )

    def unmerge(self) -> None:
        pass


def _start(down: nn.Linear, up: nn.Linear, config: BottleneckConfig) -> None:
    how = config.habits.init if config.init is True else config.init
    sigma = config.init_scale or config.habits.init_scale
    with torch.no_grad():
        nn.init.zeros_(down.bias)
        nn.init.zeros_(up.bias)
        if how == "zero_up":
            nn.init.kaiming_uniform_(down.weight, a=5**0.5)
            nn.init.zeros_(up.weight)
            return
        for linear in (down, up):
            if how == "normal":
                nn.init.normal_(linear.weight, std=sigma)
            else:  # the cut makes the standard deviation 0.88 of what is asked for
                nn.init.trunc_normal_(linear.weight, std=sigma, a=-2 * sigma, b=2 * sigma)


class BottleneckModel(BaseTuner):
    """What PEFT builds for a `BottleneckConfig`."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer
    target_module_mapping = {}  # noqa: RUF012 (an annotation would contradict PEFT's)

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        config = cast(BottleneckConfig, peft_config)
        if config.target_modules is None:
            config.target_modules = set(config.places(self.model))
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        self._places = cast(BottleneckConfig, peft_config).places(model)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        config = cast(BottleneckConfig, peft_config)
        place = self._places.get(current_key)
        if place is None:
            raise ModelError(
                f"target_modules: {current_key!r} is no place of variant={config.variant}; leave "
                "target_modules unset, and choose layers with where"
            )
        projection = self.model.get_submodule(place.projection)
        layer = target if isinstance(target, BottleneckLayer) else BottleneckLayer(target)
        device, dtype = layer._get_base_layer_device_and_dtype(_base(projection))
        dtype = dtype if dtype is not None and dtype.is_floating_point else None
        first = self.model.get_submodule(place.beside) if place.beside else None
        if adapter_name not in self.active_adapters:
            layer._active_adapter = self.active_adapters  # an added adapter does not become active
        else:
            layer._active_adapter = adapter_name
        layer.add(adapter_name, place, config, first, device, dtype)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own looks for a weight, which a dropout has not

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
        if merge:
            self._check_merge_allowed()
        for module in self.model.modules():
            if isinstance(module, BottleneckLayer):
                module.let_go()
        return super()._unload_and_optionally_merge(False, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        raise ExportError(why_not_lora(cast(BottleneckConfig, self.peft_config[self.active_adapters[0]])))

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        self._check_merge_allowed()


def _base(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _register() -> None:
    """Make the type known to PEFT; what `peft.utils.register_peft_method` does for the types of its enumeration."""
    kind = cast(Any, KIND)
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = BottleneckConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = BottleneckModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = BottleneckModel.prefix


_register()
