"""Models and tokenizers from a hub id, a local folder, a GGUF file, or a bare config.

Nothing here knows a task by name or a model by name: what the head needs comes from the task, what is
new (and must be saved with the adapter) comes from what the checkpoint lacked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

    from .tasks import Task


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The recipe's ``model:``."""

    name_or_path: str | None = None
    """Hub id, local folder, or path of a ``*.gguf`` file."""
    gguf_file: str | None = None
    """Name of the GGUF file inside the hub repository or folder `name_or_path`."""
    revision: str | None = None
    dtype: str | None = None
    """``float32``, ``bfloat16``, ``float16``; else the checkpoint's own, where float16 becomes float32."""
    tokenizer: str | None = None
    """Hub id or folder, when the tokenizer is not with the model."""
    config: dict[str, Any] | str | None = None
    """Inline config (``{model_type: llama, …}``) or path of a JSON file: enough for `plan`, no weights."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to be adapted."""

    model: nn.Module
    modules_to_save: tuple[str, ...] = ()
    """Modules whose weights the checkpoint lacked; a reloaded adapter is wrong without them."""
    notes: tuple[str, ...] = field(default=())


def load_config(spec: ModelSpec, task: Task | None = None) -> PretrainedConfig:
    """The model's config, with the task's labels in it.

    Raises:
        ModelError: when it cannot be found or read.
    """
    raise NotImplementedError


def meta_model(config: PretrainedConfig, auto_class: str = "AutoModelForCausalLM") -> nn.Module:
    """The model's modules and shapes, without weights, on the meta device (seconds for 7B)."""
    raise NotImplementedError


def load_tokenizer(spec: ModelSpec, task: Task | None = None) -> Any:
    """The tokenizer (or processor, if the task says so), with a pad token: eos where it has none."""
    raise NotImplementedError


def load_model(spec: ModelSpec, task: Task, tokenizer: Any = None) -> LoadedModel:
    """The pretrained model with the task's head, and the names of the modules that are new."""
    raise NotImplementedError


def pool_of(config: PretrainedConfig) -> str:
    """``cls`` for encoders, ``last`` for decoders, ``mean`` for encoder-decoders."""
    raise NotImplementedError
