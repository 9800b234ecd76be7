"""Commands on a run that was trained some time ago: what was trained decides, not what the data says today; and what
`--out` names is written over an earlier output of the same command, and over nothing else."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from test_own_data import ROWS, trimtab, write_recipe
from test_run import read, tiny_model
from trimtab import TrimCallback
from trimtab.app import demo, outputs
from trimtab.app.runfolder import RunFolder
from trimtab.app.screen import Screen
from trimtab.app.trained import trained_adapter
from trimtab.errors import ConfigError

NAMES = ["bad", "good", "so so"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of six steps with a checkpoint after three."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.csv").write_text(ROWS)
    (folder / "dev.csv").write_text(ROWS)
    recipe = write_recipe(
        folder,
        model=str(tiny_model(folder / "model")),
        task={"name": "text_classification"},
        data={"train": str(folder / "train.csv"), "validation": str(folder / "dev.csv")},
        train={"max_steps": 6, "save_steps": 3, "save_strategy": "steps", "learning_rate": 5e-2, "use_cpu": True},
    )
    trimtab("run", recipe)
    return folder


@pytest.fixture
def moved(trained, tmp_path):
    """The same run, with data of its own that a test may change."""
    for name in ("train.csv", "dev.csv"):
        shutil.copy(trained / name, tmp_path)
    shutil.copytree(trained / "run", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(trained / "train.csv"), str(tmp_path / "train.csv")).replace(
        str(trained / "dev.csv"), str(tmp_path / "dev.csv")
    ))  # fmt: skip
    return tmp_path / "run"


@pytest.fixture
def stopped(moved):
    """As if killed after its first checkpoint."""
    for name in ("adapter", "checkpoints/checkpoint-6"):
        shutil.rmtree(moved / name)
    for name in ("metrics.json", "predictions.json", "report.html"):
        (moved / name).unlink()
    return moved


def change(run, old, new, names=("train.csv", "dev.csv")):
    for name in names:
        file = run.parent / name
        file.write_text(file.read_text().replace(old, new))


def answers(run):
    (run.parent / "new.csv").write_text("text\nthe cat sat 0\nthe dog sat 1\nthe mat sat 1\n")
    found = trimtab("predict", run, run.parent / "new.csv").stdout
    return [json.loads(row)["prediction"] for row in found.splitlines()]


# -- classes ---------------------------------------------------------------------------------------------


def test_an_export_keeps_the_names_of_the_classes_that_were_trained(moved):
    before = answers(moved)
    change(moved, "bad", "zbad")  # sorted, it is the last class now
    trimtab("export", moved)
    assert read(moved, "adapter/labels.json")["label2id"] == {name: i for i, name in enumerate(NAMES)}
    assert answers(moved) == before


def test_scores_on_rows_with_other_classes_are_refused(moved):
    change(moved, "bad", "zbad")
    before = (moved / "metrics.json").read_bytes()
    message = trimtab("eval", moved, code=2).stderr
    assert "has label 'zbad', which the run was not trained on" in message and "'bad', 'good', 'so so'" in message
    assert (moved / "metrics.json").read_bytes() == before


def test_scores_on_rows_without_one_of_the_classes_are_those_of_the_trained_ones(moved):
    rows = (moved.parent / "train.csv").read_text().splitlines()
    kept = [row for row in rows if not row.endswith(",bad")]
    for name in ("train.csv", "dev.csv"):
        (moved.parent / name).write_text("\n".join(kept) + "\n")
    trimtab("eval", moved)
    kept = read(moved, "predictions.json")["validation"]
    assert kept["classes"] == NAMES and set(kept["label"]) == {1, 2}


@pytest.mark.parametrize("command", ["eval", "export", "predict"])
def test_other_class_names_than_the_trained_ones_are_refused(moved, command):
    file = [moved.parent / "dev.csv"] if command == "predict" else []
    message = trimtab(command, moved, *file, "task.labels=[so so, good, bad]", code=2).stderr
    assert "task.labels=['so so', 'good', 'bad']: the run was trained on 'bad', 'good', 'so so'" in message
    assert len(message.splitlines()) == 1


def test_a_run_that_was_stopped_knows_its_classes_too(stopped):
    change(stopped, "bad", "zbad")
    assert set(answers(stopped)) <= set(NAMES)
    trimtab("export", stopped)
    assert list(read(stopped, "adapter/labels.json")["label2id"]) == NAMES


def test_damaged_class_names_are_one_line(moved):
    (moved / "run.json").unlink()  # which knows them too
    (moved / "adapter/labels.json").write_text("{")
    assert "labels.json: damaged" in trimtab("export", moved, code=2).stderr.splitlines()[-1]


def test_each_row_keeps_its_own_answer_though_rows_of_like_length_are_scored_together(moved):
    texts = ["the cat sat " * 3, "the mat", "a dog " * 5, "the cat sat " * 9, "the mat " * 2, "a dog", "the cat sat"]
    rows = [f"{text.strip()},{NAMES[i % 3]}\n" for i, text in enumerate(texts)]
    (moved.parent / "dev.csv").write_text("text,label\n" + "".join(rows))
    trimtab("eval", moved)
    kept = read(moved, "predictions.json")["validation"]
    assert kept["label"] == [i % 3 for i in range(7)]

    folder = read(moved, "adapter/adapter_config.json")["base_model_name_or_path"]
    base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model = PeftModel.from_pretrained(base, moved / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        shares = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in texts]
    assert kept["probability"] == pytest.approx([float(p[i % 3]) for i, p in enumerate(shares)], abs=2e-4)
    found = trimtab("predict", moved, moved.parent / "dev.csv").stdout.splitlines()
    given = [list(json.loads(row)["probabilities"].values()) for row in found]
    assert given == [pytest.approx(p.tolist(), abs=1e-5) for p in shares]


def test_of_torchrun_s_processes_one_prints_and_writes_the_answers(moved, tmp_path, monkeypatch):
    rows, out = moved.parent / "dev.csv", tmp_path / "answers.jsonl"
    monkeypatch.setenv("RANK", "1")
    assert trimtab("predict", moved, rows).stdout == trimtab("predict", moved, rows, "--out", out).stdout == ""
    assert trimtab("export", moved).stdout == "" and not out.exists()


def test_every_row_is_scored_and_answered_whatever_training_leaves_out(moved):
    rows, before = moved.parent / "dev.csv", read(moved, "metrics.json")["metrics"]
    answered = trimtab("predict", moved, rows).stdout
    left_out = ["train.dataloader_drop_last=true", "train.prediction_loss_only=true"]
    left_out += ["train.per_device_eval_batch_size=5"]  # 36 rows
    trimtab("eval", moved, *left_out)
    assert read(moved, "metrics.json")["metrics"] == pytest.approx(before)
    assert len(read(moved, "predictions.json")["validation"]["label"]) == 36
    assert len(trimtab("predict", moved, rows, *left_out).stdout.splitlines()) == len(answered.splitlines()) == 36


# -- data ------------------------------------------------------------------------------------------------


def test_a_copied_run_answers_and_exports_without_its_data(moved):
    before = answers(moved)
    for name in ("train.csv", "dev.csv"):
        (moved.parent / name).unlink()
    assert answers(moved) == before
    trimtab("export", moved, "--format", "merged")
    assert (moved / "merged" / "model.safetensors").is_file()
    assert "no such file" in trimtab("eval", moved, code=2).stderr


@pytest.mark.parametrize("old, new, says", [
    ("the cat sat 0,bad\n", "", "36 training rows then, 30 now"),
    ("the cat", "the bat", "as many training rows, with something else in them"),
    ("bad", "zbad", "its classes were 'bad', 'good', 'so so', and are 'good', 'so so', 'zbad'"),
])  # fmt: skip
def test_a_run_does_not_go_on_with_other_training_rows(stopped, old, new, says):
    change(stopped, old, new)
    before = {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()}
    message = trimtab("run", stopped, "--resume", code=2).stderr.splitlines()[-1]
    assert message.startswith(f"error: data.train='{stopped.parent / 'train.csv'}': has changed since the run in ")
    assert says in message and "put the rows back as they were, or start again with --overwrite" in message
    assert {path.name: path.read_bytes() for path in stopped.iterdir() if path.is_file()} == before


def test_a_run_goes_on_with_the_same_rows_wherever_they_lie(trained, stopped):
    change(stopped, "the cat", "the bat", names=["dev.csv"])  # which trains nothing
    trimtab("run", stopped, "--resume")
    weights = "adapter/adapter_model.safetensors"
    assert (stopped / weights).read_bytes() == (trained / "run" / weights).read_bytes()
    assert read(stopped, "run.json")["data"] == read(trained / "run", "run.json")["data"]


def test_rows_that_were_trained_on_are_not_scored_as_if_they_were_split_off(trained, tmp_path):
    """The validation rows are split off the training file, which grew since; or are split off otherwise."""
    rows, run = tmp_path / "train.csv", tmp_path / "run"
    rows.write_text(ROWS)
    trimtab("run", trained / "recipe.yaml", f"data.train={rows}", "data.validation=null", f"output_dir={run}")
    trimtab("eval", run)
    trimtab("eval", run, "data.max_samples=3")
    told = f"the rows to score may be some that the run in '{run}' was trained on"
    for override in ("data.validation_share=0.5", "data.held_out=0.3", "data.stratify=false"):
        assert told in trimtab("eval", run, override, code=2).stderr
    before = read(run, "metrics.json")
    rows.write_text(ROWS + "".join(f"the mat ran {i},good\n" for i in range(9)))
    assert told in trimtab("eval", run, code=2).stderr
    assert read(run, "metrics.json") == before
    trimtab("eval", run, f"data.validation={trained / 'dev.csv'}")


def test_a_file_without_labels_is_said_not_to_be_scored(moved):
    (moved.parent / "new.csv").write_text("text\nthe cat\nthe dog\n")
    shown = trimtab("eval", moved, f"data.test={moved.parent / 'new.csv'}")
    note = f"data.test='{moved.parent / 'new.csv'}' has no labels and is not scored: the scores are those of validation"
    assert " ".join(note.split()) in " ".join(shown.stderr.split())
    assert note in read(moved, "metrics.json")["data"]["notes"]
    assert "no labels" not in trimtab("eval", moved, f"data.test={moved.parent / 'dev.csv'}").stderr


def test_the_lines_that_load_a_run_load_its_model_though_the_checkpoint_has_another_head_and_config(trained, tmp_path):
    other = AutoModelForSequenceClassification.from_pretrained(trained / "model", num_labels=5, hidden_act="relu")
    other.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(trained / "model").save_pretrained(tmp_path / "model")
    model = f"model={{name_or_path: {tmp_path / 'model'}, config: {{hidden_act: gelu}}}}"
    trimtab("run", trained / "recipe.yaml", model, f"output_dir={tmp_path / 'run'}")
    loaded = {}
    exec(read(tmp_path / "run", "metrics.json")["load"], loaded)
    batch = loaded["tokenizer"](["the cat sat 0", "the dog sat 1", "the mat sat 1"], return_tensors="pt")
    with torch.no_grad():
        shares = loaded["model"].eval()(**batch).logits.softmax(-1)
    (tmp_path / "new.csv").write_text("text\nthe cat sat 0\nthe dog sat 1\nthe mat sat 1\n")
    found = [json.loads(row) for row in trimtab("predict", tmp_path / "run", tmp_path / "new.csv").stdout.splitlines()]
    given = [list(row["probabilities"].values()) for row in found]
    assert given == [pytest.approx(row, abs=1e-5) for row in shares.tolist()]


# -- a run that is under way -----------------------------------------------------------------------------


def stop_at_step(monkeypatch, step):
    def on_step_end(self, args, state, control, **more):
        found = usual(self, args, state, control, **more)
        if state.global_step == step:
            raise RuntimeError("out of luck")
        return found

    usual = TrimCallback.on_step_end
    monkeypatch.setattr(TrimCallback, "on_step_end", on_step_end)


@pytest.fixture
def half(trained, tmp_path, monkeypatch):
    """A run that broke down in its fourth step, after the checkpoint of its third; and that was exported since."""
    settings = ["train.max_steps=12", f"output_dir={tmp_path / 'half'}"]
    with monkeypatch.context() as patch:
        stop_at_step(patch, 4)
        trimtab("run", trained / "recipe.yaml", *settings, code=1)
    trimtab("export", tmp_path / "half")
    return tmp_path / "half"


def test_scores_of_an_unfinished_run_say_so_and_do_not_make_it_a_finished_one(trained, half, tmp_path):
    shutil.rmtree(half / "adapter")
    shown = trimtab("eval", half)
    assert f"{half.name}/adapter" not in shown.stdout  # nothing is there
    assert "step 3 of 12" in shown.stdout and "the run is unfinished: taking" in shown.stderr
    assert read(half, "metrics.json")["unfinished"] == {"step": 3, "of": 12}
    assert "holds an unfinished run; go on with --resume" in trimtab("run", half, code=2).stderr
    table = trimtab("compare", half, trained / "run").stdout
    assert "no score from half (unfinished, step 3 of 12)" in table and "0 B" not in table
    trimtab("report", half)
    assert "not finished (its scores are of step 3 of 12)" in (half / "report.html").read_text()
    trimtab("run", half, "--resume")
    assert "unfinished" not in read(half, "metrics.json")
    assert "finished run" in trimtab("run", half, code=2).stderr


def test_what_was_exported_of_an_unfinished_run_gives_way_to_a_later_checkpoint(half, monkeypatch):
    assert trained_adapter(RunFolder(half)) == half / "adapter"
    stop_at_step(monkeypatch, 8)
    trimtab("run", half, "--resume", code=1)
    assert trained_adapter(RunFolder(half)) == half / "checkpoints" / "checkpoint-6"
    (half.parent / "new.csv").write_text("text\nthe cat\n")
    said = trimtab("predict", half, half.parent / "new.csv").stderr
    assert "checkpoint-6, step 6 of 12" in " ".join(said.split())
    trimtab("export", half)
    assert trained_adapter(RunFolder(half)) == half / "adapter"
    ours, theirs = (
        load_file(half / place / "adapter_model.safetensors") for place in ("adapter", "checkpoints/checkpoint-6")
    )
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if "lora_A" in key)  # B takes the scale


def test_the_lines_that_load_a_run_load_what_it_ended_with(half, trained):
    trimtab("export", half, "--format", "merged")  # of step 3
    trimtab("run", half, "--resume")
    assert "merged" not in read(half, "metrics.json")["load"] and "half/adapter" in read(half, "metrics.json")["load"]
    trimtab("export", half, "--format", "merged")
    trimtab("eval", half)
    assert "half/merged" in read(half, "metrics.json")["load"]


def test_the_page_of_a_run_says_what_it_was_scored_by_last(moved):
    assert "test" not in (moved / "report.html").read_text().partition("rows: 36 train")[2][:40]
    trimtab("eval", moved, f"data.test={moved.parent / 'dev.csv'}")
    assert "rows: 36 train, 36 validation, 36 test" in (moved / "report.html").read_text()
    (moved / "report.html").unlink()
    trimtab("eval", moved)
    assert not (moved / "report.html").exists()


def test_an_early_stopped_run_is_finished(trained, tmp_path):
    settings = ("early_stopping=1", "train.eval_strategy=steps", "train.eval_steps=1", "train.save_steps=1")
    trimtab(
        "run", trained / "recipe.yaml", *settings, "train.learning_rate=1e-12", "train.max_steps=9",
        f"output_dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert RunFolder(tmp_path / "run").is_finished
    assert trained_adapter(RunFolder(tmp_path / "run")) == tmp_path / "run" / "adapter"
    trimtab("eval", tmp_path / "run")
    assert RunFolder(tmp_path / "run").is_finished


# -- what --out names ------------------------------------------------------------------------------------


def refused(*args):
    line = trimtab(*args, code=2).stderr.splitlines()
    assert len(line) == 1 and line[0].startswith("error: out="), line
    return line[0]


@pytest.fixture
def mine(tmp_path):
    """A file and a folder of the user's."""
    (tmp_path / "mine.txt").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "config.json").write_text("mine")
    return tmp_path


