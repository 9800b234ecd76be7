"""A user's own files -> one table: separated text, JSON in its many shapes, Parquet, Arrow, folders of them.

Files are read here rather than through `datasets`' loaders, so that a mistake is reported with its line,
nothing is cached in the user's home, a CSV cell stays the text that it is ("007", "1.10"), and lines end at
``\\n`` only (texts may hold Unicode line separators). What a file's bytes say goes before what its name says.
"""

from __future__ import annotations

import contextlib
import csv
import glob
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, did_you_mean

Columns = dict[str, list[Any]]
"""A table: column name -> values, all of one length."""


class Table(Columns):
    """Columns, and what was found out while they were read."""

    def __init__(self, columns: Columns | None = None, notes: Iterable[str] = ()) -> None:
        super().__init__(columns or {})
        self.absent: dict[str, str] = {}
        """Columns that one of the files lacks (None in its rows), with that file's name."""
        self.notes = list(notes)

    def rows(self, chosen: Sequence[int]) -> Table:
        """Some of the rows."""
        part = Table({name: [values[i] for i in chosen] for name, values in self.items()}, self.notes)
        part.absent = self.absent
        return part


SEPARATORS = {"comma": ",", "semicolon": ";", "tab": "\t", "pipe": "|"}
_OWN_SEPARATOR = {".tsv": "\t", ".tab": "\t", ".psv": "|"}
_JSON = (".jsonl", ".ndjson", ".json")
_SEPARATED = (".csv", ".tsv", ".tab", ".psv", ".txt")
_ARROW = (".arrow", ".feather")
SUFFIXES = (*_JSON, *_SEPARATED, ".parquet", *_ARROW)
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd", ".zip": "zip"}
_PACKED_BYTES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
}
_MARKS = (  # longest first: a UTF-32 mark begins like a UTF-16 one
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # as JSON escapes it
_QUOTED = re.compile(r'"(?:[^"]|"")*"')
_FASTTEXT = re.compile(r"(?:__label__\S+[ \t]+(?!__label__)\S.*\n|\s*\n)+(?:__label__\S+[ \t]+(?!__label__)\S.*)?")
_SHAPES = "a list of objects, one object a line, or an object that holds one list of objects"


@dataclass(frozen=True)
class Reading:
    """How files are read, where the recipe says so; None: found out from each file."""

    separator: str | None = None
    encoding: str | None = None
    quotes: bool | None = None
    """Whether a quote around a cell is no part of it."""
    lines: str | None = None
    """What makes a text of a ``.txt`` file: line, paragraph or document. None: it is separated text."""


AS_FOUND = Reading()


# -- which files ---------------------------------------------------------------------------------------


def existing_file(key: str, path: str | Path) -> Path:
    """The path, if a file is there. Raises `DataError` naming the nearest file beside it."""
    file = Path(path).expanduser()
    if file.is_dir():
        inside = sorted(p.name for p in file.iterdir() if is_data(p))
        raise DataError(
            f"{key}={str(path)!r}: is a folder; name a file in it" + (f" ({', '.join(inside[:6])})" if inside else "")
        )
    if not file.is_file():
        beside = [p.name for p in file.parent.iterdir() if p.is_file()] if file.parent.is_dir() else []
        raise DataError(f"{key}={str(path)!r}: no such file.{did_you_mean(file.name, beside)}".rstrip("."))
    return file


def existing_files(key: str, path: str | Path, split: str) -> list[Path]:
    """The files that a path, a folder or a pattern (``part-*.jsonl``) stands for, in order of their names.

    A folder written by `save_to_disk` is one file here. Of a folder in which file names begin with a split's name, only
    those of this split are taken.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if is_saved(place):
            return [place]
        inside = sorted(p for p in place.rglob("*") if p.is_file() and is_data(p))
        named = {p: split_of(p.name) for p in inside}
        if any(named.values()):
            inside = [p for p in inside if named[p] == split]
        if not inside:
            there = sorted({str(p.relative_to(place)) for p in named} or {p.name for p in place.iterdir()})
            found = f"; it holds {', '.join(there[:6])}" if there else "; it is empty"
            raise DataError(f"{key}={str(path)!r}: no {split} file in this folder ({', '.join(SUFFIXES)}){found}")
        return inside
    if glob.has_magic(str(place)) and not place.exists():
        inside = sorted(Path(found) for found in glob.glob(str(place), recursive=True))
        inside = [p for p in inside if p.is_file()]
        if not inside:
            raise DataError(f"{key}={str(path)!r}: no file fits this pattern")
        return inside
    return [existing_file(key, path)]


def is_data(path: Path) -> bool:
    """Whether a file's name is that of rows."""
    return not path.name.startswith((".", "_")) and _suffix(path) in SUFFIXES


def is_saved(folder: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _suffix(path: Path) -> str:
    """``.csv`` of ``x.csv`` and of ``x.csv.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


def split_of(name: str) -> str | None:
    """As `datasets` knows the split by a file's name."""
    found = re.match(r"(train|training|validation|valid|val|dev|test|testing)(?![a-z])", name.lower())
    other = {"training": "train", "valid": "validation", "val": "validation", "dev": "validation", "testing": "test"}
    return other.get(found[1], found[1]) if found else None


# -- reading -------------------------------------------------------------------------------------------


def read_files(key: str, files: Sequence[Path], reading: Reading = AS_FOUND) -> Table:
    """The rows of several files, one after the other; a column that one of them lacks is None there."""
    table = read_file(key, files[0], reading)
    n = _length(table)
    for file in files[1:]:
        more = read_file(key, file, reading)
        m = _length(more)
        for name in [*table, *(name for name in more if name not in table)]:
            if name not in more:
                table.absent.setdefault(name, file.name)
            elif name not in table:
                table.absent.setdefault(name, files[0].name)
            table[name] = table.get(name, [None] * n) + more.get(name, [None] * m)
        n += m
        table.notes += [f"{file.name}: {note}" for note in more.notes]
    return table


def _length(table: Columns) -> int:
    return len(next(iter(table.values())))


def read_file(key: str, file: Path, reading: Reading = AS_FOUND) -> Table:
    """All rows of one file.

    Args:
        key: dotted name of the setting, for messages.
        file: what its bytes do not tell of its format, its suffix says.
    Raises:
        DataError: unknown suffix, unreadable content (with its line), or no rows.
    """
    where = f"{key}={str(file)!r}"
    if file.is_dir():
        return _read_saved(where, file, key.rpartition(".")[2])
    suffix = _suffix(file)
    if suffix not in (*SUFFIXES, ""):
        raise DataError(f"{where}: cannot tell its format; use one of {', '.join(SUFFIXES)}, also as .gz or .zst")
    try:
        data = _unpacked(where, file.read_bytes())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    if data.startswith(b"version https://git-lfs."):
        raise DataError(f"{where}: is a Git LFS pointer to the rows, not the rows; fetch them: git lfs pull")
    if re.match(rb"\s*<(!doctype html|html)\b", data[:200], re.IGNORECASE):
        raise DataError(f"{where}: is a web page, not rows; was it saved from a link that asks to log in?")
    if suffix in (".parquet", *_ARROW) or data[:4] == b"PAR1":
        table = _read_arrow(where, data, suffix)
    else:
        text = _decoded(where, data, reading.encoding)
        if reading.lines and suffix == ".txt":
            table = Table({"text": parts_of(text, reading.lines)})
        elif suffix == ".txt" and _FASTTEXT.fullmatch(text):
            rows = [line.split(maxsplit=1) for line in text.split("\n") if line.strip()]
            table = Table({"text": [row[1].strip() for row in rows], "label": [row[0][9:] for row in rows]})
        elif suffix in _JSON or re.match(r"\s*(\[\s*)?\{\s*\"", text):
            table = Table(_read_json(where, text, key.rpartition(".")[2]))
        else:
            table = _read_separated(where, text, suffix, reading)
    if not table or not _length(table):
        raise DataError(f"{where}: holds no rows" + (" below the first line, which names the columns" if table else ""))
    return table


def _unpacked(where: str, data: bytes) -> bytes:
    kind = next((kind for mark, kind in _PACKED_BYTES.items() if data.startswith(mark)), None)
    if kind is None:
        return data
    import bz2
    import gzip
    import lzma
    import zipfile

    try:
        if kind == "zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if "xl/workbook.xml" in archive.namelist():
                    raise DataError(f"{where}: is an Excel workbook; save it as CSV (UTF-8)")
                inside = [
                    name for name in archive.namelist() if is_data(Path(name)) and not name.startswith("__MACOSX")
                ]
                if len(inside) != 1:
                    held = ", ".join(archive.namelist()[:4])
                    raise DataError(f"{where}: a zip archive must hold one file of rows; this one holds {held}")
                return archive.read(inside[0])
        if kind == "zstd":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
                return stream.read()
        return {"gzip": gzip, "bz2": bz2, "xz": lzma}[kind].decompress(data)  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, lzma.LZMAError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: is packed as {kind}, and damaged or cut short: {error}") from error


def _decoded(where: str, data: bytes, encoding: str | None) -> str:
    """The text, by what the recipe says, by its byte order mark, or as UTF-8."""
    found = next((name for mark, name in _MARKS if data.startswith(mark)), None)
    if found is None and encoding is None and data[:400].count(0) > len(data[:400]) // 4:
        found = "utf-16-le" if not any(data[1:400:2]) else "utf-16-be"
    chosen = encoding or found or "utf-8"
    try:
        text = data.decode(chosen)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        if encoding or found:
            raise DataError(f"{where}: line {line} is not {chosen} (data.encoding)") from error
        begin, end = data.rfind(b"\n", 0, error.start) + 1, data.find(b"\n", error.start)
        read_so = data[begin : end if end >= 0 else len(data)].decode("cp1252", errors="replace").strip()
        raise DataError(
            f"{where}: line {line} is not UTF-8; set data.encoding, or save the file as UTF-8. "
            f"With data.encoding=cp1252 (close to latin-1) it reads {read_so[:60]!r}"
        ) from error
    except LookupError:
        raise ConfigError("data.encoding", encoding, "no such encoding; for example utf-8, cp1252, utf-16") from None
    text = text.removeprefix("\ufeff")
    return text.replace("\r", "\n") if "\r" in text and "\n" not in text else text  # as old Macs end lines


# -- JSON ----------------------------------------------------------------------------------------------


def _read_json(where: str, text: str, split: str) -> Columns:
    """Rows from JSON: whole, or object after object, on one line each or not."""
    try:
        value = json.loads(text)
    except ValueError as whole:
        numbered, unit = _one_after_the_other(where, text, whole), "line"
    else:
        rows = _rows_within(where, value, split)
        if isinstance(rows, dict):
            return rows
        numbered, unit = list(enumerate(rows, 1)), "entry"
    if _HALF.search(text):
        numbered = [(number, _without_halves(row)) for number, row in numbered]
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


def _without_halves(value: Any) -> Any:
    """Half of a pair of surrogates, as texts have it that were cut in mid-emoji, is no character: U+FFFD instead."""
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_without_halves(inner) for inner in value]
    return {_without_halves(k): _without_halves(v) for k, v in value.items()} if isinstance(value, dict) else value


def _is_rows(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value) and not is_chat(value)
    )


