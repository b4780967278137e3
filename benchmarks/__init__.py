"""One file per question; `benchmarks.harness` runs them and writes rows to `benchmarks/results/`."""
