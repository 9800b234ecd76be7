"""The fused function equals the plain formula, and its gradients are exact, on every path it can take."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math

import peft
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
import trimtab
from marks import slow
from trimtab.adapters import dropout, fused
from trimtab.adapters.fused import Route, lowrank_added, lowrank_linear
from trimtab.adapters.gated import gated
from trimtab.adapters.lowrank import lowrank_delta
from trimtab.host import layers

N, IN, OUT, R = 5, 4, 3, 2
ROUTES = [Route(merged, dense) for merged in (False, True) for dense in (False, True)]
# x, A, B require a gradient or not; e, b: trained (True), frozen (False), absent (None).
COMBINATIONS = list(
    itertools.product((True, False), (True, False), (True, False), (True, False, None), (True, False, None))
)


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    shapes = {"x": (N, IN), "W": (OUT, IN), "bias": (OUT,), "A": (R, IN), "B": (OUT, R), "e": (R,), "b": (OUT,)}
    return {name: torch.randn(shape, generator=make, dtype=dtype) for name, shape in shapes.items()}


def chosen(x: bool, A: bool, B: bool, e: bool | None, b: bool | None) -> tuple[dict[str, Tensor | None], list[str]]:
    t: dict[str, Tensor | None] = dict(tensors())
    wants = {"x": x, "A": A, "B": B, "e": e, "b": b}
    for name, want in wants.items():
        if want is None:
            t[name] = None
    return t, [name for name, want in wants.items() if want]


def apply(t: dict[str, Tensor | None], p: float = 0.0, scale: float = 0.7) -> Tensor:
    return lowrank_linear(t["x"], t["W"], t["bias"], t["A"], t["B"], scale, t["e"], t["b"], p)


def added(t: dict[str, Tensor | None], p: float = 0.0, scale: float = 0.7) -> Tensor:
    base = F.linear(t["x"], t["W"], t["bias"])
    return lowrank_added(base, t["x"], t["A"], t["B"], scale, t["e"], t["b"], p)


def plain(t: dict[str, Tensor | None], mask: Tensor | float = 1.0, scale: float = 0.7) -> Tensor:
    delta = lowrank_delta(t["x"] * mask, t["A"], t["B"], scale, t["e"], t["b"])
    return F.linear(t["x"], t["W"], t["bias"]) + delta


def drawn_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """The scaled mask that the fused function draws after this seed."""
    torch.manual_seed(seed)
    bits = dropout.draw_bits(x.numel(), x.device)
    return dropout.keep_mask(bits, p, x.dtype).view_as(x) / (1 - dropout.drop_rate(p))


def force(monkeypatch: pytest.MonkeyPatch, way: Route) -> None:
    """Take this contraction order wherever it is possible at all."""

    def route(n, n_in, n_out, r, needs, may_merge, copied):
        _, a, g = needs
        return Route(way.merged and may_merge, way.dense and (a or g))

    monkeypatch.setattr(fused, "route", route)


class Products(TorchDispatchMode):
    """Counts the multiply-adds of matrix products, two each; torch's own counter passes over `addmm_`."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket._qualified_op_name
        if name in ("aten::mm", "aten::addmm", "aten::addmm_"):
            left, right = args[-2:]
            self.flops += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("apply", [apply, added])
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("way", ROUTES, ids=str)
def test_gradients_are_exact_for_every_combination_of_frozen_and_trained(way, p, apply, monkeypatch):
    force(monkeypatch, way)
    for combination in COMBINATIONS:
        t, wanted = chosen(*combination)
        mask = drawn_mask(t["x"], p, seed=3) if p else 1.0

        def function(*values, t=t, wanted=wanted):
            torch.manual_seed(3)  # the same mask at every evaluation
            return apply({**t, **dict(zip(wanted, values))}, p)

        values = [t[name].clone().requires_grad_() for name in wanted]
        out = function(*values)
        torch.testing.assert_close(out.detach(), plain(t, mask), rtol=1e-12, atol=1e-12)
        assert out.requires_grad == bool(wanted)
        if wanted:
            theirs = torch.autograd.grad(plain({**t, **dict(zip(wanted, values))}, mask).sum(), values)
            torch.testing.assert_close(torch.autograd.grad(out.sum(), values), theirs, rtol=1e-11, atol=1e-11)
            assert torch.autograd.gradcheck(function, values, fast_mode=True), combination


