"""What two processes and one run: ``torchrun --nproc-per-node 2 two_process.py OUT CASE …``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch.distributed.fsdp import fully_shard
from transformers import Trainer, TrainingArguments

import tiny
import trimtab
from fakes import Halving
from trimtab import EVA, AdaLoRA, AFLoRA, Controller, GoRA, GradES, SalientLoRA, SoRA, TrimCallback, TrimConfig
from trimtab.errors import DisagreementError, ModelError
from trimtab.host.sharding import is_sharded
from trimtab.rank.base import Decision

STEPS = 20
_SALIENT = SalientLoRA(target_r=2, warmup=2, allocation=11, initial_window=3, final_window=6)
_AFLORA = AFLoRA(warmup=2, final=8, interval_steps=2)
METHODS: dict[str, dict[str, Any]] = {
    "salientlora": {"rank": _SALIENT},
    "adalora": {"rank": AdaLoRA(target_r=2, warmup=2, final=8, interval_steps=1)},
    "sora": {"rank": SoRA(prox_threshold=0.06, sticky_zeros=True, interval=6)},
    "aflora": {"freeze": _AFLORA},
    "grades": {"freeze": GradES(tau=0.95, alpha=6, interval_steps=2)},
    "eva": {"rank": EVA()},
    "gora": {"rank": GoRA(gamma=1.0)},
    "salientlora+aflora": {"rank": _SALIENT, "freeze": _AFLORA},
}


def cuts_ranks(method: str) -> bool:
    """In training: EVA and GoRA choose ranks before it, of the same sum or cost."""
    rank = METHODS[method].get("rank")
    return rank is not None and rank.starter is None


# name -> family, method, head is trained, dtype
CASES: dict[str, tuple[str, str, bool, torch.dtype]] = {
    **{f"{m}, {'with' if h else 'no'} head": ("bert", m, h, torch.float64) for m in METHODS for h in (True, False)},
    "salientlora, llama": ("llama", "salientlora", False, torch.float64),
    "salientlora, llama, float32": ("llama", "salientlora", False, torch.float32),
    "salientlora, float32": ("bert", "salientlora", True, torch.float32),
    "aflora, float32": ("bert", "aflora", True, torch.float32),
}
# Both axes at once, another order of the two, a model without a head of its own, and float32.
FEW = ("salientlora+aflora, with head", "adalora, no head", "salientlora, llama", "salientlora, float32")
BARE = [
    *(("ddp", True, method) for method in METHODS),
    ("ddp", False, "adalora"), ("accelerate", True, "salientlora+aflora"), ("accelerate", False, "adalora"),
]  # fmt: skip
FEW_BARE = (("ddp", True, "aflora"), ("accelerate", False, "adalora"))
# Cases whose roles have learning rates of their own.
RATES = {"salientlora+aflora, with head": {"B": 2, "head": 3}}


def run(
    case: str,
    folder: Path,
    processes: int,
    resume: str | None = None,
    base: Any = None,
    again: int = 0,
    callbacks: Iterable[Any] = (),
    **more: Any,
) -> dict[str, Any]:
    """Train one case on a global batch of 8 rows, two micro-batches a step; what came out of it.

    Args:
        base: the model, if it is not to be the family's tiny one.
        again: steps to train on after the end, with the same Trainer.
    """
    family, method, has_head, dtype = CASES[case]
    fam = tiny.FAMILIES[family]
    base = tiny.build(family).to(dtype) if base is None else base
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type if has_head else None)
    model = peft.get_peft_model(base, TrimConfig(**(options | METHODS[method])))
    if not is_sharded(model):
        model = model.to(dtype)
    tiny.begun(model, family)
    trim = TrimCallback(history=folder / "history.jsonl")
    settings = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4 // processes, learning_rate=1e-2,
        gradient_accumulation_steps=2, max_grad_norm=0.5, logging_steps=5, save_strategy="no", report_to=[], seed=0,
        use_cpu=True, disable_tqdm=True,
        # Trainer multiplies the loss by the number of processes where it averages tokens over them. That is right
        # for the token mean of a language model, and wrong for a classifier, which knows no token count.
        average_tokens_across_devices=fam.task_type != "SEQ_CLS",
    ) | more  # fmt: skip
    optimizer = None
    if case in RATES:  # not as an optimizer, which a Trainer that shards does not take
        groups = trimtab.parameter_groups(model, settings["learning_rate"], RATES[case])
        optimizer = torch.optim.AdamW, {"params": groups}
    trainer = Trainer(
        model, TrainingArguments(**settings), train_dataset=tiny.rows(family, 96), callbacks=[trim, *callbacks],
        eval_dataset=tiny.rows(family, 8, seed=5),
        optimizer_cls_and_kwargs=optimizer,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    events = list(trim.events)
    if again:
        trainer.args.max_steps += again
        trainer.train()
    weights = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n or "modules_to_save" in n}
    traces = [name for name in ("trim_anchor", "_ddp_params_and_buffers_to_ignore") if hasattr(model, name)]
    return {
        "weights": weights,
        "events": events,
        "wrapped": type(trainer.model_wrapped).__name__,
        "traces": traces,
        "kinds": kinds(model),
        "model": model,
    }


def kinds(model: Any) -> dict[str, set[str]]:
    """Types of the tensors that are adapted, and of those that train."""
    named = list(model.named_parameters())
    return {
        "base": {type(p).__name__ for n, p in named if n.endswith("base_layer.weight")},
        "trains": {type(p).__name__ for n, p in named if p.requires_grad or "lora_" in n},
    }


def decisions(events: list[dict]) -> list[dict]:
    return [event for event in events if event["event"] in ("rank", "freeze", "params")]


def numbers(events: list[dict]) -> torch.Tensor:
    """Gradient norms, penalties, learning rates and |e| of the history; Trainer sums the loss in float32."""
    found: list[float] = []
    for event in events:
        if event["event"] == "values":
            found += [v for site in event["values"].values() for v in site]
        elif event["event"] == "log":
            found += [v for key, v in event.items() if isinstance(v, float) and key != "loss"]
    return torch.tensor(found, dtype=torch.float64)


# -- decisions that differ -----------------------------------------------------------------------------------


def _fake_model(**options: Any) -> peft.PeftModel:
    base = tiny.build("bert")
    torch.manual_seed(0)
    return peft.get_peft_model(base, TrimConfig(r=4, target_modules=["query"], **options))


def _disagree(kind: str) -> str:
    """Make process 1 decide otherwise at step 3; the error's text, which every process must get."""
    process = dist.get_rank()
    options = {"freeze": AFLoRA(warmup=1, final=4, interval_steps=1)} if kind == "freeze" else {"rank": Halving()}
    model = _fake_model(**options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=10)
    if kind == "freeze":
        decide = controller.freezer.decide
        controller.freezer.decide = lambda step, *rest: set() if process == 1 and step == 3 else decide(step, *rest)
        controller.freezer.is_due = lambda step: step == 3
    else:

        def after_step(step: int, factors: Any) -> Decision | None:
            if step != 3:
                return None
            keep = {name: torch.ones(4, dtype=torch.bool) for name in factors}
            keep[next(iter(keep))][process] = False  # one rank each, but not the same one
            return Decision(keep, "prune" if kind == "prune" else "mask", 15, event=kind == "prune")

        controller.allocator.after_step = after_step
    try:
        for _ in range(6):
            model(**tiny.batch("bert")).loss.backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
    except DisagreementError as error:
        return str(error)
    return "nothing was said"


