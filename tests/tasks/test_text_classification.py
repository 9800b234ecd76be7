"""A user's own rows: columns, label mapping, and each way in which the data can be wrong."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from tasks.stand_ins import data_pack, encoder_tokenizer, write_jsonl
from trimtab.app.tasks import get_task
from trimtab.errors import ConfigError, DataError

ROWS = [{"text": "very good", "label": "pos"}, {"text": "so bad", "label": "neg"}, {"text": "it is", "label": "meh"}]


def load(tmp_path, train, settings=None, **files):
    task = get_task({"name": "text_classification", **(settings or {})})
    data = {"train": write_jsonl(tmp_path / "train.jsonl", train)}
    for split, rows in (files or {"validation": train}).items():
        data[split] = write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return task, task.load_data(data)


def labelled(values):
    return [{"text": f"the cat {i}", "label": value} for i, value in enumerate(values)]


def test_labels_get_ids_in_sorted_order_and_their_names_go_into_the_model(tmp_path):
    task, rows = load(tmp_path, ROWS)
    assert rows["train"]["label"][:] == [2, 1, 0]
    assert task.model_kwargs()["id2label"] == {0: "meh", 1: "neg", 2: "pos"}
    assert task.model_kwargs()["label2id"] == {"meh": 0, "neg": 1, "pos": 2}
    assert load(tmp_path, ROWS[::-1])[0].model_kwargs() == task.model_kwargs()


def test_whole_number_labels_are_sorted_by_value(tmp_path):
    task, rows = load(tmp_path, labelled([10, 9, 2, 10]))
    assert task.model_kwargs()["id2label"] == {0: "2", 1: "9", 2: "10"}
    assert rows["train"]["label"][:] == [2, 1, 0, 2]


def test_one_label_is_one_class_whatever_the_format_makes_of_it(tmp_path):
    (tmp_path / "v.csv").write_text("text,label\na,1\nb,0\n")
    task = get_task({"name": "text_classification"})
    rows = task.load_data(
        {"train": write_jsonl(tmp_path / "t.jsonl", labelled([0, 1, 1.0])), "validation": str(tmp_path / "v.csv")}
    )
    assert rows["train"]["label"][:] == [0, 1, 1]
    assert rows["validation"]["label"][:] == [1, 0]


def test_named_labels_fix_ids_without_data(tmp_path):
    _, rows = load(tmp_path, ROWS, {"labels": ["neg", "meh", "pos"]})
    assert rows["train"]["label"][:] == [2, 0, 1]
    assert get_task({"name": "text_classification", "labels": ["a", "b"]}).model_kwargs()["num_labels"] == 2
    with pytest.raises(DataError, match=r"row 1 has label 'pos', which task\.labels does not name"):
        load(tmp_path, ROWS, {"labels": ["neg", "meh"]})


def test_labels_are_asked_for_when_neither_named_nor_loaded():
    with pytest.raises(ConfigError, match=r"task\.labels=None: not known before"):
        get_task({"name": "text_classification"}).model_kwargs()


def test_pairs_are_read_from_two_columns(tmp_path):
    rows = [{"q": "the cat", "a": "sat", "y": i % 2} for i in range(4)]
    task, loaded = load(tmp_path, rows, {"text": "q", "text_pair": "a", "label": "y"})
    first = task.prepare(loaded, encoder_tokenizer())["train"][0]
    assert first["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    assert first["labels"] == 0


def test_regression_takes_numbers(tmp_path):
    task, rows = load(tmp_path, labelled([1, 2.5, "3"]), {"regression": True})
    assert rows["train"]["label"][:] == [1.0, 2.5, 3.0]
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}
    scores = task.compute_metrics((np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0])))
    # Σdxdy = 3, Σdx² = 14/3, Σdy² = 2.
    assert scores == pytest.approx({"pearson": 3 / math.sqrt(14 / 3 * 2), "spearmanr": 1.0, "mse": 1 / 3})
    assert not get_task({"name": "text_classification", "regression": True, "metric": "mse"}).greater_is_better


def test_a_new_head_for_numbers_begins_at_their_mean_in_units_of_their_spread(tmp_path):
    task, rows = load(tmp_path, labelled([100_000, 300_000]), {"regression": True})
    model = nn.ModuleDict({"classifier": nn.Linear(4, 1), "score": nn.Linear(4, 1)})
    drawn = {name: head.weight.clone() for name, head in model.items()}
    task.start_head(model, ["classifier"], task.prepare(rows, encoder_tokenizer()))
    assert model["classifier"].bias.item() == 200_000
    torch.testing.assert_close(model["classifier"].weight, 100_000 * drawn["classifier"])
    assert torch.equal(model["score"].weight, drawn["score"])  # the checkpoint's own


def test_a_head_for_classes_is_left_as_it_is_drawn(tmp_path):
    task, rows = load(tmp_path, labelled(["a", "b"]))
    model = nn.ModuleDict({"classifier": nn.Linear(4, 1)})
    drawn = model["classifier"].weight.clone()
    task.start_head(model, ["classifier"], task.prepare(rows, encoder_tokenizer()))
    assert torch.equal(model["classifier"].weight, drawn)


def test_class_scores_agree_with_hand_worked_numbers():
    task = get_task({"name": "text_classification", "labels": ["a", "b"]})
    logits = np.eye(2)[[1, 1, 0, 0, 1]]
    scores = task.compute_metrics((logits, np.array([1, 1, 1, 0, 0])))
    # Class 1: 2 found, 1 missed, 1 false: F1 4/6. Class 0: 1 found, 1 missed, 1 false: F1 2/4.
    assert scores == pytest.approx({"accuracy": 0.6, "f1_macro": (4 / 6 + 2 / 4) / 2, "matthews_correlation": 1 / 6})


@pytest.mark.parametrize(
    ("train", "settings", "words"),
    [
        (ROWS, {"text": "sentence"}, ["task.text='sentence'", "no column 'sentence'", "It has text, label"]),
        (ROWS, {"text": "txt"}, ["Did you mean 'text'?"]),
        (ROWS, {"text_pair": "pair"}, ["task.text_pair='pair'"]),
        (ROWS, {"label": "lable"}, ["task.label='lable'", "Did you mean 'label'?"]),
        (labelled(["a", "a"]), {}, ["every row has label 'a'", "at least two classes"]),
        (labelled([0.5, 1.5]), {}, ["row 1 has label 0.5", "task.regression=true"]),
        (labelled([["a"], "b"]), {}, ["row 1 has label ['a']"]),
        (labelled(["a", "b"]), {"regression": True}, ["row 1 has label 'a', not a finite number"]),
        (labelled([1.0, float("inf")]), {"regression": True}, ["row 2 has label inf"]),
        (labelled(range(30)), {}, ["30 different values in 30 rows", "task.label"]),
        (labelled([None, None]), {}, ["data.train: no row has a label in column 'label'"]),
        ([{"text": None, "label": "a"}], {}, ["no row has a text in column 'text'"]),
    ],
)
def test_wrong_data_is_reported_in_one_line(tmp_path, train, settings, words):
    with pytest.raises(DataError) as error:
        load(tmp_path, train, settings)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def test_a_validation_label_that_train_lacks_is_refused(tmp_path):
    with pytest.raises(
        DataError,
        match=r"data\.validation=.*row 2 has label 'poss', which no training row has\. "
        r"Did you mean 'pos'\? Known: 'meh', 'neg', 'pos'",
    ):
        load(tmp_path, ROWS, validation=[ROWS[0], {"text": "x", "label": "poss"}])


def test_a_test_file_needs_no_labels(tmp_path):
    task, rows = load(tmp_path, ROWS, validation=ROWS, test=[{"text": "so good"}])
    assert rows["test"].column_names == ["text"]
    assert task.eval_splits(task.prepare(rows, encoder_tokenizer())) == ["validation"]


def test_no_data_is_refused():
    with pytest.raises(ConfigError, match=r"data\.train=None: give a file"):
        get_task({"name": "text_classification"}).load_data()


def test_numbers_that_are_all_one_are_refused(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t {i}", "label": 3.5} for i in range(8)])
    with pytest.raises(DataError, match=r"every row has label 3\.5; a number that is always one is not learned"):
        get_task({"name": "text_classification", "regression": True}).load_data({"train": file})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"text": "label"}, r"task\.label='label': another column than task\.text's"),
        ({"text_pair": "text"}, r"task\.text_pair='text': another column than task\.text's"),
        ({"text_pair": "label"}, r"task\.label='label': another column than task\.text_pair's"),
    ],
)
def test_a_column_cannot_be_two_things(settings, words):
    with pytest.raises(ConfigError, match=words):
        get_task({"name": "text_classification", **settings})


def test_yes_and_no_that_yaml_read_as_truth_are_told_to_be_quoted(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": f"t {i}", "label": ("no", "yes")[i % 2]} for i in range(8)])
    with pytest.raises(DataError, match=r"quote them in task\.labels: \['yes', 'no'\]"):
        get_task({"name": "text_classification", "labels": [True, False]}).load_data({"train": file})


def test_too_few_rows_to_split_off_a_validation_split(tmp_path):
    task = get_task({"name": "text_classification", "labels": ["a", "b"]})
    with pytest.raises(DataError, match=r"holds one row"):
        task.load_data({"train": write_jsonl(tmp_path / "t.jsonl", labelled(["a"]))})


def test_loading_twice_says_everything_once(tmp_path):
    task = get_task({"name": "text_classification"})
    data = {"train": write_jsonl(tmp_path / "t.jsonl", labelled(["a", "b"] * 10))}
    task.load_data(data)
    task.load_data(data)
    assert task.notes == [
        "no data.validation: 2 of 20 training rows were split off for it, of each class its share",
        "train: 2 classes: 'a' 9, 'b' 9",
        "validation: 2 classes: 'a' 1, 'b' 1",
    ]


def test_real_inference_rows_train_as_a_users_own():
    folder = data_pack("snli")
    task = get_task({"name": "text_classification", "text": "premise", "text_pair": "hypothesis"})
    rows = task.load_data(
        {"train": str(folder / "validation.jsonl"), "test": str(folder / "test.jsonl"), "max_samples": 100}
    )
    assert {split: len(part) for split, part in rows.items()} == {"train": 100, "validation": 100, "test": 100}
    assert task.model_kwargs()["num_labels"] == 3
