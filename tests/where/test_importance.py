"""Layers chosen by gradient, Fisher information and block influence, against plain autograd and plain hidden states."""

import math

import pytest
import torch
import transformers as tf
from torch import nn
from transformers.pytorch_utils import Conv1D

import tiny
from trimtab.errors import ConfigError, DataError, ModelError, SelectionError
from trimtab.host.sites import find_stacks
from trimtab.where import METHODS, choose_own, reads_batches
from trimtab.where.cka import layer_similarity
from trimtab.where.gradients import fisher, gradient, layer_gradients
from trimtab.where.importance import most_important
from trimtab.where.influence import influence

MEASURED = ("gradient", "fisher", "influence")
FAMILIES = ("bert", "llama", "t5", "gpt2")


def labelled(family, n=12, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (n, 7), generator=generator)
    mask = torch.arange(7) < torch.randint(3, 8, (n, 1), generator=generator)
    row = {"input_ids": ids.masked_fill(~mask, 0), "attention_mask": mask.long()}
    if tiny.FAMILIES[family].task_type == "SEQ_CLS":
        return row | {"labels": torch.randint(0, 2, (n,), generator=generator)}
    return row | {"labels": ids.masked_fill(~mask, -100)}


def batches(family, size=4):
    data = labelled(family)
    return [{key: value[i : i + size] for key, value in data.items()} for i in range(0, 12, size)]


def matrices(block):
    return [m.weight for m in block.modules() if isinstance(m, (nn.Linear, Conv1D))]


