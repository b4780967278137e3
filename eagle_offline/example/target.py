"""Trains the example's target, a small Llama, once from a chat corpus; knows nothing of drafts or caches."""

from __future__ import annotations

import hashlib
import json
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eagle_offline.durable import fsync_directory, fsync_file, write_bytes
from eagle_offline.errors import StoppedEarly
from eagle_offline.example.corpus import read_conversations

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN = "<|im_start|>"
END_OF_TURN = "<|im_end|>"
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)
COMPLETION_FILE = "training.json"
CHECKPOINT_SECONDS = 20.0
# The reported loss is the mean over this many last steps: one batch alone is too noisy to compare runs by.
LOSS_WINDOW = 20
MAX_GRADIENT_NORM = 1.0
_ASSISTANT_TURN = re.compile(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", re.DOTALL)

Report = Callable[[int, int, float], None]
ShouldStop = Callable[[], bool]


class ExampleTargetConfig(BaseModel):
    """Everything that determines the example target, given a corpus and a number of threads."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_size: int = Field(128, gt=0)
    num_hidden_layers: int = Field(8, gt=0)
    num_attention_heads: int = Field(4, gt=0)
    num_key_value_heads: int = Field(2, gt=0)
    intermediate_size: int = Field(352, gt=0)
    vocab_size: int = Field(960, gt=256, description="Upper bound; a small corpus may not yield as many merges.")
    seq_length: int = Field(
        384, gt=1, description="Training cuts conversations here; positions reach four times as far."
    )
    initializer_range: float = Field(0.02, gt=0)
    rope_theta: float = Field(100_000.0, gt=0)
    steps: int = Field(560, gt=0)
    warmup_steps: int = Field(20, ge=0)
    learning_rate: float = Field(3e-3, gt=0)
    final_learning_rate_share: float = Field(0.05, ge=0, le=1)
    weight_decay: float = Field(0.05, ge=0)
    prompt_loss_weight: float = Field(0.5, ge=0, le=1, description="Weight of a prompt token; assistant tokens have 1.")
    tokens_per_batch: int = Field(1024, gt=0, description="Upper bound, padding included.")
    seed: int = 0


class _Example(NamedTuple):
    """Token ids of one conversation and which of them the assistant wrote, end-of-turn token included."""

    input_ids: list[int]
    loss_mask: list[bool]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with a ChatML template that decodes to exactly what it encoded.

    Digits stay single tokens: a small model then needs one addition table, not one for every number.

    Args:
        texts: What the merges are learned from.
        vocab_size: Upper bound of the vocabulary: 256 bytes, three special tokens and the merges.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, START_OF_TURN, END_OF_TURN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START_OF_TURN],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def encode_conversation(
    tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]], seq_length: int
) -> _Example:
    """Return the first `seq_length` token ids of the rendered conversation and the mask of its assistant tokens."""
    text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = [match.span(1) for match in _ASSISTANT_TURN.finditer(text)]
    mask = [any(first <= begin < last for first, last in spans) for begin, _ in encoded["offset_mapping"]]
    return _Example(encoded["input_ids"][:seq_length], mask[:seq_length])


def plan_batches(lengths: list[int], config: ExampleTargetConfig) -> list[list[int]]:
    """Return `config.steps` batches of indices into `lengths`; epoch follows epoch, each freshly shuffled.

    Conversations of like length share a batch, so that little of `tokens_per_batch` is padding.
    """
    plan: list[list[int]] = []
    rng = random.Random(config.seed)
    while len(plan) < config.steps:
        # Jitter breaks ties and neighbours differently in every epoch without mixing short with long.
        order = sorted(range(len(lengths)), key=lambda index: lengths[index] * rng.uniform(0.9, 1.1))
        epoch: list[list[int]] = [[]]
        longest = 0
        for index in order:
            longest = max(longest, lengths[index])
            if epoch[-1] and longest * (len(epoch[-1]) + 1) > config.tokens_per_batch:
                epoch.append([])
                longest = lengths[index]
            epoch[-1].append(index)
        rng.shuffle(epoch)
        plan.extend(epoch)
    return plan[: config.steps]


def _collate(examples: list[_Example], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return input_ids [B, T] int64, loss_mask [B, T] bool and filled [B, T] bool, padded on the right."""
    longest = max(len(example.input_ids) for example in examples)
    input_ids = torch.full((len(examples), longest), pad_token_id)
    loss_mask = torch.zeros((len(examples), longest), dtype=torch.bool)
    filled = torch.zeros_like(loss_mask)
    for row, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[row, :length] = torch.tensor(example.input_ids)
        loss_mask[row, :length] = torch.tensor(example.loss_mask)
        filled[row, :length] = True
    return input_ids, loss_mask, filled


def _losses(
    model: LlamaForCausalLM, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], prompt_weight: float
) -> tuple[torch.Tensor, float]:
    """Return the weighted training loss and the mean loss over assistant tokens, both in nats per token."""
    input_ids, loss_mask, filled = batch
    # Padding stands on the right, where causal attention lets no real token see it: no attention mask is needed.
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
    per_token = torch.nn.functional.cross_entropy(logits.transpose(1, 2), input_ids[:, 1:], reduction="none")
    supervised = loss_mask[:, 1:].float()
    weights = supervised + prompt_weight * (filled[:, 1:].float() - supervised)
    assistant = (per_token.detach() * supervised).sum() / supervised.sum().clamp(min=1)
    return (per_token * weights).sum() / weights.sum().clamp(min=1), assistant.item()


