"""What a model tells of itself, seen through its wrapper: kind, inputs, outputs, longest row."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from types import MethodType
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel


def pool_of(config: PretrainedConfig) -> str:
    """Which token's features stand for a row in layer selection.

    ``last`` for decoders and for models that read images and write text, ``mean`` for encoder-decoders
    (their first token is the same in every row, and so is their last), ``cls`` for encoders.
    """
    from transformers.models.auto import modeling_auto as names

    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        return "mean"
    causal = kind in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = kind in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if (
        kind in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
        or getattr(config, "is_decoder", False)
        or (causal and not masked)
    ):
        return "last"
    return "cls"


def reads_only(config: PretrainedConfig) -> bool:
    """Whether it is an encoder, trained to fill in masked words, and so cannot write a text."""
    from transformers.models.auto import modeling_auto as names

    return config.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def forward_names(model: PreTrainedModel) -> set[str]:
    """Names of the arguments of the model's ``forward``, seen through a PEFT wrapper."""
    return set(inspect.signature(_base(model).forward).parameters)


def positions(model: PreTrainedModel, side: str | None = None) -> int | None:
    """Tokens that a row may have: the smallest learned table of positions, else what the config says; None if nothing.

    Args:
        side: ``encoder`` or ``decoder``, of a model that has both; without it, what both can take.

    RoBERTa and its kin count positions from behind the padding's, BART and OPT from behind two of their own, so that
    their tables hold fewer tokens than rows. Relative positions reach further than the figure in the config.
    """
    from torch import nn

    base = _base(model)
    rooms = [
        table.num_embeddings - _first_position(table)
        for name, table in base.named_modules()
        if isinstance(table, nn.Embedding)
        and _POSITIONS.search(name)
        and not _NOT_TEXT.search(name)
        and (side is None or side in name.split("."))
    ]
    config = base.config.get_text_config()
    figure = getattr(config, "max_position_embeddings", None)
    if rooms:
        return min(*rooms, figure or rooms[0])
    return None if getattr(config, "relative_attention", False) else figure


_POSITIONS = re.compile(r"(^|\.)(wpe|embed_positions|positions?_embed(ding)?s?|embed_position)$")
_NOT_TEXT = re.compile(r"vision|visual|image|audio")


def _first_position(table: nn.Embedding) -> int:
    """Row of the first token."""
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return offset
    return 0 if table.padding_idx is None else table.padding_idx + 1


def unread_outputs(model: nn.Module) -> list[str]:
    """Outputs of the model beside loss and logits of any kind, for Trainer's ``ignore_keys``.

    No score reads them, and some hold None inside (LLaVA's images), over which Trainer's gathering trips.
    """
    try:
        kinds = get_type_hints(inspect.unwrap(type(_base(model)).forward)).get("return")
    except (NameError, TypeError):  # a model whose annotations are not to be had
        kinds = None
    kinds = [k for k in (kinds, *get_args(kinds)) if isinstance(k, type) and is_dataclass(k)]
    names = {f.name for kind in kinds for f in fields(kind)}
    names |= set(getattr(getattr(model, "config", None), "keys_to_ignore_at_inference", ()))
    read = {name for name in names if name == "loss" or name.endswith("logits")}
    return sorted(names - read) if read - {"loss"} else []


def _base(model: Any) -> Any:
    while isinstance(get := getattr(model, "get_base_model", None), MethodType):
        model = get()
    return model
