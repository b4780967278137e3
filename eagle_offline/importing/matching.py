"""Which sample of a dump is which row of the corpus."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from eagle_offline.errors import DataError, MismatchError
from eagle_offline.importing.dumps import digest_values
from eagle_offline.importing.scan import DumpIndex
from eagle_offline.text.token_table import TokenTable

NO_STATES = "no states in the dump"
OTHER_MASK = "another loss mask in the dump"
AMBIGUOUS = "rows that differ in their first token alone, which the dump does not record"

CLASHING = "several states of the same tokens in the dump, which contradict each other"

_REASONS = (NO_STATES, OTHER_MASK, AMBIGUOUS, CLASHING)


def place_of(reason: str) -> int:
    """Return what stands for a reason why a row has no states, in the stead of a sample's number."""
    return -1 - _REASONS.index(reason)


@dataclass(frozen=True)
class Matching:
    """Where the states of each row of a corpus are.

    Attributes:
        place: int64 ``[rows]``: the sample's number in the dump; below 0 for none, and then ``-1 - place`` counts in
            the reasons.
        strays: int64: samples of the dump that are of no row.
        foreign: int64: samples whose token ids are not those that the loss masks beside the dump were made for.
        equals: of rows, in groups, that share several samples of the same tokens: the samples.
        clashes: pairs of such samples that contradict each other.
    """

    place: np.ndarray
    strays: np.ndarray
    foreign: np.ndarray
    equals: Mapping[tuple[int, ...], tuple[int, ...]] = field(default_factory=dict)
    clashes: Sequence[tuple[int, int]] = ()

    def reason(self, row: int) -> str | None:
        """Return why a row of the corpus has no states, None if it has some."""
        place = int(self.place[row])
        return None if place >= 0 else _REASONS[-1 - place]

    def rows_without(self) -> dict[str, np.ndarray]:
        """Return the rows that have no states, by reason."""
        found = {reason: np.flatnonzero(self.place == -1 - number) for number, reason in enumerate(_REASONS)}
        return {reason: rows for reason, rows in found.items() if len(rows)}


def match(table: TokenTable, index: DumpIndex, *, whole: bool) -> Matching:
    """Find the states of every row of a corpus.

    A row's states are a sample that begins with the same token ids, under the same loss mask: all that stands right
    of a token has no say in its states, so a sample may go on where the row was cut to the sequence length. Of several
    equal ones, rows take one each, in order, and the last one serves for the rest.

    Args:
        whole: samples that go on are not taken, of a target whose states do depend on the length of a row.
    """
    samples: dict[int, list[int]] = defaultdict(list)
    for number in np.flatnonzero(index.agrees).tolist():
        samples[int(index.ids[number])].append(number)
    first = index.dump.first_position
    place = np.full(len(table), -1, np.int64)
    begun: dict[int, tuple[int, ...]] = {}
    ambiguous: set[int] = set()
    takers: dict[tuple[int, ...], list[int]] = defaultdict(list)
    matched: set[int] = set()
    keys = np.empty(len(table), np.uint64)
    for row in range(len(table)):
        tokens = table[row]
        key = digest_values(tokens.input_ids[first:])
        keys[row] = key
        candidates = samples.get(key)
        if candidates is None:
            continue
        if whole:
            candidates = [number for number in candidates if index.num_tokens[number] == len(tokens.input_ids)]
            if not candidates:
                continue
        matched.add(key)
        start = tuple(tokens.input_ids[:first].tolist())
        if begun.setdefault(key, start) != start:
            ambiguous.add(key)
        if index.masks is not None:
            mask = digest_values(tokens.loss_mask[first:])
            candidates = [number for number in candidates if int(index.masks[number]) == mask]
            if not candidates:
                place[row] = place_of(OTHER_MASK)
                continue
        rows = takers[tuple(candidates)]
        place[row] = candidates[min(len(rows), len(candidates) - 1)]
        rows.append(row)
    if ambiguous:
        place[np.isin(keys, np.array(sorted(ambiguous), np.uint64))] = place_of(AMBIGUOUS)
    known = np.isin(index.ids, np.array(sorted(matched), np.uint64))
    equals = {tuple(rows): several for several, rows in takers.items() if len(several) > 1 and place[rows[0]] >= 0}
    return Matching(place, np.flatnonzero(index.agrees & ~known), np.flatnonzero(~index.agrees), equals)


def refuse_mismatch(matching: Matching, table: TokenTable, index: DumpIndex, *, dropped: bool) -> None:
    """Refuse a dump that is not of a corpus: all of it, or with ``dropped`` if nothing of it is.

    Raises:
        MismatchError: says how many rows and samples belong to none, and names the first. DataError: none matches.
    """
    without, total = matching.rows_without(), len(table)
    lost = sum(map(len, without.values()))
    said = [
        f"{len(rows)} of {total} rows of the corpus: {reason} (first: {_row_name(table, int(rows[0]))})"
        for reason, rows in without.items()
    ]
    for numbers, what in (
        (matching.strays, "of no row"),
        (matching.foreign, "with other tokens than --loss-masks has in the row of their number"),
    ):
        if len(numbers):
            said.append(f"{len(numbers)} of {len(index)} samples {what} (first: {index.name_of(int(numbers[0]))})")
    if matching.clashes:
        one, two = map(index.name_of, matching.clashes[0])
        said.append(f"{one} and {two} have the same tokens and other states; delete the wrong one")
    directory, hint = index.dump.directory, _hint(matching, table, index)
    if lost == total:
        raise DataError(f"{directory}: holds states of no row of the corpus; {'; '.join(said)}; {hint}")
    if said and not dropped:
        raise MismatchError(f"{directory}: {'; '.join(said)}; {hint}, or leave them out with --on-mismatch drop")


def _hint(matching: Matching, table: TokenTable, index: DumpIndex) -> str:
    if len(matching.foreign):
        return "give the dataset that the files were dumped from, and leave them the numbers they were dumped with"
    longest = int(index.num_tokens.max())
    if longest < table.meta.max_length:
        return f"no sample there has more than {longest} tokens, which may be the --seq-length to give here"
    return "give the data, template and --seq-length that they were made with"


def _row_name(table: TokenTable, row: int) -> str:
    tokens = table[row]
    return f"{table.meta.sources[tokens.source].name} row {tokens.row}"


def check_same(name: str, expected: Sequence[int] | np.ndarray, found: np.ndarray, what: str) -> None:
    """Refuse values that are not those of the row which digests said they are of.

    Raises:
        DataError: says so.
    """
    if not np.array_equal(expected, found):
        raise DataError(f"{name}: its {what} are not those of the row it was matched with; run the same command again")
