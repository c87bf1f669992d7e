"""One script per claim: `python -m benchmarks.NAME`; see docs/benchmarks.md."""
