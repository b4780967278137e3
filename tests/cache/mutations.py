"""Damage done to the files of a cache at random, and what a reader makes of it, each in a process it may take down."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xxhash

SECONDS = 20  # a reader that takes longer than this on a cache of a few kilobytes hangs
EXTRA_MEMORY_BYTES = 2 << 30  # nor may it ask for more than this

WEIRD_VALUES: list[Any] = [
    None, True, False, -1, 0, 10**400, -(10**400), 1, 7, 2**31, 2**31 - 1, 2**63, -(2**63),
    2**64, 10**30, 1.5, 1e308, float("nan"), "", "x",
    "none", "0", "../../secret", "/etc/passwd", "a" * 300, "\0", "é", [], {}, [0], [-1], [[]], {"a": 1}, [1e308],
]  # fmt: skip
WEIRD_WORDS = [
    b"\xff" * 4,
    b"\xff" * 8,
    b"\0" * 8,
    b"\xff\xff\xff\x7f",
    b"\0\0\0\x80",
    b"\x01\0\0\0",
    b"\xff" * 7 + b"\x7f",
]


@dataclass(frozen=True)
class Odd:
    """What is put in the place of a file: a `link` to somewhere, a `pipe`, a `directory`, or a file with a `hole`."""

    kind: str
    target: str = ""

    def put(self, path: Path) -> None:
        if self.kind == "link":
            path.symlink_to(self.target)
        elif self.kind == "pipe":
            os.mkfifo(path)
        elif self.kind == "directory":
            path.mkdir()
        else:
            path.write_bytes(b"")
            os.truncate(path, int(self.target))


@dataclass(frozen=True)
class Mutation:
    """One file changed: its path inside the cache, its new bytes, and what was done to it.

    Attributes:
        others: more files that are changed with it; None for one that is taken away.
    """

    file: str
    content: bytes | Odd | None
    what: str
    others: Mapping[str, bytes | Odd | None] = field(default_factory=dict)

    @classmethod
    def of(cls, changes: Mapping[str, bytes | Odd | None], what: str) -> Mutation:
        """Several files changed at once."""
        if not changes:
            return cls("manifest.json", None, f"nothing: {what}")
        (file, content), *others = changes.items()
        return cls(file, content, what, dict(others))

    @property
    def changes(self) -> dict[str, bytes | Odd | None]:
        return {self.file: self.content, **self.others}


def flip_bit(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    at, bit = rng.randrange(len(content)), rng.randrange(8)
    return content[:at] + bytes([content[at] ^ (1 << bit)]) + content[at + 1 :], f"bit {bit} of byte {at}"


def damage_bytes(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Damage that knows nothing of the format; an Arrow file's metadata at its end gets more of it."""
    kind = rng.choice(["flip", "flip", "word", "word", "word", "cut", "insert", "truncate", "zero", "move", "empty"])
    near_end = rng.random() < 0.4
    at = len(content) - 1 - min(int(rng.expovariate(1 / 400)), len(content) - 1) if near_end else 0
    at = at or rng.randrange(len(content))
    size = rng.choice([1, 2, 4, 8, 64, 500])
    word = rng.choice(WEIRD_WORDS)
    damaged = {
        "flip": lambda: flip_bit(content, rng)[0],
        "word": lambda: content[: at & ~3] + word + content[(at & ~3) + len(word) :],
        "cut": lambda: content[:at] + content[at + size :],
        "insert": lambda: content[:at] + rng.randbytes(size) + content[at:],
        "truncate": lambda: content[:at],
        "zero": lambda: content[:at] + bytes(min(size, len(content) - at)) + content[at + size :],
        "move": lambda: content[at:] + content[:at],
        "empty": lambda: b"",
    }[kind]()
    return damaged, f"{kind} at {at} of {len(content)}, size {size}, word {word.hex()}"


