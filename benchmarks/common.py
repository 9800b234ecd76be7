"""What the scripts share: shapes, models, paired timing, counters of products and bytes, rows and JSON.

Timing is paired and alternating: in one process every variant takes one step, then every variant the next.
A ratio is the median of the ratios within the rounds, with the quartiles as its spread. On one thread the
clock is the process's CPU time, which another program on the machine disturbs little; on more, wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers as tf
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import trimtab
from trimtab.app.malloc import keep_freed_memory

from . import RESULTS

warnings.filterwarnings("ignore", category=FutureWarning)
Step = Callable[[], Any]


@dataclass
class Row:
    """One answer. ``measured`` is a ratio unless the case says otherwise; reached means at most ``target``."""

    case: str
    measured: float
    target: float | None = None
    spread: tuple[float, float] | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.target is None:
            return ""
        return "reached" if self.measured <= self.target else "NOT reached"


@dataclass(frozen=True)
class Shape:
    """A model's shape and the batch it is trained on."""

    name: str
    width: int
    layers: int
    heads: int
    inner: int
    vocabulary: int
    batch: int
    length: int
    kv_heads: int | None = None  # set for decoders

    def cut(self, layers: int) -> Shape:
        """Fewer blocks and a small vocabulary: minutes become seconds, and the floor has no large head in it."""
        return Shape(**{**asdict(self), "layers": min(layers, self.layers), "vocabulary": 1000})


BF16 = torch.bfloat16
MINILM = Shape("MiniLM 32 x 64", 384, 6, 12, 1536, 30522, 32, 64)
BERT = Shape("BERT-base 8 x 128", 768, 12, 12, 3072, 30522, 8, 128)
SMOLLM2 = Shape("SmolLM2-135M 2 x 128", 576, 30, 9, 1536, 49152, 2, 128, kv_heads=3)


def base_model(shape: Shape, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with random weights and no dropout of its own."""
    torch.manual_seed(0)
    common = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "intermediate_size": shape.inner,
    }
    if shape.kv_heads is None:
        config = tf.BertConfig(**common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        return tf.BertForSequenceClassification(config).to(dtype)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**common, num_key_value_heads=shape.kv_heads)).to(dtype)


def batch(shape: Shape) -> dict[str, Tensor]:
    ids = torch.randint(3, shape.vocabulary, (shape.batch, shape.length), generator=torch.Generator().manual_seed(1))
    labels = ids if shape.kv_heads else torch.zeros(shape.batch, dtype=torch.long)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def floor(shape: Shape, dtype: torch.dtype = torch.float32) -> Step:
    """The frozen model: forward pass and activation gradients, no adapter, no optimizer."""
    model, data = base_model(shape, dtype).requires_grad_(False).train(), batch(shape)
    want_gradients_from_the_bottom(model)
    return lambda: model(**data).loss.backward()


def want_gradients_from_the_bottom(model: nn.Module) -> None:
    """Activation gradients of every layer, the lowest too; an adapter would otherwise spare what the floor pays."""
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_())


def adapted(shape: Shape, config: peft.PeftConfig, dtype: torch.dtype = torch.float32, f32: bool = True) -> nn.Module:
    """The model with an adapter on all linears; ``f32`` adapters on a narrower base, as PEFT has it by default."""
    base = base_model(shape, dtype)
    want_gradients_from_the_bottom(base)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=f32).train()


def lora(ours: bool, r: int = 8, dropout: float = 0.0, **more: Any) -> peft.LoraConfig:
    kind = trimtab.TrimConfig if ours else peft.LoraConfig
    return kind(r=r, lora_alpha=16, lora_dropout=dropout, target_modules="all-linear", **more)


def whole_model(shape: Shape) -> nn.Module:
    """Full fine-tuning."""
    return base_model(shape).train()


def loralib_model(shape: Shape, r: int = 8) -> nn.Module | None:
    """LoRA by its authors' library on all linears of the blocks, where it is installed."""
    try:
        import loralib
    except ImportError:
        return None
    model = base_model(shape)
    for name, linear in list(model.base_model.named_modules()):
        if type(linear) is nn.Linear:
            bias = linear.bias is not None
            ours = loralib.Linear(linear.in_features, linear.out_features, r, 16, merge_weights=False, bias=bias)
            ours.load_state_dict(linear.state_dict(), strict=False)
            model.base_model.set_submodule(name, ours)
    loralib.mark_only_lora_as_trainable(model)
    want_gradients_from_the_bottom(model)
    return model.train()


def training_step(model: nn.Module, shape: Shape, total_steps: int | None = None, autocast: bool = False) -> Step:
    """Forward, backward, AdamW; with ``total_steps`` also Trimtab's controller; with ``autocast`` to bf16."""
    data = batch(shape)
    # A step so small that the values stay in their range however many steps are timed.
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
    control = trimtab.Controller(model, optimizer, total_steps=total_steps) if total_steps else None

    def step() -> None:
        with torch.autocast("cpu", BF16, enabled=autocast):
            loss = model(**data).loss
        loss.backward()
        if control:
            control.before_step()
        optimizer.step()
        if control:
            control.after_step()
        optimizer.zero_grad()

    step.control = control  # type: ignore[attr-defined]
    return step


def clock() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def timed(step: Step) -> float:
    start = clock()
    step()
    return clock() - start


def paired(steps: dict[str, Step], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    """Seconds of every step in every round, the variants taking turns."""
    for _ in range(warm):
        for step in steps.values():
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(timed(step))
    return times


def ratio(
    times: dict[str, list[float]], over: str, under: str, target: float | None = None, case: str = "", note: str = ""
) -> Row:
    """Median and quartiles of ``over / under`` within the rounds."""
    ratios = sorted(a / b for a, b in zip(times[over], times[under]))
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios[0],) * 3
    return Row(case or f"{over} / {under}", statistics.median(ratios), target, (low, high), note)


class Products(TorchDispatchMode):
    """Counts FLOPs of matrix products, two a multiply-add; torch's own counter passes over `addmm_`."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        elif name in ("aten::bmm", "aten::baddbmm"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * left.shape[2] * right.shape[2]
        return func(*args, **(kwargs or {}))


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made inside the block held at once. Exact, and the same on every machine."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {id_of(t) for t in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            key = id_of(tensor)
            if key not in given and (key not in self._alive or self._alive[key][0].expired()):
                storage = tensor.untyped_storage()
                self._alive[key] = StorageWeakRef(storage), storage.nbytes()
        self._alive = {k: v for k, v in self._alive.items() if not v[0].expired()}
        self.now = sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, self.now)
        return out


def id_of(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterable[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def machine() -> dict[str, Any]:
    """The machine in words, without its name."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "processor": f"{os.cpu_count()} cores, {model}",
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "peft": peft.__version__,
        "transformers": tf.__version__,
        "threads": torch.get_num_threads(),
        "clock": "CPU seconds" if torch.get_num_threads() == 1 else "wall seconds",
        "load": [round(x, 1) for x in os.getloadavg()],
    }


