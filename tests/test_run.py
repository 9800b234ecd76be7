"""A run leaves a folder from which every stage can start again, and an adapter that needs no Trimtab."""

import json
import math
import re
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from transformers import AutoModel, Trainer

import fresh
from marks import slow
from tasks.stand_ins import WORDS, byte_model, byte_tokenizer, encoder_tokenizer, tiny_config, write_jsonl
from trimtab.app import scoring
from trimtab.app.cli import cli
from trimtab.plans import Plan

FILES = {
    "recipe.yaml",
    "run.json",
    "where.json",
    "plan.json",
    "history.jsonl",
    "timing.jsonl",
    "checkpoints",
    "adapter",
    "metrics.json",
    "predictions.json",
    "report.html",
}


def trimtab(*args, code=0):
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result


def tiny_model(folder, kind="bert", layers=4):
    torch.manual_seed(0)
    AutoModel.from_config(tiny_config(kind, num_hidden_layers=layers)).save_pretrained(folder)
    encoder_tokenizer().save_pretrained(folder)
    return folder


def paraphrases(path, n):
    """Pairs of which half are the same words in another order."""
    generator = torch.Generator().manual_seed(n)
    rows = []
    for i in range(n):
        words = [WORDS[j] for j in torch.randperm(len(WORDS), generator=generator)[:6]]
        other = words[::-1] if i % 2 else [WORDS[j] for j in torch.randperm(len(WORDS), generator=generator)[:6]]
        rows.append({"sentence1": " ".join(words), "sentence2": " ".join(other), "label": i % 2})
    return write_jsonl(path, rows)


def write_recipe(folder, **sections):
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model": {"name_or_path": str(tiny_model(folder / "model"))},
        "task": {"name": "glue/mrpc", "max_length": 24},
        "data": {
            "train": paraphrases(folder / "train.jsonl", 64),
            "validation": paraphrases(folder / "validation.jsonl", 24),
        },
        "adapter": {"r": 4, "target_modules": ["query", "value"]},
        "where": {"ratio": 0.5, "samples": 40, "batch_size": 16},
        "train": {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
        "output_dir": str(folder / "run"),
        **sections,
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # YAML reads JSON
    return folder / "recipe.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Folder of a finished run; tests that write copy it first."""
    recipe = write_recipe(tmp_path_factory.mktemp("finished"))

    def keeping(job, model, *where):  # keeps the logits of the model that was trained
        batch = job.task.collator(job.tokenizer)([dict(row) for row in job.ready["validation"]])
        labels = batch.pop("labels")
        with torch.no_grad():
            torch.save((model.eval()(**batch).logits, labels), recipe.parent / "logits.pt")
        return score(job, model, *where)

    score = scoring.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "score", keeping)
        trimtab("run", recipe)
    return recipe.parent / "run"


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def read(folder, name):
    return json.loads((folder / name).read_text())


def test_a_run_writes_every_file_of_the_run_folder(finished):
    assert {path.name for path in finished.iterdir()} == FILES
    where, plan, metrics = (read(finished, f"{name}.json") for name in ("where", "plan", "metrics"))
    mask = where["stacks"]["encoder.layer"]
    assert (len(mask), mask.count("1"), mask[0]) == (4, 2, "0")  # the first token enters layer 0 alike in every row
    made = Plan.from_json(plan)
    assert made.where.mask == mask
    assert {site.site.block for site in made.sites} == {i for i, chosen in enumerate(mask) if chosen == "1"}
    # 2 layers, 2 sites, 4 · 32 each
    assert metrics["params"] == {"initial": 512, "final": 512, "average": 512.0, "held": 512}
    assert metrics["metric"] == "accuracy"
    assert set(metrics["metrics"]) == {"accuracy", "f1", "loss"}
    assert metrics["seconds"] > 0
    assert metrics["peak_memory_bytes"] > 0
    assert (metrics["train_samples"], metrics["seed"], metrics["rank"]) == (64, 0, None)


def test_the_history_holds_the_course_of_the_run_and_no_clock(finished):
    events = [json.loads(line) for line in (finished / "history.jsonl").read_text().splitlines()]
    assert {event["event"] for event in events} == {"params", "log", "eval"}
    assert [event["step"] for event in events if event["event"] == "eval"] == [8, 16]
    assert sum(event["event"] == "log" for event in events) == 16  # short runs log every step
    assert not any("second" in key or "runtime" in key for event in events for key in str(event).split())


