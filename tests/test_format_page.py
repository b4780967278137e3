"""The reading example of `schemas/README.md` reads what the program wrote, without the program's code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.caches import small_cache
from eagle_offline.cache.reader import open_cache

PAGE = Path(__file__).parent.parent / "schemas" / "README.md"

ENDING = """
import sys
assert not [name for name in sys.modules if name.startswith("eagle_offline")]
np.save("bits.npy", bf16_bits)
"""


def test_reading_example_gives_the_stored_states(tmp_path):
    cache = small_cache(tmp_path, num_conversations=10)
    cache.rename(tmp_path / "C")
    example = PAGE.read_text().split("```python")[1].split("```")[0]
    (tmp_path / "read.py").write_text(example + ENDING)
    subprocess.run([sys.executable, "read.py"], cwd=tmp_path, check=True)
    sample = open_cache(tmp_path / "C")[0]
    width = open_cache(tmp_path / "C").manifest.identity.target.hidden_size
    import torch

    expected = sample.aux_hidden_states[:, :width].contiguous().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(np.load(tmp_path / "bits.npy"), expected)
