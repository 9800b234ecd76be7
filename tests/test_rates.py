"""Learning rates by role: every parameter in one group, and a run with groups keeps every promise."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import Trainer, TrainingArguments

import short_runs as runs
import tiny
import trimtab
from marks import slow
from trimtab import AdaLoRA, AFLoRA, Controller, SoRA, TrimConfig
from trimtab.errors import ConfigError

LLAMA = ["q_proj", "v_proj"]
SITES = 8  # of the llama of four blocks
RATES = {"A": 1, "B": 4, "head": 2}


def adapted(config: peft.PeftConfig, family: str = "llama") -> peft.PeftModel:
    return peft.get_peft_model(tiny.build(family), config)


def names(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    name_of = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, list[str]] = {}
    for group in groups:
        found.setdefault(group["role"], []).extend(name_of[id(p)] for p in group["params"])
    return found


# -- what is in which group --------------------------------------------------------------------------------------

CONTENTS: dict[str, tuple[str, peft.PeftConfig, dict[str, int]]] = {
    "lora": ("llama", peft.LoraConfig(target_modules=LLAMA), {"A": SITES, "B": SITES}),
    "lora with a bias": (
        "llama", peft.LoraConfig(target_modules=LLAMA, lora_bias=True), {"A": SITES, "B": 2 * SITES},
    ),
    "lora on an embedding": (
        "llama", peft.LoraConfig(target_modules=[*LLAMA, "embed_tokens"]), {"A": SITES + 1, "B": SITES + 1},
    ),
    "dora": (
        "llama", peft.LoraConfig(target_modules=LLAMA, use_dora=True), {"A": SITES, "B": SITES, "vectors": SITES},
    ),
    "lora and a few tokens": (
        "llama", peft.LoraConfig(target_modules=LLAMA, trainable_token_indices=[5]),
        {"A": SITES, "B": SITES, "vectors": 1},
    ),
    "a new classifier": (
        "bert", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", modules_to_save=["pooler"]),
        {"A": 4, "B": 4, "head": 4},
    ),
    "biases of the base": (  # bert's 10 biases a layer, three outside of them; the classifier's belongs to it
        "bert", peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS", bias="all"),
        {"A": 4, "B": 4, "head": 2, "other": 34},
    ),
    "vera": ("llama", peft.VeraConfig(r=4, target_modules=LLAMA), {"vectors": 2 * SITES}),
    "peft's adalora": (
        "llama", peft.AdaLoraConfig(target_modules=LLAMA, total_step=100), {"A": SITES, "B": SITES, "vectors": SITES},
    ),
    "ia3": ("llama", peft.IA3Config(target_modules=LLAMA, feedforward_modules=[]), {"vectors": SITES}),
    "prompts of the last layers": (
        "llama", peft.AdaptionPromptConfig(adapter_len=2, adapter_layers=2, task_type="CAUSAL_LM"), {"vectors": 4},
    ),
    "prompts before the text": (
        "llama", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), {"vectors": 1},
    ),
    "houlsby": (
        "bert", trimtab.BottleneckConfig(bottleneck_size=4, task_type="SEQ_CLS"),
        {"A": 16, "B": 16, "head": 2, "other": 16},
    ),
    "aflora": ("llama", TrimConfig(target_modules=LLAMA, freeze=AFLoRA()), {"A": SITES, "B": SITES, "vectors": 16}),
    "aflora with frozen attention": (
        "bert",
        TrimConfig(target_modules=["query", "intermediate.dense"], task_type="SEQ_CLS",
                   freeze=AFLoRA(trainable_projections=["intermediate.dense"])),
        {"A": 4, "B": 4, "vectors": 16, "head": 2},
    ),
    "sora": (
        "llama", TrimConfig(target_modules=LLAMA, rank=SoRA(prox_threshold=0.1)),
        {"A": SITES, "B": SITES, "vectors": SITES},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CONTENTS)
def test_every_parameter_that_trains_is_in_the_group_of_its_role(case):
    family, config, expected = CONTENTS[case]
    model = adapted(config, family)
    groups = trimtab.parameter_groups(model, 1e-3, weight_decay=0.1)
    held = names(model, groups)
    assert {role: len(its) for role, its in held.items()} == expected
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted(name for its in held.values() for name in its) == sorted(trains)
    assert list(held) == [role for role in ("A", "B", "vectors", "head", "other") if role in held]
    assert {group["lr"] for group in groups} == {1e-3}


def test_a_module_that_the_user_thaws_is_a_head():
    model = adapted(peft.LoraConfig(target_modules=["query"]), "bert")
    model.base_model.model.classifier.requires_grad_(True)
    assert len(names(model, trimtab.parameter_groups(model, 1e-3))["head"]) == 2


def test_an_adapter_inside_the_user_s_own_module_is_found_with_the_user_s_layers():
    model = nn.ModuleDict({"encoder": adapted(peft.LoraConfig(target_modules=LLAMA)), "score": nn.Linear(32, 2)})
    assert {role: len(its) for role, its in names(model, trimtab.parameter_groups(model, 1e-3)).items()} == {
        "A": SITES, "B": SITES, "head": 2,
    }  # fmt: skip


def test_what_decays_is_what_decays_in_the_trainer(tmp_path):
    model = adapted(CONTENTS["houlsby"][1], "bert")
    args = TrainingArguments(str(tmp_path), weight_decay=0.1, use_cpu=True, report_to=[])
    theirs = Trainer(model, args).create_optimizer().param_groups
    ours = trimtab.parameter_groups(model, 1e-3, {"B": 16}, weight_decay=0.1)
    for decay in (0.1, 0.0):
        held = [{id(p) for g in groups if g["weight_decay"] == decay for p in g["params"]} for groups in (theirs, ours)]
        assert held[0] == held[1]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_lora_plus_has_the_groups_that_peft_gives_it(decay):
    model = adapted(peft.LoraConfig(target_modules=LLAMA))
    theirs = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=2e-4, loraplus_lr_ratio=16, loraplus_weight_decay=decay
    ).param_groups

    def of(groups: list[dict[str, Any]]) -> list[tuple[set[int], float, float]]:
        return [({id(p) for p in g["params"]}, g["lr"], g["weight_decay"]) for g in groups if g["params"]]

    ours = torch.optim.AdamW(trimtab.parameter_groups(model, 2e-4, {"B": 16}, weight_decay=decay), lr=2e-4)
    assert of(ours.param_groups) == of(theirs)


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "message"), [
    ({"heads": 2}, r"rates\.heads=2: no such role; there are A, B, vectors, head\. Did you mean 'head'"),
    ({"lora_B": 16}, r"Did you mean 'B'"),
    ({"B": 0}, r"rates\.B=0: must be a finite number above 0"),
    ({"B": -1}, "above 0"),
    ({"B": float("nan")}, "finite"),
    ({"B": float("inf")}, "finite"),
    ({"B": True}, "finite number"),
    ({"B": "16"}, "finite number"),
    ({"head": 8}, r"rates\.head=8\.0: nothing with this role trains here; there is A, B$"),
    ({"vectors": 8}, r"rates\.vectors=8\.0: nothing with this role"),
])  # fmt: skip
def test_rates_that_cannot_be_are_refused_in_one_line(rates, message):
    with pytest.raises(ConfigError, match=message) as caught:
        trimtab.parameter_groups(adapted(peft.LoraConfig(target_modules=LLAMA)), 1e-3, rates)
    assert "\n" not in str(caught.value)


def holds(*words: str) -> Any:
    return lambda name: any(word in name for word in words)


ADAPTIVE = dict(target_modules=LLAMA, r=4, freeze=AFLoRA(warmup=1, final=4, interval_steps=2))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(("config", "held", "missing"), [
    (TrimConfig(**ADAPTIVE), holds("lora_A", "lora_B"), r"lora_e\.default' and 15 more"),
    (TrimConfig(**ADAPTIVE), holds("lora_A", "lora_B", "lora_e"), r"lora_b\.default' and 7 more"),
    (TrimConfig(**ADAPTIVE), holds("lora_e"), r"lora_A\.default\.weight' and 23 more"),
    (TrimConfig(**ADAPTIVE), holds("embed_tokens"), "31 more"),
    (TrimConfig(target_modules=LLAMA, rank=AdaLoRA(target_r=4, warmup=1, final=4)), holds("lora_A"), "lora_B"),
    (peft.LoraConfig(target_modules=LLAMA), holds("lora_B"), r"lora_A\.default\.weight' and 7 more"),
])  # fmt: skip
def test_groups_that_leave_out_an_adapter_tensor_are_refused_by_its_name(config, held, missing, wrapped):
    model = adapted(config)
    optimizer: Any = torch.optim.AdamW([p for name, p in model.named_parameters() if held(name)])
    if wrapped:
        from accelerate import Accelerator

        optimizer = Accelerator(cpu=True).prepare(optimizer)
    with pytest.raises(ConfigError, match=rf"optimizer='AdamW'.*{missing}.*trimtab\.parameter_groups") as caught:
        Controller(model, optimizer, total_steps=20)
    assert "\n" not in str(caught.value)


def test_what_does_not_train_may_be_left_out():
    model = adapted(TrimConfig(**ADAPTIVE | {"freeze": AFLoRA(trainable_projections=["v_proj"], warmup=1, final=4)}))
    for name, p in model.named_parameters():
        if "lora_e" in name:
            p.requires_grad_(False)
    Controller(model, torch.optim.AdamW(trimtab.parameter_groups(model, 1e-3)), total_steps=20)
    Controller(model, None, total_steps=20)


def test_an_optimizer_of_flat_copies_says_nothing_about_a_plain_adapter():
    model = adapted(peft.LoraConfig(target_modules=LLAMA))
    Controller(model, torch.optim.AdamW([nn.Parameter(torch.zeros(9))]), total_steps=20)


def test_sora_s_threshold_follows_the_rate_of_its_gates_and_no_other():
    def threshold(rates: dict[str, float]) -> float | None:
        config = TrimConfig(target_modules=["query"], task_type="SEQ_CLS",
                            rank=SoRA(prox_threshold=0.1, scale_by_lr=True))  # fmt: skip
        model = adapted(config, "bert")
        groups = trimtab.parameter_groups(model, 1e-2, rates)
        return Controller(model, torch.optim.AdamW(groups, lr=1e-2), total_steps=40)._peak_learning_rate()

    assert threshold({}) == threshold({"head": 8, "B": 16}) == 1e-2
    assert threshold({"vectors": 2}) == 2e-2


# -- runs --------------------------------------------------------------------------------------------------------

HARD = dict(weight_decay=0.1, warmup_steps=4, lr_scheduler_type="cosine", max_grad_norm=0.5)


def fit(method: str, folder: Path, rates: dict[str, float] | None, resume: str | None = None) -> Any:
    """A short run by the stock Trainer with its own kind of optimizer; ``rates`` None leaves it its own groups."""
    model = runs.model_for("bert", method)
    options: dict[str, Any] = {}
    if rates is not None:
        args = TrainingArguments(str(folder), learning_rate=1e-2, use_cpu=True, report_to=[])
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        groups = trimtab.parameter_groups(model, 1e-2, rates, weight_decay=HARD["weight_decay"])
        options["optimizers"] = kind(groups, **settings), None
    trim, _ = runs.train(model, "bert", folder, resume=resume, options=options, save_steps=10, **HARD)
    return model, trim


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("method", ["salientlora+aflora", slow("sora"), slow("adalora")])
def test_a_rate_of_one_for_every_role_is_the_run_without_rates(method, tmp_path):
    plain, _ = fit(method, tmp_path / "plain", None)
    for i, rates in enumerate(({}, {"A": 1, "B": 1.0, "head": 1})):
        grouped, _ = fit(method, tmp_path / str(i), rates)
        assert same(plain, grouped)
        histories = [(tmp_path / name / "history.jsonl").read_text() for name in ("plain", str(i))]
        assert histories[0] == histories[1]


@pytest.mark.parametrize("method", ["salientlora+aflora", slow("sora")])
def test_a_run_with_rates_resumes_exactly_across_prunes_and_freezes(method, tmp_path):
    unbroken, trim = fit(method, tmp_path, RATES)
    history = (tmp_path / "history.jsonl").read_text()
    assert not same(unbroken, fit(method, tmp_path / "plain", {})[0])
    kinds = [event["event"] for event in trim.events if event["step"] <= 20]
    assert "rank" in kinds and ("freeze" in kinds or method == "sora")  # before the checkpoint that is resumed
    for step in (30, 40):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    resumed, _ = fit(method, tmp_path, RATES, resume=str(tmp_path / "checkpoint-20"))
    assert same(unbroken, resumed)
    assert (tmp_path / "history.jsonl").read_text() == history


def test_a_prune_and_a_freeze_leave_every_group_its_rate_and_drop_their_moments():
    model = runs.model_for("bert", "salientlora+aflora")
    optimizer = torch.optim.AdamW(trimtab.parameter_groups(model, 1e-2, RATES, weight_decay=0.1), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 40)
    controller = Controller(model, optimizer, total_steps=40)
    shape = [(g["role"], len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups]
    for step in range(39):
        model(**tiny.batch("bert", seed=step)).loss.backward()
        controller.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        controller.after_step()
        scheduler.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            rate = 1e-2 * RATES.get(group["role"], 1) * (1 - (step + 1) / 40)
            assert group["lr"] == pytest.approx(rate, rel=1e-12)
    assert controller.frozen() and sum(controller.ranks().values()) < sum(controller.initial_ranks.values())
    assert [(g["role"], len(g["params"]), g["weight_decay"]) for g in optimizer.param_groups] == shape
    for p, state in optimizer.state.items():
        assert p.requires_grad and all(v.shape == p.shape for v in state.values() if v.dim())


def test_a_role_moves_by_its_own_rate():
    """Adam's first step is the rate itself, whatever the gradient."""
    model = adapted(peft.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"), "bert")
    optimizer = torch.optim.Adam(trimtab.parameter_groups(model, 1e-3, {"B": 16, "head": 8}), lr=1e-3, eps=1e-30)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    model(**tiny.batch("bert")).loss.backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad and "lora_A" not in name:  # B = 0: A has no gradient yet
            rate = 16e-3 if "lora_B" in name else 8e-3
            moved = (p.detach() - before[name]).abs()
            assert torch.allclose(moved[moved > 0], torch.tensor(rate), rtol=1e-3), name
