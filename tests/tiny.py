"""Tiny random models of every family, built from configs in milliseconds, and data that they can learn."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

import trimtab
from trimtab.rank.base import starter_of

VOCAB = 64


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, what to adapt, and which PEFT task it is."""

    build: Callable[[], nn.Module]
    targets: tuple[str, ...] | str
    task_type: str
    blocks: int = 4

    @property
    def target_modules(self) -> list[str] | str:
        """As a PEFT config takes them."""
        return self.targets if isinstance(self.targets, str) else list(self.targets)


def _classifier(cls: type, config: Any) -> nn.Module:
    config.pad_token_id, config.num_labels = 0, 2
    return cls(config)


def _bert() -> nn.Module:
    return _classifier(
        tf.BertForSequenceClassification,
        tf.BertConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    )


def _roberta() -> nn.Module:
    return _classifier(
        tf.RobertaForSequenceClassification,
        tf.RobertaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=70,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
    )


def _deberta() -> nn.Module:
    return _classifier(
        tf.DebertaV2ForSequenceClassification,
        tf.DebertaV2Config(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            pooler_dropout=0.0,
            pooler_hidden_size=32,
        ),
    )


def _decoder(config: Any) -> nn.Module:
    return tf.AutoModelForCausalLM.from_config(config)


def _small(**more: Any) -> dict[str, Any]:
    return (
        dict(
            vocab_size=VOCAB,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=48,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        | more
    )


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCAB,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _bart() -> nn.Module:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=2,
        )
    )


def _llava() -> nn.Module:
    vision = tf.CLIPVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=8, patch_size=4
    )
    text = tf.LlamaConfig(**_small())
    return tf.LlavaForConditionalGeneration(
        tf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)
    )


IMAGE = 3  # LLaVA's image token; tests of other families use it as any other
PATCHES = 4

FAMILIES: dict[str, Family] = {
    "bert": Family(_bert, ("query", "key", "value", "intermediate.dense"), "SEQ_CLS"),
    "roberta": Family(_roberta, ("query", "key", "value", "intermediate.dense"), "SEQ_CLS"),
    "deberta": Family(_deberta, ("query_proj", "key_proj", "value_proj", "intermediate.dense"), "SEQ_CLS"),
    "gpt2": Family(
        lambda: _decoder(
            tf.GPT2Config(
                vocab_size=VOCAB,
                n_embd=32,
                n_layer=4,
                n_head=4,
                n_positions=64,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        ),
        ("c_attn", "c_fc"),
        "CAUSAL_LM",
    ),
    "llama": Family(
        lambda: _decoder(tf.LlamaConfig(**_small())), ("q_proj", "k_proj", "v_proj", "up_proj"), "CAUSAL_LM"
    ),
    "mistral": Family(
        lambda: _decoder(tf.MistralConfig(**_small())), ("q_proj", "k_proj", "v_proj", "up_proj"), "CAUSAL_LM"
    ),
    "gemma2": Family(
        lambda: _decoder(tf.Gemma2Config(**_small(head_dim=8))), ("q_proj", "k_proj", "v_proj", "up_proj"), "CAUSAL_LM"
    ),
    "qwen2": Family(
        lambda: _decoder(tf.Qwen2Config(**_small())), ("q_proj", "k_proj", "v_proj", "up_proj"), "CAUSAL_LM"
    ),
    "llava": Family(_llava, r".*language_model.*\.(q_proj|k_proj|v_proj|up_proj)", "CAUSAL_LM"),
    "t5": Family(_t5, ("q", "k", "v", "wi"), "SEQ_2_SEQ_LM"),
    "bart": Family(_bart, ("q_proj", "k_proj", "v_proj", "fc1"), "SEQ_2_SEQ_LM"),
}


def build(family: str, seed: int = 0) -> nn.Module:
    """The family's tiny model, the same weights for the same seed."""
    torch.manual_seed(seed)
    return FAMILIES[family].build()


def rows(family: str, n: int = 64, length: int = 8, seed: int = 0) -> list[dict[str, Any]]:
    """Learnable rows: the label tells whether the first token is in the upper half; decoders repeat a pattern."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (n, length), generator=generator)
    if FAMILIES[family].task_type == "SEQ_CLS":
        return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": int(i[0] >= VOCAB // 2)} for i in ids]
    ids[:, 1::2] = (ids[:, 0::2] + 1).clamp(max=VOCAB - 1)
    if family == "llava":
        return [_with_image(i.clamp(min=IMAGE + 1), torch.randn(3, 8, 8, generator=generator)) for i in ids]
    labels = ids.clone()
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": la} for i, la in zip(ids, labels)]


def _with_image(ids: torch.Tensor, image: torch.Tensor) -> dict[str, Any]:
    ids = torch.cat([ids.new_full((PATCHES,), IMAGE), ids])
    labels = ids.masked_fill(ids == IMAGE, -100)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, "pixel_values": image}


def batch(family: str, n: int = 8, seed: int = 1) -> dict[str, torch.Tensor]:
    """One collated batch."""
    return tf.default_data_collator(rows(family, n, seed=seed))


def begun(model: nn.Module, family: str) -> nn.Module:
    """The model, with the ranks and factors that its method chooses from batches, where it chooses any."""
    if starter_of(model.peft_config["default"]) is not None:
        trimtab.initialize_ranks(model, [batch(family, seed=seed) for seed in range(20)])
    return model


def logits(model: nn.Module, family: str) -> torch.Tensor:
    """Logits of the fixed batch, in eval mode; the mode is put back."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        out = model(**batch(family)).logits
    model.train(was_training)
    return out
