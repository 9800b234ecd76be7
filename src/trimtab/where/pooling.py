"""One vector per sample and layer from one forward pass of a model's backbone.

Hooks on the blocks pool each hidden state (b, t, d) to (b, d) the moment it appears; nothing else is kept.
The language-model head never runs. An encoder-decoder gets its decoder inputs from the labels, shifted
right as in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, ModelError, SelectionError
from ..host.sharding import is_fsdp2
from ..host.sites import Stack, backbone_of, base_of, decoder_of, is_time_first

POOLS = ("last", "cls", "mean")
_TEXT = ("input_ids", "inputs_embeds")
_OTHER = ("pixel_values", "input_features", "input_values")
"""Images and sound: what a model makes of them has a position a patch or a frame."""
Mask = Tensor | Callable[[Tensor], Tensor]
"""(b, t), true on tokens; or what makes it of hidden states (b, t, d), whose t the input does not say."""
_NOT_INPUTS = {
    "labels",
    "label",
    "label_ids",
    "next_sentence_label",
    "start_positions",
    "end_positions",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "use_cache",
    "past_key_values",
}


_WITHOUT = "choose by gradient, uniform, first, last or a mask, which read no hidden states"


def pool_rows(hidden: Tensor, mask: Tensor, pool: str) -> Tensor:
    """One row per sample.

    Args:
        hidden: (b, t, d).
        mask: (b, t), true on tokens, false on padding; either side may be padded.
        pool: ``last`` token, ``cls`` (the first token), ``mean`` over the tokens, or ``all``: one row per token.
    """
    if pool == "all":
        return hidden[mask]
    if pool == "mean":
        exact = torch.float32 if hidden.device.type == "mps" else torch.float64
        tokens = hidden.masked_fill(~mask.unsqueeze(-1), 0).to(exact)  # padding may hold NaN
        return tokens.sum(1) / mask.sum(1, keepdim=True)
    position = mask.int().argmax(1) if pool == "cls" else mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
    return hidden[torch.arange(len(hidden), device=hidden.device), position]


class StackPooler:
    """Collects the rows that enter and leave the blocks of one stack.

    ``pairs[i] = (a, b)``: block i's input is row set a, its output row set b. A block that takes the very
    tensor its predecessor returned shares that row set.
    """

    def __init__(self, stack: Stack, pool: str, final_norm: str) -> None:
        if type(stack.blocks[0]).__name__.endswith("Attention"):  # XLM: what is added to the hidden states leaves it
            raise ModelError(
                f"{stack.path}: it holds attentions alone, and what leaves one is no hidden state that could be "
                f"compared; {_WITHOUT}"
            )
        self.stack, self.pool, self.final_norm = stack, pool, final_norm
        self.pairs: list[tuple[int, int]] = []
        self._rows: list[Tensor] = []
        self._new: list[tuple[int, int]] = []
        self._input = 0
        self._last: tuple[Tensor, int] | None = None  # the tensor that left the last block, and its version
        self.mask: Mask | None = None  # set before each forward
        self.is_time_first = False  # likewise

    def hooks(self) -> list[Any]:
        handles: list[Any] = []
        for index, block in enumerate(self.stack.blocks):
            handles.append(block.register_forward_pre_hook(self._entering(index), with_kwargs=True))
            handles.append(block.register_forward_hook(self._leaving(index)))
        if self.final_norm == "include":
            inside = set(self.stack.module.modules())
            for child in self.stack.owner.children():
                if "norm" in type(child).__name__.lower() and child not in inside:
                    handles.append(child.register_forward_hook(self._normed))
        return handles

    def take(self) -> list[Tensor]:
        """The row sets of the pass that just ended, on the CPU, each (b, d)."""
        rows, pairs = self._rows, self._new
        self._rows, self._new, self._last = [], [], None
        if len(pairs) < len(self.stack):
            raise ModelError(
                f"{self.stack.path}: {len(self.stack) - len(pairs)} of {len(self.stack)} layers did not "
                "run in a forward pass, so they cannot be compared"
            )
        if self.pairs and pairs != self.pairs:
            raise ModelError(f"{self.stack.path}: the layers ran in another order than on the first batch")
        self.pairs = pairs
        return [r.cpu() for r in rows]

    def _keep(self, hidden: Any, index: int) -> int:
        is_tensor = isinstance(hidden, Tensor) and hidden.dim() == 3
        if is_tensor and self.is_time_first:
            hidden = hidden.transpose(0, 1)
        mask = self.mask(hidden) if callable(self.mask) and is_tensor else self.mask
        if not is_tensor or not isinstance(mask, Tensor) or hidden.shape[:-1] != mask.shape:
            shape = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise SelectionError(
                f"{self.stack.path}.{index}: hidden states {shape} do not line up with the attention mask "
                f"{tuple(mask.shape) if isinstance(mask, Tensor) else None}; pass one mask value per position "
                "(image tokens expanded, no packed rows). Of a model whose layers hold other positions than its "
                f"input: {_WITHOUT}"
            )
        rows = pool_rows(hidden, mask.to(hidden.device), self.pool)
        self._rows.append(rows)
        return len(self._rows) - 1

    def _entering(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs.get("hidden_states")
            last = self._last
            same = last is not None and hidden is last[0] and hidden._version == last[1]
            self._input = self._new[-1][1] if same and self._new else self._keep(hidden, index)

        return hook

    def _leaving(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if index != len(self._new):
                raise ModelError(
                    f"{self.stack.path}: layer {index} ran out of turn or twice in one forward pass; "
                    "layers that share weights cannot be chosen one by one"
                )
            hidden = output if isinstance(output, Tensor) else output[0]
            self._new.append((self._input, self._keep(hidden, index)))
            self._last = (hidden, hidden._version)

        return hook

    def _normed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The norm after the last block: its output takes the place of the block's own."""
        if self._last is not None and len(self._new) == len(self.stack) and args and args[0] is self._last[0]:
            index = len(self.stack) - 1
            self._rows.pop()
            self._new[index] = (self._new[index][0], self._keep(output, index))


