"""Resume is exact: of the run it names and no other, from any folder and in any loop; a finished run can go on."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainingArguments

import fresh
import short_runs as runs
import tiny
import trimtab
from trimtab import Controller, TrimCallback
from trimtab.app.trainer_settings import stock
from trimtab.errors import CheckpointError, ModelError, TrimtabError
from trimtab.host.adapted import adapter_layers
from trimtab.host.layers import hosted_layers

OFTEN = dict(save_steps=10, logging_steps=5)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Method -> (folder, trained model), made once."""
    made: dict[str, tuple[Path, peft.PeftModel]] = {}

    def get(method: str) -> tuple[Path, peft.PeftModel]:
        if method not in made:
            folder = tmp_path_factory.mktemp("unbroken")
            model = runs.model_for("bert", method)
            runs.train(model, "bert", folder, **OFTEN)
            made[method] = folder, model
        return made[method]

    return get


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@runs.each_method
def test_a_checkpoint_of_another_run_with_the_same_settings_is_refused(unbroken, tmp_path, method):
    folder, _ = unbroken(method)
    runs.train(runs.model_for("bert", method), "bert", tmp_path, seed=1, max_steps=40, **OFTEN)
    with pytest.raises(CheckpointError, match="another run"):
        runs.train(runs.model_for("bert", method), "bert", tmp_path, resume=str(folder / "checkpoint-20"), **OFTEN)


@runs.each_method
def test_state_beside_tensors_of_another_run_is_refused(unbroken, tmp_path, method):
    folder, _ = unbroken(method)
    runs.train(runs.model_for("bert", method), "bert", tmp_path / "other", seed=1, **OFTEN)
    trim = TrimCallback(resume_from=tmp_path / "other" / "checkpoint-20")
    with pytest.raises(CheckpointError, match="two runs would be mixed"):
        resumed = str(folder / "checkpoint-20")
        runs.train(runs.model_for("bert", method), "bert", tmp_path / "new", resume=resumed, trim=trim, **OFTEN)


@runs.each_method
def test_a_checkpoint_that_was_moved_anywhere_is_resumed_exactly(unbroken, tmp_path, method):
    folder, model = unbroken(method)
    shutil.copytree(folder / "checkpoint-20", tmp_path / "kept" / "the good one")
    again = runs.model_for("bert", method)
    runs.train(again, "bert", tmp_path / "out", resume=str(tmp_path / "kept" / "the good one"), **OFTEN)
    assert same(model, again)


