"""The command line. Imports nothing heavy at load time, so that ``--help`` answers at once.

Results go to stdout (a table, or JSON with ``--json``), everything else to stderr.
"""

from __future__ import annotations

import gc
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from .. import __version__
from ..errors import ConfigError, did_you_mean
from .ending import Commands, common, fail
from .malloc import keep_freed_memory

if TYPE_CHECKING:
    from .recipe import Recipe
    from .runfolder import RunFolder
    from .screen import Screen


_PATH = click.Path(path_type=Path)
_FILE = click.Path(path_type=Path, dir_okay=False)
_FOLDER = click.Path(path_type=Path, file_okay=False)
_recipe = click.argument("recipe")
_source = click.argument("source", metavar="RUN|RECIPE")
_overrides = click.argument("overrides", nargs=-1, metavar="[KEY=VALUE]...")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace what an earlier run left in the output folder.")
_resume = click.option("--resume", is_flag=True, help="Go on from the last complete checkpoint, exactly.")


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "--version", prog_name="trimtab")
def cli() -> None:
    """Decide where a transformer is adapted, at which rank, and for how long.

    A RECIPE is a YAML file; any of its keys can be set on the command line as key=value, for example
    where.ratio=0.5. A RUN is the folder that a run writes.
    """


@cli.command()
@click.argument("data", type=_PATH)
@_overrides
@click.option("--model", "-m", help="Hub id, local folder, GGUF file; a small one when not given.")
@click.option("--out", "-o", type=_FILE, help="Default: NAME.yaml for NAME.csv.")
@common
def init(data: Path, overrides: Sequence[str], model: str | None, out: Path | None, as_json: bool) -> None:
    """Write a starter recipe for a file of training rows.

    Task and columns are understood from the file; task.label=stars, for example, says what it does not tell. Files
    for validation and test that stand beside train.csv are taken along. No file is ever overwritten.
    """
    from . import starting
    from .screen import escape

    with _screen(as_json) as screen:
        made = starting.start(data, out, model, overrides)
        for note in made.notes:
            screen.note(note)
    use = f"trimtab run {shlex.quote(str(made.path))}"
    told = f"{made.path}: {made.told or made.task}, {made.rows} rows. Next: {use}"
    _show(as_json, made.to_json(), lambda: [escape(told)])


@cli.command()
@_recipe
@_overrides
@_overwrite
@_resume
@common
def run(recipe: str, overrides: Sequence[str], overwrite: bool, resume: bool, as_json: bool) -> None:
    """Select layers, train, export, evaluate and report."""
    from . import run as runs
    from .session import after_restart

    chosen, path = _load(recipe, overrides)
    overwrite, resume = after_restart(path, overwrite, resume)
    with _screen(as_json) as screen:
        folder = runs.run(chosen, path, screen, overwrite=overwrite, resume=resume)
    _show_run(folder, as_json)
    if reason := runs.unusable(folder):
        fail(reason, code=1)


@cli.command()
@_recipe
@_overrides
@click.option("--memory", is_flag=True, help="Forecast the memory of a training step, from shapes alone.")
@click.option("--measure", is_flag=True, help="Take a few steps here, and say how long the run will be.")
@click.option("--processes", type=click.IntRange(1), default=1, help="Forecast what each of so many holds and sends.")
@click.option("--strategy", type=click.Choice(["ddp", "fsdp2"]), default="ddp", show_default=True, help="Of these.")
@common
def plan(
    recipe: str,
    overrides: Sequence[str],
    memory: bool,
    measure: bool,
    processes: int,
    strategy: str,
    as_json: bool,
) -> None:
    """Say what a recipe will train, without weights.

    Sites, trainable parameters (start, end, average), optimizer memory and schedule, from the model's config
    alone: a 7B plan takes seconds on a laptop.
    """
    from . import planning
    from .tables import plan_tables

    chosen, _ = _load(recipe, overrides)
    with _screen(as_json) as screen:
        made = planning.plan_recipe(chosen, with_memory=memory, processes=processes, strategy=strategy)
        if measure:
            from . import measuring

            made = measuring.with_time(made, chosen, screen)
    _show(as_json, made.to_json(), lambda: plan_tables(made))


