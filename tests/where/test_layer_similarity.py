"""layer_similarity on real forward passes of tiny models of every family."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn

import tiny
from test_sites import llava_config
from trimtab.errors import ConfigError, DataError, ModelError, SelectionError
from trimtab.where.cka import layer_similarity, linear_cka, select_layers
from trimtab.where.controls import uniform
from trimtab.where.influence import influence
from trimtab.where.pooling import POOLS, _positions, pool_rows

PAD, LENGTH = 0, 7


def text(n=24, seed=0, pad="right"):
    """Rows of 3 to 7 tokens, padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, tiny.VOCAB, (n, LENGTH), generator=generator)
    tokens = torch.randint(3, LENGTH + 1, (n, 1), generator=generator)
    at = torch.arange(LENGTH)
    mask = at < tokens if pad == "right" else at >= LENGTH - tokens
    return {"input_ids": ids.masked_fill(~mask, PAD), "attention_mask": mask.long()}


def batches(data, size):
    n = len(data["input_ids"])
    return [{k: v[i : i + size] for k, v in data.items()} for i in range(0, n, size)]


def model_of(family, scale=8.0):
    """Float64, so that the forward pass is the same to 1e-13 however rows are batched; weights large enough to act."""
    model = tiny.build(family).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
    return model


def with_labels(data, family):
    if tiny.FAMILIES[family].task_type != "SEQ_2_SEQ_LM":
        return data
    target = text(len(data["input_ids"]), seed=1)
    return data | {"labels": target["input_ids"].masked_fill(target["attention_mask"] == 0, -100)}


def pooled(hidden, mask, pool):
    rows = []
    for h, m in zip(hidden, mask.bool()):
        tokens = h[m]
        rows.append({"cls": tokens[0], "last": tokens[-1], "mean": tokens.mean(0)}[pool])
    return torch.stack(rows).detach().numpy()


@pytest.mark.parametrize("pool", ["last", "cls", "mean"])
@pytest.mark.parametrize(
    ("family", "pad"),
    [
        *((family, pad) for family in ("bert", "deberta", "gpt2", "llama") for pad in ("right", "left")),
        ("gemma2", "right"),  # transformers' eager attention gives NaN for left padding in float64
    ],
)
def test_scores_are_those_of_the_models_own_hidden_states(family, pad, pool):
    model, data = model_of(family), text(pad=pad)
    hidden = model(**data, output_hidden_states=True).hidden_states
    rows = [pooled(h, data["attention_mask"], pool) for h in hidden]
    want = [linear_cka(x, y) for x, y in pairwise(rows)]
    for size in (24, 5):
        got = layer_similarity(model, batches(data, size), pool=pool, final_norm="include")
        np.testing.assert_allclose(got.cka, want, atol=1e-9)
        assert got.n == 24
    plain = layer_similarity(model, batches(data, 24), pool=pool)
    np.testing.assert_allclose(plain.cka[:-1], want[:-1], atol=1e-9)
    has_final_norm = family in ("gpt2", "llama", "gemma2")
    assert (abs(plain.cka[-1] - want[-1]) > 1e-9) == has_final_norm


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_an_encoder_decoder_is_scored_in_both_stacks(family):
    model, data = model_of(family, 2.0), with_labels(text(), family)
    out = model(**data, output_hidden_states=True)
    labels = data["labels"]
    masks = {"encoder": data["attention_mask"], "decoder": (labels != -100) & (labels != PAD)}
    got = layer_similarity(model, batches(data, 5), pool="last", final_norm="include")
    assert list(got.stacks) == [f"{part}.{'block' if family == 't5' else 'layers'}" for part in masks]
    for (part, mask), (_, stack) in zip(masks.items(), got.stacks.items()):
        rows = [pooled(h, mask, "last") for h in getattr(out, f"{part}_hidden_states")]
        np.testing.assert_allclose(stack.cka, [linear_cka(x, y) for x, y in pairwise(rows)], atol=1e-9)


@pytest.mark.parametrize("estimator", ["biased", "unbiased"])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
@pytest.mark.parametrize("n", [20, 33, 100])
def test_the_batch_size_changes_nothing(family, estimator, n):
    model, data = model_of(family, 2.0), with_labels(text(n), family)
    found = []
    for size in (1000, 16, 3):
        got = layer_similarity(model, batches(data, size), pool="mean", estimator=estimator)
        found.append([v for s in got.stacks.values() for v in s.cka])
    np.testing.assert_allclose(found, np.broadcast_to(found[0], np.shape(found)), rtol=0, atol=1e-12)


