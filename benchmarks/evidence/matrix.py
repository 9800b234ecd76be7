"""What is run: tasks, rows, rates, seeds, and in which order. Nothing heavy is imported here."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SEEDS = (0, 1, 2)
RATES = ("5e-4", "1e-3", "2e-3")
"""Learning rates that are tried for every row of every task."""
TUNING_SEEDS = (0, 1)
"""A rate is chosen by its mean over these: one short run alone chose a rate at which a full run learned nothing."""
BASES = Path(__file__).parents[2] / "build" / "evidence"
"""Models that tasks begin with, where it is not the encoder as it comes; made when the first run needs one."""
UNTUNED = "untuned"
"""Stands for a task's own rate, at which a user swaps one method for another without tuning anything."""


@dataclass(frozen=True)
class Task:
    """A data set, and how long a run on it is."""

    name: str
    title: str
    rows: int
    """Training rows of a run: the same ones for every row and seed, drawn from the file."""
    epochs: int
    tuning_rows: int
    """Rows of a short tuning run, drawn from the file; a fifth of them is held out and scored."""
    settings: tuple[str, ...] = ()
    """Overrides of the recipe."""
    rate: str = "1e-3"
    """At which methods are swapped without tuning. Half of that for pairs of sentences, where LoRA learns nothing at
    1e-3 with some seeds."""
    swapped: tuple[str, ...] = ()
    """Rows that are also run at `rate`, over all seeds, whatever tuning says."""
    tuned: tuple[str, ...] = ()
    """Rows that are tuned and compared here."""
    held_back: int = 0
    """Training rows beyond `rows` that nothing learns, scored after whole runs: these choose the rate then. Short ones
    choose rates that whole runs do not bear, and the other way round."""
    base: str = ""
    """Data set on which all of the encoder is tuned first, as LoRA's paper does for pairs of sentences."""
    folder: str = ""
    """Of the data and of the task in GLUE, where the name is another."""
    glue: str = ""
    """Task in GLUE, where its folder has another name."""
    splits: tuple[str, str] = ("train", "validation")
    """Files to learn from and to score on; the second is empty where there is one file for both."""
    scored: int | None = None
    """Rows that are scored, drawn from their file; all of them without it."""
    recipe: str = "minilm.yaml"
    held_out: float | None = None
    """Share of the rows that is scored, where there is no file of others."""
    is_variant: bool = False
    """Another task of this list at another length, draw or scale: not counted where tasks are pooled."""
    samples: int = 1024
    """Rows by which layers are chosen."""

    def overrides(self, data: Path) -> list[str]:
        folder = self.folder or self.name
        files = [f"data.{split}={data / folder / f'{file}.jsonl'}"
                 for split, file in zip(("train", "validation"), self.splits) if file]  # fmt: skip
        if self.held_out:
            files.append(f"data.held_out={self.held_out}")
        if self.is_decoder:
            return [*files, *self.settings]
        name, epochs = f"task.name=glue/{self.glue or folder}", f"train.num_train_epochs={self.epochs}"
        base = [f"model={BASES / self.base}"] if self.base else []
        return [*base, name, *files, epochs, *self.settings]

    @property
    def is_decoder(self) -> bool:
        """Whether the loss on answers is the score."""
        return self.recipe != "minilm.yaml"


@dataclass(frozen=True)
class Row:
    """One way of adapting the model."""

    name: str
    title: str
    overrides: tuple[str, ...] = ()
    core: bool = True
    """Core rows are run first."""
    kind: str = ""
    """``full`` or ``peft_adalora``: what no recipe says; see `single`."""
    rate_factor: float = 1
    """What the tried rates are multiplied by: full fine-tuning and VeRA live in another range than LoRA."""
    note: str = ""


