"""``python -m benchmarks.run NAME… | --all [--device cuda]``."""

from benchmarks.harness import main

main()
