"""By how much two settings differ, and whether that is more than chance: paired by seed, and by row where known.

The interval is a bootstrap's (`scipy.stats.bootstrap`, percentiles). Where every run kept what it gave each row, rows
and seeds are drawn again, each on its own, and the two settings are scored on the same draw; else the seeds'
differences are. Few seeds make such an interval too narrow, so that below `ENOUGH_SEEDS` Student's t interval widens
it: of the seeds' differences, or, with rows, of both errors together, with Welch and Satterthwaite's degrees of
freedom. Without rows there is none below three seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.95
RESAMPLES = 2000
ENOUGH_SEEDS = 10


@dataclass(frozen=True)
class Difference:
    """One setting's score less another's."""

    to: str
    """Name of the other."""
    mean: float
    """Over the seeds that both have; over all there are, where they share none."""
    low: float | None
    """Ends of the interval that holds the true difference with `LEVEL`; ``None`` where nothing can be paired."""
    high: float | None
    seeds: int
    """Pairs of runs of the same seed."""
    rows: int | None
    """Scored rows that were paired; ``None`` where seeds alone were."""

    @property
    def is_clear(self) -> bool:
        """Whether zero lies outside of the interval."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@dataclass(frozen=True)
class Scored:
    """One run's score, and what each row got."""

    seed: int | None
    score: float
    kept: Mapping[str, Any]
    """As in predictions.json, of the split that the score is of; empty where unknown."""


def difference(ours: Sequence[Scored], theirs: Sequence[Scored], metric: str, to: str) -> Difference:
    """``ours`` less ``theirs``, with the interval that the pairs allow."""
    import numpy as np

    pairs = _pairs(ours, theirs)
    if not pairs:
        mean = float(np.mean([run.score for run in ours]) - np.mean([run.score for run in theirs]))
        return Difference(to, mean, None, None, 0, None)
    apart = [a.score - b.score for a, b in pairs]
    scores = [(_row_score(a.kept, metric), _row_score(b.kept, metric)) for a, b in pairs]
    known = [(a, b) for a, b in scores if a and b]
    n = int(pairs[0][0].kept.get("rows", 0))
    if n > 1 and len(known) == len(pairs) and _same_rows([run for pair in pairs for run in pair]):
        return Difference(to, float(np.mean(apart)), *_over_rows(known, n, apart), seeds=len(pairs), rows=n)
    low, high = _over_seeds(apart)
    return Difference(to, float(np.mean(apart)), low, high, len(pairs), None)


def _pairs(ours: Sequence[Scored], theirs: Sequence[Scored]) -> list[tuple[Scored, Scored]]:
    """Runs of the same seed together; of a seed that was run twice, in order."""
    left = list(theirs)
    found = []
    for run in ours:
        other = next((other for other in left if other.seed == run.seed), None)
        if other is not None:
            left.remove(other)
            found.append((run, other))
    return found


