"""The evidence: every row of the matrix, tuned alike, on several tasks and seeds.

    python -m benchmarks.evidence --data DATA [--tasks sst2 stsb] [--rows lora-r8 …] [--workers 2]
    python -m benchmarks.evidence --list
    python -m benchmarks.evidence --page

A run that has its JSON file is not run again, so that the same command goes on with what is left, and more tasks, rows
or seeds may be asked for at any time. DATA holds a folder per task with train.jsonl and validation.jsonl.
``--page`` makes docs/evidence.md and its figures anew from the JSON files alone.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path

from . import RESULTS
from .matrix import ROWS, SEEDS, TASKS, Run, plan
from .results import chosen_rates, is_done
from .single import PRELOAD, in_own_process


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(arguments)
    if options.page:
        from . import chooser, page

        page.write(options.results)
        chooser.write(options.results)
    elif options.list:
        show(options)
    else:
        return go_on(options)
    return 0


def options_of(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with a folder per task")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--untuned", action="store_true", help="only what is run at a task's own rate, for all rows alike"
    )
    parser.add_argument("--workers", type=int, default=1, help="runs at a time, one thread each")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON files are")
    parser.add_argument("--list", action="store_true", help="what there is to run, and what is done")
    parser.add_argument("--page", action="store_true", help="write the page from the JSON files, run nothing")
    options = parser.parse_args(arguments)
    if options.data is None and not (options.list or options.page):
        parser.error("--data is needed: a folder that holds " + ", ".join(options.tasks))
    return options


def runs(options: argparse.Namespace) -> list[Run]:
    """Every run that can be named now; the rest follows when rates are chosen."""
    found = plan(options.tasks, options.rows, options.seeds, {} if options.untuned else chosen_rates(options.results))
    if options.untuned:
        found = (run for run in found if not run.tuning)
    return list(dict.fromkeys(found))


def show(options: argparse.Namespace) -> None:
    known = runs(options)
    for run in known:
        print(f"{'done' if is_done(run, options.results) else 'open'}  {run.file}")
    done = sum(is_done(run, options.results) for run in known)
    unknown = len(options.tasks) * len(options.rows) - len(
        {(run.task.name, run.row.name) for run in known if not run.tuning}
    )
    print(f"{done} of {len(known)} done; {unknown} rows wait for their rate, {len(options.seeds)} runs each")


def go_on(options: argparse.Namespace, work: Callable[[Run, Path, Path], None] = in_own_process) -> int:
    """Runs what is missing, in order; a run that failed is left, and its log kept beside the others' files.

    Args:
        work: what a process does with a run, DATA, and the file to write.
    """
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD if work is in_own_process else [])
    going: dict[int, tuple[Run, multiprocessing.process.BaseProcess, float]] = {}
    failed: list[Run] = []
    try:
        while True:
            busy = [run for run, _, _ in going.values()]
            left = [run for run in runs(options) if not is_done(run, options.results) and run not in busy + failed]
            if not left and not going:
                break
            for run in left[: max(0, options.workers - len(going))]:
                process = processes.Process(target=work, args=(run, options.data, options.results / run.file))
                process.start()
                going[process.sentinel] = run, process, time.monotonic()
            for sentinel in wait(list(going)):
                run, process, began = going.pop(sentinel)  # type: ignore[index]
                process.join()
                if not is_done(run, options.results):
                    failed.append(run)
                log = (options.results / run.file).with_suffix(".log")
                said = "done" if run not in failed else f"failed, see {log}"
                print(f"{run.file}: {said} ({time.monotonic() - began:.0f} s)", flush=True)
    finally:  # nobody would wait for them
        for _, process, _ in going.values():
            process.terminate()
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
