"""Models that see and hear, in the stock Trainer: what is trained is what is saved, whatever their inputs are."""

import copy
import warnings

import peft
import pytest
import torch
import transformers as tf

import trimtab
from trimtab.errors import DataError
from trimtab.where import choose_own

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}


def _classifier():
    model = tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=16, patch_size=8, num_labels=3))
    batch = {"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 0])}
    return model, batch, "logits", ["classifier"]


def _detector():
    backbone = tf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8], depths=[1], out_features=["stage1"], layer_type="basic"
    )
    plain = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    model = tf.DetrForObjectDetection(
        tf.DetrConfig(**plain, **SPEECH, backbone_config=backbone, num_queries=5, num_labels=3)
    )
    labels = [{"class_labels": torch.tensor([i % 3]), "boxes": torch.full((1, 4), 0.3)} for i in range(4)]
    return model, {"pixel_values": torch.randn(4, 3, 32, 32), "labels": labels}, "logits", None


def _writer():
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3, "vocab_size": 64}
    lengths = {"num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 20}
    config = tf.WhisperConfig(**SPEECH, **tokens, **lengths, begin_suppress_tokens=None)
    batch = {"input_features": torch.randn(4, 8, 40), "labels": torch.randint(5, 64, (4, 6))}
    return tf.WhisperForConditionalGeneration(config), batch, "logits", None


def _listener():
    """Its sound goes through a batch norm, which keeps running averages."""
    text = {**SIZES, "vocab_size": 64, "max_position_embeddings": 40, "pad_token_id": 1}
    sound = {"window_size": 4, "num_mel_bins": 32, "spec_size": 64, "patch_size": 4, "patch_stride": [4, 4]}
    sound |= {"hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [2, 2], "num_attention_heads": [2, 2]}
    sound |= {"num_hidden_layers": 2}
    model = tf.ClapModel(tf.ClapConfig(text_config=text, audio_config=sound, projection_dim=16))
    batch = {"input_ids": torch.randint(5, 64, (4, 6)), "input_features": torch.randn(4, 1, 64, 32)}
    return model, {**batch, "return_loss": True}, "logits_per_text", ["batch_norm"]


MODELS = {"sees": _classifier, "detects": _detector, "writes": _writer, "listens": _listener}
TARGETS = {"listens": ["query", "value"]}


class _Asking(tf.TrainerCallback):
    """Generates in the middle of training, as people do to look at it."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if isinstance(model.get_base_model(), tf.WhisperForConditionalGeneration):
            model.generate(input_features=torch.zeros(1, 8, 40), max_new_tokens=2)


def train(out, kind, modules_to_save, resume=None):
    torch.manual_seed(0)
    model, batch, output, _ = MODELS[kind]()
    base = copy.deepcopy(model)
    config = trimtab.TrimConfig(
        r=4,
        target_modules=TARGETS.get(kind, ["q_proj", "v_proj"]),
        modules_to_save=modules_to_save,
        rank=trimtab.SalientLoRA(target_r=2),
        freeze=trimtab.AFLoRA(),
    )
    trainer = tf.Trainer(
        model=peft.get_peft_model(model, config),
        train_dataset=[0] * 8,
        data_collator=lambda rows: batch,
        callbacks=[trimtab.TrimCallback(), _Asking()],
        args=tf.TrainingArguments(
            str(out),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=1,
            learning_rate=1e-2,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        ),
    )
    trainer.train(resume_from_checkpoint=resume)
    with torch.no_grad():
        return trainer.model, base, batch, trainer.model.eval()(**batch)[output]


@pytest.mark.parametrize("kind", MODELS)
def test_what_was_trained_is_what_stock_peft_loads_and_what_a_resumed_run_ends_with(tmp_path, kind):
    output, saved = MODELS[kind]()[2:]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*running averages")
        model, base, batch, trained = train(tmp_path, kind, saved)
        resumed = train(tmp_path, kind, saved, resume=str(tmp_path / "checkpoint-3"))[-1]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**batch)[output], trained, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(trained, _without(again, batch, output), atol=1e-6)
    assert torch.equal(resumed, trained)


def _without(model, batch, output):
    with model.disable_adapter():
        return model(**batch)[output]


def test_running_averages_that_no_adapter_holds_are_told(tmp_path):
    with pytest.warns(UserWarning, match=r"running averages of .*audio_encoder\.batch_norm: training changes them"):
        train(tmp_path, "listens", None)


def test_a_decoder_that_reads_no_tokens_is_chosen_in_by_what_reads_no_hidden_states():
    model, batch, *_ = _detector()
    with pytest.raises(DataError, match=r"decoder reads no tokens \(object queries.*: choose by gradient"):
        trimtab.layer_similarity(model, [batch])
    assert choose_own("gradient", model, {"ratio": 0.5}, [batch]).stacks.keys() == {"encoder.layers", "decoder.layers"}
