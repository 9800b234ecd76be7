"""What the papers claim, as questions of one row against another, each answered by its whole interval."""

from __future__ import annotations

from dataclasses import dataclass

from trimtab.app.report.pairing import Difference

from .matrix import TASKS, UNTUNED
from .results import Results
from .words import interval, table


@dataclass(frozen=True)
class Question:
    """Whether one row is above another, or at most a margin below it, by the whole interval."""

    text: str
    ours: str
    theirs: str
    margin: float = 0.0

    def verdict(self, apart: Difference | None) -> str:
        """
        >>> Question("", "a", "b", .01).verdict(Difference("b", -.002, -.005, .001, 3, None))
        'yes'
        """
        if apart is None:
            return "not run yet"
        if apart.low is None or apart.high is None:
            return "too few runs"
        if apart.low > -self.margin:
            return "yes"
        return "no" if apart.high < -self.margin else "cannot be told"


QUESTIONS = (
    Question("CKA's half above a random half?", "cka-lora", "random-lora"),
    Question("CKA's half above a uniform half?", "cka-lora", "uniform-lora"),
    Question("CKA's half above the last half?", "cka-lora", "last-lora"),
    Question("A half by gradient above CKA's?", "gradient-lora", "cka-lora"),
    Question("A half by Fisher information above CKA's?", "fisher-lora", "cka-lora"),
    Question("A half by block influence above CKA's?", "influence-lora", "cka-lora"),
    Question("CKA's half at most half a point below LoRA r 8?", "cka-lora", "lora-r8", 0.005),
    Question("CKA's half × SalientLoRA at most half a point below LoRA r 8?", "cka-salientlora-late", "lora-r8", 0.005),
    Question("SalientLoRA from LoRA's start above the paper's start?", "salientlora-late", "salientlora-svd"),
    Question("SalientLoRA above itself pruning early?", "salientlora-late", "salientlora"),
    Question("SalientLoRA above AdaLoRA, both 8→4?", "salientlora-late", "adalora"),
    Question("AdaLoRA above LoRA r 4, of as many ranks?", "adalora", "lora-r4"),
    Question("SalientLoRA above LoRA r 4, of as many ranks?", "salientlora-late", "lora-r4"),
    Question("And pruning early?", "salientlora", "lora-r4"),
    Question("Ours above PEFT's AdaLoRA at its defaults?", "adalora", "peft-adalora"),
    Question("And at a fair scale?", "adalora", "peft-adalora-scaled"),
    Question("The composition above itself pruning early?", "composition-latest", "composition-late"),
    Question("The composition at most a point below LoRA r 8?", "composition-latest", "lora-r8", 0.01),
    Question("And pruning early?", "composition-late", "lora-r8", 0.01),
    Question("The composition above LoRA r 2, which holds as much?", "composition-latest", "lora-r2"),
    Question("And pruning early?", "composition-late", "lora-r2"),
    Question("AFLoRA above itself freezing early?", "aflora-late", "aflora"),
    Question("The composition, pruning early, above itself freezing early, too?", "composition-late", "composition"),
    Question("AFLoRA freezing early, with vectors at ten times the rate, above without?", "aflora-vectors", "aflora"),
    Question("AFLoRA with vectors at ten times the rate above without?", "aflora-late-vectors", "aflora-late"),
    Question(
        "Block influence's half × SalientLoRA at most two points below LoRA r 8?",
        "influence-salientlora",
        "lora-r8",
        0.02,
    ),
    Question(
        "That × AFLoRA, with faster vectors, at most two points below LoRA r 8?",
        "influence-composition-vectors",
        "lora-r8",
        0.02,
    ),
    Question("Under one budget at most a point below LoRA r 8?", "budget-late", "lora-r8", 0.01),
    Question("Under one budget above LoRA r 2, which trains as much on average?", "budget-late", "lora-r2"),
)


def questions(results: Results) -> str:
    """Each question, answered on every tuned task, over those that have every row, and over the tasks that were run at
    the one rate."""
    known, rows = results.measured, []
    for one in QUESTIONS:
        tuned = _over(results, results.whole, one)
        untuned = _over(results, results.swapped, one, UNTUNED)
        verdict = one.verdict(tuned or untuned)
        if one.theirs == "last-lora" and not (tuned or untuned) and (alike := results.cka_takes_the_last_half):
            verdict = f"the same layers {alike}"
        elif untuned and not tuned:
            verdict += ", untuned"
        each = (results.apart(task, one.ours, one.theirs) for task in known)
        rows.append([one.text, *map(interval, (*each, tuned, untuned)), f"**{verdict}**"])
    titles = [TASKS[name].title for name in known]
    return table(["", *titles, f"tuned, first {len(results.whole)} pooled", "untuned, pooled", "holds here?"], rows)


def _over(results: Results, names: list[str], one: Question, rate: str | None = None) -> Difference | None:
    """Over the tasks that have both rows; of one task alone its own interval, which knows the scored rows."""
    both = [name for name in names if results.apart(name, one.ours, one.theirs, rate)]
    if len(both) == 1:
        return results.apart(both[0], one.ours, one.theirs, rate)
    return results.pooled(tuple(both), one.ours, one.theirs, rate) if both else None
