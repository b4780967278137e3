"""Turns a conversation into token ids and a loss mask by the tokenizer's chat template.

The one place that knows Jinja templates and tokenizer offsets; knows neither files nor the token table.

The assistant's text is found as character spans of the rendering, by one of two ways: the template's own
`{% generation %}` tags, or, without tags, by rendering prefixes of the conversation and checking that each is a
prefix of the whole. Then one rule maps characters to tokens: **a token is supervised iff its first character lies in
a span.** So a token that straddles the start of a span is not, and an end-of-turn token that swallows the template's
line break after it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from eagle_offline.errors import DataError, MismatchError, UsageError, one_line
from eagle_offline.provenance import digest_json
from eagle_offline.text.conversations import REASONING_KEYS, Message, RowProblem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]

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
    """

    input_ids: np.ndarray
    loss_mask: np.ndarray


class ChatTemplate:
    """A tokenizer together with its chat template.

    Args:
        tokenizer: A transformers tokenizer, fast or slow; not changed.

    Raises:
        MismatchError: There is no template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            name = getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__
            raise MismatchError(
                f"tokenizer {name}: it has no chat template; pass one with `--chat-template FILE` (Jinja)"
            )
        self.tokenizer = tokenizer

    def encode(self, conversation: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> Encoded:
        """Render and tokenize a conversation; nothing is truncated, no special token is added to the rendering.

        Worked example, one token a word, `|` between tokens, supervised ones marked (ChatML, without tags):
        `<|im_start|>|user|hi|<|im_end|>|<|im_start|>|assistant|yes*|<|im_end|>*`

        Raises:
            RowProblem: `template-refused` (the template raises on this conversation) or `invalid-text`.
            DataError: The template has no tags and its prefixes disagree with the whole rendering.
            UsageError: The template is not valid Jinja.
        """
        messages = [message.as_template_input() for message in conversation]
        jinja = self._jinja(tools)
        if _GENERATION_TAG.search(jinja):
            text, spans = self._render(jinja, messages, tools, tagged=True)
        else:
            text, spans = self._spans_by_prefixes(jinja, messages, tools)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise RowProblem("invalid-text", f"half a surrogate pair ({text[error.start]!r}); expected text") from error
        if not self.tokenizer.is_fast:
            return self._encode_by_prefixes(text, spans)
        encoding = self.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
        )
        input_ids = np.asarray(encoding["input_ids"], dtype=np.int32)
        begins = self._token_begins(encoding["offset_mapping"])
        loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
        for start, end in spans:
            loss_mask[(begins >= start) & (begins < end)] = 1
        return Encoded(input_ids, loss_mask)

    def encode_prompt(self, conversation: Sequence[Message], tools: list[dict[str, Any]] | None = None) -> list[int]:
        """Return the token ids of a conversation up to where the assistant begins to speak.

        Raises:
            RowProblem: `template-refused`.
            UsageError: The template is not valid Jinja.
        """
        messages = [message.as_template_input() for message in conversation]
        text, _ = self._render(self._jinja(tools), messages, tools, prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _jinja(self, tools: list[dict[str, Any]] | None) -> str:
        """Return the template text for a conversation with or without tools."""
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError as error:
            raise MismatchError(f"chat template: {one_line(error)}; pass one with `--chat-template FILE`") from error

    def _render(
        self, jinja: str, messages: list[dict], tools: list[Any] | None, *, prompt: bool = False, tagged: bool = False
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
                conversations=[messages],
                tools=tools,
                chat_template=_FIXED_CLOCK + jinja if "strftime_now" in jinja else jinja,
                return_assistant_tokens_mask=tagged,
                add_generation_prompt=prompt,
                **special_tokens,
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

    # Spans of a template without tags

    def _spans_by_prefixes(self, jinja: str, messages: list[dict], tools: list[dict] | None) -> tuple[str, list[Span]]:
        """Find where the assistant's text lies by rendering the conversation up to each of its turns."""
        whole, _ = self._render(jinja, messages, tools)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, _ = self._render(jinja, messages[:index], tools, prompt=True)
            until, _ = self._render(jinja, messages[: index + 1], tools)
            _check_prefix(before, whole, f"before turn {index + 1}")
            _check_prefix(until, whole, f"up to turn {index + 1}")
            start, end = len(before), len(until)
            if before == self._render(jinja, messages[:index], tools)[0]:
                start = _skip_header(whole, start, end, message)
            spans.append((start, self._turn_end(whole, start, end, message["content"])))
        return whole, spans

    def _turn_end(self, text: str, start: int, end: int, content: str) -> int:
        """Return where the assistant stops: after the last special token that follows its content.

        Without such a token: after the last character that is not white space.
        """
        found = text.find(content.strip(), start, end)
        content_end = found + len(content.strip()) if found >= 0 else start
        for specials in self._end_markers:
            ends = [match.end() for match in specials.finditer(text, content_end, end)]
            if ends:
                return ends[-1]
        return start + len(text[start:end].rstrip())

    @cached_property
    def _end_markers(self) -> list[re.Pattern[str]]:
        """Patterns of special tokens, then of all added tokens (some tokenizers add theirs as plain ones)."""
        added = {token.content: token.special for token in self.tokenizer.added_tokens_decoder.values()}
        special = {*self.tokenizer.all_special_tokens, *(text for text, is_special in added.items() if is_special)}
        groups = [sorted(group, key=len, reverse=True) for group in (special, set(added) - special)]
        return [re.compile("|".join(map(re.escape, group))) for group in groups if group]

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

    def _encode_by_prefixes(self, text: str, spans: list[Span]) -> Encoded:
        """Encode without offsets: tokenize the text up to each boundary and check that the whole agrees.

        Raises:
            DataError: A token straddles a boundary, so that the mask cannot be known.
        """
        input_ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        loss_mask = np.zeros(len(input_ids), dtype=np.uint8)
        for span in spans:
            first, last = (self._tokens_before(text, boundary, input_ids) for boundary in span)
            loss_mask[first:last] = 1
        return Encoded(np.asarray(input_ids, dtype=np.int32), loss_mask)

    def _tokens_before(self, text: str, boundary: int, input_ids: list[int]) -> int:
        prefix_ids = self.tokenizer(text[:boundary], add_special_tokens=False, verbose=False)["input_ids"]
        if prefix_ids != input_ids[: len(prefix_ids)]:
            around = text[max(0, boundary - EXCERPT_CHARACTERS) : boundary + EXCERPT_CHARACTERS]
            raise DataError(
                f"slow tokenizer {type(self.tokenizer).__name__}: a token straddles the edge of an assistant turn near "
                f"{around!r}; use a fast tokenizer, which has offsets"
            )
        return len(prefix_ids)


def _check_prefix(part: str, whole: str, where: str) -> None:
    """Raise DataError with a short example unless `whole` begins with `part`."""
    if whole.startswith(part):
        return
    pairs = zip(part, whole, strict=False)
    same = next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(part), len(whole)))
    shown = [text[max(0, same - EXCERPT_CHARACTERS) : same + EXCERPT_CHARACTERS] for text in (part, whole)]
    raise DataError(
        f"chat template: rendered {where}, the conversation reads {shown[0]!r} where the whole one reads {shown[1]!r}, "
        "so the assistant's tokens cannot be told; pass a template with {% generation %} tags: `--chat-template FILE`"
    )


def _skip_header(text: str, start: int, end: int, message: dict[str, Any]) -> int:
    """Return where the assistant's text begins under a template that ignores the generation prompt.

    There the role header, if any, comes after the prompt and has to be stepped over.
    """
    said = [message["content"], *(message.get(key) for key in REASONING_KEYS)]
    places = [text.find(part.strip(), start, end) for part in said if isinstance(part, str) and part.strip()]
    found = min((place for place in places if place >= 0), default=start)
    return found if text[start:found].strip() else start


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
