"""Trimtab's layer inside PEFT. Only this folder and `adapters` touch what PEFT does not export.

What we lean on, so that a new PEFT can be checked against it (see tests/promises/test_drop_in.py):
`LoraConfig._register_custom_module` (documented, experimental), `lora.Linear` with `update_layer`,
`get_delta_weight`, `_mixed_batch_forward`, `adapter_layer_names`, `frozen_peft_weight_names`,
`_active_adapter`, `_disable_adapters`, `merged_adapters`, `lora_variant`, and the rule that a parameter
whose path holds ``lora_`` belongs to the adapter.

The state dict of a hosted layer *is* a LoRA: a post hook folds the diagonals into A and B, a pre hook
accepts such tensors back. PEFT's save, Trainer's checkpoints and load-best therefore need no special case.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import ParamWrapper as PeftParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..adapters import fused
from ..adapters.gated import gated
from ..adapters.lowrank import delta_weight, fold, lowrank_delta
from ..errors import ConfigError, ModelError
from .adapted import callers, calls_of_peft, peft_model_of
from .sharding import is_dtensor

if TYPE_CHECKING:
    from .config import TrimConfig

PROJECTIONS = ("lora_A", "lora_B")
DIAGONALS = ("lora_e", "lora_b")
REPLICAS = (
    "nn.DataParallel, whose copies lose what a rank or freeze method adds to a layer; start one process a GPU "
    "(torchrun --nproc-per-node N script.py), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
)


def changes_base(init: bool | str) -> bool:
    """Whether a start takes from the base's weights what it puts into the adapter."""
    return isinstance(init, str) and init.startswith(("pissa", "corda", "olora", "lora_ga", "loftq"))


def is_drawn(init: bool | str) -> bool:
    """Whether such a start comes out otherwise each time: a saved adapter has to hold it, since the base that stock
    PEFT would make of the original one is another than this run's."""
    return isinstance(init, str) and init.startswith("pissa_niter")


@dataclass
class Hosted:
    """What a layer keeps for one adaptive adapter, beside its tensors."""

    scale: float
    initial_r: int
    frozen: set[str] = field(default_factory=set)
    resting: tuple[str, ...] = ()
    """Diagonals that are at rest, at one, until a projection of the layer freezes."""
    is_stale: bool = False
    """Tensors from elsewhere were loaded: a running controller's state no longer describes them."""
    was_loaded: bool | None = None
    """Whether the tensors that were loaded last had any for it."""
    is_decided: bool = False
    """A controller is at work."""
    in_charge: object = None
    """Mark of the controller that took the steps so far."""
    awaits_start: bool = False
    """Ranks and factors are still to be chosen by a probe (`trimtab.initialize_ranks`), or come with a checkpoint."""
    starts_at_ones: bool = False
    """Its diagonals began as ones, so that the plain LoRA of its start is all of it."""
    seen: float | None = None
    """Sum of the factors in the first forward pass that took gradients without one."""


# At run time a mixin: each hosted class names its own PEFT layer after it.
if TYPE_CHECKING:
    _Mixed = PeftLinear
else:
    _Mixed = LoraLayer


