"""The draft with a cache computes what it computes without one: slots in any portions, steps of a chain, rows."""

from __future__ import annotations

import random

import pytest
import torch

from eagle_offline.draft.cache import DraftCache
from tests.oracles import ttt
from tests.oracles.drafts import SHAPES, make_draft, twin
from tests.oracles.samples import NUM_AUX, TARGET_HIDDEN_SIZE, VOCAB_SIZE

TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}  # float64 on both sides


def draw(seed: int, num_rows: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, T] and aux states [B, T, A * Ht]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (num_rows, num_slots), generator=generator)
    size = NUM_AUX * TARGET_HIDDEN_SIZE
    return ids, torch.randn(num_rows, num_slots, size, generator=generator, dtype=torch.float64)


def fed_back(oracle: ttt.Draft, ids: torch.Tensor, aux: torch.Tensor) -> torch.Tensor:
    """What an ordinary forward over one row feeds back at each slot, [T, H]."""
    out = ttt.causal_forward(oracle, ids, oracle.project(aux))
    return oracle.norm("norm", out) if oracle.norm_output else out


def portions(rng: random.Random, num_slots: int) -> list[tuple[int, int]]:
    """Starts and ends of random portions of a sequence."""
    cuts = sorted(rng.sample(range(1, num_slots), rng.randint(0, min(5, num_slots - 1))))
    return list(zip([0, *cuts], [*cuts, num_slots], strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_any_portions_equal_one_forward(shape: str) -> None:
    model = make_draft(SHAPES[shape], 0)
    rng = random.Random(shape)
    for seed in range(3):
        ids, aux = draw(seed, 2, 11)
        expected = torch.stack([fed_back(twin(model), ids[b], aux[b]) for b in range(2)])
        cache, found = DraftCache(model, 2), []
        for start, end in portions(rng, 11):
            positions = torch.arange(start, end).expand(2, -1)
            hidden = model.project_hidden_states(aux[:, start:end])
            found.append(cache.extend(ids[:, start:end], hidden, positions, end))
        torch.testing.assert_close(torch.cat(found, dim=1), expected, **TOLERANCE)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_a_chain_equals_the_unroll_at_its_slot_and_leaves_no_trace(shape: str) -> None:
    """Steps write columns that later slots overwrite; a chain after them is that of a fresh row."""
    model = make_draft(SHAPES[shape], 1)
    oracle = twin(model)
    num_slots, num_steps = 12, 4
    ids, aux = draw(7, 1, num_slots)
    ends = [3, 4, 7, 8, 12]  # rounds that settle 3, 1, 3, 1 and 4 slots
    cache = DraftCache(model, 1)
    start = 0
    for end in ends:
        positions = torch.arange(start, end)[None]
        hidden = cache.extend(ids[:, start:end], model.project_hidden_states(aux[:, start:end]), positions, end)
        torch.testing.assert_close(hidden[0], fed_back(oracle, ids[0, :end], aux[0, :end])[start:], **TOLERANCE)
        hidden = hidden[:, -1:]
        row = ttt.Row([0] * end, [False] * end, list(range(end)))
        state = ttt.draft_step(oracle, row, 0, ids[0, :end], oracle.project(aux[0, :end]))
        for step in range(1, num_steps):
            token = torch.randint(0, VOCAB_SIZE, (1, 1), generator=torch.Generator().manual_seed(end * 10 + step))
            # All slots of the oracle take the step; only the last one's token and result matter.
            state = ttt.draft_step(oracle, row, step, token[0].expand(end), state)
            position = torch.tensor([[end - 1 + step]])
            hidden = cache.extend(token, hidden, position, end + step)
            torch.testing.assert_close(hidden[0, 0], state[-1], **TOLERANCE)
        start = end


@pytest.mark.parametrize("shape", ["plain", "all_at_once"])
@torch.no_grad()
def test_rows_advance_by_unlike_numbers_of_slots(shape: str) -> None:
    """Portions padded on the right: padding goes on counting, writes rubbish, and none of it is ever read."""
    model = make_draft(SHAPES[shape], 2)
    rng = random.Random(3)
    ids, aux = draw(11, 3, 40)
    cache, known = DraftCache(model, 3), [0, 0, 0]
    rows = [0, 1, 2]
    for turn in range(7):
        counts = [rng.randint(1, 5) for _ in rows]
        widest = max(counts)
        slots = [known[row] + torch.arange(widest) for row in rows]
        rubbish = torch.full_like(aux[0, :widest], 1e3)
        real = [torch.arange(widest) < count for count in counts]
        read_ids = torch.stack([torch.where(r, ids[row, s], 5) for row, s, r in zip(rows, slots, real, strict=True)])
        read_aux = torch.stack(
            [torch.where(r[:, None], aux[row, s], rubbish) for row, s, r in zip(rows, slots, real, strict=True)]
        )
        positions = torch.stack(slots)
        found = cache.extend(read_ids, model.project_hidden_states(read_aux), positions, int(positions.max()) + 1)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            end = known[row] + count
            expected = fed_back(twin(model), ids[row, :end], aux[row, :end])[known[row] :]
            torch.testing.assert_close(found[index, :count], expected, **TOLERANCE)
            known[row] = end
        if turn in (2, 4):
            chosen = [2, 0] if turn == 2 else [1]
            cache.select_rows(torch.tensor(chosen))
            rows = [rows[index] for index in chosen]


@torch.no_grad()
def test_columns_written_again_forget_what_they_held() -> None:
    model = make_draft(SHAPES["two_layers"], 3)
    ids, aux = draw(1, 1, 9)
    other_ids, other_aux = draw(2, 1, 9)
    cache = DraftCache(model, 1)
    everywhere = torch.arange(9)[None]
    cache.extend(other_ids, model.project_hidden_states(other_aux), everywhere, 9)
    first = cache.extend(ids[:, :4], model.project_hidden_states(aux[:, :4]), everywhere[:, :4], 4)
    rest = cache.extend(ids[:, 4:], model.project_hidden_states(aux[:, 4:]), everywhere[:, 4:], 9)
    torch.testing.assert_close(torch.cat([first, rest], 1)[0], fed_back(twin(model), ids[0], aux[0]), **TOLERANCE)


@torch.no_grad()
def test_more_columns_than_asked_for_change_nothing() -> None:
    model = make_draft(SHAPES["plain"], 4)
    ids, aux = draw(1, 2, 5)
    cache = DraftCache(model, 2)
    found = cache.extend(ids, model.project_hidden_states(aux), torch.arange(5).expand(2, -1), 21)
    for row in range(2):
        torch.testing.assert_close(found[row], fed_back(twin(model), ids[row], aux[row]), **TOLERANCE)


@torch.no_grad()
def test_a_long_row_outgrows_the_first_columns_and_keeps_them() -> None:
    model = make_draft(SHAPES["plain"], 5)
    num_slots = 600
    ids, aux = draw(3, 1, num_slots)
    expected = fed_back(twin(model), ids[0], aux[0])
    cache, found = DraftCache(model, 1), []
    for start, end in [(0, 250), (250, 256), (256, 257), (257, 260), (260, 513), (513, 600)]:
        positions = torch.arange(start, end)[None]
        hidden = model.project_hidden_states(aux[:, start:end])
        found.append(cache.extend(ids[:, start:end], hidden, positions, end))
    torch.testing.assert_close(torch.cat(found, dim=1)[0], expected, **TOLERANCE)