def _unused() -> list[bool]:
    """Which of two sites have a gradient after averaging, if no process, or only process 0, used the site."""
    model = _fake_model(rank=Halving(orth_weight=0.0))
    controller = Controller(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), total_steps=4)
    first, second, *_ = (layer.factors("default")[0] for layer in controller.layers.values())
    if dist.get_rank() == 0:
        first.grad = torch.ones_like(first)
    controller.before_step()
    return [first.grad is not None and bool((first.grad == 0.5).all()), second.grad is not None]


def bare_loop(kind: str, has_head: bool, method: str = "adalora") -> dict[str, Any]:
    """A loop without Trainer over half a batch each, or over the whole one ("one"); two micro-batches a step, clipped.

    Args:
        kind: "one", "ddp", "accelerate" (DDP by its own `prepare`), "fsdp2" (`fully_shard` after PEFT), "fsdp2 first"
            (before PEFT), "accelerate fsdp2".
    """
    base = tiny.build("bert").double()
    if kind == "fsdp2 first":
        shard(base)
    torch.manual_seed(0 if kind == "one" else dist.get_rank())  # all start from process 0
    options = METHODS[method] | dict(r=4, target_modules=["query"], task_type="SEQ_CLS" if has_head else None)
    model = peft.get_peft_model(base, TrimConfig(**options))
    tiny.begun(model, "bert")
    if kind == "fsdp2":
        shard(model.double(), trimtab.whole_parameters(model.double()))
    elif kind != "fsdp2 first":
        model = model.double()
    wrapped: Any = model
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, transformer_cls_names_to_wrap=["BertLayer"], auto_wrap_policy="transformer_based_wrap",
        cpu_ram_efficient_loading=False,
    ) if kind == "accelerate fsdp2" else None  # fmt: skip
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin) if kind.startswith("accelerate") else None
    controller = Controller(model, optimizer, total_steps=STEPS)
    if accelerator is not None:
        wrapped, optimizer = accelerator.prepare(model, optimizer)
    elif kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(STEPS):
        for part in range(2):
            batch = {key: value.chunk(2)[part] for key, value in tiny.batch("bert", seed=step).items()}
            if kind != "one":
                batch = {key: value.chunk(2)[dist.get_rank()] for key, value in batch.items()}
            (wrapped(**batch).loss / 2).backward()
        controller.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    frozen = controller.frozen()
    controller.finish()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    traces = [name for name in ("trim_anchor", "_ddp_params_and_buffers_to_ignore") if hasattr(model, name)]
    return {
        "weights": weights, "ranks": controller.ranks(), "frozen": frozen, "traces": traces,
        "kinds": kinds(model), "model": model,
    }  # fmt: skip


