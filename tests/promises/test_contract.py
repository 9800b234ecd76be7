"""The contract: what every method keeps in every family of models, through the stock Trainer.

A rank or freeze method joins by a line in `short_runs.METHODS`, another kind of adapter by one in `ADAPTERS`, a
family by one in `tiny.FAMILIES`; a selection of layers is found in its own table. Each method meets each family in
one cell, and the cells' other settings are chosen so that any two settings meet in some cell.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open

import short_runs as runs
import tiny
import trimtab
from marks import slow
from trimtab import freeze, rank, where
from trimtab.app.adapter_kinds import ADAPTERS as KINDS_OF_ADAPTER
from trimtab.errors import ExportError

ADAPTERS: dict[str, Any] = {
    "lora": lambda **common: trimtab.TrimConfig(r=4, lora_alpha=8, **common),
    "vera": lambda **common: peft.VeraConfig(r=4, **common),
    "bottleneck": lambda target_modules, **common: trimtab.BottleneckConfig(bottleneck_size=4, **common),
}
# Takes no choice of layers, and three families alone.
ELSEWHERE = {"adaption_prompt": "test_adaption_prompt.py"}

SETTINGS: dict[str, tuple[Any, ...]] = {
    "method": (*ADAPTERS, *runs.METHODS),
    "family": tuple(tiny.FAMILIES),
    "where": ("all", *where.METHODS),
    "resumed": (10, 20, 30),
    "format": ("peft", "padded", "merged"),
}
SAVE_EVERY = 10
Setting = tuple[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run: what is trained, in which model and layers, from which step it is resumed, and how it leaves."""

    method: str
    family: str
    where: str
    resumed: int
    format: str

    def __str__(self) -> str:
        return ", ".join(map(str, vars(self).values()))


def pairs(settings: Iterable[Setting]) -> set[tuple[Setting, Setting]]:
    return set(combinations(settings, 2))


ALL_PAIRS = {p for a, b in combinations(SETTINGS, 2) for p in product(*([(k, v) for v in SETTINGS[k]] for k in (a, b)))}


def pairwise() -> tuple[list[Cell], list[Cell]]:
    """Every method with every family: each method in each seventh family to begin with, then the others.

    A cell's other settings are those in which most pairs meet for the first time; among equals, those that were taken
    least. Pairs that never met have a cell of their own at the end.
    """
    unmet, taken = set(ALL_PAIRS), Counter[Setting]()

    def cell(**fixed: Any) -> Cell:
        rows = product(*([fixed[key]] if key in fixed else values for key, values in SETTINGS.items()))
        candidates = [list(zip(SETTINGS, row)) for row in rows]
        best = max(candidates, key=lambda row: (len(pairs(row) & unmet), -sum(taken[setting] for setting in row)))
        unmet.difference_update(pairs(best))
        taken.update(best)
        return Cell(**dict(best))

    first, *others = (
        [
            cell(method=method, family=family)
            for i, method in enumerate(SETTINGS["method"])
            for j, family in enumerate(SETTINGS["family"])
            if (i + j) % 7 == part
        ]
        for part in range(7)
    )
    rest = []
    while unmet:
        rest.append(cell(**dict(min(unmet, key=str))))
    return first, sum(others, rest)


FIRST, OTHERS = pairwise()
CELLS = [*FIRST, *map(slow, OTHERS)]


