"""Turns a conversation into token ids and a loss mask by the tokenizer's chat template.

The one place that knows Jinja templates and tokenizer offsets; knows neither files nor the token table.

The assistant's text is found as character spans of the rendering, by one of two ways: the template's own
`{% generation %}` tags, or, without tags, by rendering parts of the conversation and checking that they agree with
the whole. Then one rule maps characters to tokens: **a token is supervised iff its first character lies in
a span.** So a token that straddles the start of a span is not, and an end-of-turn token that swallows the template's
line break after it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eagle_offline.errors import MismatchError, UsageError, one_line
from eagle_offline.provenance import digest_json
from eagle_offline.text.assistant_spans import TEMPLATE_DISAGREES, SpanFinder
from eagle_offline.text.conversations import REASONING_KEYS, Message, RowProblem
from eagle_offline.text.marked_rendering import Messages, Span
from eagle_offline.text.turn_choice import choose_turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EDGE_IN_TOKEN = "turn-edge-in-token"  # why a row has no mask where the tokenizer has no offsets
EXCERPT_CHARACTERS = 24

_GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Templates that print today's date would give other tokens every day; this fixed day is the one Llama 3.1's template
# falls back to. Put before the template on its first line; the empty expression keeps a leading line break.
_FIXED_CLOCK = (
    "{% macro strftime_now(format) %}{{ format"
    "|replace('%d','26')|replace('%-d','26')|replace('%b','Jul')|replace('%B','July')|replace('%m','07')"
    "|replace('%Y','2024')|replace('%y','24')|replace('%A','Friday')|replace('%a','Fri')"
    "|replace('%H','00')|replace('%M','00')|replace('%S','00') }}{% endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        input_ids: int32 [T].
        loss_mask: uint8 [T], 1 where the assistant produced the token, its end-of-turn token included.
        notes: What a reader should know of a row that is taken nevertheless; see `turn_choice`.
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray
    notes: tuple[str, ...] = ()


class ChatTemplate:
    """A tokenizer together with its chat template.

    Args:
        tokenizer: A transformers tokenizer, fast or slow; not changed. Without a template it encodes no conversation.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    @cached_property
    def vocab_size(self) -> int:
        """Return the tokenizer's largest id, plus 1."""
        return max(self.tokenizer.get_vocab().values()) + 1

    def encode(
        self,
        conversation: Sequence[Message],
        tools: list[dict[str, Any]] | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Render and tokenize a conversation; nothing is truncated, no special token is added to the rendering.

        Worked example, one token a word, `|` between tokens, supervised ones marked (ChatML, without tags):
        `<|im_start|>|user|hi|<|im_end|>|<|im_start|>|assistant|yes*|<|im_end|>*`

        Args:
            conversation: The turns.
            tools: Tool schemas.
            arguments: Further variables of the template, such as `enable_thinking`.

        Raises:
            RowProblem: `template-refused` (the template raises on this conversation), `template-disagrees` (it has no
                tags, and its rendering does not say what the assistant produced), `turn-edge-in-token`, `invalid-text`
                or what `choose_turns` says.
            UsageError: The template is not valid Jinja.
            MismatchError: There is no template.
        """
        messages = [_template_input(message) for message in conversation]
        try:
            text, spans = self._rendered(messages, tools, arguments or {})
        except RowProblem as problem:
            # Most templates write the arguments of a tool call as JSON, some take them as text.
            as_text = [message.as_template_input() for message in conversation]
            if messages == as_text or problem.reason_code == TEMPLATE_DISAGREES:
                raise
            text, spans = self._rendered(as_text, tools, arguments or {})
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem("invalid-text", f"half a surrogate pair ({text[error.start]!r}); expected text") from error
        spans, notes = choose_turns(conversation, text, spans, self._end_markers)
        if not self.tokenizer.is_fast:
            return self._encode_by_prefixes(text, spans, notes)
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        input_ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        begins = self._token_begins(encoding["offset_mapping"])
        loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
        for start, end in spans:
            loss_mask[(begins >= start) & (begins < end)] = 1
        return Encoded(input_ids, loss_mask, notes)

    def encode_prompt(self, conversation: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the assistant begins to speak.

        Raises:
            RowProblem: `template-refused`.
            UsageError: The template is not valid Jinja. MismatchError: There is none.
        """
        messages = [_template_input(message) for message in conversation]
        text, _ = self._render(self._jinja(tools), messages, tools, {}, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _rendered(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, arguments: Mapping[str, Any]
    ) -> tuple[str, list[Span]]:
        """Return the rendering and the assistant's spans."""
        jinja = self._jinja(tools)
        if _GENERATION_TAG.search(jinja):
            return self._render(jinja, messages, tools, arguments, tagged=True)

        def render(messages: Messages, *, prompt: bool = False) -> str:
            return self._render(jinja, messages, tools, arguments, prompt=prompt)[0]

        return SpanFinder(render, self._end_markers, self.tokenizer.eos_token).find(messages)

    def _jinja(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the template text for a conversation with or without tools."""
        if not self.tokenizer.chat_template:
            name = getattr(self.tokenizer, "name_or_path", "") or type(self.tokenizer).__name__
            raise MismatchError(
                f"tokenizer {name}: it has no chat template; pass one with `--chat-template FILE` (Jinja), or rows "
                "that are tokens already (`input_ids`, `loss_mask`)"
            )
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise MismatchError(f"chat template: {one_line(error)}; pass one with `--chat-template FILE`") from error

    def _render(
        self,
        jinja: str,
        messages: Messages,
        tools: list[Any] | None,
        arguments: Mapping[str, Any],
        *,
        prompt: bool = False,
        tagged: bool = False,
    ) -> tuple[str, list[Span]]:
        """Render `messages`, with the generation prompt if `prompt`; spans are those of the tags, if `tagged`.

        The rendering function below `apply_chat_template` is used because that one drops the spans and maps them to
        tokens loosely: a span that ends in white space the tokenizer drops supervises all that follows it.
        """
        from jinja2.exceptions import TemplateError, TemplateSyntaxError
        from transformers.utils.chat_template_utils import render_jinja_template

        special_tokens: dict[str, Any] = self.tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=_FIXED_CLOCK + jinja if "strftime_now" in jinja else jinja,
                return_assistant_tokens_mask=tagged,
                add_generation_prompt=prompt,
                **{**special_tokens, **arguments},
            )
        except TemplateSyntaxError as error:
            raise UsageError(
                f"chat template, line {error.lineno}: not valid Jinja ({error.message}); correct it, or pass another "
                "with `--chat-template FILE`"
            ) from error
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise RowProblem("template-refused", f"the chat template raises: {one_line(error)}") from error
        texts, spans = rendered
        return texts[0], spans[0] if tagged else []

    @cached_property
    def _end_markers(self) -> tuple[re.Pattern[str], ...]:
        """Patterns of special tokens, then of all added tokens (some tokenizers add theirs as plain ones)."""
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        special = {*self.tokenizer.all_special_tokens, *(text for text, is_special in added.items() if is_special)}
        groups = [sorted(group, key=len, reverse=True) for group in (special, set(added) - special)]
        return tuple(re.compile("|".join(map(re.escape, group))) for group in groups if group)

    # From characters to tokens

    def _token_begins(self, offsets: Sequence[Span]) -> np.ndarray:
        """Return the first character of each token, int64 [T].

        A byte-level tokenizer that trims offsets hides the space a token begins with: there, a token begins where
        the one before it ended.
        """
        pairs = np.asarray(offsets, dtype=np.int64).reshape(-1, 2)
        if not self._trims_offsets or len(pairs) == 0:
            return pairs[:, 0]
        reached = np.maximum.accumulate(pairs[:, 1])
        return np.minimum(pairs[:, 0], np.concatenate([[0], reached[:-1]]))

    @cached_property
    def _trims_offsets(self) -> bool:
        processor = json.loads(self.tokenizer.backend_tokenizer.to_str()).get("post_processor") or {}
        return any(part.get("trim_offsets") for part in processor.get("processors", [processor]))

    def _encode_by_prefixes(self, text: str, spans: list[Span], notes: tuple[str, ...]) -> Encoded:
        """Encode without offsets: tokenize the text up to each boundary and check that the whole agrees.

        Raises:
            RowProblem: `turn-edge-in-token`: a token straddles a boundary, so that the mask cannot be known.
        """
        input_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
        for span in spans:
            first, last = (self._tokens_before(text, boundary, input_ids) for boundary in span)
            loss_mask[first:last] = 1
        return Encoded(np.asarray(input_ids, dtype=np.int32), loss_mask, notes)

    def _tokens_before(self, text: str, boundary: int, input_ids: list[int]) -> int:
        prefix_ids = self.tokenizer(text[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
        if prefix_ids != input_ids[: len(prefix_ids)]:
            around = text[max(0, boundary - EXCERPT_CHARACTERS) : boundary + EXCERPT_CHARACTERS]
            raise RowProblem(
                EDGE_IN_TOKEN,
                f"slow tokenizer {type(self.tokenizer).__name__}: a token straddles the edge of an assistant turn near "
                f"{around!r}; use a fast tokenizer, which has offsets",
            )
        return len(prefix_ids)


def _template_input(message: Message) -> dict[str, Any]:
    """Return a turn as templates of any model read it.

    Reasoning under every name in use, which transformers does too, each version in its own way; the arguments of tool
    calls as objects, which most templates write as JSON, where data has them as JSON text.
    """
    turn = message.as_template_input()
    reasoning = next((turn[key] for key in REASONING_KEYS if turn.get(key)), None)
    if reasoning is not None:
        turn = {**dict.fromkeys(REASONING_KEYS, reasoning), **turn}
    if isinstance(turn.get("tool_calls"), list):
        turn["tool_calls"] = [_with_object_arguments(call) for call in turn["tool_calls"]]
    return turn


def _with_object_arguments(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _with_object_arguments(call["function"])}
    try:
        arguments = json.loads(call["arguments"])
    except (KeyError, TypeError, ValueError):
        return call
    return {**call, "arguments": arguments} if isinstance(arguments, dict) else call


# Identity


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of all that decides how text becomes ids; saving and loading keeps it.

    Truncation and padding, which any call may set on the tokenizer, are left out.
    """
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())
        model = {key: value for key, value in model.items() if key not in ("truncation", "padding")}
    else:
        model = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    added = {str(token_id): token.__getstate__() for token_id, token in tokenizer.added_tokens_decoder.items()}
    return digest_json({"model": model, "added": added, "special": tokenizer.special_tokens_map})


def template_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the digest of the tokenizer's chat template(s)."""
    return digest_json(tokenizer.chat_template)