@dataclass(frozen=True)
class Run:
    """One training run, which is one JSON file."""

    task: Task
    row: Row
    rate: str
    """As tried: times the row's `rate_factor` it is the learning rate."""
    seed: int = 0
    tuning: bool = False

    @property
    def name(self) -> str:
        return f"{'tuning-' if self.tuning else ''}{self.rate}-seed{self.seed}"

    @property
    def file(self) -> Path:
        """Below the folder of results."""
        return Path(self.task.name, self.row.name, f"{self.name}.json")

    def overrides(self, data: Path, held_back: bool = False) -> list[str]:
        """Of the recipe. With ``held_back`` what is scored is those rows."""
        task, others = self.task, self.task.held_back
        if not task.splits[1]:
            others += task.scored or 0
        limits = f"train: {task.tuning_rows if self.tuning else task.rows + others}"
        if task.scored and task.splits[1]:
            limits += f", validation: {task.scored}"
        rows = [f"data.max_samples={{{limits}}}"]
        held_out = ["data.held_out=0.2"] if self.tuning else []
        if held_back:
            held_out = [f"data.held_out={others}"]
        rate = float(self.rate) * self.row.rate_factor
        ends = [f"train.learning_rate={rate:g}", f"seed={self.seed}"]
        steps = (0.8 * self.task.tuning_rows if self.tuning else self.task.rows) * self.task.epochs / 16
        known = {"SAMPLES": str(self.task.samples), "GONE": f"{1.5 / steps:.1e}"}
        row = [re.sub("|".join(known), lambda found: known[found[0]], text) for text in self.row.overrides]
        return [*self.task.overrides(data), *rows, *held_out, *row, *ends]


# At LoRA's own rate: the first ones answer whether a method can be swapped in, the others what its parts do.
FIRST = ("lora-r8", "salientlora-late", "adalora", "cka-salientlora-late", "composition-latest")
EARLIER = ("salientlora", "cka-salientlora", "composition-late")  # by default until it was seen to cost
# Where fewer layers take larger steps; the rate is what they are about, so that it is not tuned.
FASTER = (*(f"{name}-{step}" for name in ("cka-lora", "cka-salientlora", "composition") for step in ("root", "twice")),
          "composition-root-vectors")  # fmt: skip
PRUNING_EARLY = ("lora-r8", *EARLIER, "adalora")
SWAPPED = (*FIRST, *EARLIER, "cka-lora", "random-lora", "lora-r4", "budget", "uniform-lora", "lora-r2",
           "aflora", "aflora-late",
           "composition", "peft-adalora", "sora", "gradient-lora", "fisher-lora", "influence-lora",
           "grades", "influence-salientlora", "influence-composition", "aflora-vectors",
           "aflora-late-vectors", "influence-composition-vectors", "eva", "gora", *FASTER)  # fmt: skip
STEADY = (*FIRST, "cka-lora", "uniform-lora", "lora-r4", "lora-r2")  # with a longer warm-up
# What is tuned on every task: what a user chooses between, each part of the composition, and each paper's rivals.
TUNED = (*FIRST, "cka-lora", "lora-r4", "lora-r2", "aflora-late", "uniform-lora", "random-lora", "full", "dora",
         "pissa", "vera", "houlsby", "peft-adalora", "peft-adalora-scaled", "salientlora-svd", "salientlora-released",
         "cka-aflora", "budget-late", "sora")  # fmt: skip
# Tuned, too, when these were the defaults or a question.
TUNED_BEFORE = (*EARLIER, "composition", "grades", "eva", "gora", "gradient-lora", "fisher-lora", "influence-lora")
# On a decoder, at equal steps, by what each part of the composition brings.
DECODER = ("lora-r8", "cka-lora", "salientlora-late", "composition-latest", "salientlora", "composition",
           "composition-late", "influence-lora",
           "influence-composition-vectors", "aflora", "aflora-late", "aflora-late-vectors",
           "lora-r2", "uniform-lora")  # fmt: skip

