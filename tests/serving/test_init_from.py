"""A draft read from any directory starts a fresh one that computes what it computed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from eagle_offline.draft.eagle3 import Eagle3DraftModel
from eagle_offline.draft.files import write_draft
from eagle_offline.draft.warm_start import WarmStart, warm_start
from eagle_offline.serving.drafts import ServedDraft, read_draft
from eagle_offline.serving.export import export_draft
from tests.contract.test_exported_equals_trained import unroll
from tests.serving.directories import FLAT_KINDS, SELECTED, VOCAB_SIZE, Kind, flat, make_model, make_origin

CASES = [
    (kind, layout)
    for kind in (
        "plain",
        "qwen3_two_layers_31",
        "trained_embeddings",
        "full_vocabulary",
        "narrow",
        "narrow_qwen3",
        "peagle_four_layers",
        "peagle_qwen3",
    )
    for layout in ("native", "flat", "speculators")
    if not (kind.startswith("narrow") and layout == "speculators")
]


def stored(tmp_path: Path, kind: Kind, layout: str, dtype: str = "fp32") -> ServedDraft:
    """A draft of a kind, written and read back in a layout."""
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_draft(checkpoint, make_model(kind), torch.tensor(kind.selected), make_origin(kind))
    draft = read_draft(checkpoint)
    if layout == "native":
        return draft
    named = {"target_name": "org/target", "target_architectures": ["LlamaForCausalLM"], "num_draft_tokens": 3}
    export_draft(draft, layout, tmp_path / "out", **named, dtype=dtype)  # type: ignore[arg-type]
    return read_draft(tmp_path / "out")


def started(kind: Kind, draft: ServedDraft) -> tuple[Eagle3DraftModel, WarmStart]:
    """A fresh draft with other weights and the embeddings of the target, warm-started."""
    model = make_model(kind, seed=3).requires_grad_(True)
    model.embed_tokens.weight.data.copy_(make_model(kind).embed_tokens.weight)
    return model, warm_start(model, torch.tensor(kind.selected), kind.outputs, draft.weights("org/draft"))


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_logits_are_those_of_the_draft_it_started_from(tmp_path, kind, layout):
    made = FLAT_KINDS[kind]
    model, record = started(made, stored(tmp_path, made, layout))
    for ours, theirs in zip(unroll(model), unroll(make_model(made)), strict=True):
        assert torch.equal(ours, theirs)
    assert (record.head_rows, record.num_head_rows) == (len(made.selected),) * 2
    assert record.aux_layers_known
    assert model.fc.weight.requires_grad


def test_a_half_precision_export_is_widened(tmp_path):
    made = FLAT_KINDS["plain"]
    model, record = started(made, stored(tmp_path, made, "speculators", "bf16"))
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, make_model().fc.weight.bfloat16().float())
    assert not record.own_embeddings, "rounded by the export, and the target's all the same"


def test_another_vocabulary_keeps_the_rows_of_common_tokens(tmp_path):
    """A foreign directory, its ids out of order."""
    made = flat()
    order = torch.tensor([3, 1, 0, 2, 9, 8, 7, 6, 5, 4])
    made.tensors["lm_head.weight"] = made.tensors["lm_head.weight"][order]
    made.tensors["d2t"] = torch.tensor(SELECTED)[order] - torch.arange(10)
    source = read_draft(made.write(tmp_path)).weights("org/draft")
    ids = torch.tensor([0, 1, 2, 11, 13, 21, 39])
    model = make_model(Kind(), seed=3)
    model.lm_head = torch.nn.Linear(16, 7, bias=False)
    before = model.lm_head.weight.detach().clone()
    record = warm_start(model, ids, [1, 3, 4], source)
    rows = dict(zip(SELECTED, make_model().lm_head.weight, strict=True))
    for row, token in enumerate(ids.tolist()):
        assert torch.equal(model.lm_head.weight[row], rows.get(token, before[row]))
    assert record.head_rows == 5
    assert VOCAB_SIZE > 39
