"""Images as rows bring them -> encoded data (PNG, JPEG, …), and encoded data -> pixels.

A row names a file, holds the data itself (bytes, base64, the hub's ``{bytes, path}``), or shares an image with others
by its id. Data that is no image is found as it is read, so that a message names the row of the file.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from ...errors import DataError
from .columns import Columns
from .data import column, existing_file, is_missing, read_file

ENCODED = ("png_base64", "image_base64")
"""Columns of base64, which name no files."""
PICTURES = ("image", "images", "image_path", "image_file", "img", "img_path", "file_name")
"""Columns of files' names, data, or either."""
SHARED = "image_id"


def read_images(
    table: Columns, split: str, source: str, place: str | None, rows: Sequence[Path]
) -> tuple[str | None, list[bytes | None]]:
    """The column that images stand in, and each row's image as data; None of a row without.

    Args:
        place: ``task.images``: the folder of the files, or the file of shared images.
        rows: files of the rows, beside which images are looked for.
    Raises:
        DataError: an image that is not there, or is none, by its row.
    """
    for name in (*ENCODED, *PICTURES, SHARED):
        if name not in table or all(map(is_missing, map(_alone, table[name]))):
            continue
        wheres = [f"{source}: row {i}" for i in range(1, len(table[name]) + 1)]
        if name in ENCODED:
            return name, [_checked(_decoded(*one), one[1]) for one in zip(table[name], wheres)]
        if name != SHARED:
            folders = [Path(place).expanduser()] if place else list(dict.fromkeys(file.parent for file in rows))
            return name, [image_of(value, folders or [Path()], where) for value, where in zip(table[name], wheres)]
        shared = _shared(place, split, rows, source)
        for key, where in zip(table[name], wheres):
            if key is not None and str(key) not in shared:
                raise DataError(f"{where} names image {key!r}, which the file of images does not have")
        return name, [None if key is None else shared[str(key)] for key in table[name]]
    return None, [None] * len(next(iter(table.values())))


def _alone(value: Any) -> Any:
    """What a cell holds, of a list or object what is in it."""
    if isinstance(value, Mapping):
        return next((value[key] for key in ("bytes", "base64", "path", "url", "image") if value.get(key)), None)
    if isinstance(value, (list, tuple)):
        return _alone(value[0]) if len(value) == 1 else value or None
    return value or None if isinstance(value, bytes) else value


def image_of(value: Any, folders: Sequence[Path], where: str) -> bytes | None:
    """An image's data, from data (bytes, base64, too) or from the name of a file in one of the folders."""
    value = _alone(value)
    if is_missing(value):
        return None
    if isinstance(value, bytes):
        return _checked(value, where)
    if isinstance(value, list) and all(isinstance(one, (str, bytes, Mapping)) for one in value):
        raise DataError(f"{where} has {len(value)} images; one a row is read: join them into one, or give each a row")
    if not isinstance(value, str):
        raise DataError(f"{where} has a {type(value).__name__} for an image, where a file's name is needed")
    if value.startswith("data:"):
        return _checked(_decoded(value, where), where)
    if (scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+)://", value)) and scheme[1].lower() != "file":
        raise DataError(f"{where} names the address {_short(value)}; images are not fetched: give it as a file")
    name = unquote(value[len("file://") :]) if scheme else value
    names = dict.fromkeys((name, name.replace("\\", "/")))
    found = [file for folder in folders for one in names if _is_file(file := folder / one)]
    if not found and re.fullmatch(r"[A-Za-z0-9+/_\s-]{64,}=*\s*", value):
        return _checked(_decoded(value, where), where)
    if not found:
        called = _short(str(folders[0] / name))
        raise DataError(f"{where} names the image {called}, which is not there; task.images names the folder")
    try:
        data = {file.read_bytes(): file for file in found}
    except OSError as error:
        raise DataError(f"{where} names the image {str(found[0])!r}, which cannot be read: {error.strerror}") from error
    if len(data) > 1:
        several = " and ".join(str(file.parent) for file in data.values())
        raise DataError(
            f"{where} names the image {value!r}, and another one is called so, too ({several}); put the folder before "
            "the names, and name in task.images where they begin"
        )
    return _checked(next(iter(data)), where, str(found[0]))


def _is_file(file: Path) -> bool:
    try:
        return file.is_file()
    except (OSError, ValueError):  # too long for a name
        return False


def _short(text: str) -> str:
    return repr(text if len(text) <= 200 else f"{text[:100]}…{text[-60:]}")


def _shared(place: str | None, split: str, rows: Sequence[Path], source: str) -> dict[str, bytes]:
    """Images by their id."""
    if place is None:
        if not rows:
            raise DataError(f"{source}: has image_id; name the file of images in task.images")
        place = str(rows[0].with_name(f"{rows[0].stem}_images{rows[0].suffix}"))
    file = existing_file("task.images", place)
    where = f"task.images={str(place)!r}"
    table = read_file("task.images", file)
    keys, values = (column(table, name, where, where) for name in (SHARED, ENCODED[0]))
    found = {}
    for i, (key, value) in enumerate(zip(keys, values), 1):
        if (data := _checked(_decoded(value, f"{where}: row {i}"), f"{where}: row {i}")) is None:
            raise DataError(f"{where}: row {i} has no image")
        found[str(key)] = data
    return found


def _decoded(value: Any, where: str) -> bytes | None:
    """Data from base64, of either alphabet, also with ``data:…,`` before it."""
    if is_missing(value):
        return None
    try:
        text = re.sub(r"^data:[^,]*,|\s", "", value)
        return base64.b64decode(text.translate(str.maketrans("-_", "+/")), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise DataError(f"{where}: its image is not base64: {error}") from error


def _checked(data: bytes | None, where: str, name: str = "") -> bytes | None:
    """The data, if it begins as an image does; its pixels are not read yet."""
    from PIL import Image

    if data is None:
        return None
    called = f"its image {name!r}" if name else "its image"
    try:
        with Image.open(io.BytesIO(data)) as image:
            mode, kind = image.mode, image.format
    except Exception as error:  # Pillow raises nearly anything
        raise DataError(f"{where}: {called} cannot be read: {_what_it_is(data, error)}") from error
    if mode == "F" or (mode == "I" and kind != "PNG"):
        raise DataError(
            f"{where}: {called} has 32 bits a pixel, and nothing says which values are black and white; save it with "
            "8 bits a channel"
        )
    return data


def _what_it_is(data: bytes, error: Exception) -> str:
    from PIL import UnidentifiedImageError

    if not isinstance(error, UnidentifiedImageError):
        return " ".join(str(error).split())
    if data.startswith(b"version https://git-lfs."):
        return "it is a Git LFS pointer; fetch the images: git lfs pull"
    return f"it is of no kind that Pillow knows, and begins with {data[:24]!r}" if data else "it is empty"


def pixels_of(data: bytes, where: str) -> Any:
    """The image in RGB, upright (as its EXIF data says), of 16 bits a channel the upper 8; the first of several.

    As transformers' `load_image`, which makes 16 bits white wherever they are above 255.
    """
    import numpy as np
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as opened:
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I"):
                image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
            return image.convert("RGB")
    except Exception as error:  # Pillow raises nearly anything
        raise DataError(f"{where}: its image cannot be read: {_what_it_is(data, error)}") from error
