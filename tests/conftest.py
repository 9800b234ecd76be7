"""What holds for the whole suite."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> None:
    # Trainer collects garbage at every start; the libraries loaded by now are a million objects to walk each time.
    gc.collect()
    gc.freeze()
