"""How much memory a step of training will take, from shapes alone.

A whole step, forward and backward, is run on the meta device, where tensors have shapes and no data; what is alive is
added up tensor by tensor. So every model, adapter and kind of checkpointing is counted as it is, and no weights are
read. What libraries take inside of one operation, and what an allocator rounds up, is not seen.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .answer_head import AnswerHead

if TYPE_CHECKING:
    from peft import PeftConfig

_QUANTISED_BYTES = {"load_in_4bit": 0.5 + 4 / 64, "load_in_8bit": 1 + 4 / 4096}
"""Of a weight: its bits, and a float32 scale for each block."""


@dataclass(frozen=True)
class Forecast:
    """Bytes of tensors at the height of a step."""

    batch: int
    tokens: int
    device: str
    weights: int
    """Of the base model."""
    adapter: int
    """Parameters of the adapter and of new heads."""
    gradients: int
    optimizer: int
    """Moments."""
    activations: int
    """All else that lives at the height of the step: what backward needs, and what it makes."""
    activations_with_checkpointing: int | None
    """The same with ``train.gradient_checkpointing``; None where the model cannot."""
    is_checkpointing: bool
    """Whether the recipe asks for it."""
    units: Units

    @property
    def held(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer

    def to_json(self) -> dict[str, Any]:
        plain = self.held + self.activations
        saving = None if (a := self.activations_with_checkpointing) is None else self.held + a
        chosen = saving if self.is_checkpointing and saving is not None else plain
        rest = {key: value for key, value in asdict(self).items() if key != "units"}
        return {**rest, "peak": chosen, "peak_without_checkpointing": plain, "peak_with_checkpointing": saving}


@dataclass(frozen=True)
class Units:
    """What FSDP2 gathers and lets go of together: each block, and all that lies outside of the blocks. Bytes."""

    blocks: tuple[int, ...]
    outside: int

    @classmethod
    def of(cls, model: nn.Module, weights: int) -> Units:
        """Blocks as accelerate wraps them: modules of the classes that the model says must not be split.

        Args:
            weights: bytes of the whole model as it is loaded; quantised ones are shared out by their size.
        """
        kinds = set(getattr(model, "_no_split_modules", None) or ())
        sizes: dict[int, int] = {}
        counted: set[int] = set()
        for module in model.modules():
            if type(module).__name__ in kinds:
                own = {id(p): p for p in module.parameters() if id(p) not in counted}
                counted |= own.keys()
                sizes[id(module)] = sum(p.numel() * p.element_size() for p in own.values())
        whole = sum(p.numel() * p.element_size() for p in model.parameters()) or 1
        blocks = tuple(round(size * weights / whole) for size in sizes.values() if size)
        return cls(blocks, weights - sum(blocks))


def over_processes(found: Forecast, processes: int, strategy: str, micro_batches: int = 1) -> dict[str, Any]:
    """Memory of each of several processes, and what each sends in an optimizer step.

    Under FSDP2 a process holds its share of every weight, gathers the block at work and the next one through a buffer
    of a block's size, and holds what is outside of the blocks from the forward pass to the end of the backward pass.
    What trains is whole everywhere (docs/howto/sharded.md). Collectives are counted as rings: to gather ``S`` bytes a
    process sends ``S (N - 1) / N``, to reduce them twice that.

    Args:
        processes: N, with a batch of ``found.batch`` rows each.
        strategy: "ddp" or "fsdp2", with blocks let go of after the forward pass.
        micro_batches: gradient accumulation.
    Returns:
        ``processes``, ``strategy``, and bytes: ``weights`` that are held all the time, ``gathered`` beside them at the
        height, ``peak``, ``sent`` and of it ``sent_weights``.
    """
    plain = found.to_json()
    ring = (processes - 1) / processes
    weights, gathered, sent_weights = found.weights, 0, 0.0
    if strategy == "fsdp2" and processes > 1:
        blocks = found.units.blocks
        weights = -(-found.weights // processes)
        gathered = found.units.outside + 3 * max(blocks, default=0)
        sent_weights = micro_batches * ring * (found.units.outside + 2 * sum(blocks))
    return {
        "processes": processes,
        "strategy": strategy,
        "weights": weights,
        "gathered": gathered,
        "peak": plain["peak"] - found.weights + weights + gathered,
        "sent": round(sent_weights + 2 * ring * found.gradients),
        "sent_weights": round(sent_weights),
    }


def forecast(
    model: nn.Module,
    config: PeftConfig,
    *,
    batch: int,
    tokens: int,
    state_bytes: int = 8,
    dtype: torch.dtype = torch.float32,
    quantization: dict[str, Any] | None = None,
    is_checkpointing: bool = False,
    device: str = "cpu",
) -> Forecast | None:
    """The memory of a step; None for a model that cannot be run from token ids alone.

    Args:
        model: on the meta device; it is changed.
        config: what `peft.get_peft_model` would get.
        batch, tokens: rows of a batch on one device, and tokens of a row.
        state_bytes: of the optimizer, per trained parameter.
        dtype: of the weights.
        quantization: the recipe's.
        device: where it will train; attention with dropout keeps more on a CPU.
    """
    import peft

    model = model.to(dtype)
    weights = _weight_bytes(model, quantization)
    units = Units.of(model, weights)
    adapted = peft.get_peft_model(model, config)  # type: ignore[arg-type]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    adapter = sum(p.numel() * p.element_size() for p in adapted.parameters()) - sum(
        p.numel() * p.element_size() for p in _base(adapted)
    )
    plain = _height(adapted, batch, tokens, device)
    if plain is None:
        return None
    saving = None
    if getattr(model, "supports_gradient_checkpointing", False):
        adapted.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        saving = _height(adapted, batch, tokens, device)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    moments = sum(p.numel() for p in trained) * state_bytes
    # Gradients are born in the step, and counted there: what is left are activations.
    return Forecast(
        batch, tokens, device, weights, adapter, gradients, moments,
        max(0, plain - gradients), None if saving is None else max(0, saving - gradients), is_checkpointing, units,
    )  # fmt: skip


def _base(model: nn.Module) -> Iterator[nn.Parameter]:
    """Parameters of the model as it was: no adapter's, and of a saved module the original's."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad and "modules_to_save" not in name and "lora_" not in name:
            yield parameter