def is_chat(value: Any) -> bool:
    """Whether a list of objects is one conversation."""
    kinds = ({"role", "content"}, {"from", "value"})
    return isinstance(value, list) and any(isinstance(m, dict) and any(k <= m.keys() for k in kinds) for m in value)


def _one_after_the_other(where: str, text: str, whole: ValueError) -> list[tuple[int, Any]]:
    """The values of JSON Lines, or of objects that were written one after the other over several lines."""
    found = []
    problem: DataError | None = None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append((number, json.loads(line)))
            except ValueError as error:
                problem = DataError(f"{where}: line {number} is not valid JSON: {error}")
                break
    if problem is None:
        return found
    if not found:  # the first line is no value: then it is not one a line
        if text.lstrip()[:1] == "[":
            raise DataError(f"{where}: not valid JSON: {whole}") from whole
        decoder, at, several = json.JSONDecoder(), 0, []
        while at < len(text):
            space = re.compile(r"[\s,]*").match(text, at)
            at = space.end() if space else at
            if at >= len(text):
                break
            try:
                value, end = decoder.raw_decode(text, at)
            except json.JSONDecodeError as error:
                raise DataError(f"{where}: not valid JSON: {error}; expected is {_SHAPES}") from error
            several.append((text.count("\n", 0, at) + 1, value))
            at = end
        return several
    raise problem