@cli.command()
@_recipe
@_overrides
@click.option("-n", "--rows", type=click.IntRange(1), default=2, show_default=True, help="Training rows to show.")
@common
def show(recipe: str, overrides: Sequence[str], rows: int, as_json: bool) -> None:
    """Show training rows as the model will read them.

    The text of their tokens, prompt template and all, with what is learned marked; for a classification, text and
    class. Reads the data and the tokenizer, no weights.
    """
    from . import showing

    chosen, _ = _load(recipe, overrides)
    with _screen(as_json) as screen:
        found, notes = showing.examples(chosen, rows)
        for note in notes:
            screen.note(note)
    if as_json:
        _print_json({"examples": [example.to_json() for example in found], "notes": notes})
        return
    is_coloured = sys.stdout.isatty()
    for example in found:
        _print(showing.shown(example, is_coloured), "")


@cli.command()
@_recipe
@_overrides
@_overwrite
@click.option("--methods", metavar="A,B,…", help="Compare the choices of several methods; nothing is written.")
@common
def select(recipe: str, overrides: Sequence[str], overwrite: bool, methods: str | None, as_json: bool) -> None:
    """Score the layers and choose among them."""
    from . import run as runs
    from .job import load
    from .screen import aside
    from .session import session
    from .tables import where_tables

    chosen, path = _load(recipe, overrides)
    if methods is not None:
        _compare_selections(chosen, methods, as_json)
        return
    if chosen.where is None:
        raise ConfigError("where", None, "the recipe adapts every layer; choose some, for example where.ratio=0.5")
    with _screen(as_json) as screen, session(chosen, path, overwrite=overwrite) as opened:
        job = load(chosen, screen)
        folder = opened.begin()
        where = runs.select(job, folder, screen, anew=overwrite)
    assert where is not None
    _show(as_json, where.to_json(), lambda: [*where_tables(where), aside(folder.where)])


def _compare_selections(chosen: Any, methods: str, as_json: bool) -> None:
    from .job import load
    from .recipe import where_by
    from .run import selections
    from .tables import selections_tables

    settings = {name.strip(): where_by(chosen.where, name.strip()) for name in methods.split(",")}
    with _screen(as_json) as screen:
        found = selections(load(chosen, screen), settings, screen)
    _show(as_json, {name: where.to_json() for name, where in found.items()}, lambda: selections_tables(found))


@cli.command()
@_recipe
@_overrides
@_overwrite
@_resume
@common
def train(recipe: str, overrides: Sequence[str], overwrite: bool, resume: bool, as_json: bool) -> None:
    """Select, train and export the adapter.

    A where.json that is already in the output folder, from `trimtab select`, is taken as it is.
    """
    from . import run as runs
    from .job import load, trained_on
    from .screen import aside
    from .session import after_restart, session
    from .tables import plan_tables

    chosen, path = _load(recipe, overrides)
    overwrite, resume = after_restart(path, overwrite, resume)
    with _screen(as_json) as screen, session(chosen, path, overwrite=overwrite, resume=resume) as opened:
        job = load(chosen, screen)
        folder = opened.begin(trained_on(job))
        where = runs.select(job, folder, screen, anew=overwrite)
        trained = runs.train(job, where, folder, screen, resume=resume)
        runs.export_run(job, trained, folder, screen)
        runs.warn(folder, screen)
    _show(as_json, trained.plan.to_json(), lambda: [*plan_tables(trained.plan), aside(folder.adapter)])
    if reason := runs.unusable(folder):
        fail(reason, code=1)


@cli.command("eval")
@_source
@_overrides
@click.option("--base", is_flag=True, help="Score the model without an adapter, before or after training: base.json.")
@click.option("--harness", help="Hand the adapter to lm-eval or lmms-eval instead.")
@click.option("--tasks", help="What the harness is to run, by its own names, with commas.")
@click.option("--harness-args", default="", help='More for the harness, for example "--limit 10".')
@common
def evaluate(
    source: str,
    overrides: Sequence[str],
    base: bool,
    harness: str | None,
    tasks: str | None,
    harness_args: str,
    as_json: bool,
) -> None:
    """Score a run's adapter on the labelled splits."""
    from . import run as runs
    from . import scoring
    from .job import load
    from .runfolder import RunFolder
    from .screen import aside
    from .session import at_work, check_base_matches
    from .trained import load_run, load_trained

    if harness or tasks or harness_args:
        _hand_over(source, overrides, harness, tasks, harness_args, base, as_json)
        return
    if base:
        chosen, path = _load(source, overrides)
        if path != Path(source):
            check_base_matches(chosen, RunFolder(path))
        with _screen(as_json) as screen, at_work(path):
            scored = scoring.evaluate_base(load(chosen, screen), RunFolder(path), screen)
            _renew_report(RunFolder(path), screen)
        _show(as_json, {"folder": str(path), **scored}, lambda: [aside(RunFolder(path).base)])
        return
    with _screen(as_json) as screen:
        recipe, folder = _trained(source, overrides)
        job = load_run(recipe, folder, screen)
        with at_work(folder.path):
            runs.evaluate(job, load_trained(job, folder, screen), folder, screen)
            _renew_report(folder, screen)
    _show_run(folder, as_json)


