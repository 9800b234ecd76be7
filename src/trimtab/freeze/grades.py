"""GradES: freeze the projections of a site once they have settled, each site when its own time has come.

Wen et al., arXiv 2509.01842. A site has settled when the movement of its projections falls under a threshold τ, after
a share α of the run. A and B of a site count and freeze together, as in the paper's LoRA form.

Three versions of "movement" are published, all as an L1 norm; `GradES.movement` names them:

  ``gradient``         ‖∇_t‖₁               the paper's first version
  ``gradient_change``  ‖∇_t − ∇_{t-1}‖₁     its third version; the default here
  ``weight_change``    ‖W_t − W_{t-1}‖₁     the authors' package, 1.0.6

The default asks for no more than gradients and does not follow the learning rate: a weight's change shrinks with any
decay of the rate, so that ``weight_change`` freezes by the schedule as much as by what was learnt.

Paper and package compare one step's norm with an absolute τ, of which their settings hold values from 1e-10 to 20. Such
a τ depends on a tensor's size, on the loss and on the schedule. Ours is relative: the mean per element over the last
``interval_steps`` steps, against the site's own mean over the steps before α, when nothing freezes. A site without any
movement in those has settled. One site trains on where nothing else would: the paper ends the run there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..errors import ConfigError, TrimtabError
from ..schedule import StepLength, check_length, plain_numbers, resolve_steps, what_fits
from .base import Curve, Freezer, FreezeSettings

MOVEMENTS = ("gradient_change", "gradient", "weight_change")


@dataclass(frozen=True, kw_only=True)
class GradES(FreezeSettings):
    """Settings. Phase lengths: optimizer steps (``100``), a share of the run (``0.5``, ``"50%"``), or epochs."""

    method: ClassVar[str] = "grades"
    paper: ClassVar[str] = "arXiv 2509.01842"

    movement: Literal["gradient_change", "gradient", "weight_change"] = "gradient_change"
    """What is measured, as an L1 norm: the gradient's change between steps (the paper), the gradient (its first
    version), or the weights' change (the authors' package), which follows the learning rate down."""
    tau: float = 0.5
    """A site freezes when its movement is under this share of what it was before ``alpha`` (τ)."""
    alpha: StepLength = 0.5
    """Before the first freeze; in these steps the early movement is measured (α)."""
    interval_steps: int = 10
    """Steps whose mean is compared, and between two comparisons."""
    latest: StepLength | None = None
    """From here on everything is frozen, settled or not. None: what does not settle trains to the end."""

    def __post_init__(self) -> None:
        plain_numbers(self)
        if self.movement not in MOVEMENTS:
            raise ConfigError("freeze.movement", self.movement, " or ".join(MOVEMENTS))
        if isinstance(self.tau, bool) or not isinstance(self.tau, int | float) or not 0 < self.tau < math.inf:
            raise ConfigError("freeze.tau", self.tau, "a number above 0, such as 0.5: a share of the early movement")
        check_length(self.alpha, "freeze.alpha")
        if type(self.interval_steps) is not int or self.interval_steps < 1:
            raise ConfigError("freeze.interval_steps", self.interval_steps, "a whole number, at least 1")
        if self.latest is not None:
            check_length(self.latest, "freeze.latest")

    @property
    def freezes_all(self) -> bool:
        return self.latest is not None

    def phases(self, total_steps: int, steps_per_epoch: int | None) -> tuple[int, int]:
        """Steps before the first freeze, and how many train at all. Raises `ConfigError` where they do not fit."""
        before = resolve_steps(self.alpha, total_steps, steps_per_epoch, "freeze.alpha")
        least = 1 if self.movement == "gradient" else 2  # a change needs two steps
        if not least <= before < total_steps:
            raise ConfigError(
                "freeze.alpha",
                self.alpha,
                f"that is {before} of the run's {total_steps} steps; {what_fits(least, total_steps)}",
            )
        if self.latest is None:
            return before, total_steps
        latest = resolve_steps(self.latest, total_steps, steps_per_epoch, "freeze.latest")
        if not 1 <= latest <= total_steps:
            raise ConfigError(
                "freeze.latest", self.latest, f"that is {latest} of the run's {total_steps} steps; at least 1 trains"
            )
        return before, latest

    def trainable_curve(self, total_steps: int, steps_per_epoch: int | None) -> Curve:
        """What may train at most: when a site settles cannot be foreseen."""
        _, latest = self.phases(total_steps, steps_per_epoch)
        return [(0, 1.0), (latest, 0.0)] if latest < total_steps else [(0, 1.0)]

    def n_ramps(self, total_steps: int, steps_per_epoch: int | None) -> int:
        return total_steps

    def ramp(self, k: int, total_steps: int, steps_per_epoch: int | None) -> GradES:
        return replace(self, latest=k + 1)

    def check_budget(self) -> None:
        pass

    def build(self, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None) -> GradESFreezer:
        return GradESFreezer(self, tensors, total_steps, steps_per_epoch)


class GradESFreezer(Freezer):
    """Adds up each site's movement, and compares its recent mean with its early one every ``interval_steps`` steps."""

    def __init__(
        self, settings: GradES, tensors: Mapping[str, int], total_steps: int, steps_per_epoch: int | None
    ) -> None:
        super().__init__(tensors, total_steps, settings.trainable_curve(total_steps, steps_per_epoch))
        self.settings = settings
        self.before, self.latest = settings.phases(total_steps, steps_per_epoch)
        self.reads_weights = settings.movement == "weight_change"
        self.reads_gradients = not self.reads_weights
        sites = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        self._place = {site: i for i, site in enumerate(sites)}
        self._early, self._recent = (torch.zeros(len(sites), dtype=torch.float64) for _ in range(2))
        self._n_early = self._n_recent = 0
        self._window = -1
        self._previous: dict[str, Tensor] = {}

    def observe(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Take in one optimizer step. A projection without a gradient counts as one with a zero gradient.

        Args:
            values: the gradients of the projections that train, or with ``weight_change`` their weights.
        """
        if self.settings.movement == "gradient":
            moved = {name: values[name].detach() for name in self.trainable if name in values}
        else:
            before = self._previous
            now = {name: values[name].detach() for name in self.trainable if name in values}
            now |= {
                name: torch.zeros_like(before[name]) for name in self.trainable if name in before.keys() - now.keys()
            }
            moved = {name: now[name] - before[name] for name in now if name in before}
            self._previous = {name: value.clone() for name, value in now.items()} if self.reads_weights else now
            if not before:
                return  # nothing to tell a change from yet
        if self._window != step // self.settings.interval_steps:
            self._window, self._n_recent = step // self.settings.interval_steps, 0
            self._recent.zero_()
        means = self._means(moved)
        if step < self.before:
            self._early += means
            self._n_early += 1
        self._recent += means
        self._n_recent += 1

    def _means(self, moved: Mapping[str, Tensor]) -> Tensor:
        """Mean absolute movement of each site, (sites,) on the CPU: one transfer a step."""
        means = torch.zeros_like(self._recent)
        moved = {name: value for name, value in moved.items() if value.numel()}
        if not moved:
            return means
        by_device: dict[torch.device, list[str]] = {}
        for name, value in moved.items():
            by_device.setdefault(value.device, []).append(name)
        sizes = torch.zeros_like(means)
        for names in by_device.values():
            norms = torch.stack(list(torch._foreach_norm([moved[name].float() for name in names], 1))).double().cpu()
            places = torch.tensor([self._place[name.rpartition(".")[0]] for name in names])
            means.index_add_(0, places, norms)
            sizes.index_add_(0, places, torch.tensor([moved[name].numel() for name in names], dtype=sizes.dtype))
        return means / sizes.clamp(min=1)

    def is_due(self, step: int) -> bool:
        return self._is_event(step) and bool(self.trainable)

    def decide(self, step: int, allowance: float | None = None) -> set[str]:
        trainable = self.trainable
        if self.total_steps > self.latest <= step + 1:
            return self._forget(trainable)
        is_near = allowance is not None and sum(self.numels[name] for name in trainable) > allowance
        if not trainable or not (self._is_event(step) or is_near):
            return set()
        left = self.movements()
        frozen: set[str] = set()
        if self._is_event(step):
            settled = {name for name in trainable if left[name] < self.settings.tau}
            if len(settled) == len(trainable) and not self.settings.freezes_all:
                last = max(left[name] for name in trainable)
                settled -= {name for name in trainable if left[name] == last}
            frozen = self._forget(settled)
        if allowance is not None:
            frozen |= self._forget(self._over_allowance(step, left, allowance, is_event=False))
        return frozen

    def movements(self) -> dict[str, float]:
        """Movement of late as a share of the early one, by projection that trains; 1 before anything was measured."""
        if not self._n_recent or not self._n_early:
            return dict.fromkeys(self.trainable, 1.0)
        shares = (self._recent / self._n_recent) / (self._early / self._n_early)
        rests = (self._early == 0) & (self._recent == 0)
        share_of = shares.masked_fill(rests, 0.0).tolist()
        found = {name: share_of[self._place[name.rpartition(".")[0]]] for name in self.trainable}
        for name, share in found.items():
            if math.isnan(share):
                raise TrimtabError(
                    f"freeze: the movement of {name!r} is not finite; lower the learning rate, or clip gradients"
                )
        return found

    def _is_event(self, step: int) -> bool:
        return step + 1 > self.before and (step + 1) % self.settings.interval_steps == 0

    def _forget(self, names: set[str] | list[str]) -> set[str]:
        frozen = self._freeze(names)
        for name in frozen:
            self._previous.pop(name, None)
        return frozen

    def pruned(self, keep: Mapping[str, Tensor]) -> None:
        super().pruned(keep)
        self._cut(self._previous, keep)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, meta = super().state_dict()
        tensors |= {"early": self._early.clone(), "recent": self._recent.clone()}
        tensors |= {f"previous/{name}": value.clone() for name, value in self._previous.items()}
        return tensors, meta | {"n_early": self._n_early, "n_recent": self._n_recent, "window": self._window}

    def load_state_dict(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        super().load_state_dict(tensors, meta)
        self._early, self._recent = tensors["early"].cpu().clone(), tensors["recent"].cpu().clone()
        self._previous = {
            key.removeprefix("previous/"): value.clone()
            for key, value in tensors.items()
            if key.startswith("previous/")
        }
        self._n_early, self._n_recent, self._window = meta["n_early"], meta["n_recent"], meta["window"]
