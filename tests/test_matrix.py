"""Every model family with every method: train, save, resume, export, reload. What cannot be says why."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import tiny
import trimtab
from trimtab import AdaLoRA, AFLoRA, SalientLoRA, SoRA, TrimCallback, TrimConfig

STEPS = 8
LORA = dict(r=4, lora_alpha=8)

METHODS: dict[str, Any] = {
    "lora": lambda **common: peft.LoraConfig(**LORA, **common),
    "vera": lambda **common: peft.VeraConfig(r=4, **common),
    "adalora": lambda **common: TrimConfig(
        **LORA, rank=AdaLoRA(target_r=2, warmup=1, final=2, interval_steps=2), **common
    ),
    "salientlora": lambda **common: TrimConfig(
        **LORA, rank=SalientLoRA(target_r=2, warmup=1, allocation=5, initial_window=2, final_window=3), **common
    ),
    "sora": lambda **common: TrimConfig(**LORA, rank=SoRA(prox_threshold=0.04, interval=3), **common),
    "aflora": lambda **common: TrimConfig(**LORA, freeze=AFLoRA(warmup=1, final=3, interval_steps=2), **common),
}


def chosen_by_cka(family: str) -> trimtab.Where:
    batches = [{k: v for k, v in tiny.batch(family, seed=s).items() if k != "labels"} for s in (1, 2)]
    if tiny.FAMILIES[family].task_type == "SEQ_2_SEQ_LM":
        batches = [b | {"decoder_input_ids": b["input_ids"]} for b in batches]
    scores = trimtab.layer_similarity(tiny.build(family).eval(), batches)
    return trimtab.select_layers(scores, ratio=0.5)


def chosen_blocks(where: trimtab.Where, marks: str) -> set[tuple[str, int]]:
    return {(stack, i) for stack, mask in where.stacks.items() for i, mark in enumerate(mask) if mark in marks}


@pytest.fixture(scope="module")
def selections() -> dict[str, trimtab.Where]:
    return {}


def adapted(family: str, method: str, where: trimtab.Where | None) -> peft.PeftModel:
    fam = tiny.FAMILIES[family]
    targets = fam.targets if isinstance(fam.targets, str) else fam.target_modules
    config, base = METHODS[method](target_modules=targets, task_type=fam.task_type), tiny.build(family)
    if where is not None:
        config = trimtab.restrict(config, where, base)
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


def train(model: peft.PeftModel, family: str, folder: Path, resume: str | None = None) -> None:
    args = TrainingArguments(
        str(folder), max_steps=STEPS, per_device_train_batch_size=8, save_steps=STEPS // 2, logging_steps=4,
        report_to=[], learning_rate=5e-2, use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=tiny.rows(family), callbacks=[TrimCallback()])
    trainer.train(resume_from_checkpoint=resume)


def reload(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        return peft.PeftModel.from_pretrained(tiny.build(family), folder)


@pytest.mark.parametrize("where", ["all layers", "cka"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cell_trains_resumes_and_leaves_as_lora(family, method, where, tmp_path, selections):
    if where == "cka" and family not in selections:
        selections[family] = chosen_by_cka(family)
    chosen = selections[family] if where == "cka" else None
    model = adapted(family, method, chosen)
    if chosen is not None:
        trained_in = [n for n, p in model.named_parameters() if p.requires_grad and ("lora_" in n or "vera_" in n)]
        touched = {b for b in chosen_blocks(chosen, "01") if any(f"{b[0]}.{b[1]}." in n for n in trained_in)}
        assert touched == chosen_blocks(chosen, "1")
    before = tiny.logits(model, family)
    train(model, family, tmp_path)
    trained = tiny.logits(model, family)
    assert not torch.allclose(trained, before, atol=1e-4)

    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    again = adapted(family, method, chosen)
    train(again, family, tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert torch.equal(tiny.logits(again, family), trained)

    trimtab.export(model, tmp_path / "exported")
    loaded = reload(family, tmp_path / "exported")
    assert loaded.peft_config["default"].peft_type == "LORA"
    assert torch.allclose(tiny.logits(loaded, family), trained, atol=1e-5)


@pytest.mark.parametrize("where", ["all layers", "cka"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_bottleneck_cell_trains_resumes_and_is_loaded_again(family, where, tmp_path, selections):
    if where == "cka" and family not in selections:
        selections[family] = chosen_by_cka(family)
    chosen = selections[family] if where == "cka" else None

    def adapted() -> peft.PeftModel:
        config = trimtab.BottleneckConfig(bottleneck_size=4, task_type=tiny.FAMILIES[family].task_type, where=chosen)
        base = tiny.build(family)
        torch.manual_seed(0)
        return peft.get_peft_model(base, config)

    model, again = adapted(), adapted()
    before = tiny.logits(model, family)
    train(model, family, tmp_path)
    trained = tiny.logits(model, family)
    assert not torch.allclose(trained, before, atol=1e-4)
    shutil.rmtree(tmp_path / f"checkpoint-{STEPS}")
    train(again, family, tmp_path, resume=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    assert torch.equal(tiny.logits(again, family), trained)
    again.save_pretrained(tmp_path / "saved")
    assert torch.allclose(tiny.logits(reload(family, tmp_path / "saved"), family), trained, atol=1e-6)
    with pytest.raises(trimtab.TrimtabError, match="no LoRA or merged form"):
        trimtab.export(again, tmp_path / "exported")