def resealed(document: Any) -> Any:
    """Return a JSON object with its `self_digest` made true again, so that checks behind that one are reached."""
    if isinstance(document, dict) and "self_digest" in document:
        rest = {key: value for key, value in document.items() if key != "self_digest"}
        text = json.dumps(rest, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        document = {**rest, "self_digest": xxhash.xxh3_128_hexdigest(text.encode(errors="replace"))}
    return document


def damage_json(content: bytes, rng: random.Random) -> tuple[bytes, str]:
    """One value of a JSON document replaced, taken away, doubled or added."""
    document = json.loads(content)
    places: list[tuple[Any, Any, str]] = []

    def walk(node: Any, path: str) -> None:
        pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in pairs:
            places.append((node, key, f"{path}.{key}"))
            walk(value, f"{path}.{key}")

    walk(document, "")
    node, key, path = rng.choice(places)
    kind = rng.choice(["replace", "replace", "replace", "replace", "delete", "double", "swap"])
    if kind == "replace":
        node[key] = rng.choice(WEIRD_VALUES)
        what = f"{path} = {str(node[key])[:40]!r}"
    elif kind == "delete":
        del node[key]
        what = f"{path} deleted"
    elif kind == "double":
        if isinstance(node, list):
            node.append(node[key])
        else:
            node[f"{key}2"] = node[key]
        what = f"{path} doubled"
    else:
        other_node, other_key, other_path = rng.choice(places)
        with contextlib.suppress(KeyError, IndexError):
            node[key], other_node[other_key] = other_node[other_key], node[key]
        what = f"{path} and {other_path} exchanged"
    try:
        return json.dumps(resealed(document) if rng.random() < 0.7 else document).encode(), what
    except ValueError:  # an exchange put a value inside itself
        return damage_json(content, rng)


def mutations(reference: Path, files: Sequence[str], count: int, seed: int) -> list[Mutation]:
    """Draw `count` mutations of the given files, the same ones for the same seed."""
    rng = random.Random(seed)
    drawn: list[Mutation] = []
    while len(drawn) < count:
        file = rng.choice(files)
        content = (reference / file).read_bytes()
        harm = damage_json if file.endswith(".json") and rng.random() < 0.7 else damage_bytes
        changed, what = harm(content, rng)
        if changed != content:
            drawn.append(Mutation(file, changed, f"{file}: {what}"))
    return drawn


def everything(directory: Path) -> list[Any]:
    """All that a cache says of its samples, as a list of tensors and numbers; raises what the reader raises."""
    from eagle_offline import open_cache

    cache = open_cache(directory)
    said: list[Any] = [
        len(cache),
        cache.selected_token_ids,
        cache.lengths.tolist(),
        cache.index.num_supervised.tolist(),
    ]
    for index in range(len(cache)):
        sample = cache[index]
        supervision = sample.supervision
        said += [sample.sample_id, sample.input_ids, sample.loss_mask, sample.aux_hidden_states]
        said += [supervision.positions, supervision.last_hidden_state, supervision.target_argmax]
        said += [supervision.target_log_normalizer, *cache.target_probs(sample)]
    return said


def same(one: list[Any], other: list[Any]) -> bool:
    def equal(a: Any, b: Any) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(
                a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
            )
        return bool(a == b)

    return len(one) == len(other) and all(equal(a, b) for a, b in zip(one, other, strict=True))


def read(directory: Path, expected: list[Any]) -> str:
    """Read everything: `same`, `refused`, or what went wrong."""
    from eagle_offline.errors import EagleOfflineError

    try:
        found = everything(directory)
    except EagleOfflineError as error:
        return "refused" if "\n" not in str(error) else f"more than one line: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "same" if same(found, expected) else "WRONG DATA"


CANARY = "a stranger's secret"  # stands in files that no cache may show


def command(*arguments: str) -> str:
    """Run a command line: `clean`, `noticed`, or what went wrong with its end or with what it printed."""
    from eagle_offline.cli import main

    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            main(list(arguments))
    except SystemExit as stop:
        code, printed = int(stop.code or 0), out.getvalue()
        if CANARY in printed:
            return "shows a file outside the cache"
        if any(ord(char) < 32 and char not in "\n\t" for char in printed):
            return f"steers the terminal: {printed[-200:]!r}"
        return {0: "clean", 3: "noticed", 4: "noticed"}.get(code, f"exit {code}: {printed[-200:]}")
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:150]}"
    return "no exit"


