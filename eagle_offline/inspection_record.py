"""What is known of a cache without its target: the record that `inspect-manifest --json` prints."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from eagle_offline.cache.layout import Frozen
from eagle_offline.cache.manifest import Manifest


class ShardRange(Frozen):
    """Shard numbers from ``first`` to ``last``, both included."""

    first: int
    last: int


class Shards(Frozen):
    """How many shards there are to be, how many are there, and the first ranges of those that are not."""

    total: int
    committed: int
    missing_ranges: list[ShardRange]


class RunStatus(Frozen):
    """How the last run of a process ended, by its ``status.json``."""

    file: str
    state: Literal["done", "failed", "resumable", "unreadable"]
    exit_code: int | None
    why: str


class SizePart(Frozen):
    """What takes room, how much, and its share of the cache."""

    name: str
    num_bytes: int
    share: float


class LengthBar(Frozen):
    """How many samples have ``from`` to ``to`` tokens, both included."""

    from_: int = Field(alias="from")
    to: int
    samples: int


class SampleFacts(Frozen):
    """A sample: its number in the cache, its row of the token table, its tokens and how many are supervised."""

    index: int
    sample_id: int
    num_tokens: int
    num_supervised: int


class Extremes(Frozen):
    """The samples at either end."""

    longest: SampleFacts
    shortest: SampleFacts
    most_supervised: SampleFacts
    least_supervised: SampleFacts


class VocabularyFacts(Frozen):
    """What the draft vocabulary holds.

    Attributes:
        size, digest: of the vocabulary.
        supervised_tokens_share: of the corpus's supervised tokens, how many are in it.
        argmax_share: of the supervised positions, at how many the target's choice is in it; None when not known.
        mass_share: the target's probability inside it, mean over supervised positions; None when not known.
        note: why a share is not known.
    """

    size: int
    digest: str
    supervised_tokens_share: float
    argmax_share: float | None
    mass_share: float | None
    note: str | None


class FieldFacts(Frozen):
    """How a float field is stored and what that costs.

    Attributes:
        name, rows, width, dtype, encoding: as in the manifest.
        values, stored_bytes, bits_per_value: over all shards that are there.
        exact: every value comes back as the target computed it in ``dtype``.
        losses: what its values have lost, in order.
        relative_rms_error: ``sqrt(Σ (x̂ − x)² / Σ x²)`` of this cache's own encoding; None when exact or not recorded.
            Of a conversion it is that of the last step, against the cache that it was made from.
    """

    name: str
    rows: str
    width: int
    dtype: str
    encoding: str
    values: int
    stored_bytes: int
    bits_per_value: float | None
    exact: bool
    losses: list[str]
    relative_rms_error: float | None


class LeftOut(Frozen):
    """A row that is not in the cache: why, and where it stands in the input."""

    reason: str
    file: str | None
    row: int | None
    detail: str | None


class Quarantine(Frozen):
    """Input rows that never became samples; ``rows``, ``shortened`` and ``file`` are None where nothing is recorded.

    Attributes:
        rows: how many; reasons: how many for which reason.
        shortened: samples cut to the sequence length.
        examples: one a reason, as far as the start of the list has one.
        file: the whole list, inside the cache.
    """

    rows: int | None
    reasons: dict[str, int]
    shortened: int | None
    examples: list[LeftOut]
    file: str | None


class Example(Frozen):
    """A stretch of one sample.

    Attributes:
        sample: which one; file, row: where it stands in the input, None when that is not known.
        first_token: where in the sample the stretch begins.
        token_ids, loss_mask: of the stretch.
        tokens: its text, a piece a token; None when there is no reading it.
        problem: why there is no text, or no token.
    """

    sample: SampleFacts
    file: str | None
    row: int | None
    first_token: int
    token_ids: list[int]
    loss_mask: list[int]
    tokens: list[str] | None
    problem: str | None


class Inspection(Frozen):
    """Everything `inspect-manifest` knows of a cache.

    Attributes:
        path: the cache's directory, as given.
        begun_at: when ``manifest.json`` was last written, UTC.
        complete: every shard is there.
        last_runs: how they ended, one a process.
        supervised_tokens, target_positions: ``Σ m_t``, and positions with a stored target.
        lost_in_capture: samples that capture could not store, by reason; lost_examples: one a reason.
        shard_bytes, companion_bytes: as recorded; bytes_per_token: of shards.
        column_bytes, raw_field_bytes: by column as stored, and by field as it would be without encoding.
        raw_states_bytes: bf16 states of every layer at every position; share_of_raw_states: shards over that.
        parts: what takes room.
        free_bytes: on the disk where it lies; None for an object store.
        problems: what is wrong, one line each.
    """

    path: str
    identity_digest: str
    begun_at: str
    manifest: Manifest
    complete: bool
    shards: Shards
    last_runs: list[RunStatus]
    samples: int
    tokens: int
    supervised_tokens: int
    target_positions: int
    extremes: Extremes | None
    length_histogram: list[LengthBar]
    shard_bytes: int
    companion_bytes: int
    bytes_per_token: float | None
    column_bytes: dict[str, int]
    raw_field_bytes: dict[str, int]
    raw_states_bytes: int
    share_of_raw_states: float | None
    parts: list[SizePart]
    free_bytes: int | None
    draft_vocabulary: VocabularyFacts
    fields: list[FieldFacts]
    quarantine: Quarantine
    lost_in_capture: dict[str, int]
    lost_examples: list[LeftOut]
    example: Example | None
    problems: list[str]
