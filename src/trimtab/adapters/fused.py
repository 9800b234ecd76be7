"""Base product, low-rank path and their gradients in one autograd function.

    y = W x + bias + s · b ⊙ (B (e ⊙ (A x)))      W (out, in) frozen; x (n, in) rows, n tokens

The plain formula (`lowrank.lowrank_delta`) is the definition; this is the same function at less cost:

- M = b ⊙ B ⊙ e, shape (out, r), is B itself without diagonals; s goes into the products as their factor, so
  that no tensor is ever scaled.
- The low-rank product is added into the base product's output, and its gradient into the base gradient.
- Gradients are made only for what requires them. With G = s · hᵀg (r, out), h = x Aᵀ:
  ∂B = b ⊙ Gᵀ ⊙ e,  ∂b = rowsum(B ⊙ Gᵀ ⊙ e),  ∂e = colsum(b ⊙ B ⊙ Gᵀ). No (n, out) temporary.
- Tall thin matrices are kept as (r, n), not (n, r): BLAS is two to six times faster on those.
- h is made in the forward pass, where x is still in the processor's cache, and kept: r / in of x's size.
- What is contracted first follows from the shapes (see `Route`). With many tokens and a small weight,
  W + M A costs less than two thin products. With a large rank, gᵀx costs less than four of them.
- Kept for the backward pass: h, and x where A trains; with dropout two random bytes per input element.
  Of an x that is a gated feed-forward's product, its two sources instead (`gated`).
- On a base of another kind (quantised, hooked, training) the base's own product stays, and the low-rank path is
  added to it by the same function (`lowrank_added`): no widened copy of x is made or kept.
- On a CPU without bf16 (f16) arithmetic, products of such tensors are made in f32: BLAS is an order of
  magnitude faster there, the result is rounded once, and f32 factors on a bf16 base stay as they are.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from .dropout import draw_bits, drop_rate, keep_mask
from .gated import Gated

# Fixed costs per element of a thin product and of a merged weight, in multiply-adds: reading and writing
# the large operand. Measured (docs/performance.md); only speed depends on them.
_THIN, _MERGE = 10, 24


class Route(NamedTuple):
    """How the products of one call are contracted."""

    merged: bool
    """x (W + M A)ᵀ and g (W + M A), instead of adding thin products."""
    dense: bool
    """∂A = Mᵀ (gᵀx) and G = A (gᵀx)ᵀ, instead of thin products."""


@lru_cache(maxsize=4096)
def route(
    n: int, n_in: int, n_out: int, r: int, needs: tuple[bool, bool, bool], may_merge: bool, copied: bool
) -> Route:
    """The cheapest contraction order, by counted multiply-adds.

    Args:
        n, n_in, n_out, r: sizes.
        needs: whether x, A, and any of (B, e, b) want gradients.
        may_merge: not with dropout (two inputs), nor below f32 (a small update would be rounded away).
        copied: the weight is copied to another dtype in any case, so merging costs no copy.
    """
    x, a, g = needs

    def cost(way: Route) -> int:
        thin = r + _THIN
        h = not way.merged or (g and not way.dense)
        gh = (x and not way.merged) or (a and not way.dense)
        total = n * thin * (h * n_in + gh * n_out)
        if way.merged:
            total += (1 + x) * n_in * n_out * (r + (0 if copied else _MERGE))
        else:
            total += n * thin * (n_out + x * n_in)
        if way.dense:
            return total + n * n_in * n_out + (a + g) * n_in * n_out * r
        return total + n * thin * (a * n_in + g * n_out)

    ways = [Route(m, d) for m in (False, True) for d in (False, True) if may_merge or not m]
    return min((way for way in ways if a or g or not way.dense), key=cost)


def lowrank_linear(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    e: Tensor | None = None,
    b: Tensor | None = None,
    dropout: float = 0.0,
    source: Gated | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """A frozen linear layer and its low-rank adapter.

    Args:
        x: input, shape (..., in).
        weight, bias: of the base, shapes (out, in) and (out,); no gradient is made for ``weight``.
        A, B: factors, shapes (r, in) and (out, r), r at least 1; of any float dtype.
        scale: s.
        e, b: diagonals, shapes (r,) and (out,), or None for ones.
        dropout: rate of dropout on the adapter's input; 0 for none.
        source: what x is the product of (`gated.gated`); gradients go to its tensors, and x is not kept.
        base: what another kind of layer gave, shape (..., out), instead of weight and bias; see `lowrank_added`.
    Returns:
        Tensor of shape (..., out), in x's dtype, or in autocast's.

    Gradients are exact; where a second derivative is asked for, they are made by the formulas above. Where A does not
    train there is only the first, and a second raises.
    """
    device = x.device.type
    call = _LowRankLinear.apply if torch.is_grad_enabled() else _without_gradient
    bits = gate = up = gelu = None
    if source is not None:
        x = x.detach()  # lets go of the part of the graph between x and its sources, and of what that keeps
        gate, up, gelu = source
    if dropout > 0:
        bits = draw_bits(x.numel(), x.device)
        scale = scale / (1 - drop_rate(dropout))
    if x.dtype != torch.float64 and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return call(x, weight, bias, A, B, e, b, gate, up, gelu, scale, bits, dropout, dtype, base)
    return call(x, weight, bias, A, B, e, b, gate, up, gelu, scale, bits, dropout, x.dtype, base)


def lowrank_added(
    base: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    e: Tensor | None = None,
    b: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """What a base layer gave for x, plus the low-rank path; new, in the dtype of ``base``.

    Args:
        base: shape (..., out).
        x, A, B, scale, e, b, dropout: as in `lowrank_linear`.

    Products are made in x's dtype, or in autocast's. Derivatives are as there.
    """
    return lowrank_linear(x, None, None, A, B, scale, e, b, dropout, base=base)


def _without_gradient(*args: Any) -> Tensor:
    return _LowRankLinear.forward(None, *args)


@lru_cache(maxsize=8)
def _product_dtype(dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which products of ``dtype`` are made: f32 where the CPU would emulate a narrower one."""
    if device != "cpu" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    name = "_is_mkldnn_bf16_supported" if dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    try:
        is_native = bool(getattr(torch.ops.mkldnn, name)())
    except (AttributeError, RuntimeError):  # a build without oneDNN
        is_native = False
    return dtype if is_native else torch.float32


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor.to(dtype)``; the call itself costs as much as a small product, so it is made only if it must."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def _up(B: Tensor, e: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor:
    """M = b ⊙ B ⊙ e, shape (out, r), in ``dtype``; B itself without diagonals."""
    M = _as(B, dtype)
    if e is not None:
        M = M * _as(e, dtype)
    return M if b is None else M * _as(b, dtype).unsqueeze(1)