LONGER = ("lora-r8", "cka-lora", "cka-salientlora-late", "composition-latest", "lora-r2")  # is it for want of steps?
AFTER = ("train.warmup_steps=0.2",)  # as `trimtab init` writes it
TASKS = {
    task.name: task
    for task in (
        Task("sst2", "SST-2", 6000, 1, 2400, swapped=SWAPPED, tuned=(*TUNED, "sora-gone", *TUNED_BEFORE)),
        Task("stsb-after", "STS-B after SNLI", 2000, 1, 0, AFTER, tuned=(*TUNED, "last-lora"),
             held_back=500, base="snli", folder="stsb"),
        Task("rte-after", "RTE after SNLI", 900, 1, 0, AFTER, tuned=(*TUNED, "last-lora"),
             held_back=300, base="snli", folder="rte"),
        Task("qnli-after", "QNLI after SNLI", 900, 1, 0, AFTER, tuned=(*TUNED, "last-lora"),
             held_back=300, base="snli", folder="qnli", splits=("validation", ""), scored=700, samples=512),
        Task("rte-whole", "RTE after SNLI, all of its rows", 2490, 1, 0, AFTER, swapped=LONGER, base="snli",
             folder="rte"),
        Task("stsb", "STS-B", 3000, 2, 0, rate="5e-4",
             swapped=("lora-r8", "salientlora", "composition", "aflora", "aflora-late",
                      "influence-composition-vectors")),
        Task("stsb-long", "STS-B, three epochs", 5749, 3, 0, rate="5e-4", swapped=("lora-r8",), folder="stsb",
             is_variant=True),
        Task("mrpc", "MRPC", 3668, 2, 0, rate="5e-4", swapped=("lora-r8", "adalora", "salientlora")),
        Task("cola", "CoLA", 6000, 3, 0, swapped=("lora-r8",)),
        Task("snli-two", "SNLI", 6000, 2, 3600, rate="5e-4", folder="snli", glue="mnli",
             tuned=("lora-r8", "salientlora-late", "composition-latest", "adalora", "lora-r4", "cka-lora"),
             swapped=(*FIRST, *EARLIER, "cka-lora", "uniform-lora", "lora-r4", "lora-r2", "cka-lora-root",
                      "cka-salientlora-root", "composition-root", "cka-lora-twice"),
             splits=("validation", "test"), scored=1500),
        Task("qnli", "QNLI", 5463, 3, 0, rate="5e-4", splits=("validation", ""), held_out=0.2,
             swapped=(*FIRST, *EARLIER, "cka-lora", "uniform-lora", "lora-r4", "lora-r2")),
        Task("snli", "SNLI, one epoch", 6000, 1, 0, swapped=(*FIRST, *EARLIER, "lora-r4"),
             glue="mnli", splits=("validation", "test"), scored=1500, is_variant=True),
        Task("snli-long", "SNLI, three epochs", 6000, 3, 0, swapped=PRUNING_EARLY, folder="snli",
             glue="mnli", splits=("validation", "test"), scored=1500, is_variant=True),
        Task("sst2-first", "SST-2, the file's first rows", 6000, 1, 0, ("data.sample_seed=first",),
             swapped=(*PRUNING_EARLY, "composition"), folder="sst2", is_variant=True),
        Task("sst2-double", "SST-2, twice the scale", 6000, 1, 0, ("adapter.alpha=32",),
             swapped=("lora-r8", "cka-lora", "uniform-lora", "cka-salientlora", "composition-late"),
             folder="sst2", is_variant=True),
        Task("sst2-fifth", "SST-2, a fifth of it warm-up", 6000, 1, 0, ("train.warmup_steps=0.2",), swapped=FIRST,
             folder="sst2", is_variant=True),
        Task("sst2-tenth", "SST-2, a tenth of it warm-up", 6000, 1, 0, ("train.warmup_steps=0.1",),
             swapped=STEADY, folder="sst2", is_variant=True),
        Task("snli-tenth", "SNLI, a tenth of it warm-up", 6000, 2, 0, ("train.warmup_steps=0.1",),
             swapped=("lora-r8",), folder="snli", glue="mnli", splits=("validation", "test"), scored=1500,
             is_variant=True),
        Task("snli-fifth", "SNLI, a fifth of it warm-up", 6000, 2, 0, ("train.warmup_steps=0.2",), swapped=STEADY,
             folder="snli", glue="mnli", splits=("validation", "test"), scored=1500, is_variant=True),
        Task("code", "SmolLM2, Code Alpaca", 750, 1, 0, swapped=DECODER, folder="code_alpaca",
             recipe="smollm2.yaml", splits=("train", ""), held_out=0.2, samples=128),
    )
}  # fmt: skip

CKA = "where={method: cka, ratio: 0.5, samples: SAMPLES}"  # the task says how many
INFLUENCE = "where={method: influence, ratio: 0.5, samples: SAMPLES}"
EARLY = "freeze={method: aflora, warmup: 0.3, final: 0.3}"  # the default until it was seen on two tasks
LATE = "freeze={method: aflora, warmup: 0.5, final: 0.1}"
VECTORS = "rates={vectors: 10}"
SALIENT = "rank={method: salientlora, target_r: 4, warmup: 0.1, allocation: 0.5}"
PRUNING_LATE = "rank={method: salientlora, target_r: 4, warmup: 0.3, allocation: 0.5}"
QUARTER = 82_944  # of LoRA r 8's parameters, 331,776

