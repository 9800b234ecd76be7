"""`trimtab init`: from a file of rows to a recipe that plans and runs as it stands."""

import json
import random
import re
import shlex
import shutil
import zipfile
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from test_run import tiny_model
from trimtab.app import recipe as recipes
from trimtab.app.cli import cli

DRAWN = random.Random(0)
N = 40


WORDS = ["the", "cat", "dog", "sat", "on", "a", "mat", "good", "bad", "film", "plot", "slow", "quick", "fox"]


def words(n=8):
    return " ".join(DRAWN.choice(WORDS) for _ in range(n))


def turns():
    return [{"role": "user", "content": words()}, {"role": "assistant", "content": words()}]


# A row of the file, the task that it is for, and the task's settings that the columns tell.
KINDS = {
    "a text and a class": (
        lambda i: {"review": words(), "stars": i % 5},
        "text_classification",
        {"text": "review", "label": "stars"},
    ),
    "columns of other names": (
        lambda i: {"texto": words(), "etiqueta": ("si", "no")[i % 2]},
        "text_classification",
        {"text": "texto", "label": "etiqueta"},
    ),
    "a pair and a class": (
        lambda i: {"id": i, "premise": words(), "hypothesis": words(), "label": "enc"[i % 3]},
        "text_classification",
        {"text": "premise", "text_pair": "hypothesis", "label": "label"},
    ),
    "a pair and a number": (
        lambda i: {"sentence1": words(), "sentence2": words(), "score": i / 7},
        "text_classification",
        {"text": "sentence1", "text_pair": "sentence2", "label": "score", "regression": True},
    ),
    "a text and a number": (
        lambda i: {"description": words(20), "price": i / 7},
        "text_classification",
        {"text": "description", "label": "price", "regression": True},
    ),
    "a question and yes or no": (
        lambda i: {"question": words(), "passage": words(20), "answer": i % 2 == 0},
        "text_classification",
        {"text": "question", "text_pair": "passage", "label": "answer"},
    ),
    "tickets with their dates": (
        lambda i: {"id": i, "received": f"2026-10-{i % 4 + 1:02d}", "ticket": words(), "group": "ab"[i % 2]},
        "text_classification",
        {"text": "ticket", "label": "group"},
    ),
    "Alpaca": (lambda i: {"instruction": words(), "input": "", "output": words()}, "instruct", {}),
    "Dolly": (
        lambda i: {"instruction": words(), "context": "", "response": words(), "category": "ab"[i % 2]},
        "text_classification",
        None,
    ),
    "messages": (lambda i: {"messages": turns()}, "instruct", {}),
    "conversations of another name": (
        lambda i: {"dialog": turns()},
        "instruct",
        {"columns": {"messages": "dialog"}},
    ),
    "ShareGPT": (
        lambda i: {"conversations": [{"from": "human", "value": words()}, {"from": "gpt", "value": words()}]},
        "instruct",
        {},
    ),
    "questions and answers": (lambda i: {"question": words(), "answer": words()}, "instruct", {}),
    "problems": (lambda i: {"question": words(), "answer": f"{words()}\n#### {i}"}, "math", {}),
    "problems and numbers": (lambda i: {"question": words(), "answer": i}, "math", {}),
    "summaries": (
        lambda i: {"id": i, "document": words(30), "summary": words()},
        "summarize",
        {"document": "document", "summary": "summary"},
    ),
    "prompts and completions of messages": (
        lambda i: {"prompt": turns()[:1], "completion": turns()[1:]},
        "instruct",
        {},
    ),
    "names in capitals and with blanks": (lambda i: {"Question ": words(), "Answer": words()}, "instruct", {}),
    "a prompt and an answer by other pairs of names": (
        lambda i: {"input": words(), "response": words()},
        "instruct",
        {},
    ),
    "problems, solutions and answers": (
        lambda i: {"problem": words(), "solution": f"{words()} $\\boxed{{{i}}}$", "answer": i},
        "math",
        {},
    ),
    "questions, choices and their places": (
        lambda i: {"question": words(), "choices": [words(1), words(1)], "answer": i % 2},
        "instruct",
        {},
    ),
    "summaries by other names": (
        lambda i: {"Content": words(30), "Summary": words()},
        "summarize",
        {"document": "Content", "summary": "Summary"},
    ),
    "plain text": (lambda i: {"text": words(30)}, "text", {"text": "text"}),
}
KINDS["Dolly"] = (KINDS["Dolly"][0], "instruct", {})  # a category beside an answer is no label


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    byte_tokenizer().save_pretrained(folder / "decoder")
    byte_model("llama", max_position_embeddings=1024).save_pretrained(folder / "decoder")
    return {"encoder": str(tiny_model(folder / "encoder")), "decoder": str(folder / "decoder")}


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def trimtab(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def refused(*args):
    before = sorted(p.name for p in Path().iterdir())
    last = trimtab("init", *args, code=2).stderr.splitlines()[-1]
    assert last.startswith("error: ") and sorted(p.name for p in Path().iterdir()) == before
    return last


@pytest.mark.parametrize("kind", KINDS)
def test_task_and_columns_are_understood_and_the_recipe_plans_as_it_stands(kind, here, models):
    row, task, settings = KINDS[kind]
    write_jsonl(here / "rows.jsonl", [row(i) for i in range(N)])
    model = models["encoder" if task == "text_classification" else "decoder"]
    made = json.loads(trimtab("init", "rows.jsonl", "--model", model, "--json").stdout)
    assert (made["path"], made["task"], made["rows"]) == ("rows.yaml", task, N)
    found = recipes.load("rows.yaml").require_task()
    assert found.name == task
    assert {k: v for k, v in found.options.items() if k != "max_length"} == settings
    assert json.loads(trimtab("plan", "rows.yaml", "--json").stdout)["params"]["initial"] > 0


def test_a_recipe_runs_as_it_stands_and_every_key_says_what_it_does(here, models):
    (here / "sub").mkdir()
    for name, n in (("train", 24), ("dev", 8), ("test", 8)):
        write_jsonl(here / "sub" / f"{name}.jsonl", [{"text": words(), "label": "ab"[i % 2]} for i in range(n)])
    more = ("train.max_steps=3", "where.ratio=0.25")
    trimtab("init", "sub/train.jsonl", "-m", models["encoder"], *more, "-o", "r/a.yaml")
    text = Path("r/a.yaml").read_text()
    data = yaml.safe_load(text)
    assert data["data"] == {
        "train": "../sub/train.jsonl", "validation": "../sub/dev.jsonl", "test": "../sub/test.jsonl",
    }  # fmt: skip
    assert data["where"] == {"method": "cka", "ratio": 0.25} and data["train"]["max_steps"] == 3
    silent = [line for line in text.splitlines() if ": " in line and "#" not in line]
    assert [line.split(":")[0].strip() for line in silent] == ["train", "validation", "test", "max_steps"]
    # What stands there as a comment is a recipe, too.
    body = text.split("\n\n", 1)[1]
    on = yaml.safe_load(re.sub(r"^( *)# (\w+: )", r"\1\2", body, flags=re.MULTILINE))
    for key in ("dtype", "quantization"):
        del on["model"][key]
    on["data"].update({split: str(here / "sub" / f"{name}.jsonl") for split, name in
                       (("train", "train"), ("validation", "dev"), ("test", "test"))})  # fmt: skip
    recipes.load(on)
    trimtab("run", "r/a.yaml", "train.use_cpu=true")


@pytest.mark.parametrize("n, tokens", [(2, 32), (40, 64), (400, 256)])
def test_rows_are_cut_where_the_longest_ends(n, tokens, here, models):
    write_jsonl(here / "rows.jsonl", [{"text": "cat " * (n if i else 1), "label": i % 2} for i in range(N)])
    trimtab("init", "rows.jsonl", "--model", models["encoder"])
    assert recipes.load("rows.yaml").require_task().options["max_length"] == tokens


def test_prose_is_learned_in_paragraphs(here, models):
    Path("book.txt").write_text("\n\n".join(f"{words(20)}, {words(4)}.\n{words(5)}." for _ in range(30)))
    trimtab("init", "book.txt", "--model", models["decoder"])
    assert recipes.load("book.yaml").require_task().options["sample_by"] == "paragraph"


def test_prose_in_an_archive_is_prose(here, models):
    with zipfile.ZipFile("book.zip", "w") as archive:
        archive.writestr("book.txt", "\n".join(f"{words(5)}, {words(4)}." for _ in range(30)))
    trimtab("init", "book.zip", "--model", models["decoder"])
    found = recipes.load("book.yaml").require_task()
    assert (found.name, found.options["sample_by"]) == ("text", "line")
    assert "3 of 30 training rows were split off" in trimtab("show", "book.yaml").stderr


def test_lines_with_tabs_are_no_prose(here, models):
    Path("sms.txt").write_text("".join(f"{('ham', 'spam')[i % 2]}\t{words()}\n" for i in range(30)))
    told = refused("sms.txt", "--model", models["decoder"])
    assert "the first line of a file must name its columns" in told and told.endswith("task.name=text")
    trimtab("init", "sms.txt", "task.name=text", "--model", models["decoder"])


def test_texts_in_folders_may_be_classes(here, models):
    for folder in ("pos", "neg"):
        (here / "rows/train" / folder).mkdir(parents=True)
        (here / "rows/train" / folder / "1.txt").write_text(words())
    assert "folders (neg, pos)" in refused("rows", "--model", models["decoder"])
    trimtab("init", "rows", "task.name=text", "--model", models["decoder"])


def test_files_for_scoring_are_those_that_are_called_alike(here, models):
    for name in ("my_train", "my_test", "a_dev", "other_val"):
        write_jsonl(here / f"{name}.jsonl", [{"text": words(), "label": "ab"[i % 2]} for i in range(N)])
    trimtab("init", "my_train.jsonl", "--model", models["encoder"])
    data = yaml.safe_load(Path("my_train.yaml").read_text())["data"]
    assert (data["train"], data["test"], "validation" in data) == ("my_train.jsonl", "my_test.jsonl", False)


def test_a_recipe_that_is_there_stays(here, models):
    write_jsonl(here / "rows.jsonl", [{"text": words(), "label": i % 2} for i in range(N)])
    Path("rows.yaml").write_text("mine")
    assert "rows.yaml" in refused("rows.jsonl", "--model", models["encoder"])
    assert Path("rows.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    "rows, more, says",
    [
        ([{"a": words(), "b": words()} for _ in range(N)], (), "its columns a, b fit no task"),
        ([{"t": words(), "hue": "rgb"[i % 3], "size": "sml"[i % 3]} for i in range(N)], (), "task.label=hue"),
        ([{"x": i, "y": i / 2} for i in range(N)], (), "no column of text; its columns are x, y"),
        ([{"text": " ", "label": i % 2} for i in range(N)], (), "no text in any row; its columns are text, label"),
        ([{"text": words(), "label": 1} for _ in range(N)], (), "every row has label '1'"),
        ([{"text": words(), "label": i % 2} for i in range(N)], ("task.label=lable",), "It has text, label"),
        ([{"text": words(), "label": i % 2} for i in range(N)], ("task.txt=x",), "task.txt"),
        ([{"text": words(), "label": i % 2} for i in range(N)], ("train.lr=1",), "train.learning_rate"),
        ([{"messages": turns()} for _ in range(N)], ("model={encoder}",), "encoder"),
        (
            [{"body": words(9), "highlights": words()} for _ in range(N)],
            (),
            "'task.prompt=body' 'task.answer=highlights'",
        ),
    ],
)
def test_what_is_not_understood_is_refused_with_the_columns_that_were_seen(rows, more, says, here, models):
    write_jsonl(here / "rows.jsonl", rows)
    more = [text.format(**models) for text in more]
    if not any(text.startswith("model=") for text in more):
        more += ["--model", models["encoder"]]
    assert says in refused("rows.jsonl", *more)


def test_a_file_without_a_header_is_named_as_such(here, models):
    Path("rows.csv").write_text("".join(f"{words()},{i % 2}\n" for i in range(N)))
    assert "the first line of a file must name its columns" in refused("rows.csv", "--model", models["encoder"])


def test_brackets_and_blanks_in_names_are_said_as_they_are(here, models):
    model = shutil.copytree(models["encoder"], here / "tiny [/m]")
    rows = [{"text [/b]": words(), "label [red]": "ab"[i % 2]} for i in range(N)]
    write_jsonl(here / "my rows [2].jsonl", rows)
    told = trimtab("init", "my rows [2].jsonl", "--model", model).stdout
    assert "a text (text [/b]) and one of 2 classes (label [red])" in told
    assert shlex.split(told)[-1] == "my rows [2].yaml"
    assert "tiny [/m]" in trimtab("plan", "my rows [2].yaml").stdout
    told = trimtab("select", "my rows [2].yaml", "where.ratio=0.5", "output_dir=out [/x]").stdout
    assert told.splitlines()[-1] == "out [/x]/where.json"


def test_what_stands_beside_can_be_left_out_and_another_adapter_keeps_to_its_own_keys(here, models):
    for name, classes in (("train", "ab"), ("test", "abc")):
        write_jsonl(here / f"{name}.jsonl", [{"text": words(), "label": classes[i % len(classes)]} for i in range(N)])
    assert "label 'c', which no training row has" in refused("train.jsonl", "--model", models["encoder"])
    for i, adapter in enumerate(("adapter=vera", "adapter.type=bottleneck", "train=null")):
        trimtab("init", "train.jsonl", "data.test=null", adapter, "--model", models["encoder"], "-o", f"{i}.yaml")
        assert json.loads(trimtab("plan", f"{i}.yaml", "--json").stdout)["params"]["initial"] > 0
        assert "test" not in yaml.safe_load(Path(f"{i}.yaml").read_text())["data"]
    assert "data='x.jsonl': must hold keys and values" in refused("train.jsonl", "data=x.jsonl")
