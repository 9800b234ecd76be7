"""VeRA: PEFT's layer against the published counts, and its exact fold into LoRA."""

import pytest
import torch
from peft import LoraConfig, VeraConfig, get_peft_model
from peft.tuners.vera.layer import VeraLayer
from torch import nn
from transformers import BertConfig, BertModel

from trimtab.adapters.vera import fold, trainable_params, vera_to_lora
from trimtab.errors import ExportError
from trimtab.plans import Site


def tiny_bert(**changes):
    torch.manual_seed(0)
    return (
        BertModel(
            BertConfig(
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=24,
                vocab_size=50,
                **changes,
            )
        )
        .double()
        .eval()
    )


def vera_bert(r=4, **changes):
    config = VeraConfig(r=r, target_modules=["query", "intermediate.dense", "output.dense"], **changes)
    model = get_peft_model(tiny_bert(), config).double().eval()
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "vera_lambda" in name:
            p.data.normal_()
    return model


def ids():
    return torch.randint(0, 50, (3, 7), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("width, layers, r, count", [(768, 12, 1024, 43_008), (1024, 24, 256, 61_440)])
def test_counts_are_the_published_ones(width, layers, r, count):
    sites = [Site(f"{i}.{kind}", width, width) for i in range(layers) for kind in ("query", "value")]
    assert trainable_params(sites, r) == count


def test_count_is_what_peft_trains():
    model = vera_bert()
    sites = [
        Site(name, layer.in_features, layer.out_features)
        for name, layer in model.named_modules()
        if isinstance(layer, VeraLayer)
    ]
    assert trainable_params(sites, 4) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert not any(".vera_A" in name or ".vera_B" in name for name, _ in model.named_parameters())


def test_start_values_have_the_shared_bound_even_in_narrow_modules():
    model = get_peft_model(tiny_bert(), VeraConfig(r=256, target_modules=["query", "output.dense"]))
    layer = next(
        layer for name, layer in model.named_modules() if isinstance(layer, VeraLayer) and name.endswith("query")
    )
    A, B = layer.vera_A["default"], layer.vera_B["default"]
    assert A.shape == (256, 24) and layer.in_features == 16
    assert A.abs().max() == pytest.approx((6 / 24) ** 0.5, rel=1e-2) and A.abs().max() < (6 / 24) ** 0.5
    assert B.abs().max() == pytest.approx(0.1530931, rel=1e-2)  # √(6/256)
    assert layer.vera_lambda_d["default"].tolist() == pytest.approx([0.1] * 256)
    assert not layer.vera_lambda_b["default"].any()


def test_modules_of_different_shape_share_one_pair():
    pointers = {
        (layer.vera_A["default"].data_ptr(), layer.vera_B["default"].data_ptr())
        for layer in vera_bert().modules()
        if isinstance(layer, VeraLayer)
    }
    assert len(pointers) == 1


def test_first_backward_reaches_only_the_output_vector():
    model = get_peft_model(tiny_bert(), VeraConfig(r=4, target_modules=["query", "output.dense"])).double()
    model(ids()).last_hidden_state.square().mean().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert p.grad.any() == ("lambda_b" in name), name


# -- fold ----------------------------------------------------------------------------------------------


def test_update_of_a_small_layer_is_the_one_worked_out_by_hand():
    A = torch.tensor([[1.0, 0, 2, 9], [0, 1, -1, 9]])[:, :3]
    B = torch.tensor([[1.0, 0], [2, 1], [0, -3], [5, 5]])[:3]
    pair = fold(A, B, torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2, 3]))
    expected = torch.tensor([[0.1, 0, 0.2], [0.4, 0.4, 0.4], [0, -1.8, 1.8]])
    torch.testing.assert_close(pair.lora_B @ pair.lora_A, expected)


@pytest.mark.parametrize("n_in, n_out", [(6, 9), (9, 6), (6, 6)])
@pytest.mark.parametrize("r", [1, 6, 7, 40])
def test_fold_is_exact_at_any_rank_and_never_wider_than_the_update(n_in, n_out, r):
    torch.manual_seed(r)
    A, B, d, b = (torch.randn(s, dtype=torch.float64) for s in ((r, n_in), (n_out, r), (r,), (n_out,)))
    pair = fold(A, B, d, b)
    rank = min(r, n_in, n_out)
    assert pair.lora_A.shape == (rank, n_in) and pair.lora_B.shape == (n_out, rank)
    delta = torch.diag(b) @ B @ torch.diag(d) @ A
    torch.testing.assert_close(pair.lora_B @ pair.lora_A, delta, rtol=1e-12, atol=1e-12)


def test_fold_in_a_storage_dtype_rounds_each_number_once():
    torch.manual_seed(0)
    A, B, d, b = (torch.randn(s) for s in ((3, 8), (8, 3), (3,), (8,)))
    pair = fold(A, B, d, b, torch.bfloat16)
    assert torch.equal(pair.lora_A, A.bfloat16())
    assert torch.equal(pair.lora_B, (b.double()[:, None] * B.double() * d.double()).bfloat16())


def plain_lora(model, pairs):
    """Stock PEFT LoRA on the same base, filled with the pairs."""
    ranks = {name: len(pair.lora_A) for name, pair in pairs.items()}
    lora = get_peft_model(
        model, LoraConfig(r=1, lora_alpha=1, target_modules=list(pairs), rank_pattern=ranks, alpha_pattern=ranks)
    ).eval()
    with torch.no_grad():
        for name, pair in pairs.items():
            layer = lora.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(pair.lora_A)
            layer.lora_B["default"].weight.copy_(pair.lora_B)
    return lora.double()


@pytest.mark.parametrize("r", [4, 20])
@pytest.mark.filterwarnings("ignore:VeRA trained")
def test_stock_lora_with_the_folded_pairs_computes_the_same(r):
    vera = vera_bert(r)
    lora = plain_lora(tiny_bert(), vera_to_lora(vera))
    with torch.no_grad():
        theirs, ours = vera(ids()).last_hidden_state, lora(ids()).last_hidden_state
        assert (theirs - tiny_bert()(ids()).last_hidden_state).abs().max() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_one_layer_alone_can_be_folded():
    layer = vera_bert().base_model.model.encoder.layer[1].attention.self.query
    pair = vera_to_lora(layer)[""]
    torch.testing.assert_close(pair.lora_B @ pair.lora_A, layer.get_delta_weight("default"))


def test_conv1d_folds_in_the_orientation_of_lora():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    config = VeraConfig(r=2, target_modules=["0"], fan_in_fan_out=True)
    model = get_peft_model(nn.Sequential(Conv1D(6, 4)), config)
    layer = model.base_model.model[0]
    layer.vera_lambda_b["default"].data.normal_()
    pair = vera_to_lora(model)["0"]
    assert pair.lora_A.shape == (2, 4) and pair.lora_B.shape == (6, 2)
    torch.testing.assert_close((pair.lora_B @ pair.lora_A).T, layer.get_delta_weight("default"))


def test_a_large_growth_is_said():
    with pytest.warns(UserWarning, match="times as many"):
        vera_to_lora(vera_bert(r=16))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(ExportError, match="no VeRA layer"):
        vera_to_lora(tiny_bert())
    with pytest.raises(ExportError, match="biases"):
        vera_to_lora(vera_bert(bias="vera_only"))