def test_what_is_frozen_gets_no_gradient_and_costs_no_product(monkeypatch):
    force(monkeypatch, Route(merged=False, dense=False))

    def backward_flops(**wants: bool) -> int:
        t: dict[str, Tensor | None] = dict(tensors())
        for name, want in wants.items():
            t[name] = t[name].requires_grad_(want)
        out = apply(t)
        with Products() as counter:
            out.sum().backward()
        assert all((t[name].grad is not None) == want for name, want in wants.items())
        return counter.flops

    thin_in, thin_out, base = 2 * N * R * IN, 2 * N * R * OUT, 2 * N * IN * OUT
    # x: base and two thin products; A: one more; B or e or b: G, made once for all three.
    assert backward_flops(x=True, A=False, B=False, e=False, b=False) == base + thin_out + thin_in
    assert backward_flops(x=True, A=True, B=False, e=False, b=False) == base + thin_out + 2 * thin_in
    assert backward_flops(x=True, A=True, B=True, e=True, b=True) == base + 2 * thin_out + 2 * thin_in
    # Every projection frozen: only G beside what x needs.
    assert backward_flops(x=True, A=False, B=False, e=True, b=True) == base + 2 * thin_out + thin_in
    # Input without gradient: no base product; vectors alone need G only.
    assert backward_flops(x=False, A=False, B=False, e=True, b=True) == thin_out
    assert backward_flops(x=False, A=True, B=True, e=False, b=False) == 2 * thin_out + thin_in


VIEWS = {"t", "transpose", "view", "_unsafe_view", "detach", "as_strided", "expand", "unsqueeze", "slice", "alias"}


