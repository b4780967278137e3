"""How long do the commands that people type most take to answer?"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.caches import small_cache
from benchmarks.harness import Figures, alternating_seconds, run_python

NAME = "startup"
QUESTION = __doc__

_HELP = "import sys; sys.argv = ['eagle-offline', '--help']; from eagle_offline.cli import main; main()"
_INSPECT = (
    "import sys; sys.argv = ['eagle-offline', 'inspect-manifest', {!r}]; from eagle_offline.cli import main; main()"
)


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return the cases; they use no device."""
    return {"cli": _measure} if device == "cpu" else {}


def _measure(repeats: int = 7) -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        cache = small_cache(Path(directory))
        seconds = alternating_seconds(
            {
                "python": lambda: run_python("pass"),
                "help": lambda: run_python(_HELP),
                "inspect": lambda: run_python(_INSPECT.format(str(cache))),
                "torch": lambda: run_python("import torch"),
            },
            repeats=repeats,
        )
    return {
        "help_over_import_torch": seconds["help"] / seconds["torch"],
        "inspect_over_import_torch": seconds["inspect"] / seconds["torch"],
        "help_seconds": seconds["help"],
        "inspect_manifest_seconds": seconds["inspect"],
        "bare_python_seconds": seconds["python"],
        "python": sys.version.split()[0],
    }
