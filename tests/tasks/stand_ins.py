"""Tokenizers, models and files small enough to make in a test."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

WORDS = ["the", "cat", "sat", "on", "a", "mat", "dog", "ran", "home", "again", "good", "bad", "very", "so", "it", "is"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def encoder_tokenizer() -> PreTrainedTokenizerFast:
    """[CLS] text [SEP] pair [SEP], with token types, as BERT's and DeBERTa's do."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="[UNK]"))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=64,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """No pad token, as Llama's."""
    special = ["<unk>", "<s>", "</s>"]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def byte_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """One token a byte, so that every text comes back exactly; with `chat`, a template of its own."""
    special = ["<pad>", "<s>", "</s>", "<image>", "<|end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(special + alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>", "<|end|>"],
    )
    if chat:
        made.chat_template = (
            "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|end|>\n{% endfor %}"
            "{% if add_generation_prompt %}[assistant]{% endif %}"
        )
    return made


def byte_model(kind: str = "llama", **more):
    """A tiny model for `byte_tokenizer`, the same weights every time."""
    torch.manual_seed(0)
    config = tiny_config(kind, vocab_size=261, pad_token_id=0, bos_token_id=1, eos_token_id=2, **more)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config).eval()


def llava_processor():
    """Four patches an image, one token a byte."""
    import transformers
    from transformers import LlavaProcessor

    # the first of transformers 5 call the class that needs Pillow alone by its old name
    clip = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    images = clip(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=byte_tokenizer(),
        patch_size=8,
        image_token="<image>",
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def llava_model():
    """A tiny LLaVA for `llava_processor`, the same weights every time."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text = tiny_config("llama", vocab_size=261, pad_token_id=0)
    vision = CLIPVisionConfig(**SIZES, image_size=16, patch_size=8)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    ).eval()


def png(colour: str) -> bytes:
    """An image of one colour."""
    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (20, 24), colour).save(out, "PNG")
    return out.getvalue()


class Reciter(torch.nn.Module):
    """Stands for a model: says what `reply` makes of the prompt's text, and counts how often it is asked."""

    def __init__(self, tokenizer, reply):
        super().__init__()
        self.tokenizer, self.reply, self.calls = tokenizer, reply, 0
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config, self.dtype = tiny_config("llama", max_position_embeddings=10**6), torch.float32

    def forward(self, input_ids=None, attention_mask=None, pixel_values=None):
        raise NotImplementedError

    def generate(self, input_ids, attention_mask, generation_config, stopping_criteria=(), **inputs):
        self.calls += 1
        rows = []
        for ids, mask in zip(input_ids, attention_mask):
            text = self.tokenizer.decode(ids[mask.bool()], skip_special_tokens=False)
            rows.append(self.tokenizer(self.reply(text), add_special_tokens=False)["input_ids"] + [2])
        longest = max(map(len, rows))
        return torch.cat([input_ids, torch.tensor([row + [0] * (longest - len(row)) for row in rows])], dim=1)


def tiny_config(kind: str, **more):
    """A config of two blocks and 16 features."""
    sizes = {
        "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
        "t5": {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "pad_token_id": 0,
            "decoder_start_token_id": 0,
            "eos_token_id": 3,
        },
        "bart": {
            "d_model": 16,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 3,
            "decoder_start_token_id": 3,
        },
        "llama": {**SIZES, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2},
        "deberta-v2": {
            **SIZES,
            "relative_attention": True,
            "position_biased_input": False,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 8,
            "max_position_embeddings": 64,
            "type_vocab_size": 0,
        },
    }.get(kind, {**SIZES, "max_position_embeddings": 64})
    return AutoConfig.for_model(kind, **{"vocab_size": 32, **sizes, **more})


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def data_pack(name: str) -> Path:
    """A folder of the project's data pack; the test is skipped where it is not at hand."""
    root = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
    if not (root / name).is_dir():
        pytest.skip(f"data pack with {name} not found (set TRIMTAB_DATA)")
    return root / name