def test_nan_on_padding_does_no_harm():
    hidden, mask = torch.ones(2, 3, 4), torch.tensor([[True, True, False], [False, True, True]])
    hidden[~mask] = float("nan")
    for pool in POOLS:
        assert torch.equal(pool_rows(hidden, mask, pool), torch.ones(2, 4, dtype=pool_rows(hidden, mask, pool).dtype))


def test_padding_is_dynamic():
    model = model_of("bert")
    data = text(30)
    short = []
    for batch in batches(data, 4):
        longest = int(batch["attention_mask"].sum(1).max())
        short.append({k: v[:, :longest] for k, v in batch.items()})
    whole = layer_similarity(model, batches(data, 30), pool="cls")
    np.testing.assert_allclose(layer_similarity(model, short, pool="cls").cka, whole.cka, atol=1e-11)


def test_only_the_first_samples_are_read_when_asked():
    model, data = model_of("llama"), text(40)
    some = layer_similarity(model, batches(data, 7), samples=20)
    first = layer_similarity(model, [{k: v[:20] for k, v in data.items()}])
    assert some.n == 20
    np.testing.assert_allclose(some.cka, first.cka, atol=1e-12)
    drawn = []
    layer_similarity(model, (drawn.append(b) or b for b in batches(data, 7)), samples=20)
    assert len(drawn) == 3


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_language_model_head_never_runs_and_each_block_runs_once_a_batch(family):
    model = tiny.build(family)
    calls = {}

    def watch(name, module):
        if module is not None:
            module.register_forward_hook(lambda *_: calls.__setitem__(name, calls.get(name, 0) + 1))

    watch("head", model.get_output_embeddings())
    watch("classifier", getattr(model, "classifier", None))
    from trimtab.host.sites import find_stacks

    for stack in find_stacks(model).values():
        for i, block in enumerate(stack.blocks):
            watch(f"{stack.path}.{i}", block)
    layer_similarity(model, batches(with_labels(text(), family), 12))
    assert "head" not in calls
    assert "classifier" not in calls
    assert set(calls.values()) == {2}


def test_the_model_is_left_as_it_was():
    model = tiny.build("bert").train()
    model.bert.encoder.layer[1].eval()  # a part that the user froze in evaluation mode
    modes = [m.training for m in model.modules()]
    weights = copy.deepcopy(model.state_dict())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    random_state = torch.get_rng_state()
    layer_similarity(model, batches(text(), 8), pool="cls")
    with pytest.raises(DataError):
        layer_similarity(model, [{"ids": torch.ones(2, 2)}])
    assert [m.training for m in model.modules()] == modes
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_dropout_is_off_during_the_pass():
    config = copy.deepcopy(tiny.build("bert").config)
    config.hidden_dropout_prob = 0.5
    model = tf.BertModel(config).train()
    assert layer_similarity(model, batches(text(), 8)) == layer_similarity(model, batches(text(), 8))


def test_layer_0_of_a_cls_pooled_encoder_is_undefined_and_says_so():
    scores = layer_similarity(model_of("bert"), batches(text() | {"input_ids": _with_cls(text())}, 8), pool="cls")
    assert scores.undefined == (True, False, False, False)
    assert scores.cka[0] == 0.0
    assert any("encoder.layer: layer 0 undefined" in w for w in scores.warnings)
    assert select_layers(scores, count=2).layers[0] != 0


def _with_cls(data):
    ids = data["input_ids"].clone()
    ids[:, 0] = 5
    return ids


def test_a_decoder_whose_samples_mostly_end_in_one_token_has_an_undefined_layer_0():
    data = text(32)
    last = data["attention_mask"].sum(1) - 1
    data["input_ids"][data["input_ids"] == 9] = 10
    data["input_ids"][torch.arange(20), last[:20]] = 9  # the newline before eos in 20 of 32 samples
    scores = layer_similarity(model_of("llama"), batches(data, 8), pool="last")
    assert scores.undefined == (True, False, False, False)
    assert 0 < scores.cka[0] < 1  # the number looks like any other: only the flag tells
    assert 0 not in select_layers(scores, count=3).layers
    data["input_ids"][torch.arange(16, 20), last[16:20]] = torch.arange(20, 24)  # 16 of 32: not more than half
    assert not any(layer_similarity(model_of("llama"), batches(data, 8), pool="last").undefined)


