"""Attention of runs equals its definition, forward and backward, alone and merged with other keys.

The CUDA kernel cannot run here. A stand-in for it, written from its contract and strict about it, shows that what
surrounds the call is right; fake tensors show that shapes fit PyTorch's own account of the kernel and that nothing
asks the device for a value. `tests/gpu/test_attention_kernels.py` holds the kernel itself against its twin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from eagle_offline.draft import ragged_attention, ragged_flash, ragged_plain
from eagle_offline.draft.merged_attention import _MergedAttention, merged_attention
from eagle_offline.objectives import attention_calls
from eagle_offline.objectives.attention_calls import RaggedCall, plan_padded, plan_ragged
from tests.objectives.attention_cases import (
    Case,
    by_definition,
    make_case,
    own_states,
    random_states,
    stand_in_for_the_flash_kernel,
)

run_lists = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 5)), min_size=1, max_size=5)


def call_of(runs: list[tuple[int, int]]) -> RaggedCall:
    """Runs of so many queries after so many keys before the first, every row its own place."""
    pairs = tuple((num_queries, num_queries + before) for num_queries, before in runs)
    bounds = [torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32) for counts in zip(*pairs, strict=True)]
    places = torch.arange(int(bounds[0][-1]))
    return RaggedCall(places, places, places, torch.arange(int(bounds[1][-1])), bounds[0], bounds[1], pairs)


def dense(call: RaggedCall, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over a mask of all queries by all keys."""
    visible = torch.zeros(len(query), len(key), dtype=torch.bool)
    first_query = first_key = 0
    for num_queries, num_keys in call.runs:
        for number in range(num_queries):
            last = num_keys - num_queries + number
            visible[first_query + number, first_key : first_key + last + 1] = True
        first_query, first_key = first_query + num_queries, first_key + num_keys
    return by_definition(query, key, value, visible)


@given(runs=run_lists, heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]), block=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_twin_equals_the_definition_in_output_logsumexp_and_gradients(runs, heads, block):
    call, (num_heads, num_kv_heads) = call_of(runs), heads
    states = random_states(int(call.query_bounds[-1]), int(call.key_bounds[-1]), num_heads, num_kv_heads)
    expected, expected_sums = dense(call, *states)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, states, upstream)
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(ragged_plain, "_BLOCK_QUERIES", block)
        output, sums = ragged_plain.forward(call, *states)
        gradients = ragged_plain.backward(call, upstream, *states, output, sums)
    torch.testing.assert_close(output, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sums, expected_sums.detach(), rtol=1e-9, atol=1e-12)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-12)