def _merge(weight: Tensor, M: Tensor, a: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """W + s M A, shape (out, in), in ``dtype``."""
    if weight.dtype is dtype:
        return torch.addmm(weight, M, a, alpha=scale)
    return weight.to(dtype).addmm_(M, a, alpha=scale)


def _scaled_product(left: Tensor, right: Tensor, scale: float, like: Tensor) -> Tensor:
    """s · left @ right in one call; ``like`` only has the result's shape: with beta 0 it is not read."""
    return torch.addmm(like, left, right, beta=0, alpha=scale)


def _plus(base: Tensor, h: Tensor, M: Tensor, scale: float) -> Tensor:
    """base + s · hᵀ Mᵀ, (n, out), new: what the base gave may be a view, or kept by it. In its dtype."""
    if base.dtype is h.dtype:
        return torch.addmm(base, h.t(), M.t(), alpha=scale)
    return torch.add(base, h.t() @ M.t(), alpha=scale).to(base.dtype)


# As F.linear gives its result a shape: a view that a function of its own returns may not be changed in place, as models
# do with `+=` (Falcon) or an activation.
_shaped = torch.ops.aten._unsafe_view.default

# Elements of the input that are masked at a time: they stay in the processor's cache between the mask, the
# product with the input and the thin product.
_CHUNK = 2**17


def _down_dropped(rows: Tensor, bits: Tensor, p: float, a: Tensor) -> Tensor:
    """A (mask ⊙ x)ᵀ, shape (r, n), without a masked copy of x."""
    n, n_in = rows.shape
    h = rows.new_empty(a.shape[0], n)
    size = max(1, _CHUNK // n_in)
    for start in range(0, n, size):
        part = rows[start : start + size]
        kept = keep_mask(bits[start * n_in : (start + len(part)) * n_in], p, rows.dtype).view_as(part)
        h[:, start : start + size] = a @ kept.mul_(part).t()
    return h


def _through_mask(
    gh: Tensor, a: Tensor, scale: float, rows: Tensor | None, bits: Tensor, p: float, grad_x: Tensor | None
) -> Any:
    """The gradient of A, or None without ``rows``; the adapter's share of ``grad_x`` is added into it.

    Args:
        gh: gradient of h but for the factor ``scale``, shape (r, n).
        a: A, shape (r, in).
        rows: x, shape (n, in), where A trains.
        grad_x: the base's gradient of x, shape (n, in), where x wants one.
    """
    n, n_in = gh.shape[1], a.shape[1]
    grad_a = None if rows is None else torch.zeros_like(a)
    size = max(1, _CHUNK // n_in)
    for start in range(0, n, size):
        part = slice(start, min(start + size, n))
        kept = keep_mask(bits[start * n_in : part.stop * n_in], p, a.dtype).view(-1, n_in)
        if grad_x is not None:
            grad_x[part].addcmul_(gh[:, part].t() @ a, kept, value=scale)
        if grad_a is not None and rows is not None:
            grad_a.addmm_(gh[:, part], kept.mul_(rows[part]), alpha=scale)
    return grad_a


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        e: Tensor | None,
        b: Tensor | None,
        gate: Tensor | None,
        up: Tensor | None,
        gelu: str | None,
        scale: float,
        bits: Tensor | None,
        dropout: float,
        dtype: torch.dtype,
        base: Tensor | None,  # what a base of another kind gave, instead of weight and bias
    ) -> Tensor:
        wide = _product_dtype(dtype, x.device.type)
        need_x = need_a = need_g = False
        if ctx is not None:
            need_x, _, _, need_a, need_b_factor, need_e, need_b, need_gate, need_up, *_ = ctx.needs_input_grad
            need_x = need_x or need_gate or need_up
            need_g = need_b_factor or need_e or need_b
        n_out, n_in = B.shape[0], A.shape[1]
        shape = x.shape
        rows = _as(x.reshape(-1, n_in), wide)  # (n, in)
        a = _as(A, wide)
        M = _up(B, e, b, wide)
        way = route(
            rows.shape[0],
            n_in,
            n_out,
            a.shape[0],
            (need_x, need_a, need_g),
            weight is not None and bits is None and wide in (torch.float32, torch.float64),
            weight is None or weight.dtype is not wide,
        )
        y: Any = None
        if weight is not None:
            product = _merge(weight, M, a, scale, wide) if way.merged else _as(weight, wide)
            y = F.linear(rows, product, None if bias is None else _as(bias, wide))  # (n, out)
        h = None
        keeps_h = need_g and not way.dense
        if keeps_h or not way.merged:
            h = F.linear(a, rows) if bits is None else _down_dropped(rows, bits, dropout, a)  # (r, n)
            if base is not None:
                y, dtype = _plus(base.reshape(-1, n_out), h, M, scale), base.dtype
            elif not way.merged:
                y.addmm_(h.t(), M.t(), alpha=scale)
        if ctx is not None:
            keeps_x = need_a or (need_g and way.dense)
            keeps_bits = bits if need_x or keeps_x else None
            ctx.save_for_backward(
                x if keeps_x and gate is None else None,
                h if keeps_h else None,
                keeps_bits,
                weight,
                A,
                B,
                e,
                b,
                gate,
                up,
            )
            ctx.settings = (
                scale,
                dropout,
                wide,
                way,
                shape,
                x.dtype,
                None if bias is None else bias.dtype,
                keeps_x,
                gelu,
            )
        return _shaped(_as(y, dtype), (*shape[:-1], n_out))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        # The engine records the backward pass only where a second derivative might follow.
        gradients = _recorded_gradients if torch.is_grad_enabled() else _gradients
        device = grad.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return gradients(ctx, grad)
        return gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, h, bits, weight, A, B, e, b, gate, up = ctx.saved_tensors
    scale, dropout, wide, way, shape, x_dtype, bias_dtype, keeps_x, gelu = ctx.settings
    need_x, _, need_bias, need_a, need_b_factor, need_e, need_b, *need_sources = ctx.needs_input_grad[:9]
    need_x = need_x or any(need_sources)
    need_g = need_b_factor or need_e or need_b
    n_out, n_in = B.shape[0], A.shape[1]
    need_base = ctx.needs_input_grad[-1]
    source = None if gate is None else Gated(gate, up, gelu)
    activated: Any = None if source is None else source.activated()
    if source is not None and keeps_x:
        x = activated * up
    # What is not needed stays None; the route and ctx.needs_input_grad say what is.
    inputs: Any = None if x is None else _as(x.reshape(-1, n_in), wide)  # (n, in)
    grad_x: Any = None
    grad_a: Any = None
    gh: Any = None
    dense: Any = None
    grad_b_factor = grad_e = grad_b = None

    g = _as(grad.reshape(-1, n_out), wide)  # (n, out)
    a = _as(A, wide)
    if way.dense:
        if bits is not None:
            inputs = inputs * keep_mask(bits, dropout, wide).view_as(inputs)
        dense = g.t() @ inputs  # (out, in)

    needs_gh = (need_x and not way.merged) or (need_a and not way.dense)
    # With e alone to train, its gradient is at hand in gh, before e goes onto it.
    e_from_gh = need_e and needs_gh and not need_b_factor and not need_b and h is not None
    M: Any = _up(B, None if e_from_gh else e, b, wide) if need_x or need_a else None  # (out, r)
    if needs_gh:
        gh = F.linear(M.t(), g)  # (r, n), still without the scale
    if e_from_gh:
        grad_e = _as((h * gh).sum(1).mul_(scale), e.dtype)
        wide_e = _as(e, wide)
        gh = gh * wide_e.unsqueeze(1)
        M = M * wide_e
    elif need_g:
        up = _as(B, wide).t()  # (r, out)
        G = _scaled_product(h, g, scale, up) if dense is None else _scaled_product(a, dense.t(), scale, up)  # (r, out)
        column_e = None if e is None else _as(e, wide).unsqueeze(1)  # (r, 1)
        if need_e or need_b:
            overlap = up * G
            if need_e:
                grad_e = _as(overlap.sum(1) if b is None else overlap @ _as(b, wide), e.dtype)
            if need_b:
                grad_b = _as(overlap.sum(0) if column_e is None else (overlap * column_e).sum(0), b.dtype)
        if need_b_factor:
            G = G if column_e is None else G * column_e
            grad_b_factor = _as(G if b is None else G * _as(b, wide), B.dtype).t()
    if need_a and way.dense:
        grad_a = _scaled_product(M.t(), dense, scale, a)  # (r, in)
    elif need_a and bits is None:
        grad_a = _scaled_product(gh, inputs, scale, a)
    if bits is None and source is not None:
        x = inputs = None  # rebuilt here, and of no use from here on: ∂x takes its place in memory
    if need_x:
        if weight is not None:
            grad_x = g @ (_merge(weight, M, a, scale, wide) if way.merged else _as(weight, wide))  # (n, in)
            if bits is None and not way.merged:
                grad_x.addmm_(gh.t(), a, alpha=scale)
        elif bits is None:
            grad_x = _scaled_product(gh.t(), a, scale, a[0])
        else:
            grad_x = g.new_zeros(g.shape[0], n_in)
    if bits is not None and needs_gh:
        thin = inputs if need_a and not way.dense else None
        through = _through_mask(gh, a, scale, thin, bits, dropout, grad_x)
        grad_a = grad_a if thin is None else through
    grad_gate = grad_up = None
    if need_x:
        grad_x = _as(grad_x, x_dtype).view(shape)
    if source is not None:
        x = inputs = None  # with dropout, the mask had use for it
        grad_gate, grad_up = source.gradients(grad_x, activated, need_sources)
        grad_x = None
    if need_a:
        grad_a = _as(grad_a, A.dtype)
    grad_bias = g.sum(0).to(bias_dtype) if need_bias else None
    grad_base = grad if need_base else None
    sources = grad_gate, grad_up, None
    return grad_x, None, grad_bias, grad_a, grad_b_factor, grad_e, grad_b, *sources, None, None, None, None, grad_base


_gradients_once = once_differentiable(_gradients)


def _recorded_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same gradients, as the formulas stand and by operations that autograd follows: for second derivatives."""
    x, _, bits, weight, A, B, e, b, gate, up = ctx.saved_tensors
    scale, dropout, wide, _, shape, x_dtype, bias_dtype, _, gelu = ctx.settings
    need_x, _, need_bias, need_a, need_b_factor, need_e, need_b, need_gate, need_up = ctx.needs_input_grad[:9]
    g = _as(grad.reshape(-1, B.shape[0]), wide)  # (n, out)
    a, column = _as(A, wide), _as(B, wide)
    ones = column.new_ones(())
    wide_e, wide_b = (ones if e is None else _as(e, wide)), (ones if b is None else _as(b, wide).unsqueeze(1))
    gh = g @ (wide_b * column * wide_e)  # (n, r)
    mask = ones if bits is None else keep_mask(bits, dropout, wide).view(-1, a.shape[1])
    activated = None if gate is None else Gated(gate, up, gelu).activated()
    grad_a = grad_b_factor = grad_e = grad_b = grad_x = grad_gate = grad_up = None
    if need_a or need_b_factor or need_e or need_b:
        if activated is not None:
            x = activated * up
        if x is None:  # not kept where A does not train; without it only these first ones can be made
            return _gradients_once(ctx, grad)
        dropped = _as(x.reshape(-1, a.shape[1]), wide) * mask
        G = scale * g.t() @ (dropped @ a.t())  # (out, r)
        grad_a = _as(scale * gh.t() @ dropped, A.dtype) if need_a else None
        grad_b_factor = _as(wide_b * G * wide_e, B.dtype) if need_b_factor else None
        grad_e = _as((wide_b * column * G).sum(0), e.dtype) if need_e else None
        grad_b = _as((column * G * wide_e).sum(1), b.dtype) if need_b else None
    if need_x or need_gate or need_up:
        grad_x = scale * (gh @ a) * mask
        if weight is not None:
            grad_x = grad_x + g @ _as(weight, wide)
        grad_x = _as(grad_x, x_dtype).view(shape)
    if activated is not None:
        reached: Any = grad_x
        grad_up = activated * reached if need_up else None
        if need_gate:
            (grad_gate,) = torch.autograd.grad(activated, gate, reached * up, create_graph=True)
        grad_x = None
    grad_bias = g.sum(0).to(bias_dtype) if need_bias else None
    grad_base = grad if ctx.needs_input_grad[-1] else None
    sources = grad_gate, grad_up, None
    return grad_x, None, grad_bias, grad_a, grad_b_factor, grad_e, grad_b, *sources, None, None, None, None, grad_base


# -- where it applies ---------------------------------------------------------------------------------

_PLAIN = (nn.Parameter, Tensor)


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is called before or after the module, forward or backward."""
    # Asked several times a layer and step, so straight from the module's dictionary.
    own: Any = module.__dict__
    return bool(
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    )


def is_plain_linear(module: nn.Module) -> bool:
    """Exactly an `nn.Linear` that nothing has been hung on: no hooks, no patched forward, no offloading,
    no quantised or sharded weight."""
    own: Any = module.__dict__
    return (
        type(module) is nn.Linear
        and not has_hooks(module)
        and "forward" not in own
        and type(own["_parameters"].get("weight")) in _PLAIN
    )


def can_fuse(x: Tensor, base: nn.Module, down: nn.Module, up: nn.Module) -> bool:
    """Whether `lowrank_linear` may stand for ``base(x)`` plus the adapter with factors ``down`` and ``up``.

    A base weight that trains, or that is no plain tensor on the input's device, keeps its own product.
    """
    if not is_plain_linear(base):
        return False
    weight: Any = base._parameters["weight"]
    return (
        weight.dtype.is_floating_point
        and not weight.requires_grad
        and x.device == weight.device
        and (x.dtype is weight.dtype or torch.is_autocast_enabled(x.device.type))
        and can_add(x, down, up)
    )


def can_add(x: Tensor, down: nn.Module, up: nn.Module) -> bool:
    """Whether `lowrank_added` may stand for the adapter with factors ``down`` and ``up``, whatever its base is.

    A bias in the adapter, tracing (`torch.compile`, `torch.func`) and anything that is not a plain tensor on one
    device take the plain formula.
    """
    if not (is_plain_linear(down) and is_plain_linear(up)) or type(x) not in _PLAIN:
        return False
    A: Any = down._parameters["weight"]
    B: Any = up._parameters["weight"]
    device = x.device
    return not (
        not x.dtype.is_floating_point
        or device.type == "meta"
        or device != A.device
        or device != B.device
        or down._parameters["bias"] is not None
        or up._parameters["bias"] is not None
        or A.shape[0] == 0
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # derivatives in forward mode
    )
