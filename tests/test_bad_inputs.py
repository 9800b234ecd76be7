"""What people get wrong: recipes, settings, command lines and data files, each refused in one line.

Every case is given ``--overwrite`` over a finished run, where the command takes it: nothing of that run may change.
"""

import json
import os
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner
from huggingface_hub import constants

from tasks.stand_ins import WORDS
from test_run import tiny_model
from trimtab.app import trainer_settings
from trimtab.app.cli import cli

# An override, and a part of what is said to it. The key at fault stands in front of that.
SETTINGS = [
    ("train.lr=1e-3", "Did you mean 'train.learning_rate'?"),
    ("train.epochs=3", "Did you mean 'train.num_train_epochs'?"),
    ("train.batch_size=8", "Did you mean 'train.per_device_train_batch_size'?"),
    ("train.group_by_length=true", "Did you mean 'train.train_sampling_strategy: group_by_length'?"),
    ("adapter.lora_r=8", "Did you mean 'adapter.r'?"),
    ("adapter.rank=8", "Did you mean 'adapter.r'?"),
    ("adapter.lora_alpha=16", "in a recipe this is adapter.alpha"),
    ("adapter.lora_dropout=0.1", "in a recipe this is adapter.dropout"),
    ("adapter.modules=[query]", "Did you mean 'adapter.target_modules'?"),
    ("lr=1e-3", "Did you mean 'train.learning_rate'?"),
    ("epochs=3", "Did you mean 'train.num_train_epochs'?"),
    ("batch_size=8", "Did you mean 'train.per_device_train_batch_size'?"),
    ("learning_rate=1e-3", "Did you mean 'train.learning_rate'?"),
    ("lora_r=8", "Did you mean 'adapter.r'?"),
    ("model_name_or_path=x", "Did you mean 'model.name_or_path'?"),
    ("base_model=x", "Did you mean 'model.name_or_path'?"),
    ("train.max_epochs=3", "Did you mean 'train.num_train_epochs'?"),
    ("train.steps=10", "Did you mean 'train.max_steps'?"),
    ("train.evaluation_strategy=epoch", "Did you mean 'train.eval_strategy'?"),
    ("train.lr_scheduler=cosine", "Did you mean 'train.lr_scheduler_type'?"),
    ("train.warmup=100", "Did you mean 'train.warmup_steps', a share of the run below 1?"),
    ("train.grad_accum=4", "Did you mean 'train.gradient_accumulation_steps'?"),
    ("train.seed=3", "Trimtab sets this; the recipe's own key is seed"),
    ("train.output_dir=x", "Trimtab sets this; the recipe's own key is output_dir"),
    ("train.no_cuda=true", "Did you mean 'train.use_cpu: true'?"),
    ("train.gradient_checkpoint=true", "Did you mean 'train.gradient_checkpointing'?"),
    ("train.per_gpu_train_batch_size=8", "Did you mean 'train.per_device_train_batch_size'?"),
    ("train.overwrite_output_dir=true", "Did you mean '--overwrite', on the command line?"),
    ("train.early_stopping_patience=3", "Did you mean 'early_stopping'?"),
    ("output=x", "Did you mean 'output_dir'?"),
    ("dataset=x.csv", "Did you mean 'data.train'?"),
    ("data.file=x.csv", "Did you mean 'data.train'?"),
    ("data.dev=x.csv", "Did you mean 'data.validation'?"),
    ("data.val=x.csv", "Did you mean 'data.validation'?"),
    ("data.eval=x.csv", "Did you mean 'data.validation'?"),
    ("task.max_len=8", "Did you mean 'task.max_length'"),
    ("task.max_seq_length=8", "Did you mean 'task.max_length'"),
    ("task.text_column=text", "Did you mean 'task.text'"),
    ("task.num_labels=2", "Did you mean 'task.labels', the classes in their order (else"),
    ("where.layers=4", "Did you mean 'where.count'?"),
    ("where.threshold=0.5", "Did you mean 'where.ratio'?"),
    ("rank.r=4", "missing; rank needs it"),
    ("freeze.warmup_steps=4", "missing; freeze needs it"),
    ("peft.r=8", "Did you mean 'adapter'?"),
    ("load_in_4bit=true", "Did you mean 'model.quantization: {load_in_4bit: true}'?"),
    ("bf16=true", "Did you mean 'train.bf16'?"),
    ("max_length=8", "Did you mean 'task.max_length'?"),
    ("seed=abc", "must be an integer"),
    ("seed=-1", "must be at least 0"),
    ("seed=1.5", "must be an integer, got a number with a fractional part"),
    ("train.per_device_train_batch_size=0", "must be a whole number, at least 1"),
    ("train.per_device_train_batch_size=-4", "must be a whole number, at least 1"),
    ("train.per_device_train_batch_size=1.5", "must be a whole number, at least 1"),
    ("train.per_device_train_batch_size=eight", "must be a number: a whole number, at least 1"),
    ("train.per_device_eval_batch_size=0", "must be a whole number, at least 1"),
    ("train.num_train_epochs=0", "must be a number above 0"),
    ("train.num_train_epochs=.nan", "must be a number above 0"),
    ("train.learning_rate=-1e-3", "must be a number above 0"),
    ("train.learning_rate=0", "must be a number above 0"),
    ("train.learning_rate=.nan", "must be a number above 0"),
    ("train.learning_rate=.inf", "must be a number above 0"),
    ("train.learning_rate=1e-3x", "must be a number: a number above 0"),
    ("train.learning_rate=true", "must be a number above 0"),
    ("train.learning_rate=[1e-3]", "must be a number above 0"),
    ("train.learning_rate=", "needs a value; leave the key out for the Trainer's own (a"),
    ("train.max_steps=0", "must be a whole number, at least 1 (or -1, for"),
    ("train.max_steps=-5", "must be a whole number, at least 1 (or -1, for"),
    ("train.max_steps=1.5", "must be a whole number, at least 1 (or -1, for"),
    ("train.gradient_accumulation_steps=0", "must be a whole number, at least 1"),
    ("train.warmup_steps=-1", "must be at least 0: a number of steps, or a share of the run"),
    ("train.weight_decay=-1", "must be at least 0"),
    ("train.max_grad_norm=-1", "must be at least 0"),
    ("train.logging_steps=0", "must be above 0: a number of steps, or a share of the run"),
    ("train.logging_steps=-1", "must be above 0: a number of steps, or a share of the run"),
    ("train.save_total_limit=-1", "must be a whole number, at least 1"),
    ("train={eval_strategy: steps, eval_steps: 0}", "must be above 0: a number of steps, or a share of the run"),
    ("train={save_strategy: steps, save_steps: 0}", "must be above 0: a number of steps, or a share of the run"),
    ("train.optim=adam", "must be one of adamw_torch, adamw_torch_fused,"),
    ("train.lr_scheduler_type=cosin", "Did you mean 'cosine'?"),
    ("train.eval_strategy=epochs", "Did you mean 'epoch'?"),
    ("train.save_strategy=never", "Did you mean 'no'?"),
    ("train.logging_strategy=sometimes", "must be one of no, steps, epoch."),
    ("train={load_best_model_at_end: true, metric_for_best_model: acuracy}", "Did you mean 'accuracy'?"),
    ("train={load_best_model_at_end: true, prediction_loss_only: true}", "is told by accuracy: leave it out"),
    ("train.batch_eval_metrics=true", "scores are of all rows at once"),
    ("train.eval_do_concat_batches=false", "scores are of all rows at once"),
    ('train={load_best_model_at_end: true, eval_strategy: "no"}', "needs evaluations to tell which is best: set"),
    (
        'train={load_best_model_at_end: true, save_strategy: "no"}',
        "load_best_model_at_end loads a checkpoint that was evaluated:",
    ),
    (
        "train={load_best_model_at_end: true, eval_strategy: epoch, save_strategy: steps}",
        "load_best_model_at_end loads a checkpoint that was evaluated:",
    ),
    (
        "train={load_best_model_at_end: on, eval_strategy: steps, eval_steps: 4, save_strategy: steps, save_steps: 6}",
        "load_best_model_at_end needs a multiple of the 4 steps",
    ),
    ("train.report_to=wandb", "not installed here: pip install wandb"),
    ("train.report_to=tensorboard", "not installed here: pip install tensorboard"),
    ("train.report_to=[wandb, mlflow]", "not installed here: pip install wandb"),
    ("train.report_to=tensorbord", "Did you mean 'tensorboard'?"),
    ("train.deepspeed=ds.json", "no such file"),
    ("train.deepspeed={zero_optimization: {stage: 2}}", "not installed here: pip install deepspeed"),
    ("train.use_liger_kernel=true", "not installed here: pip install liger-kernel"),
    ("train.fsdp=full_shard", "shards over several processes, and this is one: torchrun"),
    ("train.fsdp_config=missing.json", "no such file"),
    ("train={bf16: true, fp16: true}", "train.bf16 is set too; keep one of them"),
    ("train.dataloader_num_workers=-1", "must be a whole number, at least 0"),
    ("train.label_smoothing_factor=1.5", "must be at least 0 and below 1"),
    ("train.adam_beta1=1.5", "must be at least 0 and below 1"),
    ("train.adam_epsilon=-1", "must be a number above 0"),
    ("train.dataloader_persistent_workers=true", "there are none: set train.dataloader_num_workers"),
    (
        "train={dataloader_drop_last: true, per_device_train_batch_size: 30}",
        "leaves nothing of 24 training rows in batches",
    ),
    ("train.accelerator_config=missing.json", "no such file"),
    ("train.log_level=loud", "must be one of debug, info,"),
    ("train.lr_scheduler_type=cosine_with_min_lr", "One of min_lr or min_lr_rate should be set"),
    ("train.lr_scheduler_type=warmup_stable_decay", "missing 1 required positional argument: 'num_decay_steps'"),
    ("train.lr_scheduler_kwargs={min_lr: 1e-5}", "got an unexpected keyword argument 'min_lr'"),
    ("train.hub_strategy=sometimes", "must be one of end, every_save, checkpoint, all_checkpoints."),
    ("train.push_to_hub=true", "Cannot reach https://huggingface.co/api/repos/create: offline"),
    ("train.torch_dtype=bfloat16", "Did you mean 'model.dtype'?"),
    ("train.resume_from_checkpoint=x", "Trimtab sets this; give --resume, on the command line"),
    ("train.bf16=yess", "must be true or false"),
    ("train=fast", "must be keys and values"),
    ("train.gradient_checkpointing=ja", "must be true or false"),
    ("adapter.r=0", "must be at least 1"),
    ("adapter.r=-1", "must be at least 1"),
    ("adapter.r=1.5", "must be an integer, got a number with a fractional part"),
    ("adapter.r=eight", "must be an integer"),
    ("adapter.alpha=0", "must be greater than 0"),
    ("adapter.dropout=1.5", "must be less than 1"),
    ("adapter.dropout=-0.1", "must be at least 0"),
    ("adapter.target_modules=[]", "names nothing; leave it out for PEFT's own choice"),
    ("adapter.target_modules=[q_proj, v_proj]", "no linear named 'q_proj' in this model. It has query, key,"),
    ("adapter.target_modules=all_linear", "no linear matches 'all_linear' as a regex for the whole name."),
    ('adapter.target_modules="*"', "not a regex (nothing to repeat at position 0); names go into"),
    ('adapter.target_modules="("', "not a regex (missing ), unterminated subpattern at position"),
    ("adapter.target_modules=query", "As names they go into a list: [query]"),
    ('adapter.target_modules="query, value"', "As names they go into a list: [query, value]"),
    ("adapter.target_modules=[all-linear]", "'all-linear' stands alone, not in a list"),
    ("base_rows=none", "base_rows='none': must be an integer or 'all'"),
    ("data.missing=[-1, null]", "must be a string"),
    ("adapter.init=pisa", "Did you mean 'pissa'?"),
    ("adapter.type=LoRA", "Did you mean 'lora'?"),
    ("adapter.type=qlora", "Did you mean lora, with model.quantization: {load_in_4bit:"),
    ("adapter.type=dora", "Did you mean lora, with adapter.use_dora: true?"),
    ("adapter.modules_to_save=[classifer]", "Did you mean 'classifier'?"),
    ("adapter.init=corda", "needs PEFT's preprocess_corda"),
    ("adapter.init=pissa_niter_x", "must be one of gaussian, eva, olora, pissa,"),
    ("adapter.rank_pattern={qury: 8}", "no module that is adapted is called so. Did you mean 'query'?"),
    ("adapter.rank_pattern={key: 8}", "no module that is adapted is called so."),
    ("adapter.alpha_pattern={layer.7.attention.self.query: 8}", "no module that is adapted is called so."),
    ("adapter.rank_pattern={query: 2.5}", "a whole number above 0"),
    ("adapter.rank_pattern={query: '8'}", "a whole number above 0"),
    ("adapter.alpha_pattern={query: 0}", "a number above 0"),
    ("adapter.rank_pattern=[query]", "names of modules, each with its own: {q_proj: 4}"),
    ('adapter.rank_pattern={"(": 8}', "neither a name nor a regex"),
    ("adapter.trainable_token_indices=[500]", "ids of tokens, from 0 to 31"),
    ("adapter.bias=al", "Did you mean 'all'?"),
    ("adapter.use_rslora=maybe", "must be true or false"),
    ("adapter.use_dora=true rank={method: adalora, target_r: 2}", "does not go together with rank; drop one of them"),
    ("adapter=[]", "must hold keys and values"),
    ("where.ratio=50%", "must be above 0 and at most 1 (0.5 adapts half of the layers)"),
    ("where.ratio=50", "must be above 0 and at most 1 (0.5 adapts half of the layers)"),
    ("where.ratio=-1", "must be above 0 and at most 1 (0.5 adapts half of the layers)"),
    ("where.ratio=half", "must be above 0 and at most 1 (0.5 adapts half of the layers)"),
    ("where.count=0", "must be at least 1"),
    ("where.count=99", "a whole number from 1 to 2, the number of layers"),
    ('where={method: mask, mask: "012"}', "3 characters, but encoder.layer has 2 layers"),
    ('where={method: mask, mask: "1"}', "1 characters, but encoder.layer has 2 layers"),
    ('where={method: mask, mask: "0000"}', "4 characters, but encoder.layer has 2 layers"),
    ("where.samples=0", "must be at least 2 or 'all'"),
    ("where.samples=many", "must be an integer or 'all'"),
    ("where.estimator=foo", "must be one of biased, unbiased."),
    ("where.pool=max", "must be one of auto, cls, last, mean."),
    ("where.exclude=[99]", "a layer index from 0 to 1"),
    ("where.seed=x", "must be an integer"),
    ("where.seed=-1", "must be at least 0"),
    ("where.batch_size=0", "must be at least 1"),
    ("rank=salientlora", "needed by salientlora"),
    ("rank={method: adalora, target_r: 99}", "at most the initial rank, 4 on average; the budget only"),
    ("rank={method: adalora, target_r: 0}", "a number above 0"),
    ("rank={method: adalora, target_r: two}", "a number above 0"),
    ("rank=lora", "Did you mean 'sora'?"),
    (
        "rank={method: adalora, target_r: 2, warmup: 0.9, final: 0.9}",
        "warmup 2 + final 2 = 4 steps leave nothing of the run's 3 to",
    ),
    (
        "rank={method: adalora, target_r: 2, warmup: 1000}",
        "warmup 1000 + final 1 = 1001 steps leave nothing of the run's",
    ),
    ("rank={method: adalora, target_r: 2, warmup: -1}", "at least 0 steps"),
    ("rank={method: salientlora, target_r: 2, gama: 2}", "Did you mean 'gamma'?"),
    ("freeze=at", "needed by at"),
    ("freeze={method: aflora, warmup: 1000ep}", "warm-up 3000 + final 0 steps leave none of the run's 3 to"),
    ("freeze=aflor", "Did you mean 'aflora'?"),
    ("freeze={method: aflora, interval_steps: 0}", "a whole number, at least 1"),
    ("budget.final_params=0", "must be at least 1"),
    ("budget.final_params=10", "this recipe needs 512; lower adapter.r or where.ratio, or set"),
    ("budget.params=1", "Did you mean 'budget.final_params'?"),
    ("rates.C=1", "no such role; there are A, B, vectors, head."),
    ("rates.B=-1", "must be a finite number above 0: a multiple of the learning"),
    ("rates.B=fast", "must be a finite number above 0: a multiple of the learning"),
    ("export.format=onnx", "must be one of peft, merged, padded, gguf."),
    ("export=ggml", "must be one of peft, merged, padded, gguf."),
    ("export=gguf", "bert models are not among llama, mistral,"),
    ("task=glue", "Did you mean 'glue/rte'"),
    ("task=mrpc", "Did you mean 'glue/mrpc'"),
    ("task=classification", "Did you mean 'text_classification'"),
    ("task.name=", "must be a string"),
    ("task.text=txt", "Did you mean 'text'"),
    ("task.label=labels", "Did you mean 'label'"),
    ("task.max_length=0", "a whole number of tokens, at least 2"),
    ("task.max_length=-5", "a whole number of tokens, at least 2"),
    ("task.max_length=long", "a whole number of tokens, at least 2"),
    ("task.max_length=1000000", "at most 64, the positions that this model has"),
    ("task.labels=[a]", "a list of at least two different class names"),
    ("task.metric=acc", "no such score here. There is accuracy, f1_macro,"),
    ("task.metric=f1", "no such score here. There is accuracy, f1_macro,"),
    ("task.regression=true", "row 1 has label 'neg', not a finite number (task.regression)"),
    ("model=bert-base-uncased", "no such folder, and not in the hub's local cache; the hub"),
    ("model=", "must hold keys and values"),
    ("model.dtype=fp16", "Did you mean 'float16'?"),
    ("model.dtype=int8", "must be one of float32, bfloat16, float16."),
    ("model.tokenizer=./none", "no such folder"),
    ("model.tokenizer=someone/none", "no such folder, and not in the hub's local cache; the hub"),
    ("model.quantization={load_in_3bit: true}", "Did you mean 'load_in_8bit'"),
    ("model.gguf_file=none.gguf", "no such file in '"),
    ("model.config={num_hidden_layer: 2}", "Did you mean 'num_hidden_layers'?"),
    ("model.config={hidden_size: 17}", "The hidden size (17) is not a multiple of the number of"),
    ("model.revision=5", "must be a string"),
    ("model.local_files_only=true", "no such key. Known here: config, dtype, gguf_file,"),
    ("data.train=[]", "a path, or a list of paths"),
    ("data.train=", "give a file with training rows (JSONL, CSV or Parquet)"),
    ("data.train=.", "no train file in this folder (.jsonl, .ndjson, .json, .csv,"),
    ("data.train=none.csv", "Did you mean 'dev.csv'?"),
    ("data.max_samples=0", "a whole number of rows, at least 1"),
    ("data.max_samples=-1", "a whole number of rows, at least 1"),
    ("data.max_samples={trian: 3}", "Did you mean 'train'"),
    ("data.held_out=1.5", "must be a share of the training rows (0.2), or a number of"),
    ("data.held_out=0", "must be a share of the training rows (0.2), or a number of"),
    ("data.held_out_seed=-3", "must be at least 0"),
    ("data.held_out=100000", "leaves none of 24 training rows to learn from"),
    ("foo", "must read key=value, for example where.ratio=0.5"),
    ("=3", "must read key=value, for example where.ratio=0.5"),
    ("where.=3", "must read key=value, for example where.ratio=0.5"),
    ("train.learning_rate: 1e-3", "1e-3': must read key=value, for example where.ratio=0.5"),
    ("adapter.r=[", "not YAML: line 1, column 2: expected the node content, but"),
    ("train.learning_rate.x=3", "'learning_rate' holds 0.001, so nothing can stand below it"),
    ("model.name_or_path=[a]", "must be a string"),
    ("train.1=2", "no such key."),
    ("data.train=data.csv=x", "Did you mean 'data.csv'?"),
]

