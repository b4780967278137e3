"""Accept lengths: the average over slots, and the walk that greedy decoding takes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline import simulated_accept_length
from eagle_offline.alignment import SlotBatch
from eagle_offline.objectives.acceptance import expected_accept_length, walk_answers, walked_accept_length
from eagle_offline.objectives.ttt import UnrollSums
from tests.oracles import acceptance as oracle


def walk(hits: list[list[bool]], valid: list[bool], documents: list[int]) -> tuple[int, int]:
    num_slots = len(documents)
    tokens, rounds = walked_accept_length(
        torch.tensor(hits, dtype=torch.bool).reshape(len(hits), num_slots),
        torch.tensor(valid, dtype=torch.bool),
        torch.tensor(documents, dtype=torch.int64),
    )
    return int(tokens), int(rounds)


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[bool]], list[bool], list[int]]:
    """Hits [K][T], validity [T] and document ids [T] of a few documents followed by padding."""
    lengths = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))
    padding = draw(st.integers(0, 3))
    num_steps = draw(st.integers(1, 4))
    documents = [d for d, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    flags = st.lists(st.sampled_from([True, True, False]), min_size=len(documents), max_size=len(documents))
    valid = [v and d >= 0 for v, d in zip(draw(flags), documents, strict=True)]
    hits = [[h and d >= 0 for h, d in zip(draw(flags), documents, strict=True)] for _ in range(num_steps)]
    return hits, valid, documents


@pytest.mark.parametrize(
    ("hits", "valid", "expected"),
    [
        ([3, 2, 1], [4, 4, 4], 2.5),
        ([0, 0], [5, 5], 1.0),
        ([5, 5], [5, 5], 3.0),
        ([0, 0], [0, 0], 1.0),
        ([2, 0], [4, 0], 1.5),
        ([3, 1], [4, 2], 2.25),
    ],
)
def test_simulated_length_is_one_plus_the_share_right_up_to_each_step(
    hits: list[int], valid: list[int], expected: float
) -> None:
    assert float(simulated_accept_length(torch.tensor(hits), torch.tensor(valid))) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_simulated_length_lies_between_one_and_one_more_than_the_steps(pairs: list[tuple[int, int]]) -> None:
    valid = [max(pair) for pair in pairs]
    hits = [min(pair) for pair in pairs]
    found = float(simulated_accept_length(torch.tensor(hits), torch.tensor(valid)))
    assert found == pytest.approx(oracle.simulated_accept_length(hits, valid), rel=1e-6)
    assert 1 <= found <= (len(pairs) + 1) * (1 + 1e-6)


@given(rows())
@settings(max_examples=150, deadline=None)
def test_walk_equals_the_walk_slot_by_slot(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    assert walk(*row) == oracle.walked_accept_length(*row)


@given(rows())
@settings(max_examples=60, deadline=None)
def test_a_round_yields_between_one_token_and_one_more_than_the_steps(
    row: tuple[list[list[bool]], list[bool], list[int]],
) -> None:
    tokens, rounds = walk(*row)
    assert rounds <= tokens <= (len(row[0]) + 1) * rounds
    assert (rounds == 0) == (not any(row[1]))


def test_worked_walk() -> None:
    """K = 2, one document of 7 slots: accept 2, jump 3; accept 0, jump 1; step over one; accept 1, jump 2."""
    hits = [[True, False, False, False, True, True, False], [True, True, True, True, True, False, True]]
    valid = [True, True, True, True, False, True, True]
    assert walk(hits, valid, [0] * 7) == (3 + 1 + 2, 3)


def test_a_right_step_after_a_wrong_one_is_not_accepted() -> None:
    assert walk([[False], [True], [True]], [True], [0]) == (1, 1)


@given(st.integers(1, 5), st.lists(st.integers(1, 12), min_size=1, max_size=4))
@settings(max_examples=50, deadline=None)
def test_a_perfect_draft_fills_every_round_but_the_last_of_a_document(num_steps: int, lengths: list[int]) -> None:
    """Slot t of L has L - 1 - t steps inside its document; rounds start K + 1 slots apart."""
    documents = [d for d, length in enumerate(lengths) for _ in range(length)]
    left = [length - 1 - t for length in lengths for t in range(length)]
    hits = [[k < remaining for remaining in left] for k in range(num_steps)]
    valid = [remaining > 0 for remaining in left]
    tokens, rounds = walk(hits, valid, documents)
    starts = [(t, length) for length in lengths for t in range(0, length - 1, num_steps + 1)]
    expected_tokens = sum(min(num_steps, length - 1 - t) + 1 for t, length in starts)
    assert (tokens, rounds) == (expected_tokens, len(starts))


@given(st.integers(1, 4), st.integers(1, 9))
@settings(max_examples=30, deadline=None)
def test_all_right_gives_one_more_than_the_steps_in_every_round(num_steps: int, num_slots: int) -> None:
    tokens, rounds = walk([[True] * num_slots] * num_steps, [True] * num_slots, [0] * num_slots)
    assert tokens == (num_steps + 1) * rounds
    assert rounds == -(-num_slots // (num_steps + 1))


@given(rows())
@settings(max_examples=40, deadline=None)
def test_all_wrong_takes_one_round_a_valid_slot(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    hits, valid, documents = row
    wrong = [[False] * len(documents) for _ in hits]
    assert walk(wrong, valid, documents) == (sum(valid), sum(valid))


def by_document(
    row: tuple[list[list[bool]], list[bool], list[int]], order: list[int]
) -> tuple[list[list[bool]], list[bool], list[int]]:
    """The row with its documents laid out in `order`, numbered anew, without padding."""
    hits, valid, documents = row
    slots = [[t for t, d in enumerate(documents) if d == document] for document in order]
    flat = [t for group in slots for t in group]
    renumbered = [new for new, group in enumerate(slots) for _ in group]
    return [[step[t] for t in flat] for step in hits], [valid[t] for t in flat], renumbered


@given(rows(), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_the_order_of_documents_and_their_padding_change_nothing(
    row: tuple[list[list[bool]], list[bool], list[int]], random: object
) -> None:
    order = sorted({d for d in row[2] if d >= 0})
    random.shuffle(order)
    assert walk(*by_document(row, order)) == walk(*row)


@given(rows())
@settings(max_examples=60, deadline=None)
def test_a_row_is_the_sum_of_its_documents(row: tuple[list[list[bool]], list[bool], list[int]]) -> None:
    """A jump ends with its document and never lands inside the next."""
    parts = [walk(*by_document(row, [d])) for d in sorted({d for d in row[2] if d >= 0})]
    assert walk(*row) == (sum(tokens for tokens, _ in parts), sum(rounds for _, rounds in parts))


def test_padding_alone_takes_no_round() -> None:
    assert walk([[True, True]], [True, True], [-1, -1]) == (0, 0)


# --- Walks through answers ---

Text = list[bool]  # one document: which of its tokens the assistant produced


def packed_batch(rows: list[list[Text]], num_slots: int) -> SlotBatch:
    """The masks of packed rows in the slot frame, laid out slot by slot; states and probabilities are not read."""
    most = max(1, *(len(row) for row in rows))
    loss_mask, remaining, positions, real = [], [], [], []
    for row in rows:
        flat = [produced for text in row for produced in text]
        filler = num_slots - len(flat)
        loss_mask.append([*flat, *[False] * (filler + 1)][1:])
        remaining.append([len(text) - 1 - t for text in row for t in range(len(text))] + [0] * filler)
        positions.append([t for text in row for t in range(len(text))] + [0] * filler)
        real.append([1] * len(flat) + [0] * filler)
    ids = torch.zeros(len(rows), num_slots, dtype=torch.int64)
    return SlotBatch(
        input_ids=ids,
        attention_mask=torch.tensor(real),
        loss_mask=torch.tensor(loss_mask),
        aux_hidden_states=torch.zeros(len(rows), num_slots, 0),
        target_probs=torch.zeros(len(rows), num_slots, 0),
        position_mask=torch.tensor(loss_mask),
        position_ids=torch.tensor(positions),
        seq_lens=torch.tensor([[len(text) for text in row] + [0] * (most - len(row)) for row in rows]),
        doc_remaining=torch.tensor(remaining),
    )


def decode_answers(hits: list[list[list[bool]]], rows: list[list[Text]]) -> tuple[int, int]:
    """Tokens and rounds of decoding every turn of every text from its first token, which is known, to its last."""
    tokens = rounds = 0
    for b, row in enumerate(rows):
        first_slot = 0
        for text in row:
            turns, t = [], 0
            while t < len(text):
                end = t
                while end < len(text) and text[end]:
                    end += 1
                if end > t:
                    turns.append((t, end - 1))
                t = max(end, t + 1)
            for first, last in turns:
                newest = max(first, 1)  # no slot reads the token that begins a text
                while newest < last:
                    slot = first_slot + newest - 1
                    run = 0
                    while run < len(hits) and newest + 1 + run <= last and hits[run][b][slot]:
                        run += 1
                    tokens, rounds = tokens + run + 1, rounds + 1
                    newest += run + 1
            first_slot += len(text)
    return tokens, rounds


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[list[list[list[bool]]], list[list[Text]], int]:
    """Hits [K][B][T], texts row by row, and slots."""
    turn = st.tuples(st.integers(0, 3), st.integers(0, 6))
    rows = []
    for _ in range(draw(st.integers(1, 3))):
        row = []
        for _ in range(draw(st.integers(0, 3))):
            turns = draw(st.lists(turn, min_size=1, max_size=3))
            ending = draw(st.integers(0, 2))
            text = [side for asked, said in turns for side in [False] * asked + [True] * said] + [False] * ending
            if text:
                row.append(text)
        rows.append(row)
    num_slots = max(1, *(sum(map(len, row)) for row in rows)) + draw(st.integers(0, 3))
    num_steps = draw(st.integers(1, 4))
    flags = st.lists(st.sampled_from([True, True, False]), min_size=num_slots, max_size=num_slots)
    hits = [[draw(flags) for _ in rows] for _ in range(num_steps)]
    return hits, rows, num_slots


@given(packed_rows())
@settings(max_examples=200, deadline=None)
def test_answers_are_walked_turn_by_turn_as_decoding_takes_them(
    packed: tuple[list[list[list[bool]]], list[list[Text]], int],
) -> None:
    """Hits come as they may, past a turn's end and on padding too: none of those is accepted."""
    hits, rows, num_slots = packed
    found = walk_answers(torch.tensor(hits), packed_batch(rows, num_slots))
    assert found == decode_answers(hits, rows)


