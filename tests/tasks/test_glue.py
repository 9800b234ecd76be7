"""GLUE: columns, labels and scores of the nine tasks."""

import math

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import AutoModelForSequenceClassification

from tasks.stand_ins import data_pack, encoder_tokenizer, tiny_config, write_jsonl
from trimtab.app.tasks import GLUE_NAMES, get_task
from trimtab.app.tasks.glue import KINDS
from trimtab.errors import ConfigError, DataError


def rows_of(short, n=8):
    labels = KINDS[short].labels
    return [
        {
            **{c: f"the cat sat {'again ' * i}{c}" for c in KINDS[short].columns},
            "label": i % len(labels) if labels else i / 2,
            "idx": i,
        }
        for i in range(n)
    ]


def glue(short, tmp_path, train=None, **files):
    task = get_task({"name": f"glue/{short}"})
    data = {"train": write_jsonl(tmp_path / "train.jsonl", train or rows_of(short))}
    for split, rows in files.items():
        data[split] = write_jsonl(tmp_path / f"{split}.jsonl", rows)
    return task, task.load_data(data)


def logits_for(classes, k=2):
    return np.eye(k)[classes] * 3.0


@pytest.mark.parametrize("short", GLUE_NAMES)
def test_local_rows_become_what_the_model_takes(short, tmp_path):
    task, rows = glue(short, tmp_path, validation=rows_of(short, 4))
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert", **task.model_kwargs()))
    tokenizer = encoder_tokenizer()
    ready = task.prepare(rows, tokenizer, model)
    assert set(ready["train"].column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels"}
    assert task.selection_rows(ready).column_names == ["input_ids", "token_type_ids", "attention_mask"]
    assert task.eval_splits(ready) == ["validation"]
    batch = task.collator(tokenizer)([ready["train"][i] for i in (0, 3)])
    lengths = [len(ready["train"][i]["input_ids"]) for i in (0, 3)]
    assert batch["input_ids"].shape == (2, max(lengths))  # padded to the longer row, not to a fixed length
    assert bool(batch["token_type_ids"].any()) == (len(task.text_columns) == 2)
    out = model(**batch)
    assert torch.isfinite(out.loss)
    assert out.logits.shape == (2, 1 if short == "stsb" else len(KINDS[short].labels))
    scores = task.compute_metrics((out.logits.detach().numpy(), batch["labels"].numpy()))
    assert set(scores) == set(KINDS[short].scores)
    assert task.metric in scores


@pytest.mark.parametrize("short", sorted(set(GLUE_NAMES) - {"mnli", "stsb"}))
def test_two_class_scores_agree_with_hand_worked_numbers(short):
    # Class 1: 2 found, 1 missed, 1 false alarm; class 0: 1 found.
    labels, predicted = np.array([1, 1, 1, 0, 0]), [1, 1, 0, 0, 1]
    scores = get_task({"name": f"glue/{short}"}).compute_metrics((logits_for(predicted), labels))
    by_hand = {
        "accuracy": 3 / 5,
        "f1": 2 * 2 / (2 * 2 + 1 + 1),
        "matthews_correlation": (2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2),
    }
    expected = {"cola": ["matthews_correlation"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}
    assert scores == pytest.approx({name: by_hand[name] for name in expected.get(short, ["accuracy"])})


def test_mnli_accuracy_agrees_with_a_hand_worked_number():
    scores = get_task({"name": "glue/mnli"}).compute_metrics((logits_for([0, 1, 2, 2], 3), np.array([0, 1, 2, 1])))
    assert scores == {"accuracy": 0.75}


def test_stsb_correlations_agree_with_hand_worked_numbers():
    # Σdxdy = 5.5, Σdx² = 5, Σdy² = 8.75; ranks differ by one twice: 1 − 6·2/(4·15).
    predicted, labels = np.array([[1.0], [2.0], [3.0], [4.0]]), np.array([1.0, 3.0, 2.0, 5.0])
    scores = get_task({"name": "glue/stsb"}).compute_metrics((predicted, labels))
    assert scores == pytest.approx({"pearson": 5.5 / math.sqrt(5 * 8.75), "spearmanr": 0.8})


def test_a_constant_prediction_scores_zero_and_a_broken_one_scores_nan():
    stsb, cola = get_task({"name": "glue/stsb"}), get_task({"name": "glue/cola"})
    labels = np.array([1.0, 3.0, 2.0])
    assert stsb.compute_metrics((np.ones((3, 1)), labels)) == {"pearson": 0.0, "spearmanr": 0.0}
    assert cola.compute_metrics((logits_for([1, 1, 1]), np.array([1, 0, 1]))) == {"matthews_correlation": 0.0}
    broken = cola.compute_metrics((np.full((3, 2), np.nan), np.array([1, 0, 1])))
    assert math.isnan(broken["matthews_correlation"])


def test_only_the_first_of_several_model_outputs_is_scored():
    task = get_task({"name": "glue/rte"})
    logits, states = torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2, 3)
    assert task.preprocess_logits_for_metrics((logits, states), None) is logits
    assert task.compute_metrics(((logits.numpy(), states.numpy()), np.array([1]))) == {"accuracy": 1.0}


def test_stsb_is_a_regression_with_float_labels(tmp_path):
    task, rows = glue("stsb", tmp_path)
    assert task.model_kwargs() == {"num_labels": 1, "problem_type": "regression"}
    ready = task.prepare(rows, encoder_tokenizer())
    batch = task.collator(encoder_tokenizer())([ready["train"][0]])
    assert batch["labels"].dtype == torch.float32


def test_class_names_go_into_the_models_config():
    assert get_task({"name": "glue/rte"}).model_kwargs()["id2label"] == {0: "entailment", 1: "not_entailment"}
    assert get_task({"name": "glue/mnli"}).model_kwargs()["num_labels"] == 3


def test_mnli_is_scored_on_both_halves_the_matched_one_first(tmp_path):
    rows = rows_of("mnli")
    task, loaded = glue("mnli", tmp_path, validation_mismatched=rows, validation_matched=rows)
    assert task.eval_splits(task.prepare(loaded, encoder_tokenizer())) == [
        "validation_matched",
        "validation_mismatched",
    ]
    task, loaded = glue("mnli", tmp_path, validation=rows)
    assert task.eval_splits(task.prepare(loaded, encoder_tokenizer())) == ["validation"]


def test_a_test_split_without_labels_keeps_its_rows(tmp_path):
    hidden = [{**row, "label": -1} for row in rows_of("cola")]
    task, rows = glue("cola", tmp_path, validation=rows_of("cola"), test=hidden)
    assert rows["test"].column_names == ["sentence"]
    assert len(rows["test"]) == 8
    assert "labels" not in task.prepare(rows, encoder_tokenizer())["test"].column_names


def test_single_unlabelled_rows_are_left_out_and_said_so(tmp_path):
    train = [*rows_of("mnli"), {**rows_of("mnli")[0], "label": -1}]
    task, rows = glue("mnli", tmp_path, train, validation=rows_of("mnli"))
    assert len(rows["train"]) == 8
    assert task.notes == ["train: 1 of 9 rows have no label and were left out"]


def test_labels_may_be_class_names_or_csv_text(tmp_path):
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\na,b,entailment\nc,d,1\ne,f,0\ng,h,not_entailment\n")
    task = get_task({"name": "glue/rte"})
    rows = task.load_data({"train": str(tmp_path / "train.csv"), "validation": str(tmp_path / "train.csv")})
    assert rows["train"]["label"][:] == [0, 1, 0, 1]


def test_without_a_validation_file_the_same_tenth_is_always_split_off(tmp_path):
    task, rows = glue("cola", tmp_path, rows_of("cola", 40))
    again = glue("cola", tmp_path, rows_of("cola", 40))[1]
    assert (len(rows["train"]), len(rows["validation"])) == (36, 4)
    assert rows["validation"]["sentence"][:] == again["validation"]["sentence"][:]
    assert not set(rows["train"]["sentence"][:]) & set(rows["validation"]["sentence"][:])
    assert "split off" in task.notes[0]


def test_max_samples_keeps_the_first_rows_of_each_split_where_the_seed_says_so(tmp_path):
    task = get_task({"name": "glue/cola"})
    file = write_jsonl(tmp_path / "t.jsonl", rows_of("cola", 20))
    rows = task.load_data({"train": file, "validation": file, "max_samples": {"train": 6}, "sample_seed": "first"})
    assert (len(rows["train"]), len(rows["validation"])) == (6, 20)
    assert rows["train"]["sentence"][:] == rows["validation"]["sentence"][:6]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": 2}, ["row 8 has label 2", "0 (unacceptable), 1 (acceptable)"]),
        ({"label": 0.5}, ["row 8 has label 0.5"]),
        ({"label": "yes"}, ["label 'yes'"]),
        ({"sentence": None}, ["row 8 is empty in column 'sentence'"]),
        ({"sentence": ["a"]}, ["row 8 holds a list in column 'sentence'"]),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, words):
    train = rows_of("cola")
    train[-1].update(change)
    with pytest.raises(DataError) as error:
        glue("cola", tmp_path, train)
    for word in ["data.train='", *words]:
        assert word in str(error.value)


