"""A user's own files -> one table: separated text, JSON in its many shapes, Parquet, Arrow, folders of them.

Files are read here rather than through `datasets`' loaders, so that a mistake is reported with its line,
nothing is cached in the user's home, a CSV cell stays the text that it is ("007", "1.10"), and lines end at
``\\n`` only (texts may hold Unicode line separators). What a file's bytes say goes before what its name says.
"""

from __future__ import annotations

import contextlib
import glob
import io
import os
import re
import zipfile
from collections.abc import Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from ...errors import ConfigError, DataError, did_you_mean
from ..report.words import some
from .columns import AS_FOUND, Columns, Reading, Table
from .json_rows import read_json
from .separated import read_separated

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
_ABOUT = re.compile("readme|licen[cs]e|changelog|citation|dataset_infos?|dataset_dict|state", re.I)
"""Files beside rows that tell of them."""
_FASTTEXT = re.compile(r"(?:__label__\S+[ \t]+(?!__label__)\S.*\n|\s*\n)+(?:__label__\S+[ \t]+(?!__label__)\S.*)?")


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

    A folder written by `save_to_disk` is one file here. Of a folder in which files or folders are called by a split,
    only those of this split are taken.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        if is_saved(place):
            return [place]
        inside = sorted(p for p in place.rglob("*") if p.is_file() and is_data(p))
        named = {p: split_of(p.relative_to(place)) for p in inside}
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
    is_about = _ABOUT.fullmatch(path.name.partition(".")[0])
    return not is_about and not path.name.startswith((".", "_")) and _suffix(path) in SUFFIXES


def is_saved(folder: Path) -> bool:
    """Whether `datasets`' `save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _suffix(path: Path) -> str:
    """``.csv`` of ``x.csv`` and of ``x.csv.gz``."""
    suffix = path.suffix.lower()
    return Path(path.stem).suffix.lower() if suffix in _PACKED else suffix


SPLIT = re.compile(
    r"(?<![a-z0-9])(train|training|validation|valid|val|dev|eval|evaluation|test|testing)(?:set|data)?(?![a-z])", re.I
)
"""A split's name, as a word of a file's."""


def split_of(path: str | Path) -> str | None:
    """The split by a file's path: a folder that is called so, else a word of the file's name, else of a folder's.

    >>> [split_of(path) for path in ("test/pos/my_train.txt", "my_train.csv", "dev-set/a.csv", "trained.csv")]
    ['test', 'train', 'validation', None]
    >>> [split_of(path) for path in ("trainset.csv", "testdata.csv", "eval.csv", "retrieval.csv")]
    ['train', 'test', 'validation', None]
    """
    *folders, name = Path(path).parts
    words = [*filter(SPLIT.fullmatch, folders), name, *folders]
    found = next((found[1].lower() for word in words if (found := SPLIT.search(word))), None)
    other = dict.fromkeys(("valid", "val", "dev", "eval", "evaluation"), "validation")
    other |= {"training": "train", "testing": "test"}
    return other.get(found, found) if found else None


def is_lines(file: Path) -> bool:
    """Whether a file may be lines of text: ``.txt``, packed or not."""
    suffix = _suffix(file)
    if not suffix and file.suffix.lower() == ".zip" and file.is_file():
        with contextlib.suppress(OSError, zipfile.BadZipFile), zipfile.ZipFile(file) as archive:
            suffix = next((_suffix(Path(name)) for name in _rows_in(archive)), "")
    return suffix == ".txt"


# -- reading -------------------------------------------------------------------------------------------


def read_files(key: str, files: Sequence[Path], reading: Reading = AS_FOUND) -> Table:
    """The rows of several files, one after the other; a column that one of them lacks is None there."""
    table = read_file(key, files[0], reading)
    n = _length(table)
    if len(files) > 1:
        within = os.path.commonpath([file.absolute().parent for file in files])
        names = [str(file.absolute().relative_to(within)) for file in files]
        table.notes.append(f"read from {len(files)} files: {some(names, 6)}")
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
        data, name = _unpacked(where, file.read_bytes())
    except OSError as error:
        raise DataError(f"{where}: cannot be read: {error.strerror or error}") from error
    suffix = suffix or _suffix(Path(name))
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
            table = Table(read_json(where, text, key.rpartition(".")[2], by_line=suffix in (".jsonl", ".ndjson")))
        else:
            table = read_separated(where, text, suffix, reading)
    if not table or not _length(table):
        raise DataError(f"{where}: holds no rows" + (" below the first line, which names the columns" if table else ""))
    return table


def _rows_in(archive: zipfile.ZipFile) -> list[str]:
    return [name for name in archive.namelist() if is_data(Path(name)) and not name.startswith("__MACOSX")]


def _unpacked(where: str, data: bytes) -> tuple[bytes, str]:
    """What is packed, and its name if it has one of its own."""
    kind = next((kind for mark, kind in _PACKED_BYTES.items() if data.startswith(mark)), None)
    if kind is None:
        return data, ""
    import bz2
    import gzip
    import lzma
    import zlib

    try:
        if kind == "zip":
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                if "xl/workbook.xml" in archive.namelist():
                    raise DataError(f"{where}: is an Excel workbook; save it as CSV (UTF-8)")
                inside = _rows_in(archive)
                if len(inside) != 1:
                    held = ", ".join(archive.namelist()[:4])
                    raise DataError(f"{where}: a zip archive must hold one file of rows; this one holds {held}")
                return archive.read(inside[0]), inside[0]
        if kind == "zstd":
            import pyarrow

            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), "zstd") as stream:
                return stream.read(), ""
        return {"gzip": gzip, "bz2": bz2, "xz": lzma}[kind].decompress(data), ""  # type: ignore[attr-defined]
    except (OSError, EOFError, ValueError, lzma.LZMAError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{where}: is packed as {kind}, and damaged or cut short: {error}") from error
    except RuntimeError as error:  # a password, or a method of packing that Python does not know
        raise DataError(
            f"{where}: is packed as {kind} and cannot be unpacked here ({error}); unpack it first"
        ) from error


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
        elif isinstance(getattr(feature, "feature", None), Image):  # a list of them
            part = part.cast_column(column, type(feature)(Image(decode=False)))
    named = _named_classes({name: part[name][:] for name in part.column_names}, dict(part.features))
    return Table(_as_written(named))