@cli.command()
@_source
@_overrides
@click.option(
    "--format", "form", type=click.Choice(["peft", "merged", "padded", "gguf"]), help="Default: the recipe's."
)
@click.option("--out", type=_PATH, help="Folder to write; default: RUN/adapter or RUN/FORMAT.")
@common
def export(source: str, overrides: Sequence[str], form: str | None, out: Path | None, as_json: bool) -> None:
    """Write a run's adapter: peft, padded, gguf or merged.

    peft: for stock PEFT. padded: one rank for all modules, for engines that know no rank patterns. gguf: one file
    for llama.cpp. merged: a stand-alone model.
    """
    from ..exporting.engines import read_by
    from . import loading, outputs
    from . import run as runs
    from .trained import load_run, load_trained

    with _screen(as_json) as screen:
        recipe, folder = _trained(source, overrides, needs_rows=False)
        chosen = form or recipe.export.format
        own = folder.adapter if chosen == "peft" else folder.path / chosen
        target = out or own
        if target.resolve() != own.resolve():
            known = partial(loading.is_export, run=folder, form=chosen)
            outputs.check_folder(target, known, f"{chosen} export of this run")
        job = load_run(recipe, folder, screen, with_rows=False)
        written = runs.export(job, load_trained(job, folder, screen), folder, target, chosen, screen)
        engines = read_by(written)
        for line in engines:
            screen.note(line)
    _show_path(as_json, written, format=chosen, engines=engines)


@cli.command()
@_source
@click.argument("file", type=_PATH)
@_overrides
@click.option("--out", type=_FILE, help="Write them here; default: stdout.")
@common
def predict(source: str, file: Path, overrides: Sequence[str], out: Path | None, as_json: bool) -> None:
    """Answer the rows of a file with a run's adapter.

    One JSON object a line: class and probabilities, a number, or the answer that is written. The file needs no labels,
    and the training rows are not read.
    """
    from . import outputs, predicting
    from .runfolder import is_main, write_text

    recipe, folder = _trained(source, overrides, needs_rows=False)
    if out is not None:
        outputs.check_file(out, outputs.is_predictions, "predictions of trimtab predict", but=[file])
    with _screen(as_json) as screen:
        found = predicting.predict(recipe, folder, file, screen)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    if out is not None and is_main():
        write_text(out, text)
    if as_json:
        _print_json({"path": str(out), "rows": len(found)} if out is not None else found)
    else:
        _echo(str(out) if out is not None else text, nl=out is not None)


@cli.command()
@_source
@_overrides
@common
def report(source: str, overrides: Sequence[str], as_json: bool) -> None:
    """Write report.html from what a run folder holds."""
    from . import report as reports
    from .runfolder import RunFolder

    folder = RunFolder(_run_path(source, overrides))
    path = reports.write(folder.path)
    if as_json:
        _print_json(reports.load(folder.path).to_json())
    else:
        _echo(str(path))


@cli.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option("--baseline", help="The row that the others are compared with: its name, or one of its run folders.")
@click.option("--out", type=_FILE, help="Also write the page to this HTML file.")
@common
def compare(runs: Sequence[str], baseline: str | None, out: Path | None, as_json: bool) -> None:
    """One table over runs: score, parameters, time.

    Runs that differ by seed alone are one row: mean ± standard error. Rows are compared in pairs, by seed and by
    scored row, and none is called best that leads by no more than chance.
    """
    from . import outputs
    from . import report as reports
    from .screen import aside, escape, table

    if out is not None:
        outputs.check_file(out, outputs.is_comparison, "page of trimtab compare")
    found = reports.compare(runs, out, baseline)
    legend = [f"[dim]{escape(found.legend)}[/]"] if found.legend else []
    parts = (*map(escape, (f"{found.finding}.", *found.notes)), *legend, *([aside(out)] if out else []))
    right = range(1, len(found.columns))
    _show(as_json, found.to_json(), lambda: [table(found.columns, found.cells, right=right), *parts])


