"""Base product, low-rank path and their gradients in one autograd function.

    y = W x + bias + s · b ⊙ (B (e ⊙ (A x)))      W (out, in) frozen; x (n, in) rows, n tokens

The plain formula (`lowrank.lowrank_delta`) is the definition; this is the same function at less cost:

- M = s · b ⊙ B ⊙ e, shape (out, r), is made once, so that no tensor of n rows is ever scaled.
- The low-rank product is added into the base product's output, and its gradient into the base gradient.
- Gradients are made only for what requires them. With G = hᵀg (r, out), h = x Aᵀ:
  ∂B = s · b ⊙ Gᵀ ⊙ e,  ∂b = s · rowsum(B ⊙ Gᵀ ⊙ e),  ∂e = s · colsum(b ⊙ B ⊙ Gᵀ). No (n, out) temporary.
- Tall thin matrices are kept as (r, n), not (n, r): BLAS is two to six times faster on those.
- What is contracted first follows from the shapes (see `Route`). With many tokens and a small weight,
  W + M A costs less than two thin products. With a large rank, gᵀx costs less than four of them.
- Kept for the backward pass: x where A trains, else h; with dropout two random bytes per input element.
- On a CPU without bf16 (f16) arithmetic, products of such tensors are made in f32: BLAS is an order of
  magnitude faster there, the result is rounded once, and f32 factors on a bf16 base stay as they are.
"""

from __future__ import annotations

import contextlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .dropout import draw_bits, drop_rate, keep_mask

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
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float,
    e: Tensor | None = None,
    b: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """A frozen linear layer and its low-rank adapter.

    Args:
        x: input, shape (..., in).
        weight, bias: of the base, shapes (out, in) and (out,); no gradient is made for ``weight``.
        A, B: factors, shapes (r, in) and (out, r), r at least 1; of any float dtype.
        scale: s.
        e, b: diagonals, shapes (r,) and (out,), or None for ones.
        dropout: rate of dropout on the adapter's input; 0 for none.
    Returns:
        Tensor of shape (..., out), in x's dtype, or in autocast's.

    Gradients are exact, and can be taken once: a second derivative raises.
    """
    device = x.device.type
    under_autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if under_autocast else x.dtype
    bits = draw_bits(x.numel(), x.device) if dropout > 0 else None
    if bits is not None:
        scale = scale / (1 - drop_rate(dropout))
    with torch.autocast(device, enabled=False) if under_autocast else contextlib.nullcontext():
        call = _LowRankLinear.apply if torch.is_grad_enabled() else _without_gradient
        return call(x, weight, bias, A, B, e, b, scale, bits, dropout, dtype)


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


def _up(B: Tensor, e: Tensor | None, b: Tensor | None, scale: float, dtype: torch.dtype) -> Tensor:
    """Mᵀ (r, out): what takes h to the output, diagonals and scale folded in; always a new tensor."""
    M = torch.empty(B.shape[::-1], dtype=dtype, device=B.device).copy_(B.t())
    if e is not None:
        M.mul_((e.to(dtype) * scale).unsqueeze(1))
    elif scale != 1:
        M.mul_(scale)
    return M if b is None else M.mul_(b.to(dtype))


