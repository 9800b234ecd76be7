"""An adapter's folder tells what it is: a model card that the hub reads, and a base model that others find."""

import json
import re
import shutil

import pytest
import yaml
from huggingface_hub import ModelCard

from tasks.stand_ins import WORDS, write_jsonl
from test_run import tiny_model, trimtab, write_recipe
from trimtab.app.card import fenced
from trimtab.exporting.basemodel import name_base

SHA = "0123456789abcdef0123456789abcdef01234567"
CLASSES = ("good | *fine*", "# <b>bad</b>\n```", "~~~")
ADALORA = {"method": "adalora", "target_r": 2, "warmup": 2, "final": 4, "interval_steps": 3}
TRAIN = {"num_train_epochs": 1, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "use_cpu": True}


def rows(path, n):
    words = [[WORDS[(i * k) % len(WORDS)] for k in range(1, 7)] for i in range(n)]
    return write_jsonl(path, [{"text": " ".join(w), "label": CLASSES[i % 3]} for i, w in enumerate(words)])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a model in the hub's cache, with class names that would break a table, and a secret in the recipe."""
    folder = tmp_path_factory.mktemp("card")
    snapshot = folder / "hub" / "models--some-lab--tiny-bert" / "snapshots" / SHA
    recipe = write_recipe(
        folder,
        model={"name_or_path": str(tiny_model(snapshot))},
        task={"name": "text_classification", "max_length": 16},
        data={"train": rows(folder / "train-rows.jsonl", 48), "validation": rows(folder / "scored.jsonl", 12)},
        rank=ADALORA,
        train=TRAIN | {"hub_token": "hf_abc"},
    )
    trimtab("run", recipe)
    return folder


def card_of(folder):
    return ModelCard.load(folder / "README.md")


def test_the_hub_finds_base_library_task_and_score_in_the_head(finished):
    head = card_of(finished / "run" / "adapter").data.to_dict()
    assert head["base_model"] == "some-lab/tiny-bert"
    assert head["library_name"] == "peft"
    assert head["pipeline_tag"] == "text-classification"
    assert {"lora", "trimtab", "base_model:adapter:some-lab/tiny-bert"} <= set(head["tags"])
    assert head["metrics"] == [json.loads((finished / "run" / "metrics.json").read_text())["metric"]]


