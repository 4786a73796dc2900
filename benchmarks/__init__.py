"""Side-by-side measurements; `make bench` runs them all, `benchmarks/README.md` shows what came out."""
