"""Bottleneck adapters compute the papers' formulas in every family, and behave as any PEFT adapter does."""

import copy
import json
import shutil
import textwrap

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, Trainer, TrainingArguments

import fresh
import tiny
import trimtab
from test_run import read, write_recipe
from test_run import trimtab as command
from trimtab import BottleneckConfig, Where
from trimtab.adapters.bottleneck import BottleneckLayer, bottleneck, fold
from trimtab.app.models import meta_model
from trimtab.errors import ConfigError, ExportError, ModelError
from trimtab.host.adapted import peft_model_of

VARIANTS = ("houlsby", "pfeiffer", "parallel")


def adapted(family, base=None, **settings):
    """The family's tiny model with a bottleneck adapter, the same weights every time."""
    base = tiny.build(family) if base is None else base
    torch.manual_seed(1)
    settings = {"bottleneck_size": 4, "task_type": tiny.FAMILIES[family].task_type, **settings}
    return peft.get_peft_model(base, BottleneckConfig(**settings))


def layers(model):
    return {
        name: m for name, m in peft_model_of(model).get_base_model().named_modules() if isinstance(m, BottleneckLayer)
    }


def stir(model, scale=0.3):
    """Adapter weights far from their start."""
    torch.manual_seed(2)
    with torch.no_grad():
        for layer in layers(model).values():
            for name, p in layer.named_parameters():
                if "bottleneck_down" in name or "bottleneck_up" in name:
                    p.normal_(std=scale)
    return model


