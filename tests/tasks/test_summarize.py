"""ROUGE by hand, long documents, and both kinds of model."""

import sys

import pytest

from tasks.stand_ins import Reciter, byte_model, byte_tokenizer, data_pack, decoder_tokenizer, write_jsonl
from trimtab.app.models import ModelSpec, load_config
from trimtab.app.tasks import get_task
from trimtab.app.tasks.data import DataSpec
from trimtab.app.tasks.summarize import by_sentences, first_tokens, rouge
from trimtab.errors import ConfigError, DataError

ROWS = [
    {"document": "The cat sat on the mat. It was warm.", "summary": "A cat sat."},
    {"document": "A dog ran home.", "summary": "A dog ran."},
]


def test_rouge_by_hand():
    (one,) = rouge(["the cat sat on the mat"], [["the cat lay on a mat"]])
    # Six words each; common: the (once), cat, on, mat: 4/6. Pairs: "the cat" of five: 1/5.
    assert one["rouge1"] == pytest.approx(4 / 6)
    assert one["rouge2"] == pytest.approx(1 / 5)
    assert one["rougeL"] == one["rougeLsum"] == pytest.approx(4 / 6)  # the cat on mat


def test_rouge_lsum_goes_by_sentences_and_rouge_l_does_not():
    (one,) = rouge(["It rained. Nobody came."], [["Nobody came. It rained."]])
    assert one["rougeL"] == pytest.approx(2 / 4)
    assert one["rougeLsum"] == pytest.approx(1.0)
    (one,) = rouge(["it rained\nnobody came"], [["nobody came\nit rained"]])
    assert one["rougeLsum"] == pytest.approx(1.0)


def test_each_kind_takes_its_best_reference():
    (one,) = rouge(["a b c d"], [["a c", "b x c d e f"]])
    # Reference 1: precision 2/4, recall 1, F 2/3; no pair. Reference 2: 3/4 and 3/6, F 0.6; "c d" of 3 and 5 pairs.
    assert one["rouge1"] == pytest.approx(2 / 3)
    assert one["rouge2"] == pytest.approx(2 * (1 / 3) * (1 / 5) / (1 / 3 + 1 / 5))


def test_words_are_stemmed_and_an_empty_summary_scores_nothing():
    assert rouge(["cats running"], [["cat run"]])[0]["rouge1"] == pytest.approx(1.0)
    assert rouge([""], [["cat"]])[0]["rougeLsum"] == 0.0


def test_sentences():
    assert by_sentences(" One. Two? 3.5 is three! ") == "One.\nTwo?\n3.5 is three!"
    assert by_sentences("One. Two\nThree. Four") == "One. Two\nThree. Four"


def evaluate(tmp_path, reply, rows, **settings):
    task = get_task({"name": "summarize", **settings})
    raw = task.load_data({"test": write_jsonl(tmp_path / "test.jsonl", rows)})
    tokenizer = byte_tokenizer()
    return task, task.evaluate(Reciter(tokenizer, reply), tokenizer, raw, "test", folder=tmp_path / "out")


def test_a_whole_evaluation_by_hand(tmp_path):
    prompts = []
    task, scores = evaluate(tmp_path, lambda prompt: prompts.append(prompt) or "A dog ran.", ROWS)
    # Row 1: "a" of three words: 1/3. Row 2: all.
    assert scores["rouge1"] == pytest.approx((1 / 3 + 1) / 2)
    assert scores["rouge2"] == pytest.approx(0.5)
    assert task.metric == "rougeL"
    assert any(
        "### Instruction:\nSummarize the article in one sentence.\n\n### Input:\nA dog ran home.\n\n" in prompt
        for prompt in prompts
    )
    assert '"summary": "A dog ran."' in (tmp_path / "out" / "test_scored.jsonl").read_text()