@contextmanager
def observed(base: nn.Module, poolers: list[StackPooler]) -> Iterator[None]:
    """Evaluation mode, no gradients and hooks in place; everything as before afterwards."""
    training = {module: module.training for module in base.modules()}
    handles = [handle for pooler in poolers for handle in pooler.hooks()]
    base.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, was in training.items():
            module.training = was


def run_backbone(model: Any, batch: Mapping[str, Any], poolers: list[StackPooler]) -> None:
    """One forward pass of the backbone over a batch, with the right mask set on each pooler.

    Raises:
        DataError: the batch lacks inputs, or a sample without tokens.
    """
    base = base_of(model)
    _, backbone = backbone_of(base)
    device = next(backbone.parameters()).device
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor)}
    main = next((inputs[k] for k in _TEXT if k in inputs), None)
    mask: Mask
    if main is not None:
        mask = _mask(inputs.get("attention_mask"), main)
    elif is_other(inputs):
        mask = _positions(backbone, inputs.get("attention_mask"))
    else:
        raise DataError(f"batch: input_ids (or {', '.join(_OTHER)}) is missing; it has {', '.join(batch) or 'nothing'}")
    for pooler in poolers:
        pooler.is_time_first = is_time_first(base)
    decoder_mask = mask
    decoder = decoder_of(base)
    if decoder is not None:
        decoder_mask = _add_decoder_inputs(base, inputs, mask)
        decoding = set(decoder.modules())
        for pooler in poolers:
            pooler.mask = decoder_mask if pooler.stack.module in decoding else mask
        if backbone is base and base.get_output_embeddings() is not None:  # T5 and its like: no part without the head
            _run_halves(base, inputs)
            return
    else:
        for pooler in poolers:
            pooler.mask = mask
    allowed = _parameters(base.forward) if _takes_any(backbone.forward) else set()
    root = next((module for module in model.modules() if is_fsdp2(module)), None)
    if root is not None and backbone in root.modules():  # only its own call gathers what lies outside of the blocks
        backbone, allowed = root, _parameters(base.forward)
    _call(backbone, inputs, allowed)


def _run_halves(base: Any, inputs: dict[str, Tensor]) -> None:
    """Encoder, then decoder, as the model's own forward does, but without its head."""
    _, decoder = backbone_of(base.get_decoder())  # an EncoderDecoderModel's decoder has a head of its own
    encoded = _call(base.get_encoder(), {k: v for k, v in inputs.items() if not k.startswith("decoder_")})[0]
    if hasattr(base, "enc_to_dec_proj"):
        encoded = base.enc_to_dec_proj(encoded)
    own = {k.removeprefix("decoder_"): v for k, v in inputs.items() if k.startswith("decoder_")}
    cross = {"encoder_hidden_states": encoded, "encoder_attention_mask": inputs.get("attention_mask")}
    _call(decoder, own | {k: v for k, v in cross.items() if v is not None})


