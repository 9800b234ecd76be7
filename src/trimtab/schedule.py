"""Phase lengths as a user writes them (steps, a fraction of the run, epochs) -> optimizer steps. No torch."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from numbers import Integral, Real
from typing import Any, cast

from .errors import ConfigError

StepLength = int | float | str
"""``800`` steps, ``0.1`` or ``"10%"`` of the run, ``"1ep"`` epochs."""

_TEXT = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(ep|%)\s*")
_FORMS = 'an int (steps), a fraction below 1 or a percentage ("10%") of the run, or epochs ("1ep")'


def check_length(value: object, key: str) -> None:
    """Refuse what can be no phase length, whatever the run. Raises `ConfigError`.

    >>> check_length("2ep", "rank.warmup")
    """
    if isinstance(value, bool):
        raise ConfigError(key, value, _FORMS)
    if isinstance(value, Integral):
        if value < 0:
            raise ConfigError(key, value, "at least 0 steps")
    elif isinstance(value, Real):
        value = float(value)
        if value == 1.0:
            raise ConfigError(key, value, 'ambiguous: write 1 for one step or "100%" for the whole run')
        if not 0 <= value < 1:  # refuses NaN, too
            raise ConfigError(key, value, _FORMS)
    elif isinstance(value, str):
        match = _TEXT.fullmatch(value)
        if not match or (match[2] == "%" and float(match[1]) > 100):
            raise ConfigError(key, value, _FORMS)
    else:
        raise ConfigError(key, value, _FORMS)


def plain_numbers(settings: Any) -> None:
    """Make numpy's numbers in a dataclass Python's own, so that they are checked, shown and saved like those."""
    for item in fields(settings):
        value = getattr(settings, item.name)
        if isinstance(value, Real) and type(value).__module__ == "numpy":
            object.__setattr__(settings, item.name, cast(Any, value).item())


def resolve_steps(value: StepLength, total_steps: int, steps_per_epoch: int | None, key: str) -> int:
    """A phase length in optimizer steps.

    Fractions round down, so that phases which fill the run exactly still fit into it.

    Args:
        value: what the user wrote.
        total_steps: optimizer steps of the whole run.
        steps_per_epoch: optimizer steps of one epoch; None where the trainer does not know.
        key: dotted name for the error.
    Raises:
        ConfigError: the value is no length, is ambiguous (``1.0``), or counts epochs of unknown length.

    >>> resolve_steps(0.7, 200, 10, "freeze.final"), resolve_steps("1.5ep", 200, 10, "freeze.warmup")
    (140, 15)
    """
    check_length(value, key)
    if isinstance(value, Integral):
        return int(value)
    if not isinstance(value, str):
        return _whole(float(value) * total_steps)
    match = _TEXT.fullmatch(value)
    assert match  # check_length saw to it
    number, unit = float(match[1]), match[2]
    if unit == "%":
        return _whole(number / 100 * total_steps)
    if not steps_per_epoch or steps_per_epoch < 1:
        raise ConfigError(key, value, "the length of an epoch is unknown here; give steps or a fraction of the run")
    return _whole(number * steps_per_epoch)


def what_fits(least: int, total_steps: int) -> str:
    """Lengths of at least ``least`` steps that leave one step of the run after them, in words."""
    if least >= total_steps:
        return f"it takes a run of at least {least + 1}"
    return f"{least} to {total_steps - 1} can be met"


def _whole(steps: float) -> int:
    return math.floor(steps * (1 + 1e-12) + 1e-9)  # 0.29 · 100 is 28.999999999999996 in binary
