"""What is decided, among the metrics of whatever the Trainer reports to: TensorBoard, W&B, MLflow, Trackio and others.

The Trainer calls its trackers before any callback of the user's: what is added to its own row of logs comes too late
for them. So they are handed rows of our own, at the same steps and whenever something is decided in between.
"""

from __future__ import annotations

from typing import Any

from transformers import Trainer, TrainerCallback
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from ..host.adapted import callers
from ..plans import Where
from .controller import Event


class Figures:
    """The state of a run in numbers, told from the rows of its history."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.are_new = False

    def see(self, row: Event) -> None:
        """Takes in a row of the history; ranks that are only masked count as gone, as the report counts them."""
        kind = row["event"]
        if kind == "params":
            found = {"trainable_params": row["trainable"]}
            if "total_rank" in row and row["total_rank"] < self.now.get("total_rank", float("inf")):
                found["total_rank"] = row["total_rank"]
        elif kind == "rank":
            found = {"total_rank": sum(row["ranks"].values())}
            if row["kind"] == "prune":
                found["prune_events"] = self.now.get("prune_events", 0) + 1
        elif kind == "freeze":
            found = {"frozen_share": 1.0 - row["trainable_ratio"]}
        else:
            return
        self.are_new = True
        self.now = {"prune_events": 0, "frozen_share": 0.0} | self.now | found


def layer_scores(where: Where | None) -> dict[str, float]:
    """What each layer was chosen by, as metrics: CKA, or another method's measure; empty where there is none.

    >>> layer_scores(Where("cka", {"layers": "01"}, {"stacks": {"layers": {"cka": [None, 0.5]}}}))
    {'layer_score/layers.1': 0.5}
    """
    return {
        f"layer_score/{path}.{i}": float(value)
        for path, values in (where.layer_scores if where is not None else {}).items()
        for i, value in enumerate(values)
        if value is not None
    }


def tell(metrics: dict[str, float], args: Any, state: Any, control: Any, model: Any) -> None:
    """Hands ``metrics`` to the trackers of the Trainer that is calling, as of its present step."""
    kinds = tuple(INTEGRATION_TO_CALLBACK.values())
    for tracker in _callbacks():
        if isinstance(tracker, kinds):
            tracker.on_log(args, state, control, model=model, logs=dict(metrics))


def _callbacks() -> list[TrainerCallback]:
    # No event hands a callback its fellows; what add_callback and remove_callback make of them is the Trainer's own.
    for frame in callers():
        if isinstance(trainer := frame.f_locals.get("self"), Trainer):
            return trainer.callback_handler.callbacks
    return []