# A recipe's text, and parts of what is said to it.
RECIPES = [
    ("", "must hold keys and values"),
    ("# model: m\n", "must hold keys and values"),
    ("- model: m\n- task: glue/rte\n", "must hold keys and values"),
    ("hello\n", "must hold keys and values"),
    ("text,label\ngood,1\n", "must hold keys and values"),
    ("import torch\nmodel = 1\n", "must hold keys and values"),
    ("model: m\ntask:\n\tname: glue/rte\n", "line 3, column 1: found character"),
    ('model: "m\ntask: glue/rte\n', "unexpected end of stream"),
    ('{"model": "m", "task": "glue/rte"', "expected ',' or '}'"),
    ("model: m\ntrain: learning_rate: 1\n", "line 2, column 21: mapping values are not allowed here"),
    ("model: m\n---\nmodel: n\n", "found another document"),
    ("model: *m\n", "undefined alias"),
    ("model: m\ntrain: &a {x: *a}\n", "no such key"),
    ("model: !!python/object/apply:os.system ['true']\n", "could not determine a constructor"),
    ("model: m\nseed: 1\nmodel: n\n", "line 3, column 1: 'model' stands twice, in line 1 and here"),
    ("model: m\ntrain:\n  max_steps: 1\n  max_steps: 2\n", "line 4, column 3: 'max_steps' stands twice, in line 3"),
    ("model: m\nadapter: {r: 4, r: 8}\n", "'r' stands twice"),
    ("task: glue/rte\n", "model=None: missing"),
    ("model: model\n", "task.name=None: needed here"),
    ("model: m\ntrain:\nlearning_rate: 1.0e-3\n", "Did you mean 'train.learning_rate'?"),
    ("model: m\n1: x\n", "1='x': no such key"),
    ("model: m\n“task”: glue/rte\n", "Did you mean 'task'?"),
    ("model: [m]\n", "must hold keys and values"),
    ("model: m\ntask: [glue/rte]\n", "must hold keys and values"),
    ("model: m\ndata: train.csv\n", "must hold keys and values"),
    ("model: m\ntrain: [learning_rate]\n", "must be keys and values"),
    ("model: model\nwhere: maybe\n", "must be one of cka, gradient"),
    ("model: m\n".encode("utf-16"), "must be a text file in UTF-8"),
    (bytes(range(256)), "must be a text file in UTF-8"),
]

