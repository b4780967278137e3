"""Tiny targets, tokenizers and chat data, made by plain calls to the libraries and not by the code under test."""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
SPECIAL_TOKENS = ("<s>", "<pad>", "<|im_start|>", "<|im_end|>")
NUM_LAYERS = 8
DEFAULT_AUX_LAYER_IDS = [1, 3, 4]  # of 8 layers, by hand: 1, 8 // 2 - 1, 8 - 4
HIDDEN_SIZE = 32
VOCAB_SIZE = 272  # 256 bytes, the special tokens, and rows that no text reaches
DRAFT_VOCAB_SIZE = 64

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Wide enough that layers change their input and the distributions have a shape.
    "initializer_range": 0.25,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXTRA: dict[str, dict[str, Any]] = {
    "Gemma2": {"query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0, "sliding_window": 16},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 4.0, "embedding_multiplier": 2.0},
}


def _scratch() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="eagle-offline-tests-"))
    directory.chmod(0o755)  # some tests read it as another user
    owner = os.getpid()  # a forked child must not clear it away

    def clear() -> None:
        if os.getpid() == owner:
            shutil.rmtree(directory, ignore_errors=True)

    atexit.register(clear)
    return directory


SCRATCH = _scratch()
# Digests of model files are remembered there; a test must not read or write the user's own.
os.environ["XDG_CACHE_HOME"] = str(SCRATCH / "user-cache")


def make_tokenizer(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A token a byte, then the special tokens: `<|im_end|>` is 259 and ends a turn."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>"
    )


def make_model(kind: str = "Llama", *, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """A random `{kind}ForCausalLM` in float32, norms away from 1 so that forgetting one shows."""
    config = getattr(transformers, f"{kind}Config")(**{**_SIZES, **_EXTRA.get(kind, {}), **changes})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            assert parameter.isfinite().all(), name
    return model.eval()


def save_target(
    directory: Path,
    kind: str = "Llama",
    *,
    dtype: torch.dtype = torch.float32,
    template: str | None = CHATML,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """Save a random target with its tokenizer, as `save_pretrained` does."""
    make_model(kind, seed=seed, **changes).to(dtype).save_pretrained(directory)
    make_tokenizer(template).save_pretrained(directory)
    for path in directory.iterdir():
        path.chmod(0o644)
    return directory


@cache
def shared_target(
    kind: str = "Llama", dtype: torch.dtype = torch.float32, changes: tuple[tuple[str, Any], ...] = ()
) -> Path:
    """A saved target that no test changes."""
    name = hashlib.sha1(f"{kind}{dtype}{changes}".encode()).hexdigest()[:8]
    return save_target(SCRATCH / f"target-{kind}-{name}", kind, dtype=dtype, **dict(changes))


def conversations(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Short chats of one to three exchanges, some with a system turn, no two alike."""
    rng = random.Random(seed)
    words = [
        "one",
        "two",
        "three",
        "red",
        "green",
        "blue",
        "sum",
        "list",
        "count",
        "please",
        "return",
        "value",
        "because",
        "then",
    ]

    def say(low: int, high: int) -> str:
        return " ".join(rng.choice(words) for _ in range(rng.randint(low, high)))

    rows = []
    for index in range(count):
        turns = [{"role": "system", "content": "Be brief."}] if rng.random() < 0.3 else []
        for _ in range(rng.choice((1, 1, 2, 3))):
            turns.append({"role": "user", "content": f"{index}: {say(1, 6)}?"})
            turns.append({"role": "assistant", "content": say(1, 8) + "."})
        rows.append({"messages": turns})
    return rows


def write_jsonl(path: Path, rows: Sequence[Any]) -> Path:
    """Write objects as JSON lines; a str is written as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@cache
def shared_chat(count: int = 10, seed: int = 0) -> Path:
    """A chat file that no test changes."""
    return write_jsonl(SCRATCH / f"chat-{count}-{seed}.jsonl", conversations(count, seed))


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, what it printed, what it said on stderr."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        """Lines of stderr, without those of progress."""
        return [
            line
            for line in self.err.splitlines()
            if line and not line.startswith(("tokenize:", "precompute:", "draft vocabulary:"))
        ]


def run_cli(*arguments: object) -> Ended:
    """Run `eagle-offline` in this process; whatever is not an orderly exit gets through to the test."""
    from eagle_offline.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Ended(int(code or 0), out.getvalue(), err.getvalue())


def precompute_arguments(
    output_dir: Path, target: Path | None = None, data: Path | str | None = None, **flags: Any
) -> list[str]:
    """The command line of a small precompute; `flags` in underscores, True for a switch, a list for several values."""
    given: Mapping[str, Any] = {
        "target_model": target or shared_target(),
        "input_data": data or shared_chat(),
        "output_dir": output_dir,
        "seq_length": 96,
        "draft_vocab_size": DRAFT_VOCAB_SIZE,
        "batch_size": 3,
        "shard_size": 4,
        "device": "cpu",
        **flags,
    }
    arguments = ["precompute"]
    for name, value in given.items():
        if value is None or value is False:
            continue
        arguments.append("--" + name.replace("_", "-"))
        if value is not True:
            arguments += [str(item) for item in value] if isinstance(value, list | tuple) else [str(value)]
    return arguments


def precompute(output_dir: Path, target: Path | None = None, data: Path | str | None = None, **flags: Any) -> Ended:
    """Run a small precompute in this process."""
    return run_cli(*precompute_arguments(output_dir, target, data, **flags))


def make_cache(output_dir: Path, target: Path | None = None, data: Path | str | None = None, **flags: Any) -> Path:
    """Precompute a whole small cache."""
    ended = precompute(output_dir, target, data, **flags)
    assert ended.code == 0, ended.err
    return output_dir


def tree(directory: Path, *, without: Sequence[str] = ("status.json",)) -> dict[str, tuple[int, str]]:
    """Every file below a directory with its modification time and a digest of its bytes."""
    return {
        path.relative_to(directory).as_posix(): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name not in without
    }


def shard_bytes(directory: Path) -> dict[str, bytes]:
    """Every shard file by name."""
    return {path.name: path.read_bytes() for path in sorted(directory.glob("shard-*"))}


def record_contents(directory: Path) -> dict[str, Any]:
    """What every commit record says, by name."""
    return {path.name: json.loads(path.read_bytes()) for path in sorted(directory.glob("commit-*.json"))}


def leftovers(directory: Path) -> list[str]:
    """Files that are neither part of a cache nor of its tokens: what an interrupted writer left behind."""
    own = {"manifest.json", "status.json", "head.safetensors", "embeddings.safetensors", "config.json"}
    folders = {"tokens", "target", "vocab"}
    tokens = {"tokens.arrow", "quarantine.jsonl", "tokens.json"}
    committed = {record["file"] for record in record_contents(directory).values()}
    found = []
    for path in sorted(directory.rglob("*")):
        name, place = path.name, path.relative_to(directory)
        if path.is_dir() and len(place.parts) == 1 and name in folders:
            continue
        if len(place.parts) == 1 and (
            name in own or name in committed or name.startswith(("commit-", "status-", "index-"))
        ):
            continue
        if place.parts[0] in committed:  # a shard that is a directory
            continue
        if len(place.parts) == 2 and place.parts[0] in ("target", "vocab") and not name.startswith("."):
            continue
        if len(place.parts) == 2 and place.parts[0] == "tokens" and name in tokens:
            continue
        found.append(place.as_posix())
    return found