def shard(model: torch.nn.Module, whole: set[torch.nn.Parameter] | None = None) -> None:
    """FSDP2 over every block, and over the rest."""
    for block in next(m for n, m in model.named_modules() if n.endswith("encoder.layer")):
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)


def _started_from(seed: int) -> dict[str, torch.Tensor]:
    """The factors that GoRA chooses from one batch."""
    model = _fake_model(rank=GoRA(gamma=1.0))
    torch.manual_seed(seed)
    trimtab.initialize_ranks(model, [tiny.batch("bert", seed=seed)])
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}


def _wrapped_too_early() -> str:
    model = torch.nn.parallel.DistributedDataParallel(_fake_model(rank=Halving()))
    try:
        Controller(model, None, total_steps=4)
    except ModelError as error:
        return str(error)
    return "nothing was said"


def _wrapped_around() -> str:
    model = _fake_model(rank=Halving())
    controller = Controller(model, None, total_steps=4)
    ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Sequential(model))  # as a LightningModule holds it
    try:
        controller.before_step()
    except ModelError as error:
        return str(error)
    finally:
        del ddp
    return "nothing was said"


def _trained_on(folder: Path) -> dict[str, torch.Tensor]:
    """A second run on what the first has finished: plain LoRA, whose gradients DDP averages again."""
    model = _fake_model(rank=Halving(steps=(1,)))
    for steps in (2, 3):
        settings = TrainingArguments(str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True)
        Trainer(model, settings, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()]).train()
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}


def _finished(folder: Path) -> dict[str, Any]:
    """Resume at the end of a run that left modules without ranks, in the middle of an epoch, and train two steps on."""
    found = []
    for steps, resume in ((20, False), (20, True), (22, True)):
        model = _fake_model(rank=Halving(steps=(5, 10, 15)))
        settings = TrainingArguments(
            str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=10, seed=0,
            per_device_train_batch_size=2,
        )  # fmt: skip
        trim = TrimCallback(history=folder / "history.jsonl")
        trainer = Trainer(model, settings, train_dataset=tiny.rows("bert", 96), callbacks=[trim])
        trainer.train(resume_from_checkpoint=trimtab.last_checkpoint(folder) if resume else None)
        dist.barrier()
        found.append({
            "weights": {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n},
            "history": (folder / "history.jsonl").read_text(),
        })  # fmt: skip
    return {"runs": found}


