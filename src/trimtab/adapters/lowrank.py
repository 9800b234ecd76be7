"""The one low-rank layer: ``y = W x + s · b ⊙ (B (e ⊙ (A x)))``.

    A  (r, in)    down-projection           LoRA's A, SVD form's Q, SoRA's and AFLoRA's A
    e  (r,)       rank diagonal, optional   SVD form's λ, SoRA's gate, AFLoRA's down-vector
    B  (out, r)   up-projection             LoRA's B, SVD form's P
    b  (out,)     output diagonal, optional AFLoRA's up-vector
    s             a number                  alpha / r, or what the paper uses

Whatever the paper, the product folds into a plain LoRA: ``A' = e ⊙ A`` (by rows), ``B' = b ⊙ B``
(by rows), same ``s``. Pure functions; no modules, no schedules.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def lowrank_delta(
    x: Tensor, A: Tensor, B: Tensor, scale: float, e: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """What the adapter adds to the layer's output, in the plain formula.

    Args:
        x: input, shape (..., in); already through the adapter's dropout.
        A, B: factors, shapes (r, in) and (out, r).
        scale: s.
        e, b: diagonals, shapes (r,) and (out,), or None for ones.
    Returns:
        Tensor of shape (..., out) in the factors' dtype.

    >>> x = torch.tensor([[1.0, -2.0, 3.0]])
    >>> A = torch.tensor([[1.0, 0, 2], [0, 1, -1]])
    >>> B = torch.tensor([[1.0, 0], [2, 1], [0, -3]])
    >>> lowrank_delta(x, A, B, 1.0, e=torch.tensor([0.1, 0.1]), b=torch.tensor([0.5, -1, 2]))
    tensor([[ 0.3500, -0.9000,  3.0000]])
    """
    h = F.linear(x, A)  # (..., r)
    # The scale goes onto the r-wide tensor: it is the narrowest place.
    h = h * (scale if e is None else e * scale)
    y = F.linear(h, B)  # (..., out)
    return y if b is None else y * b


def fold(A: Tensor, B: Tensor, e: Tensor | None = None, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The LoRA form of the factors: ``(e ⊙ A, b ⊙ B)`` by rows; new tensors, or the inputs where nothing folds.

    Source: fold matrix of the methods page; lossless in exact arithmetic, one rounding per entry.
    """
    return (A if e is None else A * e.unsqueeze(1)), (B if b is None else B * b.unsqueeze(1))


def rank_sizes(A: Sequence[Tensor], B: Sequence[Tensor], device: torch.device) -> Tensor:
    """``‖B_i‖ · ‖A_i‖``, float64: the size of each rank's part of ΔW/s before diagonals, layer after layer.

    With p_i, q_i the unit vectors along B's columns and A's rows, ``ΔW/s = Σ ± size_i · p_i q_iᵀ`` always, and the
    sizes are its singular values where rows of A and columns of B are orthogonal.

    Args:
        A, B: factors of each layer, shapes (r, in) and (out, r).
        device: where the result is wanted.

    >>> rank_sizes([torch.tensor([[3.0, 4.0]])], [torch.tensor([[0.0], [2.0]])], torch.device("cpu")).tolist()
    [10.0]
    """
    sizes = [torch.linalg.vector_norm(a, dim=1, dtype=torch.float64).to(device) for a in A]
    return torch.cat(sizes) * torch.cat([torch.linalg.vector_norm(b, dim=0, dtype=torch.float64).to(device) for b in B])


def delta_weight(A: Tensor, B: Tensor, scale: float, e: Tensor | None = None, b: Tensor | None = None) -> Tensor:
    """ΔW, shape (out, in), computed in at least float32 and returned in the factors' dtype."""
    dtype = A.dtype
    wide = torch.promote_types(dtype, torch.float32)
    folded_a, folded_b = fold(
        A.to(wide), B.to(wide), None if e is None else e.to(wide), None if b is None else b.to(wide)
    )
    return (folded_b @ folded_a * scale).to(dtype)
