"""Whatever users do with an adapted model, in any order, stock PEFT's reload gives the live model's logits."""

from __future__ import annotations

import copy
import io
import os
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tiny
import trimtab
from trimtab import EVA, AdaLoRA, AFLoRA, Controller, GoRA, GradES, SalientLoRA, SoRA, TrimConfig
from trimtab.host.layers import hosted_layers

TOTAL = 24
RANK = {
    "none": None,
    "salientlora": SalientLoRA(target_r=2, warmup=2, allocation=12, initial_window=2, final_window=4),
    "salientlora svd": SalientLoRA(target_r=2, warmup=2, allocation=12, initial_window=2, final_window=4, start="svd"),
    "adalora": AdaLoRA(target_r=2, warmup=2, final=8, interval_steps=2),
    "adalora svd": AdaLoRA(target_r=2, warmup=2, final=8, interval_steps=2, start="svd"),
    "sora": SoRA(prox_threshold=0.05, sticky_zeros=True, interval=4),
    "eva": EVA(),
    "gora": GoRA(gamma=1.0),
    "adalora eva": AdaLoRA(target_r=2, warmup=2, final=8, interval_steps=2, start="eva"),
}
FREEZE = {
    "none": None,
    "aflora": AFLoRA(warmup=2, final=8, interval_steps=2),
    "grades": GradES(tau=1.0, alpha=4, interval_steps=2),
    "grades by weights": GradES(tau=1.0, alpha=4, interval_steps=2, movement="weight_change"),
    "aflora svd": AFLoRA(warmup=2, final=8, interval_steps=2, start="svd"),
}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "bert": ["query", "value", "output.dense"]}
TASKS = {"llama": "CAUSAL_LM", "bert": "SEQ_CLS"}


