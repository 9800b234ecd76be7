"""A search over settings: what it tries, what it may see, and that the same command goes on with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from tasks.stand_ins import byte_model, byte_tokenizer, write_jsonl
from test_cli import one_line_error
from test_run import write_recipe
from trimtab.app import recipe as recipes
from trimtab.app import tune
from trimtab.app.rows import held_rows, load_rows
from trimtab.app.tasks import get_task
from trimtab.errors import ConfigError

RATES = "train.learning_rate=1e-3,5e-3"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return write_recipe(tmp_path_factory.mktemp("tune"), where=None)


@pytest.mark.parametrize("text, values", [
    ("1e-3,1e-4", ["1e-3", "1e-4"]),
    ("[query, value],[query]", ["[query, value]", "[query]"]),
    ("null,{method: adalora, target_r: 2}", ["null", "{method: adalora, target_r: 2}"]),
    (".*(q|k){1,2}", [".*(q|k){1,2}"]),
    ("'a, b',c", ["'a, b'", "c"]),
    ('["x,y", z],w', ['["x,y", z]', "w"]),
    ("don't,do", ["don't", "do"]),
    ("", [""]),
])  # fmt: skip
def test_commas_inside_of_brackets_and_quotes_belong_to_a_value(text, values):
    assert tune.split_values(text) == values


@pytest.mark.parametrize("settings, says", [
    (["train.lerning_rate=1,2"], ["train.lerning_rate=1", "Did you mean 'learning_rate'"]),
    (["train.learning_rate=1e-3,fast"], ["train.learning_rate='fast'", "must be a number"]),
    (["adapter.r=0,2"], ["adapter.r=0"]),
    (["adapter.r=2,,4"], ["adapter.r='2,,4'", "empty value"]),
    (["adapter.r=2,2"], ["adapter.r='2,2'", "holds 2 twice"]),
    (["train.learning_rate=1e-3,0.001"], ["holds 0.001 twice"]),
    (["adapter.r=2,4", "adapter.r=8"], ["given twice; write adapter.r=2,4,8"]),
    (["adapter.r=2"], ["nothing to choose from", "several values"]),
    ([], ["nothing to choose from"]),
    (["seed=1,2"], ["nothing to choose from"]),
    (["nonsense"], ["override='nonsense'", "key=v1,v2"]),
    (["data.max_samples=10,20"], ["data.max_samples='10,20'", "on the same rows"]),
    (["task.name=glue/mrpc,glue/rte"], ["on the same task"]),
    (["output_dir=a,b"], ["a folder of its own"]),
    (["rank=null,adalroa"], ["rank.method='adalroa'", "Did you mean 'adalora'"]),
    (["adapter.r=2,4", "data.held_out=1.5"], ["data.held_out=1.5", "a share of the training rows"]),
    (["adapter.r=2,4", "data.held_out=64"], ["data.held_out=64", "leaves none of 64"]),
    (["adapter.target_modules=[query],[qurey]"], ["'qurey'", "Did you mean 'query'"]),
])  # fmt: skip
def test_what_cannot_be_searched_over_is_one_line(recipe, tmp_path, settings, says):
    message = one_line_error("tune", recipe, *settings, "--out", tmp_path / "out")
    for part in says:
        assert part in message
    assert not (tmp_path / "out" / "trials").exists()


def text_recipe(folder, **sections):
    """Three texts, of which two are trained on: some 40 rows of 32 tokens."""
    byte_model(max_position_embeddings=64).save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    file = write_jsonl(folder / "t.jsonl", [{"text": "the cat sat on a mat " * 30}] * 3)
    task, train = {"name": "text", "max_length": 32}, {"num_train_epochs": 5, "learning_rate": 1e-3, "use_cpu": True}
    made = {"model": str(folder / "model"), "task": task, "data": {"train": file}, "train": train, **sections}
    (folder / "recipe.yaml").write_text(json.dumps(made))
    return folder / "recipe.yaml"


def test_a_search_in_several_processes_is_told_of_jobs(recipe, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    said = one_line_error("tune", recipe, RATES)
    assert said.startswith("error: processes=2: ") and "--jobs" in said


def test_packed_texts_are_not_counted_as_rows_before_they_are_cut(tmp_path):
    recipe = text_recipe(tmp_path, freeze={"method": "aflora", "warmup": 8, "final": 10})
    search = tune._laid_out(str(recipe), ["adapter.r=2,4"], tmp_path / "out")
    tune._check(search)  # two texts would be five steps, in which this schedule has no place
    assert [trial.total_steps for trial in search.trials] == [None, None]


def test_a_loss_over_tokens_is_not_compared_across_tokenizers(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}] * 8)
    path = tmp_path / "r.yaml"
    path.write_text(json.dumps({"model": "some/model", "task": "instruct", "data": {"train": str(file)}}))
    assert "a mean over tokens" in one_line_error("tune", path, "task.max_length=64,128")
    path.write_text(json.dumps({"model": "some/model", "task": "text", "data": {"train": str(file)}}))
    for key in ("task.max_length=64,128", "model=some/model,other/model", "task.pack=true,false"):
        assert "cannot be searched over by perplexity, a mean over tokens" in one_line_error("tune", path, key)


def test_the_dtype_of_a_model_changes_no_tokens(tmp_path):
    search = tune._laid_out(str(text_recipe(tmp_path)), ["model.dtype=float32,bfloat16"], tmp_path / "out")
    assert search.keys == ["model.dtype"] and search.metric == "perplexity"


def test_a_change_in_any_file_of_a_folder_or_a_pattern_is_seen(tmp_path):
    folder = tmp_path / "rows"
    folder.mkdir()
    files = [folder / f"{name}.csv" for name in "ab"]
    for file in files:
        file.write_text("text,label\na,b\n")
    for train in (str(folder), str(folder / "*.csv"), [str(file) for file in files]):
        assert tune._training_files(train) == files


def test_every_class_has_its_share_of_the_rows_held_out():
    labels = [0] * 150 + [1] * 40 + [2] * 9 + [3]
    held = held_rows(0.2, 200, labels, 0)
    assert len(held) == 40 == len(set(held)) and held == sorted(held)
    counts = np.bincount(np.asarray(labels)[held], minlength=4)
    assert all(abs(n - share) <= 1 for n, share in zip(counts, (30, 8, 1.8))) and counts[3] == 0
    assert held_rows(0.2, 200, labels, 0) == held != held_rows(0.2, 200, labels, 1)
    assert len(held_rows(25, 200, None, 0)) == 25


def test_numbers_are_held_out_over_their_whole_range():
    labels = np.random.default_rng(0).permutation(100) / 10
    held = sorted(labels[held_rows(10, 100, labels.tolist(), 0)])
    assert all(i <= value < i + 1 for i, value in enumerate(held))


def test_rows_to_score_are_training_rows_alone_where_the_recipe_has_no_validation_too(recipe):
    """There the task splits off a tenth for it, which is as little to be seen as a file."""
    for overrides in ([], ["data.validation=null"]):
        real = recipes.load(recipe, overrides)
        trained = get_task(real.task.model_dump()).load_data(real.data.to_load)["train"]["sentence1"][:]
        trial = recipes.load(recipe, [*overrides, "data.held_out=0.25"])
        rows = load_rows(trial, get_task(trial.task.model_dump()))
        assert set(rows) == {"train", "validation"}
        assert sorted(rows["train"]["sentence1"][:] + rows["validation"]["sentence1"][:]) == sorted(trained)
        assert len(rows["validation"]) == round(len(trained) / 4)


def test_rows_held_out_stand_under_a_name_that_the_task_scores():
    parts = DatasetDict({name: Dataset.from_dict({"x": list(range(8))}) for name in ("train", "test")})
    task = SimpleNamespace(load_data=lambda data: parts, notes=["test: 3 of 8 rows kept"])
    rows = load_rows(recipes.load({"model": "m", "data": {"held_out": 2}}), task)
    assert len(rows["test"]) == 2 and len(rows["train"]) == 6 and not set(rows["test"]["x"]) & set(rows["train"]["x"])
    assert task.notes == ["data.held_out: 2 of 8 training rows are scored, in place of validation and test"]


def command(recipe, out, *more):
    return [sys.executable, "-m", "trimtab", "tune", str(recipe), RATES, "--out", str(out), "--json", *more]


@pytest.mark.slow
def test_a_killed_search_goes_on_with_what_is_missing_whatever_validation_holds(tmp_path):
    """Killed while its second trial runs; then every validation label is turned around."""
    out, epochs, recipe = tmp_path / "out", "train.num_train_epochs=15", write_recipe(tmp_path / "recipe", where=None)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tune.__file__).parents[1])}
    search = subprocess.Popen(command(recipe, out, epochs), stdout=subprocess.DEVNULL, env=env)
    first, second = (out / "trials" / f"train.learning_rate={rate}" for rate in ("0.001", "0.005"))
    deadline = time.monotonic() + 300
    while not list(second.glob("checkpoints/*/trainer_state.json")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(search.pid, signal.SIGKILL)
    search.wait()
    assert (first / "metrics.json").is_file()
    killed_at_once = not (second / "metrics.json").is_file()
    before = (first / "metrics.json").stat().st_mtime_ns
    validation = recipe.parent / "validation.jsonl"
    turned = [{**row, "label": 1 - row["label"]} for row in map(json.loads, validation.read_text().splitlines())]
    write_jsonl(validation, turned)

    done = subprocess.run(command(recipe, out, epochs), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (first / "metrics.json").stat().st_mtime_ns == before
    assert killed_at_once and (second / "metrics.json").is_file()
    assert (found["metric"], found["greater_is_better"], found["held_out_rows"]) == ("accuracy", True, 13)
    scores = [one["score"] for one in found["candidates"]]
    assert scores == sorted(scores, reverse=True) and found["candidates"][0]["settings"] == found["best"]
    for one in found["candidates"]:
        [kept] = json.loads((Path(one["trials"][0]["folder"]) / "predictions.json").read_text()).values()
        assert kept["rows"] == 13 and one["score"] == np.mean(np.equal(kept["label"], kept["predicted"]))

    best, given = recipes.load(found["recipe"]), recipes.load(recipe)
    assert best.train == {**given.train, "num_train_epochs": 15, "learning_rate": found["best"]["train.learning_rate"]}
    assert best.data == given.data and best.seed == given.seed
    again = subprocess.run(command(recipe, out, epochs), capture_output=True, env=env)
    assert json.loads(again.stdout) == found
    assert "num_train_epochs" in one_line_error("tune", recipe, RATES, "train.num_train_epochs=2", "--out", out)


def finished(folder, recipe, score, loss=0.5, fingerprint="f"):
    folder.path.mkdir(parents=True)
    folder.recipe.write_text(recipe.to_yaml())
    folder.write(
        folder.metrics,
        {
            "metrics": {"accuracy": score, "loss": loss},
            "metric": "accuracy",
            "seconds": 1.0,
            "params": {"final": 5},
            "seed": recipe.seed,
        },
    )
    folder.write(folder.predictions, {"validation": {"rows": 13, "fingerprint": fingerprint}})


def searched(recipe, out, settings, scores):
    """A search whose trials are done, with these scores in their order."""
    search = tune._laid_out(str(recipe), settings, out)
    for trial, result in zip(search.trials, scores):
        finished(trial.folder, trial.recipe, *result)
        tune._settle(trial)
    return tune._choose(search, str(recipe), settings)


def test_several_seeds_count_by_their_mean_and_the_recipe_keeps_its_own(recipe, tmp_path):
    found = searched(recipe, tmp_path, ["adapter.r=2,4", "seed=5,6"], [(0.9,), (0.5,), (0.8,), (0.7,)])
    assert found.best.settings == {"adapter.r": 4} and found.best.score == pytest.approx(0.75)
    assert recipes.load(found.recipe).seed == 0 and recipes.load(found.recipe).adapter.r == 4


def test_the_best_recipe_writes_beside_itself_from_wherever_it_is_run(recipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = searched(recipe, Path("out"), ["adapter.r=2,4"], [(0.7,), (0.5,)])
    assert recipes.load(found.recipe).output_dir == str(tmp_path / "out" / "best")


def test_of_equal_scores_the_lower_loss_decides(recipe, tmp_path):
    found = searched(recipe, tmp_path, ["adapter.r=2,4,8"], [(0.7, 0.6), (0.7, 0.5), (0.7, 0.7)])
    assert found.best.settings == {"adapter.r": 4}


def test_a_trial_that_diverged_is_not_chosen(recipe, tmp_path):
    nan = float("nan")
    found = searched(recipe, tmp_path, ["adapter.r=2,4"], [(nan, nan), (0.1,)])
    assert found.best.settings == {"adapter.r": 4} and "1 of 2 trials diverged" in found.notes[0]
    with pytest.raises(tune.SearchError, match="no trial ended with a finite score"):
        searched(recipe, tmp_path / "none", ["adapter.r=2,4"], [(nan, nan), (nan, nan)])


def test_what_is_said_of_a_choice_leaves_out_settings_of_which_a_seed_diverged(recipe, tmp_path):
    nan = float("nan")
    found = searched(recipe, tmp_path, ["adapter.r=2,4", "seed=5,6"], [(0.9,), (nan, nan), (0.5,), (0.6,)])
    assert found.best.settings == {"adapter.r": 4} and not any("0.9" in note for note in found.notes)


def test_values_that_read_alike_have_folders_of_their_own(recipe, tmp_path):
    search = tune._laid_out(str(recipe), ["adapter.target_modules=[query],query"], tmp_path)
    assert len({trial.folder.path for trial in search.trials}) == 2


def test_trials_scored_on_different_rows_are_not_ranked(recipe, tmp_path):
    with pytest.raises(ValueError, match="scored on different rows"):
        searched(recipe, tmp_path, ["adapter.r=2,4"], [(0.5, 0.5, "a"), (0.6, 0.5, "b")])


def test_training_rows_that_changed_since_are_refused(recipe, tmp_path):
    moved = tmp_path / "train.jsonl"
    moved.write_bytes((recipe.parent / "train.jsonl").read_bytes())
    search = tune._laid_out(str(recipe), ["adapter.r=2,4", f"data.train={moved}"], tmp_path / "out")
    search.folder.mkdir()
    tune._take_folder(search, overwrite=False)
    moved.write_text(moved.read_text().replace('"label": 1', '"label": 0', 1))
    with pytest.raises(ConfigError, match="has changed since the search"):
        tune._take_folder(search, overwrite=False)
    tune._take_folder(search, overwrite=True)
