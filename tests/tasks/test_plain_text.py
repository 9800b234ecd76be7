"""Plain text: what becomes a row, that every token is learned, and that nothing is lost."""

import pytest

from tasks.stand_ins import byte_model, byte_tokenizer, tiny_config, write_jsonl
from trimtab.app import judging
from trimtab.app.tasks import get_task
from trimtab.errors import TrimtabError

TEXTS = ["The cat sat.", "A dog ran home.", "It is so."]


def prepared(tmp_path, content, settings=None, name="t.txt"):
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    else:
        write_jsonl(tmp_path / name, content)
    task = get_task({"name": "text", **(settings or {})})
    file = str(tmp_path / name)
    rows = task.load_data({"train": file, "validation": file})
    tokenizer = byte_tokenizer()
    return task, rows, task.prepare(rows, tokenizer, byte_model()), tokenizer


@pytest.mark.parametrize("pack", [True, False])
def test_rows_of_packed_texts_are_no_text_of_the_file_and_not_told_as_one(tmp_path, pack):
    settings = {"max_length": 4, "sample_by": "document", "pack": pack}
    task, rows, ready, _ = prepared(tmp_path, "\n".join(TEXTS), settings)
    n = len(ready["validation"])
    assert n > 1 if pack else n == 1
    kept = {"answer_loss": [1.0] * n, "tokens": [1] * n}
    worst = judging.worst(task, kept, rows["validation"], task.places["validation"])
    assert [one["row"] for one in worst] == ([] if pack else [1])


@pytest.mark.parametrize(
    ("content", "settings", "name"),
    [
        ("\n\n".join(TEXTS) + "\n", {}, "t.txt"),
        ("\r\n".join(TEXTS), {}, "t.txt"),
        ([{"text": text} for text in TEXTS], {}, "t.jsonl"),
        ([{"body": text, "id": i} for i, text in enumerate(TEXTS)], {"text": "body"}, "t.jsonl"),
        ("text\n" + "\n".join(TEXTS) + "\n", {}, "t.csv"),
    ],
)
def test_texts_stand_one_after_the_other_and_every_token_is_learned(tmp_path, content, settings, name):
    task, _, ready, tokenizer = prepared(tmp_path, content, {"max_length": 16, **settings}, name)
    rows = ready["train"]
    assert [len(ids) for ids in rows["input_ids"]] == [16, 16, 7]
    assert rows["labels"][:] == rows["input_ids"][:]
    assert "".join(map(tokenizer.decode, rows["input_ids"])) == "".join(f"{text}</s>" for text in TEXTS)
    assert "train: 3 texts, 39 tokens in 3 rows of 16" in task.notes


def test_each_text_may_be_a_row(tmp_path):
    task, _, ready, tokenizer = prepared(tmp_path, "\n".join(TEXTS), {"pack": False, "max_length": 13})
    assert [tokenizer.decode(ids) for ids in ready["train"]["input_ids"]] == [
        "The cat sat.</s>",
        "A dog ran hom",
        "It is so.</s>",
    ]
    assert "train: 1 of 3 rows cut to 13 tokens (task.max_length)" in task.notes


@pytest.mark.parametrize(("by", "n"), [("line", 4), ("paragraph", 2), ("document", 1)])
def test_a_file_is_lines_paragraphs_or_one_text(tmp_path, by, n):
    content = "a b\nc\n\nd\ne\n"
    (tmp_path / "v.txt").write_text(content)
    task = get_task({"name": "text", "sample_by": by})
    assert len(task.load_data({"train": str(tmp_path / "v.txt"), "validation": str(tmp_path / "v.txt")})["train"]) == n


def test_empty_texts_are_left_out_and_said(tmp_path):
    task, rows, *_ = prepared(tmp_path, [*({"text": t} for t in TEXTS), {"text": " "}, {"text": None}], name="t.jsonl")
    assert len(rows["train"]) == 3 and "train: 2 of 5 rows have no text and were left out" in task.notes


def test_layers_are_selected_on_the_rows_as_they_are(tmp_path):
    task, _, ready, _ = prepared(tmp_path, "\n".join(TEXTS))
    assert task.selection_rows(ready).column_names == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"template": "alpaca"}, "task.template='alpaca': plain text has no prompts"),
        ({"system": "S"}, "task.system='S': plain text has no prompts"),
        ({"pack": "no"}, "task.pack='no': true or false"),
        ({"sample_by": "lines"}, "task.sample_by='lines': not known. Did you mean 'line'?"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, words):
    with pytest.raises(TrimtabError) as error:
        get_task({"name": "text", **settings})
    assert words in str(error.value)


@pytest.mark.parametrize("kind", ["bert", "t5"])
def test_only_a_decoder_learns_plain_text(kind):
    with pytest.raises(TrimtabError, match=r"task\.name='text': needs a"):
        get_task({"name": "text"}).adjust_to(tiny_config(kind))


def test_a_file_without_texts_is_refused(tmp_path):
    for content, words in (([{"text": ""}] * 2, "no row has a text"), ([{"body": "a"}] * 2, "no column 'text'")):
        with pytest.raises(TrimtabError, match=words):
            prepared(tmp_path, content, name="t.jsonl")