class Kernels(TorchDispatchMode):
    """Names of the operations that compute something; a view does not."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name not in VIEWS:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [4, 2048], ids=["few tokens", "many tokens"])
def test_a_layer_launches_fewer_kernels_than_stock_peft(tokens):
    """On an accelerator with small batches a step takes as long as it has kernels."""

    def launched(kind: type[peft.LoraConfig]) -> tuple[list[str], list[str]]:
        model = peft.get_peft_model(nn.Sequential(nn.Linear(64, 64)), kind(r=8, target_modules=["0"]))
        x = torch.randn(2, tokens // 2, 64, requires_grad=True)
        with Kernels() as forward:
            out = model(x)
        grad = torch.ones_like(out)
        with Kernels() as backward:
            out.backward(grad)
        return forward.names, backward.names

    ours, theirs = launched(trimtab.TrimConfig), launched(peft.LoraConfig)
    assert len(ours[0]) < len(theirs[0]) and len(ours[1]) <= len(theirs[1]), (ours, theirs)


def test_the_input_is_kept_only_where_the_down_projection_trains(monkeypatch):
    force(monkeypatch, Route(merged=False, dense=False))

    def kept(**wants: bool) -> set[torch.Size]:
        t: dict[str, Tensor | None] = dict(tensors())
        for name, want in wants.items():
            t[name] = t[name].requires_grad_(want)
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda s: shapes.append(s.shape) or s, lambda s: s):
            apply(t)
        return set(shapes)

    x, h = torch.Size((N, IN)), torch.Size((R, N))
    assert x in kept(A=True, B=True)
    assert x not in kept(x=True, B=True, b=True) and h in kept(x=True, B=True)
    assert not {x, h} & kept(x=True)


@pytest.mark.parametrize("apply", [apply, added])
@pytest.mark.parametrize("way", ROUTES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_inputs_of_any_layout_and_shape_work(way, p, apply, monkeypatch):
    force(monkeypatch, way)
    t = tensors()
    make = torch.Generator().manual_seed(1)
    base = torch.randn(IN, 3, 2, generator=make, dtype=torch.float64)
    inputs = {
        "transposed": base.permute(2, 1, 0),
        "strided": torch.randn(3, 2 * IN, generator=make, dtype=torch.float64)[:, ::2],
        "expanded": base[:, 0, 0].expand(3, IN),
        "vector": base[:, 0, 0],
        "empty": torch.empty(0, 7, IN, dtype=torch.float64),
        "four dimensions": torch.randn(2, 1, 3, IN, generator=make, dtype=torch.float64),
    }
    for name, x in inputs.items():
        wanted = ["A", "B", "e", "b"]

        def function(x, *values, wanted=wanted):
            torch.manual_seed(5)
            # A gradient that is itself not contiguous.
            return apply({**t, "x": x, **dict(zip(wanted, values))}, p).transpose(0, -1)

        values = [x.detach().requires_grad_(), *(t[n].clone().requires_grad_() for n in wanted)]
        mask = drawn_mask(x, p, seed=5) if p else 1.0
        torch.testing.assert_close(function(*values).transpose(0, -1), plain({**t, "x": x}, mask), msg=name)
        if name == "expanded":  # gradcheck takes no overlapping input
            ours = torch.autograd.grad(function(*values).sum(), values)
            theirs = plain({**t, "x": values[0], **dict(zip(wanted, values[1:]))}, mask)
            torch.testing.assert_close(ours, torch.autograd.grad(theirs.sum(), values))
        elif x.numel():
            assert torch.autograd.gradcheck(function, values), name
        else:
            function(*values).sum().backward()
            assert all(v.grad is not None and not v.grad.any() for v in values[1:])
            assert values[0].grad.shape == x.shape


@pytest.mark.parametrize("way", ROUTES, ids=str)
def test_rank_one_leaves_the_parameters_as_they_were(way, monkeypatch):
    force(monkeypatch, way)
    t = tensors()
    t["A"], t["B"], t["e"] = t["A"][:1].contiguous(), t["B"][:, :1].contiguous(), t["e"][:1].contiguous()
    before = {name: value.clone() for name, value in t.items()}
    for value in ("x", "A", "B", "e", "b"):
        t[value].requires_grad_()
    apply(t).sum().backward()
    assert all(torch.equal(t[name], before[name]) for name in t)


def test_double_use_in_one_graph_adds_both_gradients():
    t = tensors()
    wanted = ["x", "A", "B", "e", "b"]
    square = torch.randn(IN, OUT, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def twice(function):
        def composed(*values):
            u = {**t, **dict(zip(wanted, values))}
            return function({**u, "x": function(u).tanh() @ square.T})

        return composed

    values = [t[name].clone().requires_grad_() for name in wanted]
    assert torch.autograd.gradcheck(twice(apply), values)
    ours = torch.autograd.grad(twice(apply)(*values).sum(), values)
    theirs = torch.autograd.grad(twice(plain)(*values).sum(), values)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("function", [apply, added])
@pytest.mark.parametrize("e, b", [(None, None), (True, None), (True, True), (False, True)])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_second_derivatives_are_those_of_the_plain_formula(function, e, b, p):
    t, wanted = chosen(True, True, True, e, b)
    values = [t[name].clone().requires_grad_() for name in wanted]
    mask = drawn_mask(t["x"], p, 3) if p else 1.0
    ways = torch.randn(len(values), generator=torch.Generator().manual_seed(1)).tolist()

    def second(of) -> tuple[Tensor, ...]:
        torch.manual_seed(3)
        y = of(dict(zip(wanted, values)))
        first = torch.autograd.grad(y.tanh().sum(), values, create_graph=True)
        return torch.autograd.grad(sum(way * one.pow(2).sum() for way, one in zip(ways, first)), values)

    ours = second(lambda u: function(t | u, p))
    torch.testing.assert_close(ours, second(lambda u: plain(t | u, mask)))


def test_they_go_through_the_two_sources_of_a_gated_feed_forward():
    t = gated_tensors()
    values = [t[name].requires_grad_() for name in ("gate", "up", "A", "B")]
    found = []
    for knows in (True, False):
        x = F.silu(t["gate"] * 1) * (t["up"] * 1)
        y = lowrank_linear(x, t["W"], None, t["A"], t["B"], 1.0, source=gated(x) if knows else None)
        first = torch.autograd.grad(y.tanh().sum(), values, create_graph=True)
        found.append(torch.autograd.grad(sum(one.pow(2).sum() for one in first), values))
    torch.testing.assert_close(*found)


def test_a_second_derivative_that_needs_an_input_which_was_not_kept_is_refused(monkeypatch):
    force(monkeypatch, Route(merged=False, dense=False))
    t = tensors()
    for name in ("B", "x"):
        t[name].requires_grad_()
    (grad,) = torch.autograd.grad(apply(t).pow(2).sum(), t["B"], create_graph=True)
    torch.testing.assert_close(grad, torch.autograd.grad(plain(t).pow(2).sum(), t["B"])[0])
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("method", [None, "rank"])
def test_a_hessian_and_derivatives_in_forward_mode_are_stock_peft_s(method):
    def model(of: type[peft.LoraConfig], **more) -> nn.Module:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
        made = peft.get_peft_model(net, of(r=2, target_modules=["0", "2"], **more)).double().eval()
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter)
        return made

    stock = model(peft.LoraConfig)
    ours = model(trimtab.TrimConfig, rank=trimtab.SalientLoRA(target_r=1) if method else None)
    found = []
    for one in (stock, ours):
        names, values = zip(*((n, p.detach()) for n, p in one.named_parameters() if "lora_A" in n or "lora_B" in n))

        def loss(*given, one=one, names=names):
            x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(3, 6)
            return torch.func.functional_call(one, dict(zip(names, given)), (x,)).pow(2).sum()

        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(v, torch.ones_like(v)) for v in values]
            forward = torch.autograd.forward_ad.unpack_dual(loss(*duals)).tangent
        found.append((torch.autograd.functional.hessian(loss, values), forward))
    torch.testing.assert_close(*found)
    assert any(part.abs().sum() > 1 for row in found[0][0] for part in row)


def test_a_factor_changed_between_forward_and_backward_is_noticed():
    t = tensors()
    t["A"].requires_grad_()
    out = apply(t)
    with torch.no_grad():
        t["B"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("apply", [apply, added])
@pytest.mark.parametrize("shape", [(N, IN), (1, N, IN)], ids=["rows", "sequences"])
@pytest.mark.parametrize("way", ROUTES, ids=str)
def test_a_model_may_change_in_place_what_a_layer_gives(way, shape, apply, monkeypatch):
    force(monkeypatch, way)
    t, wants = chosen(True, True, True, True, True)
    t["x"] = t["x"].view(shape)
    found = []
    for function in (apply, plain):
        leaves = {name: t[name].clone().requires_grad_(name in wants) for name in t}
        y = function(leaves)
        y += leaves["x"][..., :OUT]
        y[..., 0] *= 2
        F.leaky_relu_(y, 0.3)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), [leaves[name] for name in wants])))
    torch.testing.assert_close(*found)


def test_a_base_of_another_kind_keeps_its_product_and_no_widened_copy_of_the_input():
    t = {name: value.to(torch.bfloat16) for name, value in tensors().items()}
    t["A"], t["B"] = t["A"].float().requires_grad_(), t["B"].float().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        out = lowrank_added(F.linear(t["x"], t["W"]), t["x"], t["A"], t["B"], 0.7)
    assert out.dtype == torch.bfloat16 and {s.dtype for s in kept if s.shape == (N, IN)} == {torch.bfloat16}
    exact = {name: value.detach().double() for name, value in t.items()}
    wanted = plain({**exact, "bias": None, "e": None, "b": None})
    torch.testing.assert_close(out.double(), wanted, rtol=2e-2, atol=5e-2)
    (grad_a,) = torch.autograd.grad(out.sum(), t["A"])
    assert grad_a.dtype == torch.float32


def test_under_autocast_the_products_are_autocasts_and_the_result_has_the_base_s_dtype():
    t = tensors(torch.float32)
    t["A"].requires_grad_(), t["x"].requires_grad_()
    base = F.linear(t["x"], t["W"])

    seen = set()

    class Dtypes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
                seen.add(args[-1].dtype)
            return func(*args, **(kwargs or {}))

    with torch.autocast("cpu", torch.bfloat16), Dtypes():
        out = lowrank_added(base, t["x"], t["A"], t["B"], 0.7)
        gradients = torch.autograd.grad(out.sum(), (t["x"], t["A"]))
    assert fused._product_dtype(torch.bfloat16, "cpu") in seen
    assert out.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
    wanted = plain({**t, "bias": None, "e": None, "b": None})
    torch.testing.assert_close(out, wanted, rtol=2e-2, atol=5e-2)
    exact = torch.autograd.grad(wanted.sum(), (t["x"], t["A"]))
    torch.testing.assert_close(gradients, exact, rtol=2e-2, atol=5e-2)


# -- dropout -------------------------------------------------------------------------------------------


def test_the_mask_is_bernoulli_at_the_asked_rate_and_keeps_the_expectation():
    p, count = 0.1, 2_000_000
    torch.manual_seed(0)
    keep = dropout.keep_mask(dropout.draw_bits(count, torch.device("cpu")), p, torch.float64)
    assert set(keep.unique().tolist()) == {0.0, 1.0}
    assert abs(keep.mean().item() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / count)
    for rate in (1e-9, 0.05, 0.1, 1 / 3, 0.5, 0.999999):
        assert 0 < dropout.drop_rate(rate) < 1 and abs(dropout.drop_rate(rate) - rate) <= 2**-16
        bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every value once
        assert dropout.keep_mask(bits, rate, torch.float64).mean().item() == 1 - dropout.drop_rate(rate)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 4097])
def test_any_number_of_bits_can_be_drawn(count):
    assert dropout.draw_bits(count, torch.device("cpu")).shape == (count,)


def test_masks_are_independent_between_elements_tokens_and_steps():
    p, n, width = 0.3, 400, 500
    torch.manual_seed(1)
    masks = [
        dropout.keep_mask(dropout.draw_bits(n * width, torch.device("cpu")), p, torch.float64).view(n, width)
        for _ in range(2)
    ]
    variance, margin = p * (1 - p), 5 / math.sqrt(n * width)
    a, b = (mask - (1 - p) for mask in masks)

    def correlation(u: Tensor, v: Tensor) -> float:
        return (u * v).mean().item() / variance

    assert abs(correlation(a, b)) < margin  # steps
    for lag in (1, 2, 3, 4, 7):  # the four elements of one 64-bit word, and beyond
        assert abs(correlation(a[:, :-lag], a[:, lag:])) < margin, lag
    assert abs(correlation(a[:-1], a[1:])) < margin  # tokens
    # Rows' and columns' counts spread as binomials do.
    assert a.sum(1).var().item() == pytest.approx(width * variance, rel=5 * math.sqrt(2 / n))
    assert a.sum(0).var().item() == pytest.approx(n * variance, rel=5 * math.sqrt(2 / width))


def test_the_mask_follows_the_seed_and_differs_between_calls():
    t = tensors()
    t["x"] = torch.randn(64, IN, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(7)
    first, second = apply(t, 0.5), apply(t, 0.5)
    torch.manual_seed(7)
    assert torch.equal(apply(t, 0.5), first)
    assert not torch.equal(first, second)


def test_dropout_costs_two_bytes_an_element_until_the_backward_pass():
    t = tensors()
    t["A"].requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: kept.append(s) or s, lambda s: s):
        apply(t, 0.5)
    of_input_size = [s for s in kept if s.numel() == N * IN]
    assert sorted(s.element_size() for s in of_input_size) == [2, 8]  # the bits, and the input itself
    assert any(s.data_ptr() == t["x"].data_ptr() for s in of_input_size)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_draws_the_same_mask_again(reentrant):
    t = tensors()
    names = ["x", "A", "B", "e", "b"]
    values = [t[name].clone().requires_grad_() for name in names]

    def function(*values):
        return apply({**t, **dict(zip(names, values))}, 0.5).sin()

    torch.manual_seed(11)
    direct = torch.autograd.grad(function(*values).sum(), values)
    torch.manual_seed(11)
    out = torch.utils.checkpoint.checkpoint(function, *values, use_reentrant=reentrant)
    out.sum().backward()
    for expected, value in zip(direct, values):
        torch.testing.assert_close(value.grad, expected, rtol=0, atol=0)


# -- dtypes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factors", [torch.float32, None], ids=["f32 factors", "narrow factors"])
@pytest.mark.parametrize("native", [False, True])
def test_narrow_bases_agree_with_float64_to_their_precision(dtype, factors, native, monkeypatch):
    monkeypatch.setattr(fused, "_product_dtype", lambda d, _: d if native else torch.float32)
    exact = tensors()
    t = {name: value.to(dtype) for name, value in exact.items()}
    for name in ("A", "B", "e", "b"):
        t[name] = exact[name].to(factors or dtype).requires_grad_()
    t["x"].requires_grad_()
    wide = {name: value.detach().double() for name, value in t.items()}
    for name in ("x", "A", "B", "e", "b"):
        wide[name].requires_grad_()
    out, expected = apply(t), plain(wide)
    assert out.dtype == dtype
    tolerance = dict.fromkeys(("rtol", "atol"), 0.05 if dtype == torch.bfloat16 else 0.01)
    torch.testing.assert_close(out.double(), expected, **tolerance)
    out.sum().backward()
    expected.sum().backward()
    for name in ("x", "A", "B", "e", "b"):
        assert t[name].grad.dtype == t[name].dtype
        torch.testing.assert_close(t[name].grad.double(), wide[name].grad, **tolerance)


def test_f32_factors_on_a_bf16_base_lose_nothing_where_products_are_f32(monkeypatch):
    monkeypatch.setattr(fused, "_product_dtype", lambda d, _: torch.float32)
    t = tensors(torch.float32)
    for name in ("x", "W", "bias"):
        t[name] = t[name].bfloat16()
    t["B"] = t["B"] * 1e-6  # far below bf16's steps around W: a merged bf16 weight would lose it
    A, B = t["A"].requires_grad_(), t["B"].requires_grad_()
    (grad,) = torch.autograd.grad(apply(t).float().sum(), [A])
    wide = {name: value.detach().double() for name, value in t.items()}
    wide["A"].requires_grad_()
    (expected,) = torch.autograd.grad(plain(wide).sum(), wide["A"])
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-12)
    assert B.grad is None


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_gives_its_dtype_and_gradients_in_the_parameters(p):
    t = tensors(torch.float32)
    names = ["x", "A", "B", "e", "b"]
    for name in names:
        t[name].requires_grad_()
    mask = drawn_mask(t["x"], p, seed=9) if p else 1.0
    expected = torch.autograd.grad(plain(t, mask).sum(), [t[name] for name in names])
    torch.manual_seed(9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = apply(t, p)
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()  # a backward inside autocast must not be cast either
    for name, want in zip(names, expected):
        assert t[name].grad.dtype == torch.float32
        torch.testing.assert_close(t[name].grad, want, rtol=0.05, atol=0.05)


# -- the gated product -----------------------------------------------------------------------------------

ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu, tanh": lambda g: F.gelu(g, approximate="tanh")}


def product(t: dict[str, Tensor], act=F.silu, reverse: bool = False) -> Tensor:
    """φ(gate) ⊙ up, of tensors that have a past, as a model's have."""
    gate, up = t["gate"] * 1, t["up"] * 1
    return up * act(gate) if reverse else act(gate) * up


