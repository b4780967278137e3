"""Decoding by definition: a full forward a token and no cache, and drafts from scratch in every round.

Drafts are those of the EAGLE-3 chain, or of P-EAGLE's one forward.

Beside the definitions, the random targets and drafts they are asked about, a drafter that replays known answers with
errors, and one that records what another proposes. Nothing here calls the code it judges.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import transformers

from eagle_offline.draft.eagle3 import Eagle3DraftConfig, Eagle3DraftModel
from eagle_offline.serving.drafting import ChainProposal, Proposal, Settled
from eagle_offline.serving.sampling import Sampling
from tests import builders
from tests.draft.styles import twin
from tests.oracles.ttt import Draft, Row, draft_step

AUX_LAYER_IDS = [0, 1, 2]
NUM_LAYERS = 4
VOCAB_SIZE = 24

_MIXED_LAYERS = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen2": ("Qwen2", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window of 8": ("Mistral", {"sliding_window": 8}),
    "Gemma2": ("Gemma2", {"sliding_window": 64}),
    "Gemma2, window of 8": ("Gemma2", {"sliding_window": 8}),
    "Gemma3, window of 8": ("Gemma3", {"sliding_window": 8, "query_pre_attn_scalar": 8, "layer_types": _MIXED_LAYERS}),
    "Cohere": ("Cohere", {}),
    "Cohere2, window of 8": ("Cohere2", {"sliding_window": 8}),
    "Granite": ("Granite", {}),
    "Olmo2": ("Olmo2", {}),
    "Phi3": ("Phi3", {}),
    "Llama4, chunks of 8": (
        "Llama4",
        {
            "attention_chunk_size": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "rope_parameters": _PLAIN_ROPE,
            "layer_types": ["chunked_attention", "full_attention", "chunked_attention", "full_attention"],
        },
    ),
    "GptOss, window of 8": (
        "GptOss",
        {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": _PLAIN_ROPE},
    ),
}
KINDS = list(_KINDS)
WINDOWED = [kind for kind in KINDS if "window" in kind or "chunks" in kind or kind == "Gemma2"]


@cache
def target(
    kind: str = "Llama", dtype: torch.dtype | None = None, vocab_size: int = VOCAB_SIZE, num_layers: int = NUM_LAYERS
) -> torch.nn.Module:
    """A random target that no test changes, in float64 where its attention can be."""
    name, changes = _KINDS[kind]
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": num_layers, **changes}
    if name in ("Gemma3", "Llama4"):  # their text models go by a configuration of another name
        config = getattr(transformers, f"{name}TextConfig")(
            **{**builders._SIZES, "tie_word_embeddings": False, **sizes}
        )
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    else:
        model = builders.make_model(name, **sizes)
    # Attention with soft-capping takes its softmax in float32, which cannot hold the mask of a float64 model.
    eager = model.config._attn_implementation == "eager"
    return model.to(dtype or (torch.float32 if eager else torch.float64))


def prompts(lengths: Sequence[int], vocab_size: int = VOCAB_SIZE, seed: int = 0) -> list[list[int]]:
    """Random prompts of the lengths given."""
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]


@torch.no_grad()
def logits_of(model: torch.nn.Module, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits [B, T, V] of rows of one length, by a full forward without a cache."""
    return model(input_ids=torch.tensor(rows), use_cache=False).logits


@torch.no_grad()
def states_of(model: torch.nn.Module, row: Sequence[int], layer_ids: Sequence[int] = AUX_LAYER_IDS) -> torch.Tensor:
    """Outputs of decoder layers over one row, [T, A * H], low layer first."""
    found: dict[int, torch.Tensor] = {}

    def keep(layer_id: int) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            found[layer_id] = (output[0] if isinstance(output, tuple) else output)[0].clone()

        return hook

    layers = model.model.layers
    handles = [layers[layer_id].register_forward_hook(keep(layer_id)) for layer_id in layer_ids]
    model(input_ids=torch.tensor([list(row)]), use_cache=False)
    for handle in handles:
        handle.remove()
    return torch.cat([found[layer_id] for layer_id in layer_ids], dim=-1)


def greedy_answer(
    model: torch.nn.Module, prompt: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int] = ()
) -> list[int]:
    """The most likely token again and again, a full forward for each; a stop token is the answer's last."""
    answer: list[int] = []
    while len(answer) < max_new_tokens and not (answer and answer[-1] in stop_token_ids):
        answer.append(int(logits_of(model, [[*prompt, *answer]])[0, -1].argmax()))
    return answer


