"""Do the methods hold what their papers say? Every row tuned alike, several tasks and seeds; see docs/evidence.md."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
"""One JSON file a run: ``TASK/ROW/NAME.json``."""