@cli.command()
@_recipe
@click.argument("settings", nargs=-1, metavar="KEY=V1,V2,... [KEY=VALUE]...")
@click.option(
    "--jobs",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Trials at a time, one thread each when there are several.",
)
@click.option("--out", type=_FOLDER, help="Folder; default: the run's, with -tune.")
@click.option("--overwrite", is_flag=True, help="Forget the trials of an earlier search in the folder.")
@common
def tune(recipe: str, settings: Sequence[str], jobs: int, out: Path | None, overwrite: bool, as_json: bool) -> None:
    """Try combinations of settings; write the best as a recipe.

    Every combination is a trial, scored on a part of the training rows (data.held_out, a fifth unless set); validation
    and test are left alone. With several seeds the mean over them counts. The same command goes on with a search that
    was stopped. A value with commas stands in brackets or quotes: adapter.target_modules=[query,value],[query]
    """
    from . import about
    from . import recipe as recipes
    from . import tune as tuning
    from .runfolder import default_folder
    from .tables import tune_tables

    if about.processes() > 1:
        cure = "each trial is a process of its own, and --jobs says how many at a time; start it without torchrun"
        raise ConfigError("processes", about.processes(), cure)
    if out is None:
        folder = Path(recipe) if Path(recipe).is_dir() else default_folder(recipes.load(recipe), recipe)
        out = folder.with_name(f"{folder.name}-tune")
    with _screen(as_json) as screen:
        try:
            found = tuning.tune(recipe, settings, out, screen, jobs=jobs, overwrite=overwrite)
        except tuning.SearchError as error:
            fail(str(error), code=1)
    _show(as_json, found.to_json(), lambda: tune_tables(found))


@cli.command()
@click.argument("axis", required=False)
@common
def methods(axis: str | None, as_json: bool) -> None:
    """What there is on each axis: defaults, paper."""
    from .catalogue import catalogue
    from .tables import method_tables

    found = catalogue()
    axes = list(dict.fromkeys(entry.axis for entry in found))
    if axis is not None and axis not in axes:
        raise ConfigError("axis", axis, f"must be one of {', '.join(axes)}.{did_you_mean(axis, axes)}")
    found = [entry for entry in found if axis in (None, entry.axis)]
    _show(as_json, [entry.to_json() for entry in found], lambda: method_tables(found))