def test_worked_walk_through_answers() -> None:
    """Two turns of 4 and 2 tokens; three known tokens before, two between: K = 2, every draft right.

    Turn one is x_3 … x_6: round 1 accepts x_4 and x_5 and adds x_6. Turn two is x_9 and x_10: round 2 accepts x_10
    and adds what follows the answer.
    """
    text = [False] * 3 + [True] * 4 + [False] * 2 + [True] * 2
    hits = [[[True] * 11]] * 2
    assert walk_answers(torch.tensor(hits), packed_batch([[text]], 11)) == (3 + 2, 2)
    wrong = [[[False] * 11]] * 2
    assert walk_answers(torch.tensor(wrong), packed_batch([[text]], 11)) == (3 + 1, 4)


@pytest.mark.parametrize("said", [0, 1])
def test_a_turn_that_is_known_with_its_first_token_takes_no_round(said: int) -> None:
    rows = [[[False] * 3 + [True] * said + [False] * 2, [False] * 4]]
    assert walk_answers(torch.ones(3, 1, 9 + said, dtype=torch.bool), packed_batch(rows, 9 + said)) == (0, 0)


def test_an_answer_at_the_end_of_its_text_does_not_reach_into_the_next() -> None:
    first, second = [False, True, True, True], [True, True, True]
    batch = packed_batch([[first, second]], 7)
    # All right: x_1 known, x_2 and x_3 accepted; in the second text x_1 is known and x_2 accepted.
    assert walk_answers(torch.ones(4, 1, 7, dtype=torch.bool), batch) == (3 + 2, 2)