def gated_tensors(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(8)
    sources = {name: torch.randn(2, N, IN, generator=make, dtype=dtype).requires_grad_() for name in ("gate", "up")}
    return {**tensors(dtype), **sources}


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("way", ROUTES, ids=str)
def test_gradients_through_a_gated_product_are_those_of_its_parts_to_the_bit(way, p, act, monkeypatch):
    force(monkeypatch, way)
    for *factors, diagonal in itertools.product((True, False), (True, False), (True, None)):
        wants = (*factors, diagonal, diagonal)
        t = gated_tensors()
        trained = dict(zip(("A", "B", "e", "b"), wants))
        for name, want in trained.items():
            t[name] = None if want is None else t[name].requires_grad_(want)
        names = ["gate", "up", *(name for name, want in trained.items() if want)]

        def function(*values, t=t, names=names, knows=True):
            torch.manual_seed(3)
            u = {**t, **dict(zip(names, values))}
            x = product(u, ACTIVATIONS[act], reverse=bool(p))
            source = gated(x)
            assert source is not None
            args = u["W"], u["bias"], u["A"], u["B"], 0.7, u["e"], u["b"], p
            return lowrank_linear(x, *args, source if knows else None)

        values = [t[name] for name in names]
        ours, theirs = function(*values), function(*values, knows=False)
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad(out.sin().sum(), values) for out in (ours, theirs)]
        assert all(torch.equal(a, b) for a, b in zip(*grads)), wants
        assert torch.autograd.gradcheck(function, values, fast_mode=True), wants


