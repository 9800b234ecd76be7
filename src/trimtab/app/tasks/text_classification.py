"""A user's own rows: one text or two, and a class or (``regression: true``) a number.

The recipe names the columns. Classes are the training labels in sorted order (whole numbers by value), so the same
file always gives the same ids; the names go into the model's config. Rows without a text or a label are left out, and
said with their number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError, DataError, did_you_mean
from ..report.words import some
from .cells import loads
from .classification import (
    Score,
    SequenceClassification,
    accuracy,
    f1_macro,
    matthews_correlation,
    mse,
    pearson,
    spearmanr,
)
from .data import Columns, DataSpec, column, duplicates, text_of, with_points
from .labels import class_key, folded, joined, number, spelling, unit_of, units, without_unit

if TYPE_CHECKING:
    from datasets import DatasetDict

CLASS_SCORES: dict[str, Score] = {
    "accuracy": accuracy,
    "f1_macro": f1_macro,
    "matthews_correlation": matthews_correlation,
}
NUMBER_SCORES: dict[str, Score] = {"pearson": pearson, "spearmanr": spearmanr, "mse": mse}
SPLITS = ("train", "validation", "test")


@dataclass(kw_only=True)
class TextClassification(SequenceClassification):
    """Classification (or regression) of the rows of one's own files."""

    name: str = "text_classification"
    text: str = "text"
    """Column of the text."""
    text_pair: str | None = None
    """Column of a second text, if rows are pairs."""
    label: str = "label"
    """Column of the label."""
    labels: list[str] | None = None
    """Class names in the order of their ids; without it, the sorted labels of the training rows."""
    fold_labels: bool = False
    """Labels that differ in blanks or case only are one class."""
    regression: bool = False
    """The label is a number to be predicted."""
    metric: str = ""
    """Headline score: accuracy, f1_macro, matthews_correlation; or pearson, spearmanr, mse."""
    max_length: int | None = None
    """Tokens a row is cut to; without it, what the model can take."""
    notes: list[str] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.check_settings()
        for key in ("text", "text_pair", "label"):
            value = getattr(self, key)
            if not (isinstance(value, str) and value) and not (key == "text_pair" and value is None):
                raise ConfigError(f"task.{key}", value, "the name of a column")
        for key, other in (("text_pair", "text"), ("label", "text"), ("label", "text_pair")):
            if (value := getattr(self, key)) is not None and value == getattr(self, other):
                raise ConfigError(f"task.{key}", value, f"another column than task.{other}'s")
        if self.labels is not None:
            if self.regression:
                raise ConfigError("task.labels", self.labels, "leave it out: with regression there are none")
            if not isinstance(self.labels, (list, tuple)) or len(set(map(str, self.labels))) < 2:
                raise ConfigError("task.labels", self.labels, "a list of at least two different class names")
            self.labels = [str(name) for name in self.labels]
            if len(set(self.labels)) < len(self.labels):
                raise ConfigError("task.labels", self.labels, "each name once")
        if not isinstance(self.fold_labels, bool):
            raise ConfigError("task.fold_labels", self.fold_labels, "true or false")
        if self.labels and len({self._key(name, 0, "task.labels") for name in self.labels}) < len(self.labels):
            raise ConfigError("task.labels", self.labels, "names that task.fold_labels makes one; give each once")
        if not self.metric:
            self.metric = next(iter(self.scores))
        elif self.metric not in self.scores:
            raise ConfigError(
                "task.metric",
                self.metric,
                f"no such score here.{did_you_mean(self.metric, self.scores)} There is {', '.join(self.scores)}",
            )
        self.greater_is_better = self.metric != "mse"
        self._left_out = ""
        self._unit = ""
        self._names = self.labels

    scored_splits = ("test", "validation")

    @property
    def text_columns(self) -> tuple[str, ...]:
        return (self.text,) if self.text_pair is None else (self.text, self.text_pair)

    @property
    def label_column(self) -> str:
        return self.label

    @property
    def label_names(self) -> Sequence[str] | None:
        if self.regression:
            return None
        if self._names is None:
            raise ConfigError(
                "task.labels", None, "not known before the training rows are read; name them here, or load the data"
            )
        return self._names

    @property
    def scores(self) -> Mapping[str, Score]:
        return NUMBER_SCORES if self.regression else CLASS_SCORES

    def load_data(self, data: Mapping[str, Any] | None = None) -> DatasetDict:
        from datasets import Dataset

        spec = DataSpec.read(data, SPLITS)
        if "train" not in spec.files and not spec.hub:
            raise ConfigError("data.train", None, "give a file with training rows (JSONL, CSV or Parquet)")
        self.notes.clear()
        self._left_out = ""
        rows = {}
        for split, source, raw in spec.tables():
            self.notes += [f"{split}: {note}" for note in raw.notes]
            rows[split] = Dataset.from_dict(self._read(split, raw, source, spec))
        if "train" not in rows:
            raise ConfigError("data.train", None, f"a split with training rows is needed beside {', '.join(rows)}")
        split_up = self.split_and_sample(rows, spec)
        self._say_classes(split_up)
        self.notes += duplicates(
            {split: zip(*(part[name][:] for name in self.text_columns)) for split, part in split_up.items()}
        )
        return split_up

    def _read(self, split: str, raw: Columns, source: str, spec: DataSpec) -> Columns:
        """Texts and label ids of the rows that have them."""
        keys = {"text": self.text, "text_pair": self.text_pair}
        columns = {
            name: column(raw, name, f"task.{key}={name!r}", source) for key, name in keys.items() if name is not None
        }
        n = len(columns[self.text])
        empty = [i for i in range(n) if any(spec.is_missing(values[i]) for values in columns.values())]
        if len(empty) == n:
            raise DataError(f"{source}: no row has a text in column {' and '.join(map(repr, columns))}")
        if empty:
            words = Counter(v.strip() for i in empty for v in (c[i] for c in columns.values()) if _is_word(v, spec))
            self.notes.append(f"{split}: {len(empty)} of {n} rows have no text and were left out{_by_word(words)}")
        chosen = sorted(set(range(n)) - set(empty))
        labels = None
        if self.label in raw or split != "test":
            values = column(raw, self.label, f"task.label={self.label!r}", source)
            known = [i for i in chosen if not spec.is_missing(values[i], self.labels or ())]
            if known:
                labels = values
                words = Counter(str(values[i]).strip() for i in set(chosen) - set(known) if _is_word(values[i], spec))
                if n_left := len(chosen) - len(known):
                    key = "data.missing" if self.regression else "task.labels or data.missing makes a class of it"
                    told = _by_word(words, f"; {key}")
                    self._left_out = told if split == "train" else self._left_out
                    self.notes.append(f"{split}: {n_left} of {n} rows have no label and were left out{told}")
                chosen = known
            elif split != "test":  # that one may have none at all
                raise DataError(f"data.{split}: no row has a label in column {self.label!r}")
        table: Columns = {
            name: [text_of(values[i], name, f"{source}: row {i + 1}") for i in chosen]
            for name, values in columns.items()
        }
        if labels is not None:
            read = self._numbers if self.regression else self._ids
            table[self.label] = read(split, {i + 1: labels[i] for i in chosen}, source)
        if isinstance(spec.stratify, str) and split == "train" and spec.stratify not in table:
            whole = column(raw, spec.stratify, f"data.stratify={spec.stratify!r}", source)
            table[spec.stratify] = [str(whole[i]) for i in chosen]
        return table

    def _numbers(self, split: str, values: Mapping[int, Any], source: str) -> list[float]:
        """Labels that are numbers, given by the number of their row."""
        unit = unit_of(values.values())
        if split == "train":
            self._unit = unit
        elif unit != self._unit:
            ours, theirs = (each or "no unit" for each in (unit, self._unit))
            raise DataError(f"{source}: labels in {ours}, and in {theirs} in the training rows; write them alike")
        if unit:
            self.notes.append(f"{split}: labels are numbers in {unit}, which is left off")
        plain = with_points(without_unit([*values.values()]))
        found = [number(value, row, source) for row, value in zip(values, plain)]
        if split == "train" and len(found) > 1 and len(set(found)) == 1:
            raise DataError(f"{source}: every row has label {found[0]:g}; a number that is always one is not learned")
        return found

    def _ids(self, split: str, values: Mapping[int, Any], source: str) -> list[float]:
        """Ids of the classes of labels, given by the number of their row."""
        for row, value in values.items() if self.labels is None else ():
            if isinstance(loads(value), (list, dict)):  # as pandas writes lists into CSV
                raise DataError(
                    f"{source}: row {row} has label {value!r}, a {type(loads(value)).__name__} written as text, and "
                    "one label a row is learned; make it one, or name the classes in task.labels"
                )
        keys = {row: self._key(value, row, source) for row, value in values.items()}
        if self._names is None or (split == "train" and self.labels is None):
            self._names = self._found(keys, values, source)
        known = {self._key(name, 0, "task.labels"): i for i, name in enumerate(self._names)}
        # What one file calls true another calls 1.
        others = {"true": "1", "false": "0", "1": "true", "0": "false"}
        places = {row: known.get(key, known.get(others.get(key, ""))) for row, key in keys.items()}
        for row, place in places.items():
            if place is None:
                raise self._unknown(str(values[row]), keys[row], self._names, f"{source}: row {row}")
        return [place for place in places.values() if place is not None]

    def _unknown(self, name: str, key: str, known: Sequence[str], where: str) -> DataError:
        """The error for a label that is none of the classes."""
        near = [one for one in known if folded(one) == folded(name)]
        if {"True", "False"} & set(self.labels or ()) and name.lower() in ("yes", "no", "on", "off"):
            cure = " YAML reads yes and no as true and false; quote them in task.labels: ['yes', 'no']."
        elif near:
            cure = f" {near[0]!r} differs in blanks or case only: task.fold_labels=true makes them one."
        elif key == "-1":
            cure = " If it stands for no label: data.missing=['-1']."
        else:
            cure = did_you_mean(name, known)
        why = "task.labels does not name" if self.labels else "no training row has"
        return DataError(f"{where} has label {name!r}, which {why}.{cure} Known: {some([*map(repr, known)])}")

    def _key(self, value: Any, row: int, source: str) -> str:
        key = class_key(value, row, source)
        return folded(key) if self.fold_labels else key

    def _found(self, keys: Mapping[int, str], values: Mapping[int, Any], source: str) -> list[str]:
        """The classes of the training rows, in the order of their ids, spelt as they mostly are."""
        spelt: dict[str, Counter[str]] = {}
        for row, key in keys.items():
            spelt.setdefault(key, Counter())[spelling(values[row], self.fold_labels)] += 1
        if (
            {"true", "false"} & spelt.keys()
            and {"0", "1"} & spelt.keys()
            and spelt.keys() <= {"0", "1", "true", "false"}
        ):
            for word, digit in (("true", "1"), ("false", "0")):
                if word in spelt:
                    spelt[digit] = Counter({digit: spelt.pop(word).total() + spelt.get(digit, Counter()).total()})
        if len(spelt) < 2:
            raise DataError(
                f"{source}: every row has label {next(iter(spelt))!r}; at least two classes are needed{self._left_out}"
            )
        if len(keys) >= 20 and len(spelt) > len(keys) / 2:
            commas = any("," in key for key in spelt) and all(re.fullmatch(r"[-\d.,\s]+", key) for key in spelt)
            raise DataError(
                f"{source}: column {self.label!r} has {len(spelt)} different values in "
                f"{len(keys)} rows; name the label's column in task.label, "
                "or set task.regression=true for numbers" + (", written without commas (1000, 1.5)" if commas else "")
            )
        alike: dict[str, list[str]] = {}
        for key in spelt:
            alike.setdefault(folded(key), []).append(key)
        if near := [repr(key) for keys in alike.values() if len(keys) > 1 for key in sorted(keys)]:
            self.notes.append(
                f"classes that differ in blanks or case only: {some(near)}; task.fold_labels=true makes them one"
            )
        if unclear := [key for key in ("-", "?", "unknown") if key in spelt and len(spelt) > 2]:
            self.notes.append(f"is {unclear[0]!r} a class? If it stands for no label: data.missing=['{unclear[0]}']")
        if "-1" in spelt and {"0", "1"} <= spelt.keys():
            self.notes.append("is '-1' a class? If it stands for no label: data.missing=['-1']")
        self._say_unlikely(list(spelt))
        names = [min(counts, key=lambda name: (-counts[name], name)) for counts in spelt.values()]
        try:
            return sorted(names, key=lambda name: (int(name), name))
        except ValueError:
            return sorted(names)

    def _say_unlikely(self, classes: list[str]) -> None:
        if several := joined(classes):
            numbers = "; numbers with a decimal comma: task.regression=true" * (with_points(classes) != classes)
            told = some([*map(repr, several)])
            self.notes.append(f"classes that look like several in one: {told}; one label a row is learned{numbers}")
        if found := units(classes) - {""}:
            cure = "task.regression=true" if unit_of(classes) else "write them all in one unit, or without"
            told = some([*map(repr, classes)])
            self.notes.append(f"classes that look like numbers in {some(sorted(found))}: {told}; if they are: {cure}")

    def _say_classes(self, rows: DatasetDict) -> None:
        if self.label_names is None:
            return
        for split, part in rows.items():
            if self.label in part.column_names:
                counts = Counter(part[self.label][:])
                told = [f"{name!r} {counts[i]}" for i, name in enumerate(self.label_names) if counts[i]]
                self.notes.append(f"{split}: {len(told)} class{'es' if len(told) > 1 else ''}: {some(told)}")


def _is_word(value: Any, spec: DataSpec) -> bool:
    return isinstance(value, str) and value.strip() in spec.missing


def _by_word(words: Counter[str], key: str = "; data.missing lists such words") -> str:
    told = ", ".join(f"{word!r} {n}" for word, n in words.most_common(6))
    return f" ({told}{key})" if words else ""
