"""A YAML recipe plus `key=value` overrides -> a validated `Recipe`.

Keys are checked before anything heavy is imported, those of `TrainingArguments` and of PEFT's configs too.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_serializer, model_validator

from ..errors import ConfigError, RecipeError, did_you_mean
from ..train.rates import check_rates
from ..where import METHODS
from ..where import check_name as check_method
from . import foreign, trainer_settings
from .adapter_kinds import ADAPTERS, check_adapter
from .lookup import (
    ELSEWHERE,
    dataclass_fields,
    find_file,
    find_model,
    find_rows,
    parse_yaml,
    refuse_if_elsewhere,
    unknown_key,
)


class Section(BaseModel):
    """One block of the recipe. A bare word stands for its main key: ``rank: adalora``."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), use_attribute_docstrings=True)
    main_key: ClassVar[str] = ""

    @model_validator(mode="before")
    @classmethod
    def _bare_word(cls, value: Any) -> Any:
        return {cls.main_key: value} if cls.main_key and isinstance(value, str) else value

    @property
    def options(self) -> dict[str, Any]:
        """The keys this section passes on to whoever it names (a task, a method, a PEFT config)."""
        return dict(self.model_extra or {})


class Model(Section):
    main_key: ClassVar[str] = "name_or_path"
    name_or_path: str | None = None
    """Hub id, local folder, GGUF file, or ``package:NAME/FOLDER`` (a folder inside an installed package)."""
    gguf_file: str | None = None
    """The file within that repository or folder, where it holds several."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the base; when not given the checkpoint's own, float32 for float16. Adapters train in float32 all the same."""
    tokenizer: str | None = None
    """Where it is, if not beside the model."""
    config: dict[str, Any] | str | None = None
    """With a ``model_type``, inline or as a JSON file: a whole config, enough for `plan`. Without one:
    overrides of the checkpoint's config (``{attention_dropout: 0}``)."""
    quantization: dict[str, Any] | None = None
    """Arguments of transformers' `BitsAndBytesConfig` (``{load_in_4bit: true}``)."""
    trust_remote_code: bool = False
    """Run the Python that the model's repository or folder brings; read it first. Otherwise such a model is refused."""


