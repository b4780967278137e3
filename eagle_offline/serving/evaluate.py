"""From settings to figures: loads target, draft and prompts, checks that they fit, and decodes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import PurePath
from typing import Any, cast

from eagle_offline.config import EvaluateSettings
from eagle_offline.devices import resolve_device
from eagle_offline.interrupts import StopRequest
from eagle_offline.progress import Progress
from eagle_offline.provenance import describe_environment
from eagle_offline.serving.decoding import Limits
from eagle_offline.serving.drafts import ServedDraft
from eagle_offline.serving.evaluation import PLAIN, EvaluationPlan, Evaluator
from eagle_offline.serving.pairing import check_belongs, pair
from eagle_offline.serving.prompts import default_prompts, read_prompts
from eagle_offline.serving.results import Evaluation
from eagle_offline.serving.sampling import Sampling
from eagle_offline.target.load import load_model, load_tokenizer, resolve_target
from eagle_offline.text.templates import ChatTemplate

TRAINED, UNTRAINED = "trained", "untrained"

_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# Where a target does not say how far its positions reach.
_UNBOUNDED_TOKENS = 1 << 20


def evaluate_draft(
    settings: EvaluateSettings,
    draft: ServedDraft,
    compared: Sequence[ServedDraft],
    num_draft_tokens: int,
    stop: StopRequest,
) -> Evaluation:
    """Return what a draft is worth beside its target.

    Args:
        settings: what is decoded, and how.
        draft: the draft in question.
        compared: those that ``settings.compare`` names.
        num_draft_tokens: tokens that each drafts a round.
        stop: asked before every batch.

    Raises:
        StoppedEarly: asked to stop.
        EagleOfflineError: target, draft or prompts that cannot be read, or that do not belong together.
    """
    sampling = Sampling(settings.temperature, settings.top_p)
    source = resolve_target(
        settings.target,
        settings.revision,
        settings.trust_remote_code,
        flag="--target",
        adapter=settings.adapter,
        adapter_revision=settings.adapter_revision,
    )
    for given, name in zip((draft, *compared), (settings.draft, *settings.compare), strict=True):
        check_belongs(given, name, source, any_checkpoint=settings.any_target)
    template = ChatTemplate(load_tokenizer(source, settings.chat_template))
    if settings.prompts is None:
        conversations = default_prompts()[: settings.max_prompts]
    else:
        conversations = read_prompts(settings.prompts, split=settings.split, limit=settings.max_prompts)
    device = resolve_device(settings.device)
    model = load_model(source, device, settings.compute_dtype)
    pairs = {TRAINED: pair(draft, model)}
    if settings.compare_untrained:
        pairs[UNTRAINED] = pairs[TRAINED].untrained()
    names = names_of((settings.draft, *settings.compare), (PLAIN, TRAINED, UNTRAINED))[1:]
    pairs |= {name: pair(other, model) for name, other in zip(names, compared, strict=True)}
    plan = EvaluationPlan(
        num_draft_tokens=num_draft_tokens,
        limits=Limits(settings.max_new_tokens, stop_token_ids(model, template.tokenizer)),
        sampling=sampling,
        batch_size=settings.batch_size,
        seed=settings.seed,
        max_tokens=_max_tokens(model),
    )
    num_turns = sum(len(conversation.turns) for conversation in conversations)
    with Progress("evaluate", num_turns, unit="answers") as progress:
        evaluation = Evaluator(pairs, template, plan).run(conversations, progress.reach, lambda: stop.requested)
    return evaluation.model_copy(
        update={
            "draft": settings.draft,
            "compared": dict(zip(names, settings.compare, strict=True)),
            "target": settings.target,
            "prompts": settings.prompts or "built in",
            "environment": describe_environment(device),
        }
    )


def names_of(directories: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """Return a short name for each directory, no two alike: as much of its path's end as that takes.

    Args:
        directories: paths or hub ids.
        taken: names that none may have.

    Example:
        >>> names_of(["runs/a/export/flat", "runs/b/export/flat", "runs/c", "runs/c"])
        ['a/export/flat', 'b/export/flat', 'c', 'c (2)']
    """
    ends: list[list[str]] = []
    for directory in directories:
        parts = PurePath(directory).parts or (directory,)
        ends.append(["/".join(parts[-count:]) for count in range(1, len(parts) + 1)])
    names: list[str] = []
    for place, own in enumerate(ends):
        others = {
            end for other, theirs in enumerate(ends) if directories[other] != directories[place] for end in theirs
        }
        name = next((end for end in own if end not in others and end not in taken), own[-1])
        copies = sum(name == earlier or earlier.startswith(f"{name} (") for earlier in names) + (name in taken)
        names.append(f"{name} ({copies + 1})" if copies else name)
    return names


def stop_token_ids(model: Any, tokenizer: Any) -> set[int]:
    """Return the tokens that end an answer: the generation config's and the tokenizer's end-of-sequence tokens."""
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = found if isinstance(found, list) else [found]
    return {int(token) for token in (*listed, tokenizer.eos_token_id) if token is not None}


def _max_tokens(model: Any) -> int:
    """Return the longest row that is decoded.

    Rotary frequencies of some kinds change once a forward reaches beyond the length that they are made for; then an
    answer depends on how its tokens were cut into forwards, with drafts and without.
    """
    config = cast(Any, model).config.get_text_config()
    longest = int(getattr(config, "max_position_embeddings", None) or _UNBOUNDED_TOKENS)
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
        longest = min(longest, int(rope.get("original_max_position_embeddings") or longest))
    return longest
