"""What an optimizer step was: due or only accumulating, taken or left out, and at which loss scale.

No flag tells in every case: accelerate's never learns of an overflow under a fused optimizer, and a bare loop has
none. So the optimizer itself is watched, through torch's own step hooks.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from accelerate.state import GradientState
from torch import Tensor

from ..errors import ConfigError, StaleAdapterError
from ..host.adapted import callers
from ..host.sharding import is_dtensor

NOT_FINITE_LIMIT = 50
"""Steps in a row without finite gradients that end a run. A scaler that starts at 65536 needs at most 16 to find its
scale, and 40 would take it to 2^-24, the smallest number in fp16."""

UNSEEN_LIMIT = (3, 10)
"""Steps in a row in which no adapter had a gradient that end a run: before any had one (the loop is another than it
takes), and after that (a batch that is left out is no mistake)."""


class Weakly:
    """A hook that does not keep its owner alive, does nothing once that is gone, and is empty in copies and pickles."""

    def __init__(self, method: Callable | None = None) -> None:
        self.method = weakref.WeakMethod(method) if method is not None else lambda: None

    def __call__(self, *args: Any) -> Any:
        method = self.method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple:
        return Weakly, ()


def is_accumulating() -> bool:
    """Whether accelerate says that this backward pass is not yet the one that an optimizer step follows."""
    return not GradientState().sync_gradients


def forget_interrupted_accumulation() -> None:
    """accelerate's flag outlives a Trainer that was interrupted while it accumulated; then nothing would ever be due.

    Where a data loader of accelerate's is being gone through, the flag is left to whoever does that.
    """
    state = GradientState()
    if not state.sync_gradients and not state.in_dataloader:
        state._set_sync_gradients(True)


class StepWatch:
    """Whether an optimizer stepped since the last `forget`, and what a scaler told it.

    Args:
        optimizer: the torch optimizer, or None.
        given: what the user handed over; accelerate's wrapper knows the scaler.
    """

    def __init__(self, optimizer: torch.optim.Optimizer | None, given: Any) -> None:
        self.given, self.optimizer = given, optimizer
        self.is_ready = False
        """The gradients are complete: a closure that makes them anew would undo what was done to them."""
        self.norms: list[Tensor] = []
        """Of the adapters' gradients, the same on every process, before they are clipped."""
        self.scaler: Any = None
        self._looks = 2  # a profiler or a warm-up may have the first step
        self.forget()
        self._look_on()

    def _look_on(self) -> None:
        self._hooks: list[Any] = []
        if hasattr(self.optimizer, "_optimizer_step_post_hooks"):
            assert self.optimizer is not None
            self._hooks = [
                self.optimizer.register_step_pre_hook(Weakly(self._begins)),
                self.optimizer.register_step_post_hook(Weakly(self._ended)),
            ]

    def __getstate__(self) -> dict[str, Any]:
        """accelerate's wrapper cannot be pickled; of it the scaler is all that counts."""
        return {**self.__dict__, "given": self.optimizer, "scaler": self._scaler(), "_hooks": bool(self._hooks)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy looks on at the optimizer that was copied with it."""
        self.__dict__.update(state)
        if self._hooks:
            self._look_on()

    @property
    def can_tell(self) -> bool:
        return bool(self._hooks)

    def forget(self) -> None:
        self.has_stepped = False
        self.found_inf: Tensor | None = None
        self._are_finite: bool | None = None

    def was_finite(self) -> bool:
        """Whether the step that is over had gradients of numbers only, and was taken."""
        if self.can_tell and self.has_scaler and not self.has_stepped:
            return False
        if self.found_inf is not None and bool(self.found_inf):
            return False
        return _all_finite(self.norms) if self._are_finite is None else self._are_finite

    def was_left_out(self) -> bool:
        """Whether the step was not taken because of an overflow that only the gradients tell of, if it was not taken.

        Raises:
            StaleAdapterError: it was not, and nothing tells why.
        """
        if not self.can_tell or self.has_stepped or self.has_scaler:
            return False
        assert self.optimizer is not None
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        whole = [g for g in gradients if not is_dtensor(g) and not g.is_sparse]
        if whole and not _all_finite(list(torch._foreach_norm(whole))):
            return True  # a scaler that nobody has seen yet, or the loop itself
        raise StaleAdapterError(
            f"after_step: the optimizer given to the Controller ({type(self.optimizer).__name__}) was not stepped "
            "since before_step; keep to one optimizer for the whole run (optimizer.state.clear() starts its moments "
            "anew), or call after_step(skipped=True) where a step is left out"
        )

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @property
    def has_scaler(self) -> bool:
        return self._scaler() is not None

    def _scaler(self) -> Any:
        scaler = getattr(self.given, "scaler", None) or self.scaler
        return scaler if scaler is not None and scaler.is_enabled() else None

    def loss_scale(self) -> float:
        """What the gradients carry, where accelerate's wrapper holds the scaler, or one was seen at a first step."""
        scaler = self._scaler()
        if scaler is None:
            return 1.0
        state = scaler._per_optimizer_states.get(id(self.optimizer))
        if state is not None and state["stage"].name == "UNSCALED":
            return 1.0
        return float(scaler.get_scale())

    def _begins(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._looks and self.scaler is None:
            self._looks -= 1
            self.scaler = _scaler_above()
        if self.is_ready:
            held = [p for group in optimizer.param_groups for p in group["params"]]
            # Heads as well, whose gradients are complete only now. What is sharded is FSDP's.
            others = [p.grad for p in held if p.grad is not None and not is_dtensor(p.grad) and not p.grad.is_sparse]
            self._are_finite = _all_finite([*self.norms, *torch._foreach_norm(others)] if others else self.norms)
            if not self._are_finite:
                # As a scaler does: Adam would keep a NaN for good, in its moments and in the weights. One that has
                # unscaled before `before_step` has looked at this process alone.
                for p in held:
                    p.grad = None
                if (scaler := self._scaler()) is not None:
                    for found in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
                        found.fill_(1.0)
        if self.is_ready and (callable(kwargs.get("closure")) or any(callable(a) for a in args[1:])):
            own = (*args[:1], *(_same_after(a, optimizer) for a in args[1:]))
            return own, {key: _same_after(value, optimizer) for key, value in kwargs.items()}
        return None

    def _ended(self, optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        self.has_stepped = True
        found = getattr(optimizer, "found_inf", None)  # a fused optimizer is stepped, and leaves the step out itself
        if isinstance(found, Tensor):
            self.found_inf = found


def _all_finite(norms: list[Tensor]) -> bool:
    if not norms:
        return True
    return bool(torch.isfinite(torch.stack([n.float().to(norms[0].device) for n in norms])).all())


def _same_after(closure: Any, optimizer: torch.optim.Optimizer) -> Any:
    """A closure that may do anything but make the gradients anew. Lightning hands one to every step of a loop with
    manual optimisation, and it does nothing.

    Raises:
        StaleAdapterError: when it is called, and the gradients are others after it.
    """
    if not callable(closure):
        return closure

    def gradients() -> list[tuple[Tensor | None, int]]:
        held = (p.grad for group in optimizer.param_groups for p in group["params"])
        return [(g, 0 if g is None else g._version) for g in held]

    def watched() -> Any:
        before = gradients()
        result = closure()
        if any(a is not b or i != j for (a, i), (b, j) in zip(before, gradients())):
            raise StaleAdapterError(
                "optimizer.step(closure): the closure makes the gradients anew after before_step has seen them; call "
                "before_step at the end of the closure, or step without one"
            )
        return result

    return watched


def _scaler_above() -> Any:
    """The `GradScaler` whose `step` is calling, if one is."""
    for frame in itertools.islice(callers(), 12):
        if isinstance(scaler := frame.f_locals.get("self"), torch.amp.GradScaler) and scaler.is_enabled():
            return scaler
    return None


def refuse_what_cannot_be_followed(optimizer: Any) -> None:
    """Raise `ConfigError` for optimizers that take several gradients a step, or keep weights of their own."""
    name = type(optimizer).__name__
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ConfigError("optimizer", name, "takes many gradients a step, so none can be scored; use AdamW or SGD")
    # LOMO's step, and what transformers and LLaMA-Factory hand on for layerwise GaLore and APOLLO.
    if callable(getattr(optimizer, "fused_backward", None)) or hasattr(optimizer, "optimizer_dict"):
        raise ConfigError(
            "optimizer", name, "steps inside backward, where gradients are gone before they are scored; use torch's "
            "AdamW, Adam or SGD"
        )  # fmt: skip
    if callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            "optimizer", name, "keeps a second copy of the weights, which would not be cut or folded; use torch's "
            "AdamW, Adam or SGD"
        )  # fmt: skip


def refuse_second_copies(parameters: Iterable[Tensor], *optimizers: Any) -> None:
    """After the first step: raise `ConfigError` where an optimizer's state holds the weights once more.

    Slow weights and master copies would neither be cut nor folded, and be written over what was.
    """
    for p in parameters:
        weights = p.detach()
        for optimizer in optimizers:
            state = getattr(optimizer, "state", None)
            for key, value in state[p].items() if isinstance(state, Mapping) and p in state else ():
                if not isinstance(value, Tensor) or value.dim() < 2 or value.shape != p.shape:
                    continue
                if bool((value.to(weights) - weights).norm() < 0.1 * weights.norm()):
                    raise ConfigError(
                        "optimizer", type(optimizer).__name__, f"keeps a second copy of the weights ({key!r}), which "
                        "would not be cut or folded; use torch's AdamW, Adam or SGD"
                    )  # fmt: skip
