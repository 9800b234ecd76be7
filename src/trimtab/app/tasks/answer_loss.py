"""Loss and accuracy of written answers, from what is kept of each batch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def answer_sums(logits: torch.Tensor, labels: torch.Tensor, shifted: bool) -> torch.Tensor:
    """What is kept of a batch for `answer_scores`: for each row (−Σ log p, tokens, tokens predicted right).

    Args:
        logits: (rows, tokens, vocabulary).
        labels: (rows, tokens), -100 where nothing is learned.
        shifted: position t predicts token t + 1 (decoders), not its own label (encoder-decoders).
    Returns:
        (rows, 3), float32.
    """
    import torch

    logits = logits[:, -labels.shape[1] :]  # prompt tuning puts tokens of its own in front
    if shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != -100
    chosen, right = logits[counts].float(), labels[counts]  # (answer tokens, vocabulary), (answer tokens,)
    row = counts.nonzero()[:, 0]
    each = torch.stack(
        [
            torch.nn.functional.cross_entropy(chosen, right, reduction="none"),
            torch.ones_like(row, dtype=torch.float32),
            (chosen.argmax(-1) == right).float(),
        ],
        dim=1,
    )
    return torch.zeros(len(labels), 3, device=logits.device).index_add_(0, row, each)


def kept_sums(eval_pred: Any) -> np.ndarray:
    return np.asarray(eval_pred[0][0] if isinstance(eval_pred[0], (tuple, list)) else eval_pred[0])


def answer_scores(sums: np.ndarray) -> dict[str, float]:
    """Loss and accuracy over all answer tokens of all rows, each token counting the same.

    Args:
        sums: (rows, 3), from `answer_sums`.

    >>> answer_scores(np.array([[2.0, 4, 3], [1.0, 2, 1]]))["answer_loss"]
    0.5
    """
    loss, tokens, right = np.asarray(sums, np.float64).sum(axis=0)
    mean = float(loss / tokens) if tokens else math.nan
    return {
        "answer_loss": mean,
        "perplexity": math.inf if mean > 700 else math.exp(mean),
        "token_accuracy": float(right / tokens) if tokens else math.nan,
    }
