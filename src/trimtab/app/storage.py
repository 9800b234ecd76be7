"""A folder on a disk: one process at work in it at a time, and what the disk refuses as one line."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ..errors import ConfigError, TrimtabError
from ..train.checkpoint import last_checkpoint

if TYPE_CHECKING:
    from .runfolder import RunFolder

LOCK = ".lock"
_STORAGE = tuple(
    number
    for name in ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENOTDIR", "ENAMETOOLONG", "ESTALE")
    if (number := getattr(errno, name, None)) is not None
)


@contextlib.contextmanager
def alone(path: Path, key: str = "output_dir", patience: float = 0.0) -> Iterator[IO[str] | None]:
    """Nobody else is at work in a folder: a lock that ends with the process, even one that is killed.

    Yields the lock's file, for processes that are to hold it too; None where the system has no such locks.

    Args:
        patience: seconds to wait for others that are about to end.
    Raises:
        ConfigError: another process is at work; the message names it.
    """
    made = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # Windows
        yield None
        return
    file = path / LOCK
    until = time.monotonic() + patience
    while True:
        lock = file.open("a+", encoding="utf-8")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if file.exists() and os.path.samestat(os.fstat(lock.fileno()), file.stat()):
                break  # else the other one removed it between our two calls
            lock.close()
        except BlockingIOError:
            lock.seek(0)
            who = lock.read().strip() or "another process"
            lock.close()
            if time.monotonic() > until:
                raise ConfigError(
                    key, str(path), f"{who} is at work in this folder; wait for it, or name another folder"
                ) from None
            time.sleep(0.1)
    try:
        lock.truncate(0)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
        lock.write(f"process {os.getpid()} on {socket.gethostname()} ({command[:200]})\n")
        lock.flush()
        yield lock
    finally:
        file.unlink(missing_ok=True)
        lock.close()
        if made:
            with contextlib.suppress(OSError):  # a run that never began leaves no folder behind
                path.rmdir()


@contextlib.contextmanager
def telling_of_storage(folder: RunFolder) -> Iterator[None]:
    """Turns what the system and the libraries raise for a full disk, a read-only folder and the like into one line."""
    try:
        yield
    except TrimtabError:
        raise
    except Exception as error:
        fault = storage_fault(error, folder.path)
        if fault is None:
            raise
        try:
            kept = last_checkpoint(folder.checkpoints)
        except OSError:
            kept = None
        cure = f"; {Path(kept).name} is whole: mend that, then go on with --resume" if kept else ""
        raise ConfigError("output_dir", str(folder.path), f"cannot be written: {fault}{cure}") from error


def storage_fault(error: BaseException, folder: Path | None = None) -> str | None:
    """What a disk or a folder refused, where that is what an error is about; with the path where it is known.

    Serialisers that are not Python's say so in the text of errors of their own.

    Args:
        folder: the fault is one of this folder; None takes any.
    """
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        if error.filename is None:
            return error.strerror if error.errno in _STORAGE else None
        path = Path(os.fsdecode(error.filename))
        if folder is None:
            return f"{error.strerror}: {path}" if error.errno in _STORAGE else None
        return f"{error.strerror}: {path}" if folder in (path, *path.parents) else None
    if any(f"os error {number}" in text for number in _STORAGE):
        return text.partition(" (os error")[0].rpartition(": ")[2]
    if "inline_container.cc" in text or "PytorchStreamWriter" in text:
        return "a file could not be written to its end (is the disk full?)"
    return None
