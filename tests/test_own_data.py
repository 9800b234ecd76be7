"""A user's own file on the command line: what is said, shown, kept and loaded again without Trimtab."""

import json
import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from tasks.tiny import byte_model, byte_tokenizer, write_jsonl
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
        done = subprocess.run([sys.executable, "-I", "-c", lines + check], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "[(0, 'bad'), (1, 'good'), (2, 'so so')]" in done.stdout
        assert done.stdout.split("] ")[1].strip() in ("bad", "good", "so so")


def test_the_printed_lines_load_a_run_that_answers(answered):
    folder, result = answered
    lines = json.loads((folder / "run/metrics.json").read_text())["load"]
    assert lines in result.stdout and "AutoModelForCausalLM" in lines and "labels" not in lines
    done = subprocess.run([sys.executable, "-I", "-c", f"{lines}\nprint(type(model).__name__)"], capture_output=True)
    assert done.stdout.strip() == b"PeftModelForCausalLM", done.stderr


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


def test_show_refuses_what_a_run_would_refuse(classified):
    result = trimtab("show", classified[0] / "recipe.yaml", "task.text=sentence", code=2)
    assert "no column 'sentence'" in result.stderr and result.stdout == ""
