"""SIGTERM and Ctrl-C: training takes its step to the end and saves first, anything else stops at once.

A second signal leaves at once: after the first one the system's own handlers are back.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal ended the command; its text says how to go on. No handler of errors is to catch it."""

    def __init__(self, number: int, text: str = "") -> None:
        super().__init__(text or f"stopped by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """What a shell gives a process that such a signal ended: 143 for SIGTERM, 130 for SIGINT."""
        return 128 + self.number


class _Asked:
    """What signals have asked of this process, which has one set of handlers."""

    owner = 0
    number = 0
    saves_first = False


@contextmanager
def listening() -> Iterator[None]:
    """Turns the signals into `Stopped` while a command runs. Only a program's main thread can have handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _Asked.owner, _Asked.number, _Asked.saves_first = os.getpid(), 0, False
    before = [signal.signal(number, _on_signal) for number in _SIGNALS]
    try:
        yield
    finally:
        for number, handler in zip(_SIGNALS, before):
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if os.getpid() != _Asked.owner:  # a worker that was forked: Ctrl-C reaches it too, but its parent decides
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        return
    _Asked.number = number
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    if not _Asked.saves_first:
        raise Stopped(number)
    if os.environ.get("RANK", "0") == "0":  # not through a stream, which may be in mid-write
        name = signal.Signals(number).name
        os.write(2, f"\n{name}: saving a checkpoint after this step; a second signal leaves at once\n".encode())


@contextmanager
def saving_first() -> Iterator[Any]:
    """A callback for the Trainer, before all that look at whether it saves. Once a signal came, it saves at the end of
    the step, with the evaluation that is due there, and raises `Stopped`; of several processes all at the same step.
    """
    from transformers import TrainerCallback

    class SaveAndStop(TrainerCallback):
        is_at_boundary = True  # of steps, from which a resumed run goes on with nothing left out

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # What is due when an epoch ends is not done again by a run that resumes after its last step.
            self.is_at_boundary = state.epoch != int(state.epoch)
            control.should_save |= self.is_at_boundary and _is_asked(args)

        def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.is_at_boundary = True
            control.should_save |= _is_asked(args)

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_save |= self.is_at_boundary and _is_asked(args)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            # Training that ends here anyway is taken to its end: ranks are cut to their target there.
            if _is_asked(args) and self.is_at_boundary and not control.should_training_stop:
                raise Stopped(_Asked.number)

    _raise_if_asked()
    _Asked.saves_first = True
    try:
        yield SaveAndStop()
    finally:
        _Asked.saves_first = False
    _raise_if_asked()


def _raise_if_asked() -> None:
    if _Asked.number:
        raise Stopped(_Asked.number)


def _is_asked(args: Any) -> bool:
    """Whether any process got a signal; every process asks at the same events."""
    if args.world_size > 1:
        import torch

        number = torch.tensor(_Asked.number, device=args.device)
        torch.distributed.all_reduce(number, torch.distributed.ReduceOp.MAX)
        _Asked.number = int(number)
    return bool(_Asked.number)
