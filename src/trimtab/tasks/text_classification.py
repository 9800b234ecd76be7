"""A user's own rows: one text or two, and a class or (``regression: true``) a number.

Files are JSONL, JSON, CSV, TSV or Parquet; the recipe names their columns. Classes are the training
labels in sorted order (whole numbers by value), so the same file always gives the same ids; the names
go into the model's config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, DataError, did_you_mean
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
from .data import Columns, DataSpec, column, read_files, texts

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
        if self.labels is not None:
            if self.regression:
                raise ConfigError("task.labels", self.labels, "leave it out: with regression there are none")
            if not isinstance(self.labels, (list, tuple)) or len(set(map(str, self.labels))) < 2:
                raise ConfigError("task.labels", self.labels, "a list of at least two different class names")
            self.labels = [str(name) for name in self.labels]
            if len(set(self.labels)) < len(self.labels):
                raise ConfigError("task.labels", self.labels, "each name once")
        if not self.metric:
            self.metric = next(iter(self.scores))
        elif self.metric not in self.scores:
            raise ConfigError(
                "task.metric",
                self.metric,
                f"no such score here.{did_you_mean(self.metric, self.scores)} There is {', '.join(self.scores)}",
            )
        self.greater_is_better = self.metric != "mse"
        self._names = self.labels

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
        if "train" not in spec.files:
            raise ConfigError("data.train", None, "give a file with training rows (JSONL, CSV or Parquet)")
        self.notes.clear()
        rows = {}
        for split in spec.files:
            source = f"data.{split}={str(spec.files[split][0])!r}"
            table = self._columns(split, read_files(f"data.{split}", spec.files[split]), source)
            table = self.without_unlabelled(split, table)
            if self.label in table:
                table[self.label] = self._ids(split, table[self.label], source)
            rows[split] = Dataset.from_dict(table)
        return self.split_and_sample(rows, spec)

    def _columns(self, split: str, raw: Columns, source: str) -> Columns:
        keys = {"text": self.text, "text_pair": self.text_pair}
        table: Columns = {
            name: texts(column(raw, name, f"task.{key}={name!r}", source), name, source)
            for key, name in keys.items()
            if name is not None
        }
        if self.label in raw or split != "test":
            table[self.label] = [
                None if value == "" else value
                for value in column(raw, self.label, f"task.label={self.label!r}", source)
            ]
        return table

    def _ids(self, split: str, values: list[Any], source: str) -> list[float]:
        if self.regression:
            return [_number(value, number, source) for number, value in enumerate(values, 1)]
        names = [_class_name(value, number, source) for number, value in enumerate(values, 1)]
        if self._names is None or (split == "train" and self.labels is None):
            self._names = self._found(names, source)
        ids = {name: i for i, name in enumerate(self._names)}
        for number, name in enumerate(names, 1):
            if name not in ids:
                known = "task.labels does not name" if self.labels else "no training row has"
                raise DataError(
                    f"{source}: row {number} has label {name!r}, which {known}."
                    f"{did_you_mean(name, ids)} Known: {_some(self._names)}"
                )
        return [ids[name] for name in names]

    def _found(self, names: list[str], source: str) -> list[str]:
        different = set(names)
        if len(different) < 2:
            raise DataError(f"{source}: every row has label {names[0]!r}; at least two classes are needed")
        if len(names) >= 20 and len(different) > len(names) / 2:
            raise DataError(
                f"{source}: column {self.label!r} has {len(different)} different values in "
                f"{len(names)} rows; name the label's column in task.label, "
                "or set task.regression=true for numbers"
            )
        try:
            return sorted(different, key=lambda name: (int(name), name))
        except ValueError:
            return sorted(different)


def _class_name(value: Any, number: int, source: str) -> str:
    """The class that a label means, whatever the file's format made of it: 1, 1.0 and "1" are one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int)):
        hint = "; set task.regression=true to predict a number" if isinstance(value, float) else ""
        raise DataError(f"{source}: row {number} has label {value!r}, not a class name or whole number{hint}")
    return str(value)


def _number(value: Any, number: int, source: str) -> float:
    try:
        out = float(value)
    except (TypeError, ValueError):
        out = math.nan
    if not math.isfinite(out):
        raise DataError(f"{source}: row {number} has label {value!r}, not a finite number (task.regression)")
    return out


def _some(names: Sequence[str], limit: int = 12) -> str:
    return ", ".join(map(repr, names[:limit])) + (", …" if len(names) > limit else "")
