"""Pruned and frozen means gone: parameters, gradients and moments, as if training had always been that small."""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import peft
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import tiny
from fakes import Halving
from trimtab import AFLoRA, Controller, SalientLoRA, SoRA, TrimConfig
from trimtab.host.layers import hosted_layers

SALIENT = SalientLoRA(target_r=2, warmup=2, allocation=6, initial_window=2, final_window=3)


class Net(nn.Module):
    """Two linears of different shapes, so that ranks of one cost more than ranks of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))


def adapted(rank=None, dtype: torch.dtype = torch.float64, **options) -> peft.PeftModel:
    torch.manual_seed(0)
    config = TrimConfig(r=5, lora_alpha=10, target_modules=["up", "down"], rank=rank or Halving(steps=(4,)), **options)
    return peft.get_peft_model(Net().to(dtype), config).to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    dtype = next(model.parameters()).dtype
    x, y = (torch.randn(16, n, generator=generator, dtype=torch.float64).to(dtype) for n in (6, 3))
    return (model(x) - y).square().mean()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def steps(model: nn.Module, optimizer, controller: Controller, numbers: range, after=lambda step: None) -> None:
    for step in numbers:
        loss_of(model, step).backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        after(step)
        optimizer.zero_grad()


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=False),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "adam fused": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, fused=True),
    "sgd plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
}


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "salientlora") for kind in OPTIMIZERS),
        *((kind, method) for kind in ("adamw", "sgd") for method in ("svd", "halving")),
    ],
)
def test_a_pruned_model_trains_on_like_a_masked_one_restricted_to_the_kept_ranks(kind, method):
    svd = replace(SALIENT, start="svd")
    rank = {"halving": Halving(steps=(4, 7), orth_weight=0.0), "salientlora": SALIENT, "svd": svd}[method]
    masked_rank = copy.copy(rank)
    object.__setattr__(masked_rank, "prune", False)
    models, optimizers, controllers = [], [], []
    for settings in (rank, masked_rank):
        models.append(adapted(settings))
        optimizers.append(OPTIMIZERS[kind](trainable(models[-1])))
        controllers.append(Controller(models[-1], optimizers[-1], total_steps=14))
        steps(models[-1], optimizers[-1], controllers[-1], range(14))
    pruned, masked = (hosted_layers(model) for model in models)
    keep = dict(zip(controllers[1].allocator.names, controllers[1].allocator.alive.split([5, 5])))
    assert 0 < sum(int(k.sum()) for k in keep.values()) <= 4
    for name, layer in pruned.items():
        sides = (
            (*layer.factors("default"), *layer.lora_e.values()),
            (*masked[name].factors("default"), *masked[name].lora_e.values()),
        )
        for ours, full, dim in zip(*sides, (0, 1, 0)):
            rows = keep[name].nonzero().squeeze(1)
            assert torch.allclose(ours, full.index_select(dim, rows), rtol=1e-12, atol=1e-12)
            state, full_state = optimizers[0].state[ours], optimizers[1].state[full]
            assert state.keys() == full_state.keys()
            for key, value in state.items():
                if isinstance(value, Tensor) and value.dim():
                    assert value.shape == ours.shape
                    assert torch.allclose(value, full_state[key].index_select(dim, rows), rtol=1e-12, atol=1e-12), key


def test_a_prune_keeps_parameters_groups_and_learning_rates():
    model = adapted()
    groups = [
        {"params": [p for n, p in model.named_parameters() if "lora_B" in n], "lr": 0.16},
        {"params": [p for n, p in model.named_parameters() if "lora_A" in n or "lora_e" in n], "lr": 0.01},
    ]
    optimizer = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    before = [(g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups]
    parameters = {n: id(p) for n, p in model.named_parameters()}
    controller = Controller(model, optimizer, total_steps=10)
    steps(model, optimizer, controller, range(6))
    assert sum(controller.ranks().values()) == 5
    assert [(g["lr"], [id(p) for p in g["params"]]) for g in optimizer.param_groups] == before
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [0.08, 0.005]


def test_gradient_hooks_survive_a_prune():
    model = adapted(Halving(steps=(4,), orth_weight=0.0))
    seen: dict[str, list] = {"accumulated": [], "raw": []}
    layer = next(iter(hosted_layers(model).values()))
    A, _ = layer.factors("default")
    A.register_post_accumulate_grad_hook(lambda p: seen["accumulated"].append(p.grad.shape))
    A.register_hook(lambda gradient: seen["raw"].append(gradient.shape))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller = Controller(model, optimizer, total_steps=8)
    steps(model, optimizer, controller, range(8))
    r = layer.r["default"]
    assert 0 < r < 5
    assert seen["accumulated"] == seen["raw"] == [(5, 6)] * 4 + [(r, 6)] * 4


def test_a_loss_that_is_still_alive_does_not_disturb_the_next_backward():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller = Controller(model, optimizer, total_steps=8)
    kept_losses = []  # every graph of the run stays alive
    for step in range(8):
        loss = loss_of(model, step)
        loss.backward(retain_graph=True)
        controller.before_step()
        optimizer.step()
        controller.after_step()
        kept_losses.append(loss)
        optimizer.zero_grad()
    assert sum(controller.ranks().values()) == 5


def test_gradients_that_are_kept_are_cut_with_the_parameter():
    model = adapted()
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller = Controller(model, optimizer, total_steps=8)

    def shapes_match(step: int) -> None:
        assert all(p.grad.shape == p.shape for p in trainable(model))

    steps(model, optimizer, controller, range(8), after=shapes_match)


def test_a_module_cut_to_rank_zero_trains_on():
    model = adapted(Halving(steps=(2, 3, 4), orth_weight=0.0))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05, foreach=True)
    controller = Controller(model, optimizer, total_steps=8)
    steps(model, optimizer, controller, range(8))
    assert sorted(controller.ranks().values()) == [0, 1]
    x = torch.ones(1, 6, dtype=torch.float64)
    before = model(x)
    controller.finish()
    assert torch.allclose(model(x), before)


def adafactor(p):
    return tf.Adafactor(p, lr=0.01, relative_step=False, scale_parameter=False)


def adam_8bit(p):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(p, lr=0.01, min_8bit_size=16)


@pytest.mark.parametrize("build", [adafactor, adam_8bit])
def test_optimizers_whose_state_cannot_be_cut_get_masks_and_one_warning(build):
    model = adapted(Halving(steps=(3, 5)), dtype=torch.float32)
    optimizer = build(trainable(model))
    events = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        controller = Controller(model, optimizer, total_steps=9, on_event=events.append)
        steps(model, optimizer, controller, range(9))
    said = [str(w.message) for w in caught if "masked, not pruned" in str(w.message)]
    assert len(said) == 1 and type(optimizer).__name__ in said[0]
    assert [(e["kind"], sum(e["ranks"].values())) for e in events if e["event"] == "rank"] == [("mask", 5), ("mask", 2)]
    layers = hosted_layers(model)
    assert all(layer.factors("default")[0].shape[0] == 5 for layer in layers.values())
    assert sum(int((layer.lora_e["default"] != 0).sum()) for layer in layers.values()) == 2
    # Once training is over nothing needs the moments any more, and the adapter gets its size.
    x = torch.ones(1, 6)
    before = model(x)
    controller.finish()
    assert sum(controller.ranks().values()) == 2
    assert torch.allclose(model(x), before, atol=1e-6)


def test_masks_only_keeps_every_shape_to_the_end():
    model = adapted(SalientLoRA(target_r=2, warmup=2, allocation=6, initial_window=2, final_window=3, prune=False))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller = Controller(model, optimizer, total_steps=10)
    steps(model, optimizer, controller, range(10))
    controller.finish()
    assert set(controller.ranks().values()) == {5}


def test_weight_decay_does_not_pull_at_gates():
    gates = []
    for decay in (0.0, 0.5):
        model = adapted(SoRA(prox_threshold=0.01))
        others = [p for n, p in model.named_parameters() if p.requires_grad and "lora_e" not in n]
        e = [p for n, p in model.named_parameters() if "lora_e" in n]
        optimizer = torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.0}, {"params": e, "weight_decay": decay}], lr=0.05
        )
        controller = Controller(model, optimizer, total_steps=6)
        steps(model, optimizer, controller, range(6))
        gates.append(torch.cat([p.detach() for p in e]))
    assert torch.allclose(*gates, rtol=1e-12, atol=1e-12)


def test_decay_that_is_part_of_the_gradient_is_named_where_gates_would_feel_it():
    model = adapted(SoRA(prox_threshold=0.01))
    with pytest.warns(UserWarning, match="weight_decay: in SGD it is part of the gradient"):
        Controller(model, torch.optim.SGD(trainable(model), lr=0.1, weight_decay=0.1), total_steps=6)


def test_frozen_projections_are_cut_and_have_no_state():
    model = adapted(Halving(steps=(8,), orth_weight=0.0), freeze=AFLoRA(warmup=1, final=4, interval_steps=1))
    optimizer = torch.optim.AdamW(trainable(model), lr=0.05)
    controller = Controller(model, optimizer, total_steps=12)
    steps(model, optimizer, controller, range(12))
    assert len(controller.frozen()) == 4
    for layer in hosted_layers(model).values():
        for p in layer.factors("default"):
            assert p not in optimizer.state and p.grad is None
    assert sum(controller.ranks().values()) == 5


# -- memory ----------------------------------------------------------------------------------------------


def smollm(layers: int, vocab: int = 256) -> nn.Module:
    """SmolLM2-135M's shape; fewer layers and words where the test is to be quick."""
    config = tf.LlamaConfig(
        vocab_size=vocab, hidden_size=576, num_hidden_layers=layers, num_attention_heads=9, num_key_value_heads=3,
        intermediate_size=1536, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(config)


def adapter_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Whole storages of parameters, gradients and optimizer state: a view into something larger counts fully."""
    tensors = []
    for p in trainable(model):
        tensors += [p, *([] if p.grad is None else [p.grad])]
        tensors += [v for v in optimizer.state.get(p, {}).values() if isinstance(v, Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}.values())


@pytest.mark.parametrize("layers", [1, pytest.param(30, marks=pytest.mark.slow)])
def test_memory_falls_to_what_the_kept_ranks_cost(layers):
    base = smollm(layers)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    rank = SalientLoRA(target_r=4, warmup=1, allocation=7, initial_window=2, final_window=3)
    model = peft.get_peft_model(base, TrimConfig(r=64, lora_alpha=64, target_modules=targets, rank=rank))
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-3)
    events = []
    controller = Controller(model, optimizer, total_steps=11, on_event=events.append)
    ids = torch.arange(8).unsqueeze(0) + 5
    sizes = []
    for _ in range(11):
        model(input_ids=ids, labels=ids).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        sizes.append(adapter_bytes(model, optimizer))
        optimizer.zero_grad()
    ranks = {name: r for name, r in controller.ranks().items() if r}
    assert sum(ranks.values()) == 4 * 7 * layers
    sites = hosted_layers(model)
    kept = sum(r * (sites[name].in_features + sites[name].out_features) for name, r in ranks.items())
    cost = 4 * 4 * kept  # float32: parameter, gradient and two moments
    assert sizes[-3] == sizes[-1]  # after the last prune and on
    assert abs(sizes[-1] / cost - 1) < 0.01
    assert sizes[0] / sizes[-1] >= 10.5
    freed = [sum(e["freed"].values()) for e in events if e["event"] == "rank"]
    assert abs(sizes[0] - sizes[-1] - sum(freed)) < 0.001 * sizes[0]


def test_the_tiny_family_keeps_its_logits_across_a_cut():
    model = peft.get_peft_model(
        tiny.build("llama").double(), TrimConfig(r=4, target_modules=["q_proj", "v_proj"], rank=Halving(steps=(1,)))
    )
    optimizer = torch.optim.SGD(trainable(model), lr=0.0)
    controller = Controller(model, optimizer, total_steps=2)
    model(**tiny.batch("llama")).loss.backward()
    layers = hosted_layers(model)
    e = torch.cat([layer.lora_e["default"].detach() for layer in layers.values()])
    dead = e.abs() < e.abs().sort().values[len(e) // 2]
    for layer, gone in zip(layers.values(), dead.split(4)):
        layer.lora_e["default"].data[gone] = 0.0
    masked = tiny.logits(model, "llama")
    controller.before_step()
    optimizer.step()
    controller.after_step()
    assert sum(controller.ranks().values()) == len(e) // 2
    assert torch.allclose(tiny.logits(model, "llama"), masked, rtol=1e-12, atol=1e-12)
