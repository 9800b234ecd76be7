"""Which model an adapter belongs to, in words that another machine understands."""

from __future__ import annotations

import json
import re
from pathlib import Path

_SNAPSHOT = re.compile(r".*/models--([^/]+)/snapshots/([0-9a-f]{40})/?")


def name_base(folder: Path, model: str | None = None, revision: str | None = None) -> str | None:
    """Writes the base model's hub id into a folder's ``adapter_config.json``, and its revision where that is known.

    A folder of the hub's cache says which it is. The name in another folder's ``config.json`` does not count: it is
    what the weights once began from, not what they are (all-MiniLM-L6-v2 names the MiniLM that it was trained from).

    Args:
        model: the base model's hub id, where the user says it.
        revision: of the base model.
    Returns:
        The hub id; None where the file names a folder that nobody else has, or nothing.
    """
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    known = config.get("base_model_name_or_path")
    if model is None and known:
        if found := _SNAPSHOT.fullmatch(Path(known).absolute().as_posix()):
            model, revision = found[1].replace("--", "/"), found[2]
        elif not Path(known).expanduser().exists() and not Path(known).is_absolute():
            model = known
    if model is None:
        return None
    changed = config | {"base_model_name_or_path": model, "revision": config.get("revision") or revision}
    if changed != config:
        path.write_text(json.dumps(changed, indent=2, sort_keys=True), encoding="utf-8")
    return model
