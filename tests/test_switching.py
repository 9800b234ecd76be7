"""Switching tasks: the merged adapter's function exactly, and the base back bit for bit."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification

import trimtab
from tasks.stand_ins import tiny_config
from trimtab.errors import ExportError, ModelError

IDS = torch.arange(24).reshape(2, 12) % 32


def base(dtype=torch.float32):
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(tiny_config("bert")).to(dtype).eval()


def exported(folder, seed, **settings):
    config = trimtab.TrimConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "output.dense"], **settings)
    model = peft.get_peft_model(base(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3)
    trimtab.export(model, folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {"one": exported(root / "one", 1), "two": exported(root / "two", 2, rank=trimtab.SalientLoRA(target_r=2))}


def loaded(folders, dtype=torch.float32):
    model = peft.PeftModel.from_pretrained(base(dtype), folders["one"], adapter_name="one")
    model.load_adapter(folders["two"], adapter_name="two")
    return model.eval()


def bits(model):
    """Everything of the base that an adapter could merge into."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name and "modules_to_save" not in name
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_the_same_bit_for_bit_after_any_number_of_switches(folders, dtype):
    model = loaded(folders, dtype)
    before, plain = bits(model), base(dtype)(IDS).logits
    switch = trimtab.AdapterSwitch(model)
    for name in ["one", "two", "one", None, "two", "two"]:
        switch.to(name)
    assert switch.active == "two"
    assert any(not torch.equal(before[name], now) for name, now in bits(model).items())
    switch.to(None)
    assert all(torch.equal(before[name], now) for name, now in bits(model).items())
    assert torch.equal(model(IDS).logits, plain)


def test_a_merged_adapter_says_what_it_says_unmerged_with_its_own_head(folders):
    model, other = loaded(folders), loaded(folders)
    switch = trimtab.AdapterSwitch(model)
    seen = []
    for name in ("one", "two", "one"):
        switch.to(name)
        other.set_adapter(name)
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
        seen.append(model(IDS).logits)
    assert torch.equal(seen[0], seen[2])
    assert not torch.allclose(seen[0], seen[1])


def test_a_with_block_leaves_the_base_as_it_was_whatever_happens(folders):
    model = loaded(folders)
    before = bits(model)
    with pytest.raises(RuntimeError, match="inside"), trimtab.AdapterSwitch(model) as switch:
        switch.to("one")
        raise RuntimeError("inside")
    assert all(torch.equal(before[name], now) for name, now in bits(model).items())


def test_an_adapter_that_cannot_be_merged_leaves_the_base_as_it_was():
    model = peft.get_peft_model(base(), trimtab.BottleneckConfig(task_type="SEQ_CLS", bottleneck_size=2)).eval()
    switch = trimtab.AdapterSwitch(model)
    with pytest.raises(ExportError, match="no weight gives the same function"):
        switch.to("default")
    assert switch.active is None
    assert torch.equal(model(IDS).logits, base()(IDS).logits)


def test_nothing_can_train_while_adapters_are_switched(folders):
    model = loaded(folders)
    trimtab.AdapterSwitch(model).to("one")
    assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" in name)


def test_what_cannot_be_switched_is_refused(folders):
    model = loaded(folders)
    with pytest.raises(ModelError, match=r"there is one, two\. Did you mean 'two'"):
        trimtab.AdapterSwitch(model).to("tow")
    model.base_model.enable_adapter_layers()
    model.merge_adapter(["one"])
    with pytest.raises(ModelError, match="load the base anew"):
        trimtab.AdapterSwitch(model)
    with pytest.raises(ModelError, match="holds no PEFT adapter"):
        trimtab.AdapterSwitch(base())
    prompts = peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2))
    with pytest.raises(ExportError, match="no weight holds"):
        trimtab.AdapterSwitch(prompts)