def test_stock_peft_loads_the_adapter_without_trimtab_and_gives_the_run_s_logits(finished, tmp_path):
    code = textwrap.dedent("""\
        import json, sys, torch
        from peft import PeftModel
        from transformers import AutoModelForSequenceClassification, AutoTokenizer
        run, model, out = sys.argv[1:]
        base = AutoModelForSequenceClassification.from_pretrained(model, num_labels=2)
        peft_model = PeftModel.from_pretrained(base, run + "/adapter").eval()
        tokenizer = AutoTokenizer.from_pretrained(run + "/adapter")
        rows = [json.loads(line) for line in open(out + ".rows")]
        batch = tokenizer([r["sentence1"] for r in rows], [r["sentence2"] for r in rows], padding=True,
                          truncation=True, max_length=24, return_tensors="pt")
        with torch.no_grad():
            torch.save(peft_model(**batch).logits, out)
        sys.exit(any(name.startswith("trimtab") for name in sys.modules))
        """)
    out = tmp_path / "logits.pt"
    shutil.copy(finished.parent / "validation.jsonl", f"{out}.rows")
    done = fresh.python("-c", code, finished, finished.parent / "model", out)
    assert done.returncode == 0
    logits, labels = torch.load(finished.parent / "logits.pt")
    assert torch.load(out).sub(logits).abs().max() < 1e-5
    accuracy = (logits.argmax(1) == labels).float().mean().item()
    assert read(finished, "metrics.json")["metrics"]["accuracy"] == pytest.approx(accuracy)


def test_eval_starts_from_the_folder_and_agrees_with_the_run(copied):
    before = read(copied, "metrics.json")
    after = json.loads(trimtab("eval", copied, "--json").stdout)
    assert after["metrics"] == pytest.approx(before["metrics"], abs=1e-6)
    same = before.keys() - {"metrics", "load"}  # how to load it names the folder
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_the_model_without_an_adapter_is_scored_beside_the_run(copied):
    found = json.loads(trimtab("eval", copied, "--base", "--json").output)
    trained = json.loads((copied / "metrics.json").read_text())["metrics"]
    assert found["metrics"].keys() == trained.keys()
    assert found["metrics"]["loss"] != trained["loss"]
    assert json.loads((copied / "base.json").read_text())["metrics"] == found["metrics"]
    assert ">without adapter<" in (copied / "report.html").read_text()


def test_what_each_row_got_is_kept_in_the_data_s_order_however_batches_are_put_together(tmp_path):
    uneven = [{"sentence1": "ab " * (1 + i * 7 % 11), "sentence2": "ba", "label": int(i % 3 == 0)} for i in range(24)]
    data = {"train": paraphrases(tmp_path / "train.jsonl", 16), "validation": write_jsonl(tmp_path / "v.jsonl", uneven)}
    training = {"max_steps": 1, "use_cpu": True, "train_sampling_strategy": "group_by_length"}
    training |= {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 5}
    training |= {"dataloader_drop_last": True, "prediction_loss_only": True, "skip_memory_metrics": False}
    trimtab("run", write_recipe(tmp_path, data=data, train=training, where=None))
    kept = read(tmp_path / "run", "predictions.json")["validation"]
    assert kept["label"] == [row["label"] for row in uneven]
    assert set(read(tmp_path / "run", "metrics.json")["metrics"]) == {"loss", "accuracy", "f1"}