def learn(model, family, steps=2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        model(**tiny.batch(family, seed=step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


# -- the maths -----------------------------------------------------------------------------------------


X = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
D, B1 = torch.tensor([[1.0, 0, 1], [0, 1, -1]], dtype=torch.float64), torch.tensor([0.1, -0.1], dtype=torch.float64)
U = torch.tensor([[1.0, 0], [0, 2], [1, 1]], dtype=torch.float64)
B2 = torch.tensor([0.01, 0.02, 0.03], dtype=torch.float64)


@pytest.mark.parametrize("non_linearity, expected", [
    ("gelu", [2.52232113, -2.00423818, 2.03020204]),
    ("relu", [2.61, -1.98, 2.13]),
    ("identity", [2.61, -7.18, -0.47]),
])  # fmt: skip
def test_a_bottleneck_worked_out_by_hand(non_linearity, expected):
    got = X + bottleneck(X, D, B1, U, B2, non_linearity)
    assert got.tolist() == pytest.approx(expected, abs=1e-8)
    on_a_batch = bottleneck(X.expand(2, 3, 3), D, B1, U, B2, non_linearity)  # over the last axis, whatever the others
    assert torch.equal(X + on_a_batch[1, 2], got)


def test_a_linear_one_after_a_linear_is_a_lora_and_a_bias():
    W, c = torch.tensor([[1.0, 2], [0, 1], [3, -1]], dtype=torch.float64), torch.tensor([0.5, 0, -0.5]).double()
    h = torch.tensor([2.0, -1.0], dtype=torch.float64)
    f = W @ h + c
    A, B, bias = fold(W, c, D, B1, U, B2)
    folded = (W + B @ A) @ h + c + bias
    assert folded.tolist() == pytest.approx([7.61, -16.18, 6.03], abs=1e-12)
    assert folded.tolist() == pytest.approx((f + bottleneck(f, D, B1, U, B2, "identity")).tolist(), abs=1e-12)
    A, B, bias = fold(W, None, D, B1, U, B2)  # a linear without bias
    assert torch.allclose((W + B @ A) @ h + bias, W @ h + bottleneck(W @ h, D, B1, U, B2, "identity"))


def test_no_other_one_folds():
    with pytest.raises(ExportError, match=r"adapter.non_linearity='gelu'.*fits no weight"):
        fold(D.T, None, D, B1, U, B2, "gelu")


@pytest.mark.parametrize(
    "size, blocks, m, adapters, norms", [(768, 12, 64, 2_379_264, 36_864), (1024, 24, 64, 6_343_680, 98_304)]
)
def test_published_counts(size, blocks, m, adapters, norms):
    config = AutoConfig.for_model(
        "bert", hidden_size=size, num_hidden_layers=blocks, intermediate_size=4 * size, num_attention_heads=size // 64
    )
    model = meta_model(config, "AutoModel")
    made = trimtab.plan(model, BottleneckConfig(bottleneck_size=m))
    assert made.params["initial"] == adapters + norms
    assert (
        trimtab.plan(model, BottleneckConfig(bottleneck_size=m, train_layer_norms=False)).params["initial"] == adapters
    )


def activation(variant):
    return F.gelu if variant == "houlsby" else F.relu


def plain_block(family, block):
    """norm before attention, attention, norm before feed-forward, feed-forward: each takes hidden states.

    For post-LN the norms are those of the sums. Built from the plain model's modules, adapters nowhere.
    """
    if family == "bert":

        def attention(x, kw):
            return block.attention.output.dense(block.attention.self(x, kw["attention_mask"])[0])

        def feed(h):
            return block.output.dense(block.intermediate(h))

        return "post", block.attention.output.LayerNorm, attention, block.output.LayerNorm, feed
    if family == "bart":

        def attention(x, kw):
            return block.self_attn(x, attention_mask=kw["attention_mask"])[0]

        def feed(h):
            return block.fc2(block.activation_fn(block.fc1(h)))

        return "post", block.self_attn_layer_norm, attention, block.final_layer_norm, feed
    if family == "t5":
        inner = block.layer[1]

        def attention(x, kw):
            return block.layer[0].SelfAttention(x, mask=kw["attention_mask"])[0]

        return "pre", block.layer[0].layer_norm, attention, inner.layer_norm, inner.DenseReluDense
    if family == "gpt2":
        return "pre", block.ln_1, lambda x, kw: block.attn(x, **kw)[0], block.ln_2, block.mlp

    def attention(x, kw):
        return block.self_attn(hidden_states=x, **kw)[0]

    if family == "gemma2":
        return (
            "pre",
            block.input_layernorm,
            lambda x, kw: block.post_attention_layernorm(attention(x, kw)),
            block.pre_feedforward_layernorm,
            lambda h: block.post_feedforward_layernorm(block.mlp(h)),
        )
    return "pre", block.input_layernorm, attention, block.post_attention_layernorm, block.mlp


def by_the_book(family, block, x, kw, variant, adapters):
    """The block's output by the formulas of the papers."""
    how, n1, attention, n2, feed = plain_block(family, block)
    a1 = adapters[0] if variant == "houlsby" else lambda f: 0.0
    a2 = adapters[-1]
    if how == "post":
        f = attention(x, kw)
        h = n1(x + f + a1(f))
        f = feed(h)
        if variant == "houlsby":
            return n2(h + f + a2(f))
        return n2(h + f + a2(n2(h + f))) if variant == "pfeiffer" else n2(h + f + 4 * a2(h))
    f = attention(n1(x), kw)
    h = x + f + a1(f)
    y = n2(h)
    f = feed(y)
    return h + f + (4 * a2(y) if variant == "parallel" else a2(f))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["bert", "bart", "t5", "gpt2", "llama", "gemma2"])
def test_a_block_computes_the_formula_of_the_paper(family, variant):
    base = tiny.build(family).double().eval()
    plain = copy.deepcopy(base)
    model = stir(adapted(family, base, variant=variant)).eval()
    stacks = trimtab.host.sites.find_stacks(plain)
    stack = next(iter(stacks.values()))
    block = model.get_base_model().get_submodule(f"{stack.name}.0")
    seen = {}

    def look(module, args, kwargs, output):
        seen.update(args=args, kwargs=kwargs, output=output)

    handle = block.register_forward_hook(look, with_kwargs=True)
    with torch.no_grad():
        model(**tiny.batch(family))
    handle.remove()
    kw = dict(seen["kwargs"])
    x = seen["args"][0] if seen["args"] else kw.pop("hidden_states")
    kw.setdefault("attention_mask", next((a for a in seen["args"][1:] if isinstance(a, torch.Tensor)), None))
    kw = {k: v for k, v in kw.items() if k in ("attention_mask", "position_embeddings", "position_ids")}
    if family == "gpt2":
        kw.pop("position_ids", None)
    phi = activation(variant)
    pairs = [
        (la.bottleneck_down["default"], la.bottleneck_up["default"])
        for la in block.modules()
        if isinstance(la, BottleneckLayer) and "default" in la.bottleneck_down
    ]
    adapters = [
        lambda h, down=down, up=up: F.linear(phi(F.linear(h, down.weight, down.bias)), up.weight, up.bias)
        for down, up in pairs
    ]
    assert len(adapters) == (2 if variant == "houlsby" else 1)
    with torch.no_grad():
        expected = by_the_book(family, plain.get_submodule(f"{stack.name}.0"), x, kw, variant, adapters)
    output = seen["output"][0] if isinstance(seen["output"], tuple) else seen["output"]
    assert torch.allclose(output, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not torch.allclose(output, plain_output(family, plain, stack, x, kw), atol=1e-3)


def plain_output(family, plain, stack, x, kw):
    return by_the_book(family, plain.get_submodule(f"{stack.name}.0"), x, kw, "houlsby", [lambda f: 0.0] * 2)


@pytest.mark.parametrize("kind, size, tails", [
    ("distilbert", {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 48}, ["attention.out_lin", "ffn.lin2"]),
    ("bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 2}, ["self_attention.dense", "mlp.dense_4h_to_h"]),
    ("gemma3_text", {"head_dim": 8}, ["post_attention_layernorm", "post_feedforward_layernorm"]),
    ("qwen3", {"head_dim": 32}, ["self_attn.o_proj", "mlp.down_proj"]),  # a head's norm as wide as the model
    ("electra", {}, ["attention.output.dropout", "output.dropout"]),
])  # fmt: skip
def test_places_in_other_families_are_the_ends_of_their_sublayers(kind, size, tails):
    names_of_its_own = kind in ("distilbert", "bloom")
    common = {"vocab_size": tiny.VOCAB} if names_of_its_own else tiny._small(num_hidden_layers=1)
    model = meta_model(AutoConfig.for_model(kind, **common, **size), "AutoModel")
    places = BottleneckConfig().places(model).values()
    assert [p.kind for p in places if p.how] == tails
    assert not any("q_norm" in p.kind for p in places)


def test_houlsby_covers_cross_attention():
    names = [n for n in layers(adapted("bart")) if "decoder.layers.0" in n and not n.endswith("norm")]
    assert [n.partition("layers.0.")[2] for n in names] == ["self_attn.out_proj", "encoder_attn.out_proj", "fc2"]


def test_starts_are_those_of_the_papers():
    def weights(**settings):
        model = adapted(
            "bert",
            meta := AutoModel.from_config(tiny.build("bert").config),
            task_type=None,
            bottleneck_size=300,
            **settings,
        )
        assert meta is model.get_base_model()
        layer = next(la for la in layers(model).values() if "default" in la.bottleneck_down)
        down, up = layer.bottleneck_down["default"], layer.bottleneck_up["default"]
        assert not down.bias.any() and not up.bias.any()
        return down.weight, up.weight

    for weight in weights():
        assert weight.std().item() == pytest.approx(0.01 * 0.87963, rel=0.03)
        assert weight.abs().max() <= 0.02
    for weight in weights(variant="pfeiffer"):
        assert weight.std().item() == pytest.approx(0.02, rel=0.03)
    down, up = weights(variant="parallel")
    assert not up.any() and down.abs().max().item() == pytest.approx(32**-0.5, rel=0.01)  # Kaiming-uniform(√5)


# -- every family --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_it_starts_as_the_base_trains_saves_loads_and_switches(family, tmp_path):
    """One variant a family in turn, so that every variant meets pre-LN, post-LN and encoder-decoders."""
    variant = VARIANTS[list(tiny.FAMILIES).index(family) % 3]
    base = tiny.build(family)
    untouched = tiny.logits(base, family)
    before = {n: p.clone() for n, p in base.named_parameters()}
    model = adapted(family, base, variant=variant, init="zero_up")
    assert torch.equal(tiny.logits(model, family), untouched)
    learn(model, family)
    trained = tiny.logits(model, family)
    assert (trained - untouched).abs().max() > 1e-4
    for name, p in model.get_base_model().named_parameters():  # the base is as it was
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        assert plain not in before or torch.equal(p, before[plain]), name
    with model.disable_adapter():
        assert torch.equal(tiny.logits(model, family), untouched)
    model.save_pretrained(tmp_path)
    own = {"bottleneck_down", "bottleneck_up", "bottleneck_norm"}
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all(own & set(key.split(".")) or "classifier" in key or "score" in key for key in saved)
    again = peft.PeftModel.from_pretrained(tiny.build(family), tmp_path)
    assert torch.equal(tiny.logits(again, family), trained)
    model.load_adapter(tmp_path, "second")
    model.set_adapter("second")
    assert torch.equal(tiny.logits(model, family), trained)
    stir(model)  # both; they stay apart
    model.set_adapter("default")
    model.delete_adapter("second")
    assert all(set(layer.r) == {"default"} for layer in layers(model).values())


def test_only_chosen_layers_hold_adapters_and_trained_norms():
    model = adapted("bert", where=Where("mask", {"encoder.layer": "0101"}))
    assert {name.split(".")[3] for name in layers(model)} == {"1", "3"}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "classifier" not in n}
    assert {n.split(".layer.")[1][0] for n in trained} == {"1", "3"}
    plan = trimtab.plan(tiny.build("bert"), BottleneckConfig(where=Where("mask", {"encoder.layer": "0101"})))
    assert {site.site.block for site in plan.sites} == {1, 3}


def test_both_stacks_of_an_encoder_decoder_are_chosen_apart(tmp_path):
    where = Where("mask", {"encoder.block": "01", "decoder.block": "10"})
    model = adapted("t5", where=where)
    assert {".".join(name.split(".")[:3]) for name in layers(model)} == {"encoder.block.1", "decoder.block.0"}
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny.build("t5"), tmp_path)
    assert set(layers(again)) == set(layers(model))
    same = peft.get_peft_model(tiny.build("t5"), trimtab.restrict(BottleneckConfig(), where, tiny.build("t5")))
    assert set(layers(same)) == set(layers(model))


def test_layers_to_transform_counts_in_every_stack():
    names = layers(adapted("bart", layers_to_transform=[1], variant="pfeiffer"))
    assert list(names) == [f"model.{stack}.layers.1.final_layer_norm" for stack in ("encoder", "decoder")]


def test_a_plan_counts_what_trains_in_every_family():
    for family in tiny.FAMILIES:
        for variant in VARIANTS:
            settings = dict(variant=variant, reduction_factor=8, task_type=tiny.FAMILIES[family].task_type)
            plan = trimtab.plan(tiny.build(family), BottleneckConfig(**settings))
            model = adapted(family, bottleneck_size=None, **settings)
            trained = sum(p.numel() for layer in layers(model).values() for p in layer.parameters() if p.requires_grad)
            assert plan.params["initial"] == trained, (family, variant)
            assert trimtab.Controller(model, total_steps=1).trainable_params() == trained


def test_a_base_in_half_precision_has_adapters_in_float32():
    for variant in VARIANTS:
        model = adapted("llama", tiny.build("llama").bfloat16(), variant=variant)
        learn(model, "llama", steps=1)
        assert {p.dtype for la in layers(model).values() for p in la.parameters() if p.requires_grad} == {torch.float32}
        assert tiny.logits(model, "llama").dtype == torch.bfloat16


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = stir(adapted("bart", variant="parallel")).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**tiny.batch("bart")).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_unloading_gives_the_base_back_and_merging_says_why_not():
    base = tiny.build("llama")
    untouched = tiny.logits(base, "llama")
    model = stir(adapted("llama", base, variant="parallel"))
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ExportError, match="its relu is not linear"):
            merge()
    plain = model.unload()
    assert torch.equal(tiny.logits(plain, "llama"), untouched)
    assert not any(module._forward_pre_hooks for module in plain.modules())


