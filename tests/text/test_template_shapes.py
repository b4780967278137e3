"""Which tokens are the assistant's under the template shapes in use; every expectation is written by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagle_offline.text.conversations import RowProblem, parse_conversation, parse_template_arguments
from eagle_offline.text.templates import ChatTemplate
from tests.text import template_shapes as shapes
from tests.text.template_shapes import TOOLS, calls, result, says, system, user

ONE = [user("Hi"), says("Yes?")]
TWO = [user("Hi"), says("Yes?"), user("2+3?"), says("It is 5.\nDone")]
WITH_SYSTEM = [system("Be brief."), *TWO]
TOOL_LOOP = [user("2+3?"), calls('{"a": 2}'), result("5"), says("It is 5.")]
THOUGHTS = [user("Hi"), says("Yes?", "greet"), user("2+3?"), says("5", "2+3=5")]
THOUGHTS_IN_TEXT = [
    user("Hi"), says("<think>\ngreet\n</think>\n\nYes?"), user("2+3?"), says("<think>\n2+3=5\n</think>\n\n5"),
]  # fmt: skip
TOOL_THOUGHTS = [
    user("2+3?"), calls('{"a": 2}', "use it"), result("5"), says("It is 5.", "easy"), user("So"), says("Bye", "end"),
]  # fmt: skip
TOOL_LOOPS_WITH_SYSTEM = [system("Be brief."), *TOOL_LOOP, user("1+1?"), calls('{"a": 1}'), result("2"), says("2")]

EXPECTED: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "chatml": (shapes.CHATML, ONE, ["Yes?<|im_end|>"]),
    "chatml, turns": (shapes.CHATML, WITH_SYSTEM, ["Yes?<|im_end|>", "It is 5.\nDone<|im_end|>"]),
    "chatml, tools": (
        shapes.CHATML,
        TOOL_LOOP,
        ['<tool_call>{"name": "add", "arguments": {"a": 2}}</tool_call><|im_end|>', "It is 5.<|im_end|>"],
    ),
    "llama3": (shapes.LLAMA3, ONE, ["Yes?<|eot_id|>"]),
    "llama3, turns": (shapes.LLAMA3, WITH_SYSTEM, ["Yes?<|eot_id|>", "It is 5.\nDone<|eot_id|>"]),
    "llama3, tools": (
        shapes.LLAMA3,
        TOOL_LOOP,
        ['{"name": "add", "parameters": {"a": 2}}<|eot_id|>', "It is 5.<|eot_id|>"],
    ),
    "gemma": (shapes.GEMMA, ONE, ["Yes?<end_of_turn>"]),
    "gemma, turns": (shapes.GEMMA, WITH_SYSTEM, ["Yes?<end_of_turn>", "It is 5.\nDone<end_of_turn>"]),
    "mistral": (shapes.MISTRAL, ONE, [" Yes?</s>"]),
    "mistral, turns": (shapes.MISTRAL, WITH_SYSTEM, [" Yes?</s>", " It is 5.\nDone</s>"]),
    "mistral, tools": (
        shapes.MISTRAL,
        TOOL_LOOPS_WITH_SYSTEM,
        [
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}}]</s>',
            " It is 5.</s>",
            '[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}]</s>',
            " 2</s>",
        ],
    ),
    "gpt-oss": (shapes.GPT_OSS, ONE, ["<|channel|>final<|message|>Yes?<|return|>"]),
    "gpt-oss, turns": (
        shapes.GPT_OSS,
        WITH_SYSTEM,
        ["<|channel|>final<|message|>Yes?<|end|>", "<|channel|>final<|message|>It is 5.\nDone<|return|>"],
    ),
    "gpt-oss, reasoning": (
        shapes.GPT_OSS,
        THOUGHTS,
        [
            "<|channel|>final<|message|>Yes?<|end|>",
            "<|channel|>analysis<|message|>2+3=5<|end|><|start|>assistant<|channel|>final<|message|>5<|return|>",
        ],
    ),
    "gpt-oss, tools": (
        shapes.GPT_OSS,
        [user("2+3?"), calls('{"a": 2}', "use it"), result("5")],
        [
            "<|channel|>analysis<|message|>use it<|end|>"
            '<|start|>assistant to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>'
        ],
    ),
    "gpt-oss, tools and turns": (
        shapes.GPT_OSS,
        TOOL_THOUGHTS,
        [
            ' to=functions.add<|channel|>commentary json<|message|>{"a": 2}<|call|>',
            "<|channel|>final<|message|>It is 5.<|end|>",
            "<|channel|>analysis<|message|>end<|end|><|start|>assistant<|channel|>final<|message|>Bye<|return|>",
        ],
    ),
    "r1": (shapes.DEEPSEEK_R1, ONE, ["Yes?<｜end▁of▁sentence｜>"]),
    "r1, turns": (
        shapes.DEEPSEEK_R1,
        WITH_SYSTEM,
        ["Yes?<｜end▁of▁sentence｜>", "It is 5.\nDone<｜end▁of▁sentence｜>"],
    ),
    "r1, reasoning": (
        shapes.DEEPSEEK_R1,
        THOUGHTS_IN_TEXT,
        ["\n\nYes?<｜end▁of▁sentence｜>", "\n\n5<｜end▁of▁sentence｜>"],
    ),
    "r1, tools": (
        shapes.DEEPSEEK_R1,
        TOOL_LOOPS_WITH_SYSTEM,
        [
            '<｜tool▁call▁begin｜>add\n{"a": 2}<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
            "It is 5.<｜end▁of▁sentence｜>",
            '<｜tool▁call▁begin｜>add\n{"a": 1}<｜tool▁call▁end｜><｜end▁of▁sentence｜>',
            "2<｜end▁of▁sentence｜>",
        ],
    ),
    "qwen3": (shapes.QWEN3, ONE, ["<think>\n\n</think>\n\nYes?<|im_end|>"]),
    "qwen3, turns": (
        shapes.QWEN3,
        WITH_SYSTEM,
        ["Yes?<|im_end|>", "<think>\n\n</think>\n\nIt is 5.\nDone<|im_end|>"],
    ),
    "qwen3, reasoning": (shapes.QWEN3, THOUGHTS, ["Yes?<|im_end|>", "<think>\n2+3=5\n</think>\n\n5<|im_end|>"]),
    "qwen3, reasoning in the text": (
        shapes.QWEN3,
        THOUGHTS_IN_TEXT,
        ["Yes?<|im_end|>", "<think>\n2+3=5\n</think>\n\n5<|im_end|>"],
    ),
    "qwen3, tools": (
        shapes.QWEN3,
        TOOL_LOOP,
        [
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nIt is 5.<|im_end|>",
        ],
    ),
    "qwen3, tools, reasoning and turns": (
        shapes.QWEN3,
        TOOL_THOUGHTS,
        [
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            "It is 5.<|im_end|>",
            "<think>\nend\n</think>\n\nBye<|im_end|>",
        ],
    ),
    "qwen3, two results": (
        shapes.QWEN3,
        [user("?"), calls('{"a": 2}', "both", "Look:"), result("5"), result("6"), says("11", "sum")],
        [
            "<think>\nboth\n</think>\n\nLook:\n"
            '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>',
            "<think>\nsum\n</think>\n\n11<|im_end|>",
        ],
    ),
}

EMPTY_THOUGHT = "<think>\n\n</think>\n\n"
FINAL = "<|channel|>final<|message|>"
CALL = " to=functions.add<|channel|>commentary json<|message|>"
IN_A_ROW = {
    "gpt-oss, two answers": (
        shapes.GPT_OSS,
        [user("Hi"), says("Yes?"), says("Still here.")],
        [FINAL + "Yes?<|end|>", FINAL + "Still here.<|return|>"],
    ),
    "gpt-oss, three answers": (
        shapes.GPT_OSS,
        [user("Hi"), says("1"), says("2"), says("3"), user("So")],
        [FINAL + "1<|end|>", FINAL + "2<|end|>", FINAL + "3<|end|>"],
    ),
    "gpt-oss, an answer and a call": (
        shapes.GPT_OSS,
        [user("2+3?"), says("Wait.", "hm"), calls('{"a": 2}'), result("5"), says("5")],
        [FINAL + "Wait.<|end|>", CALL + '{"a": 2}<|call|>', FINAL + "5<|return|>"],
    ),
    "qwen3, two answers": (
        shapes.QWEN3,
        [user("Hi"), says("1", "one"), says("2")],
        ["<think>\none\n</think>\n\n1<|im_end|>", "<think>\n\n</think>\n\n2<|im_end|>"],
    ),
}
BEGUN = {
    "qwen3": (
        shapes.QWEN3,
        [says("Hi."), user("Hi"), says("Yes?")],
        ["Hi.<|im_end|>", EMPTY_THOUGHT + "Yes?<|im_end|>"],
    ),
    "qwen3, alone": (shapes.QWEN3, [says("Hi.")], [EMPTY_THOUGHT + "Hi.<|im_end|>"]),
    "chatml": (shapes.CHATML, [says("Hi."), user("Hi"), says("Yes?")], ["Hi.<|im_end|>", "Yes?<|im_end|>"]),
    "chatml, two": (shapes.CHATML, [says("Hi."), says("Yo."), user("Hi")], ["Hi.<|im_end|>", "Yo.<|im_end|>"]),
    "qwen3, a call": (
        shapes.QWEN3,
        [calls('{"a": 2}'), result("5"), says("5")],
        ['<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>', EMPTY_THOUGHT + "5<|im_end|>"],
    ),
    "gpt-oss": (
        shapes.GPT_OSS,
        [says("Hi."), user("Hi"), says("Yes?")],
        [FINAL + "Hi.<|end|>", FINAL + "Yes?<|return|>"],
    ),
}


@pytest.mark.parametrize("name", IN_A_ROW)
def test_turns_of_the_assistant_in_a_row_end_as_inner_ones_do(name: str) -> None:
    template, messages, expected = IN_A_ROW[name]
    assert supervised(template, messages) == expected


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "tools"])
@pytest.mark.parametrize("name", BEGUN)
def test_conversation_that_the_assistant_begins_is_read(name: str, tools: list[dict[str, Any]] | None) -> None:
    template, messages, expected = BEGUN[name]
    assert supervised(template, messages, tools=tools) == expected


def test_first_turn_without_the_reasoning_that_the_prompt_supplies_is_whole() -> None:
    told = supervised(shapes.QWEN3, [says("Hi."), user("Hi"), says("Yes?")], enable_thinking=False)
    assert told == ["Hi.<|im_end|>", "Yes?<|im_end|>"]


def supervised(template: str, messages: list[dict[str, Any]], **row: Any) -> list[str]:
    """The text of every run of supervised tokens, runs of two turns apart from each other."""
    tokenizer = shapes.tokenizer_of(template)
    value = {"messages": messages, **row}
    arguments = parse_template_arguments(value)
    encoded = ChatTemplate(tokenizer).encode(parse_conversation(value), row.get("tools"), arguments)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(int), [0]])))
    return [tokenizer.decode(encoded.input_ids[start:end]) for start, end in edges.reshape(-1, 2)]


@pytest.mark.parametrize("name", EXPECTED)
def test_supervised_is_what_the_target_generates(name: str) -> None:
    template, messages, expected = EXPECTED[name]
    assert supervised(template, messages) == expected


@pytest.mark.parametrize("name", [name for name in EXPECTED if "tools" in name])
def test_tool_schemas_in_the_prompt_change_no_supervised_token(name: str) -> None:
    template, messages, expected = EXPECTED[name]
    assert supervised(template, messages, tools=TOOLS) == expected


def test_what_the_generation_prompt_supplies_is_not_supervised() -> None:
    told = supervised(shapes.QWEN3, TWO, enable_thinking=False)
    assert told == ["Yes?<|im_end|>", "It is 5.\nDone<|im_end|>"]
    assert supervised(shapes.QWEN3, TWO, chat_template_kwargs={"enable_thinking": False}) == told
    assert supervised(shapes.QWEN3, TWO, enable_thinking=True)[1].startswith("<think>")
    begun = shapes.QWEN3 + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"
    assert supervised(begun, THOUGHTS) == ["Yes?<|im_end|>", "2+3=5\n</think>\n\n5<|im_end|>"]


def test_answers_that_begin_like_the_prompt_or_say_what_was_said_are_whole() -> None:
    said = ["<b>5</b>", "5", "<", "5"]
    messages = [user("5"), says(said[0]), user("5"), says(said[1]), user("assistant"), says(said[2]), user("<")]
    messages.append(says(said[3]))
    *earlier, last = said
    end = "<｜end▁of▁sentence｜>"
    assert supervised(shapes.DEEPSEEK_R1, messages) == [text + end for text in said]
    thought = ["<think>\n\n</think>\n\n" + last]
    assert supervised(shapes.QWEN3, messages) == [text + "<|im_end|>" for text in [*earlier, *thought]]
    final = "<|channel|>final<|message|>"
    expected = [final + text + "<|end|>" for text in earlier] + [final + last + "<|return|>"]
    assert supervised(shapes.GPT_OSS, messages) == expected


def chatml_saying(content: str, header: str = "m.role", end: str = "''") -> str:
    """ChatML whose turns say `content` and `end` under `header`, which are expressions of Jinja."""
    jinja = shapes.CHATML.replace("m.role + '\\n' + m.content }}", f"{header} + '\\n' + {content} + {end} }}}}")
    assert jinja != shapes.CHATML
    return jinja


IS_EARLIER = "m.role == 'assistant' and not loop.last"
REFUSED = {
    "earlier answers are cut": chatml_saying(f"(m.content[:3] if {IS_EARLIER} else m.content)"),
    "earlier answers are cut in front": chatml_saying(f"(m.content[3:] if {IS_EARLIER} else m.content)"),
    "earlier answers are gone": chatml_saying(f"('' if {IS_EARLIER} else m.content)"),
    "earlier answers have another header": chatml_saying("m.content", f"('earlier' if {IS_EARLIER} else m.role)"),
    "the last answer says more": chatml_saying("m.content", end="(' So.' if m.role != 'user' and loop.last else '')"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_template_whose_parts_really_disagree_is_refused_with_an_example(name: str) -> None:
    assert len(supervised(REFUSED[name], [user("Hi"), says("A long answer")])) == 1
    with pytest.raises(RowProblem, match=r"chat template: rendered .* turn 2, .*--chat-template FILE") as error:
        supervised(REFUSED[name], [user("Hello"), says("A long answer"), user("More"), says("Another one")])
    assert error.value.reason_code == "template-disagrees"
    assert "\n" not in error.value.detail


def test_template_without_an_end_of_earlier_turns_supervises_their_text_alone() -> None:
    jinja = (
        "{% for m in messages %}{{ '<|start|>' + m.role + '<|message|>' + m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start|>assistant<|message|>' }}{% elif messages[-1].role == 'assistant' %}"
        "{{ '<|return|>' }}{% endif %}"
    )
    assert supervised(jinja, TWO) == ["Yes?", "It is 5.\nDone<|return|>"]


def test_arguments_that_are_not_the_rows_to_set_are_refused() -> None:
    for value in (
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": "["},
        {"chat_template_kwargs": 3},
    ):
        with pytest.raises(RowProblem) as problem:
            parse_template_arguments(value)
        assert problem.value.reason_code == "template-arguments"
    assert parse_template_arguments({"chat_template_kwargs": '{"a": 1}', "enable_thinking": None}) == {"a": 1}


TEXT = st.text(st.sampled_from("ab <>/|\n5é人"), min_size=1, max_size=12).map(lambda text: f"{text.strip()}.")


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, Any]]:
    """A system turn or none, then questions, each with an answer that may have been thought about."""
    messages = [system(draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(user(draw(TEXT)))
        messages.append(says(draw(TEXT), draw(st.none() | TEXT)))
    return messages


# What stands before an answer, without reasoning and with it, when the turn is the last; and what ends earlier ones.
FRAMES = {
    shapes.CHATML: ("", "", "<|im_end|>"),
    shapes.LLAMA3: ("", "", "<|eot_id|>"),
    shapes.GEMMA: ("", "", "<end_of_turn>"),
    shapes.MISTRAL: (" ", " ", "</s>"),
    shapes.GPT_OSS: (
        "<|channel|>final<|message|>",
        "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|end|>",
    ),
    shapes.DEEPSEEK_R1: ("", "", "<｜end▁of▁sentence｜>"),
    shapes.QWEN3: ("<think>\n\n</think>\n\n", "<think>\n{}\n</think>\n\n", "<|im_end|>"),
}
EARLIER = {**dict.fromkeys(FRAMES, ""), shapes.MISTRAL: " ", shapes.GPT_OSS: "<|channel|>final<|message|>"}


@pytest.mark.parametrize("template", FRAMES, ids=range(len(FRAMES)))
@settings(max_examples=40, deadline=None)
@given(messages=conversations())
def test_any_conversation_is_supervised_by_its_answers_and_decodes_to_its_rendering(
    template: str, messages: list[dict[str, Any]]
) -> None:
    tokenizer = shapes.tokenizer_of(template)
    plain, thought, end = FRAMES[template]
    *earlier, last = [message for message in messages if message["role"] == "assistant"]
    expected = [EARLIER[template] + turn["content"] + end for turn in earlier]
    frame = plain if last.get("reasoning_content") is None else thought.format(last["reasoning_content"])
    expected.append(frame + last["content"] + shapes.END_TOKENS[template])
    assert supervised(template, messages) == expected
    encoded = ChatTemplate(tokenizer).encode(parse_conversation({"messages": messages}))
    assert tokenizer.decode(encoded.input_ids) == tokenizer.apply_chat_template(messages, tokenize=False)
