"""Which engines read an exported adapter, and with which flag.

From their sources. vLLM (`lora/peft_helper.py`, `config/lora.py`): one scale for all modules, ``lora_alpha / r``;
``modules_to_save`` and DoRA are refused; memory is laid out in steps. llama.cpp (`llama-adapter.h`, get_scale): the
file's one alpha over the rank that each tensor has, so that mixed ranks want an alpha each, which there is not;
`convert_lora_to_gguf.py` stops at any tensor that is no factor.
"""

from __future__ import annotations

import json
from pathlib import Path

from .gguf import FILE

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` may be."""
_FACTORS = (".lora_A.weight", ".lora_B.weight")


def read_by(folder: Path) -> list[str]:
    """One line or two on who reads what `trimtab.export` wrote into ``folder``."""
    if (folder / FILE).is_file():
        return [f"read by llama.cpp, on any quantisation of the base: llama-server -m BASE.gguf --lora {folder / FILE}"]
    if not (folder / "adapter_config.json").is_file():
        return ["read by whatever reads the base model: it is a whole model"]
    from safetensors import safe_open

    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    with safe_open(str(folder / "adapter_model.safetensors"), "pt") as file:
        others = sorted(key for key in file.keys() if not key.endswith(_FACTORS))  # noqa: SIM118  (no mapping)
        ranks = {file.get_slice(key).get_shape()[0] for key in file.keys() if key.endswith(_FACTORS[0])}  # noqa: SIM118
    if config.get("task_type") not in ("CAUSAL_LM", None):
        return ["read by PEFT and transformers"]
    if others or config.get("target_parameters"):
        what = others[0].removeprefix("base_model.model.") if others else config["target_parameters"][0]
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        return [
            "read by PEFT and transformers",
            f"vLLM and llama.cpp take nothing but A and B of linear layers, and here is {what}{more}: --format merged",
        ]
    step = next((step for step in VLLM_RANKS if step >= config["r"]), None)
    vllm = (
        f"vLLM with --enable-lora --max-lora-rank {step}" if step else f"not vLLM, whose ranks end at {VLLM_RANKS[-1]}"
    )
    if len(ranks) == 1:
        return [f"read by PEFT, transformers, {vllm}, and by llama.cpp as --format gguf"]
    return [
        f"read by PEFT, transformers, {vllm}",
        f"llama.cpp would scale ranks of {min(ranks)} to {max(ranks)} wrongly: --format gguf",
    ]
