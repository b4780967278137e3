"""``python -m benchmarks.run NAME… | --all [--device cuda]``."""

from benchmarks.harness import main

# Cases may start processes that import this module again.
if __name__ == "__main__":
    main()
