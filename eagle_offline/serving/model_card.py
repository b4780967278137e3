"""The README of an exported draft: what it is for, where it comes from, how to serve it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from eagle_offline.draft.eagle3 import Eagle3DraftConfig
from eagle_offline.draft.layers import LayerStyle
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.serving.drafts import ServedDraft
from eagle_offline.serving.layouts import ExportLayout, layers_executed
from eagle_offline.serving.report import CheckReport
from eagle_offline.serving.rules import ENGINE_NAMES, Engine

CARD_FILE: Final = "README.md"

_STYLES: Final[dict[LayerStyle, str]] = {"llama": "Llama's", "qwen3": "Qwen3's, queries and keys normalised"}


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the draft's origin.

    Attributes:
        draft: what was exported.
        layout, dtype: as it was exported.
        target_name: hub id or path under which the target is found.
        num_draft_tokens: ``K`` of the commands.
        directory_name: of the export.
        has_embeddings: whether the file holds the draft's embeddings.
    """

    draft: ServedDraft
    layout: ExportLayout
    dtype: str
    target_name: str
    num_draft_tokens: int
    directory_name: str
    has_embeddings: bool


def model_card(facts: CardFacts, report: CheckReport) -> str:
    """Return the card as Markdown with the front matter that the hub reads."""
    config = facts.draft.model.config
    variant = "EAGLE-3.1" if config.fc_norm or config.norm_output else "EAGLE-3"
    kind = "A P-EAGLE" if config.parallel_drafting else f"An {variant}"
    parts = [
        _front_matter(facts),
        f"# {facts.directory_name}\n",
        f"{kind} draft model for speculative decoding with `{facts.target_name}`, and with no other target.",
        _section("Serve", [*_merged_first(facts.draft.origin), *_commands(facts, report)]),
        _section("The draft", [_table(_shape_rows(facts))]),
    ]
    if facts.draft.origin is not None:
        parts.append(_section("Where it comes from", [_table(_origin_rows(facts.draft.origin))]))
        parts.append(_section("Held-out metrics", [_heldout(facts.draft.origin)]))
    parts.append(f"\nWritten by eagle-offline in the {facts.layout} layout.")
    return "\n".join(parts) + "\n"


def _front_matter(facts: CardFacts) -> str:
    method = "p-eagle" if facts.draft.model.config.parallel_drafting else "eagle3"
    # JSON strings are YAML strings.
    return "\n".join(
        [
            "---",
            f"base_model: {json.dumps(facts.target_name)}",
            "pipeline_tag: text-generation",
            "tags:",
            *(f"- {tag}" for tag in ("speculative-decoding", method, "draft-model", "eagle-offline")),
            "---",
            "",
        ]
    )


def _merged_first(origin: DraftOrigin | None) -> Iterable[str]:
    if origin is not None and origin.target_adapter is not None:
        yield (
            f"The draft is for `{origin.target_id}` with the adapter {origin.target_adapter} merged into it. Serve the "
            "merged model: beside the target alone, fewer tokens are accepted.\n"
        )


def _commands(facts: CardFacts, report: CheckReport) -> Iterable[str]:
    target, name, tokens = shlex.quote(facts.target_name), facts.directory_name, facts.num_draft_tokens
    speculative = {"method": "eagle3", "model": name, "num_speculative_tokens": tokens}
    if facts.draft.model.config.parallel_drafting:
        speculative["parallel_drafting"] = True
    vllm = f"vllm serve {target} --speculative-config {shlex.quote(json.dumps(speculative))}"
    sglang = (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 "
        f"--speculative-draft-model-path {shlex.quote(name)} --speculative-num-steps {tokens} "
        f"--speculative-eagle-topk 1 --speculative-num-draft-tokens {tokens + 1}"
    )
    commands: dict[Engine, str] = {"vllm": vllm, "sglang": sglang}
    for engine, command in commands.items():
        problems = report.problems(engine)
        if problems:
            yield f"{ENGINE_NAMES[engine]}: not with this directory: {problems[0].message}.\n"
        else:
            yield f"{ENGINE_NAMES[engine]}:\n\n```sh\n{command}\n```\n"


def _shape_rows(facts: CardFacts) -> dict[str, Any]:
    config, outputs = facts.draft.model.config, facts.draft.aux_layer_ids or []
    return {
        "layers": f"{config.num_hidden_layers}, {_STYLES[config.layer_style]}",
        "hidden size, draft / target": f"{config.hidden_size} / {config.target_hidden_size}",
        "vocabulary, draft / target": f"{config.draft_vocab_size} / {config.vocab_size}",
        "target layers read, 0-based outputs": outputs,
        "target layers read, layers executed": layers_executed(outputs),
        "aux states normalised one by one (`fc_norm`)": config.fc_norm,
        **_drafting_rows(config),
        "RoPE": json.dumps(config.rope_parameters),
        "token embeddings": "in the file" if facts.has_embeddings else "the target's",
        "dtype": facts.dtype,
    }


def _drafting_rows(config: Eagle3DraftConfig) -> dict[str, Any]:
    """Return how tokens after a round's first are drafted."""
    if config.parallel_drafting:
        return {"tokens of a round": "all in one forward", "token that stands for one not known": config.mask_token_id}
    return {"normed state fed back (`norm_output`)": config.norm_output}


def _origin_rows(origin: DraftOrigin) -> dict[str, Any]:
    sources = origin.dataset.get("sources")
    known = [source for source in sources if isinstance(source, Mapping)] if isinstance(sources, list) else []
    return {
        "target": origin.target_id,
        "target revision": origin.target_revision or "local",
        "adapter merged into the target": origin.target_adapter or "none",
        "target digest": origin.target_digest,
        "target shape": f"{origin.target_architecture}, {origin.target_num_layers} layers of "
        f"{origin.target_hidden_size}, vocabulary {origin.target_vocab_size}",
        "tokenizer digest": origin.tokenizer_digest,
        "chat template digest": origin.template_digest,
        "cache digest": origin.cache_digest,
        "data": ", ".join(f"{source.get('name')} ({source.get('digest')})" for source in known) or "not recorded",
        "samples": origin.dataset.get("num_samples", "not recorded"),
        "draft vocabulary digest": origin.draft_vocab_digest,
        "draft vocabulary coverage of supervised tokens": f"{origin.draft_vocab_coverage:.4f}",
        "objective": f"{origin.objective}, {_num_steps(origin)}",
        "optimizer steps": origin.step,
        "started from": origin.init_from or "the target's embeddings and head",
        "embeddings trained": origin.embeddings_trained,
    }


def _num_steps(origin: DraftOrigin) -> str:
    return f"{origin.ttt_steps} steps" if origin.num_depths is None else f"{origin.num_depths} depths"


def _heldout(origin: DraftOrigin) -> str:
    if not origin.heldout:
        return "None were recorded."
    return _table({name: _rounded(value) for name, value in origin.heldout.items()})


def _rounded(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(_rounded(item) for item in value)
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _section(title: str, lines: Iterable[str]) -> str:
    return "\n".join([f"\n## {title}\n", *lines])


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {_cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