def test_an_stsb_label_outside_0_to_5_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"label 7\.5; glue/stsb knows a number from 0 to 5"):
        glue("stsb", tmp_path, [*rows_of("stsb"), {**rows_of("stsb")[0], "label": 7.5}])


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path):
    train = [{"sentnce": "a", "label": 1}]
    with pytest.raises(DataError, match=r"no column 'sentence' in data\.train=.*Did you mean 'sentnce'\?.*It has sent"):
        glue("cola", tmp_path, train)


def test_training_rows_without_any_label_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.train: no row has a label"):
        glue("cola", tmp_path, [{"sentence": "a", "label": -1}])
    with pytest.raises(ConfigError, match=r"data\.train=None"):
        get_task({"name": "glue/cola"}).load_data({"validation": write_jsonl(tmp_path / "v.jsonl", rows_of("cola"))})


def test_max_length_cuts_rows_and_may_not_exceed_the_models_positions(tmp_path):
    _, rows = glue("cola", tmp_path)
    model = AutoModelForSequenceClassification.from_config(tiny_config("bert"))
    task = get_task({"name": "glue/cola", "max_length": 5})
    assert max(map(len, task.prepare(rows, encoder_tokenizer(), model)["train"]["input_ids"])) == 5
    task = get_task({"name": "glue/cola", "max_length": 65})
    with pytest.raises(ConfigError, match=r"task\.max_length=65: at most 64"):
        task.prepare(rows, encoder_tokenizer(), model)


