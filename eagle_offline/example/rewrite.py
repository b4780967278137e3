"""Replaces the assistant turns of a chat file by what the target itself would say; knows nothing of training."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from eagle_offline.durable import fsync_file, write_bytes
from eagle_offline.errors import DataError, StoppedEarly
from eagle_offline.example.corpus import read_conversations, write_conversations
from eagle_offline.example.target import Report, ShouldStop

SUMMARY_SUFFIX = ".summary.json"
PROGRESS_SUFFIX = ".partial"


@dataclass(frozen=True)
class _Pending:
    """A conversation whose next turn the assistant has to write."""

    index: int
    messages: list[dict[str, str]]
    prompt_ids: list[int]
    original_chars: int


class _Progress:
    """Answers of finished batches, one JSON line each, behind a line that says what they belong to.

    The plan of the batches follows from the inputs and the answers so far; so the number of a batch identifies it.
    """

    def __init__(self, file: Path, fingerprint: str):
        self._file = file
        self._batches: list[list[str | None]] = []
        lines = file.read_bytes().splitlines(keepends=True) if file.exists() else []
        # A process that was killed may have left the last line torn; it has no line end then.
        whole = [line for line in lines if line.endswith(b"\n")]
        if whole and json.loads(whole[0]) == fingerprint:
            self._batches = [json.loads(line) for line in whole[1:]]
        write_bytes(file, "".join(json.dumps(line) + "\n" for line in [fingerprint, *self._batches]).encode())

    def read_batch(self, number: int) -> list[str | None] | None:
        """Return the answers of a batch, or None if it is not finished."""
        return self._batches[number] if number < len(self._batches) else None

    def append_batch(self, answers: list[str | None]) -> None:
        """Record the answers of the batch after the last one."""
        self._batches.append(answers)
        with self._file.open("ab") as stream:
            stream.write(json.dumps(answers).encode() + b"\n")

    def flush(self) -> None:
        """Make what was appended durable."""
        fsync_file(self._file)

    def remove(self) -> None:
        """Forget everything."""
        self._file.unlink(missing_ok=True)


def generate_answers(
    model: Any, tokenizer: PreTrainedTokenizerFast, prompts: list[list[int]], max_new_tokens: int
) -> list[str | None]:
    """Return the greedy answer to every prompt, or None where no end-of-turn token came within `max_new_tokens`.

    Prompts of unlike length are padded on the left; the attention mask keeps padding out, and positions count from
    the first real token, so that each answer is what the prompt gets on its own in float32.
    """
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.inference_mode():
        output = model.generate(input_ids=input_ids, attention_mask=attention_mask, generation_config=settings)
    answers: list[str | None] = []
    for generated in output[:, longest:].tolist():
        ended = tokenizer.eos_token_id in generated
        answer = generated[: generated.index(tokenizer.eos_token_id)] if ended else []
        answers.append(str(tokenizer.decode(answer, skip_special_tokens=True)) if ended else None)
    return answers


def rewrite_answers(
    target_dir: Path | str,
    input_file: Path | str,
    output_file: Path | str,
    max_new_tokens: int,
    batch_size: int,
    report: Report | None = None,
    should_stop: ShouldStop | None = None,
) -> dict:
    """Write `input_file` again with every assistant turn generated greedily by the target.

    A turn is generated from the turns before it as they were rewritten. One that does not end within
    `max_new_tokens` is dropped with all that follows, a conversation without any assistant turn left is left out.
    Order, ids and every other field stay. An interrupted run goes on after its last batch, kept in
    `<output_file>.partial`; a finished one of the same inputs is left as it is.

    Args:
        target_dir: Where `train_target` saved model and tokenizer.
        input_file: Conversations, one JSON object per line.
        output_file: JSONL file; `<output_file>.summary.json` beside it is written last.
        max_new_tokens: Longest answer, end-of-turn token included.
        batch_size: Conversations generated together.
        report: Called after every batch with the turns done, all turns, and the share of them that was dropped.
        should_stop: Asked before every batch.

    Returns:
        `fingerprint`, `num_conversations` (written), `num_left_out`, `num_turns` (written), `num_dropped_turns`.

    Raises:
        DataError: `input_file` holds no assistant turn.
        StoppedEarly: `should_stop` said so; finished batches are on the disk.
    """
    target_dir, input_file, output_file = Path(target_dir), Path(input_file), Path(output_file)
    fingerprint = _fingerprint(target_dir, input_file, max_new_tokens, batch_size)
    summary_file = output_file.with_name(output_file.name + SUMMARY_SUFFIX)
    if summary_file.exists() and output_file.exists():
        summary = json.loads(summary_file.read_text())
        if summary["fingerprint"] == fingerprint:
            return summary
    conversations = read_conversations(input_file)
    num_turns = sum(_count_answers(conversation["messages"]) for conversation in conversations)
    if num_turns == 0:
        raise DataError(f"{input_file}: found no assistant turn to rewrite, expected at least one")
    output_file.parent.mkdir(parents=True, exist_ok=True)
    progress = _Progress(output_file.with_name(output_file.name + PROGRESS_SUFFIX), fingerprint)
    rewritten = _rewrite(target_dir, conversations, (max_new_tokens, batch_size), progress, report, should_stop)

    kept = [
        {**conversation, "messages": messages}
        for conversation, messages in zip(conversations, rewritten, strict=True)
        if _count_answers(messages)
    ]
    num_kept_turns = sum(_count_answers(conversation["messages"]) for conversation in kept)
    summary = {
        "fingerprint": fingerprint,
        "num_conversations": len(kept),
        "num_left_out": len(conversations) - len(kept),
        "num_turns": num_kept_turns,
        "num_dropped_turns": num_turns - num_kept_turns,
    }
    summary_file.unlink(missing_ok=True)
    write_conversations(output_file, kept)
    write_bytes(summary_file, (json.dumps(summary, indent=2) + "\n").encode())
    progress.remove()
    return summary


def _rewrite(
    target_dir: Path,
    conversations: list[dict],
    limits: tuple[int, int],
    progress: _Progress,
    report: Report | None,
    should_stop: ShouldStop | None,
) -> list[list[dict[str, str]]]:
    """Return the rewritten messages of every conversation; `limits` are new tokens per answer and batch size."""
    max_new_tokens, batch_size = limits
    tokenizer = cast(PreTrainedTokenizerFast, AutoTokenizer.from_pretrained(target_dir))
    model = AutoModelForCausalLM.from_pretrained(target_dir).eval()
    num_turns = sum(_count_answers(conversation["messages"]) for conversation in conversations)
    originals = list(conversations)
    rewritten: list[list[dict[str, str]]] = [[] for _ in conversations]
    number = num_done = num_dropped = 0
    while round_turns := _find_pending(originals, rewritten, tokenizer):
        for start in range(0, len(round_turns), batch_size):
            batch = round_turns[start : start + batch_size]
            answers = progress.read_batch(number)
            if answers is None:
                if should_stop is not None and should_stop():
                    progress.flush()
                    raise StoppedEarly(f"rewriting stopped after {num_done} of {num_turns} turns; run it again")
                answers = generate_answers(model, tokenizer, [turn.prompt_ids for turn in batch], max_new_tokens)
                progress.append_batch(answers)
            for turn, answer in zip(batch, answers, strict=True):
                messages = originals[turn.index]["messages"]
                if answer is None:
                    left = _count_answers(messages[len(turn.messages) :])
                    # The conversation ends with its last answer: a question nobody answers teaches nothing.
                    originals[turn.index] = {"messages": rewritten[turn.index]}
                    num_done, num_dropped = num_done + left, num_dropped + left
                else:
                    rewritten[turn.index] = [*turn.messages, {**messages[len(turn.messages)], "content": answer}]
                    num_done += 1
            number += 1
            if report is not None:
                report(num_done, num_turns, num_dropped / num_done)
    return [
        [*messages, *original["messages"][len(messages) :]]
        for original, messages in zip(originals, rewritten, strict=True)
    ]


def _find_pending(
    conversations: list[dict], rewritten: list[list[dict[str, str]]], tokenizer: PreTrainedTokenizerFast
) -> list[_Pending]:
    """Return the next assistant turn of every unfinished conversation, those of like length side by side.

    A batch runs until its longest answer ends. How long an answer becomes is guessed from the one it replaces.
    """
    pending = []
    for index, (conversation, messages) in enumerate(zip(conversations, rewritten, strict=True)):
        following = conversation["messages"][len(messages) :]
        if _count_answers(following) == 0:
            continue
        position = next(place for place, message in enumerate(following) if message["role"] == "assistant")
        context = [*messages, *following[:position]]
        prompt = tokenizer.apply_chat_template(context, add_generation_prompt=True, tokenize=False)
        prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        pending.append(_Pending(index, context, prompt_ids, len(following[position]["content"])))
    return sorted(pending, key=lambda turn: (turn.original_chars, turn.index))


def _count_answers(messages: list[dict[str, str]]) -> int:
    return sum(message["role"] == "assistant" for message in messages)


def _fingerprint(target_dir: Path, input_file: Path, max_new_tokens: int, batch_size: int) -> str:
    """Return a digest that changes with the target, the tokenizer, the conversations and the limits."""
    digest = hashlib.sha256(json.dumps([max_new_tokens, batch_size]).encode())
    for file in (target_dir / "model.safetensors", target_dir / "tokenizer.json", input_file):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()
