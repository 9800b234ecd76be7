"""Evaluation by others' harnesses: the command that hands them a run's adapter.

lm-eval takes the base and the adapter beside it. lmms-eval has no place for an adapter, and neither harness
opens a base that lies in a GGUF file as we do: they get the merged model, which is the same function.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError, TrimtabError, did_you_mean

if TYPE_CHECKING:
    from .recipe import Recipe
    from .runfolder import RunFolder
    from .screen import Screen


@dataclass(frozen=True)
class Harness:
    """How one program is called."""

    module: str
    model: str
    takes_adapters: bool
    install: str


HARNESSES = {
    "lm-eval": Harness("lm_eval", "hf", True, "pip install 'lm-eval[hf]'"),
    "lmms-eval": Harness("lmms_eval", "llava_hf", False, "pip install lmms-eval"),
}


def find(name: str) -> Harness:
    """The harness of this name, if it is installed.

    Raises:
        ConfigError: it is unknown, or not installed.
    """
    if name not in HARNESSES:
        raise ConfigError("harness", name, f"one of {', '.join(HARNESSES)}.{did_you_mean(name, HARNESSES)}")
    harness = HARNESSES[name]
    if importlib.util.find_spec(harness.module) is None:
        raise ConfigError("harness", name, f"is not installed: {harness.install}")
    return harness


def command(
    harness: Harness,
    model: str,
    adapter: Path | None,
    tokenizer: Path,
    tasks: str,
    out: Path,
    dtype: str | None = None,
    more: str = "",
) -> list[str]:
    """The command line that evaluates.

    Args:
        model: hub id or folder of the base, or of the merged model.
        adapter: beside the base; None for a merged model.
        tokenizer: folder of it, with the chat template the adapter was trained with.
        tasks: names as the harness knows them, with commas.
        out: folder for its results.
        more: further arguments, as one would type them (``--limit 10 --num_fewshot 5``).
    Raises:
        ConfigError: a path that the harness would cut in two, or a quotation without an end.
    """
    settings = {"pretrained": model, "peft": adapter, "tokenizer": tokenizer if adapter else None, "dtype": dtype}
    for key, value in settings.items():
        if "," in str(value):
            raise ConfigError(key, str(value), f"{harness.module} splits its settings at commas; rename the folder")
    try:
        further = shlex.split(more)
    except ValueError as error:
        raise ConfigError("harness-args", more, f"cannot be split into arguments: {error}") from None
    joined = ",".join(f"{key}={value}" for key, value in settings.items() if value is not None)
    return [
        sys.executable,
        "-m",
        harness.module,
        "--model",
        harness.model,
        "--model_args",
        joined,
        "--tasks",
        tasks,
        "--output_path",
        str(out),
        *further,
    ]


def evaluate(
    recipe: Recipe, folder: RunFolder, name: str, tasks: str, more: str, screen: Screen, base: bool = False
) -> Path:
    """Hands a run's adapter (or its base model) to a harness; its results go to ``harness/NAME`` in the run folder.

    Raises:
        ConfigError: the harness is unknown or not installed, the run's model writes no text, or its adapter has no
            form that the harness reads.
        TrimtabError: the harness ended with an error.
    """
    from .peft_config import NOT_STOCK_PEFT, WITHOUT_LORA_FORM
    from .planning import model_spec
    from .run import export
    from .tasks import get_task
    from .trained import load_run, load_trained, trained_adapter

    harness = find(name)
    task = get_task(recipe.require_task().model_dump())
    if task.task_type not in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        raise ConfigError("harness", name, f"asks for text, and {task.name} trains no model that writes; leave it out")
    spec = model_spec(recipe)
    source = str(spec.name_or_path)
    is_plain = not source.endswith(".gguf") and spec.gguf_file is None and spec.quantization is None
    model, adapter, tokenizer = source, None, Path(source)
    if base:
        if not is_plain:
            raise ConfigError("base", True, "a harness opens a GGUF or quantised base in its own way; call it yourself")
    elif is_plain and harness.takes_adapters and recipe.adapter.type not in NOT_STOCK_PEFT:
        adapter = tokenizer = trained_adapter(folder)
    elif recipe.adapter.type in WITHOUT_LORA_FORM:
        raise ConfigError(
            "adapter.type",
            recipe.adapter.type,
            f"has no merged form, and {name} cannot read this one; `trimtab eval` scores it",
        )
    else:
        if not _is_current(folder.merged, trained_adapter(folder)):
            job = load_run(recipe, folder, screen, with_rows=False)
            export(job, load_trained(job, folder, screen), folder, folder.merged, "merged", screen)
        model = str(folder.merged)
    out = folder.path / "harness" / (f"{name}-base" if base else name)
    run(command(harness, model, adapter, tokenizer, tasks, out, spec.dtype, more))
    return out


def _is_current(merged: Path, adapter: Path) -> bool:
    """Whether a merged model is complete, and not from before the training went on."""
    last = merged / "tokenizer_config.json"  # is written last
    changed = max(file.stat().st_mtime_ns for file in (adapter, *adapter.iterdir()))
    return last.is_file() and last.stat().st_mtime_ns >= changed


def run(arguments: Sequence[str]) -> None:
    """Runs it, with its output on this screen: on stderr, since stdout is for the result.

    Raises:
        TrimtabError: it ended with an error; its own words stand above.
    """
    code = subprocess.run(list(arguments), stdout=2).returncode
    if code:
        raise TrimtabError(f"{shlex.join(arguments)} ended with code {code}")