def command(name, run, out):
    rest = {
        "predict": [run, run.parent / "dev.csv"], "compare": [run], "schema": [], "export": [run],
        "tune": [run, "adapter.r=2,4"],
    }[name]  # fmt: skip
    return [name, *rest, "--out", out]


@pytest.mark.parametrize("name", ["predict", "compare", "schema"])
def test_a_file_of_the_user_s_is_not_replaced(moved, mine, name):
    assert "is there, and holds no" in refused(*command(name, moved, mine / "mine.txt"))
    assert (mine / "mine.txt").read_text() == "mine"
    assert "is a file" in refused(*command(name, moved, mine / "mine.txt" / "more" / "out"))


@pytest.mark.parametrize("name", ["export", "tune"])
def test_a_folder_of_the_user_s_is_not_written_into(moved, mine, name):
    assert "is there, and holds no" in refused(*command(name, moved, mine / "folder"))
    assert "is there, and holds no" in refused(*command(name, moved, moved))
    assert (mine / "folder" / "config.json").read_text() == "mine"
    if name == "export":  # the command line itself refuses a file of the other's
        assert "is a file; name a folder" in refused(*command(name, moved, mine / "mine.txt"))
    assert os.listdir(mine / "folder") == ["config.json"]


def test_the_rows_that_are_asked_for_are_not_replaced_by_their_answers(moved):
    rows = moved.parent / "dev.csv"
    before = rows.read_text()
    assert "is the file that is read" in refused("predict", moved, rows, "--out", rows)
    assert rows.read_text() == before


