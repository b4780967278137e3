"""What is captured from a saved target is what a plain full forward of it computes, whatever its class."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from eagle_offline.errors import MismatchError
from eagle_offline.target.capture import TokenSample, check_capture
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.layout import read_head
from eagle_offline.target.load import load_model, resolve_target
from tests.target.architectures import ARCHITECTURES, REFUSED, VOCAB_SIZE, named

AUX_LAYER_IDS = [0, 2, 4]
LENGTHS = [41, 23, 9, 2]
EVERY = [*named(slow=False), *(pytest.param(name, marks=pytest.mark.slow) for name in named(slow=True))]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator) for length in LENGTHS]


def plain_forward(model: Any, row: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    """What each decoder layer gives and the logits, of one row alone, by the class itself, loaded by itself."""
    (layers,) = (
        module
        for name, module in model.named_modules()
        if name.split(".")[-1] in ("layers", "h", "blocks") and len(cast(nn.ModuleList, module)) == 6
    )
    states: list[torch.Tensor] = []

    def keep(_layer: Any, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(keep) for layer in layers]
    with torch.no_grad():
        logits = model(input_ids=row[None], attention_mask=torch.ones(1, len(row))).logits[0]
    for handle in handles:
        handle.remove()
    return [state[0] for state in states], logits


@pytest.mark.parametrize("name", EVERY)
def test_captured_states_and_probabilities_are_those_of_a_plain_forward(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    directory = architecture.save(tmp_path)
    kind = getattr(transformers, architecture.model or f"{architecture.kind}ForCausalLM")
    plain = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation=architecture.oracle_attention)
    target = HFEagle3TargetModel(load_model(resolve_target(str(directory)), "cpu", None), AUX_LAYER_IDS)
    head = read_head(target.model)
    batch = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    for number, row in enumerate(rows()):
        batch[number, : len(row)] = row
    layers, last = target.capture(batch, LENGTHS)
    selected = torch.arange(1, VOCAB_SIZE, 3)
    for number, row in enumerate(rows()):
        states, logits = plain_forward(plain.eval(), row)
        for layer_id, captured in zip(AUX_LAYER_IDS, layers, strict=True):
            torch.testing.assert_close(captured[number, : len(row)], states[layer_id], rtol=1e-4, atol=1e-4)
        final = last[number, : len(row)]
        torch.testing.assert_close(head.logits(final), logits.float(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            head.select(selected).logits(final).softmax(-1),
            logits.float()[:, selected].softmax(-1),
            rtol=1e-4,
            atol=1e-5,
        )
    ids = rows()[0].numpy().astype(np.int32)
    check_capture(target, head, TokenSample(0, ids, np.ones(len(ids), np.uint8)))


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_is_refused_in_a_line(name: str, tmp_path: Path) -> None:
    architecture, reason = REFUSED[name]
    directory = architecture.save(tmp_path)
    ids = rows()[0].numpy().astype(np.int32)

    def load_and_check() -> None:
        target = HFEagle3TargetModel(load_model(resolve_target(str(directory)), "cpu", None), AUX_LAYER_IDS)
        check_capture(target, read_head(target.model), TokenSample(0, ids, np.ones(len(ids), np.uint8)))

    with pytest.raises(MismatchError, match=reason) as caught:
        load_and_check()
    assert "\n" not in str(caught.value)