def _call(module: Any, inputs: dict[str, Tensor], allowed: set[str] | frozenset[str] = frozenset()) -> Any:
    known = _parameters(module.forward)
    if "decoder_input_values" in known and "decoder_input_ids" not in known:  # SpeechT5's name for both
        inputs = {"decoder_input_values" if k == "decoder_input_ids" else k: v for k, v in inputs.items()}
    kept = {k: v for k, v in inputs.items() if k in known | allowed and k not in _NOT_INPUTS}
    if "use_cache" in known:
        return module(**kept, use_cache=False)
    return module(**kept)


def _parameters(forward: Any) -> set[str]:
    return set(inspect.signature(forward).parameters)


def _takes_any(forward: Any) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values())


def is_other(batch: Mapping[str, Any]) -> bool:
    """Whether a batch is of images or sound alone."""
    return any(key in batch for key in _OTHER) and not any(key in batch for key in _TEXT)


def _positions(backbone: Any, given: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The mask of hidden states (b, t, d) of images or sound: every position, but what is padding in ``given``, which
    has a value a sample or frame of the input (b, n)."""

    def mask(hidden: Tensor) -> Tensor:
        b, t = hidden.shape[:2]
        if given is None or given.shape == (b, t):
            return _mask(given, hidden)
        if reduced := getattr(backbone, "_get_feature_vector_attention_mask", None):  # wav2vec 2.0 and its like
            return _mask(reduced(t, given), hidden)
        n = given.shape[-1]
        if given.dim() != 2 or n % t:
            raise DataError(
                f"batch: attention_mask has shape {tuple(given.shape)}, and the model {t} positions a row; leave it out"
            )
        return _mask(given[:, :: n // t], hidden)

    return mask


def _mask(mask: Tensor | None, main: Tensor) -> Tensor:
    if mask is None:
        return torch.ones(main.shape[:2], dtype=torch.bool, device=main.device)
    if mask.dim() != 2:
        raise DataError(
            f"batch: attention_mask has shape {tuple(mask.shape)}; one value per sample and position is needed"
        )
    mask = mask.bool()
    if not bool(mask.any(1).all()):
        raise DataError("batch: a sample has no token at all (its attention mask is all zero)")
    return mask


def _add_decoder_inputs(base: Any, inputs: dict[str, Tensor], mask: Mask) -> Tensor:
    """Fill in ``decoder_input_ids`` where needed and return the decoder's mask.

    Position t of the shifted targets predicts target t, so it counts wherever target t does.
    """
    if "decoder_input_ids" in inputs or "decoder_inputs_embeds" in inputs:
        main = inputs.get("decoder_input_ids", inputs.get("decoder_inputs_embeds"))
        assert main is not None
        return _mask(inputs.get("decoder_attention_mask"), main)
    config = _decoder_config(base.config)
    labels = inputs.get("labels")
    if labels is not None and labels.dim() == 2 and not labels.is_floating_point() and _is_generative(base):
        targets, valid = labels, labels != -100
        pad = getattr(config, "pad_token_id", None)
        if pad is not None and pad != getattr(config, "eos_token_id", None):
            valid &= labels != pad
        if not bool(valid.any(1).all()):
            raise DataError("batch: a sample has no label token at all (all -100 or padding)")
    elif not _is_generative(base) and "input_ids" in inputs:  # a classifier's decoder reads the input again
        assert isinstance(mask, Tensor)  # of text
        targets, valid = inputs["input_ids"], mask
    else:
        raise DataError(
            "batch: an encoder-decoder needs labels (b, t) or decoder_input_ids beside its input; of one whose decoder "
            f"reads no tokens (object queries, several codebooks): {_WITHOUT}"
        )
    shift = getattr(base, "prepare_decoder_input_ids_from_labels", None)
    if shift is None and getattr(config, "decoder_start_token_id", None) is None and targets is inputs.get("input_ids"):
        return valid  # mBART and PLBart start from a row's own last token, and their backbone does it
    inputs["decoder_input_ids"] = shift(labels=targets) if shift else _shift_right(targets, config)
    return valid


def _decoder_config(config: Any) -> Any:
    """The config that says what a decoder starts from: the language model's, where the model also sees (Florence-2)."""
    if getattr(config, "decoder_start_token_id", None) is not None:
        return config
    try:
        return config.get_text_config()
    except ValueError:  # several text parts
        return config


def _is_generative(base: Any) -> bool:
    return base.get_output_embeddings() is not None


def _shift_right(targets: Tensor, config: Any) -> Tensor:
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ConfigError(
            "model.decoder_start_token_id",
            None,
            "set it in the model's config, or pass decoder_input_ids in every batch",
        )
    out = torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)
    return out.masked_fill(out == -100, getattr(config, "pad_token_id", None) or 0)