@cache
def long_greedy_answer(kind: str, prompt: tuple[int, ...], max_new_tokens: int) -> tuple[int, ...]:
    """What the target of a kind answers without a stop token."""
    return tuple(greedy_answer(target(kind), prompt, max_new_tokens))


def ended(answer: Sequence[int], max_new_tokens: int, stop_token_ids: Collection[int] = ()) -> list[int]:
    """An answer's part up to the limit or its first stop token, that token included."""
    short = list(answer[:max_new_tokens])
    stops = [place for place, token in enumerate(short) if token in stop_token_ids]
    return short[: stops[0] + 1] if stops else short


# --- Drafts ---


def make_draft(
    model: torch.nn.Module,
    draft_vocab_size: int,
    *,
    seed: int = 0,
    num_layers: int = 1,
    fc_norm: bool = False,
    norm_output: bool = False,
    rope_theta: float = 100.0,
    scale: float = 1.5,
    mask_token_id: int | None = None,
    layer_style: str = "llama",
) -> Eagle3DraftModel:
    """A float64 draft for a target, no parameter near its neutral value; a small theta, so that positions matter.

    With a mask token it is a P-EAGLE draft.
    """
    config = Eagle3DraftConfig(
        vocab_size=model.config.vocab_size,
        draft_vocab_size=draft_vocab_size,
        hidden_size=16,
        target_hidden_size=model.config.hidden_size,
        intermediate_size=20,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_aux_hidden_states=len(AUX_LAYER_IDS),
        fc_norm=fc_norm,
        norm_output=norm_output,
        layer_style=layer_style,  # type: ignore[arg-type]
        parallel_drafting=mask_token_id is not None,
        mask_token_id=mask_token_id,
        rms_norm_eps=1e-3,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        max_position_embeddings=512,
    )
    draft = Eagle3DraftModel(config).double().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in draft.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.3 * noise)
            elif parameter is draft.mask_hidden:
                parameter.copy_(noise)
            else:
                parameter.copy_(scale * noise / parameter.shape[-1] ** 0.5)
    return draft


def selected_ids(draft_vocab_size: int, vocab_size: int = VOCAB_SIZE, seed: int = 0) -> torch.Tensor:
    """A draft vocabulary, strictly increasing."""
    return torch.tensor(sorted(random.Random(seed).sample(range(vocab_size), draft_vocab_size)))


@dataclass(frozen=True)
class Chain:
    """A chain of drafts: token ids of the target's vocabulary, and the logits [Vd] each was the largest of."""

    token_ids: list[int]
    logits: list[torch.Tensor]


@torch.no_grad()
def drafted_chain(
    draft: Draft, selected: torch.Tensor, aux: torch.Tensor, tokens: Sequence[int], num_draft_tokens: int
) -> Chain:
    """The greedy chain after known tokens x_0 … x_n, of which the target has run all but the last.

    Step 0 is a causal forward over the slots 0 … n - 1, slot t holding a_t and x_{t+1} at position t. Step k stands
    at the last slot with position n - 1 + k, holds what step k - 1 fed back and the token it chose, and reads
    step 0's keys up to the slot and the keys of steps 1 … k.
    """
    num_slots = len(tokens) - 1
    everyone = Row(documents=[0] * num_slots, padding=[False] * num_slots, positions=list(range(num_slots)))
    fed_back = draft_step(draft, everyone, 0, torch.tensor(tokens[1:]), draft.project(aux[:num_slots].double()))[-1:]

    def union(step: int, _slot: int, _documents: list[int], _padding: list[bool]) -> list[tuple[int, int]]:
        return [(0, s) for s in range(num_slots)] + [(i, 0) for i in range(1, step + 1)]

    last = Row([0], [False], [num_slots - 1], visible=union, keys=everyone.keys, values=everyone.values)
    chosen, all_logits = [], []
    for step in range(num_draft_tokens):
        if step > 0:
            fed_back = draft_step(draft, last, step, torch.tensor(chosen[-1:]), fed_back)
        logits = draft.logits(fed_back)[0]
        all_logits.append(logits)
        chosen.append(int(selected[int(logits.argmax())]))
    return Chain(chosen, all_logits)