# A command line, and a part of what is said to it. `run`, `empty` and `new` are folders: finished, empty, not there.
COMMANDS = [
    ("rnu", "Did you mean 'run'?"),
    ("--verion", "Did you mean '--version'?"),
    ("run", "Missing argument 'RECIPE'"),
    ("run none.yaml", "no such file"),
    ("run recipe.yml", "Did you mean 'recipe.yaml'?"),
    ("run a.yaml b.yaml", "no such file"),
    ("run data.csv", "must hold keys and values"),
    ("run model", "no such file"),
    ("run recipe.yaml", "holds a finished run"),
    ("run recipe.yaml --overwrit", "Did you mean '--overwrite'?"),
    ("run recipe.yaml --learning_rate=1e-3", "Keys of the recipe have no dashes: train.learning_rate=1e-3"),
    ("run recipe.yaml train.learning_rate 1e-3", "must read key=value"),
    ("run recipe.yaml --resume --overwrite", "give one of them"),
    ("run recipe.yaml --resume output_dir=new", "recipe.yaml is missing"),
    ("run recipe.yaml --overwrite output_dir=.", "and no run; name a folder that is empty or not there yet"),
    ("plan recipe.yaml --resume", "No such option '--resume'"),
    ("train none.yaml", "no such file"),
    ("select recipe.yaml", "the recipe adapts every layer"),
    ("eval none", "no such file"),
    ("eval empty", "recipe.yaml is missing. Run `trimtab train` first"),
    ("eval recipe.yaml output_dir=new", "no such folder. Run `trimtab train recipe.yaml` first"),
    ("eval empty --harness lm-evl --tasks x", "Did you mean 'lm-eval'?"),
    ("eval empty --tasks gsm8k", "--tasks is for one of lm-eval, lmms-eval"),
    ("eval empty --harness lm-eval", "for example --tasks gsm8k"),
    ("export empty", "recipe.yaml is missing"),
    ("export empty --format onnx", "'onnx' is not one of"),
    ("export empty --out", "requires an argument"),
    ("report none", "no such file"),
    ("report empty", "is it a run's output_dir?"),
    ("compare", "Missing argument 'RUN...'"),
    ("compare none", "no such folder"),
    ("compare empty", "is it a run's output_dir?"),
    ("predict empty data.csv", "recipe.yaml is missing"),
    ("tune recipe.yaml", "nothing to choose from"),
    ("tune recipe.yaml seed=0,1", "nothing to choose from"),
    ("tune recipe.yaml train.lr=1e-3,1e-4", "Did you mean 'train.learning_rate'?"),
    ("tune recipe.yaml train.learning_rate=1e-3,1e-3", "holds 0.001 twice"),
    ("tune recipe.yaml train.learning_rate=1e-3,", "has an empty value between its commas"),
    ("tune recipe.yaml output_dir=a,b", "every trial has a folder of its own"),
    ("tune recipe.yaml adapter.r=4,8 --jobs 0", "0 is not in the range"),
    ("methods rnak", "Did you mean 'rank'?"),
    ("bench speed recipe.yaml", "'speed' is not 'latency'"),
    ("bench latency recipe.yaml --batch 0", "0 is not in the range"),
    ("bench latency recipe.yaml --device gpu", "cannot be used here; cpu can"),
    ("demo --out data.csv", "is a file"),
]