def kept_by_the_graph(out: Tensor) -> dict[int, Tensor]:
    """Storage -> tensor, of all but parameters that autograd keeps below ``out``. Hooks for saved tensors would say it
    as well, and make it keep more."""
    found, seen, todo = {}, set(), [out.grad_fn]
    while todo:
        if (node := todo.pop()) is None or node in seen:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        own = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for value in [*own, *getattr(node, "saved_tensors", ())]:
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                found[value.untyped_storage()._cdata] = value
    return found


def test_a_gated_product_and_its_activation_are_not_kept(monkeypatch):
    force(monkeypatch, Route(merged=False, dense=False))
    t = gated_tensors()
    t["A"].requires_grad_()
    wide = torch.Size((2, N, IN))

    def kept(knows: bool) -> int:
        x = product(t)
        out = lowrank_linear(x, t["W"], None, t["A"], t["B"], 1.0, source=gated(x) if knows else None)
        del x
        return sum(s.shape == wide for s in kept_by_the_graph(out).values())

    assert (kept(knows=False), kept(knows=True)) == (4, 2)


def watched(x: Tensor) -> Tensor:
    x.register_hook(lambda grad: grad)
    return x


def kept_for_later(x: Tensor) -> Tensor:
    x.retain_grad()
    return x


OTHERS = {
    "scaled": lambda g, u: F.silu(g) * u * 2,
    "by a number": lambda g, u: F.silu(g) * 2,
    "broadcast": lambda g, u: F.silu(g) * u[:1],
    "no way to the gate": lambda g, u: F.silu(g.detach()) * u,
    "no way up": lambda g, u: F.silu(g) * u.detach(),
    "a step between": lambda g, u: F.dropout(F.silu(g), 0.5) * u,
    "the result of relu": lambda g, u: F.relu(g) * u,
    "changed": lambda g, u: (F.silu(g) * u).mul_(2),
    "activated in place": lambda g, u: F.silu(g, inplace=True) * u,
    "watched": lambda g, u: watched(F.silu(g) * u),
    "watched on its way": lambda g, u: watched(F.silu(g)) * u,
    "kept for later": lambda g, u: kept_for_later(F.silu(g) * u),
    "kept for later on its way": lambda g, u: kept_for_later(F.silu(g)) * u,
    "leaves": lambda g, u: F.silu(g.detach().requires_grad_()) * u,
    "wider": lambda g, u: F.silu(g) * u.float(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_a_gated_product_is_left_as_it_is(name):
    t = gated_tensors()
    assert gated(product(t)) is not None
    assert gated(OTHERS[name](t["gate"] * 1, t["up"] * 1)) is None


def test_a_gate_changed_behind_autograd_is_left_for_it_to_notice():
    t = gated_tensors()
    gate = t["gate"] * 1
    x = F.silu(gate) * (t["up"] * 1)
    with torch.no_grad():
        gate.mul_(2)
    assert gated(x) is None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


def test_where_something_else_holds_what_autograd_keeps_it_is_not_asked():
    t, asked = gated_tensors(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda s: s, lambda s: asked.append(s) or s):
        assert gated(product(t)) is None
    assert not asked


# -- the host -------------------------------------------------------------------------------------------


def fused_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = fused.lowrank_linear
    monkeypatch.setattr(fused, "lowrank_linear", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def without_fusion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "can_fuse", lambda *_: False)
    monkeypatch.setattr(fused, "can_add", lambda *_: False)  # the plain formula, not the other half of it


def hosted(family: str = "bert", dtype: torch.dtype = torch.float64, **settings) -> nn.Module:
    kind = tiny.FAMILIES[family]
    base = tiny.build(family).to(dtype)
    torch.manual_seed(0)
    config = trimtab.TrimConfig(
        r=settings.pop("r", 4), target_modules=list(kind.targets), task_type=kind.task_type, **settings
    )
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False).to(dtype)


def train(model: nn.Module, family: str, steps: int, controlled: bool) -> list[float]:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    control = trimtab.Controller(model, optimizer, total_steps=steps) if controlled else None
    losses = []
    model.train()
    for step in range(steps):
        loss = model(**tiny.batch(family, seed=step)).loss
        loss.backward()
        if control:
            control.before_step()
        optimizer.step()
        if control:
            control.after_step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CASES = {
    "plain LoRA": {},
    "SalientLoRA and AFLoRA": {
        "rank": trimtab.SalientLoRA(target_r=2, initial_window=5, final_window=10),
        "freeze": trimtab.AFLoRA(interval_steps=2),
    },
    "SoRA": {"rank": trimtab.SoRA(prox_threshold=1e-3)},
    "AFLoRA": {"freeze": trimtab.AFLoRA(interval_steps=2)},
}


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("bert", "SalientLoRA and AFLoRA"),
        ("llama", "plain LoRA"),
        *(slow("bert", name) for name in CASES if " and " not in name),
    ],
)
def test_fifty_steps_of_training_equal_those_of_the_plain_formula(case, family, monkeypatch):
    calls = fused_calls(monkeypatch)
    model = hosted(family, **copy.deepcopy(CASES[case]))
    ours = train(model, family, 50, controlled=bool(CASES[case]))
    assert calls
    with monkeypatch.context() as patch:
        without_fusion(patch)
        calls.clear()
        reference = hosted(family, **copy.deepcopy(CASES[case]))
        theirs = train(reference, family, 50, controlled=bool(CASES[case]))
        assert not calls
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    theirs_state = reference.state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, theirs_state[name], rtol=1e-7, atol=1e-9, msg=name)