@pytest.mark.parametrize("name, out", [
    ("predict", "deep/out.jsonl"), ("compare", "deep/out.html"), ("schema", "deep/out.json"), ("export", "deep/out"),
])  # fmt: skip
def test_the_same_command_writes_over_its_own_output_again(moved, tmp_path, name, out):
    for _ in range(2):
        trimtab(*command(name, moved, tmp_path / out))
    assert (tmp_path / out).exists()


def test_one_export_does_not_become_another(moved, tmp_path):
    trimtab("export", moved, "--out", tmp_path / "out")
    before = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    assert "no padded export of this run" in refused("export", moved, "--format", "padded", "--out", tmp_path / "out")
    other = moved.rename(tmp_path / "other")
    assert "no peft export of this run" in refused("export", other, "--out", tmp_path / "out")
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == before


def test_an_export_goes_into_an_empty_folder_that_one_stands_in(moved, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trimtab("export", moved, "--out", ".")
    assert (tmp_path / "here" / "adapter_config.json").is_file()
    monkeypatch.chdir(tmp_path)
    assert "out='.': is there, and holds no peft export" in refused("export", moved, "--out", ".")


def test_what_is_no_file_is_not_replaced_by_one(moved, tmp_path):
    os.mkfifo(tmp_path / "pipe")  # as /dev/null is, which a test that fails would take from everybody
    assert "is no file" in refused("predict", moved, moved.parent / "dev.csv", "--out", tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()


def test_a_place_without_permission_is_refused_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=f"no permission to write to {tmp_path}"):
        outputs.check_file(tmp_path / "new" / "file", outputs.is_schema, "schema")


@pytest.mark.parametrize("file", ["data/train.jsonl", "compare.html"])
def test_a_demo_replaces_an_earlier_demo_alone(tmp_path, monkeypatch, file):
    monkeypatch.setattr(demo, "check_model", lambda: None)
    monkeypatch.setattr(demo, "write_data", lambda folder: pytest.fail("written"))
    (tmp_path / "data").mkdir()
    (tmp_path / file).write_text(json.dumps({"text": "mine"}))
    with pytest.raises(ConfigError, match=r"holds no (rows|page) of an earlier demo"):
        demo.main(tmp_path, Screen(quiet=True))
