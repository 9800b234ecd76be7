"""Tiny models that read images, with their processors: one token a byte, random weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
CHAT = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{{ '<|image|>' if c.type == 'image' else c.text }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def _tokenizer(*special: str, **named: str) -> PreTrainedTokenizerFast:
    tokens = ["<pad>", "<s>", "</s>", *special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=named or list(special),
    )


def _images(name: str, **settings: Any) -> Any:
    # the first of transformers 5 call the class that needs Pillow alone by its old name
    return (getattr(tf, f"{name}ImageProcessorPil", None) or getattr(tf, f"{name}ImageProcessor"))(**settings)


def _text(kind: str, vocab_size: int, **more: Any) -> dict[str, Any]:
    own = {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return {"model_type": kind, **SIZES, **own, "vocab_size": vocab_size, "max_position_embeddings": 512, **more}


def paligemma() -> tuple[Any, Any]:
    """Reads its prompt in both directions, and its answer in one."""
    torch.manual_seed(0)
    images = _images("Siglip", size={"height": 16, "width": 16})
    images.image_seq_length = 4
    processor = tf.PaliGemmaProcessor(image_processor=images, tokenizer=_tokenizer("<image>", image_token="<image>"))
    n = len(processor.tokenizer)
    config = tf.PaliGemmaConfig(
        vision_config={**SIZES, "image_size": 16, "patch_size": 8, "model_type": "siglip_vision_model"},
        text_config=_text("gemma", n, head_dim=8),
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
        projection_dim=16,
        hidden_size=16,
        vocab_size=n,
    )
    return tf.PaliGemmaForConditionalGeneration(config).eval(), processor


def mllama() -> tuple[Any, Any]:
    """Reads images by cross-attention, with a mask for each token."""
    torch.manual_seed(0)
    processor = tf.MllamaProcessor(
        image_processor=_images("Mllama", size={"height": 16, "width": 16}, max_image_tiles=2),
        tokenizer=_tokenizer("<|image|>"),
        chat_template=CHAT,
    )
    n = len(processor.tokenizer)
    vision = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_global_layers": 1,
        "attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 16,
        "patch_size": 8,
        "max_num_tiles": 2,
        "vision_output_dim": 32,
        "intermediate_layers_indices": [1],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = _text("mllama_text_model", n, cross_attention_layers=[1])
    image = processor.tokenizer.convert_tokens_to_ids("<|image|>")
    config = tf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=image)
    model = tf.MllamaForConditionalGeneration(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):  # 0 at first, so that images say nothing
            torch.nn.init.ones_(parameter)
    return model, processor


def blip2(qformer_reads_text: bool = False) -> tuple[Any, Any]:
    """Its processor puts the image's tokens before the text; InstructBLIP's Q-Former reads the text, too."""
    torch.manual_seed(0)
    images, tokenizer = _images("Blip", size={"height": 16, "width": 16}), _tokenizer()
    name = "InstructBlip" if qformer_reads_text else "Blip2"
    more = {"qformer_tokenizer": _tokenizer()} if qformer_reads_text else {}
    processor = getattr(tf, f"{name}Processor")(images, tokenizer, num_query_tokens=4, **more)
    n = len(processor.tokenizer)
    opt = {"model_type": "opt", "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 2}
    opt |= {"num_attention_heads": 2, "vocab_size": n, "max_position_embeddings": 512}
    config = getattr(tf, f"{name}Config")(
        vision_config={**SIZES, "image_size": 16, "patch_size": 8},
        qformer_config={**SIZES, "vocab_size": n, "encoder_hidden_size": 16},
        text_config={**opt, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
        num_query_tokens=4,
        image_token_index=n - 1,
    )
    return getattr(tf, f"{name}ForConditionalGeneration")(config).eval(), processor
