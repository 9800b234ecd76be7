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

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from .report.words import duration

Item = TypeVar("Item")
_NAME_WIDTH = 9
NO_BREAK = "\u00a0"


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
        stage = Stage(name, self)
        began = time.monotonic()
        try:
            with stage.progress:
                yield stage
        except BaseException:
            self.console.print(f"[red]{name:<{_NAME_WIDTH}}[/] stopped", soft_wrap=True)
            raise
        seconds = f"[dim]{duration(time.monotonic() - began).replace(' ', NO_BREAK)}[/]"
        self._line(f"[green]{name}[/]", f"{escape(stage.result)}  {seconds}")

    def note(self, text: str) -> None:
        """A remark, once each: made inside a stage it stands above the stage's line."""
        text = " ".join(text.split())
        if text not in self._said:
            self._said.add(text)
            self._line("[yellow]note[/]", escape(text))

    def _line(self, name: str, text: str) -> None:
        """On a terminal wrapped between words, under itself; elsewhere there is no edge to wrap at."""
        if not self.console.is_terminal:
            room = " " * (_NAME_WIDTH - len(Text.from_markup(name)))
            self.console.print(f"{name}{room}{text}", soft_wrap=True)
            return
        grid = Table.grid()
        grid.add_column(width=_NAME_WIDTH)
        grid.add_column(overflow="fold")
        grid.add_row(name, text)
        self.console.print(grid)

    @contextmanager
    def hush(self) -> Iterator[None]:
        """Libraries' bars and chatter off; warnings, and what Trimtab logs, become notes; deprecations do not."""
        # Libraries that are not imported yet read these; importing them here would cost every command seconds.
        for name, value in {
            "TRANSFORMERS_VERBOSITY": "error",
            "DATASETS_VERBOSITY": "error",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TQDM_DISABLE": "1",  # of transformers while it unpacks a GGUF file
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
            if not str(message).startswith(_OF_NO_USE):
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


_OF_NO_USE = ("Could not find a config file in",)
"""What PEFT says on saving, of a base that is a GGUF file: there is none, and nothing follows from it."""


class _Notes(logging.Handler):
    """What our own modules log becomes notes."""

    def __init__(self, screen: Screen) -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        self._screen.note(record.getMessage())


class Stage:
    """One line on the screen. Set `result` to what its closing line says."""

    def __init__(self, name: str, screen: Screen) -> None:
        self.name, self.result, self._screen = name, "", screen
        console = screen.console
        self.has_bars = console.is_terminal and not console.quiet
        self.progress = _Progress(
            TextColumn(f"[cyan]{name:<{_NAME_WIDTH}}[/]" + "{task.description}"),
            BarColumn(bar_width=24),
            _Count(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            console=console,
            transient=True,
            disable=not self.has_bars,
        )

    def line(self, text: str) -> None:
        """How far a long stage is, for a log, where no bar moves."""
        if not self.has_bars:
            self._screen._line(f"[dim]{self.name}[/]", escape(text))

    def bar(self, total: int | None, description: str = "") -> Bar:
        return Bar(self.progress, self.progress.add_task(description, total=total, beside=""))

    def track(self, items: Sequence[Item], description: str = "") -> Iterable[Item]:
        """The items, with a bar that counts them."""
        bar = self.bar(len(items), description)
        for item in items:
            yield item
            bar.advance()
        bar.close()


class _Progress(Progress):
    """Bars, and under each what stands beside it: on one line with it words would break on a narrow screen."""

    def get_renderables(self) -> Iterable[Any]:
        for task in self.tasks:
            yield self.make_tasks_table([task])
            if beside := task.fields["beside"]:
                yield Padding(Text(beside, style="dim"), (0, 0, 0, _NAME_WIDTH))


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
        """Puts the bar at ``completed``, with ``beside`` (a loss, a score) under it."""
        fields: dict[str, Any] = {} if beside is None else {"beside": beside}
        self._progress.update(self._task, completed=completed, **fields)

    def say(self, description: str) -> None:
        self._progress.update(self._task, description=description)

    def close(self) -> None:
        self._progress.remove_task(self._task)


class _Table(Table):
    """A table that breaks no word: where its columns do not fit, each row is a list of name and value."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        cells = [[*_plain(column.header).split(), *map(_plain, column.cells)] for column in self.columns]
        apart = [None if column.justify == "left" else "\n" for column in self.columns]  # a figure is one word
        words = [
            max(len(word) for cell in column for word in cell.split(by) or [""]) for column, by in zip(cells, apart)
        ]
        if len(cells) < 3 or sum(words) + 2 * len(words) - 2 <= options.max_width:
            for column, width in zip(self.columns, words):
                column.min_width = width if len(cells) > 2 else None
                column.no_wrap = len(cells) > 2 and column.justify != "left"
            yield from super().__rich_console__(console, options)
            return
        if self.title:
            yield Text.from_markup(str(self.title), style="bold")
        for row in zip(*(column.cells for column in self.columns)):
            yield Text.from_markup(str(row[0]))
            grid = Table.grid(padding=(0, 2, 0, 0))
            grid.add_column(style="dim")
            grid.add_column(overflow="fold")
            for column, cell in zip(self.columns[1:], row[1:]):
                grid.add_row(f"  {_plain(column.header)}", cell)
            yield grid


def _plain(cell: Any) -> str:
    return " ".join((Text.from_markup(cell) if isinstance(cell, str) else Text(str(cell))).plain.split())


def aside(text: object) -> Text:
    """A path or a command, dim, to be copied as it is."""
    return Text(str(text), style="dim")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", right: Iterable[int] = ()) -> Table:
    """A plain table without rules; ``right`` names the columns (by index) that hold numbers."""
    numeric = set(right)
    made = _Table(
        title=escape(title) or None,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
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