def selected(family: str, method: str) -> trimtab.Where | None:
    """Half of the layers of each stack, by a method of the table; None for all layers."""
    if method == "all":
        return None
    model, half = tiny.build(family).eval(), {"ratio": 0.5}
    if method == "mask":
        return where.from_mask(model, {path: "01" * (n // 2) for path, n in depths(model).items()})
    if not where.METHODS[method].needs_scores:
        return getattr(where, method)(model, **half)
    batches = [tiny.batch(family, seed=seed) for seed in (1, 2)]
    if where.METHODS[method].target:
        return where.choose_own(method, model, half, batches)
    unlabelled = [{key: value for key, value in batch.items() if key != "labels"} for batch in batches]
    if tiny.FAMILIES[family].task_type == "SEQ_2_SEQ_LM":
        unlabelled = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in unlabelled]
    return trimtab.select_layers(trimtab.layer_similarity(model, unlabelled), **half)


def depths(model: torch.nn.Module) -> dict[str, int]:
    from trimtab.host.sites import find_stacks

    return {path: len(stack.blocks) for path, stack in find_stacks(model).items()}


def adapted(cell: Cell, chosen: trimtab.Where | None) -> peft.PeftModel:
    family, base = tiny.FAMILIES[cell.family], tiny.build(cell.family)
    make = ADAPTERS.get(cell.method) or runs.config_for(cell.method)
    config = make(target_modules=family.target_modules, task_type=family.task_type)
    if chosen is not None:
        config = trimtab.restrict(config, chosen, base)
    torch.manual_seed(0)
    return peft.get_peft_model(base, config)


@dataclass(frozen=True)
class Run:
    """A finished run of 40 steps."""

    cell: Cell
    chosen: trimtab.Where | None
    folder: Path
    model: peft.PeftModel
    at_start: torch.Tensor
    """Logits before the first step."""
    logits: dict[int, torch.Tensor]
    """Logits of the training model at every save."""
    trim: trimtab.TrimCallback

    @property
    def events(self) -> list[dict[str, Any]]:
        return self.trim.events


@pytest.fixture(scope="module", params=CELLS, ids=str)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    cell, folder = request.param, tmp_path_factory.mktemp("run")
    chosen = selected(cell.family, cell.where)
    model = tiny.begun(adapted(cell, chosen), cell.family)
    at_start = tiny.logits(model, cell.family)
    trim, logits = runs.train(model, cell.family, folder, save_steps=SAVE_EVERY)
    yield Run(cell, chosen, folder, model, at_start, logits, trim)
    shutil.rmtree(folder)


def stock_peft(family: str, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():  # PEFT warns of missing keys; a warning is a failure here
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", message=".*Could not find a config file.*")
        return peft.PeftModel.from_pretrained(tiny.build(family), str(folder))


# -- each cell -----------------------------------------------------------------------------------------


def test_it_trains_in_the_chosen_layers_alone(run: Run) -> None:
    assert not torch.allclose(run.logits[SAVE_EVERY], run.at_start, atol=1e-4)
    if run.chosen is None:
        return
    adapters = [name for name, p in adapted(run.cell, run.chosen).named_parameters() if p.requires_grad]
    for path, mask in run.chosen.stacks.items():
        touched = "".join("01"[any(f"{path}.{i}." in name for name in adapters)] for i in range(len(mask)))
        assert touched == mask


def test_every_checkpoint_is_loaded_by_stock_peft_and_computes_the_same(run: Run) -> None:
    assert sorted(run.logits) == list(range(SAVE_EVERY, runs.STEPS + 1, SAVE_EVERY))
    for step, expected in run.logits.items():
        checkpoint = run.folder / f"checkpoint-{step}"
        loaded = stock_peft(run.cell.family, checkpoint)
        with safe_open(checkpoint / "adapter_model.safetensors", "pt") as file:
            assert set(file.keys()) == set(peft.get_peft_model_state_dict(loaded)), step
        assert torch.allclose(tiny.logits(loaded, run.cell.family), expected, atol=1e-5), step
        if run.cell.method in runs.METHODS:
            assert loaded.peft_config["default"].peft_type == "LORA"


def test_what_is_pruned_or_frozen_is_gone(run: Run) -> None:
    settings = runs.METHODS.get(run.cell.method, {})
    decides = {axis: s for axis, s in settings.items() if getattr(s, "starter", None) is not s}  # while it trains
    prunes = [e["freed"] for e in run.events if e["event"] == "rank" and e["kind"] == "prune"]
    freed = [f for f in prunes if sum(f.values())]
    assert bool(freed) == ("rank" in decides)
    if "freeze" not in settings:
        assert all(f["moments"] == 2 * f["parameters"] for f in freed)  # both of Adam's
    assert any(e["frozen"] for e in run.events if e["event"] == "freeze") == ("freeze" in settings)
    trainable = [e["trainable"] for e in run.events if e["event"] == "params"]
    assert (trainable[-1] < max(trainable)) == bool(decides)


def test_the_rank_budget_is_met_exactly(run: Run) -> None:
    target = getattr(runs.METHODS.get(run.cell.method, {}).get("rank"), "target_r", None)
    ranks = run.trim.controller.ranks()
    assert target is None or sum(ranks.values()) == target * len(ranks)


def test_resume_is_exact(run: Run, tmp_path: Path) -> None:
    shutil.copytree(run.folder, tmp_path, dirs_exist_ok=True)
    for later in range(run.cell.resumed + SAVE_EVERY, runs.STEPS + 1, SAVE_EVERY):
        shutil.rmtree(tmp_path / f"checkpoint-{later}")
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"event": "log", "st')  # the killed run was in the middle of a line
    model = adapted(run.cell, run.chosen)
    runs.train(model, run.cell.family, tmp_path, resume=trimtab.last_checkpoint(tmp_path), save_steps=SAVE_EVERY)
    again, unbroken = model.state_dict(), run.model.state_dict()
    assert again.keys() == unbroken.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in unbroken.items())
    assert (tmp_path / "history.jsonl").read_text() == (run.folder / "history.jsonl").read_text()


def test_the_history_holds_no_clock_and_one_json_object_a_line(run: Run) -> None:
    rows = [json.loads(line) for line in (run.folder / "history.jsonl").read_text().splitlines()]
    assert {"params", "log"} <= {row["event"] for row in rows}
    assert not any("runtime" in key or "second" in key for row in rows for key in row)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)


def test_what_is_exported_computes_what_was_trained(run: Run, tmp_path: Path) -> None:
    family = run.cell.family
    if run.cell.method == "bottleneck":
        with pytest.raises(ExportError, match="no LoRA or merged form"):
            trimtab.export(run.model, tmp_path, format=run.cell.format)
        return
    trimtab.export(run.model, tmp_path, format=run.cell.format)
    if run.cell.format == "merged":
        loaded = type(tiny.build(family)).from_pretrained(tmp_path)
    else:
        loaded = stock_peft(family, tmp_path)
        assert loaded.peft_config["default"].peft_type == "LORA"
    assert torch.allclose(tiny.logits(loaded, family), run.logits[runs.STEPS], atol=1e-5)


# -- the tables ----------------------------------------------------------------------------------------


def test_every_registered_method_is_in_the_contract() -> None:
    settings = [method for options in runs.METHODS.values() for method in options.values()]
    assert {s.method for s in settings if hasattr(s, "method")} == {*rank.METHODS, *freeze.METHODS}
    assert {*ADAPTERS, *ELSEWHERE} == set(KINDS_OF_ADAPTER)
    assert all((Path(__file__).parent.parent / file).is_file() for file in ELSEWHERE.values())


def test_any_two_settings_meet_in_some_cell() -> None:
    assert set().union(*(pairs(vars(cell).items()) for cell in [*FIRST, *OTHERS])) == ALL_PAIRS
    assert {s for cell in FIRST for s in vars(cell).items()} == {s for pair in ALL_PAIRS for s in pair}