@torch.no_grad()
def drafted_in_parallel(
    draft: Draft, selected: torch.Tensor, aux: torch.Tensor, tokens: Sequence[int], num_draft_tokens: int, mask: int
) -> Chain:
    """What a P-EAGLE draft proposes after known tokens x_0 … x_n, of which the target has run all but the last.

    One forward over elements of an anchor and a depth: the slots 0 … n - 1 at depth 0, slot t holding a_t and x_{t+1},
    and depths 1 … K - 1 of anchor n - 1, holding the mask token and the mask's state. An element stands at position
    anchor + depth and reads those of depth 0 with no later anchor and those of its own anchor that are no deeper.
    """
    num_slots = len(tokens) - 1
    elements = [(slot, 0) for slot in range(num_slots)]
    elements += [(num_slots - 1, depth) for depth in range(1, num_draft_tokens)]

    def reads(_step: int, element: int, _documents: list[int], _padding: list[bool]) -> list[tuple[int, int]]:
        anchor, depth = elements[element]
        return [
            (0, place)
            for place, (other, at) in enumerate(elements)
            if (at == 0 and anchor >= other) or (anchor == other and depth >= at)
        ]

    num_masks = num_draft_tokens - 1
    ids = torch.tensor([*tokens[1:], *[mask] * num_masks])
    mask_hidden = draft.parameters["mask_hidden"].reshape(1, -1).expand(num_masks, -1)
    states = draft.project(torch.cat([aux[:num_slots].double(), mask_hidden]))
    positions = [anchor + depth for anchor, depth in elements]
    row = Row([0] * len(elements), [False] * len(elements), positions, visible=reads)
    logits = draft.logits(draft_step(draft, row, 0, ids, states))[num_slots - 1 :]
    return Chain([int(selected[int(one.argmax())]) for one in logits], list(logits))


def drafted(
    model: Eagle3DraftModel, selected: torch.Tensor, aux: torch.Tensor, tokens: Sequence[int], num_draft_tokens: int
) -> Chain:
    """What a draft of either kind proposes after known tokens; see `drafted_chain` and `drafted_in_parallel`."""
    weights, mask = twin(model), model.config.mask_token_id
    if mask is None:
        return drafted_chain(weights, selected, aux, tokens, num_draft_tokens)
    return drafted_in_parallel(weights, selected, aux, tokens, num_draft_tokens, mask)


@dataclass(frozen=True)
class Round:
    """What a round drafted, and how many of the drafts the answer holds."""

    drafted: list[int]
    accepted: int


def speculative_rounds(
    model: torch.nn.Module,
    draft: Eagle3DraftModel,
    selected: torch.Tensor,
    prompt: Sequence[int],
    answer: Sequence[int],
    num_draft_tokens: int,
    layer_ids: Sequence[int] = AUX_LAYER_IDS,
) -> list[Round]:
    """The rounds that yield a greedy answer, each recomputed from nothing; its first token is known before them."""
    aux, known, rounds = states_of(model, [*prompt, *answer], layer_ids), 1, []
    while known < len(answer):
        guesses = drafted(draft, selected, aux, [*prompt, *answer[:known]], num_draft_tokens).token_ids
        accepted = 0
        for guess, true in zip(guesses, answer[known:], strict=False):
            if guess != true:
                break
            accepted += 1
        rounds.append(Round(guesses, accepted))
        known += accepted + 1
    return rounds


def replayed_rounds(answer: Sequence[int], drafts: Callable[[int], Sequence[int]]) -> list[int]:
    """Drafts accepted in each round when `drafts(known)` are proposed after `known` tokens of the answer."""
    known, accepted = 1, []
    while known < len(answer):
        run = 0
        for guess, true in zip(drafts(known), answer[known:], strict=False):
            if guess != true:
                break
            run += 1
        accepted.append(run)
        known += run + 1
    return accepted


# --- Drafters of tests ---


