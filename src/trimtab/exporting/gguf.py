"""A LoRA as llama.cpp reads it: one GGUF file, each module at its own rank.

llama.cpp multiplies each module's update by the file's one alpha over the rank of that module's own tensors
(`llama_adapter_lora_weight::get_scale`). So B is stored times its rank over alpha, and every product comes out as
trained.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import ExportError

if TYPE_CHECKING:
    from .formats import Part

FILE = "adapter.gguf"
# transformers' model_type -> llama.cpp's architecture, where its converter leaves linear weights as they are. The
# others' weights it fuses, splits or reorders, each in its own way.
_ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
}
_TURNED_BY_PAIRS = {"llama": {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}}


def architecture(config: Any) -> str:
    """llama.cpp's name for a model of transformers' ``config``. Raises `ExportError` for one that is not written."""
    if importlib.util.find_spec("gguf") is None:
        raise ExportError("export.format='gguf': needs the gguf package: pip install 'trimtab[gguf]'")
    kind = str(getattr(config, "model_type", None))
    if kind not in _ARCHITECTURES:
        raise ExportError(
            f"export.format='gguf': {kind} models are not among {', '.join(_ARCHITECTURES)}; export 'padded' and take "
            "llama.cpp's convert_lora_to_gguf.py, or 'merged' where a head was trained, which that does not take"
        )
    return _ARCHITECTURES[kind]


def write_gguf(config: Any, parts: Sequence[Part], rest: Mapping[str, Tensor], folder: Path) -> None:
    """Write ``parts`` to ``folder``/adapter.gguf for a base of transformers' ``config``.

    Raises:
        ExportError: another architecture, or a tensor that is no A or B of a linear layer (``rest`` holds those that
            lie beside the parts).
    """
    arch = architecture(config)
    import gguf

    for key in rest:
        raise ExportError(f"export.format='gguf': {key} is no A or B, and llama.cpp takes nothing else; use 'merged'")
    names = gguf.get_tensor_name_map(
        next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch), config.num_hidden_layers
    )
    parts = [part for part in parts if part.r]
    alpha = max(part.r for part in parts)
    tensors: dict[str, Tensor] = {}
    for part in parts:
        ends = {key.rpartition(".lora_")[2]: value for key, value in part.tensors.items()}
        name = names.get_name(f"{part.name}.weight", try_suffixes=(".weight",))
        if name is None or ends.keys() != {"A.weight", "B.weight"}:
            wrong = next(
                (key for key in part.tensors if not key.endswith(("lora_A.weight", "lora_B.weight"))), part.name
            )
            raise ExportError(f"export.format='gguf': {wrong}: llama.cpp has no place for it; use format 'merged'")
        B = ends["B.weight"] * (part.r / alpha)
        if heads := _TURNED_BY_PAIRS.get(arch, {}).get(name.split(".")[-2]):
            B = _by_pairs(B, getattr(config, heads))
        tensors |= {f"{name}.lora_a": ends["A.weight"], f"{name}.lora_b": B}
    folder.mkdir(parents=True, exist_ok=True)
    out = gguf.GGUFWriter(str(folder / FILE), arch)
    out.add_type(gguf.GGUFType.ADAPTER)
    out.add_string(gguf.Keys.Adapter.TYPE, "lora")
    out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    for key, value in tensors.items():
        out.add_tensor(key, value.detach().to("cpu", torch.float32).contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def _by_pairs(B: Tensor, heads: int) -> Tensor:
    """Rows in the order that llama.cpp turns them in: (first half, second half) of a head become neighbours."""
    out = B.shape[0]  # (out, r)
    return B.reshape(heads, 2, out // heads // 2, -1).transpose(1, 2).reshape(out, -1)
