"""A bare PyTorch loop: two calls around `optimizer.step()`, and one at the end.

    python examples/bare_loop.py [OUTPUT_FOLDER]

The model is a small random one, so that nothing needs to be downloaded; it learns to count.
"""

import sys
from pathlib import Path

import peft
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab

STEPS = 60
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/bare_loop")

torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=40,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=32,
    )
)
config = trimtab.TrimConfig(
    task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear", rank=trimtab.AdaLoRA(target_r=4)
)
model = peft.get_peft_model(base, config)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)

controller = trimtab.Controller(model, optimizer, total_steps=STEPS)
held = controller.trainable_params()
for step in range(STEPS):
    starts = torch.randint(0, 20, (16, 1))
    tokens = starts + torch.arange(16)  # (16, 16): rows that count upwards
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    controller.before_step()  # after the last backward, before clipping
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    controller.after_step()  # ranks may be cut here, with the optimizer's moments
    optimizer.zero_grad()
    if step % 10 == 9:
        print(f"step {step + 1:3d}  loss {loss.item():.3f}  total rank {sum(controller.ranks().values())}")
controller.finish()

model.save_pretrained(out / "adapter")
print(
    f"{held:,} trainable parameters at the start, {controller.figures()['final']:,} at the end; "
    f"a plain LoRA adapter in {out / 'adapter'}"
)
