"""A user's own file on the command line: what is said, shown, kept and loaded again without Trimtab."""

import json
import shutil

import pytest
import torch
import yaml
from click.testing import CliRunner
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fresh
from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from test_run import tiny_model
from trimtab.app.cli import cli

ROWS = "text,label\n" + "".join(f"the {word} sat {i % 2},{label}\n" for i, (word, label) in enumerate(
    [("cat", "bad"), ("dog", "so so"), ("mat", "good")] * 12
))  # fmt: skip


def trimtab(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def write_recipe(folder, **sections):
    recipe = {
        "adapter": {"r": 2, "target_modules": ["query", "value"]},
        "train": {"num_train_epochs": 1, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
        "output_dir": str(folder / "run"),
        **sections,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def classified(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classified")
    (folder / "train.csv").write_text(ROWS + "the cat,NA\n")
    (folder / "test.csv").write_text(ROWS[: ROWS.index("\n", 200) + 1])
    recipe = write_recipe(
        folder,
        model=str(tiny_model(folder / "model")),
        task={"name": "text_classification"},
        data={"train": str(folder / "train.csv"), "test": str(folder / "test.csv")},
        export={"format": "merged"},
    )
    return folder, trimtab("run", recipe)


@pytest.fixture(scope="module")
def answered(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answered")
    byte_tokenizer().save_pretrained(folder / "model")
    byte_model("llama", max_position_embeddings=512).save_pretrained(folder / "model")
    rows = [{"question": f"What is {i} + 1?", "answer": i + 1} for i in range(12)]
    recipe = write_recipe(
        folder,
        model=str(folder / "model"),
        task={"name": "math", "generation": {"max_new_tokens": 4}},
        base_rows=2,
        data={"train": write_jsonl(folder / "train.jsonl", rows), "test": write_jsonl(folder / "test.jsonl", rows[:3])},
        adapter={"r": 2, "target_modules": ["q_proj", "v_proj"]},
    )
    return folder, trimtab("run", recipe)


def test_what_was_read_is_said_once_and_kept_with_the_scores(classified):
    folder, result = classified
    said = result.stderr.replace("\n", " ")
    for words in ("train: 3 classes: 'bad' 11", "('NA' 1; task.labels or data.missing", "3 of 36 training rows were"):
        assert said.count(words) == 1, result.stderr
    metrics = json.loads((folder / "run/metrics.json").read_text())
    assert metrics["data"]["rows"] == {"train": 33, "test": 11, "validation": 3}
    assert metrics["data"]["classes"]["validation"] == {"bad": 1, "good": 1, "so so": 1}
    assert {"accuracy", "validation_accuracy"} <= metrics["metrics"].keys()  # of test, which has labels, and validation
    page = (folder / "run/report.html").read_text()
    assert "rows: 33 train, 11 test, 3 validation" in page and "1 of 37 rows have no label" in page


def test_the_printed_lines_load_the_run_with_its_class_names_where_there_is_no_trimtab(classified):
    folder, result = classified
    metrics = json.loads((folder / "run/metrics.json").read_text())
    assert metrics["load"] in result.stdout
    job = trimtab("eval", folder / "run", "export.format=peft", "--json")  # the adapter, where there is a merged model
    assert json.loads(job.stdout)["load"] == metrics["load"]
    check = (
        "\nimport sys; from transformers import pipeline"
        "\nassert 'trimtab' not in sys.modules"
        "\nfound = pipeline('text-classification', model=model, tokenizer=tokenizer)(['the cat sat 0'])"
        "\nprint(sorted(model.config.id2label.items()), found[0]['label'])"
    )
    adapter = f"""
import json, peft, transformers
labels = json.load(open({str(folder / "run/adapter/labels.json")!r}))['label2id']
base = transformers.AutoModelForSequenceClassification.from_pretrained(
    {str(folder / "model")!r}, label2id=labels, id2label={{i: name for name, i in labels.items()}})
model = peft.PeftModel.from_pretrained(base, {str(folder / "run/adapter")!r}).merge_and_unload()
tokenizer = transformers.AutoTokenizer.from_pretrained({str(folder / "run/adapter")!r})
"""
    for lines in (metrics["load"], adapter):
        done = fresh.python("-c", lines + check)
        assert done.returncode == 0, done.stderr
        assert "[(0, 'bad'), (1, 'good'), (2, 'so so')]" in done.stdout
        assert done.stdout.split("] ")[1].strip() in ("bad", "good", "so so")


def test_the_base_answers_the_first_rows_and_the_adapters_score_of_these_stands_beside(answered):
    folder, _ = answered
    run = folder / "run"
    found = json.loads((run / "base.json").read_text())
    assert found["first_rows"] == 2 and found["with_adapter"].keys() == found["metrics"].keys()
    answers = [json.loads(line)["id"] for line in (run / "answers/base/test_answers.jsonl").read_text().splitlines()]
    assert sorted(answers) == ["test/0", "test/1"]
    assert len((run / "answers/test_scored.jsonl").read_text().splitlines()) == 3  # the run's own, of all rows
    page = (run / "report.html").read_text()
    assert "on the first 2 rows, where with it" in page and ">first 2 rows without adapter</th>" in page
    assert "base model alone, first 2 rows" in (run / "adapter/README.md").read_text()


def test_the_base_is_scored_as_it_is_by_itself(answered, tmp_path):
    recipe = answered[0] / "recipe.yaml"
    trimtab("run", recipe, "base_rows=all", f"output_dir={tmp_path / 'run'}")
    taken = json.loads((tmp_path / "run/base.json").read_text())
    assert "first_rows" not in taken
    alone = json.loads(trimtab("eval", tmp_path / "run", "--base", "--json").stdout)
    assert taken["metrics"] == pytest.approx(alone["metrics"], abs=1e-6)
    trained = json.loads((tmp_path / "run/metrics.json").read_text())["metrics"]
    assert trained["answer_loss"] != taken["metrics"]["answer_loss"]


def test_the_base_is_scored_anew_where_other_rows_were_or_the_adapter_has_trained_on(answered, tmp_path):
    folder = answered[0]
    run = shutil.copytree(folder / "run", tmp_path / "run")
    first = json.loads((run / "base.json").read_text())
    for changed, is_kept in (({}, True), ({"step": 1}, False), ({"data": {}}, False)):
        (run / "base.json").write_text(json.dumps({**first, **changed, "mine": 1}))
        trimtab("eval", run)
        found = json.loads((run / "base.json").read_text())
        assert ("mine" in found) == is_kept, changed
        assert {key: value for key, value in found.items() if key != "mine"} == first


def test_answers_are_kept_in_the_folder_that_the_task_names(answered, tmp_path):
    run = shutil.copytree(answered[0] / "run", tmp_path / "run", ignore=shutil.ignore_patterns("answers", "base.json"))
    trimtab("eval", run, f"task.generations={tmp_path / 'kept'}")
    assert len((tmp_path / "kept" / "test_answers.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "kept" / "base" / "test_answers.jsonl").read_text().splitlines()) == 2
    assert not (run / "answers").exists()


@pytest.mark.parametrize("override", ["base_rows=0", "adapter.init=pissa"])
def test_no_base_is_scored_where_it_is_not_wanted_or_no_longer_there(answered, tmp_path, override):
    trimtab("run", answered[0] / "recipe.yaml", override, f"output_dir={tmp_path / 'run'}", "train.max_steps=1")
    assert not (tmp_path / "run/base.json").exists()


def test_a_recipe_leaves_a_file_for_llama_cpp_beside_the_plain_adapter(answered, tmp_path):
    pytest.importorskip("gguf")
    trimtab("train", answered[0] / "recipe.yaml", "export=gguf", "train.max_steps=1", f"output_dir={tmp_path / 'run'}")
    assert (tmp_path / "run/gguf/adapter.gguf").stat().st_size > 1000
    assert (tmp_path / "run/adapter/adapter_model.safetensors").is_file()


def test_the_printed_lines_load_a_run_that_answers(answered):
    folder, result = answered
    lines = json.loads((folder / "run/metrics.json").read_text())["load"]
    assert lines in result.stdout and "AutoModelForCausalLM" in lines and "labels" not in lines
    done = fresh.python("-c", f"{lines}\nprint(type(model).__name__)")
    assert done.stdout.strip() == "PeftModelForCausalLM", done.stderr


def test_the_printed_lines_quantise_the_base_as_it_was_trained(answered, tmp_path):
    pytest.importorskip("bitsandbytes")
    quantised = ("model.quantization={load_in_8bit: true, llm_int8_threshold: 5.0}", f"output_dir={tmp_path / 'run'}")
    trimtab("run", answered[0] / "recipe.yaml", *quantised, "train.max_steps=1")
    lines = json.loads((tmp_path / "run/metrics.json").read_text())["load"]
    done = fresh.python("-c", f"{lines}\nprint(base.model.layers[0].mlp.down_proj.state.threshold)\n"
                        "print(type(base.lm_head).__name__)")  # fmt: skip
    assert done.stdout.split() == ["5.0", "Linear"], done.stderr


def test_rows_are_shown_as_the_model_reads_them(classified, answered):
    result = trimtab("show", classified[0] / "recipe.yaml", "-n", 1)
    assert "row 1 · 6 tokens\n[CLS] the cat sat" in result.stdout and "→ bad" in result.stdout
    assert "3 classes" in result.stderr
    result = trimtab("show", answered[0] / "recipe.yaml")
    assert result.stdout.count("### Instruction:\nWhat is") == 2
    assert "### Response:\n⟦1</s>⟧" in result.stdout
    found = json.loads(trimtab("show", answered[0] / "recipe.yaml", "--json").stdout)["examples"][0]
    assert found["pieces"][-1] == ["1</s>", True] and found["learned"] == 2
    assert sum(len(text) for text, _ in found["pieces"]) > found["tokens"] > 100


def test_a_run_answers_the_rows_of_a_file_in_its_order(classified, answered, tmp_path):
    (tmp_path / "new.csv").write_text('text\nthe cat\n" "\nthe dog\n')
    printed = trimtab("predict", classified[0] / "run", tmp_path / "new.csv").stdout
    found = [json.loads(line) for line in printed.splitlines()]
    assert [row["row"] for row in found] == [1, 2, 3]
    assert found[1] == {"row": 2, "prediction": None, "reason": "no text"}
    for row in (found[0], found[2]):
        assert row["probabilities"].keys() == {"bad", "good", "so so"}
        assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert row["probability"] == row["probabilities"][row["prediction"]] == max(row["probabilities"].values())
    base = AutoModelForSequenceClassification.from_pretrained(classified[0] / "run/merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(classified[0] / "run/merged")
    with torch.no_grad():
        shares = base(**tokenizer("the dog", return_tensors="pt")).logits.softmax(-1)[0]
    assert list(found[2]["probabilities"].values()) == pytest.approx(shares.tolist(), abs=1e-4)

    asked = write_jsonl(tmp_path / "new.jsonl", [{"question": "What is 7 + 1?"}, {"question": ""}])
    out = tmp_path / "deep/out.jsonl"
    result = trimtab("predict", answered[0] / "run", asked, "--out", out)
    assert result.stdout.strip() == str(out)
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert isinstance(found[0]["answer"], str) and found[1] == {"row": 2, "answer": None, "reason": "no text"}
    chats = write_jsonl(tmp_path / "chats.jsonl", [{"messages": [{"role": "user", "content": "What is 7 + 1?"}]}])
    again = json.loads(trimtab("predict", answered[0] / "run", chats, "--json").stdout)
    assert again == [found[0]]  # the same question, however it is written
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "What is 7 + 1?"}])  # learned whole, such are plain
    again = json.loads(trimtab("predict", answered[0] / "run", prompts, "--json").stdout)
    assert again == [found[0]]


def test_plain_text_trains_plans_shows_and_is_continued(answered, tmp_path):
    (tmp_path / "book.txt").write_text("The cat sat on the mat.\n" * 40)
    recipe = write_recipe(
        tmp_path,
        model=str(answered[0] / "model"),
        task={"name": "text", "max_length": 64, "generation": {"max_new_tokens": 3}},
        data={"train": str(tmp_path / "book.txt")},
        adapter={"r": 2, "target_modules": ["q_proj", "v_proj"]},
        where={"ratio": 0.5, "samples": 8},
    )
    result = trimtab("run", recipe)
    assert "train: 36 texts, 864 tokens in 14 rows of 64" in result.stderr and "perplexity" in result.stdout
    assert "train    2 steps" in result.stderr  # of 14 rows, not of 36 texts
    assert "not known here" in trimtab("plan", recipe).stdout
    assert trimtab("show", recipe, "-n", 2).stdout.count("row 1 · 48 tokens, 48 learned\n⟦The cat sat") == 1
    (tmp_path / "new.txt").write_text("The dog\n")
    assert "answer" in json.loads(trimtab("predict", tmp_path / "run", tmp_path / "new.txt").stdout)


def test_rows_that_are_too_long_are_counted(classified, tmp_path):
    result = trimtab("show", classified[0] / "recipe.yaml", "task.max_length=5", "-n", 4)
    assert "train: 4 of 4 rows cut to 5 tokens (task.max_length)" in result.stderr


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("gone.csv", "FILE='gone.csv': no such file"),
        ("other.csv", "no column 'text'"),
        ("blank.csv", "no row has a text"),
    ],
)
def test_predict_refuses_a_file_that_it_cannot_answer(classified, tmp_path, monkeypatch, file, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "blank.csv").write_text('text,b\n" ",2\n')
    result = trimtab("predict", classified[0] / "run", file, code=2)
    assert words in result.stderr and result.stdout == ""


def test_training_ends_early_where_the_watched_score_gets_no_better(classified, tmp_path):
    settings = ("early_stopping=2", "train.num_train_epochs=9", "train.learning_rate=1e-9")
    best = ("train.load_best_model_at_end=true", f"output_dir={tmp_path / 'run'}")
    patient = trimtab("run", classified[0] / "recipe.yaml", *settings, *best)
    assert "train    15 steps" in patient.stderr  # of 45: the first evaluation and two that are no better
    for override, words in (
        ("early_stopping=0", "early_stopping.patience=0"),
        ("early_stopping.pateince=1", "Did you mean 'patience'?"),
    ):
        assert words in trimtab("run", classified[0] / "recipe.yaml", override, code=2).stderr


def test_show_refuses_what_a_run_would_refuse(classified):
    result = trimtab("show", classified[0] / "recipe.yaml", "task.text=sentence", code=2)
    assert "no column 'sentence'" in result.stderr and result.stdout == ""


def test_labels_that_are_numbers_are_not_smoothed(tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n" + "".join(f"the cat sat {i},{i / 7}\n" for i in range(20)))
    data = {"train": str(tmp_path / "rows.csv")}
    recipe = write_recipe(
        tmp_path,
        model=str(tiny_model(tmp_path / "model")),
        task={"name": "text_classification", "regression": True},
        data=data,
    )
    said = trimtab("run", recipe, "train.label_smoothing_factor=0.1", code=2).stderr
    assert said.splitlines()[-1].endswith("smooths classes, and these labels are numbers")
