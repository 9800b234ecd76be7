"""The recipe's ``train``: fields of `transformers.TrainingArguments`, checked one by one.

`check` looks at what is written and imports nothing: a batch size of 0 is refused in milliseconds. `check_machine`
looks at what is installed here; only a command that trains asks for it, since a plan may be made elsewhere.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError, did_you_mean
from . import about
from .lookup import dataclass_fields, dict_keys, enum_values

_ARGUMENTS = "transformers.training_args", "TrainingArguments"
_ENUMS = {
    "SchedulerType": "transformers.trainer_utils",
    "IntervalStrategy": "transformers.trainer_utils",
    "SaveStrategy": "transformers.trainer_utils",
    "HubStrategy": "transformers.trainer_utils",
    "OptimizerNames": "transformers.training_args",
}

# What a number must be, in words, and the test. The Trainer checks few of these: most would break down in its midst,
# or train in silence on a setting that means nothing.
_ABOVE_0 = "a number above 0", lambda x: x > 0
_FROM_0 = "at least 0", lambda x: x >= 0
_FROM_1 = "a whole number, at least 1", lambda x: x >= 1
_BELOW_1 = "at least 0 and below 1", lambda x: 0 <= x < 1
_LIMITS: dict[str, tuple[str, Any]] = {
    "learning_rate": _ABOVE_0,
    "num_train_epochs": _ABOVE_0,
    "max_steps": ("a whole number, at least 1 (or -1, for num_train_epochs to count)", lambda x: x >= 1 or x == -1),
    "per_device_train_batch_size": _FROM_1,
    "per_device_eval_batch_size": _FROM_1,
    "gradient_accumulation_steps": _FROM_1,
    "eval_accumulation_steps": _FROM_1,
    "torch_empty_cache_steps": _FROM_1,
    "save_total_limit": _FROM_1,
    "dataloader_prefetch_factor": _FROM_1,
    "dataloader_num_workers": ("a whole number, at least 0", lambda x: x >= 0),
    **dict.fromkeys(
        ("logging_steps", "eval_steps", "save_steps"),
        ("above 0: a number of steps, or a share of the run below 1", lambda x: x > 0),
    ),
    "warmup_steps": ("at least 0: a number of steps, or a share of the run below 1", lambda x: x >= 0),
    "eval_delay": _FROM_0,
    "weight_decay": _FROM_0,
    "max_grad_norm": _FROM_0,
    "neftune_noise_alpha": _FROM_0,
    "label_smoothing_factor": _BELOW_1,
    "adam_beta1": _BELOW_1,
    "adam_beta2": _BELOW_1,
    "adam_epsilon": _ABOVE_0,
}
_SAMPLING = "train_sampling_strategy"
_LEVELS = ("debug", "info", "warning", "error", "critical", "passive")
_WORDS = {
    _SAMPLING: ("random", "sequential", "group_by_length", "batch_rebalance"),
    "log_level": _LEVELS,
    "log_level_replica": _LEVELS,
}
_CALLED = {"adam": "adamw_torch", "adamw": "adamw_torch", "adamw_hf": "adamw_torch", "true": "epoch", "never": "no"}
_LISTS = ("report_to",)
_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "azure_ml": ("azureml",), "flyte": ("flytekit",)}


def fields() -> dict[str, str]:
    """Every field and its annotation."""
    found = dataclass_fields(*_ARGUMENTS)
    return found if _SAMPLING in found else {**found, _SAMPLING: "str"}


def stock(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values under the names that the installed `TrainingArguments` has: older ones say ``group_by_length``."""
    out = dict(values)
    # Callbacks of a resumed run count on by themselves; the Trainer would put copies in their place.
    out.pop("restore_callback_states_from_checkpoint", None)
    if _SAMPLING in out and _SAMPLING not in dataclass_fields(*_ARGUMENTS):
        word = out.pop(_SAMPLING)
        if word not in ("random", "group_by_length"):
            raise ConfigError(f"train.{_SAMPLING}", word, "this transformers samples random or group_by_length only")
        out["group_by_length"] = word == "group_by_length"
    return out


def score_every_row(args: Any) -> None:
    """Every row is scored, in the order given, and its output kept, whatever evaluations while training leave out."""
    args.train_sampling_strategy, args.group_by_length = "random", False
    args.dataloader_drop_last = args.prediction_loss_only = False


def check(key: str, value: Any) -> Any:
    """The value of a field that there is, as `TrainingArguments` takes it.

    Raises:
        ConfigError: it is of another type, out of range, or none of the words that there are.

    >>> check("learning_rate", "1e-3"), check("eval_strategy", False)
    (0.001, 'no')
    """
    kind = fields()[key]
    parts = set(re.findall(r"\w+", kind))
    name = f"train.{key}"
    if words := _words(key, parts):
        return _word(name, value, words)
    if key == "report_to" and not value:  # `no`, or nothing
        return "none"
    if value is None:
        if parts & {"None", "Optional"}:
            return None
        raise ConfigError(name, None, f"needs a value; leave the key out for the Trainer's own ({_type_words(parts)})")
    if key in _LISTS or parts & {"str", "dict", "list", "ParallelismConfig", "DebugOption"}:
        return value
    if parts & {"int", "float"}:
        return _number(name, key, value, whole="float" not in parts)
    if "bool" in parts and not isinstance(value, bool):
        raise ConfigError(name, value, "must be true or false")
    return value


