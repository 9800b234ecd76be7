"""Models and tokenizers from a hub id, a local folder, a GGUF file, or a bare config.

Nothing here knows a task or a model by name: what the head needs comes from the task, and what is new
(and must be saved with the adapter) from what the checkpoint lacked.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, ModelError, TrimtabError, did_you_mean
from .hub import offline_without_hub

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from .tasks import Task

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The recipe's ``model:``."""

    name_or_path: str | None = None
    """Hub id, local folder, or path of a ``*.gguf`` file."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the hub repository or folder `name_or_path`."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    dtype: str | None = None
    """``float32``, ``bfloat16``, ``float16``; else the checkpoint's own, where float16 becomes float32."""
    tokenizer: str | None = None
    """Hub id or folder, when the tokenizer is not with the model."""
    config: dict[str, Any] | str | None = None
    """With a ``model_type`` (inline, or the path of a JSON file): a whole config, enough for `plan`, so that
    nothing is fetched. Without one: overrides of the checkpoint's config (``{attention_dropout: 0}``)."""
    quantization: dict[str, Any] | None = None
    """Arguments of transformers' `BitsAndBytesConfig` (``{load_in_4bit: true}``)."""
    trust_remote_code: bool = False
    """Whether Python that the repository or folder brings is run; transformers would ask on the terminal."""

    def __post_init__(self) -> None:
        if self.name_or_path is None and self.config is None:
            raise ConfigError(
                "model.name_or_path",
                None,
                "give a hub id, a folder or a *.gguf file (or model.config, enough for plan)",
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(
                "model.dtype",
                self.dtype,
                f"one of {', '.join(DTYPES)}, or leave it out.{did_you_mean(str(self.dtype), DTYPES)}",
            )


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be adapted."""

    model: PreTrainedModel
    modules_to_save: tuple[str, ...] = ()
    """Modules whose weights the checkpoint lacked; a reloaded adapter is wrong without them."""
    notes: tuple[str, ...] = ()
    """One-line remarks for the user."""
    has_other_head: bool = False
    """Whether the checkpoint has weights of another shape in their place, as a head for other classes."""


def load_config(spec: ModelSpec, task: Task | None = None) -> PretrainedConfig:
    """The model's config, with the task's labels in it; no weights are read.

    Raises:
        ModelError: when it cannot be found or read.
        ConfigError: for an inline config with an unknown type or key.
    """
    from transformers import AutoConfig

    labels = task.model_kwargs() if task is not None else {}
    whole, overrides = _inline(spec)
    if whole is not None:
        config = _config_of(whole, spec.config, labels)
    else:
        source, kwargs = source_of(spec)
        with _one_line(spec):
            if Path(source).is_dir() and "gguf_file" in kwargs:
                file = Path(source) / kwargs["gguf_file"]
                config = copy.deepcopy(_gguf_config(str(file), file.stat().st_mtime_ns))
                config.update({**overrides, **labels})
            else:
                if overrides:
                    _refuse_unknown(overrides, AutoConfig.from_pretrained(source, **kwargs))
                config = AutoConfig.from_pretrained(source, **kwargs, **{**overrides, **labels})
    if task is not None and _fits_several_kinds(task):
        task.adjust_to(config)
    return config


@lru_cache(maxsize=8)
def _gguf_config(file: str, changed: int) -> PretrainedConfig:
    """The config in a GGUF file; kept, since transformers reads the whole vocabulary for it (seconds)."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(Path(file).parent), gguf_file=Path(file).name)


def meta_model(
    config: PretrainedConfig, auto_class: str = "AutoModelForCausalLM", trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model's modules and shapes, without weights, on the meta device (a second for 7B).

    Raises:
        ModelError: when this kind of model has no such head.

    >>> from transformers import AutoConfig
    >>> model = meta_model(AutoConfig.for_model("llama", num_hidden_layers=2))
    >>> model.model.layers[1].self_attn.q_proj.weight.device.type
    'meta'
    """
    import torch

    with torch.device("meta"):
        return _from_config(config, auto_class, trust_remote_code)


def load_tokenizer(spec: ModelSpec, task: Task | None = None) -> Any:
    """The tokenizer (or processor, if the task says so), with a pad token: eos where it has none.

    Raises:
        ModelError: when it cannot be found or read.
    """
    import transformers

    auto = getattr(transformers, getattr(task, "tokenizer_class", "AutoTokenizer"))
    if spec.tokenizer is not None:
        key = "model.tokenizer"
        source = _local(spec.tokenizer, key)
        kwargs: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    else:
        key = "model.name_or_path"
        source, kwargs = source_of(spec)
    with _one_line(spec, key):
        loaded = auto.from_pretrained(source, **kwargs)
    tokenizer = getattr(loaded, "tokenizer", loaded)
    where = f"{key}={getattr(spec, key.partition('.')[2])!r}"
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        # transformers makes an empty tokenizer where a folder has a config but no tokenizer files.
        raise ModelError(
            f"{where}: has no tokenizer (no vocabulary beyond special tokens); name one in model.tokenizer"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"{where}: its tokenizer has no pad, eos or unknown token to pad with; name another in model.tokenizer"
        )
    return loaded


def load_model(spec: ModelSpec, task: Task, tokenizer: Any = None) -> LoadedModel:
    """The pretrained model with the task's head, and the names of the modules that are new.

    New modules are initialised at random: set the seed before. A spec with a whole config and no
    `name_or_path` gives a model of random weights (for trying things out).

    Args:
        tokenizer: its pad token goes into the model's config where that names none.
    Raises:
        ModelError: when the model cannot be found or read, has no such head, or lacks weights that no
            fine-tuning could make up for.
    """
    if _fits_several_kinds(task):
        load_config(spec, task)
    loaded = _random_model(spec, task) if spec.name_or_path is None else _pretrained(spec, task)
    _set_pad(loaded.model, tokenizer)
    return loaded


def _random_model(spec: ModelSpec, task: Task) -> LoadedModel:
    import torch

    whole, _ = _inline(spec)
    assert whole is not None
    if spec.quantization is not None:
        raise ConfigError("model.quantization", spec.quantization, "needs model.name_or_path: nothing to quantise")
    model = _from_config(_config_of(whole, spec.config, task.model_kwargs()), task.auto_class)
    if spec.dtype is not None:
        model = model.to(getattr(torch, spec.dtype))
    return LoadedModel(model, _head(model), ("the model's weights are random: model.config names no checkpoint",))


def _pretrained(spec: ModelSpec, task: Task) -> LoadedModel:
    import torch
    import transformers

    settings = {**_inline(spec)[1], **task.model_kwargs()}
    notes: list[str] = []
    source, kwargs = source_of(spec)
    if spec.quantization is not None:
        kwargs["quantization_config"] = _quantization(spec, task)
    elif "gguf_file" in kwargs and hasattr(transformers, "GgufConfig"):
        kwargs["quantization_config"] = transformers.GgufConfig(dequantize=True)  # packed weights do not train
    with _one_line(spec), _quiet_report():
        model, report = getattr(transformers, task.auto_class).from_pretrained(
            source,
            **kwargs,
            **settings,
            dtype=spec.dtype or "auto",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    if "gguf_file" in kwargs and (packing := getattr(model, "hf_quantizer", None)) is not None:
        packing.remove_quantization_config(model)  # plain by now, but Trainer would refuse it as quantised
    if spec.dtype is None and spec.quantization is None and model.dtype == torch.float16:
        # Without loss scaling float16 weights (deberta-v3-base is stored so) train to NaN.
        model = model.float()
        notes.append("the checkpoint is float16; loaded as float32 (model.dtype sets another)")
    mismatched = [key[0] if isinstance(key, tuple) else key for key in report["mismatched_keys"]]
    new = new_modules(model, {*report["missing_keys"], *mismatched}, str(spec.name_or_path))
    if new:
        notes.append(f"not in the checkpoint, so trained and saved with the adapter: {', '.join(new)}")
    return LoadedModel(model, new, tuple(notes), bool(mismatched))


def new_modules(model: PreTrainedModel, missing: Iterable[str], name: str = "") -> tuple[str, ...]:
    """The modules that must go into ``modules_to_save`` because the checkpoint lacked their weights.

    Outside the backbone these are the top-level modules (``classifier``, ``score``); inside it, a child
    of which *nothing* was found (``pooler``). Each name is the shortest by which PEFT, which matches ends
    of names, finds that module alone.

    Args:
        missing: names of parameters that were not found, or found in another shape.
        name: the checkpoint, for messages.
    Raises:
        ModelError: when part of the backbone proper is missing (layers, embeddings): then this is not
            the checkpoint of this model.
    """
    missing = set(missing) & {key for key, _ in model.named_parameters(remove_duplicate=False)}
    from torch import nn

    from ..host.sites import backbone_of

    prefix = backbone_of(model)[0]
    tops: dict[str, None] = {}
    lacking = []
    for key, _ in model.named_parameters(remove_duplicate=False):
        if key not in missing:
            continue
        inside = key.startswith(prefix)
        top = (prefix if inside else "") + key[len(prefix) if inside else 0 :].split(".")[0]
        if inside or not prefix:
            whole = model.get_submodule(top) if "." in key[len(prefix) :] else None
            keys = {f"{top}.{k}" for k, _ in whole.named_parameters()} if whole is not None else {key}
            embedding = getattr(model.get_input_embeddings(), "weight", None)
            if (
                whole is None
                or not keys <= missing
                or any(isinstance(m, nn.ModuleList) and len(m) > 1 for m in whole.modules())
                or any(p is embedding for p in whole.parameters())
            ):
                lacking.append(key)
                continue
        elif "." not in key:
            raise ModelError(
                f"model.name_or_path={name!r}: lacks {key!r}, a bare parameter that PEFT cannot "
                "save with an adapter; use a checkpoint that has it"
            )
        tops[top] = None
    if lacking:
        raise ModelError(
            f"model.name_or_path={name!r}: the checkpoint lacks {len(lacking)} weights of "
            f"{type(model).__name__}, such as {lacking[0]!r}; it is not one of this model, or "
            "is damaged"
        )
    modules = [key for key, _ in model.named_modules() if key]
    return tuple(_shortest_end(top, modules) for top in tops)


def _fits_several_kinds(task: Task) -> bool:
    """Whether the task has to see the config before the class of its model is known."""
    from .tasks import Task

    return getattr(type(task), "adjust_to", Task.adjust_to) is not Task.adjust_to


# Where things are.


def source_of(spec: ModelSpec) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` is called with: a hub id or folder, and keyword arguments."""
    name = spec.name_or_path
    if name is None:
        raise ConfigError("model.name_or_path", None, "model.config alone is enough for plan, but not here")
    kwargs: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code}
    if spec.revision is not None:
        kwargs["revision"] = spec.revision
    if name.lower().endswith(".gguf"):
        file = Path(name).expanduser()
        if not file.is_file():
            beside = [p.name for p in file.parent.glob("*.gguf")] if file.parent.is_dir() else []
            raise ModelError(
                f"model.name_or_path={name!r}: no such file.{did_you_mean(file.name, beside)} "
                "(On the hub: set name_or_path to the repository and gguf_file to the file)"
            )
        return str(file.parent), {**kwargs, "gguf_file": file.name}
    source = _local(name, "model.name_or_path", spec.gguf_file)
    if spec.gguf_file is not None:
        if Path(source).is_dir() and not (Path(source) / spec.gguf_file).is_file():
            inside = [p.name for p in Path(source).glob("*.gguf")]
            raise ModelError(
                f"model.gguf_file={spec.gguf_file!r}: no such file in {name!r}."
                f"{did_you_mean(spec.gguf_file, inside)}".rstrip(".")
            )
        kwargs["gguf_file"] = spec.gguf_file
    return source, kwargs


def _local(name: str, key: str, gguf_file: str | None = None) -> str:
    """A folder's path, checked, or the hub id as it is."""
    path = Path(name).expanduser()
    if path.is_file():
        raise ModelError(f"{key}={name!r}: is a file; name the folder that holds the model, or a *.gguf file")
    if path.is_dir():
        if key == "model.name_or_path" and gguf_file is None and not (path / "config.json").is_file():
            files = sorted(p.name for p in path.iterdir())
            gguf = [file for file in files if file.lower().endswith(".gguf")]
            cure = (
                f"it holds {gguf[0]!r}; name that file"
                if gguf
                else "it holds an adapter; name the base model"
                if "adapter_config.json" in files
                else "name a folder written by save_pretrained"
            )
            raise ModelError(f"{key}={name!r}: no config.json in this folder; {cure}")
        return str(path)
    if name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        raise ModelError(f"{key}={name!r}: no such folder.{did_you_mean(path.name, beside)}".rstrip("."))
    return name


@contextmanager
def _one_line(spec: ModelSpec, key: str = "model.name_or_path") -> Iterator[None]:
    """Turns what transformers raises for a missing, foreign or unreadable model into one line."""
    value = getattr(spec, key.partition(".")[2])
    is_local = value is not None and Path(value).expanduser().exists()
    try:
        with contextlib.nullcontext() if is_local else offline_without_hub():
            yield
    except TrimtabError:
        raise
    except Exception as error:  # damaged files raise nearly anything: SafetensorError, UnpicklingError, bare Exception
        text = _flat(error)
        if "couldn't connect" in text or "offline mode" in text or "LocalEntryNotFound" in text:
            text = (
                "no such folder, and not in the hub's local cache; the hub cannot be reached from here "
                "(name a local folder or *.gguf file, or go online)"
            )
        elif "trust_remote_code" in str(error):
            text = "brings Python of its own, which is run only with model.trust_remote_code=true; read it first"
        elif isinstance(error, ImportError) and "gguf" in text.lower():
            text = "reading GGUF files needs the gguf package: pip install 'trimtab[gguf]'"
        raise ModelError(f"{key}={value!r}: {text}") from error


def _flat(error: Exception) -> str:
    """The error's text on one line, of bearable length."""
    return " ".join(str(error).split())[:400]


@contextmanager
def _quiet_report() -> Iterator[None]:
    """Keeps transformers' table of missing weights off the terminal: our note says it in one line."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


# Configs.

_OLD_KEYS = {
    "rope_theta",
    "rope_scaling",
    "torch_dtype",
    "dtype",
    "architectures",
    "transformers_version",
    "share_att_key",
}


def _inline(spec: ModelSpec) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """``(whole config or None, overrides)`` of ``model.config``."""
    config = spec.config
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else f"not valid JSON: {error}"
            raise ConfigError("model.config", spec.config, f"cannot be read: {reason}") from error
    if config is None:
        return None, {}
    if not isinstance(config, dict):
        raise ConfigError("model.config", spec.config, "a mapping, or the path of a JSON file with one")
    if "model_type" in config:
        return config, {}
    if spec.name_or_path is None:
        raise ConfigError("model.config", spec.config, "needs a model_type (llama, bert, deberta-v2, …)")
    return None, config


def overrides_of(spec: ModelSpec) -> dict[str, Any]:
    """What the recipe changes in the checkpoint's own config."""
    return _inline(spec)[1]


def _refuse_unknown(settings: dict[str, Any], config: PretrainedConfig, others: Iterable[str] = ()) -> None:
    """A misspelt key would be passed over, and the model be another."""
    own = {*config.to_dict(), *config.attribute_map, *inspect.signature(type(config)).parameters}
    known = {*own, *_OLD_KEYS, *others}
    for key, value in settings.items():
        if key not in known and not hasattr(config, key):
            near = did_you_mean(key, known)
            raise ConfigError(f"model.config.{key}", value, f"a {config.model_type} config has no such key.{near}")


def _config_of(whole: dict[str, Any], origin: Any, labels: dict[str, Any]) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING, AutoConfig, GenerationConfig

    settings = dict(whole)
    kind = settings.pop("model_type")
    if kind not in CONFIG_MAPPING:
        raise ConfigError(
            "model.config.model_type",
            kind,
            f"transformers knows no such model.{did_you_mean(str(kind), CONFIG_MAPPING)}",
        )
    if isinstance(origin, dict):  # typed by hand
        _refuse_unknown(settings, CONFIG_MAPPING[kind](), GenerationConfig().to_dict())
    try:
        return AutoConfig.for_model(kind, **{**settings, **labels})
    except Exception as error:  # hub's own validation errors are no ValueErrors
        raise ConfigError("model.config", origin, _flat(error)) from error


def _from_config(config: PretrainedConfig, auto_class: str, trust_remote_code: bool = False) -> PreTrainedModel:
    import transformers

    try:
        return getattr(transformers, auto_class).from_config(config, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise ModelError(f"model.config: {_flat(error)}") from error
        raise ModelError(f"model: transformers has no {auto_class} for a {config.model_type} model") from error


def _quantization(spec: ModelSpec, task: Task) -> Any:
    """bitsandbytes' settings, with the head kept in full precision so that it can be trained."""
    from transformers import BitsAndBytesConfig

    settings = dict(spec.quantization or {})
    known = [name for name in inspect.signature(BitsAndBytesConfig).parameters if name != "kwargs"]
    for key in settings:  # transformers itself ignores a misspelt one and loads the model unquantised
        if key not in known:
            raise ConfigError(
                f"model.quantization.{key}",
                settings[key],
                f"no such setting.{did_you_mean(key, known)} There is {', '.join(known)}",
            )
    if not (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        raise ConfigError("model.quantization", spec.quantization, "set load_in_4bit or load_in_8bit to true")
    if "llm_int8_skip_modules" not in settings:
        head = _head(meta_model(load_config(spec, task), task.auto_class, spec.trust_remote_code))
        settings["llm_int8_skip_modules"] = list(head)
    try:
        return BitsAndBytesConfig(**settings)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError("model.quantization", spec.quantization, _flat(error)) from error


# Parts of a model.


def _head(model: PreTrainedModel) -> tuple[str, ...]:
    """Top-level modules with parameters of their own outside the backbone."""
    from ..host.sites import backbone_of

    backbone = backbone_of(model)[0].rstrip(".")
    if not backbone:
        return ()
    shared = {id(p) for p in model.get_submodule(backbone).parameters()}
    modules = [key for key, _ in model.named_modules() if key]
    return tuple(
        _shortest_end(name, modules)
        for name, child in model.named_children()
        if name != backbone and any(id(p) not in shared for p in child.parameters())
    )


def _shortest_end(name: str, modules: Iterable[str]) -> str:
    """The shortest dotted end of a module's name that is no other module's end."""
    modules = list(modules)
    full = f"model.{name}"  # PEFT puts the model under `base_model.model`, which tells "head" from "lm_head"
    parts = full.split(".")
    for n in range(1, len(parts) + 1):
        end = ".".join(parts[-n:])
        if [key for key in modules if f"model.{key}".endswith(end)] == [name]:
            return end
    return full


def _set_pad(model: PreTrainedModel, tokenizer: Any) -> None:
    """Models that find a row's last token by its padding need to know the pad token."""
    config = model.config.get_text_config()
    if getattr(config, "pad_token_id", None) is not None:
        return
    pad = getattr(getattr(tokenizer, "tokenizer", tokenizer), "pad_token_id", None)
    if pad is None:
        pad = getattr(config, "eos_token_id", None)
        pad = pad[0] if isinstance(pad, (list, tuple)) else pad
    config.pad_token_id = pad
