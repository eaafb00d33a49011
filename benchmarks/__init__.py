"""``pytest benchmarks --benchmark-json=out.json``; ``python -m benchmarks.report out.json``."""