@pytest.mark.parametrize(
    ("row", "document", "references"),
    [
        ({"article": "D", "highlights": "S\nT", "id": "1"}, "D", ["S\nT"]),
        ({"source": ["D1.", "D2."], "target": ["S", "T"], "paper_id": "x"}, "D1. D2.", ["S", "T"]),
        ({"id": "1", "dialogue": "D", "summary": "S", "topic": "t"}, "D", ["S"]),
    ],
)
def test_published_forms_are_known_by_their_columns(tmp_path, row, document, references):
    task = get_task({"name": "summarize"})
    loaded = task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", [row])})["test"][0]
    assert loaded["messages"][0]["input"] == document
    assert loaded["messages"][1]["content"] == references[0]
    assert loaded["references"] == references


@pytest.mark.parametrize("split", ["train", "test"])
def test_words_that_stand_for_nothing_are_no_summary_and_a_list_in_a_cell_is_several(tmp_path, split):
    rows = [
        {"document": "D", "summary": "N/A"},
        {"document": "nan", "summary": "S"},
        {"document": "E", "summary": "['S', 'T']"},
    ]
    task = get_task({"name": "summarize"})
    raw = task.load_data(
        {split: write_jsonl(tmp_path / "t.jsonl", rows), "validation": write_jsonl(tmp_path / "v.jsonl", rows)}
    )
    assert raw[split]["references"][:] == [["S", "T"]]
    for lack in ("document", "summary"):
        assert f"{split}: 1 of 3 rows have no {lack} and were left out" in task.notes
    spec = DataSpec.read({"test": str(tmp_path / "t.jsonl")}, ("test",))
    assert task.ask(spec)[0::2] == (3, [0, 2])  # each answer stands beside its row


def test_rows_about_one_document_are_one_row_with_several_references(tmp_path):
    rows = [{"dialogue": "D", "summary": "S"}, {"dialogue": "E", "summary": "U"}, {"dialogue": "D", "summary": "T"}]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    raw = get_task({"name": "summarize"}).load_data({"train": file, "test": file})
    assert raw["test"]["references"][:] == [["S", "T"], ["U"]]
    assert len(raw["train"]) == 3


def test_a_few_of_the_documents_keep_all_their_references(tmp_path):
    rows = [{"dialogue": f"D{i % 5}", "summary": f"{i}"} for i in range(15)]
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    task = get_task({"name": "summarize"})
    raw = task.load_data({"train": file, "test": file, "max_samples": 3})
    assert (len(raw["train"]), len(raw["test"])) == (3, 3)
    assert [len(references) for references in raw["test"]["references"]] == [3, 3, 3]
    assert "test: 3 of 5 rows kept, drawn (data.max_samples)" in task.notes


def test_columns_and_instruction_can_be_named(tmp_path):
    task = get_task({"name": "summarize", "document": "text", "summary": "short", "instruction": "Be brief."})
    raw = task.load_data({"test": write_jsonl(tmp_path / "t.jsonl", [{"text": "D", "short": "S"}])})
    asked = raw["test"][0]["messages"][0]
    assert {key: asked[key] for key in ("role", "content", "input")} == {
        "role": "user",
        "content": "Be brief.",
        "input": "D",
    }


def test_a_long_document_is_cut_and_nothing_else(tmp_path):
    rows = [{"document": "x" * 100, "summary": "s" * 50}] * 2
    file = write_jsonl(tmp_path / "t.jsonl", rows)
    task = get_task({"name": "summarize", "max_source_length": 10, "max_target_length": 5, "template": "plain"})
    raw = task.load_data({"train": file, "test": file})
    tokenizer = byte_tokenizer()
    row = task.prepare(raw, tokenizer, byte_model())["train"][0]
    assert tokenizer.decode(row["input_ids"]) == ("Summarize the article in one sentence.\n\nxxxxxxxxxxsssss</s>")
    row = task.prepare(raw, tokenizer, byte_model("t5"))["train"][0]
    assert (tokenizer.decode(row["input_ids"]), tokenizer.decode(row["labels"])) == ("summarize: xxxxxxxxxx", "sssss")


