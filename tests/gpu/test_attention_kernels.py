"""The CUDA kernel of runs equals its twin, and the unroll on a GPU equals the one on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from eagle_offline.draft import ragged_attention, ragged_flash, ragged_plain
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.merged_attention import merged_attention
from eagle_offline.draft.packed import PackedUnroll
from eagle_offline.objectives.attention_calls import RaggedCall, plan_ragged
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.packed_ttt import unroll_packed
from eagle_offline.objectives.plan import moved, plan_unroll
from eagle_offline.objectives.ttt_loss import TTTLoss
from tests.gpu.test_device_twins import DEVICES
from tests.objectives.attention_cases import Case, make_case

CASES: dict[str, tuple[list[int], Callable[[np.ndarray], np.ndarray]]] = {
    "every slot": ([700, 1, 130, 64], lambda columns: columns >= 0),
    "one slot a run": ([500, 3], lambda columns: columns % 101 == 2),
    "one slot": ([129], lambda columns: columns == 128),
    "turns": ([900, 300], lambda columns: columns % 190 > 100),
    "gaps": ([400], lambda columns: columns % 9 > 2),
}
# heads, key-value heads, width of a head
HEADS = {"8B": (32, 8, 128), "one head a key": (4, 4, 64), "narrow": (6, 2, 8), "wide": (4, 1, 256)}


def states_of(case: Case, heads: tuple[int, int, int], dtype: torch.dtype, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_heads, num_kv_heads, width = heads
    shapes = [(len(case.columns), num_heads), (case.num_keys, num_kv_heads), (case.num_keys, num_kv_heads)]
    return [torch.randn(*shape, width, generator=generator).to(device, dtype) for shape in shapes]


def call_on(case: Case, device: str) -> RaggedCall:
    (call,) = case.calls(plan_ragged)
    return moved(call, device)


def assert_near(found: Tensor, expected: Tensor, share: float, name: str) -> None:
    """Errors are of sums: relative to the largest of the tensor."""
    error = (found.double() - expected.double()).abs().max()
    assert error <= share * expected.double().abs().max(), f"{name}: {float(error)}"


@pytest.mark.gpu
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_flash_kernel_equals_its_twin_in_output_logsumexp_and_gradients(dtype, name, heads, merged):
    case = make_case(*CASES[name])
    call, states = call_on(case, "cuda"), states_of(case, HEADS[heads], dtype, "cuda")
    gathered = ragged_attention._gathered(call, *states)
    wide = [tensor.double() for tensor in gathered]
    output, sums = ragged_flash.forward(call, *gathered)
    expected, expected_sums = ragged_plain.forward(call, *wide)
    assert output.dtype == dtype
    assert sums.dtype == torch.float32
    # bf16 keeps 8 bits of a value and fp16 11; the kernel adds up in float32, so its log-sum-exp is good to more.
    share = 2e-2 if dtype == torch.bfloat16 else 3e-3
    assert_near(output, expected, share, "output")
    torch.testing.assert_close(sums.double(), expected_sums, rtol=1e-3, atol=1e-3)
    upstream = torch.randn_like(output)
    if merged:
        # As if further keys took two thirds of the weight, and their values were zero.
        sums, expected_sums = sums + np.log(3), expected_sums + np.log(3)
        output, expected = output / 3, expected / 3
    found = ragged_flash.backward(call, upstream, *gathered, output.contiguous(), sums)
    wanted = ragged_plain.backward(call, upstream.double(), *wide, expected, expected_sums)
    for which, one, other in zip(("query", "key", "value"), found, wanted, strict=True):
        assert_near(one, other, 2 * share, which)


@pytest.mark.gpu
@pytest.mark.parametrize("num_own", [0, 4])
@pytest.mark.parametrize("name", CASES)
def test_merged_attention_on_the_flash_kernel_equals_one_softmax(name, num_own):
    case = make_case(*CASES[name])
    states = states_of(case, (8, 2, 64), torch.bfloat16, "cuda")
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(num_own, 2, len(case.columns), 2, 64, generator=generator).to("cuda", torch.bfloat16)
    inputs = [tensor.requires_grad_() for tensor in (*states, *rows.flatten(0, 1).unbind(0))]
    own = list(zip(inputs[3::2], inputs[4::2], strict=True))
    assert ragged_attention._kernel(states[0]) is ragged_flash
    output = merged_attention(inputs[0], inputs[1], inputs[2], own, [call_on(case, "cuda")])
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in inputs]
    expected = case.attend(wide[0], wide[1], wide[2], list(zip(wide[3::2], wide[4::2], strict=True)))
    assert_near(output.detach().cpu(), expected.detach(), 2e-2, "output")
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, inputs, upstream)
    wanted = torch.autograd.grad(expected, wide, upstream.double().cpu())
    for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert_near(one.cpu(), other, 4e-2, f"input {number}")


class Job:
    """A draft and a pack on a device, and its loss and gradients."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32, **changes: int):
        torch.manual_seed(0)
        shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
        config = Eagle3DraftConfig(vocab_size=64, head_dim=64, **{**shape, **changes})
        model: Eagle3DraftModel = Eagle3DraftModel(config).to(dtype)
        self.model = model.to(device)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(1)
        lengths, steps = [400, 1, 90, 33], 4
        columns, num_slots = np.concatenate([np.arange(length) for length in lengths]), sum(lengths)
        mask = (columns % 190 > 80) & (columns % 23 != 4)
        plan = plan_unroll(lengths, mask, mask, np.arange(num_slots), steps, 100, ragged=device != "cpu")
        self.plan = moved(plan, device)
        self.weights = TTTLoss(steps).weights(self.plan.step_counts)
        self.ids = torch.randint(64, (num_slots,), generator=generator).to(device)
        self.positions = torch.from_numpy(columns).to(device)
        self.aux = torch.randn(num_slots, 3 * 128, generator=generator).to(device, dtype)
        probs = torch.randn(num_slots, 64, generator=generator).mul(3).softmax(-1)
        self.targets = TargetRows.of(probs.to(device, dtype), None)

    def run(self, autocast: bool = False, recompute: bool = False) -> dict[str, Tensor]:
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=autocast):
            work = PackedUnroll(self.model, self.plan, self.ids, self.positions, recompute)
            loss, _ = unroll_packed(
                work,
                self.model.before_head,
                self.model.lm_head.weight,
                self.plan,
                lambda: self.aux,
                self.targets,
                self.weights,
            )
        loss.backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        found = {name: gradient for name, gradient in gradients.items() if gradient is not None}
        return {"loss": loss.detach(), **found}