def test_fifty_steps_in_float32_stay_with_stock_peft(monkeypatch):
    calls = fused_calls(monkeypatch)
    model = hosted(dtype=torch.float32)
    ours = train(model, "bert", 50, controlled=False)
    kind = tiny.FAMILIES["bert"]
    torch.manual_seed(0)
    base = tiny.build("bert")
    torch.manual_seed(0)
    stock = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=list(kind.targets), task_type=kind.task_type))
    theirs = train(stock, "bert", 50, controlled=False)
    assert calls
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_evaluation_takes_no_dropout_and_keeps_nothing(monkeypatch):
    model = hosted(lora_dropout=0.5)
    assert torch.equal(tiny.logits(model, "bert"), tiny.logits(model, "bert"))
    calls = fused_calls(monkeypatch)
    model.train()
    first, second = (model(**tiny.batch("bert")).loss.item() for _ in range(2))
    assert calls and first == second  # B = 0: dropout on the adapter's input does not reach the output
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    first, second = (model(**tiny.batch("bert")).loss.item() for _ in range(2))
    assert first != second


@pytest.mark.parametrize("reason", ["disabled", "merged", "two adapters", "hook", "trained base", "dora", "patched"])
def test_what_cannot_be_fused_takes_the_plain_formula(reason, monkeypatch):
    calls = fused_calls(monkeypatch)
    model = hosted(use_dora=reason == "dora")
    layers = [m for m in model.modules() if type(m).__name__ == "TrimLinear"]
    assert layers
    if reason == "disabled":
        with model.disable_adapter():
            model(**tiny.batch("bert"))
    elif reason == "merged":
        model.merge_adapter()
    elif reason == "two adapters":
        model.add_adapter("other", copy.deepcopy(model.peft_config["default"]))
        for layer in layers:
            layer.set_adapter(["default", "other"])
    for layer in layers:
        if reason == "hook":
            layer.base_layer.register_forward_hook(lambda *_: None)
        elif reason == "trained base":
            layer.base_layer.weight.requires_grad_()
        elif reason == "patched":
            layer.base_layer.forward = layer.base_layer.forward
    if reason != "disabled":
        model(**tiny.batch("bert")).loss.backward()
    assert not calls


