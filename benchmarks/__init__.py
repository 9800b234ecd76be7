"""Benchmarks: one script a question, each with ``rows(short)``; see docs/performance.md."""
