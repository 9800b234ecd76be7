"""A recipe that two processes run is the recipe that one runs: plan, layers, scores, answers."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fresh
import recipe_process
from tasks.stand_ins import WORDS, byte_model, byte_tokenizer, write_jsonl
from test_run import read, trimtab

pytestmark = pytest.mark.two_process
TRAIN = {"num_train_epochs": 1, "learning_rate": 1e-2, "per_device_train_batch_size": 4, "use_cpu": True}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}


def answered(path, n):
    """Questions whose answers are of very different lengths."""
    generator = torch.Generator().manual_seed(n)
    words = [[WORDS[int(i)] for i in torch.randint(0, 16, (1 + 3 * (k % 4),), generator=generator)] for k in range(n)]
    return write_jsonl(path, [{"instruction": some[0], "output": " ".join(some)} for some in words])


def decoder(folder, **sections):
    return {
        "model": str(folder / "decoder"),
        "task": {"name": "instruct", "max_length": 96},
        "data": {"train": str(folder / "train.jsonl"), "validation": str(folder / "validation.jsonl")},
        "adapter": {"r": 4, "target_modules": ["q_proj", "v_proj"]},
        "train": TRAIN,
        "base_rows": 0,
        **sections,
    }


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder of the runs, and the recipes that were run."""
    folder = tmp_path_factory.mktemp("runs")
    byte_model("llama", num_hidden_layers=4).save_pretrained(folder / "decoder")
    byte_tokenizer(chat=True).save_pretrained(folder / "decoder")
    byte_model("t5").save_pretrained(folder / "encoder-decoder")
    byte_tokenizer().save_pretrained(folder / "encoder-decoder")
    answered(folder / "train.jsonl", 32)
    answered(folder / "validation.jsonl", 21)
    rows = [{"document": f"{word} again", "summary": word} for word in WORDS]
    write_jsonl(folder / "documents.jsonl", rows)
    recipes = {
        "salient": decoder(
            folder,
            rank={"method": "salientlora", "target_r": 2, "warmup": 1, "allocation": 2},
            train=TRAIN | {"save_steps": 2},
        ),
        "last": decoder(folder, where={"method": "last", "count": 2}, train=TRAIN | REENTRANT),
        "written": decoder(
            folder,
            model=str(folder / "encoder-decoder"),
            task={"name": "summarize", "max_length": 64, "generation": {"max_new_tokens": 4, "batch_size": 4}},
            data={"train": str(folder / "documents.jsonl"), "validation": str(folder / "documents.jsonl")},
            adapter={"r": 2, "target_modules": ["q", "v"]},
        ),
    }
    for name, recipe in recipes.items():
        (folder / f"{name}.json").write_text(json.dumps(recipe | {"output_dir": str(folder / name)}))
    trimtab("select", folder / "last.json", "where.method=first")
    here = Path(recipe_process.__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(here.parent / "src"), str(here), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    done = fresh.processes(2, recipe_process.__file__, folder, environment=environment)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def test_the_plan_counts_the_steps_that_are_taken(ran):
    plan, steps = read(ran / "salient", "plan.json"), 4  # 32 rows, twice 4 in a step
    assert plan["settings"]["total_steps"] == read(ran / "salient", "adapter/trimtab.json")["of"] == steps
    assert plan["params"]["average"] == plan["settings"]["predicted_params"]["average"]


def test_the_loss_of_rows_that_do_not_divide_is_one_process_s(ran):
    trimtab("run", ran / "salient.json", f"output_dir={ran}/one", "train.per_device_train_batch_size=8")
    one, two = (read(ran / name, "metrics.json")["metrics"] for name in ("one", "salient"))
    assert two["answer_loss"] == pytest.approx(one["answer_loss"], rel=1e-5)
    assert two["loss"] == pytest.approx(one["loss"], rel=5e-3)  # rows that fill up a last batch


def test_one_process_goes_on_with_a_step_of_as_many_rows(ran):
    run = shutil.copytree(ran / "salient", ran / "fewer")
    shutil.rmtree(run / "checkpoints/checkpoint-4")
    on_one = (f"output_dir={run}", "--resume")
    assert "has 2, and 8 rows a step, not 4" in trimtab("run", run, *on_one, code=2).stderr
    trimtab("run", run, "train.gradient_accumulation_steps=2", *on_one)
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (run, ran / "salient"))
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-4) for key in theirs)


def test_all_processes_adapt_the_layers_of_the_first(ran):
    chosen = [json.loads((ran / f"where-{rank}.txt").read_text()) for rank in (0, 1)]
    assert chosen[0] == chosen[1]
    assert chosen[0][str(ran / "last")] == "0011"  # not those that `trimtab select` had left there


def test_one_process_keeps_the_answers(ran):
    rows = [json.loads(line) for line in (ran / "written/answers/validation_answers.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in rows) == sorted(f"validation/{i}" for i in range(len(WORDS)))


def test_plain_lora_trains_under_reentrant_checkpointing(ran):
    assert (ran / "last" / "adapter" / "adapter_model.safetensors").is_file()
