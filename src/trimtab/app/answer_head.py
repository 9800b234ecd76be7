"""A decoder's head on the tokens that are learned alone, and not in one piece where the vocabulary is long.

transformers' models make the logits of every token, prompt and padding too, (tokens, vocabulary) in float32, and keep
them until the backward pass. Here a hook gives the head only those hidden states whose next token has a label; the
model's own code after the head (soft caps, scales) sees their logits. Where there is no such code, they are made and
taken back in pieces, an idea of Liger Kernel (arXiv 2410.10989). torch 2.13's `linear_cross_entropy` does that, too,
but sums a loss in bfloat16: 9.25 for 11.14. The model itself is asked once whether its loss is the same; where it is
not, it keeps its own way.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.fused import is_plain_linear
from ..host.adapted import peft_model_of

_PIECE = 2**25
"""Logits at a time: 128 MiB in float32."""
_INPUTS = {"input_ids", "attention_mask", "position_ids", "token_type_ids", "labels"}


class OtherTokens(Exception):
    """The head is called with something else than a hidden state for each label."""


class _SummedLoss(torch.autograd.Function):
    """Cross-entropy of a frozen head, summed over the rows. A piece of them at a time goes forward and back, so that
    its logits can go before the next one's come: the gradient of the rows is known at the end of the forward pass.

    Args:
        rows: hidden states, (n, width); weight, bias: of the head, (vocabulary, width) and (vocabulary,); target: (n,).
    Returns:
        A float32 scalar. No second derivative.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        size = max(1, _PIECE // weight.shape[0])
        total, gradient = rows.new_zeros((), dtype=torch.float32), torch.empty_like(rows)
        for piece, right, place in zip(rows.split(size), target.split(size), gradient.split(size)):
            with torch.enable_grad():
                piece = piece.detach().requires_grad_()
                loss = F.cross_entropy(F.linear(piece, weight, bias).float(), right, reduction="sum")
            total += loss.detach()
            place.copy_(torch.autograd.grad(loss, piece)[0])
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return ctx.saved_tensors[0] * grad, None, None, None


class AnswerHead:
    """The output embeddings of a model, given the tokens that have a label.

    Args:
        model: as the Trainer calls it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_same: bool | None = None
        """Whether the model's own loss is this one; None before it was asked."""
        self.is_last = False
        """Whether the head's output is what the model returns as logits."""
        adapted = peft_model_of(model)
        base: Any = adapted.get_base_model()
        self._tuner = cast(nn.Module, adapted.base_model)  # PEFT calls this one's hooks, and not the base model's
        self.head: nn.Module | None = base.get_output_embeddings()
        if self.head is None or base.config.is_encoder_decoder:
            self.is_same = False

    def serves(self, model: nn.Module, inputs: Mapping[str, Any]) -> bool:
        """Whether this batch can be learned so; the first one asks the model."""
        if self.is_same is False or not {"input_ids", "labels"} <= inputs.keys() <= _INPUTS:
            return False
        if self.is_same is None:  # with every process at its first batch: sharded, they gather together
            self._ask(model, inputs)
        return bool(self.is_same) and bool(_counted(inputs["labels"]).any())

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within, the model is not given its labels, and the loss that it returns is made here.

        Raises:
            OtherTokens: out of the model's forward pass, which can be made again without this.
        """
        head: Any = self.head
        in_pieces = self.is_last and is_plain_linear(head) and not any(p.requires_grad for p in head.parameters())
        given: dict[str, Any] = {}
        rows: list[Tensor] = []

        def take(tuner: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
            given.update(labels=kwargs["labels"], items=kwargs.get("num_items_in_batch"))
            return args, kwargs | {"labels": None}

        def select(head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            hidden, labels = args[0], given.get("labels")  # (batch, tokens, width), (batch, tokens)
            if rows or labels is None or hidden.shape[:-1] != labels.shape:
                raise OtherTokens
            rows.append(_taken(hidden[:, :-1], _counted(labels)))  # (n, width)
            # In pieces, the model's own logits are of no use: one row keeps its code going.
            return rows[0][None, : 1 if in_pieces else None], *args[1:]

        def give(tuner: nn.Module, args: Any, output: Any) -> Any:
            if not rows:
                raise OtherTokens
            labels, items = given["labels"], given["items"]
            target = _taken(labels[:, 1:], _counted(labels)).to(rows[0].device)
            if in_pieces:
                total = _SummedLoss.apply(rows[0], head.weight, head.bias, target)
            else:
                total = F.cross_entropy(_logits(output)[0].float(), target, reduction="sum")
            items = items.to(total.device) if isinstance(items, Tensor) else items or len(target)
            if not isinstance(output, Mapping):
                return total / items, *output
            output["loss"] = total / items  # type: ignore[index]
            return output

        hooks = [
            self._tuner.register_forward_pre_hook(take, with_kwargs=True),
            head.register_forward_pre_hook(select),
            self._tuner.register_forward_hook(give),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def _ask(self, model: nn.Module, inputs: Mapping[str, Any]) -> None:
        """Compare on the row with most labels: without dropout, so that no random number is drawn."""
        row = int(_counted(inputs["labels"]).sum(1).argmax())
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        was_training = model.training
        model.eval()
        try:
            theirs = _loss(model(**one))
            with self.on(), self._watched() as made:
                output = model(**one)
        except OtherTokens:
            self.is_same = False
            return
        finally:
            model.train(was_training)
        # Other row counts round otherwise in half precision; another convention is off by far more.
        near = 1e-4 if made[0].dtype == torch.float32 else 1e-2
        self.is_same = math.isclose(float(theirs), float(_loss(output)), rel_tol=near)
        self.is_last = self.is_same and torch.equal(made[0].float(), _logits(output).float())

    @torch.no_grad()
    def assume(self, model: nn.Module, ids: Tensor) -> None:
        """Take for granted what only values can tell: for a model on the meta device. Args: ids: (batch, tokens)."""
        with self._watched() as made:
            self.is_last = _logits(model(input_ids=ids)) is made[0]
        self.is_same = True

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """What the head returns within."""
        assert self.head is not None
        made: list[Tensor] = []
        hook = self.head.register_forward_hook(lambda head, args, output: made.append(output))
        try:
            yield made
        finally:
            hook.remove()


def _counted(labels: Tensor) -> Tensor:
    """Which positions but the last predict a token that is learned: (batch, tokens − 1)."""
    return labels[:, 1:] != -100


def _taken(tensor: Tensor, counted: Tensor) -> Tensor:
    """(n, …) of (batch, tokens − 1, …); all of them on the meta device, where labels have no values."""
    return tensor.flatten(0, 1) if counted.is_meta else tensor[counted.to(tensor.device)]


def _loss(output: Any) -> Tensor:
    return output["loss"] if isinstance(output, Mapping) else output[0]


def _logits(output: Any) -> Tensor:
    if isinstance(output, Mapping):
        return output["logits"]
    return next(one for one in output if one.ndim > 0)