def test_a_trained_base_bias_gets_its_gradient(monkeypatch):
    calls = fused_calls(monkeypatch)
    model = hosted(bias="lora_only")
    model(**tiny.batch("bert")).loss.backward()
    assert calls
    ours = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    assert any(name.endswith("base_layer.bias") for name in ours)
    model.zero_grad()
    without_fusion(monkeypatch)
    model(**tiny.batch("bert")).loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, ours[name], msg=name)


def test_compile_falls_back_to_the_plain_formula():
    model = hosted(dtype=torch.float32)
    layer = next(m for m in model.modules() if type(m).__name__ == "TrimLinear")
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(3, layer.in_features)
    compiled = torch.compile(layer, backend="eager")
    torch.testing.assert_close(compiled(x), layer(x))
    compiled(x).sum().backward()
    assert layer.lora_A["default"].weight.grad is not None


def test_function_transforms_fall_back_to_the_plain_formula():
    layer = next(m for m in hosted().modules() if type(m).__name__ == "TrimLinear")
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    jacobians = torch.func.vmap(torch.func.jacrev(layer))(x)
    assert jacobians.shape == (3, layer.out_features, layer.in_features)


GATED = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SMALL)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**SMALL)),
    "qwen 3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**SMALL, head_dim=8)),
    "gemma 2, gelu": lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**SMALL, head_dim=8)),
    "phi 3, fused": lambda: tf.Phi3ForCausalLM(tf.Phi3Config(**SMALL, pad_token_id=0)),
}
SMALL = dict(
    vocab_size=tiny.VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def gated_model(family: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    config = trimtab.TrimConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings)
    return peft.get_peft_model(GATED[family](), config).train()


def found_products(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call that asks: whether its input is a gated product."""
    found: list[bool] = []

    def asked(x: Tensor):
        source = gated(x)
        found.append(source is not None)
        return source

    monkeypatch.setattr(layers, "gated", asked)
    return found


GATED_CASES = {
    "plain LoRA": {},
    "dropout": {"lora_dropout": 0.3},
    "SalientLoRA and AFLoRA": CASES["SalientLoRA and AFLoRA"],
}
FIRST = {("llama", case) for case in GATED_CASES} | {
    (family, "plain LoRA") for family in ("gemma 2, gelu", "phi 3, fused")
}


@pytest.mark.parametrize(
    ("family", "case"),
    [pair if pair in FIRST else slow(*pair) for pair in itertools.product(GATED, GATED_CASES)],
)
def test_training_with_gated_products_is_training_without_to_the_bit(family, case, monkeypatch):
    case = GATED_CASES[case]
    found, runs = found_products(monkeypatch), []
    for knows in (True, False):
        if not knows:
            monkeypatch.setattr(layers, "gated", lambda x: None)
        model = gated_model(family, **copy.deepcopy(case))
        losses = train(model, "llama", 12, controlled="rank" in case)
        runs.append((losses, {name: p.detach() for name, p in model.named_parameters() if "lora" in name}))
    assert any(found) if "rank" in case else sum(found) == 2 * 12
    (ours, our_weights), (theirs, their_weights) = runs
    assert ours == theirs
    assert our_weights.keys() == their_weights.keys()
    assert all(torch.equal(our_weights[name], their_weights[name]) for name in our_weights)


def test_two_activations_of_each_gated_feed_forward_are_not_kept(monkeypatch):
    def kept() -> int:
        loss = gated_model("llama")(**tiny.batch("llama")).loss
        return sum(s.shape == (8, 8, SMALL["intermediate_size"]) for s in kept_by_the_graph(loss).values())

    ours = kept()
    monkeypatch.setattr(layers, "gated", lambda x: None)
    assert (ours, kept()) == (2 * SMALL["num_hidden_layers"], 4 * SMALL["num_hidden_layers"])


def gradients_with(
    change, monkeypatch: pytest.MonkeyPatch, is_elsewhere: bool = False
) -> tuple[list[bool], dict[str, Tensor]]:
    found = found_products(monkeypatch)
    model = gated_model("llama")
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    change(model)
    with torch.autograd.graph.save_on_cpu() if is_elsewhere else contextlib.nullcontext():
        model(**tiny.batch("llama")).loss.backward()
    return found, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def parts(model: nn.Module, ending: str) -> list[nn.Module]:
    return [module for name, module in model.named_modules() if name.endswith(ending)]


def checkpointed(reentrant: bool):
    def change(model):
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})

    return change


def test_gated_products_under_autocast_are_the_same_to_the_bit(monkeypatch):
    def gradients() -> list[Tensor]:
        model = gated_model("llama", init_lora_weights=False)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(**tiny.batch("llama")).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    found = found_products(monkeypatch)
    ours = gradients()
    assert any(found)
    monkeypatch.setattr(layers, "gated", lambda x: None)
    assert all(torch.equal(a, b) for a, b in zip(ours, gradients()))


SEEN: list[Tensor] = []
CHANGES = {
    "reentrant checkpointing": (checkpointed(True), True),
    "checkpointing": (checkpointed(False), False),
    "a hook that looks at the activation": (
        lambda model: parts(model, "act_fn")[0].register_forward_hook(lambda m, args, out: SEEN.append(out)),
        True,
    ),
    "a hook on the layer": (
        lambda model: [
            m.register_forward_pre_hook(lambda m, args: SEEN.append(args[0])) for m in parts(model, "down_proj")
        ],
        False,
    ),
    "a full backward hook": (
        lambda model: [m.register_full_backward_hook(lambda *_: None) for m in parts(model, "act_fn")],
        False,
    ),
    "activations kept elsewhere": (lambda model: None, False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_gated_products_leave_hooks_and_checkpoints_as_they_are(name, monkeypatch):
    change, is_found = CHANGES[name]
    found, ours = gradients_with(change, monkeypatch, is_elsewhere="elsewhere" in name)
    assert any(found) == is_found
    monkeypatch.setattr(layers, "gated", lambda x: None)
    _, theirs = gradients_with(lambda model: None, monkeypatch)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_hook_that_asks_for_the_gradient_of_the_product_gets_it():
    grads = []
    for kind in (trimtab.TrimConfig, peft.LoraConfig):
        torch.manual_seed(0)
        model = peft.get_peft_model(GATED["llama"](), kind(r=4, target_modules="all-linear")).train()
        kept = []
        down = parts(model, "down_proj")[0]
        down.register_forward_pre_hook(lambda m, args, kept=kept: args[0].retain_grad() or kept.append(args[0]))
        model(**tiny.batch("llama")).loss.backward()
        grads.append(kept[0].grad)
    torch.testing.assert_close(*grads)


# -- choice of route ---------------------------------------------------------------------------------------


def test_the_route_follows_the_shapes():
    everything = (True, True, True)
    assert fused.route(2048, 384, 384, 8, everything, True, False) == Route(merged=True, dense=False)
    assert fused.route(256, 576, 576, 8, everything, True, False) == Route(merged=False, dense=False)
    assert fused.route(2048, 384, 384, 480, everything, True, False) == Route(merged=True, dense=True)
    assert fused.route(2048, 384, 384, 480, everything, False, False).merged is False
    assert fused.route(16, 4096, 4096, 64, everything, True, False) == Route(merged=False, dense=False)
    assert fused.route(2048, 384, 384, 480, (True, False, False), True, False).dense is False
