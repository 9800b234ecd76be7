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


RowScore = Callable[[Any], float]
"""From positions of rows, some of them several times, to the score on them."""


def _over_rows(scores: Sequence[tuple[RowScore, RowScore]], n: int, each: Sequence[float]) -> tuple[float, float]:
    """Rows and seeds drawn again, each on its own.

    Args:
        each: the seeds' differences, on all rows.
    """
    import numpy as np
    from scipy import stats

    all_seeds = range(len(scores))

    def apart(rows: Any, seeds: Any = all_seeds) -> float:
        return float(np.mean([scores[seed][0](rows) - scores[seed][1](rows) for seed in seeds]))

    def drawn(*sets: Any, resamples: int = RESAMPLES) -> Any:
        return stats.bootstrap(
            sets,
            apart,
            vectorized=False,
            confidence_level=LEVEL,
            n_resamples=resamples,
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


def _same_rows(runs: Sequence[Scored]) -> bool:
    """Whether what these runs kept is of the same rows in the same order."""
    first = runs[0].kept
    told = ("rows", "fingerprint", "label", "tokens")
    return all(run.kept.get(key) == first.get(key) for run in runs for key in told)


def _row_score(kept: Mapping[str, Any], metric: str) -> RowScore | None:
    """The metric on any of a run's rows; None where the run did not keep what it takes."""
    import numpy as np

    if metric in _OF_ANSWERS and "answer_loss" in kept:
        sums = np.asarray([kept["answer_loss"], kept["tokens"], kept["right"]], np.float64)  # (3, rows)
        of_sums = _OF_ANSWERS[metric]
        return lambda rows: of_sums(*sums[:, rows].sum(axis=1))
    if "predicted" not in kept:
        return None
    label, predicted = np.asarray(kept["label"]), np.asarray(kept["predicted"])
    if "classes" not in kept:
        of_numbers = _OF_NUMBERS.get(metric)
        return None if of_numbers is None else lambda rows: of_numbers(predicted[rows], label[rows])
    of_counts, classes = _OF_COUNTS.get(metric), len(kept["classes"])
    cell = classes * label + predicted
    return (
        None
        if of_counts is None
        else (lambda rows: of_counts(np.bincount(cell[rows], minlength=classes**2).reshape(classes, classes)))
    )


# The scores of `tasks.classification`, from counts (label, predicted): thousands of draws leave no time for more.


def _accuracy(counts: Any) -> float:
    return float(counts.trace() / counts.sum())


def _f1(counts: Any) -> float:
    """Of class 1."""
    both = counts[1].sum() + counts[:, 1].sum()
    return float(2 * counts[1, 1] / both) if both else 0.0


def _f1_macro(counts: Any) -> float:
    both = counts.sum(axis=0) + counts.sum(axis=1)
    return float((2 * counts.diagonal()[both > 0] / both[both > 0]).mean())


def _matthews(counts: Any) -> float:
    n, right = float(counts.sum()), float(counts.trace())
    labels, predicted = counts.sum(axis=1).astype(float), counts.sum(axis=0).astype(float)
    spread = (n * n - predicted @ predicted) * (n * n - labels @ labels)
    return float((right * n - labels @ predicted) / math.sqrt(spread)) if spread > 0 else 0.0


def _correlation(x: Any, y: Any) -> float:
    import numpy as np

    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) > 0 and np.ptp(y) > 0 else 0.0


def _rank_correlation(x: Any, y: Any) -> float:
    from scipy.stats import rankdata

    return _correlation(rankdata(x), rankdata(y))


def _mse(x: Any, y: Any) -> float:
    return float(((x - y) ** 2).mean())


_OF_COUNTS: dict[str, Callable[[Any], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "f1_macro": _f1_macro,
    "matthews_correlation": _matthews,
}
_OF_NUMBERS: dict[str, Callable[[Any, Any], float]] = {
    "pearson": _correlation,
    "spearmanr": _rank_correlation,
    "mse": _mse,
}
_OF_ANSWERS: dict[str, Callable[[float, float, float], float]] = {
    "answer_loss": lambda loss, tokens, right: loss / tokens,
    "perplexity": lambda loss, tokens, right: math.exp(min(loss / tokens, 700)),
    "token_accuracy": lambda loss, tokens, right: right / tokens,
}
