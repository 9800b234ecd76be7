"""What `test_fsdp.py` runs in two processes: ``torchrun --nproc-per-node 2 sharded_process.py OUT JOB …``.

With ``OUT elastic`` one process is killed once; with ``run SCRIPT`` that script runs where accelerate shards on a CPU.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import runpy
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, TrainerCallback

import tiny
import trimtab
from fakes import Halving
from trimtab import Controller, TrimConfig
from trimtab.errors import ModelError
from two_process import METHODS, bare_loop, run, shard

BLOCK = {"bert": "BertLayer", "llama": "LlamaDecoderLayer"}
# Cases of a Trainer that shards, with what its fsdp_config says beside; and of a model that is sharded at load.
TRAINER: dict[str, dict[str, Any]] = {
    **{f"{method}, with head": {} for method in METHODS if method != "grades"},
    "salientlora+aflora, no head": {"activation_checkpointing": True},
    "salientlora, llama": {"reshard_after_forward": False},
    "salientlora, float32": {},
}
AT_LOAD = ("salientlora, llama", *(f"{m}, with head" for m in ("adalora", "sora", "aflora", "salientlora+aflora")))
BARE = [
    *(("fsdp2", True, method) for method in METHODS if method != "grades"),
    ("fsdp2", False, "salientlora"), ("fsdp2 first", False, "salientlora+aflora"),
    ("accelerate fsdp2", True, "salientlora+aflora"), ("accelerate fsdp2", False, "adalora"),
]  # fmt: skip
RESUMED = "salientlora+aflora, with head"


@contextmanager
def fsdp_on_a_cpu() -> Iterator[None]:
    """accelerate shards on accelerators only, and builds DDP on a CPU: have it shard here, too."""
    stock = AcceleratorState.__init__

    @functools.wraps(stock)
    def init(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        is_first = not AcceleratorState._shared_state
        stock(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if is_first and fsdp_plugin is not None:
            self._shared_state.update(fsdp_plugin=fsdp_plugin, distributed_type=DistributedType.FSDP)
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    try:
        yield
    finally:
        AcceleratorState.__init__ = stock
        not_sharded()


def not_sharded() -> None:
    """Have accelerate forget that it was asked to shard."""
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    AcceleratorState._reset_state(True)


def sharding(case: str, **config: Any) -> dict[str, Any]:
    """Arguments of a Trainer that shards."""
    block = BLOCK["llama" if "llama" in case else "bert"]
    return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": [block], **config}}


def sharded_at_load(case: str, out: Path) -> Any:
    """The family's tiny model, loaded by transformers with every process holding its part."""
    from transformers.distributed import DistributedConfig

    family = "llama" if "llama" in case else "bert"
    folder = out / "models" / family
    if dist.get_rank() == 0:
        tiny.build(family).double().save_pretrained(folder)
    dist.barrier()
    plan = {"bert.encoder.layer.*": "free_full_weight"} if family == "bert" else None
    kind = AutoModelForCausalLM if family == "llama" else AutoModelForSequenceClassification
    config = DistributedConfig(fsdp_size=dist.get_world_size(), fsdp_plan=plan)
    model = kind.from_pretrained(folder, dtype=torch.float64, distributed_config=config)
    if family == "bert":  # PEFT copies the head, and cannot copy a shard
        head = torch.nn.Linear(32, 2, dtype=torch.float64)
        head.load_state_dict({key: part.full_tensor() for key, part in model.classifier.state_dict().items()})
        model.classifier = head
    return model


def resumed(out: Path, name: str, saved_by: dict[str, Any], *resumed_by: dict[str, Any]) -> dict[str, Any]:
    """A run that saved every five steps, and the same one resumed at step 10, after a cut, in each of some ways."""
    folder, kept = out / "runs" / name, out / "kept" / name
    saving = dict(save_strategy="steps", save_steps=5, logging_steps=3)
    unbroken = run(RESUMED, folder, processes=2, **saving, **saved_by)
    found: list[dict[str, Any]] = [{"weights": unbroken["weights"], "history": (folder / "history.jsonl").read_text()}]
    for i, way in enumerate(resumed_by):
        dist.barrier()
        if dist.get_rank() == 0:
            if not i:
                shutil.copytree(folder, kept)
            for step in (15, 20):
                shutil.rmtree(folder / f"checkpoint-{step}")
        dist.barrier()
        not_sharded()
        again = run(RESUMED, folder, processes=2, resume=trimtab.last_checkpoint(folder), **saving, **way)
        found.append({"weights": again["weights"], "history": (folder / "history.jsonl").read_text()})
    not_sharded()
    return {"runs": found}


