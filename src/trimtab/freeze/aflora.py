"""AFLoRA: freeze the low-rank projections one by one, those whose gradients fade first.

Liu et al., ACL 2024 (short), arXiv 2403.13269. The down-projection is followed by a vector ``e (r,)``, the
up-projection by ``b (out,)``; both vectors train to the end, A and B only until they freeze.

Per element of a projection, over windows of ``interval_steps`` steps:
  I = mean of |gradient| over a window;  Ī ← β1 Ī + (1-β1) I;  Ū ← β2 Ū + (1-β2) |I - Ī|;  score = Ī · Ū
and the share of elements left trainable falls as a cubic (or quadratic) from 1 to 0.

Paper: |∂L/∂p|. Authors' code: |sign(p) ∂L/∂p|, the same except where p = 0. We follow the paper.
Paper: "freeze the lowest k % of projection matrices". Authors' code: freeze every projection whose *mean*
score lies below the k-th smallest of all score *elements*, which lags behind the schedule. Both are here:
``rule="tensor_rank"`` and ``rule="element_quantile"`` (default).
Authors' code scores once per micro-batch, and on loss-scaled gradients; we score once per optimizer step.
Authors' code stops on k = 0 and never freezes scores that all tie; we freeze nothing, and all at the end.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TrimtabError
from ..schedule import StepLength, check_length, plain_numbers, resolve_steps
from .base import Curve, Freezer, FreezeSettings, check_curve

SCHEDULES = {"cubic": lambda u: (1 - u) ** 3, "quadratic": lambda u: 1 - u**2}
"""Share left trainable over the ramp, u in [0, 1]. Authors' GLUE code: cubic. Their GSM8K code: quadratic."""
MEANS = {"cubic": 1 / 4, "quadratic": 2 / 3}
"""Integral of each schedule over [0, 1]."""

RAMP = 0.5, 0.1
"""Default warm-up and final phase: the projections of a short run must have learnt something before they freeze."""


