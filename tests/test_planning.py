"""Plans: published parameter counts from recipes without weights, and schedules in real steps."""

import json
from pathlib import Path

import peft
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

import trimtab
from tasks.stand_ins import tiny_config, write_jsonl
from trimtab.app import planning, recipe
from trimtab.app.models import meta_model
from trimtab.errors import BudgetError, ConfigError, ModelError
from trimtab.host.adapted import adapter_parameters
from trimtab.plans import Plan

RECIPES = Path(__file__).parents[1] / "recipes"
TINY = {
    "model": {
        "config": {
            "model_type": "bert",
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "intermediate_size": 32,
        }
    }
}


@pytest.mark.parametrize(
    "name, full, half",
    [  # Layer-wise LoRA's runs; methods.md, section 1, oracle (f)
        ("cka_roberta-base_mrpc", 294_912, 147_456),
        ("cka_deberta-v3-base_cola", 1_327_104, 663_552),
        ("cka_llama-2-7b_math", 319_815_680, 159_907_840),
        ("cka_mistral-7b_code", 335_544_320, 167_772_160),
        ("cka_gemma-7b_math", 400_031_744, 200_015_872),
    ],
)
def test_published_parameter_counts_follow_from_the_recipes(name, full, half):
    assert trimtab.plan(RECIPES / f"{name}.yaml").params["initial"] == half
    assert trimtab.plan(RECIPES / f"{name}.yaml", overrides=["where=null"]).params["initial"] == full


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    loaded = recipe.load(path)
    assert loaded.where is None or loaded.where.ratio == 0.5
    assert loaded.train["learning_rate"] > 0


def test_a_plan_that_waits_for_cka_says_so():
    made = trimtab.plan(TINY, overrides=["where.ratio=0.5"])
    assert made.where is None
    assert any("2 of 4 layers of encoder.layer" in note for note in made.notes)
    assert {site.site.block for site in made.sites} == {0, 1}  # a stand-in of the right size


def test_a_given_mask_is_planned_exactly():
    made = trimtab.plan(TINY, overrides=["where.method=mask", "where.mask=0110"])
    assert made.where.mask == "0110"
    assert {site.site.block for site in made.sites} == {1, 2}


def test_a_plan_goes_to_json_and_back():
    overrides = ["where=last", "rank=adalora", "rank.target_r=4", "adapter.r=6"]
    made = trimtab.plan(TINY, overrides=overrides, total_steps=100)
    assert Plan.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_aflora_s_average_in_closed_form_is_the_published_one():
    """DeBERTa-v3-base, r = 4, FFN projections only: methods.md, section 2."""
    overrides = [
        "where=null",
        "adapter.r=4",
        "freeze=aflora",
        "freeze.start=svd",
        "freeze.warmup=1ep",
        "freeze.final=0.7",
        "freeze.trainable_projections=[intermediate.dense, '(?<!attention.)output.dense']",
    ]
    path = RECIPES / "cka_deberta-v3-base_cola.yaml"
    made = trimtab.plan(path, overrides=overrides, total_steps=20 * 268, steps_per_epoch=268)
    assert made.params["initial"] == 83_232 + 368_640
    assert made.params["final"] == 83_232
    assert made.params["average_closed_form"] == 124_704
    assert made.params["average"] == pytest.approx(124_704, rel=0.01)


def test_the_schedule_shows_ranks_falling_to_the_target():
    made = trimtab.plan(TINY, overrides=["rank=salientlora", "rank.target_r=2", "adapter.r=8"], total_steps=1000)
    rows = [row for row in made.schedule if "total_rank" in row]
    assert (rows[0]["total_rank"], rows[-1]["total_rank"]) == (8 * len(made.sites), 2 * len(made.sites))
    assert made.params["final"] < made.params["average"] < made.params["initial"]
    assert made.schedule[-1] == {"step": 1000, "event": "end"}


def test_methods_without_a_known_length_plan_their_start_and_say_so():
    made = trimtab.plan(TINY, overrides=["rank=salientlora", "rank.target_r=2"])
    assert made.params["initial"] == made.params["final"]
    assert any("length of the run" in note for note in made.notes)


