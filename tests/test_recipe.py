"""Recipes: what is written is what runs, and a wrong key says so in one line."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trimtab.app import lookup, recipe
from trimtab.app.tasks import get_task
from trimtab.app.trainer import training_arguments
from trimtab.errors import ConfigError

BASE = {"model": "some/model", "task": "glue/mrpc"}


def load(*overrides, **sections):
    return recipe.load({**BASE, **sections}, overrides)


def problem(*overrides, **sections):
    with pytest.raises(ConfigError) as caught:
        load(*overrides, **sections)
    assert "\n" not in str(caught.value)
    return caught.value


def test_the_recipe_of_the_architecture_page_loads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("train.jsonl", "dev.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "cola.yaml").write_text(
        textwrap.dedent("""\
        model: {name_or_path: microsoft/deberta-v3-base}
        task: {name: glue/cola, max_length: 64}
        data: {train: train.jsonl, validation: dev.jsonl}
        adapter: {type: lora, r: 15, alpha: 16, target_modules: [query_proj, key_proj, value_proj]}
        where: {method: cka, ratio: 0.5, samples: 1024}
        rank: {method: salientlora, target_r: 2}
        freeze: {method: aflora}
        train: {num_train_epochs: 5, learning_rate: 1.0e-3}
        output_dir: runs/cola
        seed: 0
        """)
    )
    loaded = recipe.load("cola.yaml")
    assert loaded.task.options == {"max_length": 64}
    assert loaded.rank.options == {"target_r": 2}
    assert loaded.data.train == str(tmp_path / "train.jsonl")
    assert loaded.train["learning_rate"] == 1e-3


def test_a_bare_word_stands_for_the_section_s_main_key():
    loaded = load("rank=salientlora", "rank.target_r=2", "where=first")
    assert (loaded.model.name_or_path, loaded.task.name) == ("some/model", "glue/mrpc")
    assert (loaded.rank.method, loaded.rank.options) == ("salientlora", {"target_r": 2})
    assert loaded.where.method == "first"


@pytest.mark.parametrize("text", ["1e-3", "1.0e-3", "'1e-3'", "1E-3", ".001", "0.001"])
def test_a_learning_rate_may_be_written_in_any_way(text):
    assert load(f"train.learning_rate={text}").train["learning_rate"] == 1e-3


@pytest.mark.parametrize("text, mask", [("0110", "0110"), ("1100", "1100"), ("'0011'", "0011")])
def test_a_mask_keeps_its_leading_zeros(text, mask):
    assert load("where.method=mask", f"where.mask={text}").where.mask == mask


def test_a_section_and_what_is_below_it_may_be_given_in_any_order():
    given = ("freeze=aflora", "freeze.final=0.5", "where=first", "where.ratio=0.25")
    for texts in (given, given[::-1]):
        made = load(*texts)
        assert made.freeze.options == {"final": 0.5} and (made.where.method, made.where.ratio) == ("first", 0.25)


def test_the_resolved_recipe_loads_as_itself(tmp_path):
    (tmp_path / "train.csv").write_text("a,b\n")
    (tmp_path / "model.json").write_text("{}")
    first = load("where.method=mask", "where.mask=0110", "train.learning_rate=1e-5", "freeze=aflora",
                 f"data.train={tmp_path}/train.csv", f"model.config={tmp_path}/model.json")  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(first.to_yaml())
    assert recipe.load(tmp_path / "recipe.yaml") == first
    assert recipe.load(tmp_path) == first  # a run folder is as good as its recipe


def test_data_is_found_from_the_current_directory_then_beside_the_recipe(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "r.yaml").write_text("model: m\ndata: {train: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").touch()
    assert recipe.load(tmp_path / "r.yaml").data.train == str(tmp_path / "rows.jsonl")
    (tmp_path / "here" / "rows.jsonl").touch()
    assert recipe.load(tmp_path / "r.yaml").data.train == str(tmp_path / "here" / "rows.jsonl")


@pytest.mark.parametrize(
    "override, key, hint",
    [
        ("adapter.rr=4", "adapter.rr", "Did you mean 'r'?"),
        ("where.ratoi=1", "where.ratoi", "Did you mean 'ratio'?"),
        ("train.learning_rat=1", "train.learning_rat", "Did you mean 'learning_rate'?"),
        ("modle=x", "modle", "Did you mean 'model'?"),
        ("ratio=0.5", "ratio", "Did you mean 'where.ratio'?"),
        ("learning_rate=1", "learning_rate", "Did you mean 'train.learning_rate'?"),
        ("adapter.lora_alpha=1", "adapter.lora_alpha", "this is adapter.alpha"),
        ("adapter.type=lroa", "adapter.type", "Did you mean 'lora'?"),
        ("train.output_dir=x", "train.output_dir", "own key is output_dir"),
        ("where.method=ckaa", "where.method", "Did you mean 'cka'?"),
        ("where.ratio=0", "where.ratio", "above 0 and at most 1"),
        ("where.ratio=1.5", "where.ratio", "above 0 and at most 1"),
        ("where.samples=1", "where.samples", "at least 2"),
        ("where.method=mask", "where.mask", "one 0/1 character per layer"),
        ("where={method: mask, mask: 01, count: 1}", "where.count", "drop one"),
        ("where={ratio: 0.5, count: 3}", "where.count", "keep one"),
        ("where.mask=01", "where.mask", "use where.method=mask"),
        ("adapter.r=0", "adapter.r", "at least 1"),
        ("adapter.target_modules=3", "adapter.target_modules", "a list or a string"),
        ("train.bf16=yess", "train.bf16", "true or false"),
        ("train.num_train_epochs=many", "train.num_train_epochs", "must be a number"),
        ("rank.target_r=2", "rank.method", "missing"),
        ("data.train=none.jsonl", "data.train", "no such file"),
        ("model=./nowhere", "model.name_or_path", "no such file or folder"),
        ("model.config=none.json", "model.config", "no such file"),
        ("data.trian=x", "data.trian", "Did you mean 'train'?"),
        ("data.train=[none.jsonl]", "data.train", "no such file"),
        ("seed.x=1", "seed.x", "nothing can stand below"),
        ("where", "override", "key=value"),
        ("model.config={a: [}", "model.config", "not YAML"),
    ],
)
def test_a_mistake_names_the_key_and_what_would_work(override, key, hint):
    sections = {"seed": 3} if override.startswith("seed") else {}
    error = problem(override, **sections)
    assert error.key == key
    assert hint in str(error)


def test_a_missing_recipe_names_its_neighbour(tmp_path):
    (tmp_path / "mrpc.yaml").touch()
    with pytest.raises(ConfigError, match=r"Did you mean 'mrpc\.yaml'"):
        recipe.load(tmp_path / "mprc.yaml")


def test_broken_yaml_names_the_line(tmp_path):
    (tmp_path / "r.yaml").write_text("model: m\nwhere: {ratio: [}\n")
    with pytest.raises(ConfigError, match="line 2, column 17"):
        recipe.load(tmp_path / "r.yaml")


def test_a_package_s_folder_is_a_model(monkeypatch, tmp_path):
    (tmp_path / "shipped_model" / "weights").mkdir(parents=True)
    (tmp_path / "shipped_model" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert lookup.package_folder("package:shipped_model/weights") == tmp_path / "shipped_model" / "weights"
    with pytest.raises(ConfigError, match="holds no 'other'"):
        lookup.package_folder("package:shipped_model/other")
    for name in ("no_such_package", "no_such_package.models", ""):
        with pytest.raises(ConfigError, match="the package is not installed"):
            lookup.package_folder(f"package:{name}/x")


def test_field_names_read_from_source_are_the_real_ones():
    import dataclasses

    import peft
    import transformers

    for module, cls in [("transformers.training_args", transformers.TrainingArguments),
                        ("peft.tuners.lora.config", peft.LoraConfig),
                        ("peft.tuners.vera.config", peft.VeraConfig)]:  # fmt: skip
        real = {f.name for f in dataclasses.fields(cls) if f.init}
        ours = set(lookup.dataclass_fields(module, cls.__name__))
        assert ours <= real
        assert real - ours <= {f.name for f in dataclasses.fields(peft.PeftConfig)}


def test_a_misspelt_key_is_found_without_torch():
    code = textwrap.dedent("""\
        import sys
        from trimtab.app import recipe
        try:
            recipe.load({"model": "m"}, ["train.learning_rat=1"])
        except ValueError:
            sys.exit("torch" in sys.modules)
        """)
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("task, asked, best, greater", [
    ("glue/mrpc", None, "accuracy", True),
    ("glue/mnli", None, "accuracy", True),
    ("glue/stsb", None, "pearson", True),
    ("text_classification", "f1_macro", "f1_macro", True),
    ("text_classification", "eval_loss", "loss", False),
    ({"name": "text_classification", "regression": True}, "mse", "mse", False),
    ("instruct", None, "answer_loss", False),
    ("math", None, "answer_loss", False),
    ("summarize", "token_accuracy", "token_accuracy", True),
    ("vqa", "perplexity", "perplexity", False),
])  # fmt: skip
def test_the_best_checkpoint_is_told_by_a_score_that_is_taken_while_training(task, asked, best, greater):
    train = {"load_best_model_at_end": True, "use_cpu": True, **({"metric_for_best_model": asked} if asked else {})}
    made = recipe.load({"model": "m", "task": task, "train": train})
    args = training_arguments(made, get_task(made.task.model_dump()), Path())
    assert (args.metric_for_best_model, args.greater_is_better) == (best, greater)


def test_a_number_that_stands_for_nothing_needs_no_quotes():
    for said, read in (("[-1, NA]", ["-1", "NA"]), ("-1", "-1"), ("[]", [])):
        assert recipe.load({"model": "m"}, [f"data.missing={said}"]).data.missing == read


@pytest.mark.parametrize("said, evals, saves", [
    ({"save_steps": 200}, "epoch", "steps"),
    ({"eval_steps": 0.1}, "steps", "epoch"),
    ({"save_steps": 200, "save_strategy": "epoch"}, "epoch", "epoch"),
    ({"eval_steps": None, "report_to": None}, "epoch", "epoch"),
])  # fmt: skip
def test_who_says_after_how_many_steps_means_steps(said, evals, saves):
    made = recipe.load({"model": "m", "task": "glue/mrpc", "train": {"use_cpu": True, **said}})
    args = training_arguments(made, get_task(made.task.model_dump()), Path())
    assert (args.eval_strategy, args.save_strategy, args.report_to) == (evals, saves, [])
    assert args.save_steps == said.get("save_steps", 500)
