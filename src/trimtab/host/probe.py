"""A look at a base model before it trains: batches run through it, and nothing of it changes.

What enters each adapted site, or the gradient of each weight, is handed over as soon as it is there and then dropped.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import DataError, ModelError
from ..plans import Site
from .layers import TrimLayer
from .sites import base_with_weights, decoder_of, is_time_first

MOST_PASSES = 10
"""Times through the batches before a probe that wants more is given what there is."""
_UNSEEN = "takes no part in the model's forward pass of these batches; leave it out of target_modules"


class Probe:
    """Sites of a model, and what batches show of them. See `trimtab.rank.start.Probe` for what a method reads.

    Args:
        layers: site name -> hosted layer, whose adapter still adds nothing.
        batches: what the model's forward takes; looked at several times where they can be, a generator once.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, TrimLayer], adapter_name: str, batches: Iterable[Mapping[str, Any]]
    ) -> None:
        self.base = base_with_weights(model)
        self.layers, self.batches = dict(layers), batches
        self.sites: Mapping[str, Site] = {name: Site(name, *layer.widths()) for name, layer in layers.items()}
        self.ranks: Mapping[str, int] = {name: layer.hosted[adapter_name].initial_r for name, layer in layers.items()}
        self.scales: Mapping[str, float] = {name: layer.hosted[adapter_name].scale for name, layer in layers.items()}
        self.rows = self.n_batches = 0
        self._first: tuple[Mapping[str, Any], float] | None = None

    def inputs(self, take: Callable[[tuple[str, ...], Tensor], None], is_enough: Callable[[], bool]) -> bool:
        """Hands over what enters the sites, batch after batch, until it is enough; whether it ever was.

        Args:
            take: sites that share one input, first of the model first, and its tokens (tokens, in) without padding.
            is_enough: asked after each batch.
        Raises:
            DataError: no batch. ModelError: a site that does not run in a forward pass.
        """
        batches = iter(self.batches)
        first = next(batches, None)
        if first is None:
            raise DataError("batches: there are none")
        with evaluating(self.base), torch.no_grad():
            groups = self._sharing(first)
            passed: Iterable[Mapping[str, Any]] = chain([first], batches)
            for again in range(MOST_PASSES):
                before = self.n_batches
                for batch in passed:
                    self._run(batch, {sites[0]: sites for sites in groups}, take)
                    self._count(batch, is_new=not again)
                    if is_enough():
                        return True
                if self.n_batches == before:  # a generator is spent
                    return False
                passed = self.batches
        return False

    def gradients(self) -> dict[str, Tensor]:
        """The mean over all batches of ∂L/∂W, (out, in) float32 on the CPU, of every site.

        On the device one gradient is alive at a time; on the CPU all are, at four bytes for each adapted weight.

        Raises:
            DataError: no batch, or one without labels. ModelError: weights without a gradient (quantised).
        """
        weights = {name: _weight(name, layer) for name, layer in self.layers.items()}
        names: dict[nn.Parameter, str] = {weight: name for name, weight in weights.items()}
        sums: dict[str, Tensor] = {}

        def take(weight: nn.Parameter, gradient: Tensor) -> None:
            found = gradient.to("cpu", torch.float32)
            sums[names[weight]] = sums[names[weight]].add_(found) if names[weight] in sums else found

        with gradients_of(self.base, list(names), take):
            for batch in self.batches:
                loss = loss_of(self.base, batch)
                loss.backward()
                self._first = self._first or (batch, float(loss.detach()))
                self._count(batch)
        if not self.n_batches:
            raise DataError("batches: there are none")
        if unseen := next((name for name in weights if name not in sums), None):
            raise ModelError(f"{unseen!r} {_UNSEEN}")
        return {name: self._as_linear(name, sums[name]).div_(self.n_batches) for name in weights}

    def weight(self, name: str) -> Tensor:
        """A site's weight, (out, in) float32 on the CPU."""
        return self._as_linear(name, _weight(name, self.layers[name]).detach().to("cpu", torch.float32))

    def first_losses(self) -> tuple[float, float] | None:
        """The loss of the first batch whose gradients were taken: then, and as the model is now; None without any."""
        if self._first is None:
            return None
        batch, then = self._first
        with evaluating(self.base), torch.no_grad():
            return then, float(loss_of(self.base, batch))

    # -- inside ----------------------------------------------------------------------------------------

    def _count(self, batch: Mapping[str, Any], is_new: bool = True) -> None:
        self.n_batches += 1
        self.rows += len(next(iter(batch.values()))) if is_new else 0

    def _as_linear(self, name: str, matrix: Tensor) -> Tensor:
        return matrix.T.contiguous() if isinstance(self.layers[name].get_base_layer(), Conv1D) else matrix

    def _sharing(self, batch: Mapping[str, Any]) -> list[tuple[str, ...]]:
        """Sites by what enters them: those that are handed the very same tensor are one group."""
        seen: list[tuple[weakref.ref[Tensor], int, list[str]]] = []

        def look(name: str, x: Tensor) -> None:
            for ref, version, sites in seen:
                if ref() is x and x._version == version:
                    sites.append(name)
                    return
            seen.append((weakref.ref(x), x._version, [name]))

        with self._watched({name: name for name in self.layers}, look):
            self.base(**on_device(self.base, batch))
        runs = Counter(name for _, _, sites in seen for name in sites)
        if left := next((name for name in self.layers if not runs[name]), None):
            raise ModelError(f"{left!r} {_UNSEEN}")
        # A site that runs twice in a pass has an input of its own.
        together = [tuple(name for name in self.layers if name in sites and runs[name] == 1) for _, _, sites in seen]
        alone = [(name,) for name in self.layers if runs[name] > 1]
        order = list(self.layers)
        return sorted(filter(None, [*together, *alone]), key=lambda sites: order.index(sites[0]))

    def _run(
        self,
        batch: Mapping[str, Any],
        groups: Mapping[str, tuple[str, ...]],
        take: Callable[[tuple[str, ...], Tensor], None],
    ) -> None:
        inputs = on_device(self.base, batch)
        masks = _Masks(self.base, inputs)

        def look(name: str, x: Tensor) -> None:
            take(groups[name], masks.tokens(x, self.layers[name]))

        with self._watched(dict.fromkeys(groups, ""), look), masks.watching_the_encoder():
            self.base(**inputs)

    @contextmanager
    def _watched(self, names: Iterable[str], look: Callable[[str, Tensor], None]) -> Iterator[None]:
        handles = [
            self.layers[name].register_forward_pre_hook(lambda module, args, name=name: look(name, args[0]))
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


class _Masks:
    """Which positions of a batch are tokens: not padding, and of a language model only those that it is scored on.

    As PEFT's EVA does: ``attention_mask`` and ``labels != -100``, the latter where there is a label for each position.
    The positions of an encoder-decoder's decoder are those of its labels.
    """

    def __init__(self, base: Any, inputs: Mapping[str, Any]) -> None:
        mask, labels = inputs.get("attention_mask"), inputs.get("labels")
        main = next((inputs[key] for key in ("input_ids", "inputs_embeds") if key in inputs), None)
        if mask is None and main is not None:
            mask = torch.ones(main.shape[:2], device=main.device)
        self.mask: Tensor | None = None if mask is None or mask.dim() != 2 else mask.bool()
        scored = labels != -100 if isinstance(labels, Tensor) and not labels.is_floating_point() else None
        self.decoder: Tensor | None = None
        self.encoded: Tensor | None = None
        self.encoder: nn.Module | None = None
        self.decoding: set[nn.Module] = set()
        if (decoder := decoder_of(base)) is not None:
            given = inputs.get("decoder_attention_mask")
            self.decoder = given.bool() if isinstance(given, Tensor) else scored
            self.encoder, self.decoding = base.get_encoder(), set(decoder.modules())
        elif scored is not None and self.mask is not None and scored.shape == self.mask.shape:
            self.mask = self.mask & scored
        if is_time_first(base):
            self.mask, self.decoder = (None if m is None else m.T for m in (self.mask, self.decoder))

    def tokens(self, x: Tensor, layer: nn.Module) -> Tensor:
        """(tokens, in). An input that no mask lines up with (an expert's share of the tokens) is taken whole."""
        in_decoder = layer in self.decoding and x is not self.encoded
        for mask in (self.decoder, self.mask) if in_decoder else (self.mask,):
            if mask is not None and mask.shape == x.shape[:-1]:
                return x[mask.to(x.device)]
        return x.reshape(-1, x.shape[-1])

    @contextmanager
    def watching_the_encoder(self) -> Iterator[None]:
        """Cross-attention reads what the encoder returned, at the encoder's positions."""
        if self.encoder is None:
            yield
            return

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            self.encoded = output[0]

        handle = self.encoder.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()


def _weight(name: str, layer: TrimLayer) -> nn.Parameter:
    weight = cast(nn.Parameter, layer.get_base_layer().weight)
    if not weight.is_floating_point():
        raise ModelError(f"{name!r} is quantised: its weight has no gradient, which this method reads; rank.method=eva "
                         "reads inputs alone")  # fmt: skip
    return weight


def on_device(base: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch where the model is."""
    device = next(base.parameters()).device
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def loss_of(base: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The model's own loss of a batch. Raises `DataError` where it makes none."""
    inputs = on_device(base, batch)
    if "use_cache" in inspect.signature(base.forward).parameters:  # nothing is generated; RWKV's is written in place
        inputs.setdefault("use_cache", False)
    loss = getattr(base(**inputs), "loss", None)
    if not isinstance(loss, Tensor):
        raise DataError(f"batch: the model makes no loss of {', '.join(batch)}; labels are needed")
    return loss


@contextmanager
def evaluating(base: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module as it was afterwards."""
    training = {module: module.training for module in base.modules()}
    try:
        base.eval()
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def gradients_of(
    base: nn.Module, weights: list[nn.Parameter], take: Callable[[nn.Parameter, Tensor], None]
) -> Iterator[None]:
    """Only these weights have gradients, and each is handed to ``take`` and dropped the moment it is there."""

    def hand_over(weight: Tensor) -> None:
        assert isinstance(weight, nn.Parameter) and weight.grad is not None
        take(weight, weight.grad.detach())
        weight.grad = None

    were = [(parameter, parameter.requires_grad, parameter.grad) for parameter in base.parameters()]
    handles = []
    try:
        with evaluating(base), torch.enable_grad():
            base.requires_grad_(False)
            for parameter, _, _ in were:
                parameter.grad = None
            for weight in weights:
                weight.requires_grad_(True)
                handles.append(weight.register_post_accumulate_grad_hook(hand_over))
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, was, grad in were:
            parameter.requires_grad_(was)
            parameter.grad = grad