@runs.each_method
def test_callbacks_that_trainer_makes_anew_from_the_checkpoint_resume_exactly(unbroken, tmp_path, method):
    folder, model = unbroken(method)
    for step in (10, 20):
        shutil.copytree(folder / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    again = runs.model_for("bert", method)
    runs.train(again, "bert", tmp_path, resume=True, restore_callback_states_from_checkpoint=True, **OFTEN)
    assert same(model, again)
    assert trimtab.last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-40")


def test_a_restored_callback_goes_on_with_the_same_history_file(tmp_path):
    def run(out: Path, **more: Any) -> None:
        trim = TrimCallback(history=tmp_path / "history.jsonl")
        runs.train(runs.model_for("bert", "salientlora"), "bert", out, trim=trim, **OFTEN, **more)

    run(tmp_path)
    whole = (tmp_path / "history.jsonl").read_text()
    for step in (30, 40):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    run(tmp_path, resume=True, restore_callback_states_from_checkpoint=True)
    assert (tmp_path / "history.jsonl").read_text() == whole


def test_what_is_scored_as_a_run_starts_is_not_scored_again_as_it_goes_on(tmp_path):
    scored = dict(eval_on_start=True, eval_strategy="steps", eval_steps=10) | OFTEN
    runs.train(runs.model_for("bert", "aflora"), "bert", tmp_path, **scored)
    whole = (tmp_path / "history.jsonl").read_text()
    for step in (30, 40):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    runs.train(runs.model_for("bert", "aflora"), "bert", tmp_path, resume=True, **scored)
    assert (tmp_path / "history.jsonl").read_text() == whole


@pytest.mark.parametrize("resumed", [[12], [8, 12]])  # epochs have 8 steps
def test_rows_that_are_grouped_by_length_go_on_in_the_order_of_their_epoch(tmp_path, resumed):
    grouped = stock({"train_sampling_strategy": "group_by_length"}) | dict(save_steps=4, max_steps=20)
    whole = runs.model_for("bert", "aflora")
    runs.train(whole, "bert", tmp_path, **grouped)
    for step in resumed:
        for later in range(step + 4, 21, 4):
            shutil.rmtree(tmp_path / f"checkpoint-{later}")
        again = runs.model_for("bert", "aflora")
        runs.train(again, "bert", tmp_path, resume=True, **grouped)
    assert same(whole, again)


def test_the_best_model_is_had_back_from_a_folder_that_was_moved(tmp_path):
    scored = dict(save_steps=5, max_steps=20, eval_strategy="steps", eval_steps=5, load_best_model_at_end=True)
    scored |= dict(metric_for_best_model="loss", greater_is_better=False)  # which rises from the first on
    whole = runs.model_for("bert", "aflora")
    _, logits = runs.train(whole, "bert", tmp_path / "run", **scored)
    assert not torch.allclose(tiny.logits(whole, "bert"), logits[20], atol=1e-5)
    shutil.move(tmp_path / "run", tmp_path / "moved")
    again = runs.model_for("bert", "aflora")
    runs.train(again, "bert", tmp_path / "moved", resume=True, **scored)
    assert same(whole, again)


def ranks(model: peft.PeftModel) -> dict[str, int]:
    return {name: layer.r["default"] for name, layer in adapter_layers(model)}


def check_extended(model: peft.PeftModel, folder: Path, decided: dict[str, int]) -> None:
    assert ranks(model) == decided
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    for step, is_same in ((60, True), (40, False)):
        loaded = peft.PeftModel.from_pretrained(tiny.build("bert"), str(folder / f"checkpoint-{step}"))
        assert torch.allclose(tiny.logits(loaded, "bert"), tiny.logits(model, "bert"), atol=1e-5) == is_same


@runs.each_method
def test_a_finished_run_can_be_extended_at_its_final_ranks(unbroken, tmp_path, method):
    folder, model = unbroken(method)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    decided = ranks(model)
    longer = OFTEN | dict(max_steps=60)
    other = runs.model_for("bert", method)
    callback, _ = runs.train(other, "bert", tmp_path, resume=str(tmp_path / "checkpoint-40"), **longer)
    assert callback.controller.step == 60
    check_extended(other, tmp_path, decided)
    shutil.rmtree(tmp_path / "checkpoint-60")  # and that run is resumed like any other
    again = runs.model_for("bert", method)
    runs.train(again, "bert", tmp_path, resume=True, **longer)
    assert same(other, again)


@runs.each_method
def test_a_trainer_can_be_told_to_train_on(tmp_path, method):
    model = runs.model_for("bert", method)
    it = trainer(model, tmp_path, TrimCallback(), save_strategy="steps", save_steps=20)
    it.train()
    decided = ranks(model)
    it.args.max_steps = 60
    it.train(resume_from_checkpoint=True)
    check_extended(model, tmp_path, decided)


def test_a_longer_horizon_in_mid_run_is_refused(unbroken, tmp_path):
    folder, _ = unbroken("salientlora")
    with pytest.raises(CheckpointError, match="total_steps"):
        runs.train(runs.model_for("bert", "salientlora"), "bert", tmp_path,
                   resume=str(folder / "checkpoint-20"), **OFTEN | dict(max_steps=60))  # fmt: skip


# -- loops of one's own ----------------------------------------------------------------------------------------


@runs.each_method
def test_accelerate_keeps_and_restores_a_registered_controller(tmp_path, method):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    def start() -> tuple[Any, ...]:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        accelerator = Accelerator(cpu=True)
        model = runs.model_for("bert", method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        model, optimizer = accelerator.prepare(model, optimizer)
        controller = Controller(model, optimizer, total_steps=40)
        accelerator.register_for_checkpointing(controller)
        return accelerator, model, optimizer, controller

    def go(accelerator: Any, model: Any, optimizer: Any, controller: Controller, until: int) -> None:
        batches = tiny.rows("bert", 8 * 40)
        while controller.step < until:
            rows = [batches[(controller.step * 8 + i) % len(batches)] for i in range(8)]
            batch = {k: torch.stack([torch.as_tensor(row[k]) for row in rows]) for k in rows[0]}
            accelerator.backward(model(**batch).loss)
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()

    whole = start()
    go(*whole, 20)
    whole[0].save_state(str(tmp_path / "state"))
    go(*whole, 40)
    whole[3].finish()
    resumed = start()
    resumed[0].load_state(str(tmp_path / "state"))
    assert resumed[3].step == 20
    go(*resumed, 40)
    resumed[3].finish()
    assert same(whole[1], resumed[1])


@runs.each_method
def test_a_bare_loop_resumes_from_the_pair_that_it_kept(tmp_path, method):
    batch = tiny.batch("bert")

    def start() -> tuple[Any, ...]:
        model = runs.model_for("bert", method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return model, optimizer, Controller(model, optimizer, total_steps=40)

    def go(model: Any, optimizer: Any, controller: Controller, until: int) -> None:
        while controller.step < until:
            model(**batch).loss.backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()

    model, optimizer, controller = start()
    go(model, optimizer, controller, 20)
    torch.save((model.state_dict(), optimizer.state_dict(), controller.state_dict()), tmp_path / "kept.pt")
    go(model, optimizer, controller, 40)
    controller.finish()
    other, optimizer, controller = start()
    weights, moments, state = torch.load(tmp_path / "kept.pt", weights_only=True)
    other.load_state_dict(weights, strict=False)
    controller.load_state_dict(*state)
    optimizer.load_state_dict(moments)
    go(other, optimizer, controller, 40)
    controller.finish()
    assert same(model, other)


# -- evaluation ------------------------------------------------------------------------------------------------


def trainer(model: torch.nn.Module, folder: Path, *callbacks: Any, **more: Any) -> Trainer:
    settings = dict(
        max_steps=40, per_device_train_batch_size=8, report_to=[], learning_rate=1e-2, use_cpu=True,
        disable_tqdm=True, save_strategy="no", average_tokens_across_devices=False,
    )  # fmt: skip
    args = TrainingArguments(str(folder), **settings | more)
    rows = tiny.rows("bert")
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks))


def test_evaluating_before_training_needs_no_folder_and_leaves_the_run_as_it_is(tmp_path):
    histories = []
    for name in ("evaluated", "not"):
        history = tmp_path / name / "deep" / "history.jsonl"
        torch.manual_seed(0)
        it = trainer(runs.model_for("bert", "salientlora"), tmp_path / name, TrimCallback(history=history))
        if name == "evaluated":
            it.evaluate()
            it.predict(it.eval_dataset)
        it.train()
        histories.append([json.loads(line) for line in history.read_text().splitlines()])
    assert [r["event"] for r in histories[0]] == [r["event"] for r in histories[1]]


def test_evaluation_in_a_process_of_its_own_is_right_and_leaves_the_history_alone(tmp_path):
    folder, history = tmp_path / "run", tmp_path / "history.jsonl"
    model = runs.model_for("bert", "salientlora+aflora")
    runs.train(model, "bert", folder, trim=TrimCallback(history=history), **OFTEN)
    model.save_pretrained(str(folder / "adapter"))
    torch.save(tiny.logits(model, "bert"), tmp_path / "logits.pt")
    before = history.read_text()
    script = (
        "import sys; sys.path[:0] = sys.argv[2:]; import torch, tiny, short_runs as runs, trimtab\n"
        "from pathlib import Path; from test_resume_is_exact import trainer\n"
        "here = Path(sys.argv[1]); model = runs.model_for('bert', 'salientlora+aflora')\n"
        "model.load_adapter(str(here / 'run' / 'adapter'), 'default')\n"
        "it = trainer(model, here / 'eval', trimtab.TrimCallback(history=here / 'history.jsonl')); it.evaluate()\n"
        "assert torch.allclose(tiny.logits(model, 'bert'), torch.load(here / 'logits.pt'), atol=1e-5)\n"
    )
    fresh.python("-c", script, tmp_path, *sys.path).check_returncode()
    assert history.read_text() == before


def test_training_on_tensors_that_were_loaded_by_hand_is_refused(tmp_path):
    model = runs.model_for("bert", "adalora")
    runs.train(model, "bert", tmp_path, **OFTEN)
    other = runs.model_for("bert", "adalora")
    other.load_adapter(str(tmp_path / "checkpoint-20"), "default", is_trainable=True)
    with pytest.raises(TrimtabError, match="replaced"):
        trainer(other, tmp_path / "new", TrimCallback()).train()


def test_a_run_resumed_without_its_callback_stops_before_moments_of_other_shapes_are_read(unbroken, tmp_path):
    folder, _ = unbroken("salientlora")
    checkpoint = folder / "checkpoint-20"
    with safe_open(checkpoint / "adapter_model.safetensors", "pt") as saved:
        written = " ".join(saved.keys())
    model = runs.model_for("bert", "salientlora")
    assert not all(f".{site}.lora_A" in written for site in hosted_layers(model)), "no site at rank 0"
    arguments = TrainingArguments(str(tmp_path), max_steps=runs.STEPS, report_to=[], use_cpu=True)
    trainer = Trainer(model, arguments, train_dataset=tiny.rows("bert"))
    with pytest.raises(ModelError, match=r"cut it to rank 0.*TrimCallback"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