class Habits(RuleBasedStateMachine):
    """Steps, saves, resumes, adapters that come and go, copies, exports and reloads, in any order."""

    @initialize(
        family=st.sampled_from(sorted(TARGETS)), rank=st.sampled_from(sorted(RANK)),
        freeze=st.sampled_from(sorted(FREEZE)), rate=st.sampled_from([1e-3, 1e-2, 5e-2]), seed=st.integers(0, 3),
    )  # fmt: skip
    def begin(self, family: str, rank: str, freeze: str, rate: float, seed: int) -> None:
        if rank == freeze == "none":
            rank = "adalora"
        self.folder = Path(tempfile.mkdtemp())
        self.family, self.rate, self.seed, self.names = family, rate, seed, 0
        self.config = TrimConfig(
            task_type=TASKS[family], r=4, lora_alpha=8, target_modules=TARGETS[family], rank=RANK[rank],
            freeze=FREEZE[freeze],
        )  # fmt: skip
        self.model = self.build()
        self.start()

    def build(self) -> peft.PeftModel:
        base = tiny.build(self.family)
        torch.manual_seed(self.seed)
        return tiny.begun(peft.get_peft_model(base, self.config), self.family)

    def start(self) -> None:
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.controller = Controller(self.model, self.optimizer, total_steps=TOTAL)
        self.kept: Any = None

    @property
    def is_training(self) -> bool:
        return "default" in self.model.peft_config and not self.controller.is_finished

    # -- what users do -------------------------------------------------------------------------------------

    @precondition(lambda self: self.is_training)
    @rule(n=st.integers(1, 6))
    def train(self, n: int) -> None:
        self.model.set_adapter("default")
        self.model.train()
        for _ in range(min(n, TOTAL - self.controller.step)):
            self.model(**tiny.batch(self.family, seed=self.controller.step)).loss.backward()
            self.controller.before_step()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.controller.after_step()
            self.optimizer.zero_grad()
        if self.controller.step == TOTAL:
            self.controller.finish()

    @precondition(lambda self: self.is_training)
    @rule()
    def stop_early(self) -> None:
        self.controller.finish()

    @precondition(lambda self: not self.is_training and "default" in self.model.peft_config)
    @rule()
    def train_on_as_plain_lora(self) -> None:
        self.model.set_adapter("default")
        self.model.train()
        optimizer = torch.optim.SGD([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)
        self.model(**tiny.batch(self.family)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @precondition(lambda self: self.is_training)
    @rule()
    def keep_a_checkpoint(self) -> None:
        held = io.BytesIO()
        adapter = peft.get_peft_model_state_dict(self.model, adapter_name="default")
        torch.save((adapter, self.optimizer.state_dict(), self.controller.state_dict()), held)
        self.kept = held.getvalue()

    @precondition(lambda self: self.is_training and self.kept is not None and len(self.model.peft_config) == 1)
    @rule()
    def resume_in_a_fresh_model(self) -> None:
        adapter, moments, state = torch.load(io.BytesIO(self.kept), weights_only=True)
        kept = self.kept
        self.model = self.build()
        self.start()
        peft.set_peft_model_state_dict(self.model, adapter)
        self.controller.load_state_dict(state)
        self.optimizer.load_state_dict(moments)
        self.kept = kept

    @precondition(lambda self: len(self.model.peft_config) < 4)
    @rule(kind=st.sampled_from(["plain", "same config", "loaded"]))
    def add_an_adapter(self, kind: str) -> None:
        self.names += 1
        name = f"other{self.names}"
        if kind == "same config":
            self.model.add_adapter(name, self.config)
        elif kind == "plain":
            self.model.add_adapter(name, peft.LoraConfig(r=3, task_type=TASKS[self.family],
                                                         target_modules=TARGETS[self.family][:1]))  # fmt: skip
        else:
            where = self.save(self.model)
            source = next(iter(self.model.peft_config))
            self.model.load_adapter(str(where if source == "default" else where / source), name)

    @precondition(lambda self: len(self.model.peft_config) > 1)
    @rule(data=st.data())
    def delete_an_adapter(self, data: st.DataObject) -> None:
        others = [name for name in self.model.peft_config if name != "default"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.delete_adapter(data.draw(st.sampled_from(others)))

    @rule(data=st.data())
    def switch(self, data: st.DataObject) -> None:
        self.model.set_adapter(data.draw(st.sampled_from(sorted(self.model.peft_config))))

    @rule()
    def copy_and_drop_the_copy(self) -> None:
        twin = copy.deepcopy(self.model)
        assert torch.equal(self.logits(twin), self.logits(self.model))
        self.check(twin)

    @rule(format=st.sampled_from(["peft", "padded", "merged"]), data=st.data())
    def export(self, format: str, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.model.peft_config)))
        self.model.set_adapter(name)
        out = self.folder / "export"
        trimtab.export(self.model, out, format=format, adapter_name=name)
        if format == "merged":
            loaded = type(tiny.build(self.family)).from_pretrained(out)
        else:
            loaded = peft.PeftModel.from_pretrained(tiny.build(self.family), str(out))
        assert torch.allclose(self.logits(loaded), self.logits(self.model), atol=1e-5)
        shutil.rmtree(out)

    @rule()
    def merge_and_unmerge(self) -> None:
        before = self.logits(self.model)
        self.model.merge_adapter()
        assert torch.allclose(self.logits(self.model), before, atol=1e-5)
        self.model.unmerge_adapter()

    # -- what holds after each ---------------------------------------------------------------------------------

    @invariant()
    def stock_peft_reloads_what_lives(self) -> None:
        self.check(self.model)

    def check(self, model: peft.PeftModel) -> None:
        folder, name = self.save(model), model.active_adapter
        where = folder if name == "default" else folder / name
        loaded = peft.PeftModel.from_pretrained(tiny.build(self.family), str(where))
        assert not hosted_layers(loaded)
        assert torch.allclose(self.logits(loaded), self.logits(model), atol=1e-5)

    def logits(self, model: torch.nn.Module) -> torch.Tensor:
        return tiny.logits(model, self.family)

    def save(self, model: peft.PeftModel) -> Path:
        folder = self.folder / "saved"
        shutil.rmtree(folder, ignore_errors=True)
        model.save_pretrained(str(folder))
        return folder

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            shutil.rmtree(self.folder, ignore_errors=True)


# Every run takes a few new sequences: TRIMTAB_SEQUENCES says how many; `make test-all` more.
Habits.TestCase.settings = settings(
    max_examples=int(os.environ.get("TRIMTAB_SEQUENCES", "5")), stateful_step_count=12, deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink), suppress_health_check=list(HealthCheck),
)  # fmt: skip
TestAnySequence = Habits.TestCase
