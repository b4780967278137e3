"""What runs on a GPU gives what runs on a CPU. Each test runs on both; the CUDA side is marked `gpu`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from eagle_offline.alignment import SlotBatch, doc_remaining, position_ids
from eagle_offline.cache import codec
from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.parallel import PackedParallel
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_parallel import PackedParallelLoss
from eagle_offline.objectives.parallel_loss import ParallelLoss
from eagle_offline.objectives.parallel_plan import plan_parallel, sample_elements
from eagle_offline.objectives.peagle_plan import CodSampling
from eagle_offline.objectives.plan import moved
from eagle_offline.objectives.ttt import unroll
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.supervision import Head

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_batch(generator: torch.Generator, vocab_size: int, hidden_size: int) -> SlotBatch:
    seq_lens = torch.tensor([[9, 14, 0], [20, 3, 5]])
    num_slots = 30
    mask = torch.rand(2, num_slots, generator=generator) < 0.6
    return SlotBatch(
        input_ids=torch.randint(0, vocab_size, (2, num_slots), generator=generator),
        attention_mask=torch.arange(num_slots) < seq_lens.sum(1, keepdim=True),
        loss_mask=mask,
        aux_hidden_states=torch.randn(2, num_slots, 3 * hidden_size, generator=generator),
        target_probs=torch.randn(2, num_slots, vocab_size, generator=generator).softmax(-1),
        position_mask=mask & (torch.rand(2, num_slots, generator=generator) < 0.8),
        position_ids=position_ids(seq_lens, num_slots),
        seq_lens=seq_lens,
        doc_remaining=doc_remaining(seq_lens, num_slots),
    )


def batch_to(batch: SlotBatch, device: str, dtype: torch.dtype) -> SlotBatch:
    moved = {name: value.to(device) for name, value in vars(batch).items()}
    for name in ("aux_hidden_states", "target_probs"):
        moved[name] = moved[name].to(dtype)
    return SlotBatch(**moved)


@pytest.mark.parametrize("device", DEVICES)
def test_unroll_on_a_device_in_float32_equals_float64_on_the_cpu(device):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    config = Eagle3DraftConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2
    )
    model = Eagle3DraftModel(config)
    batch = random_batch(generator, vocab_size=50, hidden_size=32)
    exact_model = Eagle3DraftModel(config).double()
    exact_model.load_state_dict(model.state_dict())
    exact = unroll(exact_model, batch_to(batch, "cpu", torch.float64), ttt_steps=4)
    TTTLoss(len(exact.losses)).loss(exact).backward()
    model = model.to(device)
    sums = unroll(model, batch_to(batch, device, torch.float32), ttt_steps=4)
    TTTLoss(len(sums.losses)).loss(sums).backward()
    torch.testing.assert_close(sums.losses.cpu().double(), exact.losses, rtol=1e-5, atol=1e-5)
    assert torch.equal(sums.counts.cpu(), exact.counts)
    for (name, parameter), other in zip(model.named_parameters(), exact_model.parameters(), strict=True):
        # Gradients are sums of hundreds of float32 products: relative to the largest of a tensor.
        scale = other.grad.abs().max()
        error = (parameter.grad.cpu().double() - other.grad).abs().max()
        assert error <= 1e-4 * scale, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("autocast", [False, True])
def test_parallel_forward_on_a_device_equals_float64_on_the_cpu(device, autocast):
    lengths, num_depths = [120, 7, 300, 1, 90], 6
    rng, num_slots = np.random.default_rng(0), sum(lengths)
    supervised = rng.random(num_slots) < 0.8
    supervised[np.cumsum(lengths) - 1] = False
    generators = [torch.Generator().manual_seed(index) for index in range(len(lengths))]
    elements = sample_elements(lengths, supervised, CodSampling(num_depths, 0.8, 0.2), generators)
    torch.manual_seed(0)
    config = Eagle3DraftConfig(
        vocab_size=50, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=3, parallel_drafting=True, mask_token_id=7,
    )  # fmt: skip
    model = Eagle3DraftModel(config)
    exact_model = Eagle3DraftModel(config).double()
    exact_model.load_state_dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (num_slots,), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    aux = torch.randn(num_slots, 3 * 64, generator=generator, dtype=torch.float64)
    probs = torch.randn(num_slots, 50, generator=generator, dtype=torch.float64).mul(3).softmax(-1)

    def run(draft: Any, place: str, dtype: torch.dtype, num_segments: int) -> float:
        rows = np.arange(num_slots)
        plan = plan_parallel(
            lengths, supervised, supervised, rows, elements, num_depths, 64, num_segments, ragged=place != "cpu"
        )
        plan = moved(plan, place)
        loss = PackedParallelLoss(
            PackedParallel(draft, plan, ids.to(place), positions.to(place)),
            draft.before_head,
            draft.lm_head.weight,
            plan,
            lambda: aux.to(place, dtype),
            TargetRows.of(probs.to(place, dtype), None),
            moved(ParallelLoss(num_depths).weights(plan.step_counts), place),
        )
        total = 0.0
        for part in loss.parts():
            with torch.autocast(place, torch.bfloat16, enabled=autocast and dtype == torch.float32):
                value, _ = part()
            value.backward()
            total += float(value.detach())
        return total

    exact = run(exact_model, "cpu", torch.float64, 1)
    found = run(model.to(device), device, torch.float32, 3)
    assert found == pytest.approx(exact, rel=2e-2 if autocast else 1e-5)
    for (name, parameter), other in zip(model.named_parameters(), exact_model.parameters(), strict=True):
        scale = other.grad.abs().max()
        error = (parameter.grad.cpu().double() - other.grad).abs().max()
        assert error <= (0.1 if autocast else 1e-4) * scale, name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_head_products_are_accumulated_and_kept_in_float32(device, dtype):
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5000, 256, generator=generator).to(dtype)
    hidden = torch.randn(64, 256, generator=generator).to(dtype)
    exact = hidden.double() @ weight.double().T
    head = Head(weight).to(device)
    logits = head.logits(hidden.to(device))
    assert logits.dtype == torch.float32
    # float32 sums of 256 products of size ~16: 1e-4 is far below bf16's step at that size (0.06).
    torch.testing.assert_close(logits.cpu().double(), exact, rtol=1e-5, atol=1e-4)
    argmax, log_normalizer = head.argmax_and_log_normalizer(hidden.to(device))
    top = exact.topk(2).values
    clear = top[:, 0] - top[:, 1] > 1e-3
    assert torch.equal(argmax.cpu().long()[clear], exact.argmax(-1)[clear])
    torch.testing.assert_close(log_normalizer.cpu().double(), exact.logsumexp(-1), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_planes_merge_on_a_device_to_the_same_bits(device):
    field = FieldLayout(name="aux_1", width=256, dtype="bf16", encoding="planes", rows="tokens")
    values = torch.arange(65536).to(torch.int16).view(torch.bfloat16).reshape(256, 256)
    stored = [memoryview(column) for column in codec.encode(field, values)]
    planes = [torch.tensor(plane).to(device) for plane in codec.unpack(field, stored, 256)]
    assert torch.equal(codec.merge(field, planes).cpu().view(torch.int16), values.view(torch.int16))


LOSSY: dict[str, dict[str, Any]] = {
    **{f"{bits} mantissa bits": {"encoding": "planes", "mantissa_bits": bits} for bits in range(1, 7)},
    "fp8": {"encoding": "fp8"},
    "topk": {"encoding": "topk", "top_k": 9},
}


@pytest.mark.parametrize("kind", LOSSY)
@pytest.mark.parametrize("device", DEVICES)
def test_lossy_states_merge_on_a_device_to_the_same_bits(device, kind):
    """What travels are the stored bytes; the device and the CPU make the same values of them."""
    field = FieldLayout(name="aux_1", width=203, dtype="bf16", rows="tokens", **LOSSY[kind])
    values = torch.randn(64, 203, generator=torch.Generator().manual_seed(0)).abs() * torch.logspace(-9, 3, 203)
    stored = [memoryview(column) for column in codec.encode(field, values.bfloat16())]
    planes = codec.unpack(field, stored, 64)
    expected = np.empty((64, field.row_bytes), np.uint8)
    codec.merge_into(field, planes, expected)
    found = encoding_of(field).merge(field, [torch.tensor(plane).to(device) for plane in planes])
    assert np.array_equal(found.cpu().view(torch.uint8).numpy(), expected)