def _learning_rate(config: ExampleTargetConfig, step: int) -> float:
    """Return the rate of 0-based `step`: a linear rise, then half a cosine down to the final share."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    share = config.final_learning_rate_share
    return config.learning_rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * done)))


class _TrainingState:
    """Model, optimizer and counters of one run; `save` and `restore` are exact."""

    def __init__(self, config: ExampleTargetConfig, tokenizer: PreTrainedTokenizerFast):
        llama = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=4 * config.seq_length,
            tie_word_embeddings=False,
            initializer_range=config.initializer_range,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.model = LlamaForCausalLM(llama).float()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim <= 1]
        groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.seconds = 0.0
        self.recent_losses: list[float] = []

    def save(self, checkpoints: Path, fingerprint: str) -> None:
        """Write a checkpoint to a sibling, make it durable, rename it into place, then drop the earlier ones."""
        sibling = checkpoints / "unfinished"
        shutil.rmtree(sibling, ignore_errors=True)
        sibling.mkdir(parents=True)
        moments = self.optimizer.state_dict()["state"]
        flat = {f"{index}.{name}": value for index, state in moments.items() for name, value in state.items()}
        save_file(self.model.state_dict(), sibling / "model.safetensors")
        save_file(flat, sibling / "optimizer.safetensors")
        counters = {"fingerprint": fingerprint, "step": self.step, "seconds": self.seconds}
        (sibling / "state.json").write_text(json.dumps({**counters, "recent_losses": self.recent_losses}))
        _flush_files(sibling)
        kept = checkpoints / f"step-{self.step:08d}"
        shutil.rmtree(kept, ignore_errors=True)
        sibling.rename(kept)
        for earlier in checkpoints.iterdir():
            if earlier != kept:
                shutil.rmtree(earlier)

    def restore(self, checkpoints: Path, fingerprint: str) -> None:
        """Continue from the last checkpoint with this fingerprint; without one, stay at step 0."""
        for directory in sorted(checkpoints.glob("step-*"), reverse=True):
            counters = json.loads((directory / "state.json").read_text())
            if counters["fingerprint"] != fingerprint:
                continue
            self.model.load_state_dict(load_file(directory / "model.safetensors"))
            state: dict[int, dict[str, torch.Tensor]] = {}
            for key, value in load_file(directory / "optimizer.safetensors").items():
                index, name = key.split(".")
                state.setdefault(int(index), {})[name] = value
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})
            self.step, self.seconds = counters["step"], counters["seconds"]
            self.recent_losses = counters["recent_losses"]
            return

    def take_step(self, batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor], config: ExampleTargetConfig) -> float:
        """Update the weights once and return the batch's mean loss over assistant tokens, from before the update."""
        for group in self.optimizer.param_groups:
            group["lr"] = _learning_rate(config, self.step)
        loss, assistant_loss = _losses(self.model, batch, config.prompt_loss_weight)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.recent_losses = [*self.recent_losses, assistant_loss][-LOSS_WINDOW:]
        return assistant_loss


def _flush_files(directory: Path) -> None:
    """Make the content of every file in `directory` durable."""
    for file in directory.iterdir():
        fsync_file(file)
    fsync_directory(directory)


