"""The head as stored reproduces the model's own logits, whatever the architecture does after its last product."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eagle_offline.errors import MismatchError
from eagle_offline.supervision import HEAD_CHUNK_ROWS, Head
from eagle_offline.target.capture import TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import read_head
from tests import builders

KINDS = ["Llama", "Qwen2", "Qwen3", "Mistral", "Gemma2", "Cohere", "Granite"]


def sample() -> TokenSample:
    ids = np.random.default_rng(0).integers(0, 256, 25).astype(np.int32)
    return TokenSample(0, ids, np.ones(25, np.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_from_the_final_state_are_the_models(kind: str) -> None:
    model = builders.make_model(kind)
    target = HFEagle3TargetModel(model, [1, 3, 4])
    ids = torch.tensor(sample().input_ids).long()[None]
    with torch.no_grad():
        own = model(input_ids=ids).logits[0]
    head = read_head(model)
    torch.testing.assert_close(head.logits(target.capture(ids)[1][0]), own, rtol=1e-4, atol=1e-4)
    check_capture(target, head, sample())


@pytest.mark.parametrize("kind", ["Gemma2", "Cohere", "Granite"])
def test_a_head_that_forgets_what_follows_it_is_caught_before_any_capture(kind: str) -> None:
    model = builders.make_model(kind)
    bare = Head(model.lm_head.weight.detach())
    with pytest.raises(MismatchError, match="after its head"):
        check_capture(HFEagle3TargetModel(model, [1, 3, 4]), bare, sample())


def test_an_architecture_with_something_unknown_after_its_head_is_refused() -> None:
    model = builders.make_model()
    model.lm_head.register_forward_hook(lambda _m, _i, output: output * 1.1)
    with pytest.raises(MismatchError, match="not supported"):
        check_capture(HFEagle3TargetModel(model, [1, 3, 4]), read_head(model), sample())


def test_a_head_with_a_bias_keeps_it() -> None:
    model = builders.make_model()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(builders.VOCAB_SIZE))
    head = read_head(model)
    assert torch.equal(head.bias, model.lm_head.bias)  # type: ignore[arg-type]
    check_capture(HFEagle3TargetModel(model, [1, 3, 4]), head, sample())


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(MismatchError, match="head"):
        read_head(builders.make_model().model)


HEADS = {
    "plain": {},
    "bias": {"bias": torch.randn(HEAD_CHUNK_ROWS + 37, generator=torch.Generator().manual_seed(5))},
    "scale": {"scale": 0.25},
    "soft cap": {"soft_cap": 2.0},
    "all": {
        "bias": torch.randn(HEAD_CHUNK_ROWS + 37, generator=torch.Generator().manual_seed(6)),
        "scale": 0.5,
        "soft_cap": 3.0,
    },
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", HEADS)
def test_a_head_in_chunks_is_the_formula_in_float64(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(HEAD_CHUNK_ROWS + 37, 24, generator=generator).to(dtype)
    hidden = torch.randn(9, 24, generator=generator).to(dtype)
    head = Head(weight, **HEADS[name]).to("cpu", dtype)
    exact = hidden.double() @ weight.double().T
    if head.bias is not None:
        exact = exact + head.bias.double()
    exact = exact * head.scale
    if head.soft_cap is not None:
        exact = head.soft_cap * torch.tanh(exact / head.soft_cap)
    logits = head.logits(hidden)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits.double(), exact, rtol=1e-5, atol=1e-5)
    argmax, log_normalizer = head.argmax_and_log_normalizer(hidden)
    top = exact.topk(2, dim=-1)
    clear = top.values[:, 0] - top.values[:, 1] > 1e-4
    assert torch.equal(argmax.long()[clear], top.indices[clear, 0])
    torch.testing.assert_close(log_normalizer.double(), exact.logsumexp(dim=-1), rtol=1e-6, atol=1e-5)
    ids = torch.tensor([0, 5, HEAD_CHUNK_ROWS, HEAD_CHUNK_ROWS + 36])
    torch.testing.assert_close(head.select(ids).logits(hidden), logits[:, ids], rtol=1e-6, atol=1e-6)


def test_ties_over_chunks_go_to_the_lowest_id() -> None:
    weight = torch.zeros(3 * HEAD_CHUNK_ROWS, 2)
    for row in (HEAD_CHUNK_ROWS - 1, HEAD_CHUNK_ROWS, 2 * HEAD_CHUNK_ROWS + 5):
        weight[row] = 1.0
    argmax, _ = Head(weight).argmax_and_log_normalizer(torch.tensor([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0]]))
    assert argmax.tolist() == [HEAD_CHUNK_ROWS - 1, 0, 0]
