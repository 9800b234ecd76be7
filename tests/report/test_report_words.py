"""Every example in the docstrings of the report holds."""

from __future__ import annotations

import doctest
from types import ModuleType

import pytest

from trimtab.app.report import comparing, runfolder, words


@pytest.mark.parametrize("module", [words, runfolder, comparing], ids=lambda m: m.__name__)
def test_examples_in_docstrings_hold(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