def test_columns_that_the_model_does_not_take_are_dropped(tmp_path):
    task, rows = glue("cola", tmp_path)
    model = AutoModelForSequenceClassification.from_config(tiny_config("llama"))  # takes no token types
    assert set(task.prepare(rows, encoder_tokenizer(), model)["train"].column_names) == {
        "input_ids",
        "attention_mask",
        "labels",
    }


def test_the_hubs_rows_are_taken_as_they_are(monkeypatch):
    features = Features(
        {"sentence": Value("string"), "label": ClassLabel(names=["unacceptable", "acceptable"]), "idx": Value("int32")}
    )
    asked = []

    def load_dataset(*args):
        asked.append(args)
        part = Dataset.from_list(
            [{"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0, "idx": 1}], features=features
        )
        hidden = Dataset.from_list([{"sentence": "a", "label": -1, "idx": 0}], features=features)
        return DatasetDict({"train": part, "validation": part, "test": hidden})

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    task = get_task({"name": "glue/cola"})
    rows = task.load_data({"max_samples": {"train": 1}})
    assert asked == [("nyu-mll/glue", "cola")]
    ready = task.prepare(rows, encoder_tokenizer())
    assert ready["validation"]["labels"][:] == [1, 0]
    assert len(ready["train"]) == 1
    assert "labels" not in ready["test"].column_names


def test_an_unreachable_hub_is_one_line_with_the_cure(monkeypatch):
    def load_dataset(*args):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\n(offline)")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError) as error:
        get_task({"name": "glue/cola"}).load_data()
    assert "\n" not in str(error.value)
    assert "task.name='glue/cola'" in str(error.value)
    assert "data.train" in str(error.value)


@pytest.mark.parametrize(
    ("short", "train", "ones"), [("cola", 8551, 6023), ("mrpc", 3668, 2474), ("rte", 2490, 2490 - 1249)]
)
def test_the_real_files_have_their_documented_labels(short, train, ones):
    folder = data_pack(short)
    rows = get_task({"name": f"glue/{short}"}).load_data(
        {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")}
    )
    assert len(rows["train"]) == train
    assert sum(rows["train"]["label"][:]) == ones