ROWS = {
    row.name: row
    for row in (
        Row("lora-r8", "LoRA r 8"),
        Row("salientlora", "SalientLoRA 8→4, pruning early", (SALIENT,), note="from 0.1 of the run on, not 0.3"),
        Row("salientlora-late", "SalientLoRA 8→4", (PRUNING_LATE,)),
        Row("cka-salientlora-late", "CKA half × SalientLoRA 8→4", (CKA, PRUNING_LATE)),
        Row("composition-latest", "CKA half × SalientLoRA 8→4 × AFLoRA", (CKA, PRUNING_LATE, LATE)),
        Row("adalora", "AdaLoRA 8→4", ("rank={method: adalora, target_r: 4}",)),
        Row("cka-salientlora", "CKA half × SalientLoRA 8→4, pruning early", (CKA, SALIENT)),
        Row("composition", "CKA half × SalientLoRA 8→4 × AFLoRA, pruning and freezing early", (CKA, SALIENT, EARLY),
            note="phases of 0.3 and 0.3"),
        Row("lora-r4", "LoRA r 4", ("adapter.r=4", "adapter.alpha=8")),
        Row("cka-lora", "CKA half × LoRA r 8", (CKA,)),
        Row("random-lora", "random half × LoRA r 8", ("where={method: random, ratio: 0.5}",),
            note="which half follows the seed"),
        Row("uniform-lora", "uniform half × LoRA r 8", ("where={method: uniform, ratio: 0.5}",)),
        Row("lora-r2", "LoRA r 2", ("adapter.r=2", "adapter.alpha=4"), note="holds what the composition holds"),
        Row("aflora", "AFLoRA r 8, freezing early", (EARLY,), note="phases of 0.3 and 0.3"),
        Row("aflora-late", "AFLoRA r 8", (LATE,)),
        Row("composition-late", "CKA half × SalientLoRA 8→4 × AFLoRA, pruning early", (CKA, SALIENT, LATE)),
        Row("influence-salientlora", "influence half × SalientLoRA 8→4, pruning early", (INFLUENCE, SALIENT)),
        Row("influence-composition", "influence half × SalientLoRA 8→4 × AFLoRA, pruning early",
            (INFLUENCE, SALIENT, LATE), note="the composition with another half"),
        Row("aflora-vectors", "AFLoRA r 8, freezing early, faster vectors", (EARLY, VECTORS),
            note="the vectors e and b at ten times the rate"),
        Row("aflora-late-vectors", "AFLoRA r 8, faster vectors", (LATE, VECTORS)),
        Row("influence-composition-vectors", "influence half × SalientLoRA 8→4 × AFLoRA, pruning early, faster vectors",
            (INFLUENCE, SALIENT, LATE, VECTORS),
            note="the one above, with vectors at ten times the rate"),
        Row("grades", "GradES r 8", ("freeze=grades",)),
        Row("budget", "the composition under one budget, pruning and freezing early",
            ("where={method: cka, samples: SAMPLES}", "rank={method: salientlora, warmup: 0.1}",
             "freeze={method: aflora, warmup: 0.3, final: 0.3, rule: tensor_rank}",
             f"budget={{average_params: {QUARTER}}}"),
            note="on average a quarter of LoRA r 8's parameters; layers, ranks and freezing follow; pruning and "
                 "freezing early"),
        Row("budget-late", "the composition under one budget",
            ("where={method: cka, samples: SAMPLES}", "rank=salientlora", "freeze={method: aflora, rule: tensor_rank}",
             f"budget={{average_params: {QUARTER}}}"),
            note="on average a quarter of LoRA r 8's parameters; layers, ranks and freezing follow"),
        Row("peft-adalora", "PEFT's AdaLoRA at its defaults", kind="peft_adalora",
            note="r 12 → 8, alpha 8, its own start; rates as for the rest"),
        Row("sora", "SoRA from r 8", ("rank={method: sora, prox_threshold: 2e-3}",),
            note="its threshold decides the size; on SST-2, with 375 steps, this one brings no gate to zero"),
        Row("sora-gone", "SoRA from r 8, gates gone early", ("rank={method: sora, prox_threshold: GONE}",),
            note="a threshold that brings a gate to zero in two thirds of the run; it is above the rate, so that none "
                 "withstands it"),
        Row("eva", "EVA, LoRA r 8 in total", ("rank=eva",), note="ranks and A from 1,024 training rows"),
        Row("gora", "GoRA at the cost of LoRA r 8", ("rank=gora",), note="ranks and B from 1,024 training rows"),
        *(Row(f"{name}-lora", f"{name} half × LoRA r 8", (f"where={{method: {name}, ratio: 0.5, samples: SAMPLES}}",))
          for name in ("gradient", "fisher", "influence")),
        Row("last-lora", "last half × LoRA r 8", ("where={method: last, ratio: 0.5}",)),
        *(Row(f"{name}-{step}", f"{title}, adapters at {times} the rate", (*settings, rates))
          for step, times, multiple in (("root", "√2", 1.414), ("twice", "twice", 2))
          for name, title, settings, rates in (
              ("cka-lora", "CKA half × LoRA r 8", (CKA,), f"rates={{A: {multiple}, B: {multiple}}}"),
              ("cka-salientlora", "CKA half × SalientLoRA 8→4", (CKA, PRUNING_LATE),
               f"rates={{A: {multiple}, B: {multiple}}}"),
              ("composition", "CKA half × SalientLoRA 8→4 × AFLoRA", (CKA, PRUNING_LATE, LATE),
               f"rates={{A: {multiple}, B: {multiple}, vectors: {multiple}}}"))),
        Row("composition-root-vectors", "CKA half × SalientLoRA 8→4 × AFLoRA, adapters at √2 the rate, vectors at ten "
            "times that", (CKA, PRUNING_LATE, LATE, "rates={A: 1.414, B: 1.414, vectors: 14.14}")),
        Row("full", "full fine-tuning", kind="full", rate_factor=0.05, core=False),
        Row("dora", "DoRA r 8", ("adapter.use_dora=true",), core=False),
        Row("pissa", "PiSSA r 8", ("adapter.init=pissa",), core=False),
        Row("vera", "VeRA r 256", ("adapter={type: vera, r: 256}", "adapter.target_modules=[query, key, value, "
            "attention.output.dense, intermediate.dense, output.dense]"), core=False, rate_factor=5),
        Row("houlsby", "Houlsby 32", ("adapter={type: bottleneck, variant: houlsby, bottleneck_size: 32}",),
            core=False),
        Row("salientlora-svd", "SalientLoRA 8→4, the paper's start",
            ("rank={method: salientlora, target_r: 4, start: svd}",), core=False),
        Row("salientlora-released", "SalientLoRA 8→4 as released",
            ("rank={method: salientlora, target_r: 4, start: svd, parity: released}",), core=False),
        Row("peft-adalora-scaled", "PEFT's AdaLoRA 8→4 at a fair scale", kind="peft_adalora_scaled", core=False,
            note="alpha 160, phases as ours"),
        Row("cka-aflora", "CKA half × AFLoRA", (CKA, "freeze=aflora"), core=False),
    )
}  # fmt: skip


