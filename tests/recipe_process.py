"""Recipes that several processes run: ``torchrun --nproc-per-node 2 recipe_process.py FOLDER``."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.app import recipe as recipes
from trimtab.app import run as runs
from trimtab.app import session
from trimtab.app.screen import Screen


def main(folder: Path) -> None:
    """Every ``NAME.json`` there -> the run ``NAME``; what each process chose of the layers -> ``where-RANK.json``."""
    rank, chosen, selects_alike = os.environ["RANK"], {}, session._selects_alike

    def slowly(*args: Any) -> bool:  # the main process looks at what an earlier command left when others are past it
        time.sleep(1)
        return selects_alike(*args)

    session._selects_alike = slowly
    select = runs.select

    def kept(job: Any, out: Any, *args: Any, **more: Any) -> Any:
        where = select(job, out, *args, **more)
        chosen[job.recipe.output_dir] = None if where is None else where.mask
        return where

    runs.select = kept
    for file in sorted(folder.glob("*.json")):
        recipe = recipes.load(file)
        runs.run(recipe, Path(str(recipe.output_dir)), Screen(quiet=True))
    (folder / f"where-{rank}.txt").write_text(json.dumps(chosen))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
