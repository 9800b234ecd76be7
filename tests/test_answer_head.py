"""A decoder trained by the command learns what the stock Trainer's does, from a head that sees answer tokens alone."""

import copy

import peft
import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import trimtab
from trimtab.app import answer_head
from trimtab.app.trainer import _answer_trainer

V, T = 211, 24
SIZES = dict(vocab_size=V, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             intermediate_size=48, pad_token_id=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
MODELS = {
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)),
    "llama, its embeddings tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    ),
    "gemma 2, which caps logits": lambda: tf.Gemma2ForCausalLM(
        tf.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)
    ),
    "granite, which scales logits": lambda: tf.GraniteForCausalLM(tf.GraniteConfig(**SIZES, logits_scaling=3.0)),
}
IN_PIECES = {"llama", "llama, its embeddings tied", "gpt2"}


def rows(n=24, learned=0.4):
    """Prompts without labels, answers with, on the left padded."""
    draw = torch.Generator().manual_seed(0)
    out = []
    for i in range(n):
        ids = torch.randint(3, V, (T,), generator=draw)
        mask = torch.ones_like(ids)
        mask[: i % 5] = 0
        labels = ids.clone()
        labels[: T - round(learned * T) - i % 3] = -100
        out.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return out


def trained(base, kind, tmp_path, data=None, targets="all-linear", saved=None, methods=None, **settings):
    torch.manual_seed(0)
    settings = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-2} | settings
    config = trimtab.TrimConfig(
        task_type="CAUSAL_LM", target_modules=targets, modules_to_save=saved, **copy.deepcopy(methods or {})
    )
    model = peft.get_peft_model(copy.deepcopy(base), config)
    args = tf.TrainingArguments(output_dir=str(tmp_path), report_to="none", save_strategy="no", logging_steps=1,
                                disable_tqdm=True, use_cpu=True, **settings)  # fmt: skip
    trainer = kind(model, args, train_dataset=data or rows(), callbacks=[trimtab.TrimCallback()] if methods else None)
    trainer.train()
    losses = [one["loss"] for one in trainer.state.log_history if "loss" in one]
    return trainer, losses, {name: p for name, p in model.named_parameters() if p.requires_grad}


def assert_alike(ours, theirs, tolerance=2e-4):
    for a, b in zip(ours[1], theirs[1], strict=True):
        assert a == pytest.approx(b, rel=tolerance)
    for name, parameter in theirs[2].items():
        torch.testing.assert_close(ours[2][name], parameter, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", MODELS)
def test_weights_and_losses_are_the_stock_trainers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(answer_head, "_PIECE", 7 * V)  # seven rows at a time
    torch.manual_seed(0)
    base = MODELS[name]()
    ours, theirs = (trained(base, kind, tmp_path) for kind in (_answer_trainer(), tf.Trainer))
    assert_alike(ours, theirs)
    head = ours[0].answer_head
    assert (head.is_same, head.is_last) == (True, name in IN_PIECES)


class _Logits(TorchDispatchMode):
    """The most rows of logits that were made at once."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.ndim > 1 and tensor.shape[-1] == V and func.is_view is False:
                self.most = max(self.most, tensor.numel() // V)
        return out


@pytest.mark.parametrize("name, most", [("llama", 7), ("gemma 2, which caps logits", 4 * 12)])
def test_logits_are_made_of_answer_tokens_and_where_nothing_follows_the_head_in_pieces(name, most, monkeypatch):
    monkeypatch.setattr(answer_head, "_PIECE", 7 * V)
    model = peft.get_peft_model(MODELS[name](), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in rows(1)[0]}
    head = answer_head.AnswerHead(model)
    assert head.serves(model, batch)
    with _Logits() as seen, head.on():
        model(**batch).loss.backward()
    assert 0 < seen.most <= most < batch["labels"].numel()


@pytest.mark.parametrize("name", ["llama", "gemma 2, which caps logits"])
def test_ranks_and_frozen_projections_are_decided_as_under_the_stock_trainer(name, tmp_path):
    """The controller finds its gradients, and the loss, by what the model returns."""
    torch.manual_seed(0)
    base = MODELS[name]()
    methods = {"rank": trimtab.SalientLoRA(target_r=4), "freeze": trimtab.AFLoRA()}
    settings = {"methods": methods, "num_train_epochs": 8, "learning_rate": 1e-3}
    ours, theirs = (trained(base, kind, tmp_path, **settings) for kind in (_answer_trainer(), tf.Trainer))
    ranks = [{n: tuple(p.shape) for n, p in m.model.named_parameters() if "lora_" in n} for m in (ours[0], theirs[0])]
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 8
    assert_alike(ours, theirs, tolerance=2e-3)


@pytest.mark.parametrize("targets, saved", [("all-linear", ["lm_head"]), (["q_proj", "lm_head"], None)])
def test_a_head_that_trains_learns_as_under_the_stock_trainer(targets, saved, tmp_path):
    torch.manual_seed(0)
    base = MODELS["llama"]()
    ours, theirs = (
        trained(base, kind, tmp_path, targets=targets, saved=saved) for kind in (_answer_trainer(), tf.Trainer)
    )
    assert ours[0].answer_head.is_same
    assert_alike(ours, theirs)


def test_a_loss_in_bfloat16_is_summed_in_float32(tmp_path):
    torch.manual_seed(0)
    base = MODELS["llama"]().to(torch.bfloat16)
    ours, theirs = (trained(base, kind, tmp_path, max_steps=2) for kind in (_answer_trainer(), tf.Trainer))
    assert ours[0].answer_head.is_last
    assert ours[1] == pytest.approx(theirs[1], rel=1e-3)


def test_a_model_whose_loss_is_another_keeps_its_own(tmp_path):
    """A mixture of experts adds the balance of its router."""
    torch.manual_seed(0)
    config = tf.MixtralConfig(**SIZES, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    base = tf.MixtralForCausalLM(config)
    ours, theirs = (
        trained(base, kind, tmp_path, targets=["q_proj"], max_steps=2) for kind in (_answer_trainer(), tf.Trainer)
    )
    assert ours[0].answer_head.is_same is False
    assert_alike(ours, theirs, tolerance=0)


def test_smoothed_labels_and_batches_without_any_label_go_the_stock_way(tmp_path):
    torch.manual_seed(0)
    base, data = MODELS["llama"](), rows(16)
    for row in data[4:8]:
        row["labels"] = torch.full_like(row["labels"], -100)
    for settings in ({"label_smoothing_factor": 0.1}, {"data": data, "gradient_accumulation_steps": 4}):
        ours, theirs = (trained(base, kind, tmp_path, **settings) for kind in (_answer_trainer(), tf.Trainer))
        assert_alike(ours, theirs)
