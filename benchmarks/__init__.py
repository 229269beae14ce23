"""Benchmarks: one command per question, `python -m benchmarks.run QUESTION...`. See docs/performance.md."""