@given(runs=run_lists, heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]))
@settings(max_examples=40, deadline=None)
def test_what_surrounds_the_flash_kernel_keeps_its_contract_and_gives_what_the_twin_gives(runs, heads):
    call, (num_heads, num_kv_heads) = call_of(runs), heads
    states = [
        tensor.detach()
        for tensor in random_states(int(call.query_bounds[-1]), int(call.key_bounds[-1]), num_heads, num_kv_heads)
    ]
    upstream = torch.randn_like(states[0])
    expected = ragged_plain.forward(call, *states)
    expected_gradients = ragged_plain.backward(call, upstream, *states, *expected)
    with stand_in_for_the_flash_kernel():
        found = ragged_flash.forward(call, *states)
        gradients = ragged_flash.backward(call, upstream, *states, *found)
    for one, other in zip((*found, *gradients), (*expected, *expected_gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.fixture(params=["twin", "flash"])
def kernel(request, monkeypatch) -> Iterator[None]:
    """Either kernel of ragged calls; the flash one on its stand-in."""
    if request.param == "twin":
        yield
        return
    monkeypatch.setattr(ragged_attention, "_kernel", lambda queries: ragged_flash)
    with stand_in_for_the_flash_kernel():
        yield


CASES = {
    "every slot": ([7, 1, 4], lambda columns: columns >= 0),
    "one slot": ([9], lambda columns: columns == 5),
    "turns": ([40, 12], lambda columns: columns % 9 > 4),
    "single slots far apart": ([200], lambda columns: columns % 71 == 3),
    "long turns far apart": ([400, 3], lambda columns: columns % 150 > 110),
}


@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize("num_own", [0, 1, 3])
@pytest.mark.parametrize("plan", [plan_ragged, plan_padded])
@pytest.mark.parametrize("name", CASES)
def test_merged_attention_equals_one_softmax_over_all_keys(name, plan, num_own):
    case = make_case(*CASES[name])
    states, own = random_states(len(case.columns), case.num_keys, 4, 2), own_states(len(case.columns), num_own, 2)
    flat = [tensor for pair in own for tensor in pair]
    expected = case.attend(*states, own)
    upstream = torch.randn_like(expected)
    found = merged_attention(*states, own, case.calls(plan))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    wanted = torch.autograd.grad(expected, [*states, *flat], upstream)
    for gradient, other in zip(torch.autograd.grad(found, [*states, *flat], upstream), wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-12)


@pytest.mark.usefixtures("kernel")
def test_calls_limited_in_keys_give_the_same(monkeypatch):
    case = make_case(*CASES["long turns far apart"])
    states = [tensor.detach() for tensor in random_states(len(case.columns), case.num_keys, 4, 2)]
    whole = case.calls(plan_ragged)
    monkeypatch.setattr(attention_calls, "_CALL_KEYS", 300)
    calls = case.calls(plan_ragged)
    assert len(whole) == 1
    assert len(calls) > 1
    torch.testing.assert_close(
        merged_attention(*states, [], calls), merged_attention(*states, [], whole), rtol=1e-12, atol=1e-12
    )


def test_no_queries_reach_no_kernel(monkeypatch):
    def kernel(queries: Tensor) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(ragged_attention, "_kernel", kernel)
    none = np.zeros(0, np.int64)
    assert plan_ragged(none, none, np.zeros(2, np.int64)) == ()
    states, own = random_states(0, 5, 4, 2), own_states(0, 2, 2)
    output = merged_attention(*states, own, ())
    assert output.shape == (0, 4, 8)
    gradients = torch.autograd.grad(output.sum(), [*states, *own[0]])
    assert all(not gradient.any() for gradient in gradients)


@given(
    lengths=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.01, 0.1, 0.9, 1.0]),
    call_keys=st.sampled_from([1, 200, 1 << 16]),
    filled_gap=st.sampled_from([0, 3, 64]),
)
@settings(max_examples=60, deadline=None)
def test_runs_are_every_query_once_each_with_its_documents_keys_up_to_itself(
    lengths, seed, share, call_keys, filled_gap
):
    generator = np.random.default_rng(seed)
    case = make_case(lengths, lambda columns: generator.random(len(columns)) < share)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_calls, "_CALL_KEYS", call_keys)
        patch.setattr(attention_calls, "_FILLED_GAP", filled_gap)
        calls = case.calls(plan_ragged)
    seen = []
    for call in calls:
        assert call.query_bounds.dtype == call.key_bounds.dtype == torch.int32
        assert len(call.runs) == 1 or int(call.key_bounds[-1]) <= call_keys
        assert torch.equal(call.query_rows[call.real], call.real_rows)
        assert len(call.query_rows) == sum(num_queries for num_queries, _ in call.runs) == int(call.query_bounds[-1])
        assert len(call.key_rows) == sum(num_keys for _, num_keys in call.runs) == int(call.key_bounds[-1])
        real, rows = set(call.real.tolist()), call.query_rows.tolist()
        starts = zip(call.query_bounds.tolist(), call.key_bounds.tolist(), call.runs, strict=False)
        for first_query, first_key, (num_queries, num_keys) in starts:
            assert first_query in real
            assert first_query + num_queries - 1 in real
            gap = 0
            for number in range(num_queries):
                place, last = first_query + number, num_keys - num_queries + number
                read = call.key_rows[first_key : first_key + last + 1].tolist()
                document, column = case.documents[rows[place]], case.columns[rows[place]]
                if place in real:
                    assert read == list(range(case.key_starts[document], case.key_starts[document] + column + 1))
                    seen.append(rows[place])
                    gap = 0
                else:
                    gap += 1
                    assert gap <= filled_gap
                    assert column > last, "what fills a gap reads no key that its row does not"
                    assert read == list(range(case.key_starts[document], case.key_starts[document] + last + 1))
    assert seen == list(range(len(case.columns)))


