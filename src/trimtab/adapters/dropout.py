"""Dropout masks from cheap random bits.

A float per element is what makes dropout slow on a CPU. Sixteen bits compared with a threshold give the
same Bernoulli mask: the generator makes 64 bits at a time, so one draw serves four elements. The drop rate
is rounded to a multiple of 2^-16, and the scale that keeps the expectation is that of the rounded rate.

The bits come from the device's default generator: `torch.manual_seed` decides them, and
`torch.utils.checkpoint`, which puts the generator back, sees the same mask again. What is kept for the
backward pass is two bytes an element, rather than a float mask and a masked copy of the input.
"""

from __future__ import annotations

import torch
from torch import Tensor

_VALUES = 2**16


def drop_rate(p: float) -> float:
    """The rate that is used for ``p``: the nearest multiple of 2^-16 that is neither 0 nor 1.

    >>> drop_rate(0.5), drop_rate(0.1)
    (0.5, 0.100006103515625)
    """
    return min(max(round(p * _VALUES), 1), _VALUES - 1) / _VALUES


def draw_bits(count: int, device: torch.device) -> Tensor:
    """``count`` independent uniform int16 values, shape (count,), from the device's default generator."""
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device).random_(-(2**63), None)
    return words.view(torch.int16)[:count]


def keep_mask(bits: Tensor, p: float, dtype: torch.dtype) -> Tensor:
    """1 where an element stays and 0 where it is dropped, shape of ``bits``, in ``dtype``.

    Written straight into the dtype of the product that follows: a bool mask would have to be widened.
    """
    threshold = round(drop_rate(p) * _VALUES) - _VALUES // 2
    return torch.ge(bits, threshold, out=torch.empty(bits.shape, dtype=dtype, device=bits.device))
