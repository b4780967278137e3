"""Attention among the elements of a P-EAGLE forward on a GPU: its compiled form equals the dense twin, in less memory.

What needs no GPU runs on both; the CUDA side is marked `gpu`.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from eagle_offline import (
    Eagle3DraftConfig,
    Eagle3DraftModel,
    PEagleTrainerModule,
    element_attention,
    generate_cod_sample_indices,
)
from eagle_offline.alignment import position_ids
from eagle_offline.element_attention import ElementAttention
from tests.gpu.test_device_twins import DEVICES

# heads, key-value heads, width of a head
HEADS = {"8B": (32, 8, 128), "one head a key": (4, 4, 64), "narrow": (6, 2, 8)}


def elements(lengths: list[int], padding: int = 0) -> tuple[Tensor, Tensor, Tensor, int]:
    """Anchors and depths of packed documents on the CPU, their lengths, and the slots of the row."""
    generator, anchors, depths, start = torch.Generator().manual_seed(sum(lengths)), [], [], 0
    for length in lengths:
        mask = torch.rand(length, generator=generator) < 0.8
        anchor_pos, depth = generate_cod_sample_indices(length, mask, generator=generator)
        anchors.append(anchor_pos + start)
        depths.append(depth)
        start += length
    anchors.append(torch.arange(start, start + padding))
    depths.append(torch.zeros(padding, dtype=torch.int64))
    return torch.cat(anchors), torch.cat(depths), torch.tensor(lengths), start + padding


def states(num_elements: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    num_heads, num_kv_heads, width = heads
    shapes = [(1, count, num_elements, width) for count in (num_heads, num_kv_heads, num_kv_heads)]
    return [torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_() for shape in shapes]


def assert_near(found: Tensor, expected: Tensor, share: float, name: str) -> None:
    """Errors are of sums: relative to the largest of the tensor."""
    error = (found.double() - expected.double()).abs().max()
    assert error <= share * expected.double().abs().max(), f"{name}: {float(error)}"


@pytest.mark.gpu
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [[2000], [1500, 1, 700], [40]])
@pytest.mark.parametrize(("dtype", "share"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-4), (torch.float64, 1e-12)])
def test_compiled_attention_equals_the_dense_twin_forward_and_backward(lengths, heads, dtype, share):
    anchor_pos, depth, document_lengths, total = elements(lengths, padding=5)
    attention = ElementAttention(anchor_pos.cuda(), depth.cuda(), document_lengths.cuda(), total)
    given = states(len(anchor_pos), HEADS[heads], dtype)
    wide = [tensor.detach().double().requires_grad_() for tensor in given]
    found = attention(*given)
    assert found.dtype == dtype
    expected = F.scaled_dot_product_attention(*wide, attn_mask=attention.dense_mask, enable_gqa=True)
    upstream = torch.randn_like(found)
    found.backward(upstream)
    expected.backward(upstream.double())
    assert_near(found, expected, share, "output")
    for name, one, other in zip(("queries", "keys", "values"), given, wide, strict=True):
        assert_near(one.grad, other.grad, 2 * share, name)


@pytest.mark.gpu
def test_no_mask_of_all_pairs_is_ever_in_memory():
    torch.compiler.reset()
    for length in (300, 7_000, 12_000, 9_000):  # the first lengths compile, the others must not fall back
        anchor_pos, depth, lengths, total = elements([length])
        given = states(len(anchor_pos), (2, 1, 64), torch.bfloat16)
        attention = ElementAttention(anchor_pos.cuda(), depth.cuda(), lengths.cuda(), total)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        attention(*given).sum().backward()
        torch.cuda.synchronize()
        used = torch.cuda.max_memory_allocated() - before
        # A byte a pair would be a bool mask; states and their gradients are far less at these lengths.
        assert length < 1000 or used < len(anchor_pos) ** 2 / 4, f"{length} slots: {used} bytes"


@pytest.mark.gpu
def test_many_lengths_do_not_compile_again_and_again():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    for length in range(150, 3000, 190):
        anchor_pos, depth, lengths, total = elements([length])
        attention = ElementAttention(anchor_pos.cuda(), depth.cuda(), lengths.cuda(), total)
        assert attention(*states(len(anchor_pos), (4, 2, 32), torch.float32)).isfinite().all()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 6


def module_on(device: str, dtype: torch.dtype) -> PEagleTrainerModule:
    config = Eagle3DraftConfig(
        vocab_size=50, draft_vocab_size=50, hidden_size=64, intermediate_size=80, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_hidden_layers=2, parallel_drafting=True, mask_token_id=49,
    )  # fmt: skip
    torch.manual_seed(0)
    draft = Eagle3DraftModel(config)
    everything = torch.arange(50), torch.ones(50, dtype=torch.bool)
    return PEagleTrainerModule(draft, *everything, 6, 49, sequence_partitions=2).to(device, dtype)


@pytest.mark.parametrize("partitioned", [False, True])
@pytest.mark.parametrize("device", DEVICES)
def test_module_on_a_device_in_float32_equals_float64_on_the_cpu(device, partitioned):
    generator, seq_lens = torch.Generator().manual_seed(2), torch.tensor([[90, 60, 0], [100, 3, 40]])
    num_slots = 160
    batch = {
        "input_ids": torch.randint(0, 49, (2, num_slots), generator=generator),
        "attention_mask": torch.arange(num_slots) < seq_lens.sum(1, keepdim=True),
        "loss_mask": torch.rand(2, num_slots, generator=generator) < 0.8,
        "aux_hidden_states": torch.randn(2, num_slots, 3 * 64, generator=generator),
        "target_probs": torch.randn(2, num_slots, 50, generator=generator).softmax(-1),
        "position_ids": position_ids(seq_lens, num_slots),
        "seq_lens": seq_lens,
    }

    def run(device: str, dtype: torch.dtype) -> tuple[Tensor, dict[str, Tensor]]:
        module = module_on(device, dtype)
        moved = {name: value.to(device) for name, value in batch.items()}
        for name in ("aux_hidden_states", "target_probs"):
            moved[name] = moved[name].to(dtype)
        # Drawn on the CPU wherever the batch is.
        draw = torch.Generator().manual_seed(3)
        if partitioned:
            masks = {name: moved[name] for name in ("loss_mask", "attention_mask", "position_ids", "seq_lens")}
            plan = module.build_peagle_plan(**masks, generator=draw)
            losses = [module(**moved, peagle_segment=(plan, index)).loss for index in range(len(plan.units))]
            loss = torch.stack(losses).sum()
        else:
            loss = module(**moved, generator=draw).loss
        loss.backward()
        return loss.detach().cpu(), {name: p.grad.cpu() for name, p in module.draft_model.named_parameters()}

    found, found_gradients = run(device, torch.float32)
    expected, gradients = run("cpu", torch.float64)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)
    for name, gradient in gradients.items():
        assert_near(found_gradients[name], gradient, 1e-4, name)


def test_flex_attention_is_taken_for_what_it_has_kernels_for():
    queries = torch.zeros(1, 2, 3, 64)
    assert not element_attention.flex_takes(queries)
    if torch.cuda.is_available():
        assert element_attention.flex_takes(queries.cuda())
        assert not element_attention.flex_takes(queries.double().cuda())
        assert not element_attention.flex_takes(queries[..., :8].cuda())
