"""Separated text -> columns: which mark separates, and whether quotes are part of the texts, is found out."""

from __future__ import annotations

import contextlib
import csv
import io
import re
import sys
from collections.abc import Iterator
from typing import Any

from ...errors import DataError
from .columns import Reading, Table

SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
_OWN_SEPARATOR = {".tsv": "\t", ".tab": "\t", ".psv": "|"}
_LATE_QUOTE = re.compile(r"\s+\"")
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
Rows = list[tuple[int, list[str]]]


def read_separated(where: str, text: str, suffix: str, reading: Reading) -> Table:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    said = re.match(r'"?sep=(.)"?\r?\n', text)  # as Excel writes it
    text = text[said.end() :] if said else text
    usual = _OWN_SEPARATOR.get(suffix, ",")
    separator = reading.separator or (said[1] if said else _found_separator(text, usual))
    header, rows, n = _parsed(where, text, separator, reading.quotes)
    names = [name.strip() for name in header]
    for name in names:
        if name and names.count(name) > 1:
            raise DataError(f"{where}: column {name!r} appears twice in the first line")
    table = Table()
    for number, row in rows:
        if n > 1 and len(row) == 1 and not row[0].strip():
            continue
        if len(row) > n and not any(cell.strip() for cell in row[n:]):
            row = row[:n]
        elif len(row) < n and not any(names[len(row) :]):
            row = row + [""] * (n - len(row))
        if len(row) != n:
            other = "" if reading.separator else "; data.separator says what stands between them"
            other = f", which must name the columns{other}"
            raise DataError(
                f"{where}: line {number} has {len(row)} fields, the first line has {n}" + (other if n == 1 else "")
            )
        for i, cell in enumerate(row):
            table.setdefault(names[i] or f"\0{i}", []).append(cell)
    if not rows:
        table.update({name: [] for name in names if name})
    for i, name in enumerate(names):
        if not name and any(cell.strip() for cell in table.pop(f"\0{i}", ())):
            table.nameless.append(i + 1)
            table.notes.append(f"column {i + 1} has no name in the first line and is not read")
    if separator != usual and not reading.separator and len(names) > 1:
        table.separator = next((word for word, mark in SEPARATORS.items() if mark == separator), repr(separator))
        table.notes.append(f"columns are separated by {table.separator} (data.separator)")
    return table


def _found_separator(text: str, usual: str) -> str:
    """The one by which the first line has the most fields, and the next lines as many."""
    sample = "".join(line for line, _ in zip(io.StringIO(text, newline="\n"), range(60)))
    sample = sample.replace("\r\n", "\n").replace("\r", " ")  # which no reader takes alone
    best, most = usual, 1
    for mark in (usual, *(mark for mark in SEPARATORS.values() if mark != usual)):
        widths = [len(row) for row in csv.reader(io.StringIO(sample, newline="\n"), delimiter=mark) if row]
        if widths and widths[0] > most and sum(width == widths[0] for width in widths) >= 0.8 * len(widths):
            best, most = mark, widths[0]
    return best


def _parsed(where: str, text: str, separator: str, quotes: bool | None) -> tuple[list[str], Rows, int]:
    """Header, numbered rows, and the number of columns."""
    if quotes is None and separator == "\t":
        # In the wild (GLUE's own files) a quote in tab-separated text is a character; pandas and Excel write it around
        # a cell. Where every line has its fields as it stands, quotes are undone only if each cell that begins with
        # one is quoted as a whole.
        plain = list(_plain(text, separator))
        if _fits(plain):
            cells = [cell for _, row in plain for cell in row if cell.startswith('"')]
            if cells and all(map(_QUOTED.fullmatch, cells)):
                plain = [(number, [_unquoted(cell) for cell in row]) for number, row in plain]
            rows = plain
        else:
            rows = _quoted(where, text, separator)
            if not _fits(rows):
                rows = plain
    elif quotes is False:
        rows = list(_plain(text, separator))
    else:
        rows = _quoted(where, text, separator)
    if not rows:
        return [], [], 0
    (_, header), *rest = rows
    return header, rest, len(header)


def _fits(rows: Rows) -> bool:
    return all(len(row) == len(rows[0][1]) for _, row in rows)


def _plain(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r").split(separator)


def _unquoted(cell: str) -> str:
    return cell[1:-1].replace('""', '"') if cell.startswith('"') else cell


def _quoted(where: str, text: str, separator: str) -> Rows:
    # Line ends inside a quoted cell are kept, and only "\n" ends a line.
    found: Rows = []

    def read(**more: Any) -> Rows:
        found.clear()
        reader = csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=separator, **more)
        found.extend((reader.line_num, row) for row in reader if row)
        return found

    try:
        plain = list(read())
        if any(_LATE_QUOTE.match(cell) for _, row in plain[:2] for cell in row):  # "text", "label"
            with contextlib.suppress(csv.Error):
                if _fits(read(skipinitialspace=True)):
                    return found
        return plain
    except csv.Error as error:
        after = found[-1][0] if found else 0
        if '\\"' in text:  # databases write a quote inside of a quoted cell so
            with contextlib.suppress(csv.Error):
                if _fits(read(escapechar="\\", doublequote=False)):
                    return found
        told = "a carriage return stands alone" if "new-line character" in str(error) else error
        raise DataError(
            f"{where}: after line {after}: not valid CSV: {told}; if quotes are part of the texts: data.quotes=false"
        ) from error
