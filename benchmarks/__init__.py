"""Side-by-side measurements; `make bench` runs them, `benchmarks/README.md` shows the results."""