def test_text_is_cut_at_the_end_of_a_token_by_fast_and_slow_tokenizers():
    class Slow:
        is_fast = False

        def __call__(self, text, **_):
            return {"input_ids": text.split()}

        def decode(self, ids, **_):
            return " ".join(ids)

    text = "the  cat sat on"
    assert first_tokens(text, 2, decoder_tokenizer()) == "the  cat"
    assert first_tokens(text, 2, Slow()) == "the cat"
    assert first_tokens(text, 9, decoder_tokenizer()) == text


def test_only_t5_is_given_its_prefix(tmp_path):
    task = get_task({"name": "summarize"})
    messages = [{"role": "user", "content": "Do.", "input": "D"}, {"role": "assistant", "content": "S"}]
    for kind, expected in (("t5", "summarize: D"), ("bart", "D"), ("t5", "summarize: D")):
        load_config(ModelSpec(config={"model_type": kind}), task)
        assert task.source_text(messages) == expected
    task = get_task({"name": "summarize", "prefix": "tl;dr: "})
    load_config(ModelSpec(config={"model_type": "t5"}), task)
    assert task.source_text(messages) == "tl;dr: D"


@pytest.mark.parametrize("kind", ["llama", "t5", "bart"])
def test_real_rows_are_trained_and_scored_by_both_kinds_of_model(kind):
    folder = data_pack("scitldr")
    task = get_task(
        {
            "name": "summarize",
            "max_source_length": 40,
            "max_target_length": 16,
            "generation": {"max_new_tokens": 6, "num_beams": 2 if kind == "bart" else 1},
        }
    )
    raw = task.load_data(
        {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl"), "max_samples": 3}
    )
    model, tokenizer = byte_model(kind), byte_tokenizer()
    ready = task.prepare(raw, tokenizer, model)
    batch = task.collator(tokenizer)([ready["train"][i] for i in range(3)])
    assert model(**batch).loss > 0
    scores = task.evaluate(model, tokenizer, raw, "validation")
    assert set(scores) == {"rouge1", "rouge2", "rougeL", "rougeLsum"}
    assert all(0 <= value < 0.2 for value in scores.values())


@pytest.mark.parametrize(
    ("name", "split", "references"), [("xsum", "train", 1), ("scitldr", "test", 4), ("dialogsum", "test", 3)]
)
def test_a_reference_scores_one(name, split, references):
    task = get_task({"name": "summarize"})
    rows = task.load_data({"test": str(data_pack(name) / f"{split}.jsonl")})["test"].select(range(8))
    scores, _ = task.score(rows, [[own[-1]] for own in rows["references"]])
    assert scores == pytest.approx(dict.fromkeys(("rouge1", "rouge2", "rougeL", "rougeLsum"), 1.0))
    assert max(map(len, rows["references"])) <= references


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"metric": "rouge3"}, r"task\.metric='rouge3': not known"),
        ({"dataset": "xsumm"}, r"task\.dataset='xsumm': not known\. Did you mean 'xsum'\?"),
        ({"document": "a"}, r"task\.summary=None: name both columns"),
        ({"max_source_length": 0}, r"task\.max_source_length=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_task({"name": "summarize", **settings})


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": "D", "b": "S"}, "its columns a, b are in none of the forms known"),
        ({"document": " ", "summary": "S"}, "no row has a document"),
        ({"document": "D", "summary": [3]}, "row 1 has a summary that is no text"),
        ({"document": "D", "summary": None}, "no row has a summary"),
    ],
)
def test_wrong_rows_are_reported(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        get_task({"name": "summarize"}).load_data({"test": write_jsonl(tmp_path / "t.jsonl", [row])})


def test_no_data_and_no_named_set_is_refused():
    with pytest.raises(ConfigError, match=r"data\.train=None: give a file"):
        get_task({"name": "summarize"}).load_data()
    assert get_task({"name": "summarize", "dataset": "cnn_dailymail"}).hub_sources["test"] == (
        "abisee/cnn_dailymail",
        "3.0.0",
        "test",
    )


def test_a_missing_package_is_named_before_anything_is_trained(monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[summarize\]'"):
        rouge(["a"], [["a"]])
    monkeypatch.setattr("trimtab.app.tasks.summarize.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'trimtab\[summarize\]'"):
        get_task({"name": "summarize"})