def test_few_samples_with_the_biased_estimator_give_a_warning():
    model = model_of("bert")
    (warning,) = layer_similarity(model, batches(text(20), 8)).warnings
    assert "n=20 samples for d=32 features" in warning
    assert not layer_similarity(model, batches(text(20), 8), estimator="unbiased").warnings
    assert not layer_similarity(model, batches(text(40), 8)).warnings


def test_a_llava_is_scored_in_its_language_model_only():
    torch.manual_seed(0)
    model = tf.LlavaForConditionalGeneration(llava_config()).double()
    ids = torch.randint(3, 60, (6, 9))
    ids[:, 1:5] = 63  # four image tokens
    data = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(6, 3, 8, 8, dtype=torch.float64),
        "labels": ids,
    }
    hidden = model(**data, output_hidden_states=True).hidden_states
    rows = [h[:, -1].detach() for h in hidden]
    got = layer_similarity(model, batches(data, 4), final_norm="include")
    assert list(got.stacks) == ["language_model.layers"]
    np.testing.assert_allclose(got.cka, [linear_cka(x, y) for x, y in pairwise(rows)], atol=1e-9)


def test_an_encoder_decoder_made_of_two_models_is_scored():
    from test_sites import encoder_decoder_config

    config = encoder_decoder_config()
    config.decoder_start_token_id, config.pad_token_id = 2, PAD
    model = tf.EncoderDecoderModel(config).double()
    data = with_labels(text(), "t5")
    got = layer_similarity(model, batches(data, 8))
    assert list(got.stacks) == ["encoder.encoder.layer", "decoder.bert.encoder.layer"]


def test_a_classifier_with_a_decoder_reads_its_input_again():
    config = tiny.build("bart").config
    model = tf.BartForSequenceClassification(config).double().eval()
    data = text() | {"labels": torch.zeros(24, dtype=torch.long)}
    from transformers.models.bart.modeling_bart import shift_tokens_right

    shifted = shift_tokens_right(data["input_ids"], PAD, 2)
    hidden = model.model(
        input_ids=data["input_ids"],
        attention_mask=data["attention_mask"],
        decoder_input_ids=shifted,
        output_hidden_states=True,
    ).decoder_hidden_states
    rows = [pooled(h, data["attention_mask"], "last") for h in hidden]
    got = layer_similarity(model, batches(data, 8)).stacks["decoder.layers"].cka
    np.testing.assert_allclose(got, [linear_cka(x, y) for x, y in pairwise(rows)], atol=1e-9)


def test_a_classifier_that_starts_from_a_rows_own_last_token_needs_no_start_token():
    config = tf.MBartConfig(**tiny.build("bart").config.to_dict() | {"decoder_start_token_id": None})
    model, data = tf.MBartForSequenceClassification(config).double().eval(), text()
    assert config.decoder_start_token_id is None
    hidden = model.model(**data, output_hidden_states=True).decoder_hidden_states
    rows = [pooled(h, data["attention_mask"], "last") for h in hidden]
    got = layer_similarity(model, batches(data, 8)).stacks["decoder.layers"].cka
    np.testing.assert_allclose(got[:-1], [linear_cka(x, y) for x, y in pairwise(rows)][:-1], atol=1e-9)


def time_first(kind):
    """Models whose layers see (t, b, d)."""
    torch.manual_seed(0)
    if kind == "xlnet":
        config = tf.XLNetConfig(vocab_size=tiny.VOCAB, d_model=32, n_layer=4, n_head=2, d_inner=48, dropout=0.0)
        return tf.XLNetForSequenceClassification(config).double().eval()
    sizes = dict(d_model=32, encoder_layers=3, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=64)
    tokens = dict(src_vocab_size=tiny.VOCAB, tgt_vocab_size=tiny.VOCAB, langs=["en", "de"], pad_token_id=0)
    return tf.FSMTForConditionalGeneration(tf.FSMTConfig(**sizes, **heads, **tokens)).eval()  # it knows no float64