@cli.command()
@click.option("--out", type=_FILE, help="Write it here; default: stdout.")
@common
def schema(out: Path | None, as_json: bool) -> None:
    """Print the recipe's JSON schema, for editors.

    Write it once, and name it in the recipe's first line:

    \b
    trimtab schema --out recipe.schema.json
    # yaml-language-server: $schema=recipe.schema.json
    """
    from . import outputs
    from .runfolder import write_text
    from .schema import recipe_schema

    if out is None:
        _print_json(recipe_schema())
        return
    outputs.check_file(out, outputs.is_schema, "schema of trimtab schema")
    write_text(out, json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n")
    _show_path(as_json, out)


@cli.command()
@click.argument("what", type=click.Choice(["latency"]), metavar="latency")
@_recipe
@_overrides
@click.option(
    "--batch",
    "batches",
    type=click.IntRange(1),
    multiple=True,
    default=(1, 32),
    show_default=True,
    help="Rows in a pass; may be given several times.",
)
@click.option("--tokens", type=click.IntRange(1), default=128, show_default=True, help="Tokens in a row.")
@click.option("--rounds", type=click.IntRange(1), default=20, show_default=True, help="Timed passes of each model.")
@click.option("--device", help="cpu, cuda, …  Default: the accelerator if there is one.")
@common
def bench(
    what: str,
    recipe: str,
    overrides: Sequence[str],
    batches: Sequence[int],
    tokens: int,
    rounds: int,
    device: str | None,
    as_json: bool,
) -> None:
    """Time what adapters cost on your own model.

    latency: a forward pass of the recipe's model alone, with LoRA merged and unmerged, with a bottleneck adapter and
    with LLaMA-Adapter, in turns. Weights are random and nothing is downloaded but the model's config.
    """
    from . import latency
    from .tables import latency_tables

    chosen, _ = _load(recipe, overrides)
    with _screen(as_json) as screen, screen.stage("bench") as stage:
        bar = stage.bar((rounds + latency.WARMUP) * len(batches))
        found = latency.measure(
            chosen, batches=batches, tokens=tokens, rounds=rounds, device=device, on_round=bar.advance
        )
        stage.result = f"{found.model} · {found.device}"
    _show(as_json, found.to_json(), lambda: latency_tables(found))


@cli.command()
@click.option("--out", type=_FOLDER, default=Path("runs/demo"), show_default=True, help="Folder to write.")
@common
def demo(out: Path, as_json: bool) -> None:
    """The main job, offline, in a few minutes.

    Plain LoRA and CKA-selected LoRA on a small real encoder and real text, side by side.
    """
    from . import demo as demos

    with _screen(as_json) as screen:
        found = demos.main(out, screen)
    if as_json:
        _print_json(found)


def _hand_over(
    source: str, overrides: Sequence[str], name: str | None, tasks: str | None, more: str, base: bool, as_json: bool
) -> None:
    from . import harness

    if not name:
        raise ConfigError("harness", None, f"--tasks is for one of {', '.join(harness.HARNESSES)}")
    if not tasks:
        raise ConfigError("tasks", None, f"say what {name} is to run, for example --tasks gsm8k")
    harness.find(name)
    recipe, folder = _trained(source, overrides, needs_rows=False)
    with _screen(as_json) as screen:
        out = harness.evaluate(recipe, folder, name, tasks, more, screen, base)
    _show_path(as_json, out, harness=name)


# -- what the commands share ---------------------------------------------------------------------------


def _load(source: str, overrides: Sequence[str]) -> tuple[Recipe, Path]:
    """The recipe and its output folder; a run folder stands for the recipe in it, and for itself."""
    from . import recipe as recipes
    from .runfolder import default_folder

    chosen = recipes.load(source, overrides)
    if Path(source).is_dir() and not any(text.startswith("output_dir=") for text in overrides):
        return chosen, Path(source)
    return chosen, default_folder(chosen, source)


def _run_path(source: str, overrides: Sequence[str]) -> Path:
    if Path(source).is_dir():
        return Path(source)
    return _load(source, overrides)[1]


def _trained(source: str, overrides: Sequence[str], needs_rows: bool = True) -> tuple[Recipe, RunFolder]:
    """The recipe and the folder of a run. Overrides change what this command does, not the folder's recipe."""
    from . import recipe as recipes
    from .runfolder import RunFolder

    folder = RunFolder(_run_path(source, overrides))
    if not folder.path.is_dir():
        raise ConfigError("run folder", str(folder.path), f"no such folder. Run `trimtab train {source}` first.")
    folder.need(folder.recipe, "train")
    return recipes.load(folder.recipe, overrides, needs_rows=needs_rows), folder


@contextmanager
def _screen(as_json: bool) -> Iterator[Screen]:
    """The screen of one command, silent for machines; the libraries are hushed either way."""
    from .runfolder import is_main
    from .screen import Screen

    screen = Screen(quiet=as_json or not is_main())
    with screen.hush():
        yield screen


def _renew_report(folder: RunFolder, screen: Screen) -> None:
    """The page of a run that has one says what its files say now."""
    from .run import write_report

    if folder.report.is_file():
        write_report(folder, screen)


def _show_run(folder: RunFolder, as_json: bool) -> None:
    from .runfolder import is_main
    from .tables import run_tables

    if is_main():  # for others, the one that writes may not be done yet
        _show(as_json, {"folder": str(folder.path), **folder.read(folder.metrics)}, lambda: run_tables(folder))


def _show(as_json: bool, data: dict[str, Any] | Iterable[Any], parts: Callable[[], Iterable[Any]]) -> None:
    """A result as JSON, or as what people read, which is made only then."""
    if as_json:
        _print_json(data)
    else:
        _print(*parts())


def _show_path(as_json: bool, path: Path, **facts: Any) -> None:
    """Where the result was written, and for machines what else is known of it."""
    if as_json:
        _print_json({**facts, "path": str(path)})
    else:
        _echo(str(path))


def _print(*parts: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    from .runfolder import is_main

    console = Console(highlight=False, quiet=not is_main())
    if not console.is_terminal:  # a file or a pipe has no edge to wrap at
        console.width = 160
    for part in parts:  # a Text is to be copied as it is; a sentence wraps between words
        console.print(part, soft_wrap=isinstance(part, Text) or (isinstance(part, str) and not console.is_terminal))


def _print_json(data: dict[str, Any] | Iterable[Any]) -> None:
    _echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def _echo(text: str, nl: bool = True) -> None:
    """Of torchrun's processes the first one prints: rows that are answered would be there N times."""
    from .runfolder import is_main

    if is_main():
        click.echo(text, nl=nl)


def main() -> NoReturn:
    """Entry point of the `trimtab` command."""
    keep_freed_memory()
    if sys.argv[1:2] == ["plan"] and "--measure" not in sys.argv:  # nearly all of its time is imports
        # PEFT imports it wherever it is installed, more than a second's work; a plan looks at shapes alone.
        sys.modules.setdefault("bitsandbytes", None)  # type: ignore[arg-type]
        gc.disable()  # which looks through half a million new objects again and again, and none of them goes
    cli(prog_name="trimtab")
    raise AssertionError("click exits by itself")


if __name__ == "__main__":
    main()
