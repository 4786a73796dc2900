"""Measurements side by side; `make bench` runs all, `benchmarks/README.md` shows what came out."""