class Task(Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    main_key: ClassVar[str] = "name"
    name: str
    """One of ours, one that an installed package announces, or your own ``module:callable``; other keys are its
    settings."""


Paths = str | list[str]


class Data(Section):
    """One's own rows, by split: files, folders or patterns; or a dataset of the hub."""

    train: Paths | None = None
    """Rows to learn from: a file, a folder, a pattern, or a list of them."""
    validation: Paths | None = None
    """Rows to score while training; split off the training rows when not given."""
    test: Paths | None = None
    """Rows to score at the end."""
    validation_matched: Paths | None = None
    """MNLI's."""
    validation_mismatched: Paths | None = None
    """MNLI's."""
    test_matched: Paths | None = None
    """MNLI's."""
    test_mismatched: Paths | None = None
    """MNLI's."""
    max_samples: int | dict[str, int] | None = None
    """Rows kept, in all splits or by split; for trials."""
    sample_seed: int | Literal["first"] | None = None
    """Draws those rows; 0 when not given. ``first`` keeps the first ones."""
    validation_share: float | int | None = None
    """Share (or number) of the training rows split off where no rows are given for validation; 0.1 when not given."""
    stratify: bool | str | None = None
    """Whether each class has its share there (it has, unless false); or the column whose values have."""
    separator: str | None = None
    """Of columns: one character, or comma, semicolon, tab, pipe; found out when not given."""
    encoding: str | None = None
    """Of text files, where they are neither UTF-8 nor begin with a byte order mark."""
    quotes: bool | None = None
    """Whether quotes around a cell are undone; found out when not given."""
    missing: list[str] | str | None = None
    """Words that stand for no value, in place of pandas' (NA, nan, null, None, …); blanks always do."""
    hub: str | None = None
    """A dataset by its name on the hub, or a folder that `datasets` reads."""
    config: str | None = None
    """Which of that dataset's configurations."""
    split: str | dict[str, str] | None = None
    """That dataset's name of the training split, or of each of ours."""
    held_out: float | int | None = None
    """A share of the training rows (0.2), or a number of them, scored in place of validation and test: for choices
    that those may not see. `trimtab tune` sets it."""
    held_out_seed: Annotated[int, Field(ge=0)] | None = None
    """Draws them; 0 when not given. Not the run's seed, so that runs over several seeds are scored on the same rows."""

    @field_validator("held_out")
    @classmethod
    def _share_or_rows(cls, value: float | int | None) -> float | int | None:
        if value is not None and not (0 < value < 1 or (value >= 1 and isinstance(value, int))):
            raise ValueError("a share of the training rows (0.2), or a number of them (200)")
        return value

    @field_validator("missing", mode="before")
    @classmethod
    def _words(cls, missing: Any) -> Any:  # an unquoted -1 reaches us as a number
        words = missing if isinstance(missing, list) else [missing]
        words = [str(word) if isinstance(word, int) and not isinstance(word, bool) else word for word in words]
        return words if isinstance(missing, list) else words[0]

    @property
    def to_load(self) -> dict[str, Any] | None:
        """What a task's `load_data` takes."""
        return self.model_dump(exclude_none=True, exclude={"held_out", "held_out_seed"}) or None

    @property
    def has_own(self) -> bool:
        """Whether training rows come from the user's own files or dataset."""
        return self.train is not None or self.hub is not None


FILES = (
    "train",
    "validation",
    "test",
    "validation_matched",
    "validation_mismatched",
    "test_matched",
    "test_mismatched",
)


class Adapter(Section):
    """What is trained. Other keys are fields of the PEFT config of that type, by their own names."""

    model_config = ConfigDict(extra="allow", frozen=True)
    main_key: ClassVar[str] = "type"
    type: str = "lora"
    """``lora``, ``vera``, ``bottleneck`` or ``adaption_prompt``."""
    r: int = Field(8, ge=1)
    """Rank at the start."""
    alpha: float | None = Field(None, gt=0)
    """Scale numerator, PEFT's ``lora_alpha``; 2 r when not given."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Before the projections, as in PEFT."""
    target_modules: list[str] | str | None = None
    """Names or a regex as in PEFT, or ``all-linear``; PEFT's choice for the model when not given."""
    init: bool | str = True
    """PEFT's ``init_lora_weights``: true, gaussian, pissa, olora …"""
    modules_to_save: list[str] | None = None
    """Modules that train whole and are saved beside the adapter; a new head is one of them without being named."""

    @model_serializer(mode="wrap")
    def _only_keys_of_the_type(self, write: Any) -> dict[str, Any]:
        known = {"type", *ADAPTERS[self.type][2]} if self.type in ADAPTERS else set(Adapter.model_fields)
        return {key: value for key, value in write(self).items() if key in known or key not in Adapter.model_fields}


class Where(Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    main_key: ClassVar[str] = "method"
    method: str = "cka"
    """One that `trimtab methods where` lists, or your own ``module:function``; other keys are its settings."""
    ratio: float | None = Field(None, gt=0, le=1)
    """Share of the layers to adapt."""
    count: int | None = Field(None, ge=1)
    """Number of them, in place of ``ratio``."""
    mask: str | dict[str, str] | None = None
    """For ``mask``: one 0/1 character a layer, in quotes; one string for each stack of an encoder-decoder."""
    samples: Annotated[int, Field(ge=2)] | Literal["all"] = 1024
    """Training rows that the layers are compared on."""
    estimator: Literal["biased", "unbiased"] = "biased"
    """Of CKA: the published one, or the one without its bias at few rows."""
    pool: Literal["auto", "cls", "last", "mean"] = "auto"
    """The vector of a row: first token, last token, or mean; auto goes by the model."""
    batch_size: int = Field(32, ge=1)
    """Rows of a forward pass."""
    exclude: Literal["auto"] | list[int] | dict[str, list[int]] = "auto"
    """Layers never chosen; auto leaves out layer 0 where every row's first token is the same."""
    degenerate: Literal["exclude", "include"] = "exclude"
    """Layers whose similarity says nothing, since one row outweighs the rest."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Draws the layers of ``random`` (the run's when not given), or which rows are read (the first when not given)."""

    @field_validator("mask", mode="before")
    @classmethod
    def _mask_text(cls, mask: Any) -> Any:  # an unquoted 1100 reaches us as a number
        if isinstance(mask, dict):
            return {stack: cls._mask_text(text) for stack, text in mask.items()}
        return str(mask) if isinstance(mask, int) and not isinstance(mask, bool) else mask


class Rank(Section):
    model_config = ConfigDict(extra="allow", frozen=True)
    main_key: ClassVar[str] = "method"
    method: str
    """One that `trimtab methods` lists, or your own ``module:SettingsClass``; other keys are its settings."""


class Freeze(Rank):
    pass


class BudgetLimits(Section):
    final_params: int | None = Field(None, ge=1)
    """What the adapter may hold at the end."""
    average_params: int | None = Field(None, ge=1)
    """What may train in the mean over the steps."""


class EarlyStopping(Section):
    """Ends training when the watched score no longer gets better (transformers' `EarlyStoppingCallback`)."""

    patience: int = Field(1, ge=1)
    """Evaluations in a row without a better score."""
    threshold: float = Field(0.0, ge=0)
    """By how much a score must be better to count."""

    @model_validator(mode="before")
    @classmethod
    def _bare_number(cls, value: Any) -> Any:
        return {"patience": value} if isinstance(value, int) and not isinstance(value, bool) else value


class Export(Section):
    main_key: ClassVar[str] = "format"
    format: Literal["peft", "merged", "padded", "gguf"] = "peft"
    """A rank for each module; beside it a stand-alone model, or one file for llama.cpp; or one rank for all."""
    base_model: str | None = None
    """Hub id of the base model, for others to find it, where ``model.name_or_path`` is a folder."""


class Recipe(Section):
    """A whole run. See the fields of each section for what its keys mean."""

    model: Model
    """What is adapted."""
    task: Task | None = None
    """What it learns, and how that is scored."""
    data: Data = Data()
    """The rows, where they are not the task's own."""
    adapter: Adapter = Field(default_factory=lambda: Adapter.model_validate({}))
    """What is trained."""
    where: Where | None = None
    """Which layers."""
    rank: Rank | None = None
    """How much each."""
    freeze: Freeze | None = None
    """Until when."""
    budget: BudgetLimits | None = None
    """One limit over ranks and freezing."""
    train: dict[str, Any] = {}
    """Fields of `transformers.TrainingArguments`, by their own names."""
    early_stopping: EarlyStopping | None = None
    """When to end before the last epoch."""
    rates: dict[str, Any] | None = None
    """Multiples of ``train.learning_rate`` by role: A, B, vectors, head."""
    base_rows: Annotated[int, Field(ge=0)] | Literal["all"] = 32
    """Rows that the model also answers without its adapter, to be read beside the score; 0 for none. Scores that need
    no written answers are always of all rows."""
    export: Export = Export()
    """What is left at the end."""
    output_dir: str | None = None
    """Folder of the run; ``runs/NAME`` for ``NAME.yaml`` when not given."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the head's weights, the adapter's, and the order of rows."""

    def to_yaml(self) -> str:
        """The recipe with nothing left out that was set, defaults included for what this version knows."""
        return yaml.safe_dump(self.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)

    def to_file(self) -> str:
        """The text of a run's own recipe.yaml, which shows where it was cut."""
        body = self.to_yaml()
        return f"{MARK}{_ENDS}{body}... # {_digest(body)}\n"

    def require_task(self) -> Task:
        if self.task is None:
            raise ConfigError("task.name", None, "needed here: glue/mrpc, text_classification, …")
        return self.task


# A run's own recipe.yaml begins so. One of an earlier version has the first line alone.
MARK = "# Written by Trimtab: the recipe of this run, with every default filled in.\n"
_ENDS = "# It ends with three dots; without them it was cut.\n"


def load(source: str | Path | Mapping[str, Any], overrides: Iterable[str] = (), *, needs_rows: bool = True) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a YAML file, or the recipe as a dict.
        overrides: ``dotted.key=value`` texts; the value is read as YAML.
        needs_rows: whether the files in ``data`` must be there.
    Raises:
        ConfigError: a file, key or value is wrong; the message names it and what would work.

    >>> load({"model": "some/model"}, ["adapter.r=4", "train.learning_rate=1e-3"]).train
    {'learning_rate': 0.001}
    """
    if isinstance(source, Mapping):
        data, folder = _copy(source), None
    else:
        data, folder = _read_yaml(Path(source)), Path(source).resolve().parent
    override(data, overrides)
    if strange := list(_strange_keys(data)):
        raise strange[0] if len(strange) == 1 else RecipeError(strange)
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise _first_problem(error) from None
    check_adapter(recipe.adapter)
    _check_where(recipe.where)
    train = {key: trainer_settings.check(key, value) for key, value in recipe.train.items()}
    for key in recipe.train:
        refuse_if_elsewhere("train", key, recipe.train[key])
    rates = None if recipe.rates is None else check_rates(recipe.rates)
    return recipe.model_copy(update={"train": train, "rates": rates, **_resolve_paths(recipe, folder, needs_rows)})


def _read_yaml(path: Path) -> dict[str, Any]:
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        folder = path.parent if path.parent.is_dir() else Path()
        near = did_you_mean(path.name, [p.name for p in folder.glob("*.y*ml")])
        raise ConfigError("recipe", str(path), f"no such file.{near}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ConfigError("recipe", str(path), "must be a text file in UTF-8") from None
    if text.startswith(MARK + _ENDS) and not text.rstrip().rpartition("\n")[2].startswith("..."):
        raise ConfigError("recipe", str(path), "damaged: it ends before its last line, three dots; put a copy there")
    data = parse_yaml(text, f"recipe {path.name}")
    if not isinstance(data, dict):
        raise ConfigError("recipe", str(path), "must hold keys and values: model, task, adapter, …")
    return data


def is_as_written(text: str) -> bool:
    """Whether a run's own recipe.yaml is the one that the run wrote; True for one of an earlier version."""
    body, _, digest = text.removeprefix(MARK + _ENDS).rpartition("... # ")
    return not text.startswith(MARK + _ENDS) or digest.strip() == _digest(body)


def _digest(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def override(data: dict[str, Any], texts: Iterable[str]) -> None:
    """Put ``dotted.key=value`` texts in. A section comes before what is below it: ``freeze.final=0.5 freeze=aflora``
    says as much as the other way around."""
    for text in sorted(texts, key=lambda text: text.partition("=")[0].count(".")):
        _override(data, text)


def _override(data: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    key = key.strip()
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise ConfigError("override", text, "must read key=value, for example where.ratio=0.5")
    for name in parents:
        below = data.get(name)
        if isinstance(below, str) and name in Recipe.model_fields:  # `rank: adalora`, then rank.target_r=4
            below = {main_key(name): below}
        if below is None:
            below = {}
        if not isinstance(below, dict):
            raise ConfigError(key, value, f"{name!r} holds {below!r}, so nothing can stand below it")
        data[name] = below
        data = below
    data[last] = parse_yaml(value, key)


def main_key(section: str) -> str:
    return _section_class(section).main_key


def _section_class(section: str) -> type[Section]:
    annotation = Recipe.model_fields[section].annotation
    for choice in (annotation, *getattr(annotation, "__args__", ())):
        # Python 3.10 takes dict[str, Any] for a type, which issubclass then refuses
        if isinstance(choice, type) and not get_args(choice) and issubclass(choice, Section):
            return choice
    return Section


_DTYPES = {"fp16": "float16", "half": "float16", "bf16": "bfloat16", "fp32": "float32", "float": "float32"}


def _first_problem(error: ValidationError) -> ConfigError:
    """pydantic's first complaint as one line with the dotted key, the value, and what would work."""
    problems = error.errors()
    first = problems[0]
    key, value, kind = _key(first["loc"]), first["input"], first["type"]
    section = key.rpartition(".")[0]
    if kind == "missing":
        return ConfigError(key, None, f"missing; {section or 'every recipe'} needs it")
    if kind == "model_type":
        return ConfigError(key, value, "must hold keys and values")
    if kind == "literal_error" and len(problems) == 1:
        choices = re.findall(r"'([^']*)'", first["ctx"]["expected"])
        near = did_you_mean(_DTYPES.get(str(value), str(value)), choices)
        return ConfigError(key, value, f"must be one of {', '.join(choices)}.{near}")
    if key == "where.ratio":
        return ConfigError(key, value, "must be above 0 and at most 1 (0.5 adapts half of the layers)")
    wanted = dict.fromkeys(_wanted(p["msg"]) for p in problems if _key(p["loc"]) == key)
    return ConfigError(key, value, f"must be {' or '.join(wanted)}")


def _wanted(message: str) -> str:
    message = message.removeprefix("Input should be ").removeprefix("Value error, ")
    message = message.partition(", unable to parse")[0].replace("greater than or equal to", "at least")
    message = message.replace("a valid dictionary", "keys and values").replace("a valid ", "a ")
    return message.replace("a integer", "an integer")


def _key(place: tuple[int | str, ...]) -> str:
    """The dotted key of a pydantic location, without the type names that it appends for a union."""
    if len(place) < 2 or place[0] not in Recipe.model_fields or _section_class(str(place[0])) is Section:
        return str(place[0])
    return f"{place[0]}.{place[1]}"


def _strange_keys(data: Mapping[str, Any]) -> Iterator[ConfigError]:
    """Keys that nobody knows, wherever they stand, each with the one that may have been meant."""
    for key, value in data.items():
        if key not in Recipe.model_fields:
            yield _strange(str(key), value, Recipe.model_fields)
        elif isinstance(value, Mapping) and (known := _known_in(key, value)):
            yield from (_strange(f"{key}.{name}", below, known) for name, below in value.items() if name not in known)


def _known_in(section: str, settings: Mapping[str, Any]) -> Collection[str]:
    """The keys of a section; none where they are others' to know: a task's, a method's, those of a strange adapter."""
    if section == "train":
        return trainer_settings.fields()
    if section == "adapter":
        kind = settings.get("type", Adapter.model_fields["type"].default)
        if not isinstance(kind, str) or kind not in ADAPTERS:
            return ()
        module, name, words = ADAPTERS[kind]
        return {"type", *words, *dataclass_fields(module, name), *Adapter.model_fields, *ELSEWHERE["adapter"]}
    made = _section_class(section)
    return made.model_fields if made.model_config.get("extra") == "forbid" else ()


def _strange(key: str, value: Any, known: Iterable[str]) -> ConfigError:
    name = key.rpartition(".")[2]
    every = every_key()
    if told := foreign.ours(key, every):
        return ConfigError(key, value, f"no such key; {told}" if told.startswith("leave") else f"no such key. {told}")
    below = [place for place in every if place.rpartition(".")[2] == name] if "." not in key else []
    return unknown_key(key, value, [*known, *below])


@cache
def every_key() -> frozenset[str]:
    """Every key that a recipe has under any adapter, dotted; without the settings of tasks and methods."""
    sections = {section: _section_class(section).model_fields for section in Recipe.model_fields}
    below = {f"{section}.{name}" for section, names in sections.items() for name in names}
    train = {f"train.{name}" for name in trainer_settings.fields() if name not in ELSEWHERE["train"]}
    adapter = {f"adapter.{name}" for name in dataclass_fields(*ADAPTERS["lora"][:2])}
    return frozenset(
        {*Recipe.model_fields, *below, *train, *adapter, "task.max_length", "task.text", "task.label", "task.labels"}
    )


def where_by(where: Where | None, method: str) -> Where:
    """The section with another method in it, and of its settings those that this method reads.

    Raises:
        ConfigError: no such method, or one that cannot do with those settings.
    """
    kept = where.model_dump(exclude_unset=True) if where is not None else {}
    known = METHODS[method].settings if method in METHODS else tuple(Where.model_fields)
    found = Where(**{key: value for key, value in kept.items() if key in known} | {"method": method})
    _check_where(found)
    return found


def _check_where(where: Where | None) -> None:
    if where is None:
        return
    check_method(where.method)
    if where.method in METHODS:
        for key, value in where.options.items():
            raise _strange(f"where.{key}", value, Where.model_fields)
        for key, field in Where.model_fields.items() if METHODS[where.method].target else ():
            if key not in ("method", "seed", *METHODS[where.method].settings) and getattr(where, key) != field.default:
                takes = ", ".join(METHODS[where.method].settings)
                raise ConfigError(f"where.{key}", getattr(where, key), f"{where.method} takes {takes}")
    sizes = {key: getattr(where, key) for key in ("ratio", "count") if getattr(where, key) is not None}
    if where.method == "mask":
        if where.mask is None:
            raise ConfigError("where.mask", None, "where.method=mask needs one 0/1 character per layer")
        for key, value in sizes.items():
            raise ConfigError(f"where.{key}", value, "a mask already says which layers; drop one of them")
    elif where.mask is not None:
        raise ConfigError("where.mask", where.mask, f"{where.method} makes its own; use where.method=mask")
    elif len(sizes) > 1:
        raise ConfigError("where.count", where.count, f"where.ratio={where.ratio} is set too; keep one of them")


def _resolve_paths(recipe: Recipe, folder: Path | None, needs_rows: bool) -> dict[str, Any]:
    """Relative paths in `data` and `model.config`, taken from the current directory, then from the
    recipe's own folder; absolute afterwards, so that the run folder's recipe works from anywhere."""
    found: dict[str, Any] = {}
    for split in FILES if needs_rows else ():
        paths = getattr(recipe.data, split)
        if not paths:
            continue
        places = [find_rows(f"data.{split}", path, folder) for path in ([paths] if isinstance(paths, str) else paths)]
        found[split] = places[0] if isinstance(paths, str) else places
    if recipe.data.hub is not None:
        place = next((p for base in (Path(), folder or Path()) if (p := base / recipe.data.hub).is_dir()), None)
        if place is not None:
            found["hub"] = str(place.resolve())
    model = recipe.model
    changed: dict[str, Any] = {}
    if isinstance(model.config, str):
        changed["config"] = find_file("model.config", model.config, folder)
    if model.name_or_path is not None:
        changed["name_or_path"] = find_model(model.name_or_path, folder)
    if not (model.name_or_path or model.config):
        raise ConfigError("model.name_or_path", None, "needed: a hub id, a local folder or a GGUF file")
    return {"data": recipe.data.model_copy(update=found), "model": model.model_copy(update=changed)}


def _copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _copy(v) for k, v in value.items()}
    return [_copy(v) for v in value] if isinstance(value, (list, tuple)) else value
