"""One short stock-Trainer run on a tiny model, used by every test of a promise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from marks import slow
from trimtab import (
    EVA,
    AdaLoRA,
    AFLoRA,
    Controller,
    FreezeAt,
    GoRA,
    GradES,
    SalientLoRA,
    SoRA,
    TrimCallback,
    TrimConfig,
)

STEPS = 40

# Each has two pruning events inside 40 steps, or freezes in mid-run.
METHODS: dict[str, dict[str, Any]] = {
    "salientlora": {"rank": SalientLoRA(target_r=2, warmup=4, allocation=24, initial_window=4, final_window=8)},
    "adalora": {"rank": AdaLoRA(target_r=2, warmup=4, final=14, interval_steps=5)},
    "sora": {"rank": SoRA(prox_threshold=0.028, sticky_zeros=True, interval=12)},
    "aflora": {"freeze": AFLoRA(warmup=4, final=12, interval_steps=4)},
    "grades": {"freeze": GradES(tau=2.0, alpha=10, interval_steps=4)},
    "salientlora+aflora": {
        "rank": SalientLoRA(target_r=2, warmup=4, allocation=24, initial_window=4, final_window=8),
        "freeze": AFLoRA(warmup=4, final=12, interval_steps=4),
    },
    "adalora+at, svd": {
        "rank": AdaLoRA(target_r=2, start="svd", warmup=4, final=14, interval_steps=5),
        "freeze": FreezeAt(at=32),
    },
    "eva": {"rank": EVA(rho=1.5)},
    "gora": {"rank": GoRA(gamma=1.0)},
    "salientlora, eva": {
        "rank": SalientLoRA(target_r=2, start="eva", warmup=4, allocation=24, initial_window=4, final_window=8)
    },
    "salientlora+aflora, svd": {
        "rank": SalientLoRA(target_r=2, start="svd", warmup=4, allocation=24, initial_window=4, final_window=8),
        "freeze": AFLoRA(start="svd", warmup=4, final=12, interval_steps=4),
    },
}

# Both axes at once. What does not depend on how a method decides is tested with these, and with all methods by
# `make test-all`.
FEW = ("salientlora+aflora",)
each_method = pytest.mark.parametrize("method", [m if m in FEW else slow(m) for m in METHODS])


def config_for(method: str) -> Callable[..., TrimConfig]:
    """The method's config, for what else a config takes."""
    return lambda **more: TrimConfig(**(dict(r=4, lora_alpha=8) | METHODS[method] | more))


def model_for(family: str, method: str, **options: Any) -> peft.PeftModel:
    """The tiny model with the method's adapter, the same weights every time."""
    fam = tiny.FAMILIES[family]
    base = tiny.build(family)
    if options.pop("double", False):
        base = base.double()
    torch.manual_seed(0)
    options = dict(target_modules=fam.target_modules, task_type=fam.task_type) | options
    return tiny.begun(peft.get_peft_model(base, config_for(method)(**options)), family)


def steps(
    model: peft.PeftModel, controller: Controller, optimizer: torch.optim.Optimizer, n: int, family: str = "llama"
) -> None:
    """A bare loop over one batch."""
    batch = tiny.batch(family)
    model.train()
    for _ in range(n):
        model(**batch).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()


class _KeepLogits(TrainerCallback):
    def __init__(self, family: str) -> None:
        self.family, self.logits = family, {}

    def on_save(self, args, state, control, model=None, **kw):
        self.logits[state.global_step] = tiny.logits(model, self.family)


def train(
    model: peft.PeftModel,
    family: str,
    folder: Path,
    resume: str | bool | None = None,
    callbacks: tuple = (),
    trim: TrimCallback | None = None,
    options: dict[str, Any] | None = None,
    rows: Any = None,
    **more: Any,
) -> tuple[TrimCallback, dict[int, torch.Tensor]]:
    """Train 40 steps, saving every 5; returns the callback and the logits at every save."""
    args = dict(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, save_steps=5, logging_steps=5,
        report_to=[], learning_rate=1e-2, use_cpu=True, disable_tqdm=True, seed=0, average_tokens_across_devices=False,
    ) | more  # fmt: skip
    trim, keep = trim or TrimCallback(history=folder / "history.jsonl"), _KeepLogits(family)
    trainer = Trainer(
        model, TrainingArguments(**args), train_dataset=rows or tiny.rows(family),
        eval_dataset=tiny.rows(family, 16, seed=5), callbacks=[trim, keep, *callbacks], **(options or {}),
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trim, keep.logits