@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("kind", ["xlnet", "fsmt"])
def test_where_layers_see_time_first_a_row_of_scores_is_still_a_row_of_the_batch(kind, pool):
    model, data = time_first(kind), text(2 * LENGTH)
    if kind == "fsmt":
        data["decoder_input_ids"] = text(2 * LENGTH, seed=1)["input_ids"]
    with torch.no_grad():
        out = model(**data, output_hidden_states=True)
    states = out.hidden_states if kind == "xlnet" else out.encoder_hidden_states
    rows = [pooled(h, data["attention_mask"], pool) for h in states]
    assert rows[0].shape == (2 * LENGTH, 32)
    for size in (LENGTH, 5):  # LENGTH rows of LENGTH tokens: nothing in the shapes tells them apart
        found = next(iter(layer_similarity(model, batches(data, size), pool=pool).stacks.values())).cka
        np.testing.assert_allclose(found[:2], [linear_cka(x, y) for x, y in pairwise(rows)][:2], atol=1e-5)


@pytest.mark.parametrize("cls, config", [(tf.XLMModel, tf.XLMConfig), (tf.FlaubertModel, tf.FlaubertConfig)])
def test_attentions_in_a_list_of_their_own_are_not_taken_for_layers_that_can_be_compared(cls, config):
    model = cls(config(n_words=tiny.VOCAB, emb_dim=32, n_layers=2, n_heads=2))
    for measure in (layer_similarity, influence):
        with pytest.raises(ModelError, match=r"attentions: .* choose by gradient, uniform, first, last or a mask"):
            measure(model, [text()])
    assert uniform(model, count=1).stacks == {"attentions": "01", "ffns": "01"}


def test_decoder_inputs_of_the_batch_come_before_labels():
    model, data = model_of("t5", 2.0), with_labels(text(), "t5")
    start = torch.zeros_like(data["labels"][:, :1])
    own = torch.cat([start, data["labels"][:, :-1].clamp(min=0)], 1)
    mask = (data["labels"] != -100).long()
    explicit = text() | {"decoder_input_ids": own, "decoder_attention_mask": mask}
    a, b = layer_similarity(model, [data]), layer_similarity(model, [explicit])
    np.testing.assert_allclose(a.stacks["decoder.block"].cka, b.stacks["decoder.block"].cka, atol=1e-11)


def test_adapters_take_part_as_they_stand():
    base = model_of("bert")
    plain = layer_similarity(base, batches(text(), 8))
    model = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["query"], r=2)).double()
    assert layer_similarity(model, batches(text(), 8)) == plain  # B is zero
    torch.nn.init.normal_(model.get_base_model().bert.encoder.layer[2].attention.self.query.lora_B["default"].weight)
    changed = layer_similarity(model, batches(text(), 8)).cka
    assert changed[:2] == plain.cka[:2]
    assert changed[2] != plain.cka[2]


# What is refused


def test_one_sample_is_refused():
    with pytest.raises(SelectionError, match=r"where\.samples=1: biased CKA needs at least 2 samples"):
        layer_similarity(tiny.build("bert"), batches(text(1), 1))
    with pytest.raises(SelectionError, match=r"where\.samples=3: unbiased CKA needs at least 4"):
        layer_similarity(tiny.build("bert"), batches(text(3), 1), estimator="unbiased")
    with pytest.raises(SelectionError, match=r"where\.samples=0"):
        layer_similarity(tiny.build("bert"), [])


def test_not_a_number_is_refused_with_the_layer_it_began_in():
    model = tiny.build("bert")
    model.bert.encoder.layer[2].output.dense.bias.data[0] = float("nan")
    with pytest.raises(SelectionError, match=r"encoder\.layer: what leaves layer 2 has NaN"):
        layer_similarity(model, batches(text(), 8))
    model.bert.embeddings.word_embeddings.weight.data.fill_(float("inf"))
    with pytest.raises(SelectionError, match="what enters layer 0 has NaN or infinite"):
        layer_similarity(model, batches(text(), 8))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"input_ids": None}, "input_ids (or pixel_values, input_features, input_values) is missing"),
        ({"attention_mask": torch.zeros(24, LENGTH)}, "no token at all"),
        ({"attention_mask": torch.ones(24, LENGTH, LENGTH)}, "one value per sample and position"),
    ],
)
def test_a_batch_that_cannot_be_read_is_refused(change, says):
    data = {k: v for k, v in (text() | change).items() if v is not None}
    with pytest.raises(DataError) as error:
        layer_similarity(tiny.build("bert"), [data])
    assert says in str(error.value)


