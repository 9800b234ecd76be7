"""Rows from a user's own files: JSONL, JSON, CSV, TSV, Parquet.

Files are read here rather than through `datasets`' loaders, so that a mistake is reported with its
line, nothing is cached in the user's home, a CSV cell stays the text that it is ("007", "NA"), and
lines end at ``\\n`` only (texts may hold Unicode line separators).
"""

from __future__ import annotations

import csv
import io
import json
import random
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import ConfigError, DataError, did_you_mean

Columns = dict[str, list[Any]]
"""A table: column name -> values, all of one length."""

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class DataSpec:
    """The recipe's ``data:``, checked."""

    files: dict[str, list[Path]] = field(default_factory=dict)
    """Split name -> its files, in order."""
    max_samples: int | dict[str, int] | None = None
    """At most this many rows of every split, or of each named split."""
    sample_seed: int | None = None
    """Draw the kept rows with this seed; without it the first ones are kept."""

    @classmethod
    def read(cls, data: Mapping[str, Any] | None, splits: Sequence[str]) -> DataSpec:
        """Checks the mapping's keys and values; files are looked for, not opened.

        Args:
            data: the recipe's ``data:``.
            splits: names of the splits that the task knows.
        Raises:
            ConfigError: unknown key, or a value that cannot be.
            DataError: a file that is not there.
        """
        data = dict(data or {})
        known = [*splits, "max_samples", "sample_seed"]
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
            if not isinstance(paths, (list, tuple)) or not paths:
                raise ConfigError(f"data.{split}", value, "a path, or a list of paths")
            files[split] = [existing_file(f"data.{split}", path) for path in paths]
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
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ConfigError("data.sample_seed", seed, "a whole number, or leave it out for the first rows")
        return cls(files, dict(limits) if isinstance(limits, Mapping) else limits, seed)

    def kept(self, split: str, n: int) -> list[int] | None:
        """Indices of the rows to keep of a split of n rows, in file order; None for all."""
        limit = self.max_samples.get(split) if isinstance(self.max_samples, dict) else self.max_samples
        if limit is None or limit >= n:
            return None
        if self.sample_seed is None:
            return list(range(limit))
        return sorted(random.Random(self.sample_seed).sample(range(n), limit))


def existing_file(key: str, path: str | Path) -> Path:
    """The path, if a file is there. Raises `DataError` naming the nearest file beside it."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if p.suffix.lower() in SUFFIXES)
        raise DataError(
            f"{key}={str(path)!r}: is a folder; name a file in it" + (f" ({', '.join(inside[:6])})" if inside else "")
        )
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        raise DataError(f"{key}={str(path)!r}: no such file.{did_you_mean(file.name, beside)}".rstrip("."))
    return file


def read_files(key: str, files: Sequence[Path]) -> Columns:
    """The rows of several files, one after the other. All need the same columns."""
    table = read_file(key, files[0])
    for file in files[1:]:
        more = read_file(key, file)
        if set(more) != set(table):
            odd = sorted(set(more) ^ set(table))
            raise DataError(f"{key}={str(file)!r}: its columns differ from those of {files[0].name}: {odd}")
        for name in table:
            table[name] += more[name]
    return table


def read_file(key: str, file: Path) -> Columns:
    """All rows of one file.

    Args:
        key: dotted name of the setting, for messages.
        file: its suffix says the format.
    Raises:
        DataError: unknown suffix, unreadable content (with its line), or no rows.
    """
    where = f"{key}={str(file)!r}"
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(f"{where}: cannot tell its format; use one of {', '.join(SUFFIXES)}")
    try:
        if suffix == ".parquet":
            table = _read_parquet(where, file)
        elif suffix in {".csv", ".tsv"}:
            table = _read_csv(where, _text(where, file), tab=suffix == ".tsv")
        else:
            table = _read_json(where, _text(where, file))
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    if not table or not next(iter(table.values())):
        raise DataError(f"{where}: holds no rows")
    return table


def _text(where: str, file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{where}: line {line} is not UTF-8; save the file as UTF-8") from error


def _read_json(where: str, text: str) -> Columns:
    if text.lstrip()[:1] == "[":
        try:
            rows = json.loads(text)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON: {error}") from error
        numbered: Iterable[tuple[int, Any]] = enumerate(rows, 1)
        unit = "entry"
    else:

        def lines() -> Iterable[tuple[int, Any]]:
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise DataError(f"{where}: line {number} is not valid JSON: {error}") from error

        numbered, unit = lines(), "line"
    table: Columns = {}
    for n, (number, row) in enumerate(numbered):
        if not isinstance(row, dict):
            raise DataError(f"{where}: {unit} {number} is {type(row).__name__}, not an object {{…}}")
        for name, value in row.items():
            if name not in table:
                table[name] = [None] * n
            table[name].append(value)
        for values in table.values():
            if len(values) <= n:
                values.append(None)
    return table


def _read_csv(where: str, text: str, tab: bool) -> Columns:
    # Tab-separated text is taken as it is: in the wild (GLUE's own files) a quote there is a character.
    # Line ends inside a quoted cell are kept, and only "\n" ends a line.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    lines = io.StringIO(text, newline="\n")
    table: Columns = {}
    number = 0
    try:
        for number, row in _tabs(lines) if tab else _commas(lines):
            if not table:
                if len(set(row)) < len(row):
                    twice = sorted({name for name in row if row.count(name) > 1})
                    raise DataError(f"{where}: column {twice[0]!r} appears twice in the first line")
                table = {name: [] for name in row}
            elif len(row) != len(table):
                raise DataError(f"{where}: line {number} has {len(row)} fields, the first line has {len(table)}")
            else:
                for values, value in zip(table.values(), row):
                    values.append(value)
    except csv.Error as error:
        raise DataError(f"{where}: after line {number}: not valid CSV: {error}") from error
    return table


def _tabs(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, line.rstrip("\r\n").split("\t")


def _commas(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(lines, strict=True)
    for row in reader:
        if row:
            yield reader.line_num, row


def _read_parquet(where: str, file: Path) -> Columns:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pydict()
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(f"{where}: not a Parquet file: {str(error).splitlines()[0]}") from error


def column(table: Columns, name: str, asked: str, source: str) -> list[Any]:
    """The values of a column.

    Args:
        asked: who asks for it (``task.text='sentence'``), for the message.
        source: which file it is (``data.train='x.csv'``), for the message.
    Raises:
        DataError: naming the columns that there are.
    """
    if name not in table:
        raise DataError(
            f"{asked}: no column {name!r} in {source}.{did_you_mean(name, table)} It has {', '.join(table)}"
        )
    return table[name]


def texts(values: Sequence[Any], name: str, source: str) -> list[str]:
    """The values of text column `name` as strings; numbers are written out, anything else is refused."""
    out = []
    for number, value in enumerate(values, 1):
        if isinstance(value, (int, float)):
            value = str(value)
        if not isinstance(value, str):
            found = "is empty" if value is None else f"holds a {type(value).__name__}"
            raise DataError(f"{source}: row {number} {found} in column {name!r}, where a text is needed")
        out.append(value)
    return out
