"""The recipe's ``data:``: which rows make each split, how many, and which cells count as missing.

Reading is `files.py`'s; rows of the hub come through `datasets`.
"""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError, did_you_mean
from .columns import AS_FOUND, Columns, Reading, Table
from .files import existing_file, existing_files, from_dataset, read_file, read_files, split_of
from .separated import SEPARATORS

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Columns",
    "DataSpec",
    "Table",
    "column",
    "drawn",
    "duplicates",
    "existing_file",
    "is_missing",
    "read_file",
    "read_files",
    "with_points",
]

MISSING = (
    "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
    "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null",
)  # fmt: skip
"""What pandas reads as missing, beside an empty cell."""

_SETTINGS = (
    "max_samples", "sample_seed", "validation_share", "stratify", "separator", "encoding", "quotes", "missing",
    "hub", "config", "split",
)  # fmt: skip
_OTHER_NAMES = {"validation": ("valid", "val", "dev"), "train": ("training",), "test": ("testing",)}


@dataclass(frozen=True)
class DataSpec:
    """The recipe's ``data:``, checked."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    """Split name -> its files, in order."""
    max_samples: int | dict[str, int] | None = None
    """At most this many rows of every split, or of each named split."""
    sample_seed: int | str | None = None
    """Draws the kept rows; 0 when not given. ``first`` keeps the first ones."""
    validation_share: float | int | None = None
    """Share (or number) of the training rows that are split off where there are no rows for validation; a tenth when
    not given."""
    stratify: bool | str | None = None
    """Whether each class has its share in that split (it has, unless false); or the column whose values have."""
    reading: Reading = AS_FOUND
    missing: frozenset[str] = frozenset(MISSING)
    """Words that stand for no value, beside blanks."""
    hub: str | None = None
    """A dataset by name, or a folder that `datasets.load_dataset` or `load_from_disk` reads."""
    config: str | None = None
    split: str | dict[str, str] | None = None
    """The hub's name of the training split, or of each of ours."""
    splits: tuple[str, ...] = ("train", "validation", "test")
    """Those that the task knows."""

    @classmethod
    def read(cls, data: Mapping[str, Any] | None, splits: Sequence[str], lines: str | None = None) -> DataSpec:
        """Checks the mapping's keys and values; files are looked for, not opened.

        Args:
            data: the recipe's ``data:``.
            splits: names of the splits that the task knows.
            lines: what makes a text of a ``.txt`` file, for `Reading`.
        Raises:
            ConfigError: unknown key, or a value that cannot be.
            DataError: a file that is not there.
        """
        data = {key: value for key, value in (data or {}).items() if value is not None}
        known = [*splits, *_SETTINGS]
        for key in data:
            if key not in known:
                raise ConfigError(
                    f"data.{key}", data[key], f"no such setting.{did_you_mean(key, known)} There is {', '.join(known)}"
                )
        files = {}
        for split in splits:
            value = data.get(split)
            if value is None:
                continue
            paths = [value] if isinstance(value, (str, Path)) else value
            if not isinstance(paths, (list, tuple)) or not paths or not all(isinstance(p, (str, Path)) for p in paths):
                raise ConfigError(f"data.{split}", value, "a path, or a list of paths")
            files[split] = [file for path in paths for file in existing_files(f"data.{split}", path, split)]
        limits = data.get("max_samples")
        for key, limit in (limits if isinstance(limits, Mapping) else {"": limits}).items():
            name = f"data.max_samples.{key}".rstrip(".")
            if key and key not in splits:
                raise ConfigError(
                    name, limit, f"no such split.{did_you_mean(key, splits)} There is {', '.join(splits)}"
                )
            if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
                raise ConfigError(name, limit, "a whole number of rows, at least 1")
        seed = data.get("sample_seed")
        if seed not in (None, "first") and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
            raise ConfigError("data.sample_seed", seed, "a whole number, at least 0, or first for the first rows")
        return cls(
            files,
            dict(limits) if isinstance(limits, Mapping) else limits,
            seed,
            _share(data.get("validation_share")),
            _checked("stratify", data.get("stratify"), (bool, str), "true, false, or the name of a column"),
            Reading(
                _separator(data.get("separator")),
                _checked("encoding", data.get("encoding"), (str,), "the name of an encoding, such as cp1252"),
                _checked("quotes", data.get("quotes"), (bool,), "true or false"),
                lines,
            ),
            _words(data.get("missing", MISSING)),
            _checked("hub", data.get("hub"), (str, Path), "the name of a dataset"),
            _checked("config", data.get("config"), (str,), "the name of one of the dataset's configurations"),
            _hub_splits(data.get("split"), splits),
            tuple(splits),
        )

    @property
    def is_given(self) -> bool:
        """Whether the recipe says where rows come from."""
        return bool(self.files or self.hub)

    def tables(self) -> Iterator[tuple[str, str, Table]]:
        """Each split that there is: its name, where it is from (for messages), and its rows."""
        hub = self._from_hub() if self.hub else {}
        for split in self.splits:
            if split in self.files:
                yield split, f"data.{split}={str(self.files[split][0])!r}", self.table(split)
            elif split in hub:
                yield split, f"data.hub={str(self.hub)!r} ({split})", hub[split]

    def table(self, split: str) -> Table:
        """The rows of a split's files."""
        table = read_files(f"data.{split}", self.files[split], self.reading)
        for name in (name for name in table if split == "train" and name.strip().lower() in ("split", "set", "subset")):
            words = Counter(str(value).strip() for value in table[name] if not is_missing(value))
            others = {word: n for word, n in words.items() if split_of(word) in ("validation", "test")}
            if others and all(split_of(word) for word in words):
                told = ", ".join(f"{word!r} {n}" for word, n in others.items())
                table.notes.append(
                    f"column {name!r} says that rows are for scoring ({told}), and all are trained on here"
                )
        return table

    def _from_hub(self) -> dict[str, Table]:
        from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

        from .files import is_saved

        where, place = f"data.hub={str(self.hub)!r}", Path(str(self.hub)).expanduser()
        wanted = self.split if isinstance(self.split, dict) else {"train": self.split} if self.split else None
        try:
            if is_saved(place):
                found = load_from_disk(str(place))
            elif wanted:
                found = {ours: load_dataset(str(self.hub), self.config, split=name) for ours, name in wanted.items()}
            else:
                found = load_dataset(str(self.hub), self.config)
        except Exception as error:  # a hub's loader raises nearly anything
            text = " ".join(str(error).split())
            key = ", data.split" if wanted else ""
            offline = any(word in text for word in ("offline", "Couldn't reach", "ConnectionError", "resolve"))
            cure = "; the hub cannot be reached from here: give local files" if offline else ""
            raise DataError(f"{where}{key}: cannot be loaded: {text[:300]}{cure}") from error
        if isinstance(found, Dataset):
            found = {"train": found}
        if isinstance(found, DatasetDict) and wanted and is_saved(place):
            found = {ours: _one_of(found, theirs, where) for ours, theirs in wanted.items()}
        parts = {}
        for split in self.splits:
            names = (split, *_OTHER_NAMES.get(split, ()))
            if name := next((name for name in names if name in found), None):
                parts[split] = from_dataset(found[name])
        if not parts and len(found) == 1:
            parts = {"train": from_dataset(next(iter(found.values())))}
        if not parts:
            raise DataError(f"{where}: has the splits {', '.join(map(str, found))}; say which with data.split")
        return parts

    def limit(self, split: str) -> int | None:
        return self.max_samples.get(split) if isinstance(self.max_samples, dict) else self.max_samples

    def kept(self, split: str, n: int, labels: Sequence[Any] | None = None) -> list[int] | None:
        """Indices of the rows to keep of a split of n rows, in file order; None for all.

        Args:
            labels: each row's class; then each class has its share.
        """
        limit = self.limit(split)
        if limit is None or limit >= n:
            return None
        if self.sample_seed == "first":
            return list(range(limit))
        seed = int(self.sample_seed or 0)
        if labels is None:
            return sorted(random.Random(seed).sample(range(n), limit))
        return drawn(n, limit, seed, labels)

    def held_out(self, n: int, labels: Sequence[Any] | None = None, most: int | None = None) -> list[int]:
        """Indices of the training rows that make the validation split, in file order.

        Args:
            labels: what is to have its share there.
            most: of a tenth, where the recipe does not say how many.

        They depend on the rows alone, not on the run's seed, so that runs over several seeds are scored on the same.
        """
        if n < 2:
            raise DataError(
                "data.train: holds one row that can be learned from, too few to split off a validation split; "
                "give data.validation"
            )
        share = 0.1 if self.validation_share is None else self.validation_share
        labels = None if self.stratify is False else labels
        k = share if isinstance(share, int) else max(1, int(n * share))
        if labels is not None and not isinstance(share, int) and not isinstance(labels[0], float):
            several = sum(count > 1 for count in Counter(labels).values())
            k = max(k, min(several, n // 5))  # a row of each, where that does not take too many
        if most is not None and self.validation_share is None:
            k = min(k, most)
        if k >= n:
            raise ConfigError("data.validation_share", share, f"leaves none of {n} training rows to learn from")
        return drawn(n, k, 0, labels, spare=1)

    def refuse_split_settings(self) -> None:
        """Raises `ConfigError` for what says how to split, where rows for validation are given."""
        for key in ("validation_share", "stratify"):
            if (value := getattr(self, key)) is not None:
                raise ConfigError(f"data.{key}", value, "nothing is split off where rows are given for validation")

    def strata(self, table: Columns, labels: Sequence[Any] | None = None) -> Sequence[Any] | None:
        """What is stratified by: the column that the recipe names, else the labels."""
        if isinstance(self.stratify, str):
            return [str(value) for value in column(table, self.stratify, "data.stratify", "data.train")]
        return labels

    def is_missing(self, value: Any, but: Sequence[str] = ()) -> bool:
        """Whether a cell holds nothing: None, NaN, blanks, or one of the words for it (those in `but` apart)."""
        return is_missing(value, self.missing - set(but))


def _one_of(found: Mapping[str, Any], name: str, where: str) -> Any:
    if name not in found:
        raise ConfigError("data.split", name, f"{where} has {', '.join(found)}.{did_you_mean(name, found)}")
    return found[name]


def _checked(key: str, value: Any, kinds: tuple[type, ...], cure: str) -> Any:
    if value is not None and (not isinstance(value, kinds) or value == ""):
        raise ConfigError(f"data.{key}", value, cure)
    return value


def _share(value: Any) -> float | int | None:
    if value is None:
        return None
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (0 < value < 1 or (isinstance(value, int) and value >= 1)):
        raise ConfigError("data.validation_share", value, "a share of the training rows (0.2), or a number of them")
    return value


def _separator(value: Any) -> str | None:
    if value is None:
        return None
    mark = {**SEPARATORS, "\\t": "\t"}.get(str(value), value)
    if not isinstance(mark, str) or len(mark) != 1 or mark in '"\n\r':
        raise ConfigError("data.separator", value, f"one character, or one of {', '.join(SEPARATORS)}")
    return mark


def _words(value: Any) -> frozenset[str]:
    words = [value] if isinstance(value, str) else value
    if not isinstance(words, (list, tuple, frozenset)) or not all(isinstance(word, str) for word in words):
        raise ConfigError("data.missing", value, "a list of words that stand for no value; [] for none")
    return frozenset(words)


def _hub_splits(value: Any, splits: Sequence[str]) -> str | dict[str, str] | None:
    if isinstance(value, Mapping):
        for ours in value:
            if ours not in splits:
                cure = f"no such split.{did_you_mean(str(ours), splits)} There is {', '.join(splits)}"
                raise ConfigError(f"data.split.{ours}", value[ours], cure)
        return dict(value)
    return _checked("split", value, (str,), "the hub's name of the training split, or {train: …, validation: …}")


def drawn(n: int, k: int, seed: int, labels: Sequence[Any] | None = None, spare: int = 0) -> list[int]:
    """Indices of k of n rows, in file order: of each class its share, and of a rare one at least a row.

    Args:
        labels: each row's class, or its number (floats): then every range of numbers has its share.
        spare: rows of each class that may not be drawn.

    >>> drawn(8, 4, 0, ["a"] * 6 + ["b"] * 2)[-1] >= 6
    True
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    order = rng.permutation(n)
    if labels is None:
        return sorted(order[:k].tolist())
    known = np.asarray(labels)
    _, of, counts = np.unique(known, return_inverse=True, return_counts=True)
    if known.dtype.kind == "f":
        order = order[np.argsort(known[order], kind="stable")]
        picked = np.floor((np.arange(k) + rng.random(k)) * n / k).astype(int)
        return sorted(order[np.minimum(picked, n - 1)].tolist())
    most = np.maximum(counts - spare, 0)
    quota = _quota(k, counts, most if most.any() else counts)  # where no class can spare a row, some row must do
    return sorted(int(i) for c, q in enumerate(quota) for i in order[of[order] == c][:q])


def _quota(k: int, counts: np.ndarray, most: np.ndarray) -> np.ndarray:
    """How many of each class: its share of k, at least 1 where k allows, at most ``most``."""
    import numpy as np

    ideal = k * counts / counts.sum()
    quota = np.minimum(np.maximum(np.floor(ideal).astype(int), 1), most)
    while quota.sum() > k:  # more rare classes than their shares allow: the best served gives, the rarest goes last
        over = np.where(quota > 1, quota - ideal, -np.inf)
        giver = int(np.argmax(over)) if np.any(quota > 1) else int(np.argmin(np.where(quota > 0, counts, np.inf)))
        quota[giver] -= 1
    while quota.sum() < k and np.any(quota < most):
        quota[int(np.argmax(np.where(quota < most, ideal - quota, -np.inf)))] += 1
    return quota


def duplicates(rows: Mapping[str, Iterable[Any]]) -> list[str]:
    """Notes on rows that are trained on and scored, both.

    Args:
        rows: each split's rows, as what tells them apart.
    """
    seen = set(rows.get("train", ()))
    notes = []
    for split, keys in rows.items():
        if split != "train" and seen:
            again = [key in seen for key in keys]
            if n := sum(again):
                notes.append(f"{split}: {n} of {len(again)} rows are among the training rows, too")
    return notes


NO_VALIDATION = "no data.validation:"
"""How the note begins that says that rows to score were split off the training rows."""


def is_missing(value: Any, words: frozenset[str] | set[str] = frozenset(MISSING)) -> bool:
    """Whether a cell holds nothing: None, NaN, blanks, or one of ``words``.

    >>> [is_missing(value) for value in (None, float("nan"), "  ", "NA", "NAN bread", 0)]
    [True, True, True, True, False, False]
    >>> [is_missing(value, {"-1"}) for value in (-1, "-1", -1.0, "-1.0", -1.5)]
    [True, True, True, True, False]
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return True
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return False
    text = str(value).strip()
    whole, _, zeros = text.partition(".")  # -1, where the recipe says so, is -1.0 where pandas met a missing one
    return not text or text in words or (whole in words and whole.lstrip("-").isdigit() and not zeros.strip("0"))


def with_points(values: Sequence[Any]) -> list[Any]:
    """Numbers that are written with a decimal comma as they are with a point; anything else stays.

    1,000 alone may be a thousand: then one of the others must tell.

    >>> with_points(["3,5", "2"]), with_points(["1,000", "2,500"])
    (['3.5', '2'], ['1,000', '2,500'])
    """
    commas = [value.strip() for value in values if isinstance(value, str) and "," in value]
    is_decimal = all(re.fullmatch(r"[-+]?\d+,\d+", text) for text in commas)
    is_sure = any(re.fullmatch(r"[-+]?(0,\d+|\d+,(\d{1,2}|\d{4,}))", text) for text in commas)
    if not (is_decimal and is_sure) or any("." in str(value) for value in values):
        return list(values)
    return [value.replace(",", ".") if isinstance(value, str) else value for value in values]


def column(table: Columns, name: str, asked: str, source: str) -> list[Any]:
    """The values of a column.

    Args:
        asked: who asks for it (``task.text='sentence'``), for the message.
        source: which file it is (``data.train='x.csv'``), for the message.
    Raises:
        DataError: naming the columns that there are.
    """
    if lacking := getattr(table, "absent", {}).get(name):
        raise DataError(f"{asked}: no column {name!r} in {lacking}, which is among {source}")
    if name not in table:
        is_header = not any(len(one.split()) > 3 for one in table)
        cure = "" if is_header else "; the first line of a file must name its columns"
        raise DataError(
            f"{asked}: no column {name!r} in {source}.{did_you_mean(name, table)} It has {', '.join(table)}{cure}"
        )
    return table[name]


def texts(values: Sequence[Any], name: str, source: str) -> list[str]:
    """The values of text column `name` as strings; numbers are written out, anything else is refused."""
    return [text_of(value, name, f"{source}: row {number}") for number, value in enumerate(values, 1)]


def text_of(value: Any, name: str, where: str) -> str:
    if isinstance(value, (int, float)):
        value = str(value)
    if not isinstance(value, str):
        found = "is empty" if value is None else f"holds a {type(value).__name__}"
        raise DataError(f"{where} {found} in column {name!r}, where a text is needed")
    return value
