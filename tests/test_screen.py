"""What a person sees while a command works: progress, and words that stay whole on a narrow screen."""

from __future__ import annotations

import io
import re
import warnings
from types import SimpleNamespace

import pytest
from rich.console import Console

import trimtab
from trimtab.app import ending, progress
from trimtab.app.screen import Screen, table

WORDS = "validation: 5 classes: 'python' 60, 'scipy' 60, 'sympy' 60, 'torch' 60, 'transformers' 60; learned " * 3


def screen(width: int, terminal: bool) -> tuple[Screen, io.StringIO]:
    made, out = Screen(), io.StringIO()
    made.console = Console(file=out, width=width, force_terminal=terminal, highlight=False, no_color=True)
    return made, out


def lines(out: io.StringIO) -> list[str]:
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).splitlines()]


@pytest.mark.parametrize("width", [80, 60, 40])
def test_a_remark_wraps_between_words_under_itself(width):
    made, out = screen(width, terminal=True)
    made.note(WORDS)
    found = lines(out)
    assert max(map(len, found)) <= width and len(found) > 2
    assert " ".join(line[9:] for line in found) == WORDS.strip()
    assert {line[:9] for line in found[1:]} == {" " * 9}


def test_a_remark_in_a_file_is_one_line():
    made, out = screen(80, terminal=False)
    made.note(WORDS)
    assert lines(out) == [f"note     {WORDS.strip()}"]


@pytest.mark.parametrize("width", [120, 80, 50])
def test_no_word_of_a_table_is_broken(width):
    cells = [["where=cka, rank=salientlora, freeze=aflora", "0.4967", "165,888", "59,300", "2 min 24 s", "938.6 MiB"]]
    columns = ["run", "matthews_correlation", "params initial", "params average", "time", "peak memory"]
    made, out = screen(width, terminal=True)
    made.console.print(table(columns, cells, right=range(1, 6)))
    assert max(map(len, lines(out))) <= width
    shown = " ".join(lines(out)).split()
    assert {*" ".join([*cells[0], *columns[1:]]).split()} <= {*shown}


def test_an_error_on_a_terminal_wraps_between_words(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        ending.fail("adapter.type='loraa': must be one of lora, vera, bottleneck, adaption_prompt.", code=2)
    found = capsys.readouterr().err.splitlines()
    assert len(found) > 1 and max(map(len, found)) <= 40
    assert "bottleneck," in " ".join(found).split()


class _Stage:
    """Keeps what a stage would show."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.under: list[str] = []
        self.logged: list[str] = []

    def bar(self, total, description=""):
        return SimpleNamespace(
            move=lambda done, beside=None: self.under.append(beside) if beside else None,
            say=self.said.append,
            advance=lambda: None,
            close=lambda: None,
        )

    def line(self, text):
        self.logged.append(text)


def test_training_shows_epoch_loss_speed_rank_and_what_is_frozen(tmp_path):
    import short_runs

    stage, trim = _Stage(), trimtab.TrimCallback(history=tmp_path / "history.jsonl")
    model = short_runs.model_for("bert", "salientlora+aflora")
    short_runs.train(model, "bert", tmp_path, callbacks=(progress.progress_on(stage, trim),), trim=trim)
    assert stage.said[0].startswith("epoch 1/") and len(stage.said) == int(stage.said[0].partition("/")[2])
    first, last = stage.under[0], stage.under[-1]
    assert first.startswith("loss ") and ("steps/s" in first or "s/step" in first)
    at_start, at_end = sum(trim.controller.initial_ranks.values()), sum(trim.controller.ranks().values())
    assert f"rank {at_end} of {at_start}" in last
    assert any(" 0 % frozen" in line for line in stage.under) and last.endswith(" 100 % frozen")  # folded in by then
    assert len(stage.logged) == 8  # every fifth of 40 steps is logged: of those no more than one a tenth of the run
    assert stage.logged[0].startswith("epoch 1/") and "step 5/40" in stage.logged[0]
    assert stage.logged[0].endswith(" left")


@pytest.mark.parametrize(
    ("epoch", "of", "begins", "says"),
    [
        (0.0, 3, True, "epoch 1/3"),
        (1.0, 3, True, "epoch 2/3"),
        (1.0, 3, False, "epoch 1/3"),
        (1.25, 3, False, "epoch 2/3"),
        (3.0, 3, False, "epoch 3/3"),
        (0.5, 2**63, False, "epoch 1"),  # rows without a length
    ],
)
def test_an_epoch_is_counted_from_one_and_ends_before_the_next(epoch, of, begins, says):
    assert progress.epoch_of(SimpleNamespace(epoch=epoch, num_train_epochs=of), begins) == says


def test_a_librarys_remark_of_no_use_is_no_note(capsys):
    screen = Screen()
    with screen.hush():
        warnings.warn(
            "Could not find a config file in /x - will assume that the vocabulary was not modified.", stacklevel=1
        )
        warnings.warn("weights are of another kind", stacklevel=1)
    said = capsys.readouterr().err
    assert "vocabulary" not in said and "weights are of another kind" in said
