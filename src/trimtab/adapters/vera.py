"""VeRA ("ELoRA") as PEFT trains it, turned into LoRA.

Kopiczko et al., ICLR 2024, arXiv 2310.11454:  ΔW = diag(b) · B[:out] · diag(d) · A[:, :in], with one frozen
random pair A (r, max in), B (max out, r) shared by all modules, and d (r,), b (out,) trained. The layer is
PEFT's own; here are its parameter count and its fold, which is exact: A' = A[:, :in], B' = b · B[:out] · d.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ExportError
from ..plans import Site


class LoraPair(NamedTuple):
    """A module's update as LoRA with scale 1: ΔW = lora_B @ lora_A."""

    lora_A: Tensor  # (r', in)
    lora_B: Tensor  # (out, r')


def trainable_params(sites: Iterable[Site], r: int) -> int:
    """Trained numbers of VeRA: ``d (r,)`` and ``b (out,)`` of each site.

    >>> trainable_params([Site("query", 768, 768), Site("value", 768, 768)], r=1024)
    3584
    """
    return sum(r + site.out_features for site in sites)


def fold(A: Tensor, B: Tensor, d: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> LoraPair:
    """The LoRA pair, scale 1, that computes ``diag(b) B diag(d) A``.

    Args:
        A: shared projection, shape (r, in) or with more columns; the first ``in`` are the module's and
            have to be cut out by the caller.
        B: shared projection, cut to the module's shape (out, r).
        d: rank vector, shape (r,).
        b: output vector, shape (out,).
        dtype: of the result; by default that of ``A``. Everything is computed in float64 before.

    A rank above min(out, in) is more than the update can have: then the pair is the update itself beside
    an identity, which is exact with fewer numbers (cutting singular values would not be).
    """
    dtype = dtype or A.dtype
    r, n_in, n_out = len(d), A.shape[1], B.shape[0]
    lora_A, lora_B = A.double(), b.double()[:, None] * B.double() * d.double()  # (r, in), (out, r)
    if r > min(n_in, n_out):
        delta = lora_B @ lora_A  # (out, in)
        if n_out <= n_in:
            lora_A, lora_B = delta, torch.eye(n_out, dtype=delta.dtype, device=delta.device)
        else:
            lora_A, lora_B = torch.eye(n_in, dtype=delta.dtype, device=delta.device), delta
    return LoraPair(lora_A.to(dtype).contiguous(), lora_B.to(dtype).contiguous())


@torch.no_grad()
def vera_to_lora(
    model: nn.Module, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> dict[str, LoraPair]:
    """Every VeRA layer of a model as a LoRA pair with scale 1 (``lora_alpha`` = its rank).

    Args:
        model: a `PeftModel` with a VeRA adapter, or one VeRA layer (its key is then ``""``).
        adapter_name: which adapter.
        dtype: of the pairs; by default that of the shared projections.
    Returns:
        Pairs by the module's name in the base model. Ranks differ when some sites are narrower than
        VeRA's rank.
    Raises:
        ExportError: no such VeRA adapter, or one that also trained biases.
    Warns:
        When the pairs hold many times the numbers that VeRA trains: that is the price of a plain LoRA.
    """
    from peft.tuners.vera.layer import VeraLayer

    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is not None and getattr(config, "bias", "none") != "none":
        raise ExportError(
            f"adapter {adapter_name!r} trained biases (bias={config.bias!r}), which a LoRA pair "
            "does not hold; export as 'merged'"
        )
    pairs: dict[str, LoraPair] = {}
    trained = 0
    for name, layer in model.named_modules():
        if not isinstance(layer, VeraLayer) or adapter_name not in layer.vera_lambda_d:
            continue
        d, b = layer.vera_lambda_d[adapter_name], layer.vera_lambda_b[adapter_name]
        assert layer.vera_A is not None and layer.vera_B is not None  # set as soon as the layer has an adapter
        A, B = layer.vera_A[adapter_name].to(d.device), layer.vera_B[adapter_name].to(d.device)
        name = name.removeprefix("base_model.model.")
        pairs[name] = fold(A[: len(d), : layer.in_features], B[: layer.out_features, : len(d)], d, b, dtype)
        trained += len(d) + len(b)
    if not pairs:
        raise ExportError(f"no VeRA layer carries an adapter named {adapter_name!r}")
    numbers = sum(pair.lora_A.numel() + pair.lora_B.numel() for pair in pairs.values())
    if numbers > 10 * trained:
        size = sum(t.numel() * t.element_size() for pair in pairs.values() for t in pair) / 2**20
        warnings.warn(
            f"VeRA trained {trained} numbers; as LoRA they become {numbers} ({size:.1f} MiB, "
            f"{numbers / trained:.0f} times as many), since every module gets its own copy of the "
            "shared projections",
            stacklevel=2,
        )
    return pairs