def _grouped(folder: Path) -> dict[str, Any]:
    """Rows grouped by length, and dropout, which moves each process's generator by another number: the rows that this
    process took in each epoch, and its weights at the end of a run left alone and of those resumed."""
    lengths = torch.randint(3, 30, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    data = [{"input_ids": [3 + i] * n, "labels": i % 2} for i, n in enumerate(lengths)]
    rows: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows.extend(row["input_ids"][0] for row in batch)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in batch], batch_first=True)
        labels = torch.tensor([row["labels"] for row in batch])
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}

    weights = {}
    for begins_at in (0, 4, 6):  # an epoch has four steps
        model = _fake_model(rank=Halving(steps=(3,)), task_type="SEQ_CLS")
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.1
        how = {"train_sampling_strategy": "group_by_length"}
        if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
            how = {"group_by_length": True}
        settings = TrainingArguments(
            str(folder), num_train_epochs=3, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=2, seed=0,
            per_device_train_batch_size=3, **how,
        )  # fmt: skip
        trainer = Trainer(model, settings, train_dataset=data, data_collator=collate, callbacks=[TrimCallback()])
        trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-{begins_at}" if begins_at else None)
        dist.barrier()
        weights[begins_at] = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}
        if not begins_at:
            seen = [rows[i : i + 12] for i in (0, 12, 24)]
    return {"seen": seen, "ends": weights}


def _overflow(unscales_first: bool, fused: bool) -> dict[str, Any]:
    """A loss scaler, whose gradients overflow at the first step and at a later one, on process 1 alone."""
    model = _fake_model(rank=Halving(steps=(3,)), task_type="SEQ_CLS")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, fused=fused)
    events: list[dict] = []
    controller = Controller(model, optimizer, total_steps=8, on_event=events.append)
    wrapped, scaler = torch.nn.parallel.DistributedDataParallel(model), torch.amp.GradScaler("cpu", init_scale=64.0)
    for step in range(8):
        batch = {key: value.chunk(2)[dist.get_rank()] for key, value in tiny.batch("bert", seed=step).items()}
        scaler.scale(wrapped(**batch).loss).backward()
        if step in (0, 5) and dist.get_rank() == 1:
            next(iter(controller.layers.values())).factors("default")[1].grad.fill_(float("inf"))
        if unscales_first:
            scaler.unscale_(optimizer)
            controller.before_step()
        else:
            controller.before_step(scaler.get_scale())
            scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        scaler.step(optimizer)
        scaler.update()
        controller.after_step()
        optimizer.zero_grad()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    skipped = [event["step"] for event in events if event["event"] == "skipped"]
    return {"weights": weights, "skipped": skipped, "scale": scaler.get_scale()}


def _other_sites() -> str:
    """Two stages of a pipeline: each process adapts modules of its own."""
    base = tiny.build("bert")
    config = TrimConfig(r=4, target_modules=["query" if dist.get_rank() else "key"], rank=Halving())
    try:
        Controller(peft.get_peft_model(base, config), None, total_steps=30)
    except ModelError as error:
        return str(error)
    return "nothing was said"


def main(out: Path, cases: Collection[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results: dict[str, Any] = {}
    for case in cases:
        results[case] = run(case, out / "runs" / case, processes=2)
    case, folder = "salientlora+aflora, with head", out / "runs" / "resumed"
    saving = dict(save_strategy="steps", save_steps=5, logging_steps=3)
    unbroken = run(case, folder, processes=2, **saving)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.copy(folder / "history.jsonl", out / "unbroken.jsonl")
        for step in (15, 20):
            shutil.rmtree(folder / f"checkpoint-{step}")
    dist.barrier()
    resumed = run(case, folder, processes=2, resume=trimtab.last_checkpoint(folder), **saving)
    results["unbroken"], results["resumed"] = unbroken, resumed
    for kind in ("prune", "mask", "freeze"):
        results[f"disagree: {kind}"] = _disagree(kind)
    results["unused"] = _unused()
    for kind, has_head, method in BARE if set(cases) == set(CASES) else FEW_BARE:
        results[f"{kind}, {has_head}, {method}"] = bare_loop(kind, has_head, method)
    results["started"] = _started_from(seed=dist.get_rank())
    results["wrapped too early"] = _wrapped_too_early()
    results["wrapped around"] = _wrapped_around()
    results["trained on"] = _trained_on(out / "runs" / "again")
    results["same trainer"] = run("salientlora, llama", out / "runs" / "same", processes=2, again=4)
    results["finished"] = _finished(out / "runs" / "finished")
    results["other sites"] = _other_sites()
    for way in ((first, fused) for first in (True, False) for fused in (True, False)):
        results[f"overflow: {way}"] = _overflow(*way)
    results["grouped"] = _grouped(out / "runs" / "grouped")
    for result in results.values():
        if isinstance(result, dict):
            result.pop("model", None)
    torch.save(results, out / f"process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
