"""EVA against PEFT's own on the same batches, and against a plain PCA of everything that enters a linear."""

from __future__ import annotations

from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import peft
import pytest
import torch
from peft.tuners.lora.eva import get_eva_state_dict
from torch import nn

import tiny
import trimtab
from marks import slow
from trimtab import EVA, Controller, GoRA, SalientLoRA, TrimConfig
from trimtab.errors import ConfigError, DataError, ModelError, StaleAdapterError
from trimtab.host.layers import hosted_layers
from trimtab.host.probe import Probe
from trimtab.rank import make
from trimtab.rank.eva import InputSVD, give_out, leading


def adapted(family: str = "llama", rank=None, **options) -> peft.PeftModel:
    base, fam = tiny.build(family), tiny.FAMILIES[family]
    torch.manual_seed(0)
    settings = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type)
    return peft.get_peft_model(base, TrimConfig(rank=rank or EVA(), **settings | options))


def padded(family: str, n: int = 20, batch_size: int = 8) -> list[dict[str, torch.Tensor]]:
    """Batches with padding and, of language models, tokens that are not scored; labels of rows left out."""
    batches = [tiny.batch(family, batch_size, seed=seed) for seed in range(n)]
    for batch in batches:
        batch["attention_mask"][::2, 6:] = 0
        if batch["labels"].dim() == 2:
            batch["labels"][:, :2] = -100
        else:
            del batch["labels"]
    return batches


def down(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: layer.factors("default")[0].detach() for name, layer in hosted_layers(model).items()}


# -- parity ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "r"), [("llama", 4), slow("llama", 2), slow("mistral", 3), ("bert", 4), ("gpt2", 4)]
)
def test_ranks_and_directions_are_those_of_peft_s_eva(family, r):
    batches = padded(family)
    ours = adapted(family, r=r)
    started = trimtab.initialize_ranks(ours, batches)
    fam = tiny.FAMILIES[family]
    config = peft.LoraConfig(
        r=r, target_modules=fam.target_modules, task_type=fam.task_type, init_lora_weights="eva",
        eva_config=peft.EvaConfig(rho=2.0, tau=0.99),
    )  # fmt: skip
    model = peft.get_peft_model(tiny.build(family), config)
    theirs = {
        name.removeprefix("base_model.model."): A
        for name, A in get_eva_state_dict(model, batches, show_progress_bar=False).items()
    }
    assert started.ranks.keys() == theirs.keys()
    # Of equal ratios (query, key, value share one input) PEFT's sort may keep another site's: the sites of one
    # input have the same ranks, in some order.
    block = lambda name: name.rpartition(".")[0]  # noqa: E731
    for which in {block(name) for name in theirs}:
        mine = Counter(r for name, r in started.ranks.items() if block(name) == which)
        assert mine == Counter(len(A) for name, A in theirs.items() if block(name) == which)
    assert sum(started.ranks.values()) == r * len(theirs)
    for name, A in down(ours).items():
        n = min(len(A), len(theirs[name]))
        cosines = nn.functional.cosine_similarity(A[:n], theirs[name][:n]).abs()
        assert torch.all(cosines > 1 - 1e-6), name


# -- an independent plain implementation ------------------------------------------------------------------


def entering(model: nn.Module, batches: list, names: list[str]) -> dict[str, np.ndarray]:
    """Every token that enters each linear of a plain base model, but padding and what is not scored."""
    seen: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for batch in batches:
        mask = batch["attention_mask"].bool() & (batch["labels"] != -100)

        def keep(module, args, name, mask=mask):
            seen[name].append(args[0][mask].detach().numpy().astype(np.float64))

        handles = [
            model.get_submodule(name).register_forward_pre_hook(lambda m, a, name=name: keep(m, a, name))
            for name in names
        ]
        with torch.no_grad():
            model.eval()(**batch)
        for handle in handles:
            handle.remove()
    return {name: np.concatenate(rows) for name, rows in seen.items()}


