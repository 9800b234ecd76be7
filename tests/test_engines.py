"""Engines that cannot leave adapters alone are refused in one line, with what to use instead."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

import sharded_process as sharded
import short_runs as runs
import tiny
import trimtab
import two_process
from fakes import Halving
from trimtab import AFLoRA, Controller, TrimCallback, TrimConfig
from trimtab.errors import ConfigError, ModelError
from trimtab.train import parallel


def made(**options) -> peft.PeftModel:
    base = tiny.build("bert")
    options = options or {"rank": Halving()}
    return peft.get_peft_model(base, TrimConfig(r=4, target_modules=["query"], **options))


def trainer(model: nn.Module, folder, **settings) -> Trainer:
    args = TrainingArguments(str(folder), report_to=[], use_cpu=True, **settings)
    return Trainer(model, args, train_dataset=tiny.rows("bert"), callbacks=[TrimCallback()])


@pytest.fixture
def group(tmp_path):
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def accelerate_is_set_to(monkeypatch):
    def to(kind: DistributedType, **plugins) -> None:
        state = dict(distributed_type=kind, device=torch.device("cpu"), deepspeed_plugins=None) | plugins
        monkeypatch.setattr(AcceleratorState, "_shared_state", state)

    return to


# -- DeepSpeed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["deepspeed", "deepspeed_plugin"])
def test_deepspeed_in_the_arguments_is_refused_before_anything_is_built(tmp_path, how):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    setattr(args, how, {"zero_optimization": {"stage": 2}})
    with pytest.raises(ConfigError, match=r"deepspeed.*takes gradients away.*use DDP.*use FSDP2"):
        TrimCallback().on_init_end(args, None, None, model=made())


def test_deepspeed_from_the_environment_is_refused(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"deepspeed='from the environment'.*use DDP"):
        TrimCallback().on_init_end(args, None, None, model=made())


def test_accelerates_deepspeed_is_refused_in_a_bare_loop(accelerate_is_set_to):
    accelerate_is_set_to(DistributedType.DEEPSPEED, deepspeed_plugins={"default": object()})
    with pytest.raises(ConfigError, match=r"deepspeed.*use DDP"):
        parallel.accelerates_fsdp()


def test_a_deepspeed_engine_its_parameters_and_its_optimizer_are_refused():
    class DeepSpeedEngine(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    with pytest.raises(ModelError, match=r"DeepSpeedEngine.*use DDP"):
        Controller(DeepSpeedEngine(made()), None, 4)
    model = made()
    next(model.parameters()).ds_id = 0  # as ZeRO-3 marks what it holds
    with pytest.raises(ModelError, match=r"parameters are DeepSpeed's.*use DDP"):
        Controller(model, None, 4)
    model = made()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    kind = type("DeepSpeedZeroOptimizer", (), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    wrapper = kind()
    wrapper.optimizer = optimizer
    with pytest.raises(ModelError, match=r"parameters are DeepSpeed's.*use DDP"):
        Controller(model, wrapper, 4)


def test_deepspeed_is_no_matter_for_an_adapter_that_decides_nothing(tmp_path, monkeypatch):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    plain = peft.get_peft_model(tiny.build("bert"), TrimConfig(r=4, target_modules=["query"]))
    TrimCallback().on_init_end(args, None, None, model=plain)


# -- nn.DataParallel ------------------------------------------------------------------------------------------


def test_a_trainer_that_would_copy_the_model_to_several_gpus_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(TrainingArguments, "n_gpu", property(lambda self: 2))
    with pytest.raises(ConfigError, match=r"n_gpu=2.*nn.DataParallel.*torchrun.*CUDA_VISIBLE_DEVICES=0"):
        trainer(made(), tmp_path)


@pytest.mark.parametrize("options", [{"rank": Halving()}, {"freeze": AFLoRA(warmup=1, final=2)}])
def test_a_copy_of_a_layer_in_another_gpu_does_not_compute_something_else(options):
    layer = next(iter(Controller(made(**options), None, 10).layers.values()))
    x = torch.zeros(1, 32)
    layer(x)
    with pytest.raises(ModelError, match=r"nn.DataParallel.*torchrun"):
        layer._replicate_for_data_parallel()(x)


def test_a_model_in_data_parallel_is_refused_in_a_bare_loop():
    with pytest.raises(ModelError, match=r"it is in nn.DataParallel.*torchrun"):
        Controller(nn.DataParallel(made()), None, 4)


# -- sharding that takes the adapters, too --------------------------------------------------------------------


def test_adapters_that_are_dtensors_are_refused_by_what_made_them(group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor

    model, mesh = made(), init_device_mesh("cpu", (1,))
    for layer in model.modules():
        if isinstance(layer, nn.ModuleDict) and "default" in layer and hasattr(layer["default"], "weight"):
            layer["default"].weight = nn.Parameter(distribute_tensor(layer["default"].weight.data, mesh))
    with pytest.raises(ModelError, match=r"as tensor parallelism makes them.*FSDP2 instead"):
        Controller(model, None, 4)
    with pytest.raises(ModelError, match=r"FSDP2 shards the adapters.*ignored_params=trimtab.whole_parameters"):
        Controller(fully_shard(made()), None, 4)
    model = made()
    fully_shard(model, ignored_params=trimtab.whole_parameters(model))
    Controller(model, None, 4)


@pytest.mark.parametrize("method", ["salientlora", "adalora", "aflora"])
def test_one_process_in_ddp_equals_one_without(group, method):
    found = []
    for wrap in (DistributedDataParallel, None):
        model = runs.model_for("bert", method, lora_dropout=0.0).eval()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        controller = Controller(model, optimizer, runs.STEPS)
        wrapped = model if wrap is None else wrap(model)
        for step in range(runs.STEPS):
            wrapped(**tiny.batch("bert", seed=step)).loss.backward()
            controller.before_step()
            optimizer.step()
            controller.after_step()
            optimizer.zero_grad()
        controller.finish()
        found.append({n: p.detach() for n, p in model.named_parameters()})
    assert found[0].keys() == found[1].keys() and all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_a_state_dict_of_a_model_that_a_process_group_trains_goes_into_one_made_anew_and_back(group):
    model, anew = (runs.model_for("llama", "salientlora") for _ in range(2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    controller = Controller(model, optimizer, runs.STEPS)
    runs.steps(model, controller, optimizer, 3)
    assert hasattr(model, "trim_anchor")
    saved = DistributedDataParallel(model).state_dict()
    assert {key.removeprefix("module.") for key in saved} == anew.state_dict().keys()
    anew.load_state_dict({key.removeprefix("module."): value for key, value in saved.items()})
    assert torch.equal(tiny.logits(anew, "llama"), tiny.logits(model, "llama"))
    model.load_state_dict(anew.state_dict())
    runs.steps(model, controller, optimizer, 1)
    controller.finish(stopped_early=True)
    model.load_state_dict(model.state_dict())


def test_the_anchor_of_ddp_is_nothing_that_trains_to_the_end(group):
    model = runs.model_for("llama", "adalora+at, svd", rank=None)
    with pytest.raises(ConfigError, match="nothing would be left to train"):
        Controller(model, None, runs.STEPS)


def test_a_ddp_that_refused_its_module_is_no_matter(group):
    with pytest.raises(RuntimeError, match="is not needed") as kept:  # as a notebook keeps it
        DistributedDataParallel(torch.nn.Linear(1, 1).requires_grad_(False))
    Controller(made(), None, 4)
    assert kept.tb


def test_fsdp1_is_refused_in_a_bare_loop(group):
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(made(), device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(ModelError, match=r"FSDP1.*use FSDP2"):
        Controller(model, None, 4)


PLUGINS = {
    r"fsdp_config.version=1: .* use 2": dict(fsdp_version=1),
    r"fsdp_config.cpu_ram_efficient_loading=True: .*set it to false": dict(cpu_ram_efficient_loading=True),
    r"fsdp_config.ignored_modules='.*head': .*list of modules": dict(ignored_modules=".*head"),
}


@pytest.mark.parametrize("words", PLUGINS)
def test_ways_of_accelerates_fsdp_that_take_the_adapters_are_refused(accelerate_is_set_to, tmp_path, words):
    args = TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    plugin = FullyShardedDataParallelPlugin(**dict(fsdp_version=2, cpu_ram_efficient_loading=False) | PLUGINS[words])
    accelerate_is_set_to(DistributedType.FSDP, fsdp_plugin=plugin)
    with pytest.raises(ConfigError, match=words):
        TrimCallback().on_init_end(args, None, None, model=made())


@pytest.mark.parametrize(("package", "found"), [("torch", "2.6.0+cpu"), ("accelerate", "1.10.1")])
def test_versions_whose_fsdp_cannot_leave_adapters_whole_are_refused(accelerate_is_set_to, monkeypatch, package, found):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
    accelerate_is_set_to(DistributedType.FSDP, fsdp_plugin=plugin)
    monkeypatch.setattr(parallel, "version", lambda name: {package: found}.get(name, "9.0"))
    with pytest.raises(ConfigError, match=rf"fsdp='{package} .*needs {package} .* or later.*or use DDP"):
        parallel.accelerates_fsdp()


def test_fsdp_on_a_cpu_is_refused_where_accelerate_would_build_ddp(accelerate_is_set_to, monkeypatch):
    accelerate_is_set_to(DistributedType.MULTI_CPU)
    parallel.accelerates_fsdp()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match="accelerate shards on accelerators only, and builds DDP on a CPU"):
        parallel.accelerates_fsdp()


def test_megatron_is_refused(accelerate_is_set_to):
    accelerate_is_set_to(DistributedType.MEGATRON_LM)
    with pytest.raises(ConfigError, match=r"megatron_lm.*use DDP or FSDP2"):
        parallel.accelerates_fsdp()


def test_what_stays_whole_is_the_adapter_frozen_or_not_and_all_that_trains():
    config = TrimConfig(r=4, target_modules=["query"], task_type="SEQ_CLS", rank=Halving())
    model = peft.get_peft_model(tiny.build("bert"), config)
    next(iter(Controller(model, None, 30).layers.values())).freeze("default", "lora_A")
    whole = trimtab.whole_parameters(model)
    named = {name for name, p in model.named_parameters() if p in whole}
    assert named == {n for n, _ in model.named_parameters() if "lora_" in n or "modules_to_save" in n}


# -- the table ------------------------------------------------------------------------------------------------

COLUMNS = ("salientlora", "adalora", "sora", "aflora", "salientlora+aflora")


def engine_table() -> dict[str, tuple[tuple[str, ...], str]]:
    """Engine -> its cells, and the test that holds them."""
    page = (Path(__file__).parent.parent / "docs/howto/sharded.md").read_text("utf-8")
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in page.splitlines() if row.startswith("|")][2:]
    return {row[0].strip("`"): (tuple(row[1:-1]), row[-1].strip("`")) for row in rows}


def compared(engine: str) -> set[str]:
    """The methods of which two processes are compared with one under an engine."""
    cases = {
        "DDP, Trainer": two_process.CASES,
        "DDP, bare loop": [m for kind, _, m in two_process.BARE if kind == "ddp"],
        "FSDP2, Trainer": sharded.TRAINER,
        "FSDP2, bare loop": [m for kind, _, m in sharded.BARE if kind == "fsdp2"],
        "FSDP2, sharded at load": sharded.AT_LOAD,
    }[engine]
    return {case.partition(",")[0] for case in cases}


@pytest.mark.parametrize("engine", engine_table())
def test_every_cell_of_the_engine_table_is_held_by_a_test(engine):
    cells, test = engine_table()[engine]
    assert len(cells) == len(COLUMNS)
    sources = [path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py")]
    assert sum(f"def {test}(" in source for source in sources) == 1
    if set(cells) == {"refused"}:
        assert "refuse" in test
    else:
        assert set(cells) == {"yes"} and set(COLUMNS) <= compared(engine)


@pytest.mark.parametrize("carried, moved", [("cpu:gloo,cuda:gloo", []), ("cuda:nccl", ["cuda"])])
def test_a_model_that_accelerate_has_not_moved_yet_is_sent_from_where_nccl_can(monkeypatch, carried, moved):
    found = []
    monkeypatch.setattr(dist, "get_backend_config", lambda: carried)
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: tensor.fill_(7))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: found.append(device) or tensor.clone())
    parameter = nn.Parameter(torch.zeros(2))
    parallel.broadcast([parameter])
    assert found == moved and parameter.tolist() == [7, 7]
