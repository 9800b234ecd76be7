"""What holds for the whole suite."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def cheap_collections() -> None:
    # Trainer collects garbage at every start; the libraries loaded by now are a million objects to walk each time.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_terminal_summary(terminalreporter, config) -> None:
    """The table of faults, where those are what was asked for: a row a test, which says what is done."""
    if config.getoption("-m") != "fault":
        return
    rows: dict[str, list[int]] = {}
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.getreports(outcome):
            if report.when == "call" or outcome == "skipped":
                name = report.nodeid.rpartition("::")[2].partition("[")[0].removeprefix("test_").replace("_", " ")
                row = rows.setdefault(name, [0, 0, 0])
                row[("passed", "failed", "skipped").index(outcome)] += 1
    terminalreporter.section("faults")
    for name, (passed, failed, skipped) in sorted(rows.items()):
        more = f", {failed} FAILED" * bool(failed) + f", {skipped} skipped" * bool(skipped)
        terminalreporter.write_line(f"{passed:3} passed{more}  {name}")
