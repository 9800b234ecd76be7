"""What does choosing layers by CKA cost beside the bare forward passes?

python -m benchmarks.selection [--short]
"""

from __future__ import annotations

import torch

import trimtab
from trimtab.where.cka import linear_cka

from .common import MINILM, Row, base_model, batch, main, paired, ratio


def rows(short: bool) -> list[Row]:
    shape = MINILM.cut(6)
    model = base_model(shape).eval()
    data = {k: v for k, v in batch(shape).items() if k != "labels"}
    batches = [data] * (2 if short else 4)
    # Rows of different content, so that no layer is degenerate.
    batches = [{**b, "input_ids": b["input_ids"].roll(i, 1)} for i, b in enumerate(batches)]

    def bare() -> None:
        with torch.no_grad():
            for b in batches:
                model.bert(**b)

    times = paired({"select": lambda: trimtab.layer_similarity(model, batches, pool="cls"), "bare": bare}, 5)
    out = [ratio(times, "select", "bare", 1.10, "MiniLM, 6 blocks: CKA selection / bare forward passes")]
    make = torch.Generator().manual_seed(0)
    x, y = (torch.randn(128, 4096, generator=make, dtype=torch.float64) for _ in range(2))

    def wide() -> torch.Tensor:
        u, v = x - x.mean(0), y - y.mean(0)
        return (u.T @ v).square().sum() / ((u.T @ u).norm() * (v.T @ v).norm())

    assert abs(wide().item() - linear_cka(x, y)) < 1e-9
    times = paired({"ours": lambda: linear_cka(x, y), "d x d": wide}, 3)
    out.append(ratio(times, "ours", "d x d", 0.10, "linear_cka, n=128, d=4096: ours / d x d formula"))
    return out


if __name__ == "__main__":
    main("selection", rows, __doc__)
