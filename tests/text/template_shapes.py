"""Chat templates with the shapes of the models in use, in our own words, and a tokenizer that knows their tokens.

What is kept of each: its special tokens, where system text, tools and tool results go, what it does to the reasoning
of earlier turns, what ends a turn, and what its generation prompt supplies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = """
{%- if tools %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{{- 'Tools: ' + tools | tojson + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- for m in messages if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """
{{- '<|begin_of_text|>' }}
{%- for m in messages %}
{%- set role = 'ipython' if m.role == 'tool' else m.role %}
{{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
{%- if m.tool_calls %}
{%- set f = m.tool_calls[0].function %}
{{- '{"name": "' + f.name + '", "parameters": ' + f.arguments | tojson + '}' }}
{%- else %}{{ m.content | trim }}{% endif %}
{%- if loop.first and tools %}{{ '\\nTools: ' + tools | tojson }}{% endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

GEMMA = """
{{- '<bos>' }}
{%- set folded = namespace(text='') %}
{%- for m in messages %}
{%- if m.role == 'system' %}{% set folded.text = m.content + '\\n\\n' %}
{%- else %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + folded.text + m.content | trim }}
{{- '<end_of_turn>\\n' }}
{%- set folded.text = '' %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}
"""

# The tools and the system text stand at the last question, so that they move on with every turn.
MISTRAL = """
{{- '<s>' }}
{%- set last = namespace(user=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}
{%- set system = messages[0].content + '\\n\\n' if messages and messages[0].role == 'system' else '' %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- if loop.index0 == last.user and tools %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + (system if loop.index0 == last.user else '') + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + {'content': m.content} | tojson + '[/TOOL_RESULTS]' }}
{%- elif m.tool_calls %}
{{- '[TOOL_CALLS] [' }}
{%- for call in m.tool_calls %}{{ call.function | tojson }}{{ '' if loop.last else ', ' }}{% endfor %}{{ ']</s>' }}
{%- elif m.role == 'assistant' %}{{ ' ' + m.content | trim + '</s>' }}
{%- endif %}
{%- endfor %}
"""

# Reasoning is kept until the next final answer; the last final answer ends with a token of its own.
GPT_OSS = """
{{- '<|start|>system<|message|>You are a model.' + ('\\nTools: ' + tools | tojson if tools else '') + '<|end|>' }}
{%- set final = namespace(last=-1, called='') %}
{%- for m in messages %}
{%- if m.role == 'assistant' and not m.tool_calls %}{% set final.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ '<|start|>developer<|message|># Instructions\\n' + m.content + '<|end|>' }}
{%- elif m.role == 'tool' %}
{{- '<|start|>functions.' + final.called + ' to=assistant<|channel|>commentary<|message|>' }}
{{- m.content | tojson + '<|end|>' }}
{%- elif m.role == 'user' %}{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}
{%- else %}
{%- if m.thinking and (loop.last or final.last < loop.index0) %}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}{% endif %}
{%- if m.tool_calls %}
{%- set final.called = m.tool_calls[0].function.name %}
{{- '<|start|>assistant to=functions.' + final.called + '<|channel|>commentary json<|message|>' }}
{{- m.tool_calls[0].function.arguments | tojson + '<|call|>' }}
{%- else %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + ('<|return|>' if loop.last else '<|end|>') }}
{%- endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}
"""

# Reasoning is never shown again; the generation prompt begins one, unless a tool's answer has just come.
DEEPSEEK_R1 = """
{{- '<｜begin▁of▁sentence｜>' }}
{%- for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{%- set after = namespace(tool=false) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set after.tool = false %}{{ '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}
{{- '' if after.tool else '<｜tool▁outputs▁begin｜>' }}
{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- set after.tool = true %}
{%- elif m.role == 'assistant' %}
{%- set said = m.content.split('</think>')[-1] %}
{{- '<｜tool▁outputs▁end｜>' if after.tool else '<｜Assistant｜>' }}
{%- set after.tool = false %}
{{- said }}
{%- for call in m.tool_calls or [] %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + '\\n' + call.function.arguments + '<｜tool▁call▁end｜>' }}
{%- endfor %}
{{- '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if after.tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}
{%- if add_generation_prompt and not after.tool %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}
"""

# Reasoning stays behind the last question; the last answer has its place even without one.
QWEN3 = """
{%- if tools %}
{{- '<|im_start|>system\\n' + (messages[0].content + '\\n\\n' if messages[0].role == 'system' else '') }}
{{- '# Tools\\n' + tools | tojson + '<|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}
{%- set last = namespace(query=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set last.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- elif m.role == 'assistant' %}
{%- set content = m.content %}{% set reasoning = m.reasoning_content or '' %}
{%- if not reasoning and '</think>' in content %}
{%- set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.query and (loop.last or reasoning) %}
{{- '<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n' if content or not loop.first else '' }}
{{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
"""

SPECIAL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>", "<|call|>"),
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
    *("<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"),
    *("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"),
)
# As in the models: added, but not special.
PLAIN_ADDED_TOKENS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")

END_TOKENS = {
    CHATML: "<|im_end|>",
    LLAMA3: "<|eot_id|>",
    GEMMA: "<end_of_turn>",
    MISTRAL: "</s>",
    GPT_OSS: "<|return|>",
    DEEPSEEK_R1: "<｜end▁of▁sentence｜>",
    QWEN3: "<|im_end|>",
}


@cache
def tokenizer_of(template: str) -> PreTrainedTokenizerFast:
    """A token a byte, and one for every token that a template of these shapes writes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in PLAIN_ADDED_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, eos_token=END_TOKENS.get(template, "<|endoftext|>")
    )


def system(content: str) -> dict[str, Any]:
    return {"role": "system", "content": content}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def says(content: str, thinking: str | None = None) -> dict[str, Any]:
    turn = {"role": "assistant", "content": content}
    return turn if thinking is None else {**turn, "reasoning_content": thinking}


def calls(arguments: str, thinking: str | None = None, content: str = "") -> dict[str, Any]:
    """A turn that calls `add`; the arguments are JSON text, as data sets have them."""
    function = {"name": "add", "arguments": arguments}
    return {**says(content, thinking), "tool_calls": [{"type": "function", "function": function}]}


def result(content: str) -> dict[str, Any]:
    return {"role": "tool", "content": content}


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
