"""The interface as a run uses it: stock Trainer, stock PEFT, a task, a loaded model."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, Trainer, TrainingArguments

from tasks.stand_ins import encoder_tokenizer, tiny_config, write_jsonl
from trimtab.app.models import ModelSpec, load_model, load_tokenizer
from trimtab.app.tasks import get_task


@pytest.mark.parametrize(("kind", "targets"), [("bert", ["query"]), ("bart", ["q_proj"])])
def test_mnli_trains_and_is_scored_on_both_halves(tmp_path, kind, targets):
    rows = [{"premise": "the cat sat", "hypothesis": "a dog " * (i + 1), "label": i % 3} for i in range(7)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    AutoModel.from_config(tiny_config(kind)).save_pretrained(tmp_path / "model")
    encoder_tokenizer().save_pretrained(tmp_path / "model")

    task = get_task({"name": "glue/mnli", "max_length": 24})
    spec = ModelSpec(name_or_path=str(tmp_path / "model"))
    raw = task.load_data({"train": file, "validation_matched": file, "validation_mismatched": file})
    tokenizer = load_tokenizer(spec, task)
    torch.manual_seed(0)
    got = load_model(spec, task, tokenizer)
    ready = task.prepare(raw, tokenizer, got.model)
    model = get_peft_model(
        got.model,
        LoraConfig(task_type=task.task_type, r=2, target_modules=targets, modules_to_save=list(got.modules_to_save)),
    )
    trainer = Trainer(
        model=model,
        train_dataset=ready["train"],
        eval_dataset={s: ready[s] for s in task.eval_splits(ready)},
        data_collator=task.collator(tokenizer),
        compute_metrics=task.compute_metrics,
        preprocess_logits_for_metrics=task.preprocess_logits_for_metrics,
        args=TrainingArguments(
            str(tmp_path / "out"),
            max_steps=2,
            per_device_train_batch_size=3,
            use_cpu=True,
            per_device_eval_batch_size=4,
            report_to=[],
            disable_tqdm=True,
            save_strategy="no",
        ),
    )
    trainer.train()
    scores = trainer.evaluate()
    for split in ("validation_matched", "validation_mismatched"):
        assert 0 <= scores[f"eval_{split}_accuracy"] <= 1