def test_a_score_far_above_those_before_it_leaves_gradients_finite():
    case = make_case([6], lambda columns: columns % 5 == 0)
    query, key, value = random_states(len(case.columns), case.num_keys, 1, 1)
    with torch.no_grad():
        query[0], query[1], key[:] = 0, 1, 1
        key[1:5] = 1000
        key[5] = 5000
    output = merged_attention(query.float(), key.float(), value.float(), [], case.calls(plan_ragged))
    for gradient in torch.autograd.grad(output.sum(), [query, key, value]):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("num_own", [0, 2])
def test_shapes_and_dtypes_fit_the_cuda_kernel_and_no_value_is_asked_of_the_device(num_own, monkeypatch):
    fake = pytest.importorskip("torch._subclasses.fake_tensor")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    case = make_case(*CASES["turns"])
    calls = case.calls(plan_ragged)
    with fake.FakeTensorMode(allow_non_fake_inputs=True):
        on_device = [
            replace(call, **{name: torch.empty_like(value, device="cuda") for name, value in tensors(call)})
            for call in calls
        ]

        def states(count: int, heads: int) -> Tensor:
            return torch.empty(count, heads, 8, dtype=torch.bfloat16, device="cuda")

        rows = len(case.columns)
        given = [states(rows, 4), states(case.num_keys, 2), states(case.num_keys, 2)]
        own = [states(rows, 2) for _ in range(2 * num_own)]
        assert ragged_attention._kernel(given[0]) is ragged_flash
        output, sums = ragged_attention.attend(on_device[0], *given)
        assert (output.shape, output.dtype) == ((rows, 4, 8), torch.bfloat16)
        assert (sums.shape, sums.dtype) == ((rows, 4), torch.float32)
        # Without a CUDA build autograd cannot record for its devices: the two halves are called by hand.
        context = Context()
        merged = _MergedAttention.forward(context, on_device, *given, *own)
        assert (merged.shape, merged.dtype, merged.device.type) == ((rows, 4, 8), torch.bfloat16, "cuda")
        gradients = _MergedAttention.backward(context, torch.empty_like(merged))[1:]
        for gradient, tensor in zip(gradients, [*given, *own], strict=True):
            assert (gradient.shape, gradient.dtype) == (tensor.shape, tensor.dtype)


class Context:
    def save_for_backward(self, *saved: Tensor) -> None:
        self.saved_tensors = saved


def tensors(call: RaggedCall) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in vars(call).items() if isinstance(value, Tensor)]


def test_the_flash_kernel_is_asked_for_what_it_can_only():
    assert ragged_flash.supports(torch.bfloat16, 128)
    assert not ragged_flash.supports(torch.bfloat16, 12)
    assert not ragged_flash.supports(torch.bfloat16, 264)
    assert not ragged_flash.supports(torch.float32, 128)
    assert ragged_attention._kernel(torch.empty(1, 4, 128, dtype=torch.bfloat16)) is ragged_plain


def test_cases_are_what_they_say():
    def active(name: str) -> Callable[[], Case]:
        return lambda: make_case(*CASES[name])

    assert len(active("turns")().calls(plan_ragged)[0].runs) == 2, "small gaps are filled"
    assert len(active("single slots far apart")().calls(plan_ragged)[0].runs) == 3
    assert all(queries == 1 for queries, _ in active("single slots far apart")().calls(plan_ragged)[0].runs)
