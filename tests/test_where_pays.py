"""What lies below the lowest adapted layer costs a forward pass and nothing else."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Trainer, TrainingArguments, default_data_collator

import tiny
import trimtab
from test_fused import kept_by_the_graph
from trimtab.host.sites import find_stacks
from trimtab.where import from_mask

MASK = "0011"


def adapted(family: str, mask: str = MASK, **settings) -> nn.Module:
    kind = tiny.FAMILIES[family]
    base = tiny.build(family)
    config = trimtab.TrimConfig(
        r=4, target_modules=list(kind.targets), task_type=kind.task_type, where=from_mask(base, mask), **settings
    )
    return peft.get_peft_model(base, config).train()


def blocks_of(model: nn.Module) -> tuple[nn.Module, ...]:
    (stack,) = find_stacks(model).values()
    return stack.blocks


def leaves(value) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(value) if isinstance(t, Tensor)]


class Made(TorchDispatchMode):
    """Holds every tensor that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: list[Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in leaves((args, kwargs))}  # a view makes nothing
        self.tensors += [t for t in leaves(out) if t.untyped_storage()._cdata not in given]
        return out


def checkpointed(folder, steps: int, use_reentrant: bool) -> TrainingArguments:
    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": use_reentrant},
        save_strategy="no",
        report_to=[],
        use_cpu=True,
    )


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_nothing_that_is_made_below_the_lowest_adapter_is_kept(family):
    model = adapted(family)
    below, outputs = blocks_of(model)[:2], []
    made = Made()
    for block in below:
        block.register_forward_pre_hook(lambda *_: made.__enter__() and None)
        block.register_forward_hook(lambda m, args, out: made.__exit__(None, None, None) or outputs.append(out))
    loss = model(**tiny.batch(family)).loss
    outputs = [out[0] if isinstance(out, tuple) else out for out in outputs]
    assert [out.grad_fn for out in outputs] == [None, None] and len(made.tensors) > 20
    kept = kept_by_the_graph(loss)
    handed_on = outputs[-1].untyped_storage()._cdata  # what the lowest adapter reads
    assert not {t.untyped_storage()._cdata for t in made.tensors} & kept.keys() - {handed_on}

    whole = kept_by_the_graph(adapted(family, "1111")(**tiny.batch(family)).loss)
    held, all_held = (sum(t.untyped_storage().nbytes() for t in each.values()) for each in (kept, whole))
    assert held < 0.65 * all_held


@pytest.mark.parametrize("controlled", [False, True], ids=["plain LoRA", "AFLoRA"])
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_under_checkpointing_blocks_below_the_lowest_adapter_are_run_once_a_step(family, controlled, tmp_path):
    def calls(*callbacks) -> list[int]:
        model = adapted(family, **({"freeze": trimtab.AFLoRA()} if controlled and callbacks else {}))
        counts = [0] * len(MASK)
        for i, block in enumerate(blocks_of(model)):
            # Of the block itself hooks are called once; its parts are what is run again.
            part = next(block.children())
            part.register_forward_pre_hook(lambda *_, i=i: counts.__setitem__(i, counts[i] + 1))
        args = checkpointed(tmp_path, 3, use_reentrant=False)
        rows = tiny.rows(family, 12)
        Trainer(model, args, default_data_collator, rows, callbacks=list(callbacks)).train()
        return counts

    assert calls(trimtab.TrimCallback()) == [3, 3, 6, 6]
    assert calls() == [6, 6, 6, 6]  # what the Trainer's checkpointing does by itself


def test_reentrant_checkpointing_still_finds_its_adapters(tmp_path):
    model = adapted("llama")
    args = checkpointed(tmp_path, 2, use_reentrant=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    Trainer(model, args, default_data_collator, tiny.rows("llama", 16), callbacks=[trimtab.TrimCallback()]).train()
    assert before and not any(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)