def test_with_room_for_every_direction_it_is_the_pca_of_all_tokens():
    batches, r = padded("llama", n=3), 16  # rho·r is the width of the inputs: nothing is cut off between batches
    model = adapted(r=r, rank=EVA(tau=1.0), target_modules=["q_proj", "v_proj", "up_proj"])
    with pytest.warns(UserWarning, match="after 3 batches the vectors still move"):
        started = trimtab.initialize_ranks(model, iter(batches))
    tokens = entering(tiny.build("llama"), batches, list(started.ranks))
    shares, directions = {}, {}
    for name, rows in tokens.items():
        _, values, directions[name] = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
        shares[name] = values**2 / ((rows - rows.mean(0)) ** 2).sum()
    ranked = sorted(((s, name) for name in shares for s in shares[name]), key=lambda pair: -pair[0])
    expected = Counter(name for _, name in ranked[: r * len(shares)])
    for name, rank in started.ranks.items():
        assert abs(rank - expected[name]) <= 1  # query and value have one input, so that one of two is at the edge
        assert started.scores[name] == pytest.approx(shares[name][:rank].sum(), rel=1e-4)
        A = down(model)[name].double().numpy()
        assert np.abs(np.sum(A * directions[name][:rank], axis=1)).min() > 1 - 1e-3
        assert np.allclose(A @ A.T, np.eye(rank), atol=1e-4)
    assert sum(started.ranks.values()) == r * len(shares)


def test_batches_in_any_cut_give_the_same_directions_where_nothing_is_cut_off():
    torch.manual_seed(0)
    rows = torch.randn(60, 6) @ torch.randn(6, 6) + 3
    whole, parts = InputSVD(6, 0.99), InputSVD(6, 0.99)
    whole.update(rows)
    for part in rows.split([2, 13, 25, 20]):  # the first waits for more
        parts.update(part)
    assert torch.allclose(parts.vectors, whole.vectors.double(), atol=1e-4)
    assert torch.allclose(parts.ratios, whole.ratios.double(), atol=1e-5)
    assert float(whole.ratios.sum()) == pytest.approx(1, abs=1e-5)


def test_random_projections_find_the_leading_vectors_and_leave_the_random_state_alone():
    torch.manual_seed(0)
    x = torch.randn(200, 60) * 0.8 ** torch.arange(60)
    state = torch.get_rng_state()
    values, vectors = leading(x, 5)
    assert torch.equal(torch.get_rng_state(), state)
    _, exact, directions = torch.linalg.svd(x, full_matrices=False)
    assert torch.allclose(values, exact[:5], rtol=1e-3)
    assert torch.all(nn.functional.cosine_similarity(vectors, directions[:5]).abs() > 0.99)
    assert torch.all(vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0)


def test_the_largest_ratios_get_the_ranks_and_of_equal_ones_the_earlier_site():
    ratios = {"a": torch.tensor([0.5, 0.2]), "b": torch.tensor([0.5, 0.2]), "c": torch.tensor([0.1, 0.0])}
    assert give_out(ratios, 3) == {"a": 2, "b": 1, "c": 0}


# -- the model that it leaves ----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["bert", "t5", slow("bart"), slow("gpt2"), slow("llava")])
def test_the_function_and_the_total_rank_stay_and_the_scale_of_every_site(family):
    model = adapted(family)
    before = tiny.logits(model, family)
    parameters = [id(p) for p in model.parameters()]
    started = trimtab.initialize_ranks(model, [tiny.batch(family, seed=seed) for seed in range(20)])
    assert torch.equal(tiny.logits(model, family), before)
    assert [id(p) for p in model.parameters()] == parameters
    layers = hosted_layers(model)
    assert sum(started.ranks.values()) == 4 * len(layers) and max(started.ranks.values()) <= 8
    assert {layer.scaling["default"] for layer in layers.values()} == {2.0}
    assert all(layer.r["default"] == started.ranks[name] for name, layer in layers.items())


def test_rho_of_one_gives_every_site_its_rank_and_a_rank_pattern_is_the_budget():
    ones = trimtab.initialize_ranks(adapted(rank=EVA(rho=1)), padded("llama"))
    assert set(ones.ranks.values()) == {4}
    pattern = trimtab.initialize_ranks(adapted(rank_pattern={"q_proj": 8}), padded("llama"))
    assert sum(pattern.ranks.values()) == 4 * (8 + 3 * 4)