def _over_seeds(apart: Sequence[float]) -> tuple[float, float] | tuple[None, None]:
    import numpy as np
    from scipy import stats

    if len(apart) < 3:
        return None, None
    if np.ptp(apart) == 0:
        return float(apart[0]), float(apart[0])
    low, high = stats.bootstrap(
        (apart,),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    if len(apart) < ENOUGH_SEEDS:
        wide = stats.ttest_1samp(apart, 0).confidence_interval(LEVEL)
        low, high = min(low, wide.low), max(high, wide.high)
    return float(low), float(high)


RowScore = Callable[[Any], Any]
"""From how often each row was drawn, (draws, rows), to the score of each draw, (draws,)."""


def _over_rows(scores: Sequence[tuple[RowScore, RowScore]], n: int, each: Sequence[float]) -> tuple[float, float]:
    """Rows and seeds drawn again, each on its own.

    Args:
        each: the seeds' differences, on all rows.
    """
    import numpy as np
    from scipy import stats

    def apart(rows: Any, seeds: Any = None, axis: int = -1) -> Any:
        times = _times(rows, n)
        of_seeds = np.stack([a(times) - b(times) for a, b in scores], axis=-1)  # (draws, seeds)
        if seeds is not None:
            of_seeds = np.take_along_axis(of_seeds, np.reshape(seeds, (len(times), -1)), axis=-1)
        return of_seeds.mean(axis=-1).reshape(np.shape(rows)[:-1])

    def drawn(*sets: Any, resamples: int = RESAMPLES) -> Any:
        return stats.bootstrap(
            sets,
            apart,
            vectorized=True,
            confidence_level=LEVEL,
            n_resamples=resamples,
            batch=max(1, min(resamples, 2**22 // n)),  # an array of all draws may be larger than the memory
            method="percentile",
            random_state=np.random.default_rng(0),
        )

    rows = np.arange(n)
    if len(scores) == 1:
        low, high = drawn(rows).confidence_interval
        return float(low), float(high)
    low, high = drawn(rows, np.arange(len(scores))).confidence_interval
    if len(scores) < ENOUGH_SEEDS:
        of_seeds, of_rows = stats.sem(each) ** 2, drawn(rows, resamples=RESAMPLES // 4).standard_error ** 2
        if of_seeds:
            freedom = (of_seeds + of_rows) ** 2 / (of_seeds**2 / (len(scores) - 1) + of_rows**2 / (n - 1))
            half = stats.t.ppf((1 + LEVEL) / 2, freedom) * math.sqrt(of_seeds + of_rows)
            low, high = min(low, np.mean(each) - half), max(high, np.mean(each) + half)
    return float(low), float(high)


def _times(rows: Any, n: int) -> Any:
    """How often each of n rows is among those drawn: (..., drawn) -> (draws, n)."""
    import numpy as np

    rows = np.reshape(rows, (-1, np.shape(rows)[-1]))
    places = rows + n * np.arange(len(rows))[:, None]
    return np.bincount(places.ravel(), minlength=rows.shape[0] * n).reshape(-1, n).astype(np.float64)


def _same_rows(runs: Sequence[Scored]) -> bool:
    """Whether what these runs kept is of the same rows in the same order."""
    first = runs[0].kept
    told = ("rows", "fingerprint", "label", "tokens")
    return all(run.kept.get(key) == first.get(key) for run in runs for key in told)


def _row_score(kept: Mapping[str, Any], metric: str) -> RowScore | None:
    """The metric on any of a run's rows; None where the run did not keep what it takes."""
    import numpy as np

    if metric in _OF_ANSWERS and "answer_loss" in kept:
        sums = np.asarray([kept["answer_loss"], kept["tokens"], kept["right"]], np.float64).T  # (rows, 3)
        of_sums = _OF_ANSWERS[metric]
        return lambda times: of_sums(*(times @ sums).T)
    if "predicted" not in kept:
        return None
    label, predicted = np.asarray(kept["label"]), np.asarray(kept["predicted"])
    if "classes" not in kept:
        of_numbers = _OF_NUMBERS.get(metric)
        return None if of_numbers is None else lambda times: of_numbers(predicted, label, times)
    of_counts = _OF_COUNTS.get(metric)
    if of_counts is None:
        return None
    names = np.arange(len(kept["classes"]))
    of_label, of_answer = (np.equal.outer(classes, names).astype(np.float64) for classes in (label, predicted))
    both = of_label * of_answer
    return lambda times: of_counts(times @ both, times @ of_label, times @ of_answer)


# The scores of `tasks.classification` for many draws at once: thousands of them leave no time for one after the other.
# Of classes: how often each was right, was the label, was the answer, (draws, classes).


def _accuracy(right: Any, labels: Any, answers: Any) -> Any:
    return right.sum(axis=-1) / labels.sum(axis=-1)


def _f1(right: Any, labels: Any, answers: Any) -> Any:
    """Of class 1."""
    return _f1s(right, labels, answers)[:, 1]


def _f1_macro(right: Any, labels: Any, answers: Any) -> Any:
    return _f1s(right, labels, answers).sum(axis=-1) / (labels + answers > 0).sum(axis=-1)


def _f1s(right: Any, labels: Any, answers: Any) -> Any:
    """Of each class, 0 for one that does not occur."""
    return _share(2 * right, labels + answers)


def _matthews(right: Any, labels: Any, answers: Any) -> Any:
    n = labels.sum(axis=-1)
    chance, spread = (labels * answers).sum(axis=-1), (n**2 - (answers**2).sum(-1)) * (n**2 - (labels**2).sum(-1))
    return _share(n * right.sum(axis=-1) - chance, spread**0.5)


def _share(part: Any, whole: Any) -> Any:
    """Their ratio; 0 of nothing."""
    import numpy as np

    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def _correlation(x: Any, y: Any, times: Any) -> Any:
    """Of numbers (rows,), of which each occurs so often."""
    n, x, y = times.sum(axis=-1), x - x.mean(), y - y.mean()

    def spread(a: Any, b: Any) -> Any:
        whole = times @ (a * b)
        apart = whole - (times @ a) * (times @ b) / n
        return apart * (abs(apart) > 1e-12 * abs(whole))  # of one value alone what is left is rounding

    return _share(spread(x, y), (spread(x, x) * spread(y, y)) ** 0.5)


def _rank_correlation(x: Any, y: Any, times: Any) -> Any:
    middle = (times.sum(axis=-1, keepdims=True) + 1) / 2
    x, y = (_ranks(values, times) - middle for values in (x, y))
    return _share((times * x * y).sum(axis=-1), ((times * x**2).sum(-1) * (times * y**2).sum(-1)) ** 0.5)


def _ranks(values: Any, times: Any) -> Any:
    """Of the values that were drawn, equal ones sharing the mean of theirs: (rows,) -> (draws, rows)."""
    import numpy as np

    _, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    begins = np.flatnonzero(np.diff(group[order], prepend=-1))
    of_groups = np.add.reduceat(times[:, order], begins, axis=-1)
    return (of_groups.cumsum(axis=-1) - (of_groups - 1) / 2)[:, group]


def _mse(x: Any, y: Any, times: Any) -> Any:
    return times @ (x - y) ** 2 / times.sum(axis=-1)


def _perplexity(loss: Any, tokens: Any, right: Any) -> Any:
    import numpy as np

    return np.exp(np.minimum(loss / tokens, 700))


_OF_COUNTS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
}
_OF_NUMBERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "pearson": _correlation,
    "spearmanr": _rank_correlation,
    "mse": _mse,
}
_OF_ANSWERS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "answer_loss": lambda loss, tokens, right: loss / tokens,
    "perplexity": _perplexity,
    "token_accuracy": lambda loss, tokens, right: right / tokens,
}
