"""Whether the hub can be reached, so that libraries need not try for half a minute to find out."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import urlsplit
from urllib.request import getproxies


@contextmanager
def offline_without_hub() -> Iterator[None]:
    """Libraries look into their caches alone where the hub cannot be reached: they would try six times for each file,
    half a minute in all, to say so. Behind a proxy only they can tell."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or getproxies() or _reaches(constants.ENDPOINT, int(time.monotonic()) // 60):
        yield
        return
    datasets = sys.modules.get("datasets")
    places = [constants, *([datasets.config] if datasets is not None else [])]
    try:
        for place in places:
            place.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for place in places:
            place.HF_HUB_OFFLINE = False  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def _reaches(endpoint: str, minute: int) -> bool:
    """Whether somebody listens there. Asked once a minute."""
    place = urlsplit(endpoint)
    try:
        port = place.port or (80 if place.scheme == "http" else 443)
        socket.create_connection((place.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