class Killed(TrainerCallback):
    """Process 1 is killed once, after step 12."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kw: Any) -> None:
        if state.global_step == 12 and dist.get_rank() and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def elastic(out: Path) -> None:
    """The run of `resumed` once more, in which each start goes on from the last checkpoint."""
    folder = out / "runs" / "elastic"
    saving = dict(save_strategy="steps", save_steps=5, logging_steps=3)
    with fsdp_on_a_cpu():
        done = run(
            RESUMED, folder, 2, resume=trimtab.last_checkpoint(folder), callbacks=[Killed()], **saving,
            **sharding("bert"),
        )  # fmt: skip
    torch.save(done["weights"], out / f"elastic-{dist.get_rank()}.pt")
    dist.destroy_process_group()


def best(out: Path) -> dict[str, Any]:
    """The weights that the best checkpoint holds, and those that were left when it had been loaded."""
    folder = out / "runs" / "best"
    saving = dict(
        save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True, logging_steps=2,
    )  # fmt: skip
    done = run("aflora, with head", folder, processes=2, **saving, **sharding("bert"))
    state = json.loads((folder / "checkpoint-20" / "trainer_state.json").read_text())
    return {"weights": done["weights"], "best": state["best_model_checkpoint"]}


def logits(model: Any) -> torch.Tensor:
    return tiny.logits(model, "bert")


def merged(out: Path) -> dict[str, Any]:
    """A trained sharded model's logits, and how much of it one process ever held whole while it was merged."""
    model = bare_loop("fsdp2", True, "salientlora")["model"]
    before = logits(model)
    trimtab.export(model, out / "merged", format="merged")
    trimtab.export(model, out / "peft", format="peft")
    dist.barrier()
    return {"before": before, "after": logits(model)}


def similarity() -> dict[str, Any]:
    base = tiny.build("bert").double()
    shard(base)
    scores = trimtab.layer_similarity(base, [tiny.batch("bert", seed=seed) for seed in range(4)])
    return {"cka": scores.cka, "mask": trimtab.select_layers(scores, ratio=0.5).mask}


def recipe_run(out: Path) -> dict[str, Any]:
    """A whole `trimtab run` that shards, with a merged model at its end."""
    from click.testing import CliRunner

    import test_run
    from trimtab.app.cli import cli

    folder = out / "recipe"
    if dist.get_rank() == 0:
        train = dict(num_train_epochs=2, per_device_train_batch_size=4, learning_rate=5e-3, use_cpu=True)
        test_run.write_recipe(
            folder, rank={"method": "salientlora", "target_r": 2}, export={"format": "merged"},
            train=train | sharding("bert"),
        )  # fmt: skip
    dist.barrier()
    result = CliRunner().invoke(cli, ["run", str(folder / "recipe.yaml")])
    return {"code": result.exit_code, "output": result.output}


def said(act: Callable[[], Any]) -> str:
    try:
        act()
    except ModelError as error:
        return str(error)
    return "nothing was said"


def refusals() -> dict[str, str]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def made(base: Any = None) -> peft.PeftModel:
        return peft.get_peft_model(
            base or tiny.build("bert"), TrimConfig(r=4, target_modules=["query"], rank=Halving())
        )

    def too_late() -> None:
        model = made()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        controller = Controller(model, optimizer, total_steps=30)
        fully_shard(model, ignored_params=trimtab.whole_parameters(model))
        model(**tiny.batch("bert")).loss.backward()
        controller.before_step()

    def another_mesh() -> None:
        base = tiny.build("bert")
        fully_shard(base, mesh=init_device_mesh("cpu", (2,), mesh_dim_names=("dp_shard",)))
        made(base)

    return {
        "too late": said(too_late),
        "shards": said(lambda: Controller(fully_shard(made()), None, total_steps=30)),
        "another mesh": said(another_mesh),
    }


def jobs(out: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what two processes do under it."""

    def trainer(case: str, name: str = "", **more: Any) -> dict[str, Any]:
        return run(case, out / "runs" / (name or case), processes=2, **more)

    def at_load(case: str) -> dict[str, Any]:
        saving = dict(save_strategy="steps", save_steps=10, save_only_model=True)
        return trainer(case, f"{case}, at load", base=sharded_at_load(case, out), **saving)

    full, parts = (sharding("bert", state_dict_type=f"{kind}_STATE_DICT") for kind in ("FULL", "SHARDED"))
    llama = sharding("llama")
    return {
        **{case: partial(trainer, case, **sharding(case, **config)) for case, config in TRAINER.items()},
        **{f"{case}, at load": partial(at_load, case) for case in AT_LOAD},
        **{named(*one): partial(bare_loop, *one) for one in BARE},
        "FULL": partial(resumed, out, "FULL", full, full),
        "SHARDED": partial(resumed, out, "SHARDED", parts, parts, {}),
        "best": partial(best, out),
        "trained on": partial(trainer, "salientlora, llama", "trained on", again=4, **llama),
        "recipe": partial(recipe_run, out),
        "bf16": partial(trainer, "salientlora, llama, float32", "bf16", bf16=True, **llama),
        "merged": partial(merged, out),
        "similarity": similarity,
        "refusals": refusals,
    }


# Both axes at once, every way to shard once, what is saved, and all that takes no training.
FEW = (
    "salientlora+aflora, no head", "salientlora, llama, at load", "fsdp2, True, aflora",
    "accelerate fsdp2, False, adalora", "SHARDED", "merged", "similarity", "refusals",
)  # fmt: skip


def named(kind: str, has_head: bool, method: str) -> str:
    return f"{kind}, {has_head}, {method}"


def main(out: Path, names: list[str]) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    results: dict[str, Any] = {}
    with fsdp_on_a_cpu():
        for name in names:
            results[name] = jobs(out)[name]()
            results[name].pop("model", None)
            not_sharded()
            gc.collect()  # here on every process, and not in a step of the next job: a reducer of DDP takes hooks off
    torch.save(results, out / f"process-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "run":  # somebody's script
        with fsdp_on_a_cpu():
            runpy.run_path(sys.argv[2], run_name="__main__")
    elif sys.argv[2:] == ["elastic"]:
        elastic(Path(sys.argv[1]))
    else:
        main(Path(sys.argv[1]), sys.argv[2:])