def test_the_base_can_be_scored_before_there_is_a_run(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    trimtab("eval", recipe, "--base")
    trimtab("train", recipe, "train.max_steps=1")
    assert (tmp_path / "run" / "base.json").is_file()


def test_scores_of_a_base_are_not_taken_for_those_of_another(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    trimtab("eval", recipe, "--base")
    trimtab("train", recipe, "train.max_steps=1", "data.max_samples=16")
    assert not (tmp_path / "run" / "base.json").exists()
    assert "holds a run with another data" in trimtab("eval", recipe, "--base", code=2).stderr
    assert not (tmp_path / "run" / "base.json").exists()


def test_a_run_that_ends_in_nan_says_so_and_keeps_its_scores(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    settings = ["train.max_steps=3", "train.learning_rate=1e37", "train.max_grad_norm=0"]
    shown = trimtab("run", recipe, *settings, code=1)
    assert math.isnan(json.loads((tmp_path / "run" / "metrics.json").read_text())["metrics"]["loss"])
    assert "NaN" in shown.stdout
    [said] = [line for line in shown.stderr.splitlines() if line.startswith("error")]
    assert re.search(r"not a number .*from step \d on: try a lower train.learning_rate .*max_grad_norm=1.0", said)
    assert trimtab("train", recipe, *settings, "--overwrite", code=1).stderr.endswith(f"{said}\n")


def test_a_classifier_that_gives_one_class_only_is_named(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    shown = trimtab("run", recipe, "train.learning_rate=1e-9", "train.max_steps=12").stderr
    assert re.search(r"note +every one of 24 validation rows was given class '(not_)?equivalent': .*rate", shown)
    assert re.search(r"note +the training loss never fell by more than chance \(.*\): try a train", shown)
    assert "Every one of 24 validation rows" in (tmp_path / "run" / "report.html").read_text()


def test_a_run_that_froze_in_its_first_quarter_is_named(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    early = trimtab("run", recipe, "freeze={method: at, at: 2}").stderr
    assert re.search(r"note +every projection froze by step 2 of 16, .*: try a larger freeze.at, or more epochs", early)
    late = trimtab("run", recipe, "freeze={method: at, at: 8}", "--overwrite").stderr
    assert "froze by" not in late
    never = trimtab("run", recipe, "freeze={method: grades, tau: 1e-9}", "--overwrite").stderr
    assert "no projection ever froze" in " ".join(never.split())


@pytest.mark.parametrize("form, file", [("padded", "adapter_model.safetensors"), ("merged", "model.safetensors")])
def test_export_writes_another_form_beside_the_adapter(copied, form, file):
    written = json.loads(trimtab("export", copied, "--format", form, "--json").stdout)
    assert (written["format"], written["path"]) == (form, str(copied / form))
    assert written["engines"][0].startswith("read by")
    assert (copied / form / file).is_file()


def test_report_is_made_again_from_the_folder(copied):
    (copied / "report.html").unlink()
    assert trimtab("report", copied).stdout.strip() == str(copied / "report.html")
    assert (copied / "report.html").is_file()


def test_a_finished_run_is_not_overwritten_unless_asked(finished):
    recipe = finished.parent / "recipe.yaml"
    before = (finished / "metrics.json").read_bytes()
    message = trimtab("run", recipe, code=2).stderr
    assert "holds a finished run" in message
    assert "--overwrite" in message
    assert (finished / "metrics.json").read_bytes() == before


def test_overwrite_leaves_the_user_s_own_files(tmp_path):
    recipe = write_recipe(tmp_path, where=None, train={"max_steps": 1, "use_cpu": True})
    trimtab("train", recipe)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    trimtab("train", recipe, code=2)
    trimtab("train", recipe, "--overwrite")
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_resumed_run_ends_where_the_unbroken_one_did(finished, copied):
    """As if killed after the first epoch's checkpoint."""
    for name in ("adapter", "checkpoints/checkpoint-16"):
        shutil.rmtree(copied / name)
    for name in ("metrics.json", "report.html"):
        (copied / name).unlink()
    recipe = finished.parent / "recipe.yaml"
    assert "--resume" in trimtab("run", recipe, f"output_dir={copied}", code=2).stderr
    assert "adapter.r=8" in trimtab("run", recipe, f"output_dir={copied}", "adapter.r=8", "--resume", code=2).stderr
    trimtab("run", recipe, f"output_dir={copied}", "--resume")
    ours, theirs = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (copied, finished))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert (copied / "history.jsonl").read_text() == (finished / "history.jsonl").read_text()
    assert read(copied, "metrics.json")["metrics"] == read(finished, "metrics.json")["metrics"]


@pytest.mark.parametrize("last", [16, 24])
def test_a_run_that_stops_early_is_resumed_to_the_same_end(tmp_path, last):
    """Patience goes on where it was; where none was left, no step more is taken."""
    recipe = write_recipe(
        tmp_path,
        where=None,
        freeze={"method": "aflora", "warmup": 2, "final": 0.3},
        early_stopping={"patience": 2, "threshold": 1},  # more than an accuracy can rise by
        train={"num_train_epochs": 5, "learning_rate": 5e-3, "save_total_limit": 5, "use_cpu": True,
               "restore_callback_states_from_checkpoint": True},
    )  # fmt: skip
    trimtab("run", recipe)
    assert max(int(path.name.rpartition("-")[2]) for path in (tmp_path / "run" / "checkpoints").iterdir()) == 24
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    for name in ("adapter", *(f"checkpoints/checkpoint-{step}" for step in range(last + 8, 25, 8))):
        shutil.rmtree(again / name, ignore_errors=True)
    (again / "metrics.json").unlink()
    trimtab("run", again, f"output_dir={again}", "--resume")
    assert (again / "history.jsonl").read_text() == (tmp_path / "run" / "history.jsonl").read_text()
    ours, theirs = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("again", "run"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    ours, theirs = (read(tmp_path / run, "metrics.json") for run in ("again", "run"))
    assert ours["metrics"] == theirs["metrics"] and ours["params"] == theirs["params"]


def test_the_best_model_is_had_back_that_was_scored_between_two_checkpoints(tmp_path):
    """Trainer alone would have none of it, and leave the last one."""
    recipe = write_recipe(
        tmp_path,
        where=None,
        train={"max_steps": 4, "learning_rate": 0.05, "use_cpu": True, "eval_strategy": "steps", "eval_steps": 1,
               "save_strategy": "steps", "save_steps": 4, "load_best_model_at_end": True},
    )  # fmt: skip
    trimtab("run", recipe)
    rows = map(json.loads, (tmp_path / "run" / "history.jsonl").read_text().splitlines())
    scored = {row["step"]: row["metrics"] for row in rows if row["event"] == "eval"}
    best = max(scored, key=lambda step: scored[step]["eval_accuracy"])  # of equals the first
    assert best < 4
    assert read(tmp_path / "run", "metrics.json")["metrics"]["loss"] == pytest.approx(scored[best]["eval_loss"], 1e-5)


def test_roles_train_at_their_rates_and_the_run_resumes_exactly(tmp_path):
    recipe = write_recipe(
        tmp_path,
        where=None,
        freeze={"method": "aflora", "warmup": 2, "final": 0.3},
        rates={"B": 4, "vectors": 10, "head": 2},
    )
    assert "vectors at 10 times (0.05)" in " ".join(trimtab("plan", recipe).stdout.split())
    trimtab("run", recipe, "train.lr_scheduler_type=constant")
    saved = torch.load(tmp_path / "run" / "checkpoints" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    rates = {group["role"]: group["lr"] for group in saved["param_groups"]}
    assert rates == pytest.approx({"A": 5e-3, "B": 2e-2, "vectors": 5e-2, "head": 1e-2})
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(again / "checkpoints" / "checkpoint-16")
    shutil.rmtree(again / "adapter")
    (again / "metrics.json").unlink()
    assert "rates.B" in trimtab("run", again, f"output_dir={again}", "rates.B=5", "--resume", code=2).stderr
    trimtab("run", again, f"output_dir={again}", "--resume")
    ours, theirs = (load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("again", "run"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_an_optimizer_with_groups_of_its_own_refuses_rates(tmp_path, monkeypatch):
    galore = torch.optim.AdamW, {"lr": 1e-3, "params": []}  # what the Trainer makes of it where it is installed
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: galore)
    recipe = write_recipe(tmp_path, where=None, rates={"B": 4})
    said = trimtab("train", recipe, "train.optim=galore_adamw", code=2).stderr
    assert "rates={'B': 4.0}: train.optim=galore_adamw makes its own groups; use adamw_torch" in " ".join(said.split())


def test_resume_after_the_last_step_makes_what_is_still_missing(finished, copied):
    shutil.rmtree(copied / "adapter")
    (copied / "metrics.json").unlink()
    trimtab("run", copied, f"output_dir={copied}", "--resume")
    assert read(copied, "metrics.json")["metrics"] == read(finished, "metrics.json")["metrics"]
    assert (copied / "history.jsonl").read_text() == (finished / "history.jsonl").read_text()


@pytest.mark.slow
@pytest.mark.two_process
def test_two_processes_write_one_run_folder(tmp_path):
    recipe = write_recipe(tmp_path)
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=29517", "-m", "trimtab", "run"]
    done = subprocess.run([sys.executable, *command, str(recipe), "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["params"]["initial"] == 512
    assert {path.name for path in (tmp_path / "run").iterdir()} == FILES


def test_select_then_train_takes_the_selection_as_it_is(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 2, "use_cpu": True})
    chosen = json.loads(trimtab("select", recipe, "--json").stdout)
    saved = read(tmp_path / "run", "where.json")
    assert saved == chosen
    saved["stacks"]["encoder.layer"] = "0001"  # a sign that it is read, not made again
    (tmp_path / "run" / "where.json").write_text(json.dumps(saved))
    plan = json.loads(trimtab("train", recipe, "--json").stdout)
    assert {site["site"]["block"] for site in plan["sites"]} == {3}


@pytest.mark.parametrize("method", ["gradient", slow("fisher"), slow("influence")])
def test_every_measured_selection_goes_from_the_command_to_its_report(tmp_path, method):
    recipe = write_recipe(
        tmp_path, where={"method": method, "ratio": 0.5, "samples": 16}, train={"max_steps": 2, "use_cpu": True}
    )
    chosen = json.loads(trimtab("select", recipe, "--json").stdout)
    importance = chosen["scores"]["stacks"]["encoder.layer"]["importance"]
    best = sorted(sorted(range(4), key=lambda layer: -importance[layer])[:2])
    assert [i for i, c in enumerate(chosen["stacks"]["encoder.layer"]) if c == "1"] == best
    trimtab("run", recipe)
    assert read(tmp_path / "run", "where.json") == chosen
    assert f"{method.capitalize()} chose 2 of 4 layers" in (tmp_path / "run" / "report.html").read_text()


def test_the_choices_of_several_methods_are_set_side_by_side_and_nothing_is_written(tmp_path):
    recipe = write_recipe(tmp_path, where={"method": "cka", "ratio": 0.5, "samples": 16, "pool": "mean"})
    methods = "cka,gradient,influence,last"
    found = json.loads(trimtab("select", recipe, "--methods", methods, "--json").stdout)
    assert list(found) == methods.split(",") and not (tmp_path / "run").exists()
    masks = {name: one["stacks"]["encoder.layer"] for name, one in found.items()}
    assert masks["last"] == "0011" and all(mask.count("1") == 2 for mask in masks.values())
    told = trimtab("select", recipe, "--methods", methods)
    assert "\nselect   influence: 2 of 4 layers" in told.stderr
    shown = told.stdout
    shared = sum(a == b == "1" for a, b in zip(masks["cka"], masks["last"]))
    line = next(line for line in shown.splitlines() if line.split()[:1] == ["cka"])
    assert line.split() == ["cka", masks["cka"], "2", *line.split()[3:5], str(shared)]
    assert "Did you mean 'gradient'?" in trimtab("select", recipe, "--methods", "cka,gradent", code=2).stderr


def test_a_selection_of_another_recipe_is_made_again(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 1, "use_cpu": True})
    trimtab("select", recipe)
    trimtab("train", recipe, "where=last")
    assert read(tmp_path / "run", "where.json")["stacks"]["encoder.layer"] == "0011"


def test_where_rank_and_freeze_go_together_in_one_recipe(tmp_path):
    recipe = write_recipe(
        tmp_path,
        adapter={"r": 6, "target_modules": ["query", "value", "intermediate.dense"]},
        rank={"method": "salientlora", "target_r": 2, "initial_window": 2, "final_window": 4},
        freeze={"method": "aflora", "interval_steps": 2},
        train={"num_train_epochs": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True},
    )
    shown = trimtab("run", recipe).stdout
    plan, metrics = (read(tmp_path / "run", f"{name}.json") for name in ("plan", "metrics"))
    assert sum(site["final_r"] for site in plan["sites"]) == 2 * len(plan["sites"])
    params = metrics["params"]
    assert params["final"] < params["average"] < params["initial"]
    assert set(plan["settings"]["predicted_params"]) == {"initial", "final", "average", "held"}
    assert params["initial"] == plan["settings"]["predicted_params"]["initial"]
    assert (metrics["rank"]["method"], metrics["freeze"]["method"]) == ("salientlora", "aflora")
    plan = read(tmp_path / "run", "plan.json")
    planned, measured = plan["settings"]["predicted_params"]["average"], plan["params"]["average"]
    assert planned != measured
    assert re.search(rf"trainable on average +{measured:,.0f} \({planned:,.0f} planned", shown)
    assert "planned)" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_vera_trains_and_exports_a_plain_lora(tmp_path):
    recipe = write_recipe(tmp_path, adapter={"type": "vera", "r": 8, "target_modules": ["query", "value"]})
    trimtab("run", recipe)
    config = read(tmp_path / "run" / "adapter", "adapter_config.json")
    assert config["peft_type"] == "LORA"
    assert read(tmp_path / "run", "metrics.json")["params"]["initial"] == 2 * 2 * (8 + 16)


def test_a_merged_export_stands_beside_the_adapter(tmp_path):
    recipe = write_recipe(tmp_path, export="merged", where=None, train={"max_steps": 1, "use_cpu": True})
    trimtab("run", recipe)
    assert (tmp_path / "run" / "merged" / "model.safetensors").is_file()
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()


def test_accumulated_batches_train_like_one_of_their_size(tmp_path):
    """Trainer alone would make gradient and logged loss of these models two times as large."""
    recipe = write_recipe(tmp_path)
    still = "model.config={hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}"
    plain = {"max_steps": 4, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "optim": "sgd", "use_cpu": True}
    for name, train in (
        ("one", plain),
        ("two", {**plain, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}),
    ):
        trimtab("train", recipe, still, f"output_dir={tmp_path / name}", f"train={json.dumps(train)}")
    one, two = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "two"))
    assert max((one[key] - two[key]).abs().max().item() for key in one) < 1e-6


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulated_batches_of_an_encoder_decoder_train_like_one_of_their_size(tmp_path, smoothing):
    byte_model("t5", dropout_rate=0.0).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}."} for i in range(10, 26)]
    plain = {"max_steps": 2, "per_device_train_batch_size": 8, "learning_rate": 0.1, "optim": "sgd", "use_cpu": True,
             "eval_strategy": "epoch", "label_smoothing_factor": smoothing}  # fmt: skip
    recipe = write_recipe(
        tmp_path, model={"name_or_path": str(tmp_path / "t5")}, task={"name": "instruct"}, where=None, train=plain,
        adapter={"r": 2, "target_modules": ["q", "v"]}, data={"train": write_jsonl(tmp_path / "t.jsonl", rows)},
    )  # fmt: skip
    for name, size in (("one", 8), ("four", 2)):
        more = (f"train.per_device_train_batch_size={size}", f"train.gradient_accumulation_steps={8 // size}")
        trimtab("train", recipe, f"output_dir={tmp_path / name}", "data.validation_share=2", *more)
    one, four = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("one", "four"))
    assert max((one[key] - four[key]).abs().max().item() for key in one) < 1e-6
    assert any(value.any() for key, value in one.items() if "lora_B" in key)


def test_two_runs_of_one_seed_are_the_same_and_of_two_seeds_are_not(tmp_path):
    recipe = write_recipe(tmp_path, train={"max_steps": 3, "use_cpu": True})
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        trimtab("train", recipe, f"output_dir={tmp_path / name}", f"seed={seed}")
    a, b, c = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not all(torch.equal(a[key], c[key]) for key in a)


def test_a_head_in_float16_under_a_loss_scaler_is_refused_before_training(tmp_path):
    recipe = write_recipe(tmp_path, where=None)
    said = trimtab("run", recipe, "model.dtype=float16", "train.fp16=true", code=2).stderr.splitlines()[-1]
    assert said.startswith("error: model.dtype='float16': classifier.weight trains in float16")


def test_what_peft_refuses_is_one_line(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "mamba")
    byte_model("mamba", state_size=4).save_pretrained(tmp_path / "mamba")
    rows = [{"prompt": f"What is {i}?", "completion": "so"} for i in range(8)]
    recipe = write_recipe(
        tmp_path,
        model=str(tmp_path / "mamba"),
        task={"name": "instruct", "max_length": 64},
        data={"train": write_jsonl(tmp_path / "t.jsonl", rows)},
        adapter={"r": 2, "target_modules": "all-linear"},
        where=None,
    )
    [error] = [line for line in trimtab("run", recipe, code=2).stderr.splitlines() if line.startswith("error: ")]
    assert "adapter: " in error and "'out_proj' is incompatible with Mamba-based models" in error