def inspect(directory: Path, verify: bool) -> str:
    """Run `inspect-manifest`."""
    return command("inspect-manifest", str(directory), *(["--verify"] if verify else []))


class Outside:
    """Notes every file that is opened below ``root`` but outside ``inside``, by Python or by a library, and devices.

    To be made in the process that is watched: an audit hook stays.
    """

    _IN_OPEN = 0x20

    def __init__(self, root: Path, inside: Path):
        self._inside, self._root = os.path.realpath(inside), os.path.realpath(root)
        self._found: list[str] = []
        self._library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._descriptor >= 0
        self._watched: dict[int, str] = {}
        for directory, folders, _ in os.walk(self._root):
            folders[:] = [name for name in folders if os.path.join(directory, name) != self._inside]
            watch = self._library.inotify_add_watch(self._descriptor, directory.encode(), self._IN_OPEN)
            assert watch >= 0
            self._watched[watch] = directory
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ("open", "os.listdir", "os.scandir") or not isinstance(arguments[0], str | bytes):
            return
        path = os.path.abspath(os.fsdecode(arguments[0]))
        below = path.startswith(self._root + "/") and not (path + "/").startswith(self._inside + "/")
        device = path.startswith("/dev/") and path not in ("/dev/null", "/dev/urandom")
        if (below and os.path.basename(path) != "answers") or device or path == "/etc/passwd":
            self._found.append(path)

    def found(self) -> list[str]:
        """What was opened since the last call."""
        with contextlib.suppress(BlockingIOError):
            while content := os.read(self._descriptor, 1 << 16):
                place = 0
                while place < len(content):
                    watch, _, _, size = struct.unpack_from("iIII", content, place)
                    name = content[place + 16 : place + 16 + size].rstrip(b"\0").decode()
                    path = os.path.join(self._watched[watch], name) if name else ""
                    if name and path != self._inside and name != "answers":
                        self._found.append(path)
                    place += 16 + size
        found, self._found = sorted(set(self._found)), []
        return found


def survey(
    reference: Path,
    work: Path,
    drawn: Sequence[Mutation],
    look: Callable[[Path], dict[str, str]],
    seconds: int = SECONDS,
) -> list[dict[str, str]]:
    """Apply each mutation to a copy of the cache and look at it, in a child that may crash, hang or swell."""
    results: list[dict[str, str]] = []
    answers = work / "answers"
    while len(results) < len(drawn):
        answers.write_text("")
        child = os.fork()
        if child == 0:
            _look_at_all(reference, work / "cache", drawn[len(results) :], look, answers, seconds)
        _, status = os.waitpid(child, 0)
        results += [json.loads(line) for line in answers.read_text().splitlines()]
        if status and len(results) < len(drawn):
            results.append({"crash": f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"status {status}"})
    return results


def place(path: Path, content: bytes | Odd | None) -> None:
    """Put something in the place of a file, or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if content is None:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Odd):
        content.put(path)
    else:
        path.write_bytes(content)


def restore(reference: Path, copy: Path, mutation: Mutation) -> None:
    """Make a copy what it was before a mutation."""
    for name in mutation.changes:
        top = name.split("/")[0]
        if "/" in name and not (reference / top).exists():
            shutil.rmtree(copy / top, ignore_errors=True)
        elif not (reference / name).exists():
            place(copy / name, None)
        else:
            place(copy / name, (reference / name).read_bytes())


def _look_at_all(
    reference: Path,
    copy: Path,
    drawn: Sequence[Mutation],
    look: Callable[[Path], dict[str, str]],
    answers: Path,
    seconds: int,
) -> None:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY_BYTES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(reference, copy)
        with answers.open("a") as file:
            for mutation in drawn:
                # A new file each time: what a child before left in a memory map must not change under it.
                for name, content in mutation.changes.items():
                    place(copy / name, content)
                signal.alarm(seconds)
                found = look(copy)
                signal.alarm(0)
                file.write(json.dumps(found) + "\n")
                file.flush()
                restore(reference, copy, mutation)
    finally:
        os._exit(0)