def _fingerprint(train_file: Path, config: ExampleTargetConfig) -> str:
    """Return a digest that changes with the corpus and with every setting."""
    digest = hashlib.sha256(config.model_dump_json().encode())
    digest.update(train_file.read_bytes())
    return digest.hexdigest()


def read_summary(output_dir: Path | str) -> dict | None:
    """Return what `train_target` recorded in `output_dir`, or None if no training was finished there."""
    file = Path(output_dir) / COMPLETION_FILE
    return json.loads(file.read_text()) if file.exists() else None


def train_target(
    train_file: Path | str,
    output_dir: Path | str,
    config: ExampleTargetConfig,
    report: Report | None = None,
    should_stop: ShouldStop | None = None,
) -> dict:
    """Train the target on `train_file` and save model, tokenizer and generation config in `output_dir`.

    An interrupted run goes on from its last checkpoint, kept beside `output_dir`, and ends with the weights of an
    uninterrupted one, bit for bit at the same number of threads. A finished run of the same settings and corpus
    is left as it is. `training.json` is written last.

    Args:
        train_file: Corpus as `write_corpus` writes it.
        output_dir: Directory for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.
        config: Shape and training settings.
        report: Called after every step with the steps done, all steps and the step's assistant loss in nats.
        should_stop: Asked before every step.

    Returns:
        `fingerprint`, `assistant_loss` (nats per token, mean of the last steps), `seconds`, `num_parameters`,
        `vocab_size`, `steps`, `num_threads`.

    Raises:
        StoppedEarly: `should_stop` said so; a checkpoint of the last step is on the disk.
    """
    train_file, output_dir = Path(train_file), Path(output_dir)
    fingerprint = _fingerprint(train_file, config)
    summary = read_summary(output_dir)
    if summary is not None and summary["fingerprint"] == fingerprint:
        return summary
    conversations = [conversation["messages"] for conversation in read_conversations(train_file)]
    # With the role names, which stand in every turn header, so that each becomes one token.
    texts = (f"{message['role']}\n{message['content']}" for messages in conversations for message in messages)
    tokenizer = build_tokenizer(texts, config.vocab_size)
    examples = [encode_conversation(tokenizer, messages, config.seq_length) for messages in conversations]
    state = _TrainingState(config, tokenizer)
    checkpoints = output_dir.with_name(output_dir.name + ".checkpoints")
    state.restore(checkpoints, fingerprint)
    _train(state, examples, config, lambda: state.save(checkpoints, fingerprint), report, should_stop)

    (output_dir / COMPLETION_FILE).unlink(missing_ok=True)
    state.model.eval()
    state.model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    state.model.save_pretrained(output_dir)
    tokenizer.save_pretrained(output_dir)
    _flush_files(output_dir)
    summary = {
        "fingerprint": fingerprint,
        "assistant_loss": sum(state.recent_losses) / len(state.recent_losses),
        "seconds": state.seconds,
        "num_parameters": sum(parameter.numel() for parameter in state.model.parameters()),
        "vocab_size": len(tokenizer),
        "steps": config.steps,
        "num_threads": torch.get_num_threads(),
    }
    write_bytes(output_dir / COMPLETION_FILE, (json.dumps(summary, indent=2) + "\n").encode())
    shutil.rmtree(checkpoints, ignore_errors=True)
    return summary


def _train(
    state: _TrainingState,
    examples: list[_Example],
    config: ExampleTargetConfig,
    save: Callable[[], None],
    report: Report | None,
    should_stop: ShouldStop | None,
) -> None:
    """Take the steps that are left, saving now and then, and before stopping early."""
    plan = plan_batches([len(example.input_ids) for example in examples], config)
    state.model.train()
    pad_token_id = state.model.config.pad_token_id
    saved_at = last = time.monotonic()
    while state.step < config.steps:
        if should_stop is not None and should_stop():
            save()
            raise StoppedEarly(f"target training stopped after {state.step} of {config.steps} steps; run it again")
        loss = state.take_step(_collate([examples[index] for index in plan[state.step]], pad_token_id), config)
        now = time.monotonic()
        state.seconds, last = state.seconds + now - last, now
        if now - saved_at > CHECKPOINT_SECONDS:
            save()
            saved_at = now
        if report is not None:
            report(state.step, config.steps, loss)
