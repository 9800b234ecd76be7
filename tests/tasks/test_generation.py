"""Generated answers: batching changes nothing, a run goes on where it stopped, and settings are checked."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from trimtab.app.tasks import get_task
from trimtab.app.tasks.encoding import Padder
from trimtab.app.tasks.generation import Decoding, Question, fingerprint, generate
from trimtab.errors import ConfigError

TEXTS = ["the cat", "a dog ran home again", "so", "it is very good", "mat"]


def questions(texts=TEXTS):
    tokenizer = byte_tokenizer()
    return [
        Question(f"test/{i}", {"input_ids": ids, "attention_mask": [1] * len(ids)})
        for i, ids in enumerate(tokenizer(texts)["input_ids"])
    ]


def answers(model, decoding=None, asked=None, **more):
    side = "right" if model.config.is_encoder_decoder else "left"
    decoding = decoding or Decoding(max_new_tokens=12, batch_size=3)
    return generate(
        model,
        byte_tokenizer(),
        asked or questions(),
        decoding,
        lambda rows: Padder(0)(rows, side=side),
        ends=[2],
        **more,
    )


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "bart", "rwkv"])
def test_a_batch_of_padded_prompts_is_answered_as_each_prompt_alone(kind):
    model = byte_model(kind)
    together = answers(model)
    alone = [answers(model, Decoding(max_new_tokens=12, batch_size=1), [one])[0] for one in questions()]
    assert together == alone
    assert kind == "bart" or len({text for (text,) in together}) > 1  # a tiny random BART says one thing only


def test_an_answer_ends_before_the_end_token():
    model = byte_model()
    free = answers(model)[0][0]
    ids = byte_tokenizer()(free)["input_ids"]
    end = next(i for i, token in enumerate(ids) if i > 2)
    stopped = generate(
        model,
        byte_tokenizer(),
        questions()[:1],
        Decoding(max_new_tokens=12),
        lambda rows: Padder(0)(rows, side="left"),
        ends=[2, ids[end]],
    )
    assert stopped[0][0] == byte_tokenizer().decode(ids[: ids.index(ids[end])])


def test_an_answer_ends_before_a_stop_text_and_costs_no_more_than_that():
    class Counting(torch.nn.Module):
        """Says the alphabet, letter by letter."""

        config = SimpleNamespace(is_encoder_decoder=False)
        weight = torch.nn.Parameter(torch.zeros(1))

        def parameters(self, recurse=True):
            return iter([self.weight])

        def generate(self, input_ids, attention_mask, generation_config, stopping_criteria):
            letters = byte_tokenizer()("abcdefghijklmnopqrstuvwxyz")["input_ids"]
            for n in range(generation_config.max_new_tokens):
                input_ids = torch.cat([input_ids, torch.full((len(input_ids), 1), letters[n])], dim=1)
                if stopping_criteria(input_ids, None).all():
                    break
            self.steps = n + 1
            return input_ids

    model = Counting()
    assert answers(model, Decoding(max_new_tokens=20, stop=("ef", "z")))[:2] == [["abcd"], ["abcd"]]
    assert model.steps == 6


def test_an_interrupted_run_goes_on_and_ends_as_an_unbroken_one(tmp_path):
    class Fails(Exception):
        pass

    model = byte_model()
    for decoding in (
        Decoding(max_new_tokens=6, batch_size=2),
        Decoding(max_new_tokens=6, batch_size=2, samples=3, others={"temperature": 2.0}),
    ):
        file = tmp_path / f"{decoding.samples}.jsonl"
        unbroken = answers(model, decoding, file=tmp_path / f"{decoding.samples}_unbroken.jsonl")
        real, calls = type(model).generate, []

        def generate_until_power_cut(*args, real=real, calls=calls, **kwargs):
            calls.append(1)
            if len(calls) == 2:
                raise Fails
            return real(model, *args, **kwargs)

        model.generate = generate_until_power_cut
        with pytest.raises(Fails):
            answers(model, decoding, file=file)
        with file.open("a") as torn:
            torn.write('{"id": "test/1", "sam')
        assert answers(model, decoding, file=file) == unbroken
        batches = -(-len(TEXTS) * decoding.samples // 2)
        assert len(calls) == 1 + batches  # the failed one, and every batch once
        assert answers(model, decoding, file=file) == unbroken
        assert len(calls) == 1 + batches
        assert all(json.loads(line) for line in file.read_text().splitlines())
        del model.generate


def test_samples_differ_but_do_not_depend_on_or_touch_the_generator_outside():
    model, decoding = byte_model(), Decoding(max_new_tokens=8, samples=4, others={"temperature": 2.0})
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = answers(model, decoding)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert answers(model, decoding) == first
    assert len(set(first[0])) > 1
    assert answers(model, Decoding(max_new_tokens=8, samples=4, seed=1, others={"temperature": 2.0})) != first


def test_answers_of_another_model_prompt_or_setting_are_not_taken(tmp_path):
    base = byte_model()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    decoding, asked = Decoding(max_new_tokens=4), questions()[:1]
    file = tmp_path / "answers.jsonl"

    def lines(model, decoding=decoding, asked=asked):
        answers(model, decoding, asked, file=file)
        return len(file.read_text().splitlines())

    assert lines(model) == 1
    assert lines(model) == 1
    assert lines(model, Decoding(max_new_tokens=4, batch_size=1)) == 1  # does not change an answer
    assert lines(model, Decoding(max_new_tokens=5)) == 2
    assert lines(model, asked=[Question(asked[0].id, questions()[1].columns)]) == 3
    with model.disable_adapter():
        assert lines(model) == 4
    with torch.no_grad():
        base.model.layers[1].self_attn.q_proj.lora_B["default"].weight += 1e-3
    assert lines(model) == 5
    assert lines(model) == 5


def test_fingerprints_tell_models_apart():
    assert fingerprint(byte_model()) == fingerprint(byte_model())
    assert fingerprint(byte_model()) != fingerprint(byte_model("gpt2"))
    changed = byte_model()
    with torch.no_grad():
        changed.model.norm.weight[0] += 1e-4
    assert fingerprint(changed) != fingerprint(byte_model())


@pytest.mark.filterwarnings("error")
def test_a_checkpoints_own_sampling_settings_do_not_leak_into_greedy_answers():
    model = byte_model()
    greedy = answers(model)
    model.generation_config.update(do_sample=True, temperature=5.0, top_k=3, repetition_penalty=3.0)
    assert answers(model) == greedy


@pytest.mark.parametrize("kind", ["llama", "bart"])
def test_a_checkpoints_own_lengths_and_bans_do_not_count_either(kind):
    """facebook/bart-large-cnn writes 56 tokens at least, and no three twice."""
    model = byte_model(kind)
    plain = [answers(model, decoding) for decoding in DECODINGS]
    model.generation_config.update(
        min_length=40, min_new_tokens=12, no_repeat_ngram_size=1, encoder_no_repeat_ngram_size=1,
        length_penalty=-3.0, early_stopping=True, encoder_repetition_penalty=3.0, num_beams=4,
    )  # fmt: skip
    assert [answers(model, decoding) for decoding in DECODINGS] == plain


DECODINGS = (Decoding(max_new_tokens=12), Decoding(max_new_tokens=12, others={"num_beams": 3}))


def test_layers_get_their_mode_back_and_progress_is_told():
    model = byte_model().train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    told = []
    bar = SimpleNamespace(advance=told.append, close=lambda: told.append("closed"))
    answers(model, make_bar=lambda total, name: told.append((total, name)) or bar)
    assert [module.training for module in model.modules()] == before
    assert told == [(5, "answers"), 3, 2, "closed"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"max_new_tokens": 0}, r"task\.generation\.max_new_tokens=0: a whole number, at least 1"),
        ({"samples": True}, r"task\.generation\.samples=True: a whole number"),
        ({"stop": 3}, r"task\.generation\.stop=3: a text, or a list"),
        ({1: 4}, r"task\.generation\.1=4: no such setting\."),
        ({"num_beam": 4}, r"task\.generation\.num_beam=4: no such setting\. Did you mean 'num_beams'\?"),
        ({"num_return_sequences": 2}, r"num_return_sequences=2: samples says how many"),
        ({"max_length": 20}, r"max_length=20: max_new_tokens says how long"),
        ({"eos_token_id": 5}, r"eos_token_id=5: tokenizer and model say which it is"),
        ({"use_cache": False}, r"use_cache=False: changes no answer"),
        ({"do_sample": "no"}, r"task\.generation\.do_sample='no': true or false"),
        ({"temperature": 0.7}, r"task\.generation\.temperature=0\.7: says how answers are drawn, and none is"),
        ({"do_sample": True, "top_p": 2}, r"task\.generation\.top_p=2: above 0 and at most 1"),
        ({"num_beams": 0}, r"num_beams=0: a whole number, at least 1"),
        ({"samples": 2, "temperature": 0}, r"task\.generation\.temperature=0: a number above 0"),
        ({"temperature": "hot"}, r"task\.generation\.temperature='hot': a number above 0"),
        ([1], r"task\.generation=\[1\]: a mapping"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        Decoding.read(settings)


def test_settings_go_over_the_tasks_defaults():
    options = {"max_new_tokens": 5, "num_beams": 2, "stop": "END"}
    read = Decoding.read(options, max_new_tokens=9, batch_size=2, stop=("X",))
    assert read == Decoding(max_new_tokens=5, batch_size=2, stop=("END",), others={"num_beams": 2})
    assert read.config([2], 0).num_beams == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repetition_penalty": -1}, "has to be a strictly positive float"),
        ({"num_beams": 2, "early_stopping": "maybe"}, "must be a boolean or 'never'"),
        ({"num_beams": 2, "length_penalty": "long"}, "unsupported operand"),
        ({"cache_implementation": "nonsense"}, "Invalid `cache_implementation`"),
    ],
)
def test_what_generate_refuses_is_refused_before_training(tmp_path, settings, words):
    rows = [{"question": "Hi", "answer": 2}] * 2
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    task = get_task({"name": "math", "generation": settings})
    with pytest.raises(ConfigError, match=words):
        task.prepare(task.load_data({"train": file, "test": file}), byte_tokenizer(), byte_model())


def test_trying_the_settings_out_draws_nothing_from_the_run():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    Decoding.read({"do_sample": True, "temperature": 0.7, "num_beams": 2}).try_out([2], 0, 261)
    assert torch.equal(torch.rand(3), expected)