@dataclass(frozen=True, kw_only=True)
class AFLoRA(FreezeSettings):
    """Settings. The paper's GLUE runs have ``start="svd", warmup="1ep", final=0.7``.

    Phase lengths: optimizer steps (``100``), a share of the run (``0.7``, ``"70%"``), or epochs (``"1ep"``).
    """

    method: ClassVar[str] = "aflora"
    paper: ClassVar[str] = "arXiv 2403.13269"
    needs_output_diagonal: ClassVar[bool] = True

    start: Literal["lora", "svd"] = "lora"
    """``lora``: plain LoRA until a site's first freeze, when its vectors start at one; sites whose projections never
    train have the paper's start. ``svd``: the paper's start everywhere."""
    warmup: StepLength = RAMP[0]
    """Before the first freeze (t_i). "auto": one epoch, or a tenth of the run if that is shorter."""
    final: StepLength = RAMP[1]
    """At the end, with everything frozen (t_f)."""
    interval_steps: int = 10
    """Steps of one window, and between two freezing events (ΔT)."""
    beta1: float = 0.85
    """Memory of the mean Ī, per window."""
    beta2: float = 0.95
    """Memory of the uncertainty Ū, per window."""
    schedule: Literal["cubic", "quadratic"] = "cubic"
    """How the share of frozen projections rises from the first freeze to the last."""
    rule: Literal["element_quantile", "tensor_rank"] = "element_quantile"
    """Which projections freeze at an event; see the top of this file. A budget needs "tensor_rank"."""
    trainable_projections: Sequence[str] | None = None
    """Patterns of the sites whose projections train at first; the others never do. ``None``: all train.

    A pattern is a regular expression for the end of the site's name, from a dot on:
    ``["intermediate.dense", r"layer\\.\\d+\\.output.dense"]`` is BERT's feed-forward part, as in the paper.
    """
    scaling: Literal["none", "alpha/r"] | None = None
    """Factor before the path. Authors' GLUE code: none, alpha is ignored. Their GSM8K code: alpha/r. None: what
    belongs to the start, none with ``svd`` and alpha/r with ``lora``."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.warmup != "auto":
            check_length(self.warmup, "freeze.warmup")
        check_length(self.final, "freeze.final")
        if type(self.interval_steps) is not int or self.interval_steps < 1:
            raise ConfigError("freeze.interval_steps", self.interval_steps, "a whole number, at least 1")
        for key, beta in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= beta < 1:
                raise ConfigError(f"freeze.{key}", beta, "at least 0 and below 1")
        for key, value, known in (
            ("schedule", self.schedule, tuple(SCHEDULES)),
            ("rule", self.rule, ("element_quantile", "tensor_rank")),
            ("start", self.start, ("lora", "svd")),
            ("scaling", self.scaling, (None, "none", "alpha/r")),
        ):
            if value not in known:
                raise ConfigError(f"freeze.{key}", value, " or ".join(filter(None, known)))
        if self.start == "lora" and self.scaling == "none":
            raise ConfigError("freeze.scaling", self.scaling, "freeze.start=svd; LoRA's start has LoRA's scale")
        if self.trainable_projections is None:
            return
        if isinstance(self.trainable_projections, str):
            raise ConfigError("freeze.trainable_projections", self.trainable_projections, "a list")
        object.__setattr__(self, "trainable_projections", tuple(self.trainable_projections))
        for pattern in self.trainable_projections:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ConfigError("freeze.trainable_projections", pattern, f"a regular expression ({error})") from error

    # -- the layer -------------------------------------------------------------------------------------

    def init_factors(
        self, A: Tensor, e: Tensor | None, b: Tensor | None, B: Tensor, generator: torch.Generator | None = None
    ) -> None:
        """A ~ U(±√(6/in)), B ~ U(±√(6/r)), e = 0.1, b = 0: the layer starts as a no-op and b moves first."""
        with torch.no_grad():
            nn.init.kaiming_uniform_(A, a=0, generator=generator)
            nn.init.kaiming_uniform_(B, a=0, generator=generator)
            if e is not None:
                e.fill_(0.1)
            if b is not None:
                b.zero_()

    @property
    def has_no_scale(self) -> bool:
        return self.start == "svd" and self.scaling != "alpha/r"

    def scale(self, alpha: float, r: int) -> float:
        return 1.0 if self.has_no_scale else alpha / r

    def initially_frozen(self, site_name: str) -> bool:
        if self.trainable_projections is None:
            return False
        return not any(_ends_with(pattern, site_name) for pattern in self.trainable_projections)

    def check_sites(self, names: Iterable[str]) -> None:
        names = list(names)
        for pattern in self.trainable_projections or ():
            if not any(_ends_with(pattern, name) for name in names):
                raise ConfigError(
                    "freeze.trainable_projections",
                    pattern,
                    f"it matches none of the {len(names)} adapted sites, such as {', '.join(names[:3])}",
                )

    # -- the schedule ----------------------------------------------------------------------------------

    def phases(self, total_steps: int, steps_per_epoch: int | None) -> tuple[int, int]:
        """Warm-up and final phase in steps. Raises `ConfigError` when they leave no step between them."""
        if self.warmup == "auto":
            warmup = min(steps_per_epoch or total_steps, total_steps // 10)
        else:
            warmup = resolve_steps(self.warmup, total_steps, steps_per_epoch, "freeze.warmup")
        final = resolve_steps(self.final, total_steps, steps_per_epoch, "freeze.final")
        if warmup + final >= total_steps:
            raise ConfigError(
                "freeze.warmup",
                self.warmup,
                f"warm-up {warmup} + final {final} steps leave none of the run's "
                f"{total_steps} to freeze in; shorten one, or train longer",
            )
        return warmup, final

    def trainable_curve(self, total_steps: int, steps_per_epoch: int | None) -> Curve:
        warmup, final = self.phases(total_steps, steps_per_epoch)
        first = (warmup // self.interval_steps + 1) * self.interval_steps
        events = [*range(first, total_steps - final + 1, self.interval_steps), total_steps - final + 1]
        curve: Curve = [(0, 1.0)]
        for step in events:
            left = trainable_fraction(step, total_steps, warmup, final, self.schedule)
            if step + 1 < total_steps and curve[-1][1] > 0:
                curve.append((step + 1, left))
        return check_curve(curve)

    def average_fraction(self, total_steps: int, steps_per_epoch: int | None, closed_form: bool = False) -> float:
        if not closed_form:
            return super().average_fraction(total_steps, steps_per_epoch)
        warmup, final = self.phases(total_steps, steps_per_epoch)
        return (warmup + (total_steps - warmup - final) * MEANS[self.schedule]) / total_steps

    def n_ramps(self, total_steps: int, steps_per_epoch: int | None) -> int:
        warmup, _ = self.phases(total_steps, steps_per_epoch)
        return 2 * total_steps - 1 - warmup

    def ramp(self, k: int, total_steps: int, steps_per_epoch: int | None) -> AFLoRA:
        """The ramp first: its length is 1 … all after the warm-up. The warm-up gives way before and after that."""
        normal, _ = self.phases(total_steps, steps_per_epoch)
        warmup = min(k, normal) if k < total_steps else k - total_steps + 1 + normal
        length = min(max(k - normal + 1, 1), total_steps - warmup)
        return replace(self, warmup=warmup, final=total_steps - warmup - length)

    def check_budget(self) -> None:
        if self.rule != "tensor_rank":
            raise ConfigError(
                "freeze.rule",
                self.rule,
                "'tensor_rank' under a budget; a quantile of elements freezes "
                "as the scores fall, not as a number asks for",
            )

    def build(self, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None) -> AFLoRAFreezer:
        return AFLoRAFreezer(self, tensors, total_steps, steps_per_epoch)


def _ends_with(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(?:.*\.)?(?:{pattern})", name) is not None


# -- the maths -----------------------------------------------------------------------------------------


def trainable_fraction(step: int, total_steps: int, warmup: int, final: int, schedule: str = "cubic") -> float:
    """Share of the projections' elements that the schedule leaves trainable at a step: r(t).

    >>> round(trainable_fraction(11, 200, 10, 140), 6)
    0.941192
    """
    if step <= warmup:
        return 1.0
    if step > total_steps - final:
        return 0.0
    return SCHEDULES[schedule]((step - warmup) / (total_steps - warmup - final))


def below_quantile(scores: Mapping[str, Tensor], fraction: float) -> list[str]:
    """Authors' rule: the tensors whose mean score is below a quantile of all score elements.

    Args:
        scores: element-wise scores of the projections that still train, any shapes.
        fraction: share to stay trainable, r(t). With k = ⌊N (1 - fraction)⌋ of the N elements the
            threshold is the k-th smallest; k = 0 freezes nothing, and a fraction of 0 everything.
    """
    if fraction <= 0:
        return list(scores)
    pool = torch.cat([score.flatten() for score in _on_one_device(scores.values())])
    k = int(len(pool) * (1 - fraction))
    if k < 1:
        return []
    threshold = float(pool.kthvalue(k).values)
    return [name for name, mean in mean_scores(scores).items() if mean < threshold]


def lowest_ranked(means: Mapping[str, float], n_frozen: int, n_total: int, fraction: float) -> list[str]:
    """Paper's rule: the lowest-scored tensors, so that ⌊(1 - fraction) n_total⌋ are frozen in all.

    Ties go to the earlier tensor.
    """
    count = math.floor((1 - fraction) * n_total + 1e-9) - n_frozen
    return sorted(means, key=lambda name: means[name])[: max(count, 0)]


def mean_scores(scores: Mapping[str, Tensor]) -> dict[str, float]:
    """Mean score of each tensor; in float64, so that the mean of equal scores is that score."""
    means = [score.mean(dtype=torch.float64) for score in scores.values()]
    values = torch.stack(_on_one_device(means)).tolist() if means else []  # one transfer, not one per tensor
    return dict(zip(scores, values))


def _on_one_device(tensors: Iterable[Tensor]) -> list[Tensor]:
    tensors = list(tensors)
    return [tensor.to(tensors[0].device) for tensor in tensors]


# -- the freezer ---------------------------------------------------------------------------------------


class AFLoRAFreezer(Freezer):
    """Scores projections from their gradients and freezes them along the schedule.

    Windows and events are told from the step number, but a step that is missing (skipped by the
    optimizer) delays an event instead of losing it.
    """

    reads_gradients = True

    def __init__(
        self, settings: AFLoRA, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None
    ) -> None:
        super().__init__(tensors, total_steps, settings.trainable_curve(total_steps, steps_per_epoch))
        self.settings = settings
        self.warmup, self.final = settings.phases(total_steps, steps_per_epoch)
        self._window: dict[str, Tensor] = {}  # I, mean |gradient| of the open window
        self._mean: dict[str, Tensor] = {}  # Ī
        self._uncertainty: dict[str, Tensor] = {}  # Ū
        self._n_in_window = 0
        self._last_observed = -1
        self._last_decided = -1

    def observe(self, step: int, gradients: Mapping[str, Tensor]) -> None:
        """Take in one optimizer step. A projection without a gradient counts as one with a zero gradient."""
        interval, b1, b2 = self.settings.interval_steps, self.settings.beta1, self.settings.beta2
        for name in self.trainable:
            if name in gradients and name not in self._window:
                start = torch.zeros_like(
                    gradients[name],
                    requires_grad=False,
                    dtype=torch.promote_types(gradients[name].dtype, torch.float32),
                )
                for state in self._parts().values():
                    state[name] = start.clone()
        names = list(self._window)
        window = [self._window[name] for name in names]
        if not window:
            return
        given = [name for name in names if name in gradients]
        sizes = dict(zip(given, torch._foreach_abs([gradients[name].detach() for name in given]) if given else ()))
        absolute = [sizes[name].to(w.dtype) if name in sizes else torch.zeros_like(w) for name, w in zip(names, window)]
        assert all(g.shape == w.shape for g, w in zip(absolute, window)), "a cut without pruned()"

        if step // interval != self._last_observed // interval:
            mean = [self._mean[name] for name in names]
            uncertainty = [self._uncertainty[name] for name in names]
            torch._foreach_mul_(mean, b1)
            torch._foreach_add_(mean, window, alpha=1 - b1)
            change = torch._foreach_abs(torch._foreach_sub(window, mean))  # |I - Ī| with the new Ī
            torch._foreach_mul_(uncertainty, b2)
            torch._foreach_add_(uncertainty, change, alpha=1 - b2)
            torch._foreach_copy_(window, absolute)
            self._n_in_window = 1
        else:
            torch._foreach_mul_(window, self._n_in_window)
            torch._foreach_add_(window, absolute)
            self._n_in_window += 1
            torch._foreach_div_(window, self._n_in_window)
        self._last_observed = step

    def is_due(self, step: int) -> bool:
        return step <= self.total_steps - self.final and self._is_event(step) and bool(self.trainable)

    def decide(self, step: int, allowance: float | None = None) -> set[str]:
        is_final = step > self.total_steps - self.final
        due = is_final or self._is_event(step)
        self._last_decided = step
        trainable = self.trainable
        if not trainable or (allowance is None and not due):
            return set()
        if allowance is not None:
            # in most steps nothing is near its limit, and the scores are not needed
            if (is_final or not due) and sum(self.numels[name] for name in trainable) <= allowance:
                return set()
            return self._forget(self._over_allowance(step, self._means(trainable), allowance, not is_final and due))
        left = trainable_fraction(step, self.total_steps, self.warmup, self.final, self.settings.schedule)
        if left <= 0:
            return self._forget(trainable)
        if self.settings.rule == "tensor_rank":
            gone = len(self.numels) - len(trainable)
            return self._forget(lowest_ranked(self._means(trainable), gone, len(self.numels), left))
        return self._forget(below_quantile(self._scores(trainable), left))

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        """The scores of cut rows of A and columns of B vanish with them."""
        super().pruned(keep)
        for state in self._parts().values():
            self._cut(state, keep)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        for part, state in self._parts().items():
            tensors |= {f"{name}.{part}": tensor.clone() for name, tensor in state.items()}
        meta |= {
            "n_in_window": self._n_in_window,
            "last_observed": self._last_observed,
            "last_decided": self._last_decided,
        }
        return tensors, meta

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        for part, state in self._parts().items():
            state.clear()
            state.update(
                {
                    key.removesuffix(f".{part}"): tensor.clone()
                    for key, tensor in tensors.items()
                    if key.endswith(f".{part}")
                }
            )
        self._n_in_window, self._last_observed = meta["n_in_window"], meta["last_observed"]
        self._last_decided = meta["last_decided"]

    def _parts(self) -> dict[str, dict[str, Tensor]]:
        return {"window": self._window, "mean": self._mean, "uncertainty": self._uncertainty}

    def _is_event(self, step: int) -> bool:
        """Whether projections may freeze in the ramp: every ``interval_steps``."""
        interval = self.settings.interval_steps
        window = step // interval
        return window * interval > self.warmup and window != self._last_decided // interval

    def _scores(self, names: Iterable[str]) -> dict[str, Tensor]:
        scores = {}
        for name in names:
            if name in self._mean:
                scores[name] = self._mean[name] * self._uncertainty[name]
            else:  # never had a gradient
                scores[name] = torch.zeros(self.numels[name])
        for name, mean in mean_scores(scores).items():
            if not math.isfinite(mean):
                raise TrimtabError(
                    f"freeze: the gradients of {name!r} are not finite; lower the learning rate, or clip"
                )
        return scores

    def _means(self, names: Iterable[str]) -> dict[str, float]:
        return mean_scores(self._scores(names))

    def _forget(self, names: Iterable[str]) -> set[str]:
        """Freeze, and drop the scores: what is frozen is never scored again."""
        frozen = self._freeze(names)
        for state in self._parts().values():
            for name in frozen:
                state.pop(name, None)
        return frozen


class FreezingRule:
    """AFLoRA's rule alone: gradients in, names out. For tests, benchmarks and other people's layers.

    Tensors are those of the first call, under any name.
    """

    def __init__(self, settings: AFLoRA, total_steps: int, steps_per_epoch: int | None) -> None:
        self.settings, self.total_steps, self.steps_per_epoch = settings, total_steps, steps_per_epoch
        settings.phases(total_steps, steps_per_epoch)  # a misfit shows at once
        self._freezer: AFLoRAFreezer | None = None

    def observe(self, step: int, gradients: Mapping[str, Tensor]) -> set[str]:
        """The names that freeze at this step, given the gradients of this step."""
        if self._freezer is None:
            numels = {name: gradient.numel() for name, gradient in gradients.items()}
            self._freezer = self.settings.build(numels, self.total_steps, self.steps_per_epoch)
        self._freezer.observe(step, gradients)
        return self._freezer.decide(step)