def assert_close_results(found: dict[str, Tensor], expected: dict[str, Tensor], share: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert_near(tensor.cpu(), expected[name].cpu(), share, name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("num_hidden_layers", [1, 2])
def test_packed_unroll_on_a_device_in_float32_equals_float64_on_the_cpu(device, num_hidden_layers):
    expected = Job("cpu", torch.float64, num_hidden_layers=num_hidden_layers).run()
    assert_close_results(Job(device, num_hidden_layers=num_hidden_layers).run(), expected, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("recompute", [False, True])
def test_packed_unroll_under_autocast_stays_close_to_float64(device, recompute):
    expected = Job("cpu", torch.float64).run()
    found = Job(device).run(autocast=True, recompute=recompute)
    # bf16: 8 bits through four steps of a layer.
    assert_near(found["loss"].cpu(), expected["loss"], 1e-2, "loss")
    assert_close_results(found, expected, 0.1)


@pytest.mark.gpu
def test_a_step_never_waits_for_the_gpu():
    job = Job("cuda")
    # As training has them; their gradient would be sorted, which waits.
    job.model.embed_tokens.weight.requires_grad_(False)
    job.run(autocast=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        job.run(autocast=True)
        job.run(autocast=True, recompute=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_recomputing_lowers_the_peak_on_a_gpu():
    job, peaks = Job("cuda", intermediate_size=2048), []
    for recompute in (False, True):
        job.run(autocast=True, recompute=recompute)
        job.model.zero_grad(set_to_none=True)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        job.run(autocast=True, recompute=recompute)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.gpu
def test_queries_the_kernel_cannot_take_go_to_the_twin():
    case = make_case(*CASES["gaps"])
    states = [state.requires_grad_() for state in states_of(case, (4, 2, 12), torch.bfloat16, "cuda")]
    assert ragged_attention._kernel(states[0]) is ragged_plain
    output = merged_attention(*states, [], [call_on(case, "cuda")])
    assert torch.autograd.grad(output.sum(), states)[0].isfinite().all()


def test_a_plan_moves_to_a_device_whole():
    (call,) = make_case(*CASES["turns"]).calls(plan_ragged)
    there = moved(call, "meta")
    assert all(value.is_meta for value in vars(there).values() if isinstance(value, Tensor))
    assert there.runs == call.runs
    assert replace(call, runs=()).runs == ()