def test_a_batch_that_is_no_mapping_is_refused():
    with pytest.raises(DataError, match="a mapping such as"):
        layer_similarity(tiny.build("bert"), [torch.ones(2, 2)])


def test_an_encoder_decoder_without_labels_is_refused():
    with pytest.raises(DataError, match=r"labels \(b, t\) or decoder_input_ids"):
        layer_similarity(tiny.build("t5"), [text()])


def test_hidden_states_that_do_not_line_up_with_the_mask_are_refused():
    model = tiny.build("bert")
    model.bert.embeddings.register_forward_hook(lambda m, a, out: torch.cat([out, out], 1))
    with pytest.raises((SelectionError, RuntimeError, ValueError)):
        layer_similarity(model, [text()])


def test_layers_that_hold_several_streams_are_refused_with_what_reads_none():
    sizes = dict(hidden_size=32, d_model=32, decoder_layers=2, num_decoder_attention_heads=2, decoder_ffn_dim=48)
    config = tf.ProphetNetConfig(vocab_size=tiny.VOCAB, **sizes, ngram=2, is_decoder=True, is_encoder_decoder=False)
    with pytest.raises(SelectionError, match=r"choose by gradient, uniform, first, last or a mask"):
        layer_similarity(tf.ProphetNetForCausalLM(config), [text()])


def test_layers_that_share_weights_are_refused():
    config = tf.AlbertConfig(
        vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32
    )
    with pytest.raises(ModelError, match="share weights"):
        layer_similarity(tf.AlbertModel(config), [text()])


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = tiny.FAMILIES["bert"].build()
    with pytest.raises(ModelError, match="no weights"):
        layer_similarity(model, [text()])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"pool": "clss"}, "where.pool='clss': one of last, cls, mean. Did you mean 'cls'?"),
        ({"estimator": "unbaised"}, "Did you mean 'unbiased'?"),
        ({"final_norm": True}, "include or exclude"),
        ({"samples": 1}, "where.samples=1: at least 2"),
    ],
)
def test_settings_are_checked_before_anything_runs(settings, says):
    with pytest.raises(ConfigError) as error:
        layer_similarity(tiny.build("bert"), iter(()), **settings)
    assert says in str(error.value)


SMALL = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48)


def vision(seed=0):
    torch.manual_seed(seed)
    return (
        tf.ViTForImageClassification(tf.ViTConfig(**SMALL, image_size=16, patch_size=4, num_labels=2)).double().eval()
    )


def listening(seed=0):
    torch.manual_seed(seed)
    sizes = dict(vocab_size=32, conv_dim=(16, 16), conv_stride=(4, 4), conv_kernel=(8, 8), num_feat_extract_layers=2)
    more = dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2, apply_spec_augment=False)
    return tf.Wav2Vec2ForSequenceClassification(tf.Wav2Vec2Config(**SMALL, **sizes, **more)).double().eval()


@pytest.mark.parametrize("build, batch", [
    (vision, {"pixel_values": torch.randn(24, 3, 16, 16, dtype=torch.float64)}),
    (listening, {"input_values": torch.randn(24, 400, dtype=torch.float64)}),
])  # fmt: skip
def test_layers_that_see_or_hear_are_compared_over_all_patches_or_frames(build, batch):
    model = build()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    expected = [linear_cka(a.mean(1), b.mean(1)) for a, b in pairwise(states)]
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(10), slice(10, None))]
    for pool in (None, "mean"):
        found = layer_similarity(model, halves, pool)
        assert found.pool == "mean"
        # What leaves the last layer has gone through a final norm in some models.
        np.testing.assert_allclose(found.cka[:-1], expected[:-1], atol=1e-10)
    assert select_layers(found, 0.5).mask.count("1") == 2


