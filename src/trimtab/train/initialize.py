"""Ranks and factors that a probe chooses, put into a model before it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, ModelError, StaleAdapterError
from ..host.adapted import adapter_config, peft_model_of
from ..host.layers import hosted_layers
from ..host.probe import Probe
from ..host.sharding import is_sharded
from ..rank.base import starter_of
from .parallel import of_process_0


@dataclass(frozen=True)
class Started:
    """What a model starts from."""

    method: str
    ranks: dict[str, int]
    """Site -> its rank now."""
    scores: dict[str, float]
    """Site -> what its rank was given out by: with EVA the explained variance, with GoRA the importance."""
    rows: int
    """Rows that were looked at."""
    told: str
    """How, in words."""
    loss: tuple[float, float] | None = None
    """Of a first batch, before and after, where the start is a step already (GoRA)."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def initialize_ranks(model: nn.Module, batches: Iterable[Mapping[str, Any]], adapter_name: str = "default") -> Started:
    """Gives the adapter the ranks and factors that ``rank=EVA()``, ``GoRA()`` or ``start="eva"`` choose from batches.

    After `peft.get_peft_model` and before the Trainer or `Controller` is made; not before a resume, which takes all of
    it from the checkpoint. With several processes all call it, and what process 0 finds holds everywhere.

    Args:
        model: a `PeftModel` whose adapter came from such a `TrimConfig`, and has not trained.
        batches: what the model's forward takes, labels included; a list or a loader that can be read again and again.
    Raises:
        ConfigError: the adapter's start needs no batches.
        DataError: no batch, or no labels where the method needs the loss.
        ModelError: no weights (meta device), in shards, or without a gradient where the method needs one (quantised).
        StaleAdapterError: the adapter has its start already.
    """
    layers = hosted_layers(model, adapter_name)
    config = adapter_config(model, adapter_name)
    starter = starter_of(config) if layers else None
    if starter is None:
        method = getattr(getattr(config, "rank", None), "method", None)
        raise ConfigError("rank.method", method, "eva or gora, or a method with start='eva'; others need no batches")
    if not all(la.hosted[adapter_name].awaits_start and not la.hosted[adapter_name].is_stale for la in layers.values()):
        raise StaleAdapterError(
            f"initialize_ranks: adapter {adapter_name!r} has its start already, from an earlier call or a checkpoint"
        )
    if any(layer.hosted[adapter_name].is_decided for layer in layers.values()):
        raise StaleAdapterError("initialize_ranks: call it before the Controller or the Trainer is made")
    if is_sharded(model):
        raise ModelError("model: it is sharded, and a base is looked at whole; call initialize_ranks before that")
    if (active := list(peft_model_of(model).active_adapters)) != [adapter_name]:
        cure = f"{active} is active, whose function would be looked at; activate this one with model.set_adapter"
        raise ConfigError("adapter_name", adapter_name, cure)
    probe = Probe(model, layers, adapter_name, batches)
    chosen = of_process_0(starter.choose(probe))
    for name, layer in layers.items():
        layer.begin(adapter_name, *chosen.factors[name])
    loss = probe.first_losses()
    told = f"{starter.method}: {chosen.told}, from {probe.rows:,} rows"
    if loss:
        told += f"; loss of a first batch {loss[0]:.4g} before and {loss[1]:.4g} after"
        if not loss[1] <= loss[0] * (1 + 1e-5):  # what float32 cannot tell from 0
            told += ": lower rank.gamma"
    ranks = {name: len(A) for name, (A, _) in chosen.factors.items()}
    return Started(starter.method, ranks, chosen.scores, probe.rows, told, loss)
