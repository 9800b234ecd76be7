"""The performance page's tables are the benchmarks' own results."""

from __future__ import annotations

from benchmarks.tables import PAGE, filled


def test_every_table_of_the_page_is_what_the_result_files_say():
    page = PAGE.read_text()
    assert page == filled(page), "run: python -m benchmarks.tables"
