"""A run's state as it was saved: whether it belongs to this run, and an adapter's tensors as they were then."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.lowrank import fold
from ..errors import CheckpointError
from ..host.layers import set_data
from .tensors import AdapterTensors

Sites = Mapping[str, tuple[int, float]]
"""Site -> its initial rank and its scale."""


def fingerprint(settings: Mapping[str, str], sites: Sites, horizon: Mapping[str, int | None]) -> str:
    """Hash of the settings in words, the sites, and the run's ``total_steps`` and ``steps_per_epoch``."""
    text = repr((sorted(settings.items()), dict(sites), *horizon.values()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def what_differs(meta: Mapping[str, Any], settings: Mapping[str, str], sites: Sites) -> str | None:
    """The first thing in which a saved state's plan differs from this one, in words; None if nothing does."""
    theirs = {name: tuple(site) for name, site in meta["sites"].items()}
    for key, mine in settings.items():
        if meta["settings"].get(key) != mine:
            return f"its {key} is {meta['settings'].get(key)}, this run's is {mine}"
    if other := sorted(theirs.keys() ^ sites.keys()):
        return f"it adapts other modules ({other[0]!r} and {len(other) - 1} more)"
    if name := next((name for name in sites if theirs[name] != sites[name]), None):
        return f"its (rank, scale) of {name!r} is {theirs[name]}, this run's is {sites[name]}"
    return None


def refuse_another_run(
    meta: Mapping[str, Any], settings: Mapping[str, str], sites: Sites, horizon: Mapping[str, int | None]
) -> None:
    """Raise `CheckpointError` with the first thing in which the state's run differs from this one."""
    other = what_differs(meta, settings, sites)
    if meta["is_finished"] and not other:
        return  # nothing is decided any more, so the run may have been made longer
    other = other or next(
        (f"its {key} is {meta[key]!r}, this run's is {mine!r}" for key, mine in horizon.items() if meta[key] != mine),
        None,
    )
    if other:
        raise CheckpointError(
            f"checkpoint: {other}; resume with the settings it was made with, or start a new run from it with "
            "PeftModel.from_pretrained(..., is_trainable=True)"
        )
    mine = fingerprint(settings, sites, horizon)
    if meta["fingerprint"] != mine:  # nothing above differs, so the file was edited
        raise CheckpointError(f"checkpoint: its fingerprint is {meta['fingerprint']!r}, its plan gives {mine!r}")


def refuse_to_go_on_undecided(meta: Mapping[str, Any]) -> None:
    """Raise `CheckpointError` where the state of a run that is not over meets layers on which nothing is decided."""
    if meta["sites"] and not meta["is_finished"]:
        raise CheckpointError(
            f"checkpoint: its run still adapts (step {meta['step']}), and this model holds plain LoRA layers, as "
            "PeftModel.from_pretrained gives them; resume with the model that peft.get_peft_model makes of the run's "
            "TrimConfig, or train on in these without the checkpoint's state"
        )


def refuse_other_tensors(adapter: AdapterTensors, tensors: Mapping[str, Tensor]) -> None:
    """Raise `CheckpointError` where the saved raw factors do not fold to what was loaded into the layers.

    Two checkpoints would be mixed.
    """
    for name, layer in adapter.layers.items():
        saved = [tensors.get(f"factors/{name}/{key}") for key in ("lora_A", "lora_B", "lora_e", "lora_b")]
        A, B, e, b = saved
        if not layer.hosted[adapter.adapter_name].is_stale or A is None or B is None or not A.shape[0]:
            continue
        for mine, theirs in zip(layer.folded(adapter.adapter_name), fold(A, B, e, b)):
            if mine.shape != theirs.shape or not torch.equal(mine.to(theirs), theirs.to(mine.dtype).to(theirs)):
                raise CheckpointError(
                    f"checkpoint: its state is of other tensors than were loaded into {name!r}, so two runs would "
                    "be mixed; resume from one folder, and name it in TrimCallback(resume_from=…) if it is not "
                    "<output_dir>/checkpoint-<step>"
                )


def saved_factors(adapter: AdapterTensors) -> dict[str, Tensor]:
    """Every raw tensor of the adaptive layers, under the name by which `restore_factors` finds it."""
    return {
        f"factors/{name}/{key}": p.detach()
        for name, layer in adapter.layers.items()
        for key, p in adapter.named(layer).items()
    }


def restore_factors(adapter: AdapterTensors, tensors: Mapping[str, Tensor], finished_ranks: Mapping[str, int]) -> None:
    """Put the raw factors into the layers, at their saved shapes.

    Args:
        finished_ranks: of a finished run, else empty. Its checkpoint holds plain factors, which the load has put in
            place already; only rank 0, of which a plain LoRA has no trace, is left to set.
    """
    for name, layer in adapter.layers.items():
        if finished_ranks and finished_ranks[name] == 0:
            A, B = layer.factors(adapter.adapter_name)
            e, _ = layer.diagonals(adapter.adapter_name)
            set_data(A, A.data[:0])
            set_data(B, B.data[:, :0])
            if e is not None:
                set_data(e, e.data[:0])
        for key, parameter in adapter.named(layer).items():
            if (saved := tensors.get(f"factors/{name}/{key}")) is not None:
                _restore(parameter, saved.to(parameter.device))
        layer.resized(adapter.adapter_name)
        hosted = layer.hosted[adapter.adapter_name]
        hosted.is_stale, hosted.was_loaded = False, None


def _restore(parameter: nn.Parameter, saved: Tensor) -> None:
    if saved.shape != parameter.shape:
        set_data(parameter, saved.clone())
    else:
        parameter.data.copy_(saved)