def save(question: str, rows: list[Row], options: argparse.Namespace, short: bool) -> None:
    """One JSON file a question and way of measuring, so that a side measurement does not replace the main one."""
    if not rows:  # what it needs is not here; an earlier answer stays
        return
    RESULTS.mkdir(exist_ok=True)
    if options.threads != 1:
        question += f"_{options.threads}_threads"
    if options.give_back:
        question += "_give_back"
    if short:
        question += "_short"
    record = {
        "question": question,
        "short": short,
        "machine": {**machine(), "freed memory": "kept" if options.kept else "given back"},
        "rows": [{**asdict(row), "verdict": row.verdict} for row in rows],
    }
    (RESULTS / f"{question}.json").write_text(json.dumps(record, indent=1) + "\n")


def show(question: str, rows: list[Row]) -> None:
    print(f"\n{question}" + ("" if rows else ": not measured, what it needs is not here (see the script's docstring)"))
    for row in rows:
        spread = f"{row.spread[0]:.3f}-{row.spread[1]:.3f}" if row.spread else ""
        target = f"<= {row.target:g}" if row.target is not None else ""
        note = f"  ({row.note})" if row.note else ""
        print(f"  {row.case:58s} {row.measured:8.3f}  {spread:13s} {target:9s} {row.verdict}{note}", flush=True)


def parser_for(doc: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1, help="1: CPU time; more: wall time")
    parser.add_argument(
        "--give-back",
        action="store_true",
        help="the C library's own habit; without it freed memory is kept for every variant, as the command does",
    )
    return parser


def prepared(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options, in force; ``kept`` says whether freed memory is kept."""
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.kept = not options.give_back and keep_freed_memory()
    return options


def main(question: str, rows: Callable[[bool], list[Row]], doc: str | None) -> None:
    """What every script does when it is started by itself."""
    parser = parser_for(doc)
    parser.add_argument("--short", action="store_true", help="fewer rounds and blocks")
    options = prepared(parser)
    answers = rows(options.short)
    save(question, answers, options, options.short)
    show(question, answers)