def words(key: str) -> tuple[str, ...]:
    """Those that a field can be; none where it is anything else."""
    return _words(key, set(re.findall(r"\w+", fields()[key])))


def _words(key: str, parts: set[str]) -> tuple[str, ...]:
    for enum, module in _ENUMS.items():
        if enum in parts:
            return enum_values(module, enum)
    return _WORDS.get(key, ())


def _word(name: str, value: Any, words: tuple[str, ...]) -> str:
    if value is False and "no" in words:  # YAML reads a bare `no` and `off` as false
        return "no"
    if value not in words:
        listed = ", ".join(words)
        near = did_you_mean(_CALLED.get(str(value).lower(), str(value)), words)
        raise ConfigError(name, value, f"must be one of {listed}.{near}")
    return str(value)


def _number(name: str, key: str, value: Any, whole: bool) -> float:
    wanted, fits = _LIMITS.get(key, ("a whole number" if whole else "a number", lambda x: True))
    if isinstance(value, str):
        try:
            value = int(value) if whole else float(value)
        except ValueError:
            raise ConfigError(name, value, f"must be a number: {wanted}") from None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or (whole and value != int(value)) or not fits(value):
        raise ConfigError(name, value, f"must be {wanted}")
    return int(value) if whole else value


def _type_words(parts: set[str]) -> str:
    return "a whole number" if "int" in parts else "a number" if "float" in parts else "true or false"


def check_together(train: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for fields that do not go together. ``train`` has the defaults in it."""
    for key, value in (("batch_eval_metrics", True), ("eval_do_concat_batches", False)):
        if train.get(key) is value:
            cure = "scores are of all rows at once; leave it out (eval_accumulation_steps is what saves memory)"
            raise ConfigError(f"train.{key}", value, cure)
    if train.get("bf16") and train.get("fp16"):
        raise ConfigError("train.fp16", True, "train.bf16 is set too; keep one of them")
    if train.get("dataloader_persistent_workers") and not train.get("dataloader_num_workers"):
        raise ConfigError(
            "train.dataloader_persistent_workers", True, "there are none: set train.dataloader_num_workers"
        )
    evals, saves = train["eval_strategy"], train["save_strategy"]
    if saves == "best" and evals == "no":
        raise ConfigError("train.save_strategy", saves, "needs evaluations: set train.eval_strategy to epoch or steps")
    if not train.get("load_best_model_at_end"):
        return
    if evals == "no":
        cure = "needs evaluations to tell which is best: set train.eval_strategy to epoch or steps"
        raise ConfigError("train.load_best_model_at_end", True, cure)
    if saves not in (evals, "best"):
        cure = f"load_best_model_at_end loads a checkpoint that was evaluated: set it to {evals}, as eval_strategy is"
        raise ConfigError("train.save_strategy", saves, cure)
    if saves == "steps":
        between = train.get("eval_steps") or train.get("logging_steps", 500)
        apart = train.get("save_steps", 500)
        if (between >= 1) == (apart >= 1) and not math.isclose(apart / between, round(apart / between)):
            cure = f"load_best_model_at_end needs a multiple of the {between:g} steps between evaluations"
            raise ConfigError("train.save_steps", apart, cure)


def check_machine(train: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for what a field asks of this machine and it has not."""
    if train.get("deepspeed"):
        _need_file("train.deepspeed", train["deepspeed"])
        _need_package("train.deepspeed", train["deepspeed"], ("deepspeed",))
    if train.get("use_liger_kernel"):  # the Trainer asks for it once the model is loaded
        _need_package("train.use_liger_kernel", True, ("liger_kernel",))
    if train.get("fsdp") and about.processes() < 2:
        cure = "shards over several processes, and this is one: torchrun --nproc-per-node=2 -m trimtab run …"
        raise ConfigError("train.fsdp", train["fsdp"], cure)
    for key in ("fsdp_config", "accelerator_config"):
        _need_file(f"train.{key}", train.get(key))
    report_to = train.get("report_to") or []
    known = dict_keys("transformers.integrations.integration_utils", "INTEGRATION_TO_CALLBACK")
    for tracker in [report_to] if isinstance(report_to, str) else report_to:
        if tracker in ("none", "all"):
            continue
        if tracker not in known:
            near = did_you_mean(str(tracker), known)
            raise ConfigError("train.report_to", tracker, f"must be one of {', '.join(known)}, none.{near}")
        _need_package("train.report_to", tracker, _PACKAGES.get(tracker, (tracker,)))


def _need_file(key: str, value: Any) -> None:
    if isinstance(value, str) and value.endswith(".json") and not Path(value).expanduser().is_file():
        raise ConfigError(key, value, "no such file")


def _need_package(key: str, value: Any, packages: tuple[str, ...]) -> None:
    if not any(map(_is_there, packages)):
        raise ConfigError(key, value, f"not installed here: pip install {packages[0].replace('_', '-')}")


def _is_there(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
