"""Run every row of a sweep over its seeds with `trimtab run`, then compare them in one table.

    python experiments/sweep.py experiments/cola_ranks.yaml --data DATA --out runs/cola_ranks

Rows that are finished are not run again, and a run that was cut off goes on from its last checkpoint, so the
command can be repeated until it is done. The table goes to experiments/results/NAME.md and .json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--out", type=Path, required=True, help="folder for the runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each")
    options = parser.parse_args()
    sweep = yaml.safe_load(options.sweep.read_text())
    recipe = options.sweep.parent / sweep["recipe"]
    jobs = []
    for name, overrides in sweep["rows"].items():
        for seed in sweep["seeds"]:
            folder = options.out / f"{name}-{seed}"
            data = [f"data.{split}={options.data / path}" for split, path in sweep["data"].items()]
            jobs.append((recipe, folder, [*data, *sweep.get("shared", []), *(overrides or []), f"seed={seed}"]))
    with ThreadPoolExecutor(options.jobs) as pool:
        codes = list(pool.map(lambda job: run(*job), jobs))
    if any(codes):
        return 1
    folders = [str(folder) for _, folder, _ in jobs]
    command = [sys.executable, "-m", "trimtab", "compare", *folders, "--json"]
    shown = subprocess.run(command, capture_output=True, text=True)
    if shown.returncode:
        print(shown.stderr, file=sys.stderr)
        return 1
    write(options.sweep, shown.stdout.replace(str(options.out), "RUNS"), folders)
    return 0


def run(recipe: Path, folder: Path, overrides: list[str]) -> int:
    """One run, from where it stands; 0 if it is finished."""
    if (folder / "metrics.json").exists():
        return 0
    flags = ["--resume"] if list(folder.glob("checkpoints/checkpoint-*/trainer_state.json")) else ["--overwrite"]
    trimtab = [sys.executable, "-m", "trimtab"]
    command = [*trimtab, "run", str(recipe), *overrides, f"output_dir={folder}", *flags, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    print(f"{folder.name}: {'done' if done.returncode == 0 else done.stderr.strip()[-300:]}", flush=True)
    return done.returncode


def write(sweep: Path, table: str, folders: list[str]) -> None:
    from trimtab.app.report import compare

    results = sweep.parent / "results"
    results.mkdir(exist_ok=True)
    command = f"python experiments/sweep.py experiments/{sweep.name} --data DATA --out RUNS"
    text = f"# {sweep.stem}\n\n`{command}`\n\n{compare(folders).as_markdown()}\n"
    (results / f"{sweep.stem}.md").write_text(text)
    (results / f"{sweep.stem}.json").write_text(json.dumps(json.loads(table), indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