@pytest.mark.parametrize(
    "variant, reason",
    [
        ("houlsby", "changes biases too"),
        ("pfeiffer", "a norm stands between"),
        ("parallel", "goes round the feed-forward"),
    ],
)
def test_no_form_of_export_pretends(variant, reason, tmp_path):
    model = adapted("bert", variant=variant, non_linearity="identity")
    for form in ("peft", "padded", "merged"):
        with pytest.raises(ExportError, match=f"export.format='{form}'.*{reason}"):
            trimtab.export(model, tmp_path / form, format=form)


# -- a user's mistakes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("settings, message", [
    ({"variant": "houlsbie"}, "adapter.variant='houlsbie'.*Did you mean 'houlsby'"),
    ({"bottleneck_size": 0}, "adapter.bottleneck_size=0: a whole number of at least 1"),
    ({"bottleneck_size": 8, "reduction_factor": 2}, "keep one of them"),
    ({"non_linearity": "rellu"}, "Did you mean 'relu'"),
    ({"init": "zeroup"}, "Did you mean 'zero_up'"),
    ({"init_scale": -1.0}, "a finite number above 0"),
    ({"init_scale": "0.01"}, "a finite number above 0"),
    ({"non_linearity": "prelu"}, "parameters of its own"),
    ({"train_layer_norms": "no"}, "must be true or false"),
    ({"scale": 2.0}, "houlsby has none"),
    ({"where": "0110"}, "a bare mask needs the model"),
    ({"target_modules": "all-linear"}, "choose layers with where"),
])  # fmt: skip
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BottleneckConfig(**settings)


