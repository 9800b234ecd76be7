"""CKA layer selection: adapt the layers that change their input most.

Layer-wise LoRA, arXiv 2602.05988. The importance of block i is 1 − CKA(what enters it, what leaves it), one
vector per sample; the N = floor(ratio · M) blocks with the lowest CKA are chosen, ties to the lower index.

Paper and authors' code: float32, an absolute epsilon, the lowest-CKA layer of encoders dropped by rank, the
last layer of decoders read after the final norm. We follow the numbers they publish, in float64 with a
relative guard, drop layer 0 by index, report a layer whose input hardly varies as undefined instead of
as the most important one, and read block outputs (``final_norm="include"`` for theirs).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, DataError, SelectionError, did_you_mean
from ..host.sites import base_with_weights, find_stacks
from ..plans import Where
from .controls import Among, candidates, mask_of, wanted
from .moments import StreamingCKA, centred, covariance_hsic, gram, gram_hsic
from .moments import ratio as cka_ratio
from .pooling import POOLS, StackPooler, is_other, observed, run_backbone

ESTIMATORS = {"biased": 2, "unbiased": 4}
"""Name -> fewest samples it is defined for."""


def linear_cka(x: Any, y: Any, estimator: str = "biased") -> float:
    """Similarity of two feature matrices, blind to rotation, shift and scale.

    Args:
        x: features entering a block, (n, d_x); any array, computed in float64.
        y: features leaving it, (n, d_y).
        estimator: ``biased`` (the published one, in [0, 1], inflated unless n ≫ d) or ``unbiased``
            (HSIC as a U-statistic, n ≥ 4, about 0 for unrelated features at any n; may leave [0, 1]).

    Returns:
        Near 1 when the block changes little; 0 when either side is constant (undefined).

    Raises:
        SelectionError: too few samples, different numbers of them, or values that are not finite.

    Source: Kornblith et al. 2019, section 3; Song et al. 2012, eq. 5.

    >>> round(linear_cka([[1, 2], [3, 4], [5, 0]], [[1, 0, 1], [2, 1, 0], [0, 3, 1]]), 10)
    0.9952631715
    """
    _check_estimator(estimator)
    x, y = _matrix(x, "x"), _matrix(y, "y")
    n = x.shape[0]
    if y.shape[0] != n:
        raise SelectionError(f"x has {n} samples, y has {y.shape[0]}; both need the same samples in the same order")
    _check_count(n, estimator)
    x, y = centred(x), centred(y)
    if n < max(x.shape[1], y.shape[1]):
        k, l = gram(x), gram(y)
        xy, xx, yy = (gram_hsic(p, q, estimator) for p, q in ((k, l), (k, k), (l, l)))
    else:
        xy, xx, yy = (covariance_hsic(p, q, estimator) for p, q in ((x, y), (x, x), (y, y)))
    return cka_ratio(xy, xx, yy, estimator)


@dataclass(frozen=True)
class StackScores:
    """Scores of one stack, block 0 first."""

    cka: tuple[float, ...]
    undefined: tuple[bool, ...]
    """True where one input row, up to 1e-6 relative, makes up more than half of the samples, or where input or
    output is constant: the number then says nothing about the block."""


@dataclass(frozen=True)
class LayerScores:
    """CKA of every block's input and output, per stack.

    ``estimator``, ``pool`` and ``n`` (samples) are None for scores that came as bare numbers.
    """

    stacks: dict[str, StackScores]
    estimator: str | None = None
    pool: str | None = None
    n: int | None = None
    warnings: tuple[str, ...] = ()

    @property
    def cka(self) -> tuple[float, ...]:
        """CKA per block of the only stack. Raises `ConfigError` when there are several."""
        return self._only().cka

    @property
    def undefined(self) -> tuple[bool, ...]:
        """Which blocks of the only stack have no meaningful score. Raises `ConfigError` when there are several."""
        return self._only().undefined

    def _only(self) -> StackScores:
        if len(self.stacks) > 1:
            raise ConfigError("scores", list(self.stacks), "several stacks; use .stacks[path]")
        return next(iter(self.stacks.values()))

    def to_json(self) -> dict[str, Any]:
        stacks = {
            path: {"cka": [v if math.isfinite(v) else None for v in s.cka], "undefined": list(s.undefined)}
            for path, s in self.stacks.items()
        }
        return {
            "estimator": self.estimator,
            "pool": self.pool,
            "n": self.n,
            "stacks": stacks,
            "warnings": list(self.warnings),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> LayerScores:
        stacks = {
            path: StackScores(tuple(math.nan if v is None else float(v) for v in s["cka"]), tuple(s["undefined"]))
            for path, s in data["stacks"].items()
        }
        return cls(stacks, data["estimator"], data["pool"], data["n"], tuple(data["warnings"]))


def layer_similarity(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    pool: str | None = None,
    estimator: str = "biased",
    *,
    final_norm: str = "exclude",
    samples: int | None = None,
) -> LayerScores:
    """CKA between what enters and what leaves each block, from one forward pass per batch.

    Memory does not grow with the number of samples n: rows (n, d) are kept per layer while n ≤ d, d×d sums
    in float64 afterwards. The model's mode is put back; its weights are not touched.

    Args:
        model: any transformer, with or without a head; adapters on it take part as they stand.
        batches: mappings with ``input_ids`` and ``attention_mask`` as for the model's forward; padding on either
            side, another length in every batch. Encoder-decoders also need ``labels`` or ``decoder_input_ids``.
            Images and sound: ``pixel_values``, ``input_features`` or ``input_values`` in place of ``input_ids``.
        pool: the vector per sample: ``last`` token (decoders), ``cls`` (encoders), ``mean``. None is ``last``, and
            ``mean`` for images and sound, whose last patch or frame says little of the rest.
        estimator: see `linear_cka`.
        final_norm: ``include`` reads the last block after the model's final norm, as the authors' code does.
        samples: stop after this many samples; None takes all batches.

    Raises:
        SelectionError: fewer than two samples, values that are not finite, masks that do not fit.
        ModelError: the model has no blocks, or no weights (meta device).
    """
    _check_estimator(estimator)
    if pool is not None and pool not in POOLS:
        raise ConfigError("where.pool", pool, f"one of {', '.join(POOLS)}.{did_you_mean(str(pool), POOLS)}")
    if final_norm not in ("include", "exclude"):
        raise ConfigError("where.final_norm", final_norm, "include or exclude")
    if samples is not None and samples < ESTIMATORS[estimator]:
        raise ConfigError("where.samples", samples, f"at least {ESTIMATORS[estimator]} for estimator={estimator}")
    base = base_with_weights(model)
    batches = iter(batches)
    first = next(batches, None)
    pool = pool or ("mean" if isinstance(first, Mapping) and is_other(first) else "last")
    poolers = [StackPooler(stack, pool, final_norm) for stack in find_stacks(base).values()]
    streams: list[StreamingCKA] = []
    with observed(base, poolers):
        for batch in chain([] if first is None else [first], batches):
            if not isinstance(batch, Mapping):
                raise DataError(f"batch: a mapping such as {{'input_ids': …}} is needed, not {type(batch).__name__}")
            run_backbone(base, batch, poolers)
            taken = [pooler.take() for pooler in poolers]
            streams = streams or [StreamingCKA(pooler.pairs, estimator) for pooler in poolers]
            for stream, pooler, rows in zip(streams, poolers, taken):
                if samples is not None:
                    rows = [r[: samples - stream.n] for r in rows]
                _check_finite(rows, pooler)
                stream.add(rows)
            if samples is not None and streams[0].n >= samples:
                break
    n = streams[0].n if streams else 0
    _check_count(n, estimator)
    stacks, warnings = {}, []
    for stream, pooler in zip(streams, poolers):
        path, width = pooler.stack.path, pooler.stack.hidden_size
        repeated, values = stream.repeated(), stream.finish()
        undefined = tuple(repeated[a] or value == 0.0 for (a, _), value in zip(pooler.pairs, values))
        stacks[path] = StackScores(tuple(values), undefined)
        if any(undefined):
            layers = ", ".join(str(i) for i, u in enumerate(undefined) if u)
            warnings.append(
                f"{path}: layer {layers} undefined: what enters (or leaves) it is the same vector for more "
                f"than half of the samples (pool={pool})"
            )
        if estimator == "biased" and n < width:
            warnings.append(
                f"{path}: n={n} samples for d={width} features: biased CKA is inflated; use more samples "
                "or estimator=unbiased"
            )
    return LayerScores(stacks, estimator, pool, n, tuple(warnings))


def select_layers(
    scores: LayerScores | Sequence[float] | Mapping[str, Sequence[float]],
    ratio: float | None = None,
    count: int | None = None,
    exclude: str | Iterable[int] | Mapping[str, Iterable[int]] = "auto",
    degenerate: str = "exclude",
    among: Among | None = None,
) -> Where:
    """The blocks with the lowest CKA, N = floor(ratio · M) or ``count`` of each stack; ties to the lower index.

    Args:
        scores: from `layer_similarity`, or bare CKA values: of one stack, or per stack.
        ratio: part of the blocks to adapt, default 0.5; or give ``count``.
        exclude: block indices that are never chosen (per stack where they differ). ``auto`` leaves out block 0
            when the scores were pooled at the first token, whose input is one and the same vector; of bare
            values it leaves out those that are exactly 0, which only a constant input gives.
        degenerate: ``exclude`` leaves undefined blocks out, ``include`` ranks them like any other.
        among: per stack the only blocks to choose from, of which M is the number; see `trimtab.where.with_targets`.

    Raises:
        ConfigError: a ratio or count that chooses nothing, or more than there are candidates.
        SelectionError: a score is not a number.

    >>> select_layers([0.9, 0.2, 0.4, 0.8]).mask
    '0110'
    """
    bare = not isinstance(scores, LayerScores)
    scores = _as_scores(scores)
    if degenerate not in ("exclude", "include"):
        raise ConfigError("where.degenerate", degenerate, "exclude or include")
    if isinstance(exclude, str) and exclude != "auto":
        raise ConfigError("where.exclude", exclude, "auto, or a list of layer indices")
    if isinstance(exclude, Mapping) and (unknown := set(exclude) - set(scores.stacks)):
        known = ", ".join(scores.stacks)
        raise ConfigError("where.exclude", min(unknown), f"the scores have no such stack, only {known}")
    chosen = {}
    for path, stack in scores.stacks.items():
        depth = len(stack.cka)
        own = candidates(among, path, depth)
        n = wanted(len(own), ratio, count, path if len(scores.stacks) > 1 else "") if own else 0
        out = _excluded(exclude, path, stack, scores.pool, bare)
        if degenerate == "exclude":
            out |= {i for i, u in enumerate(stack.undefined) if u}
        for i, value in enumerate(stack.cka):
            if i not in out and not math.isfinite(value):
                raise SelectionError(f"{path}: CKA of layer {i} is {value}; layers cannot be ranked")
        ranked = sorted((i for i in own if i not in out), key=lambda i: stack.cka[i])  # stable
        if n > len(ranked):
            left_out = _list(sorted(out.intersection(own)))
            raise ConfigError(
                "where.ratio" if count is None else "where.count",
                count or ratio or 0.5,
                f"asks for {n} of {len(own)} layers of {path}, but {left_out} excluded, so at most "
                f"{len(ranked)} can be chosen; lower it, or set exclude=() and degenerate='include'",
            )
        chosen[path] = mask_of(depth, ranked[:n])
    return Where("cka", chosen, scores.to_json())


def _excluded(exclude: Any, path: str, stack: StackScores, pool: str | None, bare: bool) -> set[int]:
    if exclude == "auto":
        zero = {i for i, value in enumerate(stack.cka) if bare and value == 0.0}
        return zero | ({0} if pool == "cls" else set())
    ids = exclude.get(path, ()) if isinstance(exclude, Mapping) else exclude
    ids = {ids} if isinstance(ids, int) else set(ids)
    for i in ids:
        if not isinstance(i, Integral) or not 0 <= int(i) < len(stack.cka):
            raise ConfigError("where.exclude", i, f"a layer index from 0 to {len(stack.cka) - 1}")
    return ids


def _as_scores(scores: Any) -> LayerScores:
    if isinstance(scores, LayerScores):
        return scores
    stacks = scores if isinstance(scores, Mapping) else {"layers": scores}
    parsed = {}
    for path, values in stacks.items():
        numbers = tuple(float(v) for v in values)
        if not numbers:
            raise SelectionError(f"{path}: no scores at all")
        parsed[path] = StackScores(numbers, (False,) * len(numbers))
    return LayerScores(parsed)


def _list(ids: list[int]) -> str:
    return f"layer {ids[0]} is" if len(ids) == 1 else f"layers {', '.join(map(str, ids))} are"


def _matrix(x: Any, name: str) -> Tensor:
    out = x.detach().cpu() if isinstance(x, Tensor) else torch.as_tensor(x)
    if out.dim() != 2:
        raise SelectionError(f"{name} has shape {tuple(out.shape)}; (samples, features) is needed")
    if not out.is_floating_point():
        out = out.double()
    if not bool(torch.isfinite(out).all()):
        raise SelectionError(f"{name} has NaN or infinite values")
    return out


def _check_estimator(estimator: str) -> None:
    if estimator not in ESTIMATORS:
        raise ConfigError(
            "where.estimator", estimator, f"one of {', '.join(ESTIMATORS)}.{did_you_mean(str(estimator), ESTIMATORS)}"
        )


def _check_count(n: int, estimator: str) -> None:
    if n < ESTIMATORS[estimator]:
        raise SelectionError(f"where.samples={n}: {estimator} CKA needs at least {ESTIMATORS[estimator]} samples")


def _check_finite(rows: list[Tensor], pooler: StackPooler) -> None:
    """Name the first layer that produced NaN or inf (its input, if that is where it came from)."""
    for layer, (a, b) in enumerate(pooler.pairs):
        for side, p in (("what enters", a), ("what leaves", b)):
            if not bool(torch.isfinite(rows[p]).all()):
                raise SelectionError(
                    f"{pooler.stack.path}: {side} layer {layer} has NaN or infinite values; "
                    "load the model in float32 or bfloat16, and check its weights"
                )