def test_a_site_may_get_no_rank_and_is_then_in_no_checkpoint(tmp_path):
    model = adapted("llama", r=1)
    layers = hosted_layers(model)
    empty = next(iter(layers))

    class Uneven(EVA):
        def choose(self, probe):
            chosen = super().choose(probe)
            A, B = chosen.factors[empty]
            chosen.factors[empty] = A[:0], B[:, :0]
            return chosen

    model.peft_config["default"].rank = Uneven()
    started = trimtab.initialize_ranks(model, padded("llama"))
    assert started.ranks[empty] == 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=3)
    for _ in range(3):
        model(**tiny.batch("llama")).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny.build("llama"), tmp_path)
    assert empty not in loaded.peft_config["default"].target_modules
    assert torch.allclose(tiny.logits(loaded, "llama"), tiny.logits(model, "llama"), atol=1e-5)


def test_only_chosen_layers_are_looked_at():
    where = trimtab.where.first(tiny.build("bert"), count=2)
    model = adapted("bert", where=where)
    started = trimtab.initialize_ranks(model, padded("bert"))
    assert {int(name.split("layer.")[1].split(".")[0]) for name in started.ranks} == {0, 1}
    assert sum(started.ranks.values()) == 4 * len(started.ranks)


def test_an_adaptive_method_prunes_from_the_ranks_that_it_gave_out():
    model = adapted(rank=SalientLoRA(target_r=2, start="eva", warmup=2, allocation=6, initial_window=2, final_window=3))
    started = trimtab.initialize_ranks(model, padded("llama"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, total_steps=10)
    assert controller.initial_ranks == started.ranks
    for step in range(10):
        model(**tiny.batch("llama", seed=step)).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
    controller.finish()
    assert sum(controller.ranks().values()) == 2 * 16
    assert all(controller.ranks()[name] <= r for name, r in started.ranks.items())


# -- which tokens count -------------------------------------------------------------------------------------


def seen_by(model: nn.Module, batch: dict) -> dict[str, int]:
    """Tokens that each site's input has, by the first site of each input."""
    found = {}
    probe = Probe(model, hosted_layers(model), "default", [batch])
    probe.inputs(lambda sites, tokens: found.update(dict.fromkeys(sites, len(tokens))), lambda: True)
    return found


def test_padding_and_what_is_not_scored_are_left_out():
    batch = tiny.batch("llama", 8)  # 8 tokens a row
    assert set(seen_by(adapted(), batch).values()) == {64}
    batch["attention_mask"][:, 6:] = 0
    assert set(seen_by(adapted(), batch).values()) == {48}
    batch["labels"][:, :2] = -100
    assert set(seen_by(adapted(), batch).values()) == {32}


def test_labels_of_rows_mask_no_tokens_even_where_their_number_is_that_of_the_positions():
    batch = tiny.batch("bert", 8)
    batch["labels"] = batch["labels"].masked_fill(torch.arange(8) < 4, -100)
    assert set(seen_by(adapted("bert"), batch).values()) == {64}


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_decoder_counts_the_tokens_of_its_labels_and_cross_attention_those_of_the_encoder(family):
    batch = tiny.batch(family, 8)
    batch["attention_mask"][:, 5:] = 0
    batch["labels"][:, 3:] = -100
    seen = seen_by(adapted(family), batch)
    for name, tokens in seen.items():
        of_keys = name.endswith(("k", "v", "k_proj", "v_proj"))
        crosses = ("EncDecAttention" in name or "encoder_attn" in name) and of_keys
        in_decoder = name.startswith(("decoder", "model.decoder"))
        assert tokens == (24 if in_decoder and not crosses else 40), name


def test_sites_with_one_input_share_it():
    groups = []
    model = adapted("llama")
    probe = Probe(model, hosted_layers(model), "default", padded("llama", 1))
    probe.inputs(lambda sites, tokens: groups.append(tuple(s.rpartition(".")[2] for s in sites)), lambda: True)
    assert groups == [("q_proj", "k_proj", "v_proj"), ("up_proj",)] * 4


def test_looking_changes_neither_mode_nor_gradients():
    model = adapted("bert").train()
    model(**tiny.batch("bert")).loss.backward()
    before = {n: (p.requires_grad, None if p.grad is None else p.grad.clone()) for n, p in model.named_parameters()}
    probe = Probe(model, hosted_layers(model), "default", [tiny.batch("bert")])
    probe.inputs(lambda sites, tokens: None, lambda: True)
    probe.gradients()
    assert all(module.training for module in model.modules())
    for name, p in model.named_parameters():
        requires, grad = before[name]
        assert p.requires_grad == requires and (p.grad is None if grad is None else torch.equal(p.grad, grad))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in hosted_layers(model).values())


