"""Recipes of the papers' runs: all there, models of the right size, the table in the docs true."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from transformers import AutoConfig

from trimtab.app.models import meta_model
from trimtab.app.planning import auto_class_of
from trimtab.app.recipe import load

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes"
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
DECODERS = tuple(f"{model}_{task}" for model in ("llama-2-7b", "mistral-7b", "gemma-7b") for task in ("math", "code"))
RUNS = [
    *(f"cka_{model}_{task}" for model in ("roberta-base", "deberta-v3-base") for task in GLUE),
    *(f"{paper}_{run}" for paper in ("cka", "cka-pissa") for run in DECODERS),
    "cka_llava-1.5-7b_scienceqa",
    *(f"{paper}_deberta-v3-base_{task}" for paper in ("aflora", "salientlora", "adalora") for task in GLUE),
    "aflora_llama-7b_gsm8k",
    *(f"salientlora_{model}_{task}" for model in ("bart-large", "t5-base") for task in ("xsum", "cnndm")),
    "salientlora_llama-7b_alpaca",
    "salientlora_llama-2-7b_alpaca",
    "sora_deberta-v3-base_stsb",
    "sora_deberta-v3-base_rte",
    *(f"houlsby_bert-large_{task}" for task in GLUE),
    "llama-adapter_llama-7b_alpaca",
]


@pytest.fixture(scope="module")
def published() -> ModuleType:
    spec = importlib.util.spec_from_file_location("published", RECIPES / "published.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_published_run_has_its_recipe() -> None:
    assert not {f"{run}.yaml" for run in RUNS} - {path.name for path in RECIPES.glob("*.yaml")}


def test_the_table_in_the_docs_is_what_the_plans_say(published: ModuleType) -> None:
    _, marked, table = published.PAGE.read_text("utf-8").partition(published.MARK)
    assert marked
    assert table.strip() == published.table().strip(), "run: python recipes/published.py"


def test_pissa_starts_from_the_weights_and_differs_in_nothing_else() -> None:
    for run in DECODERS:
        plain, pissa = (
            yaml.safe_load((RECIPES / f"{paper}_{run}.yaml").read_text("utf-8")) for paper in ("cka", "cka-pissa")
        )
        assert pissa["adapter"].pop("init") == "pissa"
        assert plain == pissa


@pytest.mark.parametrize(
    "task, run, classifier",
    [  # the released scripts
        ("cola", 1e-2, 4e-2),
        ("mrpc", 1e-2, 8e-2),
        ("rte", 1e-2, 4e-2),
        ("stsb", 2e-2, 2e-2),
        ("sst2", 4e-3, 4e-3),
        ("qnli", 1e-3, 4e-3),
        ("mnli", 1e-2, 4e-3),
        ("qqp", 4e-3, 4e-3),
    ],
)
def test_aflora_s_classifier_trains_at_the_rate_of_its_script(task: str, run: float, classifier: float) -> None:
    recipe = load(RECIPES / f"aflora_deberta-v3-base_{task}.yaml")
    assert recipe.train["learning_rate"] == run
    assert run * (recipe.rates or {}).get("head", 1) == pytest.approx(classifier)


@pytest.mark.parametrize(
    "name, parameters",
    [  # the public checkpoints, tied weights counted once
        ("bert-large", 335_141_888),
        ("roberta-base", 124_645_632),
        ("deberta-v3-base", 183_831_552),
        ("bart-large", 406_291_456),
        ("t5-base", 222_903_552),
        ("llama-7b", 6_738_415_616),
        ("llama-2-7b", 6_738_415_616),
        ("mistral-7b", 7_241_732_096),
        ("gemma-7b", 8_537_680_896),
        ("llava-1.5-7b", 7_063_427_072),
    ],
)
def test_a_config_describes_the_public_model(name: str, parameters: int) -> None:
    config = AutoConfig.for_model(**json.loads((RECIPES / "configs" / f"{name}.json").read_text("utf-8")))
    without_head = {"bert": "AutoModel", "roberta": "AutoModel", "llava": "AutoModelForImageTextToText"}
    model = meta_model(config, without_head.get(config.model_type) or auto_class_of(config))
    assert sum(p.numel() for p in {id(p): p for p in model.parameters()}.values()) == parameters
