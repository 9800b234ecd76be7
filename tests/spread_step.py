"""A step of one of several processes, in a process of its own: what it holds at the height, and what it sends.

torchrun --nproc-per-node N tests/spread_step.py OUT STRATEGY MICRO_BATCHES
"""

import json
import sys
from pathlib import Path

import peft
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab
from trimtab.train.parallel import average

CONFIG = LlamaConfig(
    vocab_size=512, hidden_size=128, num_hidden_layers=8, num_attention_heads=4, intermediate_size=512,
    num_key_value_heads=2, tie_word_embeddings=True,
)  # fmt: skip
LORA = dict(task_type="CAUSAL_LM", r=8, target_modules="all-linear")
BATCH, TOKENS = 2, 16


class Sent(TorchDispatchMode):
    """Bytes that this process sends, if every collective is a ring."""

    def __init__(self):
        super().__init__()
        self.weights = self.others = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name, ring = str(func), (dist.get_world_size() - 1) / dist.get_world_size()
        if name.startswith("c10d."):
            size = [t.numel() * t.element_size() for t in tree_iter(args) if isinstance(t, torch.Tensor)]
            if "allgather" in name:
                self.weights += ring * max(size)  # the output: all processes' parts
            elif "allreduce" in name:
                self.others += 2 * ring * sum(size)
            else:
                raise AssertionError(f"{name} is not counted")
        return out


def height(found):
    """Most bytes that were alive at a time, by the allocator's own count."""
    now = most = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def main(out, strategy, micro_batches):
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = peft.get_peft_model(LlamaForCausalLM(CONFIG), trimtab.TrimConfig(**LORA)).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    if strategy == "fsdp2":
        whole = trimtab.whole_parameters(model)
        for block in model.get_base_model().model.layers:
            fully_shard(block, ignored_params=whole)
        fully_shard(model, ignored_params=whole)
    held = sum(
        (t.to_local() if hasattr(t, "to_local") else t).untyped_storage().nbytes()
        for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    )
    ids = torch.randint(5, 100, (BATCH, TOKENS))

    def step():
        for _ in range(micro_batches):
            model(input_ids=ids, labels=ids).loss.backward()
        average(trained)
        for p in trained:
            p.grad = None

    step()  # FSDP2 sets itself up in the first one
    heights = []
    for _ in range(5):  # gloo's threads let go of what they gathered sooner or later: the least is what a step needs
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            step()
        heights.append(height(found))
    with Sent() as sent:
        step()
    moments = 8 * sum(p.numel() for p in trained)
    told = {"peak": held + min(heights) + moments, "sent": sent.weights + sent.others, "sent_weights": sent.weights}
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(told))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
