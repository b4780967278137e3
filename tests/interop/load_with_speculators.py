"""Loads drafts with the speculators library and writes the logits it computes; runs in an environment of its own.

Usage: python load_with_speculators.py DIRECTORY

Every ``DIRECTORY/<case>`` holds ``target``, the exported ``flat`` and ``speculators`` directories and
``inputs.safetensors``; ``from_pretrained.safetensors`` and ``converted.safetensors`` are written beside them, each
with ``logits`` float32 ``[K, T, Vd]``, of P-EAGLE ``[1, M, Vd]`` for the ``M`` elements in the inputs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig
from speculators.convert import convert_model
from speculators.models.peagle import core


def load(directory: Path, *, embeddings_of_target: bool = False) -> torch.nn.Module:
    """Return the draft as speculators makes it, with attention that runs on a CPU.

    Args:
        directory: in the speculators layout.
        embeddings_of_target: put the target's token embeddings in. The library means to do so itself when the file
            has none, but looks for NaN where this transformers leaves uninitialised memory.
    """
    config = SpeculatorModelConfig.from_pretrained(str(directory))
    config.transformer_layer_config._attn_implementation = "sdpa"
    draft = SpeculatorModel.from_pretrained(str(directory), config=config)
    if embeddings_of_target:
        draft._load_verifier_weights(overwrite_embed_tokens=True)
    return draft.float().eval()


@torch.no_grad()
def step_logits(draft: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits ``[K, T, Vd]`` of an unroll over given tokens."""
    with heads_of(draft) as logits:
        draft(
            hidden_states=inputs["aux_hidden_states"],
            input_ids=inputs["input_ids"],
            document_ids=torch.zeros_like(inputs["input_ids"]),
            position_ids=inputs["position_ids"],
            ttt_steps=int(inputs["ttt_steps"]),
        )
    return torch.stack(logits)


@torch.no_grad()
def parallel_logits(draft: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits ``[1, M, Vd]`` of P-EAGLE elements, those in the inputs in the place of drawn ones."""
    drawn = mock.Mock(return_value=(inputs["anchor_pos"], inputs["depth"]))
    # The loss is of no interest here, and has no kernels for a CPU.
    loss = mock.Mock(return_value=(None, {}))
    with (
        mock.patch.multiple(core, generate_cod_sample_indices=drawn, compute_metrics=loss),
        heads_of(draft) as logits,
    ):
        draft(
            hidden_states=inputs["aux_hidden_states"],
            input_ids=inputs["input_ids"],
            document_ids=torch.zeros_like(inputs["input_ids"]),
            verifier_last_hidden_states=torch.zeros(*inputs["input_ids"].shape, draft.hidden_size),
        )
    return torch.stack(logits)


@contextmanager
def heads_of(draft: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Yield a list that gets the logits of every call of the draft's head, the only row of the batch."""
    logits: list[torch.Tensor] = []
    handle = draft.lm_head.register_forward_hook(lambda _module, _inputs, output: logits.append(output[0].clone()))
    yield logits
    handle.remove()


def main(root: Path) -> None:
    """Load every case both ways."""
    for case in sorted(path for path in root.iterdir() if path.is_dir()):
        inputs = load_file(case / "inputs.safetensors")
        facts = json.loads((case / "case.json").read_text())
        logits_of = parallel_logits if "anchor_pos" in inputs else step_logits
        save_file({"logits": logits_of(load(case / "speculators"), inputs)}, case / "from_pretrained.safetensors")
        if facts["convertible"]:
            convert_model(
                model=str(case / "flat"),
                verifier=str(case / "target"),
                algorithm="eagle3",
                output_path=str(case / "converted"),
                eagle_aux_hidden_state_layer_ids=facts["layers_executed"],
            )
            converted = load(case / "converted", embeddings_of_target=not facts["own_embeddings"])
            save_file({"logits": step_logits(converted, inputs)}, case / "converted.safetensors")
    sys.stdout.write(json.dumps({name: version(name) for name in ("speculators", "torch", "transformers")}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