def test_a_place_that_is_none_is_refused():
    with pytest.raises(ModelError, match="'query' is no place of variant=houlsby"):
        adapted("bert", target_modules=["query"])
    with pytest.raises(ModelError, match="no layer is left"):
        adapted("bert", layers_to_transform=[7])


def test_a_mixture_of_experts_is_refused():
    config = AutoConfig.for_model("mixtral", **tiny._small(num_local_experts=2))
    with pytest.raises(ModelError, match=r"feed-forward.*adapter.type=lora"):
        peft.get_peft_model(meta_model(config, "AutoModelForCausalLM"), BottleneckConfig())


def test_a_width_is_never_below_one():
    assert BottleneckConfig(reduction_factor=100).width(32) == 1
    assert [BottleneckConfig(variant=v).width(768) for v in VARIANTS] == [64, 48, 384]


# -- processes, trainers, runs -------------------------------------------------------------------------


def test_peft_alone_refuses_the_folder_and_with_trimtab_reads_it(tmp_path):
    base = AutoModel.from_config(tiny.build("bert").config)
    base.save_pretrained(tmp_path / "base")
    stir(adapted("bert", base, task_type=None)).save_pretrained(tmp_path / "adapter")
    code = textwrap.dedent("""\
        import sys
        from peft import PeftModel
        from transformers import AutoModel

        def load():
            base = AutoModel.from_pretrained(sys.argv[1] + "/base")
            return PeftModel.from_pretrained(base, sys.argv[1] + "/adapter")

        try:
            load()
        except KeyError as error:
            assert "TRIMTAB_BOTTLENECK" in str(error)
        else:
            sys.exit("loaded")
        from trimtab import BottleneckConfig
        load()
        """)
    done = fresh.python("-c", code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_stock_trainer_resumes_to_the_same_weights(tmp_path):
    def trained(folder, resume=None):
        model = adapted("roberta", variant="pfeiffer")
        args = TrainingArguments(
            str(tmp_path / folder),
            max_steps=6,
            save_steps=3,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        )
        callback = trimtab.TrimCallback()
        Trainer(model, args, train_dataset=tiny.rows("roberta"), callbacks=[callback]).train(resume)
        if resume is None:
            assert callback.events[0]["trainable"] == callback.controller.trainable_params() > 0
        return tiny.logits(model, "roberta")

    whole = trained("a")
    assert torch.equal(trained("b", str(tmp_path / "a" / "checkpoint-3")), whole)


def test_a_run_trains_saves_resumes_and_says_what_cannot_be_exported(tmp_path):
    recipe = write_recipe(
        tmp_path,
        adapter={"type": "bottleneck", "variant": "parallel", "bottleneck_size": 4},
        where={"method": "last", "count": 2},
    )
    said = command("run", recipe).output
    run = tmp_path / "run"
    assert "its relu is not linear" in said
    metrics = read(run, "metrics.json")
    count = 2 * (2 * 4 * 16 + 16 + 4)
    assert metrics["params"] == {"initial": count, "final": count, "average": count, "held": count}
    assert metrics["adapter"]["variant"] == "parallel" and "r" not in metrics["adapter"]
    assert read(run, "plan.json")["settings"]["predicted_params"]["initial"] == count
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(run / "adapter")
    shutil.rmtree(run / "checkpoints" / "checkpoint-16")
    (run / "metrics.json").unlink()
    command("run", run, "--resume")  # the folder's own recipe is accepted again
    again = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert read(run, "metrics.json")["metrics"] == metrics["metrics"]
    assert "no LoRA or merged form" in command("export", run, code=2).output


@pytest.mark.parametrize("override, message", [
    ("rank={method: adalora, target_r: 1}", "rank.method='adalora': works on adapter.type=lora"),
    ("freeze=aflora", "freeze.method='aflora': works on adapter.type=lora"),
    ("budget={final_params: 100}", "budget={'final_params': 100}: works on adapter.type=lora"),
    ("export=merged", "export.format='merged': bottleneck has no LoRA or merged form"),
    ("adapter.r=8", "its width is bottleneck_size, or reduction_factor"),
    ("adapter.alpha=8", "scale is for variant=parallel"),
    ("adapter.target_modules=[query]", "where chooses layers"),
    ("adapter.layers_to_transform=[1]", "the recipe's own key is where"),
    ("adapter.botleneck_size=8", "Did you mean 'bottleneck_size'"),
])  # fmt: skip
def test_what_does_not_go_with_it_is_refused_in_one_line(override, message, tmp_path):
    recipe = {
        "model": {
            "config": {
                "model_type": "bert",
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "intermediate_size": 32,
            }
        },
        "adapter": {"type": "bottleneck"},
    }
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    said = command("plan", tmp_path / "r.yaml", override, code=2).stderr
    assert message in said and said.count("\n") == 1