def test_vera_counts_its_two_vectors():
    made = trimtab.plan(
        RECIPES / "cka_roberta-base_mrpc.yaml",
        overrides=["where=null", "adapter={type: vera, r: 1024, target_modules: [query, value]}"],
    )
    assert made.params["initial"] == 43_008  # methods.md, section 6, oracle (a)


@pytest.mark.parametrize(
    "train, rows, steps, per_epoch",
    [
        ({}, 100, 39, 13),  # Trainer: batch 8, 3 epochs
        ({"num_train_epochs": 2, "per_device_train_batch_size": 16}, 100, 14, 7),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 100, 8, 4),
        ({"num_train_epochs": 0.5}, 100, 7, 13),
        ({"max_steps": 20}, 100, 20, 13),
        ({"dataloader_drop_last": True}, 100, 36, 12),
    ],
)
def test_steps_are_counted_as_the_trainer_counts_them(train, rows, steps, per_epoch):
    loaded = recipe.load({"model": "m", "train": train})
    assert planning.horizon_of(loaded, rows) == planning.Horizon(steps, per_epoch)


@pytest.mark.parametrize("is_dropped, per_epoch", [(False, 5), (True, 4)])
def test_several_processes_share_the_steps(is_dropped, per_epoch, monkeypatch):
    train = {"gradient_accumulation_steps": 1, "dataloader_drop_last": is_dropped}
    loaded = recipe.load({"model": "m", "train": train})
    assert planning.horizon_of(loaded, 100, processes=3) == planning.Horizon(3 * per_epoch, per_epoch)
    monkeypatch.setenv("WORLD_SIZE", "3")  # torchrun's
    assert planning.horizon_of(loaded, 100) == planning.Horizon(3 * per_epoch, per_epoch)


def test_a_hub_task_of_known_size_has_its_schedule_without_a_network():
    made = trimtab.plan(RECIPES / "cka_deberta-v3-base_cola.yaml")
    assert made.settings["total_steps"] == 25 * 268  # 8 551 rows in batches of 32


def test_local_rows_give_the_length_of_the_run(tmp_path):
    rows = [{"sentence1": "the cat", "sentence2": "a cat", "label": i % 2} for i in range(20)]
    file = write_jsonl(tmp_path / "train.jsonl", rows)
    made = trimtab.plan({**TINY, "task": "glue/mrpc", "data": {"train": file, "validation": file}})
    assert made.settings["total_steps"] == 9  # 3 batches of at most 8, 3 epochs
    assert any("head" in note for note in made.notes)


def test_a_model_and_the_config_that_peft_would_get_make_a_plan():
    model = meta_model(tiny_config("llama"))
    config = trimtab.TrimConfig(r=4, target_modules=["q_proj"], rank_pattern={r"layers\.1\..*q_proj": 2})
    made = trimtab.plan(model, config)
    assert [site.r for site in made.sites] == [4, 2]
    assert made.params["initial"] == (4 + 2) * (16 + 16)
    assert made.optimizer_bytes == 8 * made.params["initial"]  # two float32 moments of AdamW


def test_packed_texts_meet_a_budget_once_they_are_cut_into_rows(tmp_path):
    file = write_jsonl(tmp_path / "t.jsonl", [{"text": "a b c"}] * 3)
    text = {"model": {"config": tiny_config("llama").to_dict()}, "task": "text", "data": {"train": file}}
    made = trimtab.plan({**text, "rank": "adalora", "budget": {"final_params": 300}})
    assert any("texts are cut into rows with the tokenizer at hand" in note for note in made.notes)
    with pytest.raises(BudgetError, match="needs"):
        trimtab.plan({**text, "budget": {"final_params": 300}})


@pytest.mark.parametrize("where, left", [
    ({"method": "first"}, 4), ({"method": "cka"}, 3), ({"method": "cka", "exclude": [1, 2]}, 1),
    ({"method": "influence", "exclude": {"encoder.layer": [1, 2, 3]}}, 1),
])  # fmt: skip
def test_a_budget_chooses_no_more_layers_than_may_be_chosen(where, left):
    made = trimtab.plan({**TINY, "where": where, "budget": {"final_params": 10_000}})
    assert len({site.site.block for site in made.sites}) == left