def plan(
    tasks: Sequence[str], rows: Sequence[str], seeds: Sequence[int], chosen: dict[tuple[str, str], str | None]
) -> Iterator[Run]:
    """Every run in the order of doing; of rows whose rate is not chosen yet the tuning runs alone.

    Args:
        chosen: rate by (task, row), for those that are tuned.
    """
    chosen_tasks = [TASKS[name] for name in tasks]
    for task in chosen_tasks:
        swapped = [name for name in task.swapped if name in rows]
        yield from (Run(task, ROWS[name], task.rate, seed) for seed in seeds for name in swapped if name in FIRST)
        yield from (Run(task, ROWS[name], task.rate, seed) for name in swapped for seed in seeds)
    for core in (True, False):
        for task in chosen_tasks:
            for row in (ROWS[name] for name in task.tuned if name in rows and ROWS[name].core == core):
                yield from tuning_of(task, row)
                if rate := chosen.get((task.name, row.name)):
                    yield from (Run(task, row, rate, seed) for seed in seeds)


def tuning_of(task: Task, row: Row) -> list[Run]:
    """The runs that choose a row's rate on a task: short ones, or, where rows are held back for it, whole ones."""
    seeds = (0,) if task.held_back else TUNING_SEEDS
    return [Run(task, row, rate, seed, tuning=not task.held_back) for rate in RATES for seed in seeds]
