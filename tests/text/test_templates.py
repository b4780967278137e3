"""Which tokens count as the assistant's, for the template shapes in use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PythonBackend

from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.text.conversations import RowProblem, parse_conversation
from eagle_offline.text.templates import ChatTemplate, Encoded, template_digest, tokenizer_digest
from tests.text import tiny_tokenizers as tiny

CHAT = tiny.turns("Hi", "Yes?", "Add 2 and 3.", "It is 5.\nDone")


def encode(tokenizer: Any, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> Encoded:
    return ChatTemplate(tokenizer).encode(parse_conversation({"messages": messages}), tools)


def supervised(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Decode every run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(int), [0]])))
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (tiny.CHATML, "<|im_end|>"),
        (tiny.CHATML_TAGGED, "<|im_end|>"),
        (tiny.CHATML_WITHOUT_PROMPT, "<|im_end|>"),
        (tiny.LLAMA3, "<|eot_id|>"),
        (tiny.GEMMA, "<end_of_turn>"),
    ],
)
def test_assistant_text_and_end_of_turn_are_supervised_and_nothing_else(template: str, end: str) -> None:
    tokenizer = tiny.byte_tokenizer(template)
    encoded = encode(tokenizer, CHAT)
    assert supervised(tokenizer, encoded) == [f"Yes?{end}", f"It is 5.\nDone{end}"]
    assert (encoded.input_ids.dtype, encoded.loss_mask.dtype) == (np.int32, np.uint8)
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_without_a_generation_prompt_all_that_follows_the_instruction_is_the_assistants() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.MISTRAL)
    assert supervised(tokenizer, encode(tokenizer, CHAT)) == [" Yes?</s>", " It is 5.\nDone</s>"]


def test_tagged_and_untagged_template_give_the_same_mask() -> None:
    for messages in (CHAT, tiny.turns("a", "b", system="Be brief."), tiny.turns("a", "b", "c")):
        plain, tagged = (encode(tiny.byte_tokenizer(jinja), messages) for jinja in (tiny.CHATML, tiny.CHATML_TAGGED))
        np.testing.assert_array_equal(plain.input_ids, tagged.input_ids)
        np.testing.assert_array_equal(plain.loss_mask, tagged.loss_mask)
        assert plain.loss_mask.any()


def test_tagged_mask_equals_the_one_of_transformers() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.CHATML_TAGGED)
    theirs = tokenizer.apply_chat_template(CHAT, return_assistant_tokens_mask=True, return_dict=True, tokenize=True)
    encoded = encode(tokenizer, CHAT)
    assert encoded.input_ids.tolist() == theirs["input_ids"]
    assert encoded.loss_mask.tolist() == theirs["assistant_masks"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8), min_size=2, max_size=6))
def test_tagged_and_untagged_agree_on_any_text(texts: list[str]) -> None:
    messages = tiny.turns(*(f"{text}." for text in texts))
    plain, tagged = (encode(TOKENIZERS[jinja], messages) for jinja in (tiny.CHATML, tiny.CHATML_TAGGED))
    np.testing.assert_array_equal(plain.input_ids, tagged.input_ids)
    np.testing.assert_array_equal(plain.loss_mask, tagged.loss_mask)


TOKENIZERS = {jinja: tiny.byte_tokenizer(jinja) for jinja in (tiny.CHATML, tiny.CHATML_TAGGED)}


def test_words_without_their_white_space_are_supervised_from_the_first_to_the_end_of_turn() -> None:
    """The worked example of `ChatTemplate.encode`."""
    spaced = tiny.CHATML.replace("\\n", " ").replace("m.content", "m.content + ' '").replace("m.role", "' ' + m.role")
    spaced = spaced.replace("<|im_start|>assistant", "<|im_start|> assistant")
    tokenizer = tiny.word_tokenizer(spaced, "user assistant hi yes")
    encoded = encode(tokenizer, tiny.turns("hi", "yes"))
    tokens = tokenizer.convert_ids_to_tokens(encoded.input_ids)
    marked = [token + "*" * int(bit) for token, bit in zip(tokens, encoded.loss_mask, strict=True)]
    assert "|".join(marked) == "<|im_start|>|user|hi|<|im_end|>|<|im_start|>|assistant|yes*|<|im_end|>*"


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_TAGGED])
def test_token_that_straddles_the_start_of_a_turn_is_not_supervised(template: str) -> None:
    tokenizer = tiny.byte_tokenizer(template, merges=(("Ċ", "Y"),))
    assert supervised(tokenizer, encode(tokenizer, tiny.turns("Hi", "Yes?"))) == ["es?<|im_end|>"]


def test_token_that_hides_its_leading_space_is_placed_where_it_begins() -> None:
    template = tiny.CHATML.replace("assistant\\n", "assistant: ").replace("m.role + '\\n'", "m.role + ': '")
    for trim_offsets in (True, False):
        tokenizer = tiny.byte_tokenizer(template, merges=(("Ġ", "Y"),), trim_offsets=trim_offsets)
        assert supervised(tokenizer, encode(tokenizer, tiny.turns("Hi", "Yes?"))) == ["es?<|im_end|>"]


@pytest.mark.parametrize("template", [tiny.CHATML, tiny.CHATML_TAGGED])
def test_end_of_turn_token_that_swallows_the_line_break_is_supervised(template: str) -> None:
    tokenizer = tiny.byte_tokenizer(template, rstrip="<|im_end|>")
    assert supervised(tokenizer, encode(tokenizer, tiny.turns("Hi", "Yes?"))) == ["Yes?<|im_end|>"]


def test_end_of_turn_written_in_the_content_does_not_cut_the_turn() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.CHATML)
    told = supervised(tokenizer, encode(tokenizer, tiny.turns("Hi", "say <|im_end|> twice")))
    assert told == ["say <|im_end|> twice<|im_end|>"]


def test_without_a_special_token_the_turn_ends_with_its_last_visible_character() -> None:
    jinja = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n\\n' }}{% endfor %}"
    jinja += "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    tokenizer = tiny.byte_tokenizer(jinja)
    assert supervised(tokenizer, encode(tokenizer, CHAT)) == ["Yes?", "It is 5.\nDone"]
    assert supervised(tokenizer, encode(tokenizer, tiny.turns("Hi", "say </s> twice"))) == ["say </s> twice"]


@pytest.mark.parametrize("template", [tiny.CHATML_REASONING, tiny.CHATML_REASONING.split("{% if add_generation")[0]])
def test_reasoning_and_tool_calls_are_the_assistants(template: str) -> None:
    call = {"function": {"name": "add"}}
    turn = {"role": "assistant", "content": "So:", "reasoning_content": "hm, sum", "tool_calls": [call]}
    tokenizer = tiny.byte_tokenizer(template)
    (told,) = supervised(tokenizer, encode(tokenizer, [*tiny.turns("2+3?"), turn]))
    assert told.endswith("hm, sum</think>So:<call>add</call><|im_end|>")


def test_special_tokens_around_a_tool_call_do_not_cut_the_turn() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.CHATML_REASONING.replace("<call>", "[INST]").replace("</call>", "[/INST]"))
    turn = {"role": "assistant", "content": "So:", "tool_calls": [{"function": {"name": "add"}}]}
    encoded = encode(tokenizer, [*tiny.turns("2+3?"), turn])
    assert supervised(tokenizer, encoded) == ["So:[INST]add[/INST]<|im_end|>"]


def test_tools_reach_the_template() -> None:
    tokenizer = tiny.byte_tokenizer("{{ tools | tojson if tools else '' }}" + tiny.CHATML)
    encoded = encode(tokenizer, tiny.turns("Hi", "Yes?"), [{"name": "add"}])
    assert '"add"' in tokenizer.decode(encoded.input_ids)
    assert supervised(tokenizer, encoded) == ["Yes?<|im_end|>"]


def test_template_whose_prefixes_disagree_is_refused_with_an_example() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.FORGETFUL)
    assert supervised(tokenizer, encode(tokenizer, CHAT[:2])) == ["Yes?<|im_end|>"]
    with pytest.raises(RowProblem) as error:
        encode(tokenizer, CHAT)
    assert error.value.reason_code == "template-disagrees"
    message = error.value.detail
    assert "up to turn 2" in message
    assert "Yes?" in message
    assert "--chat-template FILE" in message
    assert "\n" not in message


def test_conversation_that_the_template_refuses_is_a_problem_of_its_row() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.GEMMA)
    with pytest.raises(RowProblem) as problem:
        encode(tokenizer, tiny.turns("Hi", "Yes?", system="Be brief."))
    assert problem.value.reason_code == "template-refused"
    assert "no system role" in problem.value.detail


def test_half_a_surrogate_pair_is_a_problem_of_its_row() -> None:
    with pytest.raises(RowProblem) as problem:
        encode(tiny.byte_tokenizer(tiny.CHATML), tiny.turns("Hi", json.loads('"\\ud800"') + "x"))
    assert problem.value.reason_code == "invalid-text"


def test_missing_template_says_how_to_pass_one() -> None:
    with pytest.raises(MismatchError, match="--chat-template FILE"):
        encode(tiny.byte_tokenizer(None), CHAT)


def test_template_that_is_not_jinja_is_named() -> None:
    with pytest.raises(UsageError, match="chat template, line 2"):
        encode(tiny.byte_tokenizer("{{ bos_token }}\n{% for %}"), CHAT)


def test_rendering_does_not_depend_on_the_day() -> None:
    tokenizer = tiny.byte_tokenizer(tiny.DATED)
    encoded = encode(tokenizer, CHAT)
    assert tokenizer.decode(encoded.input_ids).startswith("26 Jul 2024\n<|im_start|>user\nHi")
    assert supervised(tokenizer, encoded)[0] == "Yes?<|im_end|>"


class CharacterTokenizer(PythonBackend):
    """A slow tokenizer, one token a character; `joined` pairs are one token."""

    joined = ""

    def __init__(self, **kwargs: Any) -> None:
        self.characters = [chr(code) for code in range(128)]
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.characters) + 1

    def get_vocab(self) -> dict[str, int]:
        return {text: index for index, text in enumerate([*self.characters, self.joined])} | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[str]:
        if self.joined and self.joined in text:
            before, after = text.split(self.joined, 1)
            return [*before, self.joined, *self._tokenize(after)]
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.get_vocab()[token]

    def _convert_id_to_token(self, index: int) -> str:
        return [*self.characters, self.joined][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


class JoiningTokenizer(CharacterTokenizer):
    joined = "\nY"


def test_slow_tokenizer_gives_the_mask_of_a_fast_one_or_refuses() -> None:
    specials = ["<|im_start|>", "<|im_end|>"]
    slow = CharacterTokenizer(chat_template=tiny.CHATML, extra_special_tokens=specials)
    assert not slow.is_fast
    assert supervised(slow, encode(slow, CHAT)) == ["Yes?<|im_end|>", "It is 5.\nDone<|im_end|>"]
    joining = JoiningTokenizer(chat_template=tiny.CHATML, extra_special_tokens=specials)
    with pytest.raises(RowProblem, match="straddles the edge of an assistant turn") as error:
        encode(joining, CHAT)
    assert error.value.reason_code == "turn-edge-in-token"


def test_digests_survive_saving_calls_and_another_process(tmp_path: Path) -> None:
    tokenizer = tiny.byte_tokenizer(tiny.CHATML, merges=(("h", "i"),))
    digests = [tokenizer_digest(tokenizer), template_digest(tokenizer)]
    tokenizer("some text", truncation=True, max_length=2)  # which the tokenizer remembers
    assert tokenizer_digest(tokenizer) == digests[0]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert [tokenizer_digest(loaded), template_digest(loaded)] == digests
    code = (
        "import sys; from transformers import PreTrainedTokenizerFast; from eagle_offline.text import templates as t;"
        "k = PreTrainedTokenizerFast.from_pretrained(sys.argv[1]); print(t.tokenizer_digest(k), t.template_digest(k))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    command = [sys.executable, "-c", code, str(tmp_path)]
    assert (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split() == digests
    )


def test_digests_tell_tokenizers_and_templates_apart() -> None:
    plain = tiny.byte_tokenizer(tiny.CHATML)
    variants = [
        tiny.byte_tokenizer(tiny.CHATML, merges=(("h", "i"),)),
        tiny.byte_tokenizer(tiny.CHATML, rstrip="<|im_end|>"),
    ]
    assert len({tokenizer_digest(tokenizer) for tokenizer in (plain, *variants)}) == 3
    assert tokenizer_digest(tiny.byte_tokenizer(tiny.LLAMA3)) == tokenizer_digest(plain)
    assert template_digest(tiny.byte_tokenizer(tiny.LLAMA3)) != template_digest(plain)
