"""Selections that look at no data: the controls that CKA is compared with, and a user's own mask.

Each takes the model, its stacks, or just ``{path: number of blocks}``, and how much to choose of each stack:
``ratio`` (default 0.5) or ``count``. With ``among`` only those blocks are chosen from, and ``ratio`` is of them: see
`with_targets`.
"""

from __future__ import annotations

import math
import random as _random
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from ..errors import ConfigError, did_you_mean
from ..plans import Where

Among = Mapping[str, Iterable[int]]
"""Stack -> its blocks that may be chosen."""


def uniform(model: Any, ratio: float | None = None, count: int | None = None, among: Among | None = None) -> Where:
    """Evenly spaced blocks, each in the middle of its share.

    >>> uniform({"layers": 12}, ratio=0.25).mask
    '001000100010'
    """
    return _each("uniform", model, ratio, count, among, lambda m, n: [(2 * i + 1) * m // (2 * n) for i in range(n)])


def first(model: Any, ratio: float | None = None, count: int | None = None, among: Among | None = None) -> Where:
    """The blocks nearest to the input."""
    return _each("first", model, ratio, count, among, lambda m, n: range(n))


def last(model: Any, ratio: float | None = None, count: int | None = None, among: Among | None = None) -> Where:
    """The blocks nearest to the output."""
    return _each("last", model, ratio, count, among, lambda m, n: range(m - n, m))


def random(
    model: Any, ratio: float | None = None, count: int | None = None, seed: int = 0, among: Among | None = None
) -> Where:
    """Blocks drawn without replacement; the same seed gives the same blocks."""
    generator = _random.Random(seed)
    return _each("random", model, ratio, count, among, lambda m, n: generator.sample(range(m), n))


def from_mask(model: Any, mask: str | Mapping[str, str]) -> Where:
    """A user's own choice: one 0/1 string, or one per stack (stacks left out are not adapted).

    Raises:
        ConfigError: another length than the model's depth, other characters, no '1', an unknown stack.
    """
    depths = depths_of(model)
    if isinstance(mask, str) and len(depths) > 1:
        raise ConfigError(
            "where.mask", mask, f"the model has several stacks; give one mask for each of {', '.join(depths)}"
        )
    masks = {next(iter(depths)): mask} if not isinstance(mask, Mapping) else dict(mask)
    for path, text in masks.items():
        if path not in depths:
            raise ConfigError(
                "where.mask",
                path,
                f"the model has no such stack; it has {', '.join(depths)}.{did_you_mean(path, depths)}",
            )
        if not isinstance(text, str):
            raise ConfigError("where.mask", text, "a string of 0 and 1; in YAML, put quotes around it")
        if len(text) != depths[path]:
            raise ConfigError("where.mask", text, f"{len(text)} characters, but {path} has {depths[path]} layers")
    return Where("mask", masks)


def with_targets(model: Any, target_modules: Any) -> dict[str, tuple[int, ...]]:
    """The blocks of each stack that hold a target, for ``among``: in a hybrid, only some have attention.

    Args:
        target_modules: as in `peft.LoraConfig`, or a PEFT config that targets modules.
    Raises:
        ModelError: a target matches nothing, or nothing in any block.

    ::

        among = trimtab.where.with_targets(model, ["q_proj", "v_proj"])
        where = trimtab.select_layers(scores, ratio=0.5, among=among)
    """
    from ..host.sites import blocks_with_targets

    return blocks_with_targets(model, target_modules)


def candidates(among: Among | None, path: str, depth: int) -> list[int]:
    """The blocks of a stack that may be chosen, in order.

    Raises:
        ConfigError: ``among`` is of another model.
    """
    if among is None:
        return list(range(depth))
    if path not in among:
        raise ConfigError("where.among", list(among), f"has no stack {path}; give {{stack: layers}} of this model")
    found = sorted(set(among[path]))
    if found and not 0 <= found[0] <= found[-1] < depth:
        raise ConfigError("where.among", found, f"layer indices from 0 to {depth - 1}")
    return found


def depths_of(model: Any) -> dict[str, int]:
    """Number of blocks per stack, of a model or of a mapping from path to stack or depth."""
    if not isinstance(model, Mapping):
        from ..host.sites import find_stacks

        model = find_stacks(model)
    return {path: stack if isinstance(stack, int) else len(stack) for path, stack in model.items()}


def wanted(depth: int, ratio: float | None, count: int | None, path: str = "") -> int:
    """How many of ``depth`` blocks: ``count``, or floor(ratio · depth).

    The floor forgives rounding: 0.29 · 100 is 28.999… in binary, and 29 is meant.

    Raises:
        ConfigError: both or an impossible one given, or nothing left to choose.
    """
    of = f" of {path}" if path else ""
    if ratio is not None and count is not None:
        raise ConfigError("where.count", count, f"ratio={ratio} is set too; give one of them")
    if count is not None:
        if isinstance(count, bool) or not isinstance(count, Integral) or not 1 <= count <= depth:
            raise ConfigError("where.count", count, f"a whole number from 1 to {depth}, the number of layers{of}")
        return int(count)
    ratio = 0.5 if ratio is None else ratio
    if isinstance(ratio, bool) or not isinstance(ratio, Real) or not 0 < ratio <= 1:  # NaN fails here too
        raise ConfigError("where.ratio", ratio, "above 0 and at most 1, the part of the layers to adapt")
    n = math.floor(float(ratio) * depth + 1e-9)
    if n == 0:
        raise ConfigError(
            "where.ratio",
            ratio,
            f"chooses none of {depth} layers{of}; at least {math.ceil(1000 / depth) / 1000:g} chooses one",
        )
    return n


def mask_of(depth: int, chosen: Iterable[int]) -> str:
    """A 0/1 string with '1' at the chosen indices."""
    picked = set(chosen)
    return "".join("1" if i in picked else "0" for i in range(depth))


def _each(
    method: str, model: Any, ratio: float | None, count: int | None, among: Among | None, pick: Callable[..., Any]
) -> Where:
    depths = depths_of(model)
    chosen = {}
    for path, depth in depths.items():
        own = candidates(among, path, depth)
        n = wanted(len(own), ratio, count, path if len(depths) > 1 else "") if own else 0
        chosen[path] = mask_of(depth, (own[i] for i in pick(len(own), n)) if n else ())
    return Where(method, chosen)