def by_autograd(model, batch):
    """Squared gradient of each layer's matrices, every gradient kept: what the hooks must agree with."""
    model.zero_grad()
    model(**batch).loss.backward()
    return {
        path: [sum(w.grad.double().pow(2).sum().item() for w in matrices(block)) for block in stack.blocks]
        for path, stack in find_stacks(model).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_and_fisher_are_those_of_plain_autograd(family):
    model = tiny.build(family).double().eval()
    plain = [by_autograd(model, batch) for batch in batches(family)]
    model.zero_grad()
    found = layer_gradients(model, batches(family))
    for path, layers in find_stacks(model).items():
        for layer, block in enumerate(layers.blocks):
            squares = [each[path][layer] for each in plain]
            size = sum(w.numel() for w in matrices(block))
            assert found.norms()[path][layer] == pytest.approx(sum(map(math.sqrt, squares)) / 3, rel=1e-6)
            assert found.information()[path][layer] == pytest.approx(sum(squares) / (3 * size), rel=1e-6)


def test_a_model_that_writes_its_cache_in_place_has_gradients_too():
    sizes = dict(hidden_size=16, num_hidden_layers=4, attention_hidden_size=16, intermediate_size=32, context_length=8)
    model = tf.RwkvForCausalLM(tf.RwkvConfig(vocab_size=tiny.VOCAB, **sizes)).eval()
    data = batches("llama")
    model(**data[0], use_cache=False).loss.backward()
    squares = [[w.grad.double().pow(2).sum().item() for w in matrices(block)] for block in model.rwkv.blocks]
    assert layer_gradients(model, data[:1]).norms()["blocks"] == pytest.approx([math.sqrt(sum(s)) for s in squares])


def test_the_model_is_left_as_it_was():
    model = tiny.build("bert").train()
    first = next(model.parameters())
    first.requires_grad_(False)
    model.classifier.weight.grad = kept = torch.ones_like(model.classifier.weight)
    before = [(p.requires_grad, p.grad) for p in model.parameters()]
    weights = [p.clone() for p in model.parameters()]
    for method in MEASURED:
        choose_own(method, model, {}, batches("bert"))
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == before
    assert model.classifier.weight.grad is kept
    assert model.training and all(torch.equal(a, b) for a, b in zip(weights, model.parameters()))


def test_one_gradient_is_alive_at_a_time():
    model = tiny.build("llama")
    alive = []
    for parameter in model.parameters():
        parameter.register_hook(lambda _: alive.append(sum(p.grad is not None for p in model.parameters())))
    layer_gradients(model, batches("llama"))
    assert alive and max(alive) <= 1


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_influence_is_one_minus_the_mean_cosine_over_tokens(family):
    model, data = tiny.build(family).double().eval(), labelled(family)
    seen = []
    blocks = next(iter(find_stacks(model).values())).blocks
    for block in blocks:
        block.register_forward_hook(
            lambda _, args, kwargs, out: seen.append((args[0] if args else kwargs["hidden_states"], out)),
            with_kwargs=True,
        )
    with torch.no_grad():
        model(**data)
    mask, plain = data["attention_mask"].bool(), []
    for x, y in seen:
        y = y if isinstance(y, torch.Tensor) else y[0]
        cosines = [(a @ b / (a.norm() * b.norm())).item() for row in range(len(mask)) for a, b in zip(x[row], y[row])]
        flat = mask.flatten().tolist()
        plain.append(1 - sum(c for c, is_token in zip(cosines, flat) if is_token) / sum(flat))
    where = influence(model, batches(family))
    [scores] = where.scores["stacks"].values()
    assert scores["importance"] == pytest.approx(plain, rel=1e-9)
    assert where.scores["tokens"] == int(mask.sum())


def test_padding_changes_no_influence():
    model = tiny.build("bert").double()
    data = labelled("bert")
    longer = {k: nn.functional.pad(v, (0, 5)) if v.dim() == 2 else v for k, v in data.items()}
    [a], [b] = (influence(model, [rows]).scores["stacks"].values() for rows in (data, longer))
    assert a["importance"] == pytest.approx(b["importance"], rel=1e-9)


@pytest.mark.parametrize("method", MEASURED)
@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_each_stack_is_chosen_the_highest_first(method, family):
    where = choose_own(method, tiny.build(family), {"ratio": 0.5}, batches(family))
    assert where.method == method
    for path, mask in where.stacks.items():
        values = where.scores["stacks"][path]["importance"]
        assert mask.count("1") == len(mask) // 2
        chosen = [v for v, c in zip(values, mask) if c == "1"]
        assert min(chosen) >= max(v for v, c in zip(values, mask) if c == "0")


@pytest.mark.parametrize("method", MEASURED)
def test_a_method_waits_for_data(method):
    assert reads_batches(method) and METHODS[method].target


@pytest.mark.parametrize(
    ("values", "more", "error", "says"),
    [
        ([0.1, math.nan], {}, SelectionError, "gradient of layer 1 is nan"),
        ([0.1, 0.2], {"exclude": [2]}, ConfigError, "a layer index from 0 to 1"),
        ([0.1, 0.2], {"exclude": [0], "count": 2}, ConfigError, "1 are excluded"),
        ([0.1, 0.2], {"ratio": 0.1}, ConfigError, "chooses none of 2 layers"),
    ],
)
def test_what_cannot_be_ranked_is_refused(values, more, error, says):
    with pytest.raises(error, match=says):
        most_important("gradient", {"layers": values}, **more)


def test_rows_without_labels_have_no_gradient():
    model = tiny.build("llama")
    rows = {key: value for key, value in labelled("llama").items() if key != "labels"}
    with pytest.raises(DataError, match="labels are needed"):
        gradient(model, [rows])
    with pytest.raises(DataError, match="there are none"):
        fisher(model, [])
    with pytest.raises(DataError, match="there are none"):
        influence(model, [])


def test_layers_that_share_their_weights_are_refused():
    model = tiny.build("bert")
    blocks = model.bert.encoder.layer
    blocks[1].output.dense.weight = blocks[0].output.dense.weight
    with pytest.raises(ModelError, match="share their weights"):
        gradient(model, batches("bert"))


def test_stages_that_change_the_width_have_no_influence_and_are_refused_with_what_has():
    sizes = dict(image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], focal_levels=[1, 1], focal_windows=[3, 3])
    model = tf.FocalNetModel(tf.FocalNetConfig(**sizes, hidden_sizes=[8, 16]))
    batch = {"pixel_values": torch.randn(6, 3, 16, 16)}
    with pytest.raises(ModelError, match=r"stages\.0: .* of 8 features enter .* of 16 features leave .* choose by cka"):
        influence(model, [batch])
    assert len(layer_similarity(model, [batch]).cka) == 2


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = tf.BertForSequenceClassification(
            tf.BertConfig(num_hidden_layers=2, hidden_size=32, num_attention_heads=2)
        )
    for method in MEASURED:
        with pytest.raises(ModelError, match="no weights"):
            choose_own(method, model, {}, [])