# -- what is refused, and told --------------------------------------------------------------------------------


def test_a_forgotten_start_is_refused_before_the_first_step():
    model = adapted()
    controller = Controller(model, None, total_steps=4)
    model(**tiny.batch("llama")).loss.backward()
    with pytest.raises(StaleAdapterError, match=r"call trimtab\.initialize_ranks\(model, batches\) after"):
        controller.before_step()


def test_a_second_start_and_one_after_the_controller_are_refused():
    model = adapted()
    trimtab.initialize_ranks(model, padded("llama"))
    with pytest.raises(StaleAdapterError, match="has its start already"):
        trimtab.initialize_ranks(model, padded("llama"))
    late = adapted()
    Controller(late, None, total_steps=4)
    with pytest.raises(StaleAdapterError, match="before the Controller"):
        trimtab.initialize_ranks(late, padded("llama"))


def test_what_needs_no_batches_and_what_gets_none_is_refused():
    with pytest.raises(ConfigError, match=r"rank.method='salientlora': eva or gora"):
        trimtab.initialize_ranks(adapted(rank=SalientLoRA(target_r=2)), padded("llama"))
    with pytest.raises(DataError, match="there are none"):
        trimtab.initialize_ranks(adapted(), [])
    with pytest.raises(DataError, match="saw fewer tokens than its 8 vectors"):
        trimtab.initialize_ranks(adapted(), iter([{k: v[:1, :4] for k, v in tiny.batch("llama").items()}]))


def test_another_active_adapter_is_refused():
    model = adapted()
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.set_adapter("other")
    with pytest.raises(ConfigError, match="activate this one"):
        trimtab.initialize_ranks(model, padded("llama"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rho": 0.5}, "rank.rho=0.5: .*at least 1"),
        ({"tau": 2}, "rank.tau=2: .*at most 1"),
        ({"rhoo": 2}, "eva has .*rho, tau. Did you mean 'rho'"),
        ({"start": "svd"}, "rank.start='svd': eva has"),
        ({"target_r": 4}, "rank.target_r=4: eva has"),
    ],
)
def test_settings_that_cannot_be_are_one_line(options, said):
    with pytest.raises(ConfigError, match=said):
        make("eva", options)


def test_projections_that_never_train_are_refused_with_it():
    with pytest.raises(ConfigError, match=r"freeze\.trainable_projections"):
        adapted("bert", freeze=trimtab.AFLoRA(trainable_projections=["intermediate"]))


def quantised(bits: int) -> nn.Module:
    """Of the tiny Llama's widths bitsandbytes' kernels take none: one of its own."""
    bnb = pytest.importorskip("bitsandbytes")
    kind = partial(bnb.nn.Linear8bitLt, has_fp16_weights=False) if bits == 8 else bnb.nn.Linear4bit

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj, self.out = kind(64, 64), kind(64, 64)
            self.config = {"model_type": "none"}

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> SimpleNamespace:
            y = self.out(torch.tanh(self.proj(x)))
            return SimpleNamespace(logits=y, loss=(y.float() - labels).square().mean())

    torch.manual_seed(0)
    return Net().to("cpu")


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base_is_looked_at_by_its_inputs_and_has_no_gradient_for_gora(bits):
    batches = [{"x": torch.randn(12, 64) * 0.7 ** torch.arange(64), "labels": torch.ones(12, 64)} for _ in range(6)]
    targets = dict(r=4, target_modules=["proj", "out"])
    model = peft.get_peft_model(quantised(bits), TrimConfig(rank=EVA(), **targets))
    with torch.no_grad():
        before = model(**batches[0]).logits
        started = trimtab.initialize_ranks(model, batches)
        assert sum(started.ranks.values()) == 8
        assert torch.allclose(model(**batches[0]).logits, before, atol=1e-2)  # bitsandbytes packs its weights anew
    other = peft.get_peft_model(quantised(bits), TrimConfig(rank=GoRA(), **targets))
    with pytest.raises(ModelError, match=r"'proj' is quantised: its weight has no gradient.*rank.method=eva"):
        trimtab.initialize_ranks(other, batches)
