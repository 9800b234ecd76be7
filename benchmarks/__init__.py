"""Benchmarks: one script a question, each with ``rows(short)``; see docs/performance.md."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
