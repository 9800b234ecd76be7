"""What two processes and one run: ``torchrun --nproc-per-node 2 two_process.py OUT CASE …``."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from torch import distributed as dist
from transformers import Trainer, TrainingArguments

import tiny
import trimtab
from fakes import Halving
from trimtab import AdaLoRA, AFLoRA, Controller, GradES, SalientLoRA, SoRA, TrimCallback, TrimConfig
from trimtab.errors import DisagreementError, ModelError
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
    "salientlora+aflora": {"rank": _SALIENT, "freeze": _AFLORA},
}
# name -> family, method, head is trained, dtype
CASES: dict[str, tuple[str, str, bool, torch.dtype]] = {
    **{f"{m}, {'with' if h else 'no'} head": ("bert", m, h, torch.float64) for m in METHODS for h in (True, False)},
    "salientlora, llama": ("llama", "salientlora", False, torch.float64),
    "salientlora, float32": ("bert", "salientlora", True, torch.float32),
    "aflora, float32": ("bert", "aflora", True, torch.float32),
}
# Both axes at once, another order of the two, a model without a head of its own, and float32.
FEW = ("salientlora+aflora, with head", "adalora, no head", "salientlora, llama", "salientlora, float32")
# Cases whose roles have learning rates of their own.
RATES = {"salientlora+aflora, with head": {"B": 2, "head": 3}}


def run(case: str, folder: Path, processes: int, resume: str | None = None, **more: Any) -> dict[str, Any]:
    """Train one case on a global batch of 8 rows, two micro-batches a step; what came out of it."""
    family, method, has_head, dtype = CASES[case]
    fam = tiny.FAMILIES[family]
    base = tiny.build(family).to(dtype)
    torch.manual_seed(0)
    options = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type if has_head else None)
    model = peft.get_peft_model(base, TrimConfig(**(options | METHODS[method]))).to(dtype)
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
    if case in RATES:
        optimizer = torch.optim.AdamW(trimtab.parameter_groups(model, settings["learning_rate"], RATES[case]))
    trainer = Trainer(
        model, TrainingArguments(**settings), train_dataset=tiny.rows(family, 96), callbacks=[trim],
        optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    weights = {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n or "modules_to_save" in n}
    traces = [name for name in ("trim_anchor", "_ddp_params_and_buffers_to_ignore") if hasattr(model, name)]
    return {
        "weights": weights,
        "events": trim.events,
        "wrapped": type(trainer.model_wrapped).__name__,
        "traces": traces,
    }


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


def bare_loop(kind: str, has_head: bool) -> dict[str, Any]:
    """A loop without Trainer over half a batch each ("ddp", "accelerate"), or over the whole one ("one")."""
    base = tiny.build("bert").double()
    torch.manual_seed(0 if kind == "one" else dist.get_rank())  # DDP starts all from process 0
    options = METHODS["adalora"] | dict(r=4, target_modules=["query"], task_type="SEQ_CLS" if has_head else None)
    model = peft.get_peft_model(base, TrimConfig(**options)).double()
    wrapped: Any = model
    optimizer: Any = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=STEPS)
    if kind == "accelerate":
        wrapped, optimizer = Accelerator(cpu=True).prepare(model, optimizer)
    elif kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    for step in range(STEPS):
        batch = tiny.batch("bert", seed=step)
        if kind != "one":
            batch = {key: value.chunk(2)[dist.get_rank()] for key, value in batch.items()}
        wrapped(**batch).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n or "modules_to_save" in n}
    traces = [name for name in ("trim_anchor", "_ddp_params_and_buffers_to_ignore") if hasattr(model, name)]
    return {"weights": weights, "ranks": controller.ranks(), "traces": traces}


def _wrapped_too_early() -> str:
    model = torch.nn.parallel.DistributedDataParallel(_fake_model(rank=Halving()))
    try:
        Controller(model, None, total_steps=4)
    except ModelError as error:
        return str(error)
    return "nothing was said"


def _trained_on(folder: Path) -> dict[str, torch.Tensor]:
    """A second run on what the first has finished: plain LoRA, whose gradients DDP averages again."""
    model = _fake_model(rank=Halving(steps=(1,)))
    for steps in (2, 3):
        settings = TrainingArguments(str(folder), max_steps=steps, report_to=[], use_cpu=True, disable_tqdm=True)
        Trainer(model, settings, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()]).train()
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" in n}


def main(out: Path, cases: Iterable[str]) -> None:
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
    for kind in ("ddp", "accelerate"):
        for has_head in (True, False):
            results[f"{kind}, {has_head}"] = bare_loop(kind, has_head)
    results["wrapped too early"] = _wrapped_too_early()
    results["trained on"] = _trained_on(out / "runs" / "again")
    torch.save(results, out / f"process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
