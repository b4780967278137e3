"""Several samples of a dump that are of the same tokens: they have to say the same."""

from __future__ import annotations

from dataclasses import replace

import torch

from eagle_offline.importing.dumps import DumpedSample
from eagle_offline.importing.matching import CLASHING, Matching, place_of
from eagle_offline.importing.scan import DumpIndex
from eagle_offline.text.token_table import TokenTable

# How far states in bf16 may be apart that were computed twice, in other batches or by another engine: they are by a
# percent or two, another layer's or another target's by far more.
MAX_ERROR = 0.1


def without_clashes(matching: Matching, table: TokenTable, index: DumpIndex) -> Matching:
    """Take the states from rows that have several samples of the same tokens which contradict each other.

    Which of them is right nothing says, so none is taken. Samples in files of the same bytes are not read.

    Raises:
        DataError: states cannot be read, or were changed.
    """
    place, clashes = matching.place.copy(), []
    for rows, samples in matching.equals.items():
        found = [(samples[0], other) for other in samples[1:] if _clash(index, samples[0], other, table, rows[0])]
        if found:
            clashes += found
            place[list(rows)] = place_of(CLASHING)
    return replace(matching, place=place, clashes=clashes)


def _clash(index: DumpIndex, one: int, two: int, table: TokenTable, row: int) -> bool:
    files = index.file[[one, two]].tolist()
    if index.digests[files[0]] == index.digests[files[1]] and index.row[one] == index.row[two]:
        return False
    num_tokens = len(table[row].input_ids)
    ours, theirs = (_states(index.read(number, num_tokens, torch.arange(num_tokens))) for number in (one, two))
    both = ours.isfinite() & theirs.isfinite()
    if not torch.equal(ours.isfinite(), theirs.isfinite()):
        return True
    ours, theirs = ours.where(both, 0), theirs.where(both, 0)
    # Layer by layer: later ones are larger by far.
    lost, size = (ours - theirs).square().sum(dim=(1, 2)), theirs.square().sum(dim=(1, 2))
    return bool((lost > MAX_ERROR**2 * size).any())


def _states(sample: DumpedSample) -> torch.Tensor:
    """Return float32 ``[layers, T, H]``: all states of a sample."""
    last = [] if sample.last_hidden_state is None else [sample.last_hidden_state]
    return torch.stack([states.float() for states in [*sample.aux_hidden_states, *last]])