def test_a_model_of_the_hubs_cache_is_named_by_its_id_and_revision(finished):
    config = json.loads((finished / "run" / "adapter" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("some-lab/tiny-bert", SHA)


def test_no_path_and_no_secret_is_in_the_folder(finished):
    for file in (finished / "run" / "adapter").iterdir():
        content = file.read_bytes()
        assert str(finished).encode() not in content, file.name
        assert b"hf_abc" not in content, file.name


def test_scores_layers_and_ranks_are_those_of_the_run(finished):
    text = card_of(finished / "run" / "adapter").text
    metrics = json.loads((finished / "run" / "metrics.json").read_text())["metrics"]
    for name, value in metrics.items():
        assert re.search(rf"\| {name} \| {value:.4g} \|", text.replace("\\", "")), name
    plan = json.loads((finished / "run" / "plan.json").read_text())
    for site in plan["sites"]:
        row = next(line for line in text.splitlines() if f"| encoder.layer.{site['site']['block']} |" in line)
        assert str(site["final_r"]) in row
    total = sum(site["final_r"] for site in plan["sites"])
    assert f"Total rank {total} over {len(plan['sites'])} modules. Layers were chosen by cka." in text


def test_what_comes_from_data_stays_text(finished):
    text = card_of(finished / "run" / "adapter").text
    assert "good \\| \\*fine\\*" in text
    outside = re.sub(r"(?ms)^(`{3,})\w+\n.*?^\1$", "", text)
    assert not [line for line in outside.splitlines() if line.startswith("# ") and line != "# run"]
    assert "<b>" not in outside.replace("\\<b", "")


def test_the_recipe_in_the_card_is_a_recipe(finished):
    text = card_of(finished / "run" / "adapter").text
    (recipe,) = re.findall(r"```yaml\n(.*?)\n```", text, re.DOTALL)
    settings = yaml.safe_load(recipe)
    assert settings["rank"] == ADALORA
    assert settings["model"]["name_or_path"] == "some-lab/tiny-bert"
    assert settings["data"]["train"] == "train-rows.jsonl"
    assert settings["train"] == TRAIN


def test_the_lines_in_the_card_load_the_adapter(finished):
    text = card_of(finished / "run" / "adapter").text
    (code,) = re.findall(r"```+python\n(.*?)\n```", text, re.DOTALL)
    model = finished / "hub" / "models--some-lab--tiny-bert" / "snapshots" / SHA
    code = code.replace("'some-lab/tiny-bert'", repr(str(model)))
    names = {}
    exec(code.replace("path/to/this/folder", str(finished / "run" / "adapter")), names)
    assert sorted(names["model"].config.id2label.values()) == sorted(CLASSES)


def test_a_card_that_the_user_wrote_is_left_alone(finished, tmp_path):
    run = shutil.copytree(finished / "run", tmp_path / "run")
    card = run / "adapter" / "README.md"
    card.write_text("mine")
    trimtab("eval", run)
    trimtab("export", run)
    assert card.read_text() == "mine"


def test_a_base_that_only_this_machine_has_is_said_and_can_be_named(finished, tmp_path):
    recipe = yaml.safe_load((finished / "run" / "recipe.yaml").read_text())
    recipe["model"]["name_or_path"] = str(tiny_model(tmp_path / "mine"))
    run = shutil.copytree(finished / "run", tmp_path / "run")
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = recipe["model"]["name_or_path"]
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))

    said = trimtab("export", run, "--format", "padded").stderr
    assert "padded/adapter_config.json names the base model by a folder of this machine" in " ".join(said.split())
    card = card_of(run / "padded")
    assert card.data.base_model is None
    assert str(tmp_path) not in str(card)
    assert "adapter of mine for" in card.text and "`base_model_name_or_path`" in card.text

    said = trimtab("export", run, "export.base_model=org/mine", "--format", "padded").stderr
    assert "names the base model" not in said
    assert card_of(run / "padded").data.base_model == "org/mine"
    assert json.loads((run / "padded" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/mine"


@pytest.mark.parametrize(
    ("known", "given", "named"),
    [
        ("some-lab/tiny", None, "some-lab/tiny"),
        ("bert-base-uncased", None, "bert-base-uncased"),
        ("/nowhere/models/bert", None, None),
        (f"/cache/models--a--b-c/snapshots/{SHA}", None, "a/b-c"),
        (f"/cache/models--gpt2/snapshots/{SHA}/", None, "gpt2"),
        ("/nowhere/models/bert", "org/name", "org/name"),
        (None, None, None),
    ],
)
def test_a_base_is_named_for_others_where_it_has_a_name(known, given, named, tmp_path):
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({"base_model_name_or_path": known}))
    assert name_base(tmp_path, given) == named
    assert json.loads(path.read_text())["base_model_name_or_path"] == (named or known)


def test_a_fence_is_longer_than_any_in_the_code():
    assert fenced("a\n```\nb", "yaml").startswith("````yaml\n")


def test_an_adapter_without_ranks_says_which_layers_it_is_in(tmp_path):
    train = {"max_steps": 2, "learning_rate": 5e-3, "use_cpu": True}
    trimtab(
        "run",
        write_recipe(tmp_path, adapter={"type": "bottleneck"}, where={"mask": "0110", "method": "mask"}, train=train),
    )
    text = card_of(tmp_path / "run" / "adapter").text
    assert re.findall(r"\| encoder\.layer\.(\d) \| (yes|) \|", text) == [
        ("0", ""),
        ("1", "yes"),
        ("2", "yes"),
        ("3", ""),
    ]
    assert "rank" not in text.lower()
    assert "from trimtab import BottleneckConfig" in text
    assert str(tmp_path) not in str(text)