# What a data file holds, its ending, and a part of what is said to it.
FILES = [
    ("", "csv", "holds no rows"),
    ("text,label\n", "csv", "holds no rows"),
    ("text;label\n", "csv", "holds no rows"),
    ("text,class\ngood,1\nbad,0\n", "csv", "no column 'label'"),
    ("text,text,label\na,b,1\nc,d,0\n", "csv", "appears twice"),
    ("text,label\ngood,1\nbad,0,0\n", "csv", "line 3 has 3 fields"),
    ("text,label\ngood,1\nfine,1\n", "csv", "label"),
    ('{"text": "good", "label": 1}\n{"text": "bad"\n', "jsonl", "line 2"),
    ('"good"\n"bad"\n', "jsonl", "line 1"),
    ("not a table", "parquet", "Parquet"),
    ("a good one", "docx", "cannot tell its format"),
    (b"text,label\n\xff\xfe\x00bad,1\n", "csv", "data.train"),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    tiny_model(folder / "model", layers=2)
    rows = [f"{' '.join(WORDS[i % 5 : i % 5 + 5])},{'pos' if i % 2 else 'neg'}\n" for i in range(24)]
    for name in ("data.csv", "dev.csv"):
        (folder / name).write_text("text,label\n" + "".join(rows))
    recipe = {
        "model": str(folder / "model"),
        "task": {"name": "text_classification", "text": "text", "label": "label", "max_length": 16},
        "data": {"train": "data.csv", "validation": "dev.csv"},
        "adapter": {"r": 4, "target_modules": ["query", "value"]},
        "train": {"num_train_epochs": 1, "learning_rate": 1e-3, "use_cpu": True},
        "output_dir": "run",
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    (folder / "empty").mkdir()
    (folder / "run" / "adapter").mkdir(parents=True)
    for name in ("metrics.json", "recipe.yaml", "plan.json", "adapter/adapter_model.safetensors"):
        (folder / "run" / name).write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def alone(place, monkeypatch):
    """Without a network, and without packages that a machine may have."""
    monkeypatch.chdir(place)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    absent = ("wandb", "mlflow", "tensorboard", "tensorboardX", "deepspeed", "liger_kernel")
    there = trainer_settings._is_there
    monkeypatch.setattr(trainer_settings, "_is_there", lambda package: package not in absent and there(package))


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def refused(*args):
    """The lines of a command that refuses: exit code 2, no traceback, every file as it was."""
    before = contents(Path())
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert contents(Path()) == before
    errors = [line.removeprefix("error: ") for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.stderr.splitlines()[-len(errors) :] == [f"error: {line}" for line in errors]
    return errors


@pytest.mark.parametrize("setting, says", SETTINGS)
def test_a_wrong_setting_is_one_line(setting, says):
    [message] = refused("run", "recipe.yaml", *_overrides(setting), "--overwrite")
    assert says in message
    assert not message.startswith("train={")


def _overrides(setting):
    """A setting may be two: of these only one may hold spaces."""
    first, _, second = setting.partition(" rank=")
    return [first, f"rank={second}"] if second else [setting]


@pytest.mark.parametrize("text, says", RECIPES)
def test_a_wrong_recipe_is_one_line(tmp_path, text, says):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    [message] = refused("run", file, "output_dir=run", "--overwrite")
    assert says in message


@pytest.mark.parametrize("command, says", COMMANDS)
def test_a_wrong_command_is_one_line(command, says):
    [message] = refused(*shlex.split(command))
    assert says in message


@pytest.mark.parametrize("content, ending, says", FILES)
def test_a_wrong_data_file_is_one_line(tmp_path, content, ending, says):
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    [message] = refused("run", "recipe.yaml", f"data.train={file}", "--overwrite")
    assert says in message


AXOLOTL = """\
base_model: NousResearch/Llama-2-7b-hf
load_in_8bit: true
datasets:
  - path: mhenrichsen/alpaca_2k_test
    type: alpaca
val_set_size: 0.05
output_dir: run
sequence_len: 4096
sample_packing: true
adapter: lora
lora_r: 32
lora_target_linear: true
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
learning_rate: 0.0002
train_on_inputs: false
warmup_steps: 10
"""
LLAMA_FACTORY = """\
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
output_dir: run
plot_loss: true
overwrite_output_dir: true
per_device_train_batch_size: 1
num_train_epochs: 3.0
"""


@pytest.mark.parametrize("text, own, told", [
    (AXOLOTL, {"output_dir", "adapter"}, {
        "base_model": "model.name_or_path", "lora_r": "adapter.r",
        "micro_batch_size": "train.per_device_train_batch_size",
        "lora_target_linear": "adapter.target_modules: all-linear", "sample_packing": "leave it out",
        "datasets": "data.train", "val_set_size": "data.validation_share", "warmup_steps": "train.warmup_steps",
    }),
    (LLAMA_FACTORY, {"output_dir"}, {
        "model_name_or_path": "model.name_or_path", "lora_rank": "adapter.r", "cutoff_len": "task.max_length",
        "template": "leave it out", "overwrite_output_dir": "--overwrite", "num_train_epochs": "train.num_train_epochs",
    }),
])  # fmt: skip
def test_a_recipe_of_another_tool_has_all_its_keys_named_with_ours(tmp_path, text, own, told):
    (tmp_path / "theirs.yaml").write_text(text)
    lines = {line.partition("=")[0]: line for line in refused("run", tmp_path / "theirs.yaml")}
    assert lines.keys() == {line.partition(":")[0] for line in text.splitlines() if line[0] != " "} - own
    for key, ours in told.items():
        assert ours in lines[key]


@pytest.mark.parametrize("word", ["no", "off", "false", "'no'"])
def test_a_bare_no_is_a_strategy(word):
    settings = f"train={{eval_strategy: {word}, save_strategy: {word}, report_to: {word}, learning_rate: 1e-3}}"
    result = CliRunner().invoke(cli, ["plan", "recipe.yaml", settings, "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["settings"]["recipe"]["train"]["eval_strategy"] == "no"


def test_the_bare_command_shows_its_help():
    result = CliRunner().invoke(cli, [])
    assert result.exit_code == 0
    assert "Commands:" in result.stdout
    assert result.stderr == ""


def test_the_hub_out_of_reach_is_one_line_at_once(place, monkeypatch):
    """No listener on a port of this machine: as without a network, and without its retries."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    before = os.times().elapsed
    for setting in ("model=nobody/nothing", "model.tokenizer=nobody/nothing"):
        [message] = refused("run", "recipe.yaml", setting, "--overwrite")
        assert "the hub cannot be reached from here" in message
    assert os.times().elapsed - before < 15
    assert constants.HF_HUB_OFFLINE is False


def test_there_are_enough_of_them():
    assert len(SETTINGS) + len(RECIPES) + len(COMMANDS) + len(FILES) >= 150
