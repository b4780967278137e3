"""What a GPU is fed is what was read, however the memory under it is used again."""

from __future__ import annotations

import threading

import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.data.buffers import HostBuffers
from eagle_offline.data.feed import feed, mapped
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.prefetch import prefetch
from eagle_offline.training.objective import UnrollObjective
from eagle_offline.training.packs import plan_pack
from tests.training.caches import shared_cache

pytestmark = pytest.mark.gpu


def test_tensors_arrive_whole_while_memory_is_used_again_and_again():
    device, buffers, count, size = torch.device("cuda"), HostBuffers(pinned=True), 40, 1 << 24

    def made(number: int) -> tuple[int, torch.Tensor]:
        tensor = buffers.take(size)
        assert tensor.is_pinned()
        return number, tensor.fill_(number)

    wide = torch.randn(4096, 4096, device=device)
    for number, tensor in feed(prefetch(made, range(count), num_workers=3), device):
        assert tensor.is_cuda
        for _ in range(10):  # keep the compute stream behind the host
            wide = (wide @ wide).tanh()
        low, high = tensor.min(), tensor.max()
        del tensor
        assert (int(low), int(high)) == (number, number)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("feed", "prefetch"))]


@pytest.mark.parametrize("encoding", ["factored", "dense"])
def test_packs_merged_on_the_device_hold_the_samples_bits(encoding):
    device, cache = torch.device("cuda"), open_cache(shared_cache(encoding))
    reader, plain = PackReader.for_device(device), PackReader()
    groups = [[(cache, index) for index in range(start, start + 4)] for start in range(0, 20, 4)]

    def read(group):
        return plan_pack(reader.read(group), cache.selected_token_mask, UnrollObjective(TTTLoss(3)), device)

    for group, pack in zip(groups, feed(prefetch(read, groups, num_workers=2), device), strict=True):
        tensors: list[torch.Tensor] = []
        mapped(pack, lambda tensor: tensors.append(tensor) or tensor)  # noqa: B023
        assert {tensor.device.type for tensor in tensors} == {"cuda"}
        expected = plain.read(group)
        for name in ("aux_states", "target_states"):
            (found,), (wanted,) = getattr(pack, name), getattr(expected, name)
            assert [field.encoding for field in found.fields] == ["planes"] * len(found.fields)
            assert torch.equal(found.merge().cpu(), wanted.merge())