def test_a_speech_model_s_encoder_and_decoder_are_compared():
    sizes = dict(encoder_layers=3, decoder_layers=3, encoder_ffn_dim=48, decoder_ffn_dim=48, d_model=32)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=20, num_mel_bins=8)
    tokens = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    config = tf.WhisperConfig(**sizes, **heads, **tokens)
    model = tf.WhisperForConditionalGeneration(config)
    batch = {"input_features": torch.randn(8, 8, 40), "labels": torch.randint(3, 60, (8, 6))}
    padded = batch | {"attention_mask": torch.ones(8, 40, dtype=torch.long)}
    assert list(layer_similarity(model, [batch]).stacks) == ["encoder.layers", "decoder.layers"]
    assert layer_similarity(model, [padded]).stacks == layer_similarity(model, [batch]).stacks


def test_a_classifier_of_a_speech_models_encoder_needs_no_decoder_inputs():
    sizes = dict(encoder_layers=3, encoder_ffn_dim=48, d_model=32, encoder_attention_heads=2, num_mel_bins=8)
    tokens = dict(vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = tf.WhisperForAudioClassification(tf.WhisperConfig(**sizes, **tokens, max_source_positions=20)).eval()
    assert model.config.is_encoder_decoder
    batch = {"input_features": torch.randn(8, 8, 40), "labels": torch.zeros(8, dtype=torch.long)}
    with torch.no_grad():
        states = model.encoder(batch["input_features"], output_hidden_states=True).hidden_states
    found = layer_similarity(model, [batch])
    expected = [linear_cka(a.mean(1), b.mean(1)) for a, b in pairwise(states)]
    np.testing.assert_allclose(found.cka[:-1], expected[:-1], atol=1e-5)


def test_speecht5_is_given_its_decoder_inputs_by_the_name_that_it_knows():
    sizes = dict(hidden_size=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, encoder_ffn_dim=48)
    more = dict(decoder_attention_heads=2, decoder_ffn_dim=48, conv_dim=(16, 16), conv_stride=(4, 4), vocab_size=64)
    more |= dict(conv_kernel=(8, 8), num_feat_extract_layers=2, num_conv_pos_embeddings=16)
    model = tf.SpeechT5ForSpeechToText(tf.SpeechT5Config(**sizes, **more, num_conv_pos_embedding_groups=2)).eval()
    batch = {"input_values": torch.randn(8, 600), "labels": torch.randint(3, 60, (8, 6))}
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).decoder_hidden_states
    expected = [linear_cka(a.mean(1), b.mean(1)) for a, b in pairwise(states)]
    found = layer_similarity(model, [batch]).stacks["decoder.wrapped_decoder.layers"].cka
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_decoder_starts_as_the_language_models_config_says_where_the_model_also_sees():
    text_config = tiny.build("bart").config
    vision = dict(embed_dim=[16] * 4, depths=[1] * 4, num_heads=[2] * 4, num_groups=[2] * 4, projection_dim=32)
    config = tf.Florence2Config(text_config=text_config, vision_config=vision, image_token_id=63)
    model, data = tf.Florence2ForConditionalGeneration(config).eval(), with_labels(text(), "bart")
    data["input_ids"] = data["input_ids"].clamp(max=62)
    found = layer_similarity(model, [data]).stacks
    with torch.no_grad():
        states = model(**data, output_hidden_states=True).decoder_hidden_states
    rows = [pooled(h, data["labels"] != -100, "last") for h in states]
    expected = [linear_cka(x, y) for x, y in pairwise(rows)]
    np.testing.assert_allclose(found["language_model.decoder.layers"].cka, expected, atol=1e-4)


def test_padding_of_sound_has_no_say():
    model = listening()
    mask = torch.ones(4, 400, dtype=torch.long)
    mask[1, 200:] = 0
    hidden = torch.randn(4, 23, 32)
    frames = _positions(model.wav2vec2, mask)(hidden)
    assert frames.sum(1).tolist() == [23, 11, 23, 23]  # as its convolutions have it
    assert _positions(nn.Identity(), mask)(torch.randn(4, 200, 32)).sum(1).tolist() == [200, 100, 200, 200]
    with pytest.raises(DataError, match="a sample has no token at all"):
        _positions(nn.Identity(), mask * torch.tensor([[1], [0], [1], [1]]))(torch.randn(4, 200, 32))
    with pytest.raises(DataError, match="7 positions a row; leave it out"):
        _positions(nn.Identity(), mask)(torch.randn(4, 7, 32))