# --- Expected lengths: tokens drawn at temperature 1 ---


@st.composite
def chains(draw: st.DrawFn) -> tuple[list[list[float]], list[list[bool]]]:
    """Overlaps and validity [K][T]; a slot may be valid and not supervised: its overlap is 0."""
    num_slots, num_steps = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    overlap = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))
    valid = [[draw(st.booleans()) for _ in range(num_slots)] for _ in range(num_steps)]
    overlaps = [[draw(overlap) if v else 0.0 for v in step] for step in valid]
    return overlaps, valid


def sums_of(overlaps: list[list[float]], valid: list[list[bool]]) -> UnrollSums:
    nothing = torch.zeros(len(valid))
    return UnrollSums(
        losses=nothing,
        counts=nothing.long(),
        hits=nothing.long(),
        overlaps=nothing,
        log_overlaps=nothing,
        step_hits=torch.zeros(len(valid), 1, len(valid[0]), dtype=torch.bool),
        step_overlaps=torch.tensor(overlaps, dtype=torch.float64)[:, None],
        step_valid=torch.tensor(valid)[:, None],
    )


@given(chains())
@settings(max_examples=200, deadline=None)
def test_expected_length_equals_survival_slot_by_slot(chain: tuple[list[list[float]], list[list[bool]]]) -> None:
    sums = sums_of(*chain)
    found = float(expected_accept_length(sums.chain_overlaps(), sums.prefix_valid()))
    assert found == pytest.approx(oracle.expected_accept_length(*chain), rel=1e-12)
    assert 1 <= found <= len(chain[1]) + 1


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_expected_length_of_one_slot_is_the_mean_over_the_outcomes_of_a_round(overlaps: list[float]) -> None:
    sums = sums_of([[overlap] for overlap in overlaps], [[True]] * len(overlaps))
    found = float(expected_accept_length(sums.chain_overlaps(), sums.prefix_valid()))
    assert found == pytest.approx(oracle.decoded_length(overlaps), rel=1e-9)


def test_overlaps_of_zero_and_one_give_the_simulated_length() -> None:
    generator = torch.Generator().manual_seed(3)
    valid = torch.rand(4, 1, 50, generator=generator) < 0.8
    hits = valid & (torch.rand(4, 1, 50, generator=generator) < 0.6)
    sums = sums_of(hits[:, 0].double().tolist(), valid[:, 0].tolist())
    simulated = simulated_accept_length(hits.long().cumprod(dim=0).sum(dim=(1, 2)), sums.prefix_valid())
    assert float(expected_accept_length(sums.chain_overlaps(), sums.prefix_valid())) == float(simulated)


def test_a_slot_that_is_valid_and_not_supervised_counts_as_refused() -> None:
    """Two slots; the second one's best token is outside the draft vocabulary."""
    sums = sums_of([[0.5, 0.0]], [[True, True]])
    assert float(expected_accept_length(sums.chain_overlaps(), sums.prefix_valid())) == 1.25