@pytest.mark.parametrize("more", [
    {"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [1, 2]},
    {"trainable_token_indices": {"embed_tokens": [1, 2], "lm_head": [1]}, "rank": trimtab.AdaLoRA(target_r=2)},
])  # fmt: skip
def test_all_that_peft_trains_beside_the_projections_is_counted(more):
    config = trimtab.TrimConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", **more)
    made = trimtab.plan(meta_model(tiny_config("llama"), "AutoModelForCausalLM"), config, total_steps=10)
    model = peft.get_peft_model(AutoModelForCausalLM.from_config(tiny_config("llama")), config)
    assert made.params["initial"] == sum(p.numel() for p in adapter_parameters(model))


def test_a_budget_that_is_not_met_is_refused_with_the_number_needed():
    with pytest.raises(BudgetError, match=r"needs 2048; .*, or set rank or freeze$"):
        trimtab.plan({**TINY, "budget": {"final_params": 2000}})
    with pytest.raises(BudgetError, match=r"needs 2176; lower adapter.r or where.ratio$"):
        trimtab.plan({**TINY, "adapter": {"use_dora": True}, "budget": {"final_params": 2048}})


@pytest.mark.parametrize(
    "override, error, message",
    [
        ("adapter.target_modules=[query_proj]", ModelError, "no linear named 'query_proj'.*Did you mean 'query'"),
        ("rank.method=salient", ConfigError, "Did you mean 'salientlora'"),
        ("rank={method: salientlora, target_rank: 2}", ConfigError, "Did you mean 'target_r'"),
        ("rank=salientlora", ConfigError, r"rank\.target_r"),
        ("freeze={method: aflora, warmup: 1.0}", ConfigError, r"freeze\.warmup=1\.0.*ambiguous"),
        ("where={method: mask, mask: '01'}", ConfigError, "2 characters, but encoder.layer has 4 layers"),
        ("where={count: 5}", ConfigError, "from 1 to 4"),
        ("where={ratio: 0.1}", ConfigError, "chooses none of 4 layers"),
        ("adapter={type: vera, target_modules: [query]}", ConfigError, "works on adapter.type=lora"),
        ("rates={heads: 8}", ConfigError, r"rates\.heads=8: .*Did you mean 'head'"),
        ("rates={head: 8}", ConfigError, r"rates\.head=8\.0: nothing with this role trains here; there is A, B$"),
        ("rates={vectors: 8}", ConfigError, r"rates\.vectors=8\.0: nothing with this role"),
        ("rates.B=.nan", ConfigError, r"rates\.B=nan: must be a finite number above 0"),
        ("rates=16", ConfigError, "rates=16: must be keys and values"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(override, error, message):
    extra = ["rank={method: adalora, target_r: 1}"] if "vera" in override else []
    with pytest.raises(error, match=message) as caught:
        trimtab.plan(TINY, overrides=[override, *extra], total_steps=100)
    assert "\n" not in str(caught.value)


def test_a_plan_says_at_which_rates_its_roles_train():
    overrides = ["train.learning_rate=1e-3", "rates={A: 1, B: 16, vectors: 10}", "freeze=aflora"]
    note = trimtab.plan(TINY, overrides=overrides, total_steps=100).notes[-1]
    assert note.startswith("A at 1 times (0.001), B at 16 times (0.016), vectors at 10 times (0.01) the run's")


def test_the_shipped_configs_are_of_a_known_kind():
    for path in (RECIPES / "configs").glob("*.json"):
        AutoConfig.for_model(**json.loads(path.read_text()))


def test_a_model_without_a_config_is_refused_in_one_line():
    with pytest.raises(ConfigError, match="config=None: with a model goes the config"):
        trimtab.plan(AutoModelForCausalLM.from_config(tiny_config("llama")))


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_of_the_base_that_train_are_told(bias):
    base = meta_model(AutoConfig.for_model(**TINY["model"]["config"]), "AutoModel")
    config = peft.LoraConfig(r=2, target_modules=["query", "output.dense"], bias=bias)
    notes = trimtab.plan(base, config).notes
    model = peft.get_peft_model(base, config)
    n = sum(p.numel() for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name)
    assert f"bias={bias} trains {n:,} of the base's own parameters, too" in notes