class TrimLayer(_Mixed):
    """Mixin over PEFT's LoRA layers: adds the diagonals e and b, ranks that change, projections that freeze."""

    adapter_layer_names = (*LoraLayer.adapter_layer_names, *DIAGONALS)
    # PEFT deletes an adapter's entry from each of these.
    other_param_names = (*LoraLayer.other_param_names, "hosted", "finished", "initial_factors", "configs")

    lora_e: nn.ParameterDict
    lora_b: nn.ParameterDict
    _active_adapter: str | list[str]

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        if "lora_e" not in self._modules:  # PEFT walks adapter_layer_names inside super().update_layer
            self.lora_e, self.lora_b = nn.ParameterDict(), nn.ParameterDict()
            self.hosted: dict[str, Hosted] = {}
            self.finished: dict[str, bool] = {}  # adapters whose run ended; no set, since PEFT deletes by key
            self.configs: dict[str, TrimConfig] = {}
            self.initial_factors: dict[str, tuple[Tensor, Tensor]] = {}
            self.frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}
            self.site_name = kwargs.get("target_name") or self.__dict__.get("site_name", "")
            self.register_state_dict_post_hook(_emit_plain_lora)
            self.register_load_state_dict_pre_hook(_accept_plain_lora)
        _refuse_tools_for_plain_factors(self)
        if adapter_name in self.hosted:  # get_peft_model once more on the same base, as of a notebook's cell run twice
            self.delete_adapter_here(adapter_name)
        self.finished.pop(adapter_name, None)
        if hasattr(config, "_live"):
            cast("TrimConfig", config).check_model()
        super().update_layer(adapter_name, r, lora_alpha=cast(int, lora_alpha), config=config, **kwargs)
        if not hasattr(config, "_live"):  # a stock one
            return
        config = cast("TrimConfig", config)
        self.configs[adapter_name] = config
        config._live.add(self, adapter_name)
        # Export needs the start: the base is no longer the original. LoftQ rounds it, and no factors undo that.
        if changes_base(config.init_lora_weights) and config.init_lora_weights != "loftq":
            A, B = self.factors(adapter_name)
            self.initial_factors[adapter_name] = A.detach().clone(), B.detach().clone()
        if config.is_adaptive:
            self._become_adaptive(adapter_name, r, lora_alpha, config)

    def _become_adaptive(self, adapter_name: str, r: int, alpha: float, config: TrimConfig) -> None:
        A, B = self.factors(adapter_name)
        base: Any = self.get_base_layer()
        if is_dtensor(base.weight) and (A.shape[1], B.shape[0]) != (base.in_features, base.out_features):
            raise ModelError(
                f"{self.site_name}: its weight lies on a mesh of dimensions {base.weight.device_mesh.mesh_dim_names}, "
                "which PEFT takes for tensor parallelism: its factors are no whole ones, and rank and freeze methods "
                "need those; shard by FSDP2, over a mesh whose one dimension is called 'fsdp', or put the adapter on "
                "first"
            )
        rank, freeze = config.rank, config.freeze
        wants_b = freeze is not None and freeze.needs_output_diagonal
        has_e = rank is not None and rank.has_e
        if has_e or wants_b:
            self.lora_e[adapter_name] = nn.Parameter(torch.ones(r, dtype=A.dtype, device=A.device))
        if wants_b:
            self.lora_b[adapter_name] = nn.Parameter(torch.ones(B.shape[0], dtype=B.dtype, device=B.device))
        e, b = self.diagonals(adapter_name)
        scale = self.scaling[adapter_name]
        never_trains = freeze is not None and freeze.initially_frozen(self.site_name)
        alpha = alpha * math.sqrt(r) if config.use_rslora else alpha
        is_real = A.device.type != "meta"
        has_starter = rank is not None and rank.starter is not None
        if has_starter and never_trains:
            raise ConfigError(
                "freeze.trainable_projections",
                getattr(freeze, "trainable_projections", None),
                f"with rank.start={rank.starter.method} every site's projections train at first; drop one of them",
            )
        if rank is not None and rank.start == "svd":  # where both meet, the rank method's start and scale win
            scale = rank.scale(alpha, r)
            if is_real:
                rank.init_factors(A.data, self.rank_diagonal(adapter_name).data, B.data)
        elif wants_b and (never_trains or (rank is None and freeze.start == "svd")):  # B = 0 would stay so
            scale = freeze.scale(alpha, r) if rank is None and freeze.start == "svd" else scale
            if is_real:
                own_e = None if has_e or e is None else e.data
                freeze.init_factors(A.data, own_e, None if b is None else b.data, B.data)
        resting = () if freeze is None or not freeze.rests else DIAGONALS[has_e:]
        at_ones = is_real and all(bool((p == 1).all()) for p in self.diagonals(adapter_name) if p is not None)
        self.hosted[adapter_name] = Hosted(scale, r, resting=resting, awaits_start=has_starter, starts_at_ones=at_ones)
        self.scaling[adapter_name] = scale
        self._set_rank(adapter_name, r)
        if never_trains:
            for which in PROJECTIONS:
                self.freeze(adapter_name, which)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copied or unpickled layer: its config, copied with it, learns of it."""
        super().__setstate__(state)
        self.__dict__.setdefault("finished", {})  # of a layer that was saved before there was one
        for name, config in self.configs.items():
            config._live.add(self, name)
            if (hosted := self.hosted.get(name)) is not None and hosted.is_decided:
                hosted.is_decided, hosted.in_charge = False, None  # the controller works on the original
                config.put_to_work()

    # -- what others read ---------------------------------------------------------------------------

    def is_adaptive(self, adapter_name: str) -> bool:
        return adapter_name in self.hosted

    def diagonals(self, adapter_name: str) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The parameters ``(e, b)`` of shapes (r,) and (out,); None where there is none."""
        modules: Any = self._modules  # asked at every step; see `_fused`
        return modules["lora_e"]._parameters.get(adapter_name), modules["lora_b"]._parameters.get(adapter_name)

    def at_work(self, adapter_name: str) -> tuple[nn.Parameter | None, nn.Parameter | None]:
        """The diagonals ``(e, b)`` that are part of the function now."""
        e, b = self.diagonals(adapter_name)
        if b is None or (hosted := self.hosted[adapter_name]).frozen or not hosted.resting:
            return e, b
        return (None if "lora_e" in hosted.resting else e), None

    def resting(self, adapter_name: str) -> list[nn.Parameter]:
        """The diagonals that wait for the first freeze: they hold ones and get no gradient."""
        pairs = zip(self.diagonals(adapter_name), self.at_work(adapter_name))
        return [p for p, working in pairs if p is not None and working is None]

    def rank_diagonal(self, adapter_name: str) -> nn.Parameter:
        """``e`` of shape (r,), where there must be one."""
        e, _ = self.diagonals(adapter_name)
        assert e is not None, f"{self.site_name} has no rank diagonal"
        return e

    def widths(self) -> tuple[int, int]:
        """(in_features, out_features) of the base layer."""
        assert self.in_features is not None and self.out_features is not None
        return self.in_features, self.out_features

    def factors(self, adapter_name: str) -> tuple[nn.Parameter, nn.Parameter]:
        """The raw parameters ``(A, B)`` of shapes (r, in) and (out, r)."""
        # Asked for every site several times a step: nn.Module's attribute look-up would be most of what it costs.
        own: Any = self._modules
        return (
            own["lora_A"]._modules[adapter_name].weight,
            own["lora_B"]._modules[adapter_name].weight,
        )

    def folded(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """The LoRA form ``(A', B')``, detached."""
        A, B = self.factors(adapter_name)
        e, b = self.at_work(adapter_name)
        return fold(A.detach(), B.detach(), None if e is None else e.detach(), None if b is None else b.detach())

    # -- what controllers do ------------------------------------------------------------------------

    def freeze(self, adapter_name: str, which: str) -> nn.Parameter:
        """Stop training projection ``which`` ("lora_A" or "lora_B") for good; returns the parameter."""
        if which == "lora_B":
            self._keep_alive(adapter_name)
        self.hosted[adapter_name].frozen.add(which)
        self.frozen_peft_weight_names[adapter_name] = tuple(sorted(self.hosted[adapter_name].frozen))
        parameter = getattr(self, which)[adapter_name].weight
        parameter.requires_grad_(False)
        parameter.grad = None
        return parameter

    @torch.no_grad()
    def _keep_alive(self, adapter_name: str) -> None:
        """Columns of B that are zero when it freezes (masked ranks, a first step at rate 0) could never be anything
        else: they get AFLoRA's random start and ``e`` takes over the zero, so that the function stays the same."""
        B, e = self.factors(adapter_name)[1], self.diagonals(adapter_name)[0]
        if e is None or B.device.type == "meta" or not (dead := ~B.any(dim=0)).any():
            return
        seed = int(hashlib.sha256(self.site_name.encode()).hexdigest()[:8], 16)  # the same on every process
        fresh = torch.empty(B.shape, dtype=torch.float32)
        nn.init.kaiming_uniform_(fresh, a=0, generator=torch.Generator().manual_seed(seed))
        B.copy_(torch.where(dead, fresh.to(B), B))
        e.masked_fill_(dead.to(e.device), 0.0)

    def begin(self, adapter_name: str, A: Tensor, B: Tensor) -> None:
        """Take a start of another rank, before anything has trained. Args: A: (r, in). B: (out, r)."""
        e, _ = self.diagonals(adapter_name)
        for parameter, start in zip(self.factors(adapter_name), (A, B)):
            set_data(parameter, start.to(parameter).contiguous())  # as a resumed run holds it, to the bit
        if e is not None:
            set_data(e, e.new_ones(A.shape[0]))
        self.hosted[adapter_name].initial_r = A.shape[0]
        self.hosted[adapter_name].awaits_start = False
        self.resized(adapter_name)

    def widen(self, adapter_name: str) -> bool:
        """Bring half-precision factors and diagonals to float32; whether there were any.

        A rank diagonal near 1 cannot take a step of 1e-3 in bfloat16, so that it would never shrink.
        """
        own = [p for p in (*self.factors(adapter_name), *self.diagonals(adapter_name)) if p is not None]
        narrow = [p for p in own if p.dtype in (torch.bfloat16, torch.float16)]
        for p in narrow:
            p.data = p.data.float()
        return bool(narrow)

    def resized(self, adapter_name: str) -> None:
        """Bring PEFT's bookkeeping in line after the factors' rank changed."""
        A, _ = self.factors(adapter_name)
        cast(nn.Linear, self.lora_A[adapter_name]).out_features = A.shape[0]
        cast(nn.Linear, self.lora_B[adapter_name]).in_features = A.shape[0]
        self._set_rank(adapter_name, A.shape[0])

    def finish(self, adapter_name: str) -> None:
        """Fold e and b into A and B in place; a layer of rank 0 lets go of the adapter. Plain LoRA from here on."""
        folded_a, folded_b = self.folded(adapter_name)
        A, B = self.factors(adapter_name)
        with torch.no_grad():
            A.copy_(folded_a)
            B.copy_(folded_b)
        for diagonal in (self.lora_e, self.lora_b):
            if adapter_name in diagonal:
                del diagonal[adapter_name]
        frozen = self.hosted.pop(adapter_name).frozen
        self.frozen_peft_weight_names.pop(adapter_name, None)
        if adapter_name in self.active_adapters:  # what froze during the run trains on; what the user froze does not
            for which in frozen:
                getattr(self, which)[adapter_name].weight.requires_grad_(True)
        if A.shape[0] == 0:
            self.delete_adapter_here(adapter_name)
        self.finished[adapter_name] = True

    def delete_adapter_here(self, adapter_name: str) -> None:
        """Forget the adapter in this layer only; which adapters are active elsewhere does not change."""
        active: str | list[str] = self._active_adapter
        for attribute in (*self.adapter_layer_names, *self.other_param_names):
            holder = getattr(self, attribute)
            if adapter_name in holder:
                del holder[adapter_name]
        self.frozen_peft_weight_names.pop(adapter_name, None)
        self._active_adapter = active

    def _set_rank(self, adapter_name: str, r: int) -> None:
        # lora_alpha follows the rank, so that PEFT's own set_scale and unscale_layer recompute the same number.
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = self.hosted[adapter_name].scale * r
        self.use_rslora[adapter_name] = False

    def set_scale(self, adapter: str, scale: float) -> None:
        if self.r.get(adapter, 1) > 0:
            super().set_scale(adapter, scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        if all(self.r.get(name, 1) > 0 for name in self.active_adapters):
            super().unscale_layer(scale)

    # -- the function -------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        if not self.is_adaptive(adapter):
            return super().get_delta_weight(adapter)
        A, B = self.factors(adapter)
        delta = delta_weight(A, B, self.scaling[adapter], *self.at_work(adapter))
        return delta.T if getattr(self, "fan_in_fan_out", False) else delta

    def _look_for_a_controller(self) -> None:
        """Say once that an adaptive adapter trains and nobody decides.

        Trains: A was changed since an earlier forward pass that took gradients.
        """
        for name, hosted in self.hosted.items():
            if hosted.is_decided or (live := self.configs[name]._live).is_told or torch.compiler.is_compiling():
                continue
            A, B = self.factors(name)
            if name not in self.active_adapters or not (A.requires_grad or B.requires_grad):
                continue
            if self._is_missing(name):
                raise ModelError(
                    f"adapter {name!r}: the tensors that were loaded have none for {self.site_name!r}, as where a rank "
                    "method had cut it to rank 0, and nothing restores that: add trimtab.TrimCallback() to the "
                    "Trainer's callbacks, or make and load the trimtab.Controller; to train on without, load the "
                    "checkpoint with PeftModel.from_pretrained(..., is_trainable=True)"
                )
            now = float(A.detach().sum() + B.detach().sum())
            if hosted.seen is None:
                hosted.seen = now
            elif hosted.seen != now:
                live.is_told = True
                warnings.warn(
                    f"adapter {name!r} has a rank or freeze method, but nothing decides: add trimtab.TrimCallback() to "
                    "the Trainer's callbacks, or put trimtab.Controller around optimizer.step()",
                    stacklevel=2,
                )

    def _is_missing(self, name: str) -> bool:
        """Whether other sites got tensors in the last load, and this one none: it was at rank 0, and so are an
        optimizer's moments of it, beyond whose end a fused one would read."""
        return self.hosted[name].was_loaded is False and any(
            (its := other.hosted.get(own)) is not None and its.was_loaded
            for other, own in self.configs[name]._live.layers()
        )

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if "_is_replica" in self.__dict__ and self.hosted:
            raise ModelError(f"model: it is in {REPLICAS}")
        if self.hosted and self.training and torch.is_grad_enabled():
            self._look_for_a_controller()
        if not args and (not kwargs or all(v is None for v in kwargs.values())):
            result = self._fused(x)
            if result is not None:
                return result
        names = [n for n in self.active_adapters if n in self.lora_A]
        mixed = kwargs.get("adapter_names") is not None
        if mixed or self.disable_adapters or self.merged or not self._is_ours(names, x, kwargs):
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        dtype = result.dtype
        for name in names:
            result = self._added(result, name, x)
        return result.to(dtype)

    def _is_ours(self, names: list[str], x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the adapters' part is made here, and not by PEFT."""
        return any(self.is_adaptive(name) for name in names)

    def _can_add(self, name: str, x: Tensor) -> bool:
        """Whether `fused.lowrank_added` may stand for an adapter's part."""
        return _drop_rate(self.lora_dropout[name]) is not None and fused.can_add(
            x, self.lora_A[name], self.lora_B[name]
        )

    def _fused(self, x: Tensor) -> Tensor | None:
        """Base and adapter in one function, plain LoRA included; None where the plain formula has to do it."""
        if self._disable_adapters or self.merged_adapters:
            return None
        # Straight from the dictionaries: on small inputs nn.Module's attribute look-up costs as much as the products.
        modules: Any = self._modules
        downs, active = modules["lora_A"]._modules, self._active_adapter
        present = [active] if isinstance(active, str) else [n for n in active if n in downs]
        if len(present) != 1:
            return None
        name = present[0]
        base, down, up = modules["base_layer"], downs.get(name), modules["lora_B"]._modules.get(name)
        if down is None or name in self.lora_variant or not fused.can_fuse(x, base, down, up):
            return None
        if (p := _drop_rate(modules["lora_dropout"]._modules[name])) is None:
            return None
        (weight, bias), (A, _), (B, _) = _weights(base), _weights(down), _weights(up)
        # A hook may have kept x to ask for its gradient, which then has to be part of the graph.
        source = gated(x) if self.training and not fused.has_hooks(self) else None
        return fused.lowrank_linear(x, weight, bias, A, B, self.scaling[name], *self.at_work(name), p, source)

    def _added(self, result: Tensor, name: str, x: Tensor) -> Tensor:
        """What the base gave, and the adapter's part."""
        A, B = self.factors(name)
        if (variant := self.lora_variant.get(name)) is not None:  # of one beside an adaptive one: DoRA and the like
            return variant.forward(self, active_adapter=name, x=self._cast_input_dtype(x, A.dtype), result=result)
        e, b = self.at_work(name)
        if e is not None and e.device.type == "meta" != x.device.type:
            raise ModelError(
                f"adapter {name!r}: its diagonals were offloaded, and accelerate brings back only what a module holds "
                "that is called; load what the model saved, which is plain LoRA"
            )
        if type(result) is Tensor and self._can_add(name, x):
            p = _drop_rate(self.lora_dropout[name]) or 0.0
            return fused.lowrank_added(result, x, A, B, self.scaling[name], e, b, p)
        x = self.lora_dropout[name](self._cast_input_dtype(x, A.dtype))
        down, up = self.lora_A[name], self.lora_B[name]
        if fused.is_plain_linear(down) and fused.is_plain_linear(up) and up.bias is None:
            return result + lowrank_delta(x, A, B, self.scaling[name], e, b)
        h = down(x)  # hooks on the factors, and modules in their place, are called
        y = up(h if e is None else h * e)
        return result + (y if b is None else y * b) * self.scaling[name]

    def _mixed_batch_forward(self, x: Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Tensor:
        if not any(self.is_adaptive(n) for n in set(adapter_names)):
            return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        raise ModelError(
            f"adapter_names={sorted(set(adapter_names))}: mixed batches need plain LoRA layers; "
            "call trimtab's Controller.finish(), or load the checkpoint with stock PEFT"
        )


# Tools of PEFT that read or write A and B as if nothing else were part of the function -> their word for the adapter.
_FOR_PLAIN_FACTORS = {
    "add_weighted_adapter": "adapters",
    "reduce_intruder_dimension": "old_adapter_name",
    "hotswap_adapter_from_state_dict": "adapter_name",
}


def _refuse_tools_for_plain_factors(layer: TrimLayer) -> None:
    """Called where they make an adapter or ask for a state dict, before they touch anything. No argument tells."""
    for function, its in calls_of_peft() if layer.hosted else ():
        word = _FOR_PLAIN_FACTORS.get(function)
        if word is None:
            continue
        named = its[word]
        named = layer.hosted.keys() & ({named} if isinstance(named, str) else set(named))
        if not any(layer.hosted[one].is_decided or any(p is not None for p in layer.at_work(one)) for one in named):
            continue  # A and B are all that there is
        if word == "adapters":  # it has entered the one that it makes already
            its["self"].delete_adapter(its["adapter_name"])
        cure = "PEFT's adapter tools know A and B alone; call Controller.finish() first, or load what the model saved"
        raise ConfigError("adapter", "still adapting", cure)


def _emit_plain_lora(layer: TrimLayer, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    _refuse_tools_for_plain_factors(layer)
    for name in layer.hosted:
        A, B = layer.folded(name)
        for diagonal in DIAGONALS:
            state_dict.pop(f"{prefix}{diagonal}.{name}", None)
        keys = [f"{prefix}{which}.{name}.weight" for which in PROJECTIONS]
        for key, tensor in zip(keys, (A, B)):
            if A.shape[0] == 0:  # a module without ranks has no adapter, and stock PEFT knows no rank 0
                state_dict.pop(key, None)
            elif key in state_dict:
                state_dict[key] = tensor


def _accept_plain_lora(layer: TrimLayer, state_dict: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Take a plain LoRA's tensors, or recognise our own fold coming back and change nothing."""
    bare = [part for part in ("weight", "bias") if f"{prefix}{part}" in state_dict]
    for part in bare if bare and _is_of_an_adapted_model() else ():  # a finished one, nothing is around this site in it
        state_dict.setdefault(f"{prefix}base_layer.{part}", state_dict.pop(f"{prefix}{part}"))
    _name_what_is_nameless(layer, state_dict, prefix)
    for name in layer.initial_factors:
        _accept_a_start(layer, name, state_dict, prefix)
    for name in layer.finished:
        _refuse_another_rank(layer, name, state_dict, prefix)
    for name, hosted in layer.hosted.items():
        key_a, key_b = (f"{prefix}{which}.{name}.weight" for which in PROJECTIONS)
        own = {f"{prefix}{d}.{name}": p for d, p in zip(DIAGONALS, layer.diagonals(name)) if p is not None}
        A, B = layer.factors(name)
        hosted.was_loaded = key_a in state_dict or bool(own.keys() & state_dict.keys())
        if own.keys() & state_dict.keys():
            _accept_raw_factors(layer, name, state_dict, {key_a: A, key_b: B, **own})
            continue
        if key_a not in state_dict or key_b not in state_dict:
            if A.shape[0] == 0:
                state_dict.update({key_a: A.data, key_b: B.data})
            elif (is_empty := A.device.type == "meta") or any(k.startswith(f"{prefix}base_layer.") for k in state_dict):
                # A whole model was saved with this site at rank 0, or it holds nothing else (low_cpu_mem_usage): it
                # adds nothing, until `trim_state` cuts it.
                hosted.is_stale = True
                device: Any = layer.get_base_layer().weight.device
                new_a = nn.init.kaiming_uniform_(torch.empty_like(A, device=device)) if is_empty else A.data
                state_dict.update({key_a: new_a, key_b: torch.zeros_like(B.data, device=device)})
                if is_empty:
                    state_dict.update({key: torch.ones_like(p.data, device=device) for key, p in own.items()})
                    continue
            state_dict.update({key: p.data for key, p in own.items()})
            continue
        new_a, new_b = state_dict[key_a], state_dict[key_b]
        folded_a, folded_b = layer.folded(name)
        if A.device.type != "meta" and _same(folded_a, new_a) and _same(folded_b, new_b):
            state_dict.update({key_a: A.data, key_b: B.data, **{key: p.data for key, p in own.items()}})
            continue
        # A start that adds nothing is no run's: weights are given back so after a search for a learning rate.
        is_start = not hosted.is_decided and hosted.starts_at_ones and new_a.shape[0] == hosted.initial_r
        hosted.is_stale = not is_start or bool(new_b.any())
        _make_room(layer, name, new_a.shape[0])
        for key, parameter in own.items():
            device = new_a.device if parameter.device.type == "meta" else parameter.device
            state_dict[key] = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)


def _is_of_an_adapted_model() -> bool:
    """Whether what is being loaded holds an adapter. A base's own tensors, for which PEFT has no place either, do not
    say that a site was cut to nothing; and a layer is shown those of its own name alone."""
    for frame in callers():
        if frame.f_code is nn.Module.load_state_dict.__code__:
            return any(".lora_" in key for key in frame.f_locals["state_dict"])
    return False


def _name_what_is_nameless(layer: TrimLayer, state_dict: dict[str, Any], prefix: str) -> None:
    """PEFT names an adapter's keys after those that the model has now: finds none where no rank is left, nor of
    diagonals, and leaves out what has no name without a word. Which adapter they are of, its caller knows."""
    endings = [*(f"{which}.weight" for which in PROJECTIONS), *DIAGONALS]
    nameless = [ending for ending in endings if f"{prefix}{ending}" in state_dict]
    for function, its in calls_of_peft() if nameless else ():
        if function == "set_peft_model_state_dict":
            name = its["adapter_name"]
            for ending in nameless if name in layer.hosted or name in layer.finished else ():
                which, dot, weight = ending.partition(".")
                state_dict[f"{prefix}{which}.{name}{dot}{weight}"] = state_dict.pop(f"{prefix}{ending}")
            return


@torch.no_grad()
def _accept_a_start(layer: TrimLayer, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    """Take apart what `without_start` put together; the base becomes the one that was trained on."""
    key_a, key_b = (f"{prefix}{which}.{name}.weight" for which in PROJECTIONS)
    r = layer.r[name]
    if key_a not in state_dict or key_b not in state_dict or state_dict[key_a].shape[0] != 2 * r:
        return
    (A, its_a), (B, its_b) = state_dict[key_a].split(r), state_dict[key_b].split(r, dim=1)
    state_dict[key_a], state_dict[key_b] = A, B
    own_a, own_b = layer.initial_factors[name]
    its_a, its_b = its_a.to(own_a), -its_b.to(own_b)
    if torch.equal(own_a, its_a) and torch.equal(own_b, its_b):
        return
    layer.initial_factors[name] = its_a, its_b
    base: Any = layer.get_base_layer()
    apart = layer.scaling[name] * (own_b @ own_a - its_b @ its_a)
    base.weight.data += (apart.T if layer.fan_in_fan_out else apart).to(base.weight)


def without_start(layer: TrimLayer, name: str, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's plain LoRA on the base as it was before the start: ``[A; A0]`` of shape (2r, in) and
    ``[B, -B0]`` of shape (out, 2r), at the same scale."""
    A0, B0 = (t.to(A.device, A.dtype) for t in layer.initial_factors[name])
    return torch.cat([A, A0]), torch.cat([B, -B0], dim=1)


def _refuse_another_rank(layer: TrimLayer, name: str, state_dict: dict[str, Any], prefix: str) -> None:
    """After the run shapes and config are final.

    Raises:
        ModelError: the tensors have another rank.
    """
    key_a, key_b = (f"{prefix}{which}.{name}.weight" for which in PROJECTIONS)
    A, B = state_dict.get(key_a), state_dict.get(key_b)
    r = layer.factors(name)[0].shape[0] if name in layer.lora_A else 0
    if A is None or B is None or A.shape[0] == r:
        return
    if r > 0 or B.any():
        raise _another_rank(A.shape[0], layer.site_name, r)
    del state_dict[key_a], state_dict[key_b]  # ranks that were hidden


def _another_rank(theirs: int, site: str, ours: int) -> ModelError:
    return ModelError(
        f"state_dict: it has rank {theirs} for {site!r}, which the run left at rank {ours}; give back "
        "what was kept in mid-run before Controller.finish(), or keep it with save_pretrained(folder) and load it "
        "with PeftModel.from_pretrained(base, folder)"
    )


def unwrap_empty(model: nn.Module, layers: Iterable[TrimLayer]) -> None:
    """Put the base's own modules back where layers hold no adapter any more: PEFT's tools look into every layer that
    there is for each adapter, and a loaded model has none there either."""
    empty = {layer: layer.base_layer for layer in layers if not layer.lora_A}
    for parent in list(model.modules()) if empty else ():
        for name, child in parent._modules.items():
            if child in empty:
                parent._modules[name] = empty[child]
    for base in empty.values():
        base.register_load_state_dict_pre_hook(_accept_without_adapter)


def _accept_without_adapter(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Of a base's module that an adapter was around: take what was saved then."""
    for key in [key for key in state_dict if key.startswith((f"{prefix}base_layer.", f"{prefix}lora_"))]:
        tensor, own = state_dict.pop(key), key[len(prefix) :]
        if own.startswith("base_layer."):
            state_dict[prefix + own.removeprefix("base_layer.")] = tensor
        elif own.startswith("lora_B") and tensor.any():  # else ranks that were hidden
            raise _another_rank(tensor.shape[-1], prefix.rstrip("."), 0)


def _make_room(layer: TrimLayer, name: str, r: int) -> None:
    """Bring the factors to rank ``r``, of whatever values."""
    A, B = layer.factors(name)
    if r == A.shape[0]:
        return
    set_data(A, A.new_empty(r, A.shape[1]))
    set_data(B, B.new_empty(B.shape[0], r))
    if (e := layer.diagonals(name)[0]) is not None:
        set_data(e, e.new_empty(r))
    layer.resized(name)


def _accept_raw_factors(layer: TrimLayer, name: str, state_dict: dict[str, Any], own: dict[str, nn.Parameter]) -> None:
    """Take tensors of ``named_parameters()``, in which nothing is folded: the diagonals are among them.

    Args:
        own: the layer's parameters by their keys in ``state_dict``; A and B first.
    Raises:
        ModelError: of the projections only those that still train were kept.
    """
    hosted = layer.hosted[name]
    for (key, parameter), which in zip(own.items(), PROJECTIONS):
        if key not in state_dict and which not in hosted.frozen:
            raise ModelError(
                f"state_dict: it holds {layer.site_name}'s diagonals and not its {which}, which had stopped training "
                "when parameters were taken by requires_grad; keep model.state_dict(), which is whole"
            )
        state_dict.setdefault(key, parameter.data)
    key_a = next(iter(own))
    if state_dict[key_a].shape != own[key_a].shape or not hosted.is_decided:
        hosted.is_stale = True  # at the same shapes a controller goes on: weights were swapped, as of an average
    _make_room(layer, name, state_dict[key_a].shape[0])
    if hosted.resting and any((state_dict[key] != 1).any() for key in list(own)[2:] if key in state_dict):
        hosted.resting = ()  # they were at work
    for key, parameter in own.items():
        state_dict.setdefault(key, parameter.data)


def _same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.shape == theirs.shape and ours.dtype == theirs.dtype and torch.equal(ours, theirs.to(ours.device))


def set_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a parameter a tensor of another shape, keeping its identity.

    A graph that is still alive (the user's ``loss`` variable) holds the parameter's gradient accumulator,
    which remembers the old shape. Passing through a tensor of another dtype makes torch drop it.
    """
    parameter.grad = None
    other = torch.float16 if parameter.dtype != torch.float16 else torch.float32
    parameter.data = torch.empty(0, dtype=other, device=data.device)
    parameter.data = data


def _drop_rate(dropout: nn.Module) -> float | None:
    """Of an adapter's dropout at the moment; None where it is of a kind that is not known here."""
    if type(dropout) is nn.Dropout:
        return dropout.p if dropout.training else 0.0
    return 0.0 if type(dropout) is nn.Identity else None


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    own: Any = linear._parameters
    return own["weight"], own["bias"]


class TrimLinear(TrimLayer, PeftLinear):
    """Over `nn.Linear` and transformers' `Conv1D`."""


class ParamWrapper(TrimLayer, PeftParamWrapper):  # type: ignore[misc]
    """Over a parameter, such as a block's fused experts; PEFT knows its layer by this name. Never adaptive."""

    forward = PeftParamWrapper.forward

    def __init__(self, *args: Any, target_name: str = "", **kwargs: Any) -> None:
        object.__setattr__(self, "site_name", target_name)
        super().__init__(*args, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        if not _is_outside(self.site_name, config):
            super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)


def _is_outside(parameter: str, config: LoraConfig) -> bool:
    """Whether a parameter lies outside of the chosen layers; `exclude_modules` has a say over modules only."""
    where = getattr(config, "where", None)
    return where is not None and re.fullmatch(where.outside, parameter) is not None


@functools.cache  # one set of classes a process, which is what a pickle finds again
def _quantized_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Exact bitsandbytes types -> hosted layers; empty where bitsandbytes is not installed."""
    try:
        import bitsandbytes as bnb
        from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
    except ImportError:
        return {}

    class TrimQuantized(TrimLayer):
        """PEFT's own classes keep the site's name from `update_layer`, so it is set before they are made."""

        def __init__(self, *args: Any, target_name: str = "", **kwargs: Any) -> None:
            object.__setattr__(self, "site_name", target_name)
            super().__init__(*args, **kwargs)

        def _is_ours(self, names: list[str], x: Tensor, kwargs: dict[str, Any]) -> bool:
            # Plain LoRA, too: outside of autocast PEFT makes and keeps a float32 copy of every input for it. But only
            # what the function covers: variants, biases, hooks and wrapped factors are PEFT's.
            return super()._is_ours(names, x, kwargs) or (
                all(value is None for value in kwargs.values())
                and all(name not in self.lora_variant and self._can_add(name, x) for name in names)
            )

    class TrimLinear8bitLt(TrimQuantized, Linear8bitLt):
        """Over `bitsandbytes.nn.Linear8bitLt`."""

    class TrimLinear4bit(TrimQuantized, Linear4bit):
        """Over `bitsandbytes.nn.Linear4bit`."""

    for cls in (TrimQuantized, TrimLinear8bitLt, TrimLinear4bit):  # so that they can be pickled
        cls.__qualname__ = cls.__name__
        globals()[cls.__name__] = cls
    return {bnb.nn.Linear8bitLt: TrimLinear8bitLt, bnb.nn.Linear4bit: TrimLinear4bit}


def __getattr__(name: str) -> Any:
    """Classes over bitsandbytes are made when first needed: by a pickled model, too."""
    if name in ("TrimLinear8bitLt", "TrimLinear4bit") and _quantized_classes():
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def host(target: nn.Module, adapter_name: str, config: TrimConfig, **kwargs: Any) -> nn.Module | None:
    """PEFT asks this first for every target; None hands the target to PEFT's own layers.

    Exact types only: `Linear4bit` is an `nn.Linear`, and other quantised linears wrap their weights.
    Raises `ModelError` where a rank or freeze method is asked for on a base that cannot carry it.
    """
    config.check_model()
    if kwargs.get("parameter_name") is not None and not config.is_adaptive:
        if _is_outside(kwargs["target_name"], config):
            return target  # PEFT puts it back where it was
        return ParamWrapper(target, adapter_name, config=config, **kwargs)
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    kind: type[nn.Module] = type(base)
    weight = getattr(base, "weight", None)
    plain_weight = type(weight) in (nn.Parameter, Tensor) or (isinstance(weight, Tensor) and is_dtensor(weight))
    if isinstance(base, nn.Linear) and plain_weight and kind.__module__.split(".")[0] not in ("bitsandbytes",):
        if config.fan_in_fan_out and kwargs.get("parameter_name") is None:
            config.fan_in_fan_out = False
        if kwargs.get("parameter_name") is None:
            return TrimLinear(target, adapter_name, config=config, **kwargs)
    if kind is Conv1D and kwargs.get("parameter_name") is None:
        config.fan_in_fan_out = True
        return TrimLinear(target, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)
    if kind.__module__.startswith("bitsandbytes") and kwargs.get("parameter_name") is None:
        hosted = _quantized_classes().get(kind)
        if hosted is not None:
            return _bnb_layer(hosted, target, base, adapter_name, config, kwargs)
    if config.is_adaptive:
        what = "rank" if config.rank is not None else "freeze"
        if kwargs.get("parameter_name") is not None:
            raise ModelError(
                f"target_modules: {kwargs['target_name']!r} is a parameter, as experts and their routers are in this "
                f"model; {what} methods work on linears. Leave it out: instead of 'all-linear' name the linears, such "
                "as ['q_proj', 'v_proj']."
            )
        raise ModelError(
            f"target_modules: {kwargs.get('target_name', kind.__name__)!r} is a {kind.__name__}; {what} "
            "methods work on nn.Linear, Conv1D and bitsandbytes linears. Leave it out of target_modules; "
            "instead of 'all-linear' name the linears."
        )
    return None


def _bnb_layer(
    cls: type[nn.Module],
    target: nn.Module,
    base: Any,
    adapter_name: str,
    config: TrimConfig,
    kwargs: dict[str, Any],
) -> nn.Module:
    # The keyword arguments that PEFT's own dispatchers hand to these layers.
    extra = dict(kwargs)
    if hasattr(base, "state") and hasattr(base.state, "has_fp16_weights"):
        extra.update(has_fp16_weights=base.state.has_fp16_weights, threshold=base.state.threshold, index=base.index)
    elif hasattr(base, "compute_dtype"):
        extra.update(
            compute_dtype=base.compute_dtype,
            compress_statistics=base.weight.compress_statistics,
            quant_type=base.weight.quant_type,
        )
    return cls(target, adapter_name, config=config, **extra)


def hosted_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, TrimLayer]:
    """Site name -> layer, for every layer that holds an adaptive adapter of this name, in module order."""
    found: dict[str, TrimLayer] = {}
    for layer in peft_model_of(model).modules():
        if isinstance(layer, TrimLayer) and layer.is_adaptive(adapter_name):
            assert layer.site_name and layer.site_name not in found, f"two sites are called {layer.site_name!r}"
            found[layer.site_name] = layer
    return found