def _merge(weight: Tensor, M: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor:
    """W + M A, shape (out, in), in ``dtype``."""
    if weight.dtype == dtype:
        return torch.addmm(weight, M.t(), A)
    return weight.to(dtype).addmm_(M.t(), A)


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


def _through_mask(gh: Tensor, a: Tensor, rows: Tensor | None, bits: Tensor, p: float, grad_x: Tensor | None) -> Any:
    """The gradient of A, or None without ``rows``; the adapter's share of ``grad_x`` is added into it.

    Args:
        gh: gradient of h, shape (r, n).
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
            grad_x[part].addcmul_(gh[:, part].t() @ a, kept)
        if grad_a is not None and rows is not None:
            grad_a.addmm_(gh[:, part], kept.mul_(rows[part]))
    return grad_a


class _LowRankLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        e: Tensor | None,
        b: Tensor | None,
        scale: float,
        bits: Tensor | None,
        dropout: float,
        dtype: torch.dtype,
    ) -> Tensor:
        wide = _product_dtype(dtype, x.device.type)
        needs = ctx.needs_input_grad if ctx is not None else (False,) * 7
        need_x, need_a, need_g = needs[0], needs[3], needs[4] or needs[5] or needs[6]
        rows = x.reshape(-1, x.shape[-1]).to(wide)  # (n, in)
        a = A.to(wide)
        M = _up(B, e, b, scale, wide)  # (r, out)
        way = route(
            rows.shape[0],
            weight.shape[1],
            weight.shape[0],
            A.shape[0],
            (need_x, need_a, need_g),
            bits is None and wide in (torch.float32, torch.float64),
            weight.dtype != wide,
        )
        keeps_x = need_a or (need_g and way.dense)
        h = None
        if not way.merged or (need_g and not keeps_x):
            h = a @ rows.t() if bits is None else _down_dropped(rows, bits, dropout, a)  # (r, n)
        product = _merge(weight, M, a, wide) if way.merged else weight.to(wide)
        y = rows @ product.t() if bias is None else torch.addmm(bias.to(wide), rows, product.t())  # (n, out)
        if not way.merged:
            assert h is not None
            y.addmm_(h.t(), M)
        if ctx is not None:
            keeps_h = need_g and not way.dense and h is not None
            keeps_bits = bits if need_x or keeps_x else None
            ctx.save_for_backward(x if keeps_x else None, h if keeps_h else None, keeps_bits, weight, A, B, e, b)
            ctx.settings = scale, dropout, wide, way, x.shape, x.dtype
            ctx.bias_dtype = None if bias is None else bias.dtype
        return y.to(dtype).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        device = grad.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else contextlib.nullcontext():
            return _gradients(ctx, grad)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, h, bits, weight, A, B, e, b = ctx.saved_tensors
    # What is not needed stays None; the route and ctx.needs_input_grad say what is.
    inputs: Any
    dense: Any
    M: Any
    gh: Any
    scale, dropout, wide, way, shape, x_dtype = ctx.settings
    need_x, _, need_bias, need_a, need_b_factor, need_e, need_b = ctx.needs_input_grad[:7]
    need_g = need_b_factor or need_e or need_b
    g = grad.reshape(-1, weight.shape[0]).to(wide)  # (n, out)
    a = A.to(wide)
    inputs = None if x is None else x.reshape(-1, x.shape[-1]).to(wide)
    if way.dense and bits is not None:
        inputs = inputs * keep_mask(bits, dropout, wide).view_as(inputs)
    dense = g.t() @ inputs if way.dense else None  # (out, in)

    grad_x: Any = None
    grad_a: Any = None
    grad_b_factor = grad_e = grad_b = None
    needs_gh = (need_x and not way.merged) or (need_a and not way.dense)
    # With e alone to train, its gradient is at hand in gh, before e goes onto it.
    e_from_gh = need_e and needs_gh and not need_b_factor and not need_b
    M = _up(B, None if e_from_gh else e, b, scale, wide) if need_x or need_a else None
    gh = M @ g.t() if needs_gh else None  # (r, n)
    if need_g and h is None and dense is None:  # only without dropout: with it, h was made in the forward pass
        h = a @ inputs.t()  # (r, n)
    if e_from_gh:
        if h is None:
            h = a @ inputs.t()
        grad_e = (h * gh).sum(1).to(e.dtype)
        gh = gh * e.to(wide).unsqueeze(1)
        M = M * e.to(wide).unsqueeze(1)
    elif need_g:
        G = h @ g if dense is None else a @ dense.t()  # (r, out)
        up = B.to(wide).t()  # (r, out)
        e_scaled = None if e is None else (e.to(wide) * scale).unsqueeze(1)
        if need_e or need_b:
            overlap = up * G
            if need_e:
                grad_e = (overlap.sum(1) if b is None else overlap @ b.to(wide)).mul_(scale).to(e.dtype)
            if need_b:
                grad_b = (overlap.sum(0).mul_(scale) if e is None else (overlap * e_scaled).sum(0)).to(b.dtype)
        if need_b_factor:
            G = G * (scale if e_scaled is None else e_scaled)
            grad_b_factor = torch.empty_like(B).copy_((G if b is None else G.mul_(b.to(wide))).t())
    if need_x:
        grad_x = g @ (_merge(weight, M, a, wide) if way.merged else weight.to(wide))  # (n, in)
        if bits is None and not way.merged:
            grad_x.addmm_(gh.t(), a)
    if way.dense and need_a:
        grad_a = M @ dense  # (r, in)
    elif bits is None and need_a:
        grad_a = gh @ inputs
    if bits is not None and needs_gh:
        thin = inputs if need_a and not way.dense else None
        through = _through_mask(gh, a, thin, bits, dropout, grad_x)
        grad_a = grad_a if thin is None else through
    if need_x:
        grad_x = grad_x.to(x_dtype).view(shape)
    if need_a:
        grad_a = grad_a.to(A.dtype)
    grad_bias = g.sum(0).to(ctx.bias_dtype) if need_bias else None
    return grad_x, None, grad_bias, grad_a, grad_b_factor, grad_e, grad_b, None, None, None, None


# -- where it applies ---------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN = (nn.Parameter, Tensor)


def is_plain_linear(module: nn.Module) -> bool:
    """Exactly an `nn.Linear` that nothing has been hung on: no hooks, no patched forward, no offloading,
    no quantised, sharded or meta weight."""
    if type(module) is not nn.Linear or "forward" in module.__dict__:
        return False
    if any(getattr(module, hooks) for hooks in _HOOKS):
        return False
    weight = module.weight
    return type(weight) in _PLAIN and weight.device.type != "meta" and weight.is_floating_point()


def can_fuse(x: Tensor, base: nn.Module, down: nn.Module, up: nn.Module) -> bool:
    """Whether `lowrank_linear` may stand for ``base(x)`` plus the adapter with factors ``down`` and ``up``.

    A trainable base weight, a bias in the adapter, tracing (`torch.compile`, `torch.func`) and anything
    that is not a plain tensor on one device take the plain formula.
    """
    if not (is_plain_linear(base) and is_plain_linear(down) and is_plain_linear(up)):
        return False
    weight, A, B = base.weight, down.weight, up.weight
    assert isinstance(weight, Tensor) and isinstance(A, Tensor) and isinstance(B, Tensor)
    if type(x) not in _PLAIN or not x.device == weight.device == A.device == B.device:
        return False
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return False
    return not (
        weight.requires_grad
        or not x.is_floating_point()
        or down.bias is not None
        or up.bias is not None
        or A.shape[0] == 0
        or torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._are_functorch_transforms_active()
    )
