"""A drop-in: until its first decision a run is the plain LoRA run, and ranks are judged by the factors."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import peft
import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import tiny
from marks import slow
from rank.allocator_host import IN, OUT
from trimtab import AdaLoRA, AFLoRA, Controller, SalientLoRA, SoRA, TrimCallback, TrimConfig
from trimtab.adapters.lowrank import delta_weight
from trimtab.errors import ConfigError
from trimtab.host.layers import hosted_layers
from trimtab.rank.base import Factors
from trimtab.rank.orthogonality import Orthogonality

STEPS, FIRST = 14, 9  # nothing is decided in the first FIRST steps
SALIENT = SalientLoRA(target_r=2, warmup=7, allocation=5, initial_window=3, final_window=3)
AFLORA = AFLoRA(warmup=8, final=2, interval_steps=1)
METHODS = {
    "salientlora": {"rank": SALIENT},
    "adalora": {"rank": AdaLoRA(target_r=2, warmup=FIRST, final=2)},
    "aflora": {"freeze": AFLORA},
    "salientlora+aflora": {"rank": SALIENT, "freeze": AFLORA},
}
every_method = pytest.mark.parametrize("method", METHODS)
every_family = pytest.mark.parametrize("family", ["bert", "llama"])


def adapted(family: str = "bert", kind=TrimConfig, **options) -> peft.PeftModel:
    base, fam = tiny.build(family), tiny.FAMILIES[family]
    torch.manual_seed(3)
    settings = dict(r=4, lora_alpha=8, target_modules=fam.target_modules, task_type=fam.task_type)
    return peft.get_peft_model(base, kind(**settings | options))


def weights(model) -> dict[str, torch.Tensor]:
    """Everything that trains in plain LoRA, heads included."""
    held = {n: p for n, p in model.named_parameters() if p.requires_grad and not n.endswith(("e.default", "b.default"))}
    return {name: p.detach().clone() for name, p in held.items()}


def loop(family: str, n: int = FIRST, **options) -> list[dict[str, torch.Tensor]]:
    model = adapted(family, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    controller = Controller(model, optimizer, total_steps=STEPS)
    seen = [weights(model)]
    for step in range(n):
        model(**tiny.batch(family, seed=step)).loss.backward()
        controller.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        seen.append(weights(model))
    return seen


def trained(family: str, folder, kind=TrimConfig, **options) -> list[dict[str, torch.Tensor]]:
    model, seen = adapted(family, kind, **options), []

    class Keep(TrainerCallback):
        def on_step_end(self, *args, **kw):
            seen.append(weights(model))

    args = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=8, report_to=[], learning_rate=1e-2,
        use_cpu=True, disable_tqdm=True, seed=0, max_grad_norm=0.1, weight_decay=0.1, warmup_steps=2,
        save_strategy="no",
    )  # fmt: skip
    callbacks = [Keep()] if kind is peft.LoraConfig else [TrimCallback(), Keep()]
    Trainer(model, args, train_dataset=tiny.rows(family), callbacks=callbacks).train()
    return seen[:FIRST]


def same(ours: list[dict], theirs: list[dict]) -> bool:
    assert len(ours) == len(theirs) and ours[0].keys() == theirs[0].keys() and len(ours[0])
    return all(torch.equal(a[k], b[k]) for a, b in zip(ours, theirs) for k in a)


# -- the run until the first decision --------------------------------------------------------------------


@every_family
@every_method
def test_until_the_first_decision_a_bare_loop_is_that_of_plain_lora_bit_for_bit(family, method):
    plain, ours = loop(family), loop(family, **METHODS[method])
    assert same(ours, plain)
    assert not same(plain[1:], plain[:-1])


@pytest.mark.parametrize("family", ["bert", slow("llama")])
def test_until_the_first_decision_stock_trainer_does_what_it_does_with_plain_lora(family, tmp_path):
    plain = trained(family, tmp_path)
    for method, options in METHODS.items():
        assert same(trained(family, tmp_path, **options), plain), method


def test_and_with_stock_peft_up_to_the_rounding_of_its_kernel(tmp_path):
    plain = trained("bert", tmp_path, kind=peft.LoraConfig)
    for a, b in zip(trained("bert", tmp_path, **METHODS["salientlora+aflora"]), plain):
        assert all(torch.allclose(a[k], b[k], atol=2e-3) for k in b)


@every_method
def test_the_start_draws_no_random_number_of_its_own(method):
    adapted()
    after_plain = torch.get_rng_state()
    adapted(**METHODS[method])
    assert torch.equal(torch.get_rng_state(), after_plain)


@every_method
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scale_and_trainable_parameters_are_lora_s(method, use_rslora):
    plain, ours = adapted(use_rslora=use_rslora), adapted(use_rslora=use_rslora, **METHODS[method])
    count = Controller(plain, total_steps=STEPS).trainable_params()
    assert Controller(ours, total_steps=STEPS).figures()["initial"] == count
    scales = {layer.scaling["default"] for layer in hosted_layers(ours).values()}
    assert scales == {4.0 if use_rslora else 2.0}


@pytest.mark.parametrize("rank", [SALIENT, AdaLoRA(target_r=2)])
def test_the_papers_start_follows_rslora_too(rank):
    model = adapted(rank=replace(rank, start="svd"), use_rslora=True, r=16, lora_alpha=16)
    assert next(iter(hosted_layers(model).values())).scaling["default"] == pytest.approx(4, rel=1e-5)


def test_rslora_is_refused_where_there_is_no_scale():
    with pytest.raises(ConfigError, match=r"use_rslora=True: freeze\.scaling=alpha/r"):
        adapted(freeze=replace(AFLORA, start="svd"), use_rslora=True)
    model = adapted(freeze=replace(AFLORA, start="svd", scaling="alpha/r"), use_rslora=True, r=16, lora_alpha=16)
    assert next(iter(hosted_layers(model).values())).scaling["default"] == 4


def test_a_start_that_there_is_not_is_refused_by_name():
    for made in (
        lambda: SalientLoRA(target_r=2, start="x"),
        lambda: AdaLoRA(target_r=2, start="x"),
        lambda: SoRA(prox_threshold=0.1, start="x"),
    ):
        with pytest.raises(ConfigError, match=r"^rank\.start='x'"):
            made()
    with pytest.raises(ConfigError, match=r"^freeze\.start='x': lora or svd"):
        AFLoRA(start="x")
    with pytest.raises(ConfigError, match=r"^freeze\.scaling='none'"):
        AFLoRA(scaling="none")


# -- values read off the factors ---------------------------------------------------------------------------


def site(seed: int = 0, r: int = 4, zero_b: bool = False) -> Factors:
    g = torch.Generator().manual_seed(seed)
    A, B = (torch.randn(*shape, generator=g, dtype=torch.float64) for shape in ((r, IN), (OUT, r)))
    found = Factors("a", A.requires_grad_(), torch.ones(r).double(), B.requires_grad_(), has_values=False)
    for p in (A, B):
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64)
    if zero_b:
        B.data.zero_()
    return found


def test_values_are_the_singular_values_where_vectors_are_orthogonal():
    g = torch.Generator().manual_seed(0)
    P, Q = (torch.linalg.qr(torch.randn(n, 4, generator=g, dtype=torch.float64))[0] for n in (9, 7))
    sizes = torch.tensor([[5.0, 0.5, 3.0, 2.0], [2.0, 1.0, 0.1, 4.0]]).double()
    values = Factors("a", (Q * sizes[0]).T, torch.ones(4).double(), P * sizes[1], has_values=False).values()
    torch.testing.assert_close(
        values.sort(descending=True).values,
        torch.linalg.svdvals(P * sizes[1] @ (Q * sizes[0]).T)[:4],
        rtol=1e-12,
        atol=1e-12,
    )


@pytest.mark.parametrize("with_e", [False, True])
def test_values_and_unit_vectors_make_up_the_update(with_e):
    a = site()
    a.B.data[:, 2] = 0  # a zero vector stays zero
    if with_e:
        a.e = torch.tensor([1.0, -0.5, 2.0, 0.0]).double()
    P, Q = (torch.nan_to_num(x / x.norm(dim=d, keepdim=True)) for x, d in ((a.B.detach(), 0), (a.A.detach(), 1)))
    rebuilt = P * (a.values() * torch.where(a.e < 0, -1, 1)) @ Q
    torch.testing.assert_close(rebuilt, delta_weight(a.A, a.B, 1.0, a.e).detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["salientlora", "adalora"])
def test_moving_size_from_one_factor_to_the_other_changes_no_value_and_no_decision(method):
    ranks, decisions, values = {"a": 4, "b": 4}, [], []
    for c in (1.0, 2.0**9):
        allocator = METHODS[method]["rank"].build(ranks, STEPS, None)
        for step in range(1, STEPS + 1):
            factors = {name: replace(site(seed=7 * step + i), name=name) for i, name in enumerate(ranks)}
            for f in factors.values():
                f.A.data.mul_(c), f.B.data.div_(c), f.A.grad.div_(c), f.B.grad.mul_(c)
                values.append(f.values())
            decision = allocator.after_step(step, factors)
            if decision is not None:
                decisions.append((c, step, {n: k.tolist() for n, k in decision.keep.items()}))
            if decision is not None and decision.kind == "prune":
                break
    half = len(decisions) // 2
    assert half and [d[1:] for d in decisions[:half]] == [d[1:] for d in decisions[half:]]
    assert all(torch.equal(a, b) for a, b in zip(values[: len(values) // 2], values[len(values) // 2 :]))


def test_the_defect_of_angles_is_finite_at_the_start_and_its_gradient_that_of_the_plain_formula():
    start = {"a": site(zero_b=True)}
    moving, total = Orthogonality(1, "fro", only_angles=True)(start, {})
    assert torch.isfinite(total) and total > 0
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(moving, [start["a"].A, start["a"].B]))
    for norm in ("fro", "fro2"):
        a = site()
        moving, _ = Orthogonality(1, norm, only_angles=True)({"a": a}, {})
        plain = 0.0
        for F in (a.A, a.B.T):
            unit = F / F.norm(dim=1, keepdim=True)
            off = (unit @ unit.T - torch.eye(len(F), dtype=F.dtype)).norm()
            plain = plain + (off if norm == "fro" else off**2) / 2
        torch.testing.assert_close(moving, plain)
        for x, y in zip(torch.autograd.grad(moving, [a.A, a.B]), torch.autograd.grad(plain, [a.A, a.B])):
            torch.testing.assert_close(x, y)


def test_the_penalty_is_off_unless_asked_for():
    ranks = {"a": 4}
    assert SALIENT.build(ranks, STEPS, None).penalty({"a": site()}) is None
    for made in (SALIENT, AdaLoRA(target_r=2)):
        assert replace(made, orth_weight=0.3).build(ranks, 40, None).penalty({"a": site()}) > 0
        assert replace(made, start="svd").build(ranks, 40, None).penalty({"a": site()}) > 0


def test_adalora_s_value_is_as_sensitive_as_a_scale_of_the_rank():
    a = site()
    allocator = AdaLoRA(target_r=2, warmup=2, final=1).build({"a": 4}, 10, None)
    allocator.after_step(1, {"a": a})
    expected = 0.15 * (a.B * a.B.grad).sum(0).abs().detach()
    torch.testing.assert_close(allocator.sensitivity["a.e"], expected)


# -- masks -----------------------------------------------------------------------------------------------


def test_a_rank_that_adalora_masks_has_its_column_at_zero_and_may_come_back():
    model = adapted(rank=AdaLoRA(target_r=1, warmup=2, final=2, interval_steps=1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    events = []
    controller = Controller(model, optimizer, total_steps=24, on_event=events.append)
    masks = []
    for step in range(21):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        controller.before_step()
        optimizer.step()
        controller.after_step()
        optimizer.zero_grad()
        columns = [layer.factors("default")[1].detach().any(dim=0) for layer in hosted_layers(model).values()]
        masks.append(torch.cat(columns))
        assert all(bool(la.factors("default")[0].detach().any(dim=1).all()) for la in hosted_layers(model).values())
    assert not masks[-1].all()
    came_back = [bool((after & ~before).any()) for before, after in pairwise(masks)]
    assert any(came_back)
    assert not any("lora_e" in name for name, _ in model.named_parameters())
    assert all(len(v) for e in events if e["event"] == "values" for v in e["values"].values())


# -- AFLoRA's vectors --------------------------------------------------------------------------------------


def freezing(**options):
    model = adapted(**options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return model, optimizer, Controller(model, optimizer, total_steps=STEPS)


def one_step(model, optimizer, controller, step):
    model(**tiny.batch("bert", seed=step)).loss.backward()
    controller.before_step()
    optimizer.step()
    controller.after_step()
    optimizer.zero_grad()


def test_vectors_rest_until_their_site_s_first_freeze_and_train_from_then_on():
    model, optimizer, controller = freezing(freeze=AFLORA)
    for step in range(STEPS):
        one_step(model, optimizer, controller, step)
        for layer in hosted_layers(model).values():
            e, b = layer.diagonals("default")
            is_at_work = bool(layer.hosted["default"].frozen)
            assert (layer.at_work("default") == (e, b)) is is_at_work
            moved = bool((e != 1).any() or (b != 1).any())
            assert is_at_work or not (moved or e in optimizer.state or b in optimizer.state)
        at_work = sum(
            e.numel() + b.numel()
            for la in hosted_layers(model).values()
            if la.hosted["default"].frozen
            for e, b in [la.diagonals("default")]
        )
        projections = [p for n, p in model.named_parameters() if ("lora_A" in n or "lora_B" in n) and p.requires_grad]
        assert controller.trainable_params() == at_work + sum(p.numel() for p in projections)
    assert all(bool((e != 1).any()) for la in hosted_layers(model).values() for e in [la.diagonals("default")[0]])


def test_sites_whose_projections_never_train_have_aflora_s_own_start():
    model, optimizer, controller = freezing(freeze=replace(AFLORA, trainable_projections=["query"]))
    for name, layer in hosted_layers(model).items():
        (_, B), (e, b) = layer.factors("default"), layer.diagonals("default")
        if name.endswith("query"):
            assert not B.detach().any() and layer.at_work("default") == (None, None)
        else:
            assert B.detach().all() and not b.detach().any() and e.tolist() == pytest.approx([0.1] * 4)
            assert layer.at_work("default") == (e, b)
    one_step(model, optimizer, controller, 0)
    assert all(la.diagonals("default")[1].detach().any() for n, la in hosted_layers(model).items() if "key" in n)


def test_a_site_that_freezes_before_it_moved_computes_the_same_and_still_learns():
    model, optimizer, controller = freezing(freeze=replace(AFLORA, warmup=0, final=13))
    before = tiny.logits(model, "bert")
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # a learning rate's warm-up
    while not controller.frozen():
        one_step(model, optimizer, controller, 0)
    assert torch.equal(tiny.logits(model, "bert"), before)
    assert all(not la.diagonals("default")[0].detach().any() for la in hosted_layers(model).values())
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    one_step(model, optimizer, controller, 1)
    assert all(la.diagonals("default")[0].detach().any() for la in hosted_layers(model).values())


def test_gates_of_sora_start_at_one_on_lora_s_factors():
    model, plain = adapted(rank=SoRA(prox_threshold=1e-3)), adapted()
    assert same([weights(model)], [weights(plain)])
    for layer in hosted_layers(model).values():
        assert layer.lora_e["default"].tolist() == [1.0] * 4
