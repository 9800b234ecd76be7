"""What a run decides is found in the trackers' own stores: one run for each run, with the rank curve in it.

One offline run reports to all that are installed; each store is read by the tracker's own reader.
"""

import importlib.util
import json
import os
from pathlib import Path

import peft
import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

import fresh
import short_runs
import tiny
import trimtab
from test_run import write_recipe
from trimtab.plans import Where
from trimtab.train.trackers import Figures

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
ADALORA = {"method": "adalora", "target_r": 2, "warmup": 2, "final": 4, "interval_steps": 3}
AFLORA = {"method": "aflora", "warmup": 2, "final": 8, "interval_steps": 2}


def is_there(tracker):
    return importlib.util.find_spec(tracker) is not None


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """The folder of a run, with each tracker's store beside it."""
    folder = tmp_path_factory.mktemp("tracked")
    train = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 5e-3, "use_cpu": True}
    reports = [tracker for tracker in TRACKERS if is_there(tracker)]
    recipe = write_recipe(folder, rank=ADALORA, freeze=AFLORA, train=train | {"report_to": reports})
    env = os.environ | {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"sqlite:///{folder / 'mlflow.db'}" if is_there("sqlalchemy") else f"{folder}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "TRACKIO_DIR": str(folder / "trackio"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(trimtab.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
    }
    done = fresh.python("-m", "trimtab", "run", recipe, environment=env, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def read_tensorboard(folder, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert not list((folder / "run" / "checkpoints").rglob("*tfevents*"))
    runs = {file.parent for file in folder.rglob("*tfevents*")}
    assert runs == {folder / "run" / "logs"}
    store = EventAccumulator(str(folder / "run" / "logs"))
    store.Reload()
    return {
        name.removeprefix("train/"): [(event.step, event.value) for event in store.Scalars(name)]
        for name in store.Tags()["scalars"]
    }


def read_wandb(folder, monkeypatch):
    from wandb.proto import wandb_internal_pb2

    (file,) = folder.rglob("*.wandb")
    found = {}
    for data in leveldb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in items.items():
            found.setdefault(name.removeprefix("train/"), []).append((items.get("train/global_step"), value))
    return found


def leveldb_records(data, block=32768, header=7):
    """What a log in LevelDB's format holds; W&B's own reader is no longer in Python. The file's header is as long as a
    chunk's: checksum (4 bytes), length (2), and whether the chunk is a whole record (1) or ends one (4)."""
    assert data.startswith(b":W&B")
    at, record = header, b""
    while at + header <= len(data):
        if block - at % block < header:  # too little for a chunk is filled with zeros
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + header : at + header + length]
        at += header + length
        if kind in (1, 4):
            yield record
            record = b""


def read_mlflow(folder, monkeypatch):
    import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = f"sqlite:///{folder / 'mlflow.db'}" if is_there("sqlalchemy") else f"{folder}/mlruns"
    client = mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = (e for e in client.search_experiments() if client.search_runs([e.experiment_id]))
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name.startswith("run-20")
    return {
        name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }


def read_trackio(folder, monkeypatch):
    from trackio import sqlite_storage

    monkeypatch.setattr(sqlite_storage, "TRACKIO_DIR", folder / "trackio")
    SQLiteStorage = sqlite_storage.SQLiteStorage
    (project,) = SQLiteStorage.get_projects()
    (run,) = SQLiteStorage.get_runs(project)
    assert run.startswith("run-20")
    found = {}
    for row in SQLiteStorage.get_logs(project, run):
        for name, value in row.items():
            found.setdefault(name.removeprefix("train/"), []).append((row.get("train/global_step"), value))
    return found


@pytest.mark.parametrize(
    "tracker", [pytest.param(t, marks=pytest.mark.skipif(not is_there(t), reason=f"no {t}")) for t in TRACKERS]
)
def test_a_trackers_own_store_holds_the_rank_curve(tracker, tracked, monkeypatch):
    metrics = globals()[f"read_{tracker}"](tracked, monkeypatch)

    history = [json.loads(line) for line in (tracked / "run" / "history.jsonl").read_text().splitlines()]

    def of(kind):
        return [row for row in history if row["event"] == kind]

    curve = metrics["total_rank"]
    assert curve[0] == (0, of("params")[0]["total_rank"])
    told = dict(curve)
    decided = {row["step"]: sum(row["ranks"].values()) for row in of("rank")}
    assert len(set(decided.values())) > 2
    assert {step: told.get(step) for step in decided} == decided
    assert [step for step, _ in curve] == sorted(step for step, _ in curve)

    assert metrics["trainable_params"][-1][1] == of("params")[-1]["trainable"]
    assert metrics["frozen_share"][0][1] == 0
    assert metrics["frozen_share"][-1][1] == pytest.approx(1 - of("freeze")[-1]["trainable_ratio"])
    assert metrics["prune_events"][-1][1] == sum(row["kind"] == "prune" for row in of("rank")) > 0
    scores = json.loads((tracked / "run" / "where.json").read_text())["scores"]["stacks"]["encoder.layer"]["cka"]
    assert [metrics[f"layer_score/encoder.layer.{i}"][0][1] for i in range(4)] == pytest.approx(scores)
    assert len(metrics["loss"]) == len(of("log"))


def test_two_lines_reach_a_tracker_and_no_other_callback(tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_log(self, args, state, control, logs=None, **kw):
            self.rows.append((state.global_step, logs))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "one of ours", Tracker)
    tracker, other = Tracker(), type("Other", (TrainerCallback,), {"rows": [], "on_log": Tracker.on_log})()
    trim, _ = short_runs.train(
        short_runs.model_for("bert", "salientlora"), "bert", tmp_path, callbacks=(tracker, other)
    )
    ranks = {row["step"]: sum(row["ranks"].values()) for row in trim.events if row["event"] == "rank"}
    told = {step: logs["total_rank"] for step, logs in tracker.rows if "total_rank" in logs}
    assert ranks.items() <= told.items()
    assert not any("total_rank" in logs for _, logs in other.rows)


@pytest.mark.parametrize("kind", ["vera", "bottleneck"])
def test_a_tracker_gets_the_layer_scores_of_every_kind_of_adapter(kind, tmp_path, monkeypatch):
    class Tracker(TrainerCallback):
        def __init__(self):
            self.told = {}

        def on_log(self, args, state, control, logs=None, **kw):
            self.told |= logs

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "one of ours", Tracker)
    base = tiny.build("bert")
    where = Where(
        "gradient", {"encoder.layer": "0101"}, {"stacks": {"encoder.layer": {"importance": [None, 0.5, 0, 1]}}}
    )
    config = {
        "vera": lambda: trimtab.restrict(
            peft.VeraConfig(r=4, target_modules=["query"], task_type="SEQ_CLS"), where, base
        ),
        "bottleneck": lambda: trimtab.BottleneckConfig(bottleneck_size=2, where=where, task_type="SEQ_CLS"),
    }[kind]()
    tracker = Tracker()
    short_runs.train(peft.get_peft_model(base, config), "bert", tmp_path, callbacks=(tracker,))
    assert tracker.told["layer_score/encoder.layer.1"] == 0.5


def test_ranks_that_are_masked_count_as_gone_until_they_return():
    figures = Figures()
    for row, total in (
        ({"event": "params", "trainable": 90, "total_rank": 12}, 12),
        ({"event": "rank", "kind": "mask", "ranks": {"a": 2, "b": 5}}, 7),
        ({"event": "params", "trainable": 70, "total_rank": 12}, 7),
        ({"event": "rank", "kind": "mask", "ranks": {"a": 2, "b": 6}}, 8),
        ({"event": "rank", "kind": "prune", "ranks": {"a": 1, "b": 5}}, 6),
        ({"event": "params", "trainable": 40, "total_rank": 6}, 6),
    ):
        figures.see(row)
        assert figures.now["total_rank"] == total
    assert figures.now["prune_events"] == 1
