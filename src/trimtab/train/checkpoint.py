"""What resume needs beyond a plain checkpoint, and how a complete checkpoint is told from a torn one.

`trim_state.safetensors` holds tensors (raw factors, windows, score averages), `trim_state.json` the facts
and the checksums of every file that was in the folder when it was written. Both are written atomically and
before `trainer_state.json`, which is the mark of a complete checkpoint. No pickle of ours anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

STATE_TENSORS = "trim_state.safetensors"
STATE_FACTS = "trim_state.json"
COMPLETE = "trainer_state.json"
_FORMAT = 1
# Other processes may still be writing these while process 0 takes the checksums.
_NOT_CHECKED = re.compile(r"rng_state_\d+\.pth|trim_state\..*|trainer_state\.json")


def write_state(folder: str | Path, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write `trim_state.*` into a checkpoint folder, with checksums of the files beside them."""
    from safetensors.torch import save

    folder = Path(folder)
    data = save({k: v.contiguous().cpu() for k, v in tensors.items()}, metadata={"format": "pt"})
    files = {p.name: _checksum(p) for p in sorted(folder.iterdir()) if p.is_file() and not _NOT_CHECKED.match(p.name)}
    facts = {"format": _FORMAT, **facts, "files": files, "tensors": hashlib.sha256(data).hexdigest()}
    facts["facts"] = _checksum_of_facts(facts)
    _write_atomically(folder / STATE_TENSORS, data)
    _write_atomically(folder / STATE_FACTS, json.dumps(facts, indent=1).encode())


def read_state(folder: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors and facts of a checkpoint.

    Raises:
        CheckpointError: what is missing or damaged, and the newest complete checkpoint beside it.
    """
    from safetensors.torch import load

    folder = Path(folder)
    fault = what_is_wrong(folder)
    if fault:
        raise CheckpointError(f"checkpoint {str(folder)!r}: {fault}{_offer(folder)}")
    return load((folder / STATE_TENSORS).read_bytes()), read_facts(folder)


def read_facts(folder: str | Path) -> dict[str, Any]:
    """Facts of a complete checkpoint, without its tensors."""
    return json.loads((Path(folder) / STATE_FACTS).read_text())


def what_is_wrong(folder: str | Path) -> str | None:
    """None for a complete checkpoint, else the reason it cannot be resumed from, in words."""
    folder = Path(folder)
    if not folder.is_dir():
        return "no such folder"
    try:
        json.loads((folder / COMPLETE).read_text())
    except FileNotFoundError:
        return f"{COMPLETE} is missing: the checkpoint was not finished"
    except ValueError:
        return f"{COMPLETE} is cut short"
    if not (folder / STATE_FACTS).exists():
        return f"{STATE_FACTS} is missing: it was not written by a run with TrimCallback, or with save_only_model"
    try:
        facts = json.loads((folder / STATE_FACTS).read_text())
        expected = {**facts["files"], STATE_TENSORS: facts["tensors"]}
    except (ValueError, KeyError, TypeError):
        return f"{STATE_FACTS} is damaged"
    if facts.get("format") != _FORMAT:
        return f"{STATE_FACTS} has format {facts.get('format')}, this version reads {_FORMAT}"
    if facts.get("facts") != _checksum_of_facts(facts):
        return f"{STATE_FACTS} does not have the checksum it was saved with"
    for name, checksum in expected.items():
        if Path(name).name != name:
            return f"{STATE_FACTS} names a file of another folder: {name!r}"
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if _checksum(path) != checksum:
            return f"{name} does not have the checksum it was saved with"
    for process in range(facts["processes"] if facts.get("processes", 1) > 1 else 0):
        name = f"rng_state_{process}.pth"
        if not _is_whole_archive(folder / name):
            return f"{name} is missing or damaged"
    return None


def _is_whole_archive(path: Path) -> bool:
    """Whether a file of `torch.save` is all there, by the checksums inside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile):
        return False


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The newest complete checkpoint in a Trainer's ``output_dir``, or None.

    Trainer's own search takes the highest number, complete or not.
    """
    return next((str(p) for p in checkpoints(output_dir) if what_is_wrong(p) is None), None)


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Checkpoint folders of a Trainer's ``output_dir``, complete or not, newest first."""
    found = [p for p in Path(output_dir).glob("checkpoint-*") if p.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda p: -int(p.name.removeprefix("checkpoint-")))


def make_newest(folder: Path) -> None:
    """Let a checkpoint be the newest by time beside the others: Trainer deletes by time, and where the clock went back
    (or the folder was copied) that would be the one that it has just written."""
    step = int(folder.name.rpartition("-")[2])
    steps = {p: int(p.name.rpartition("-")[2]) for p in checkpoints(folder.parent) if p.name != folder.name}
    now = folder.stat().st_mtime
    if not any(p.stat().st_mtime >= now for p in steps):
        return
    # Those of later steps are what is left of a run that is trained again from an earlier one.
    for age, other in enumerate(sorted(steps, key=lambda p: (steps[p] < step, steps[p]), reverse=True), start=2):
        os.utime(other, (now - age, now - age))


def _offer(folder: Path) -> str:
    best = last_checkpoint(folder.parent)
    return f". The newest complete one is {best!r}." if best else ". There is no complete checkpoint beside it."


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


def _checksum_of_facts(facts: dict[str, Any]) -> str:
    rest = {key: value for key, value in facts.items() if key != "facts"}
    text = json.dumps(json.loads(json.dumps(rest)), sort_keys=True)  # as read back: there all keys are text
    return hashlib.sha256(text.encode()).hexdigest()


def _write_atomically(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
