"""What a run did, one row an event: in memory, and in a file that a resumed run continues exactly.

The file holds no clock times, so that it is the same for the same run; those go to ``timing.jsonl`` beside it.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .controller import Event

# Of what Trainer logs, what a resumed run does not repeat exactly.
_CLOCK = ("runtime", "per_second", "model_preparation_time", "total_flos")


def without_clock(logs: dict[str, Any]) -> dict[str, Any]:
    """A log row's figures without clock times, and without the epoch, which a history row has of its own."""
    return {k: v for k, v in logs.items() if k != "epoch" and not any(word in k for word in _CLOCK)}


def _whole_lines(file: Path) -> list[bytes]:
    return [line for line in file.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


def _replace(file: Path, content: bytes) -> None:
    temporary = file.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, file)


class History:
    """Rows of one run.

    Args:
        file: where they are kept, one JSON object a line; None keeps them in memory only.
    """

    def __init__(self, file: str | os.PathLike[str] | None) -> None:
        self.file = Path(file) if file is not None else None
        self.events: list[Event] = []
        self._began = 0.0
        self._aside = 0.0  # seconds since then spent on evaluating and saving
        self._step_ended = 0.0

    # -- rows ---------------------------------------------------------------------------------------

    def add(self, row: Event, to_file: bool) -> None:
        self.events.append(row)
        if to_file and self.file is not None:
            with self.file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")

    def count(self) -> int:
        if self.file is None or not self.file.exists():
            return len(self.events)
        return sum(1 for _ in self.file.open(encoding="utf-8"))

    def begin_file(self) -> None:
        """A new file of the rows so far, in place of another run's."""
        if self.file is not None:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.file.write_text("".join(json.dumps(row) + "\n" for row in self.events), encoding="utf-8")
            self._timing.unlink(missing_ok=True)

    def cut_file(self, rows: int) -> list[Event]:
        """Drop what a killed run wrote after its last checkpoint, which the resumed run writes again; what is left.

        Raises:
            CheckpointError: of the rows before that one is damaged.
        """
        if self.file is None:
            return []
        if self._timing.exists():  # a line that was cut off, by a full disk, say
            _replace(self._timing, b"".join(_whole_lines(self._timing)))
        if not self.file.exists():
            return []
        kept = _whole_lines(self.file)[:rows]
        found = []
        for number, line in enumerate(kept, 1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise CheckpointError(
                    f"{self.file}: line {number} is damaged ({error}); move the file away, and the run goes on without "
                    "what it tells"
                ) from None
        _replace(self.file, b"".join(kept))
        return found

    # -- clock times --------------------------------------------------------------------------------

    @property
    def _timing(self) -> Path:
        assert self.file is not None
        return self.file.parent / "timing.jsonl"

    def start_clock(self) -> None:
        self._began = self._step_ended = time.perf_counter()
        self._aside = 0.0

    def step_ended(self) -> None:
        self._step_ended = time.perf_counter()

    def set_aside(self) -> None:
        """What Trainer has done since the step (or epoch) ended was no training."""
        now = time.perf_counter()
        self._aside += now - self._step_ended
        self._step_ended = now

    def write_time(self, step: int) -> None:
        """A row of seconds since the start, and of those of them that were no training."""
        if self.file is not None:
            row = {
                "step": step,
                "seconds": round(time.perf_counter() - self._began, 3),
                "aside": round(self._aside, 3),
            }
            with self._timing.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
