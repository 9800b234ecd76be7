"""The Trainer's progress on our screen: epoch, steps, time left, and loss, speed, ranks and freezing under them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from .report.words import count, duration, number
from .screen import Stage

_LINES = 10
"""Of a run, where no bar moves: about a tenth of it each."""
_RECENT = 0.9
"""Weight of what was before in the moving average of a step's time."""


def progress_on(stage: Stage, trim: Any = None) -> Any:
    """A callback for stock `Trainer`.

    Args:
        trim: the run's `TrimCallback`, which knows ranks and what is frozen.
    """
    from transformers import TrainerCallback

    class OnScreen(TrainerCallback):
        evaluation: Any = None
        seconds: float | None = None  # of a step, without evaluating and saving
        loss: float | None = None
        before = 0.0
        told = 0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = stage.bar(state.max_steps)
            self.bar.move(state.global_step)
            self.before, self.told = time.monotonic(), state.global_step

        def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.say(epoch_of(state, begins=True))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = time.monotonic()
            took, self.before = now - self.before, now
            self.seconds = took if self.seconds is None else _RECENT * self.seconds + (1 - _RECENT) * took
            self.bar.move(state.global_step)

        def on_log(
            self, args: Any, state: Any, control: Any, logs: Mapping[str, float] | None = None, **kwargs: Any
        ) -> None:
            if logs and "loss" in logs:
                self.loss = float(logs["loss"])
                self.bar.move(state.global_step, beside=" · ".join(self.parts()))
                if (state.global_step - self.told) * _LINES >= state.max_steps:
                    self.tell(state)

        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.before = time.monotonic()

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
        ) -> None:
            if self.evaluation is None:
                self.evaluation = stage.bar(len(eval_dataloader), "evaluating")
            self.evaluation.advance()

        def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.evaluation is not None:
                self.evaluation.close()
                self.evaluation = None
            self.before = time.monotonic()

        def parts(self) -> list[str]:
            told = [f"loss {number(self.loss)}"]
            if self.seconds:
                told.append(
                    f"{number(1 / self.seconds, 2)} steps/s" if self.seconds < 1 else f"{self.seconds:.1f} s/step"
                )
            return told + decided(trim)

        def tell(self, state: Any) -> None:
            self.told = state.global_step
            steps = state.max_steps - state.global_step
            left = [f"{duration(steps * self.seconds)} left"] if steps and self.seconds else []
            at = f"step {count(state.global_step)}/{count(state.max_steps)}"
            stage.line(" · ".join([epoch_of(state), at, *self.parts(), *left]))

    return OnScreen()


def epoch_of(state: Any, begins: bool = False) -> str:
    """``epoch 2/3``; without their number where the data has no length."""
    done, of = state.epoch or 0, state.num_train_epochs
    now = math.floor(done + 1e-6) + 1 if begins else max(1, math.ceil(done - 1e-6))
    return f"epoch {min(now, of)}/{of}" if 0 < of < 10**6 else f"epoch {now}"


def decided(trim: Any) -> list[str]:
    """What rank and freeze methods have made of the adapters by now; nothing where none is at work."""
    controller = getattr(trim, "controller", None)
    if controller is None or not controller.layers:
        return []
    now, found = trim.figures.now, []
    if controller.allocator is not None:
        found.append(f"rank {count(now['total_rank'])} of {count(sum(controller.initial_ranks.values()))}")
    if controller.freezer is not None:
        found.append(f"{100 * now['frozen_share']:.0f} % frozen")
    return found