class Replay:
    """Proposes a known continuation with errors; what it proposes at a place is the same in any batch.

    Also checks what every drafter may rely on: rows, slots and tokens as `Settled` describes them.
    """

    name = "replay"

    def __init__(
        self,
        texts: Sequence[Sequence[int]],
        num_draft_tokens: int,
        error_rate: float,
        *,
        vocab_size: int = VOCAB_SIZE,
        seed: int = 0,
    ):
        self.texts = [list(text) for text in texts]
        self.num_draft_tokens = num_draft_tokens
        self.error_rate = error_rate
        self.vocab_size = vocab_size
        self.seed = seed

    def guess(self, text_id: int, place: int, salt: int = 0) -> int:
        """Token `place` of a text, or with the given rate another one."""
        rng = random.Random(f"{self.seed} {self.texts[text_id][:place]} {salt}")
        text = self.texts[text_id]
        true = text[place] if place < len(text) else rng.randrange(self.vocab_size)
        if rng.random() < self.error_rate:
            return (true + rng.randrange(1, self.vocab_size)) % self.vocab_size
        return true

    def start(self, num_rows: int) -> None:
        assert num_rows == len(self.texts)
        self.rows = list(range(num_rows))
        self.known = [[text[0]] for text in self.texts]

    def select_rows(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[int(row)] for row in rows]

    def read(self, settled: Settled) -> list[int]:
        """How many tokens of its text each row knows now."""
        assert len(settled.input_ids) == len(self.rows)
        places = []
        for index, text_id in enumerate(self.rows):
            count = int(settled.num_slots[index])
            assert count >= 1
            known = self.known[text_id]
            first = len(known) - 1
            assert settled.position_ids[index].tolist() == list(range(first, first + settled.input_ids.shape[1]))
            known += settled.input_ids[index, :count].tolist()
            places.append(len(known))
        assert settled.num_columns > int(settled.position_ids.max())
        return places

    def propose(self, settled: Settled, _sampling: Sampling, _generator: torch.Generator) -> Proposal:
        drafts = [
            [self.guess(text_id, place + k) for k in range(self.num_draft_tokens)]
            for text_id, place in zip(self.rows, self.read(settled), strict=True)
        ]
        return ChainProposal(torch.tensor(drafts))


@dataclass
class Recorder:
    """Passes everything on to a drafter and remembers, prompt by prompt, what it proposed."""

    drafter: Any
    drafted: dict[int, list[list[int]]] = field(default_factory=dict)
    rounds: int = 0

    def __post_init__(self) -> None:
        self.name, self.num_draft_tokens = self.drafter.name, self.drafter.num_draft_tokens

    def start(self, num_rows: int) -> None:
        self.rows = list(range(num_rows))
        self.drafted = {row: [] for row in self.rows}
        self.drafter.start(num_rows)

    def select_rows(self, rows: torch.Tensor) -> None:
        self.rows = [self.rows[int(row)] for row in rows]
        self.drafter.select_rows(rows)

    def propose(self, settled: Settled, sampling: Sampling, generator: torch.Generator) -> Proposal:
        proposal = self.drafter.propose(settled, sampling, generator)
        for row, token_ids in zip(self.rows, proposal.token_ids.tolist(), strict=True):
            self.drafted[row].append(token_ids)
        self.rounds += 1
        return proposal


# --- Distributions ---


def warped(logits: torch.Tensor, temperature: float, top_p: float) -> list[float]:
    """Probabilities of one row of logits: the fewest most likely tokens that hold `top_p` of the mass."""
    scaled = [value / temperature for value in logits.double().tolist()]
    weights = [math.exp(value - max(scaled)) for value in scaled]
    probs = [weight / sum(weights) for weight in weights]
    kept, mass = [], 0.0
    for token in sorted(range(len(probs)), key=lambda token: -probs[token]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += probs[token]
    return [probs[token] / mass if token in kept else 0.0 for token in range(len(probs))]


def joint_distribution(
    model: torch.nn.Module, prompt: Sequence[int], num_tokens: int, temperature: float, top_p: float
) -> dict[tuple[int, ...], float]:
    """Probability of every sequence of `num_tokens` after a prompt, as a product of the target's own."""
    joint: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(num_tokens):
        prefixes = list(joint)
        rows = logits_of(model, [[*prompt, *prefix] for prefix in prefixes])[:, -1]
        joint = {
            (*prefix, token): joint[prefix] * p
            for prefix, row in zip(prefixes, rows, strict=True)
            for token, p in enumerate(warped(row, temperature, top_p))
            if p > 0
        }
    return joint


def chi_square_p_value(counts: dict[Any, int], probs: dict[Any, float]) -> float:
    """How likely counts this far from their expectation are, cells joined until each expects five; 0 if impossible."""
    if any(cell not in probs for cell in counts):
        return 0.0
    total = sum(counts.values())
    cells: list[list[float]] = []
    expected = observed = 0.0
    for cell in sorted(probs, key=lambda cell: (-probs[cell], cell)):
        expected, observed = expected + total * probs[cell], observed + counts.get(cell, 0)
        if expected >= 5:
            cells.append([expected, observed])
            expected = observed = 0.0
    cells[-1][0] += expected
    cells[-1][1] += observed
    assert len(cells) > 1, "one cell says nothing"
    statistic = sum((o - e) ** 2 / e for e, o in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))