def _rows_within(where: str, value: Any, split: str) -> list[Any] | Columns:
    """The list of rows that a whole JSON file is or holds; or its columns, where it is written by columns."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        raise DataError(f"{where}: holds a {type(value).__name__}; expected is {_SHAPES}")
    lists = {name: inner for name, inner in value.items() if _is_rows(inner)}
    if split in lists:
        return lists[split]
    if len(lists) == 1:
        return next(iter(lists.values()))
    if len(lists) > 1:
        raise DataError(f"{where}: holds {len(lists)} lists of objects ({', '.join(lists)}); expected is {_SHAPES}")
    if {"columns", "data"} <= value.keys() and all(isinstance(row, list) for row in value["data"]):  # pandas' "split"
        return [dict(zip(value["columns"], row)) for row in value["data"]]
    inner = list(value.values())
    if any(map(is_chat, inner)):
        return [value]
    if inner and all(isinstance(column, list) for column in inner) and len(set(map(len, inner))) == 1:
        return value
    if len(inner) > 1 and all(isinstance(column, dict) and column.keys() == inner[0].keys() for column in inner):
        return {name: list(column.values()) for name, column in value.items()}  # pandas' own: column -> index -> value
    if len(inner) == 1 and isinstance(inner[0], dict):
        return _rows_within(where, inner[0], split)
    if not all(isinstance(part, (list, dict)) for part in inner):
        return [value]
    raise DataError(f"{where}: an object with {', '.join(map(repr, list(value)[:6]))}; expected is {_SHAPES}")


# -- separated text ------------------------------------------------------------------------------------


def _read_separated(where: str, text: str, suffix: str, reading: Reading) -> Table:
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
            table.notes.append(f"column {i + 1} has no name in the first line and is not read")
    if separator != usual and not reading.separator and len(names) > 1:
        word = next((word for word, mark in SEPARATORS.items() if mark == separator), repr(separator))
        table.notes.append(f"columns are separated by {word} (data.separator)")
    return table


def _found_separator(text: str, usual: str) -> str:
    """The one by which the first line has the most fields, and the next lines as many."""
    sample = "".join(line for line, _ in zip(io.StringIO(text, newline="\n"), range(60)))
    best, most = usual, 1
    for mark in (usual, *(mark for mark in SEPARATORS.values() if mark != usual)):
        widths = [len(row) for row in csv.reader(io.StringIO(sample, newline="\n"), delimiter=mark) if row]
        if widths and widths[0] > most and sum(width == widths[0] for width in widths) >= 0.8 * len(widths):
            best, most = mark, widths[0]
    return best


Rows = list[tuple[int, list[str]]]


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
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    found: Rows = []

    def read(**more: Any) -> Rows:
        found.clear()
        reader = csv.reader(io.StringIO(text, newline="\n"), strict=True, delimiter=separator, **more)
        found.extend((reader.line_num, row) for row in reader if row)
        return found

    try:
        return read()
    except csv.Error as error:
        after = found[-1][0] if found else 0
        if '\\"' in text:  # databases write a quote inside of a quoted cell so
            with contextlib.suppress(csv.Error):
                if _fits(read(escapechar="\\", doublequote=False)):
                    return found
        raise DataError(
            f"{where}: after line {after}: not valid CSV: {error}; if quotes are part of the texts: data.quotes=false"
        ) from error


# -- plain text ----------------------------------------------------------------------------------------


def parts_of(text: str, sample_by: str) -> list[str]:
    """The texts of a ``.txt`` file, empty ones left out.

    >>> parts_of("a\\nb\\n\\nc\\n", "paragraph")
    ['a\\nb', 'c']
    """
    if sample_by == "document":
        parts = [text.strip("\n")]
    elif sample_by == "paragraph":
        parts = [part.strip("\n") for part in text.replace("\r\n", "\n").split("\n\n")]
    else:
        parts = [line.rstrip("\r") for line in text.split("\n")]
    return [part for part in parts if part.strip()]


# -- Parquet, Arrow, save_to_disk ----------------------------------------------------------------------


def _read_arrow(where: str, data: bytes, suffix: str) -> Table:
    import pyarrow
    import pyarrow.parquet

    kind = "Arrow" if suffix in _ARROW else "Parquet"
    try:
        source = pyarrow.BufferReader(data)
        if suffix not in _ARROW:
            read = pyarrow.parquet.read_table(source)
        elif data[:6] == b"ARROW1":
            read = pyarrow.ipc.open_file(source).read_all()
        else:
            read = pyarrow.ipc.open_stream(source).read_all()
    except (pyarrow.ArrowException, ValueError, OSError) as error:
        raise DataError(f"{where}: not a {kind} file: {str(error).splitlines()[0]}") from error
    return Table(_as_written(_named_classes(read.to_pydict(), _features(read.schema))))


def _as_written(table: Columns) -> Columns:
    """Decimals as numbers and dates as text, which is how they stand in a CSV."""
    for name, values in table.items():
        first = next((value for value in values if value is not None), None)
        if isinstance(first, Decimal):
            table[name] = [None if v is None else int(v) if v == v.to_integral_value() else float(v) for v in values]
        elif isinstance(first, (date, time)):  # a datetime is a date
            table[name] = [None if v is None else v.isoformat() for v in values]
    return table


def _features(schema: Any) -> dict[str, Any]:
    """What `datasets` wrote beside the columns: names of classes, say."""
    if b"huggingface" not in (schema.metadata or {}):
        return {}
    from datasets import Features

    return dict(Features.from_arrow_schema(schema))


def _named_classes(table: Columns, features: dict[str, Any]) -> Columns:
    """Classes by their names where the data has them; -1 stands for none."""
    for name, feature in features.items():
        if type(feature).__name__ == "ClassLabel" and name in table:
            words = feature.names
            table[name] = [None if i is None or i < 0 else words[i] for i in table[name]]
    return table


def _read_saved(where: str, folder: Path, split: str) -> Table:
    from datasets import DatasetDict, load_from_disk

    try:
        found = load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: cannot be read as a save_to_disk folder: {str(error).splitlines()[0]}") from error
    if isinstance(found, DatasetDict):
        if split not in found:
            raise DataError(f"{where}: has no {split} split; it has {', '.join(found)}; name one of its folders")
        table = from_dataset(found[split])
        if others := [name for name in found if name != split]:
            table.notes.append(f"{folder.name} also holds {', '.join(others)} (data.hub={str(folder)!r} takes all)")
        return table
    return from_dataset(found)


def from_dataset(part: Any) -> Table:
    """A split of `datasets` as a table; images stay encoded, classes go by their names."""
    from datasets import Image

    for column, feature in part.features.items():
        if isinstance(feature, Image):
            part = part.cast_column(column, Image(decode=False))
    named = _named_classes({name: part[name][:] for name in part.column_names}, dict(part.features))
    return Table(_as_written(named))
