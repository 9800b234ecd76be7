"""What a table of cases marks."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that adds breadth alone: for `make test-all`."""
    return pytest.param(*values, marks=pytest.mark.slow)
