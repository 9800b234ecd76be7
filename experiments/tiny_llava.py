"""A tiny LLaVA with random weights on easy-VQA: does it learn to answer better than by the commonest answer?

    python experiments/tiny_llava.py --data DATA/easy_vqa --out runs/tiny_llava

Its language layers are adapted (half of them, by CKA, and LoRA in those), the projector and the head are trained;
the vision tower and everything else stay as they were drawn. The figures go to experiments/results/tiny_llava.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

HERE = Path(__file__).parent
TRAIN_ROWS, TEST_ROWS = 8000, 1000


def make_model(folder: Path, texts: list[str]) -> None:
    """Weights, tokenizer (one token a word) and image processor of a tiny LLaVA."""
    split = pre_tokenizers.Whitespace()
    words = sorted({word for text in texts for word, _ in split.pre_tokenize_str(text)})
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", "<pad>", "<image>", *words])}
    whole = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    whole.pre_tokenizer = split
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )  # fmt: skip
    images = tf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    tf.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=8, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    vision = tf.CLIPVisionConfig(
        hidden_size=96, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=8
    )
    text = tf.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256, bos_token_id=1, eos_token_id=2,
        pad_token_id=3,
    )  # fmt: skip
    torch.manual_seed(0)
    tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=4)
    ).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of train, test and their images")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the run")
    options = parser.parse_args()
    rows = {s: read(options.data / f"{s}.jsonl") for s in ("train", "test")}
    prompt = "USER: ASSISTANT: Answer the question using a single word or phrase."
    make_model(options.out / "model", [prompt, *(r["question"] + " " + r["answer"] for r in rows["train"])])
    recipe = {
        "model": {"name_or_path": str(options.out / "model"), "dtype": "float32"},
        "task": {"name": "vqa", "generation": {"max_new_tokens": 3, "batch_size": 50}},
        "data": {
            **{s: str(options.data / f"{s}.jsonl") for s in rows},
            "max_samples": {"test": TEST_ROWS, "train": TRAIN_ROWS},
            "sample_seed": "first",
        },
        "adapter": {
            "r": 16,
            "target_modules": r".*language_model.*\.(q|k|v|o|gate|up|down)_proj",
            "modules_to_save": ["multi_modal_projector", "lm_head"],
        },
        "where": {"method": "cka", "ratio": 0.5, "samples": 256},
        "train": {
            "num_train_epochs": 4, "per_device_train_batch_size": 32, "learning_rate": 2e-3, "eval_strategy": "no",
            "lr_scheduler_type": "cosine", "warmup_steps": 0.05,
        },
        "output_dir": str(options.out / "run"),
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "recipe.yaml").write_text(json.dumps(recipe))  # YAML reads JSON
    trimtab = [sys.executable, "-m", "trimtab"]
    subprocess.run([*trimtab, "run", str(options.out / "recipe.yaml"), "--overwrite"], check=True)
    found = json.loads((options.out / "run" / "metrics.json").read_text())
    where = json.loads((options.out / "run" / "where.json").read_text())
    test = [r["answer"] for r in rows["test"][:TEST_ROWS]]
    answer, times = Counter(test).most_common(1)[0]
    result = {
        "test rows": len(test),
        "commonest answer": answer,
        "accuracy of the commonest answer": times / len(test),
        "accuracy": found["metrics"]["accuracy"],
        "layers chosen": where["stacks"],
        "seconds of training": found["seconds"],
    }
    (HERE / "results" / "tiny_llava.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


if __name__ == "__main__":
    main()
