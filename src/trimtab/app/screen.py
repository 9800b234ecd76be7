"""What a person sees while a command works: one line a stage, a bar on long work, remarks once.

Everything goes to stderr, so that stdout holds only the result (a table, or JSON for machines). Without
a terminal there are no bars; when quiet there is nothing at all.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .report.words import duration

Item = TypeVar("Item")
_NAME_WIDTH = 9


class Screen:
    """Stages and remarks of one command.

    >>> with Screen(quiet=True).stage("select") as stage:
    ...     stage.result = "3 of 6 layers"
    """

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, quiet=quiet, highlight=False)
        self._said: set[str] = set()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Shows ``name``, a bar if the stage starts one, and at its end its result and the time it took."""
        stage = Stage(name, self.console)
        began = time.monotonic()
        try:
            with stage.progress:
                yield stage
        except BaseException:
            self.console.print(f"[red]{name:<{_NAME_WIDTH}}[/] stopped", soft_wrap=True)
            raise
        seconds = f"[dim]{duration(time.monotonic() - began)}[/]"
        self.console.print(f"[green]{name:<{_NAME_WIDTH}}[/]{escape(stage.result)}  {seconds}", soft_wrap=True)

    def note(self, text: str) -> None:
        """A remark, once each: made inside a stage it stands above the stage's line."""
        text = " ".join(text.split())
        if text not in self._said:
            self._said.add(text)
            self.console.print(f"[yellow]{'note':<{_NAME_WIDTH}}[/]", end="")
            self.console.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def hush(self) -> Iterator[None]:
        """Libraries' bars and chatter off; warnings, and what Trimtab logs, become notes; deprecations do not."""
        # Libraries that are not imported yet read these; importing them here would cost every command seconds.
        for name, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "DATASETS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }.items():
            os.environ.setdefault(name, value)
        logging.getLogger("accelerate").setLevel(logging.ERROR)
        if transformers := sys.modules.get("transformers"):
            transformers.logging.set_verbosity_error()
            transformers.logging.disable_progress_bar()
        if datasets := sys.modules.get("datasets"):
            datasets.logging.set_verbosity_error()
            datasets.disable_progress_bars()

        def show(message: Warning | str, category: type[Warning], *args: Any, **kwargs: Any) -> None:
            self.note(str(message))

        ours, handler = logging.getLogger("trimtab"), _Notes(self)
        ours.addHandler(handler)
        try:
            with warnings.catch_warnings():
                for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
                    warnings.simplefilter("ignore", kind)
                warnings.showwarning = show  # type: ignore[assignment]
                yield
        finally:
            ours.removeHandler(handler)


class _Notes(logging.Handler):
    """What our own modules log becomes notes."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.note(record.getMessage())


class Stage:
    """One line on the screen. Set `result` to what its closing line says."""

    def __init__(self, name: str, console: Console) -> None:
        self.result = ""
        self.progress = Progress(
            TextColumn(f"[cyan]{name:<{_NAME_WIDTH}}[/]" + "{task.description}"),
            BarColumn(bar_width=24),
            _Count(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("[dim]{task.fields[beside]}"),
            console=console,
            transient=True,
            disable=console.quiet or not console.is_terminal,
        )

    def bar(self, total: int | None, description: str = "") -> Bar:
        return Bar(self.progress, self.progress.add_task(description, total=total, beside=""))

    def track(self, items: Sequence[Item], description: str = "") -> Iterable[Item]:
        """The items, with a bar that counts them."""
        bar = self.bar(len(items), description)
        for item in items:
            yield item
            bar.advance()
        bar.close()


class _Count(MofNCompleteColumn):
    """ "3/40", or nothing while there is no telling how much there is."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else super().render(task)


class Bar:
    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress, self._task = progress, task

    def advance(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def move(self, completed: int, beside: str | None = None) -> None:
        """Puts the bar at ``completed``, with ``beside`` (a loss, a score) to its right."""
        fields: dict[str, Any] = {} if beside is None else {"beside": beside}
        self._progress.update(self._task, completed=completed, **fields)

    def say(self, description: str) -> None:
        self._progress.update(self._task, description=description)

    def close(self) -> None:
        self._progress.remove_task(self._task)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Iterable[int] = ()) -> Table:
    """A plain table without rules; ``right`` names the columns (by index) that hold numbers."""
    numeric = set(right)
    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for i, name in enumerate(columns):
        # Headings of figures stand word under word: on a narrow screen they may not push figures out.
        made.add_column(
            name.replace(" ", "\n") if i in numeric else name,
            overflow="fold",
            header_style="dim",
            justify="right" if i in numeric else "left",
            vertical="bottom" if i in numeric else "top",
        )
    for row in rows:
        made.add_row(*map(escape, row))
    return made
