"""The command's own process keeps freed memory; a choice of the user's stays."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or not sys.platform.startswith("linux"), reason="the settings are glibc's"
)

MIB = 2**20
PROGRAM = """
import ctypes, json, resource, sys
from trimtab.app.malloc import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
library = ctypes.CDLL(None)
library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
library.free.argtypes = [ctypes.c_void_p]
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = library.malloc(64 * 2**20)
    ctypes.memset(block, 1, 64 * 2**20)
    library.free(block)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps([kept, faults]))
"""


def kept_and_faults(how: str, **environment: str) -> tuple[bool | None, list[int]]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "LD_P"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how], env={**clean, **environment}, capture_output=True, text=True, check=True
    )
    kept, faults = json.loads(done.stdout)
    return kept, faults


def test_a_block_that_was_freed_is_taken_again_without_page_faults():
    kept, (first, *later) = kept_and_faults("keep")
    _, (_, *usual) = kept_and_faults("leave")
    assert kept
    assert first > 0 and max(later) * 10 < min(usual)


@pytest.mark.parametrize("choice", [{"MALLOC_ARENA_MAX": "2"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"}])
def test_an_allocator_that_the_environment_sets_is_left_alone(choice):
    kept, _ = kept_and_faults("keep", **choice)
    assert kept is False
