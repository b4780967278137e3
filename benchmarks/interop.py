"""Does another project's loader make the same draft of our exports?

Drafts of several kinds are exported in both layouts; speculators, in an environment of its own, loads the
speculators directory as it is and the flat one through its converter, and computes the logits of an unroll, or of
P-EAGLE's one forward over elements that we chose. Compared are the logits of every step, every slot or element and
every token with ours, float32. ``make interop`` runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.harness import ROOT, Figures
from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.serving.drafts import ServedDraft
from eagle_offline.serving.export import export_draft
from eagle_offline.serving.layouts import layers_executed

NAME = "interop"
QUESTION = __doc__

# Python of the environment that `make interop` sets up.
INTEROP_PYTHON = "INTEROP_PYTHON"
_LOADER = ROOT.parent / "tests" / "interop" / "load_with_speculators.py"

# Logits of both sides are float32 sums of a few dozen products of size one.
TOLERANCE = 1e-5

TTT_STEPS, NUM_SLOTS, VOCAB_SIZE = 4, 24, 96
AUX_LAYER_IDS = {3: [1, 2, 4], 4: [0, 1, 2, 4]}
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


_PARALLEL: dict[str, Any] = {"parallel_drafting": True, "mask_token_id": 7}
# Whole chains of so many depths are compared, and some that end before.
NUM_DEPTHS = 6


@dataclass(frozen=True)
class Draft:
    """A kind of draft.

    Attributes:
        changes: config fields.
        draft_vocab_size: ``Vd``.
        own_embeddings: the draft trained its token embeddings; they are the target's otherwise.
        convertible: whether the library's converter keeps this kind whole: it builds one layer of Llama's over three
            states, and leaves other norms out in silence.
    """

    changes: dict[str, Any] = field(default_factory=dict)
    draft_vocab_size: int = 40
    own_embeddings: bool = False
    convertible: bool = True


DRAFTS = {
    "eagle3": Draft(),
    "normed output": Draft({"norm_output": True}),
    "normed aux states": Draft({"fc_norm": True}, convertible=False),
    "eagle3.1": Draft({"fc_norm": True, "norm_output": True}, convertible=False),
    "full vocabulary": Draft(draft_vocab_size=VOCAB_SIZE),
    "own embeddings": Draft(own_embeddings=True),
    "llama3 rope": Draft({"rope_parameters": _LLAMA3_ROPE}),
    "two layers": Draft({"num_hidden_layers": 2}, convertible=False),
    "four aux layers": Draft({"num_aux_hidden_states": 4}, convertible=False),
    "qwen3 layers": Draft({"layer_style": "qwen3"}, convertible=False),
    "two qwen3 layers, eagle3.1": Draft(
        {"layer_style": "qwen3", "num_hidden_layers": 2, "fc_norm": True, "norm_output": True}, convertible=False
    ),
    "peagle": Draft(_PARALLEL, convertible=False),
    "peagle, own embeddings": Draft(_PARALLEL, own_embeddings=True, convertible=False),
    "peagle, four layers": Draft({**_PARALLEL, "num_hidden_layers": 4}, convertible=False),
    "peagle, four aux layers": Draft({**_PARALLEL, "num_aux_hidden_states": 4}, convertible=False),
    "peagle, two qwen3 layers": Draft(
        {**_PARALLEL, "layer_style": "qwen3", "num_hidden_layers": 2}, draft_vocab_size=VOCAB_SIZE, convertible=False
    ),
}


def cases(device: str) -> dict[str, Callable[[], Figures]]:
    """Return one case a kind of draft; both sides run on a CPU."""
    if device != "cpu":
        return {}
    return {name: lambda name=name: _measure(name) for name in DRAFTS}  # type: ignore[misc]


def _measure(name: str) -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        case = Path(directory) / "cases" / "draft"
        expected = _write_case(DRAFTS[name], case)
        versions = _load_elsewhere(case.parent)
        figures: Figures = {"largest_logit": float(expected.abs().max()), "num_logits": expected.numel()}
        for way in ("from_pretrained", "converted"):
            if (case / f"{way}.safetensors").is_file():
                found = load_file(case / f"{way}.safetensors")["logits"]
                assert found.shape == expected.shape, f"{way}: {found.shape}, expected {expected.shape}"
                difference = float((found - expected).abs().max())
                if difference > TOLERANCE:
                    raise SystemExit(f"{name}, {way}: logits differ by {difference}, expected at most {TOLERANCE}")
                figures[f"{way}_largest_difference"] = difference
    return {**figures, **{f"{package}_version": number for package, number in versions.items()}}


def _load_elsewhere(directory: Path) -> dict[str, str]:
    """Run the loader in its own environment; return the versions it used."""
    python = os.environ.get(INTEROP_PYTHON)
    if python is None:
        raise SystemExit(f"{INTEROP_PYTHON} names no Python with speculators: run `make interop`")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    ended = subprocess.run(
        [python, str(_LOADER), str(directory)], env=environment, capture_output=True, text=True, check=False
    )
    if ended.returncode:
        raise SystemExit(f"speculators could not load a draft:\n{ended.stderr[-3000:]}")
    return dict(json.loads(ended.stdout.splitlines()[-1]))


def _write_case(kind: Draft, case: Path) -> torch.Tensor:
    """Write a target, its draft in both layouts and inputs; return the logits that are right.

    They are ``[K, T, Vd]`` of an unroll's steps, or ``[1, M, Vd]`` of P-EAGLE's elements.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    target = LlamaForCausalLM(LlamaConfig(**_SHAPE, num_hidden_layers=6)).eval()
    target.save_pretrained(case / "target")
    shape = {**_SHAPE, **kind.changes, "draft_vocab_size": kind.draft_vocab_size}
    model = Eagle3DraftModel(Eagle3DraftConfig(**shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms away from 1 and weights large enough that every part shows in the logits.
            # The mask's state is as large as aux states are.
            if parameter is not model.mask_hidden:
                parameter.copy_(1 + 0.3 * torch.randn_like(parameter) if parameter.dim() == 1 else parameter * 8)
        if not kind.own_embeddings:
            model.embed_tokens.weight.copy_(target.get_input_embeddings().weight)
    ids = torch.randperm(VOCAB_SIZE)[: kind.draft_vocab_size].sort().values
    num_aux = model.config.num_aux_hidden_states
    layer_ids = AUX_LAYER_IDS[num_aux]
    origin = DraftOrigin(
        target_id="target",
        target_revision=None,
        target_digest="0" * 32,
        target_architecture="LlamaForCausalLM",
        target_num_layers=6,
        target_hidden_size=model.config.hidden_size,
        target_vocab_size=VOCAB_SIZE,
        tokenizer_digest="0" * 32,
        template_digest="0" * 32,
        aux_layer_ids=layer_ids,
        cache_digest="0" * 32,
        dataset={},
        draft_vocab_digest="0" * 32,
        draft_vocab_coverage=1.0,
        objective="peagle" if model.config.parallel_drafting else "eagle3",
        embeddings_trained=kind.own_embeddings,
        step=0,
    )
    draft = ServedDraft(model, ids, layer_ids, "native", has_embeddings=True, origin=origin)
    for layout in ("flat", "speculators"):
        export_draft(
            draft,
            layout,  # type: ignore[arg-type]
            case / layout,
            target_name=str(case / "target"),
            target_architectures=["LlamaForCausalLM"],
            num_draft_tokens=TTT_STEPS,
            dtype="fp32",
        )
    inputs = {
        "input_ids": torch.randint(VOCAB_SIZE, (1, NUM_SLOTS)),
        "aux_hidden_states": torch.randn(1, NUM_SLOTS, num_aux * model.config.hidden_size),
        "position_ids": torch.arange(NUM_SLOTS).unsqueeze(0),
        "ttt_steps": torch.tensor(TTT_STEPS),
    }
    if model.config.parallel_drafting:
        inputs |= _elements()
    save_file(inputs, case / "inputs.safetensors")
    facts = {
        "convertible": kind.convertible,
        "own_embeddings": kind.own_embeddings,
        "layers_executed": layers_executed(layer_ids),
    }
    (case / "case.json").write_text(json.dumps(facts))
    return _parallel_logits(model, inputs) if model.config.parallel_drafting else _unroll_logits(model, inputs)


def _elements() -> dict[str, torch.Tensor]:
    """Return elements of a parallel forward, int64 ``[M]`` each: depth 0 everywhere, then chains of unlike lengths."""
    elements = [
        (anchor, depth)
        for depth in range(NUM_DEPTHS)
        for anchor in range(NUM_SLOTS - depth)
        if depth == 0 or (anchor % 4 != 1 and depth <= anchor % NUM_DEPTHS + 1)
    ]
    anchor_pos, depth = torch.tensor(elements).T.contiguous()
    return {"anchor_pos": anchor_pos, "depth": depth}


@torch.no_grad()
def _parallel_logits(model: Eagle3DraftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return our logits ``[1, M, Vd]`` of the given elements, who reads whom written out."""
    anchor_pos, depth = inputs["anchor_pos"], inputs["depth"]
    context = (depth == 0) & (anchor_pos[:, None] >= anchor_pos)
    visible = context | ((anchor_pos[:, None] == anchor_pos) & (depth[:, None] >= depth))
    known = depth == 0
    assert model.config.mask_token_id is not None
    ids = inputs["input_ids"][0, anchor_pos].masked_fill(~known, model.config.mask_token_id)
    states = model.project_hidden_states(inputs["aux_hidden_states"][:, anchor_pos])
    states = torch.where(known[:, None], states, model.project_mask_hidden())
    attend = partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=visible, enable_gqa=True)
    positions = (anchor_pos + depth).unsqueeze(0)
    return model.compute_logits(model.forward_parallel(ids.unsqueeze(0), states, positions, attend))


@torch.no_grad()
def _unroll_logits(model: Eagle3DraftModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return our logits of every step and slot over the given tokens."""
    from eagle_offline.alignment import shift_left_with_zero

    ids, hidden = inputs["input_ids"], model.project_hidden_states(inputs["aux_hidden_states"])
    cache_hidden: list[list[Any]] = [[], []]
    logits = []
    for _step in range(TTT_STEPS):
        hidden = model(ids, hidden, torch.ones_like(ids), inputs["position_ids"], cache_hidden)
        logits.append(model.compute_logits(hidden)[0])
        ids = shift_left_with_zero(ids)
    return torch.stack(logits)