def _weight_bytes(model: nn.Module, quantization: dict[str, Any] | None) -> int:
    """Of the model as it is loaded; a tied weight counts once."""
    held = {id(t): t for t in (*model.parameters(), *model.buffers())}
    found = sum(t.numel() * t.element_size() for t in held.values())
    kind = next((key for key in _QUANTISED_BYTES if (quantization or {}).get(key)), None)
    if kind is None:
        return found
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inner = (m.weight for m in model.modules() if isinstance(m, nn.Linear) and m is not head)
    return found - round(sum(w.numel() * (w.element_size() - _QUANTISED_BYTES[kind]) for w in inner))


def _height(model: Any, batch: int, tokens: int, device: str) -> int | None:
    """Bytes that a step adds to what is held before it, at its height."""
    model.train()
    model.zero_grad(set_to_none=True)
    ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
    labels = ids if _writes(model) else torch.zeros(batch, dtype=torch.long, device="meta")
    if getattr(model.config, "problem_type", None) == "regression" or getattr(model.config, "num_labels", 2) == 1:
        labels = torch.zeros(batch, device="meta") if labels is not ids else ids
    try:
        head = AnswerHead(model)
        with _attention(device):
            if labels is ids and head.is_same is None:
                head.assume(model, ids[:1])
            with _Alive(model) as alive, head.on() if head.is_same else contextlib.nullcontext():
                model(input_ids=ids, labels=labels).loss.backward()
    except (TypeError, ValueError, NotImplementedError, RuntimeError):
        return None
    finally:
        model.zero_grad(set_to_none=True)
    return alive.peak


def _writes(model: Any) -> bool:
    if model.peft_config["default"].task_type is None:  # a recipe without a task
        return bool(getattr(model.get_base_model(), "can_generate", bool)())
    return str(getattr(model.peft_config["default"].task_type, "value", model.peft_config["default"].task_type)) in (
        "CAUSAL_LM", "SEQ_2_SEQ_LM",
    )  # fmt: skip


class _Alive(TorchDispatchMode):
    """Adds up the storages that are alive; those that the model holds already do not count."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        held = (*model.parameters(), *model.buffers())
        self._seen: dict[int, Any] = {t.untyped_storage()._cdata: None for t in held}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True  # whether nothing is padded, whether rows are whole: there are no values to look at
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self.now += size
        self.peak = max(self.peak, self.now)

        def freed(_: Any) -> None:
            self.now -= size
            self._seen.pop(key, None)

        self._seen[key] = weakref.ref(storage, freed)


class _Fused(torch.autograd.Function):
    """What fused attention keeps: its inputs, its output, and a number for each row of scores."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any) -> Any:  # (batch, heads, tokens, size)
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


@contextlib.contextmanager
def _attention(device: str) -> Iterator[None]:
    """Attention as the device will do it; the meta device itself would write the scores out."""
    usual = nn.functional.scaled_dot_product_attention

    def chosen(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **kw: Any) -> Any:
        if device == "cpu" and dropout_p > 0:  # has no fused form there
            return usual(query, key, value, attn_mask, dropout_p, **kw)
        return _Fused.apply(query, key, value)

    nn.functional.scaled_dot_product_attention = chosen  # type: ignore[assignment]
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention = usual
