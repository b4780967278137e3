"""What a batch comes down as is what each of its samples is by itself, computed plainly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from eagle_offline.supervision import Head
from eagle_offline.target.capture import Capture, CapturedSample, TokenSample
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import read_head
from tests.builders import make_model

LAYERS = [1, 2]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def samples_of(lengths: list[int], vocab_size: int) -> list[TokenSample]:
    rng = np.random.default_rng(len(lengths))
    masks = [(rng.random(length) < 0.5).astype(np.uint8) for length in lengths]
    return [
        TokenSample(number, rng.integers(0, vocab_size, len(mask), np.int32), mask) for number, mask in enumerate(masks)
    ]


def capture_of(model: torch.nn.Module, dtype: torch.dtype, selected: torch.Tensor, device: str, probs: bool) -> Capture:
    model = model.to(device)
    return Capture(
        HFEagle3TargetModel(model, LAYERS), read_head(model).to(device, dtype), dtype, selected, with_probs=probs
    )


def captured(capture: Capture, samples: list[TokenSample]) -> list[CapturedSample]:
    return [sample for batch in capture.run(samples) for sample in batch]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("probs", [False, True])
@pytest.mark.parametrize("lengths", [[9, 5, 2], [7, 7], [1], [3, 1]])
def test_every_sample_of_a_batch_is_what_it_is_alone(device: str, probs: bool, lengths: list[int]) -> None:
    model = make_model()
    vocab_size = model.config.vocab_size
    selected = torch.arange(3, vocab_size, 2)
    samples = samples_of(lengths, vocab_size)
    found = captured(capture_of(model, torch.float32, selected, device, probs), samples)
    model = model.to("cpu")
    assert [sample.tokens for sample in found] == samples
    for sample in found:
        ids, mask = torch.tensor(sample.tokens.input_ids).long(), torch.tensor(sample.tokens.loss_mask).bool()
        with torch.no_grad():
            plain = model(ids[None], output_hidden_states=True)
        # Of transformers: the embeddings first, then each layer's output; the last one is after the final norm.
        for layer, states in zip(LAYERS, sample.aux_hidden_states, strict=True):
            torch.testing.assert_close(states.cpu(), plain.hidden_states[layer + 1][0], rtol=1e-4, atol=1e-4)
        following = torch.cat([mask[1:], torch.zeros(1, dtype=torch.bool)])
        where = (mask | following).nonzero().squeeze(-1)
        torch.testing.assert_close(sample.last_hidden_state, plain.hidden_states[-1][0, where], rtol=1e-4, atol=1e-4)
        logits = plain.logits[0, where].double()
        assert sample.target_argmax.tolist() == logits.argmax(-1).tolist()
        torch.testing.assert_close(
            torch.tensor(sample.target_log_normalizer).double(), logits.logsumexp(-1), rtol=1e-5, atol=1e-4
        )
        supervised = mask[where]
        inside = torch.isin(logits.argmax(-1), selected)
        assert sample.num_in_vocab == int((inside & supervised).sum())
        mass = logits.softmax(-1)[:, selected].sum(-1)[supervised].sum()
        assert sample.vocab_mass == pytest.approx(float(mass), abs=1e-4)
        assert sample.finite
        if probs:
            assert sample.target_probs is not None
            expected = logits[:, selected].softmax(-1).float()
            torch.testing.assert_close(sample.target_probs, expected, rtol=1e-3, atol=1e-5)
        else:
            assert sample.target_probs is None


def test_statistics_are_those_of_what_is_stored() -> None:
    model = make_model()
    selected = torch.arange(40)
    head = read_head(model)
    for sample in captured(capture_of(model, torch.bfloat16, selected, "cpu", True), samples_of([9, 5], 64)):
        assert sample.last_hidden_state.dtype == torch.bfloat16
        stored = Head(head.weight.bfloat16()).weight.double()
        logits = sample.last_hidden_state.double() @ stored.T
        assert sample.target_argmax.tolist() == logits.argmax(-1).tolist()
        exact = torch.tensor(sample.target_log_normalizer).double()
        torch.testing.assert_close(exact, logits.logsumexp(-1), rtol=1e-6, atol=1e-5)
        assert sample.target_probs is not None
        torch.testing.assert_close(sample.target_probs.double(), logits[:, selected].softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["layer", "final"])
def test_only_the_sample_with_a_value_that_is_not_finite_says_so(where: str) -> None:
    model = make_model()
    samples = samples_of([6, 6, 4], 64)

    def spoil(_module: object, _inputs: object, output: torch.Tensor | tuple[torch.Tensor, ...]) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states[1, 3] = torch.nan

    samples[1].loss_mask[:] = 1
    module = model.model.layers[LAYERS[0]] if where == "layer" else model.model.norm
    capture = capture_of(model, torch.bfloat16, torch.arange(40), "cpu", False)
    with torch.inference_mode():
        handle = module.register_forward_hook(spoil)
    found = captured(capture, samples)
    handle.remove()
    assert [sample.finite for sample in found] == [True, False, True]


@contextmanager
def little_memory(model: torch.nn.Module, max_tokens: int) -> Iterator[list[int]]:
    """Let forwards of more tokens fail as a full GPU does; tell the sizes of those that did not."""
    sizes: list[int] = []

    def refuse(_module: object, inputs: tuple[torch.Tensor, ...], named: dict[str, torch.Tensor]) -> None:
        ids = inputs[0] if inputs else named["input_ids"]
        if ids.numel() > max_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(ids.numel())

    handle = model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_batch_that_does_not_fit_goes_in_halves() -> None:
    model = make_model()
    capture = capture_of(model, torch.float32, torch.arange(40), "cpu", False)
    samples = samples_of([8, 8, 7, 6, 5], 64)
    expected = captured(capture, samples)
    with little_memory(model, 16) as sizes:
        batches = capture.run(samples)
    assert sizes == [16, 7, 12]
    assert [batch.halved for batch in batches] == [True] * 3
    found = [sample for batch in batches for sample in batch]
    assert [sample.tokens for sample in found] == samples
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.last_hidden_state, other.last_hidden_state, rtol=1e-4, atol=1e-5)
        assert one.target_argmax.tolist() == other.target_argmax.tolist()


def test_one_sample_that_does_not_fit_is_given_up() -> None:
    model = make_model()
    capture = capture_of(model, torch.float32, torch.arange(40), "cpu", False)
    with little_memory(model, 5), pytest.raises(torch.OutOfMemoryError):
        capture.run(samples_of([6, 3], 64))


@pytest.mark.gpu
def test_copies_that_overlap_the_next_forwards_are_those_of_their_own_batch() -> None:
    model = make_model(hidden_size=64)
    capture = capture_of(model, torch.bfloat16, torch.arange(40), "cuda", True)
    groups = [samples_of([50 + number, 20, 3 + number], 64) for number in range(20)]
    apart = []
    for group in groups:
        apart.append(captured(capture, group))
        torch.cuda.synchronize()
    together = [batch for group in groups for batch in capture.run(group)]
    for one, batch in zip(apart, together, strict=True):
        for sample, other in zip(one, batch, strict=True):
            assert torch.equal(sample.last_hidden_state, other.last_hidden_state)
            assert all(map(torch.equal, sample.aux_hidden_states, other.aux_hidden_states))
