"""Targets found on a disk or in the hub's cache: what is fetched for what, and one line for what is no target."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from eagle_offline.errors import DataError, EagleOfflineError, MismatchError, UsageError
from eagle_offline.target.hooks import HFEagle3TargetModel
from eagle_offline.target.load import load_config, load_model, resolve_target
from eagle_offline.target.positions import PositionLimits, rotary_reach
from tests import builders
from tests.target.architectures import ARCHITECTURES, LONGROPE, REFUSED

COMMIT = "0123456789abcdef0123456789abcdef01234567"
WEIGHTS = "model.safetensors"


def change_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, Path], None]:
    """Put a directory where the hub's client keeps what it has fetched; nothing else can be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def keep(name: str, directory: Path) -> None:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        shutil.copytree(directory, repository / "snapshots" / COMMIT)

    return keep


def test_a_hub_target_is_its_commit(hub: Callable[[str, Path], None], tmp_path: Path) -> None:
    hub("owner/tiny", ARCHITECTURES["Llama"].save(tmp_path / "saved"))
    source = resolve_target("owner/tiny")
    assert (source.id, source.revision) == ("owner/tiny", COMMIT)
    assert resolve_target("owner/tiny", COMMIT[:40]).directory == source.directory
    assert load_model(source, "cpu", None).config.vocab_size == 96
    for name, revision in (("owner/other", None), ("owner/tiny", "no-such-branch")):
        with pytest.raises(UsageError, match=f"--target-model {name}.*the hub does not give it"):
            resolve_target(name, revision)


class Hub(ThreadingHTTPServer):
    """What the hub's client asks of the hub, for one repository; `asked` are the files that it was given."""

    def __init__(self, repository: Path):
        self.repository, self.asked = repository, list[str]()
        super().__init__(("127.0.0.1", 0), HubRequest)


class HubRequest(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_content=False)

    def do_GET(self) -> None:
        self.answer(with_content=True)

    def answer(self, *, with_content: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith("/api/models/owner/tiny"):
            files = [path.relative_to(self.server.repository) for path in self.server.repository.rglob("*.*")]
            listed = {"id": "owner/tiny", "sha": COMMIT, "siblings": [{"rfilename": str(file)} for file in files]}
            tree = [{"type": "file", "path": str(file), "size": 1, "oid": COMMIT} for file in files]
            content = json.dumps(tree if "/tree/" in path else listed).encode()
        elif path.startswith(f"/owner/tiny/resolve/{COMMIT}/"):
            name = path.removeprefix(f"/owner/tiny/resolve/{COMMIT}/")
            content = (self.server.repository / name).read_bytes()
            if with_content:
                self.server.asked.append(name)
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(path.encode()).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_content:
            self.wfile.write(content)


RESOLVE = """
from eagle_offline.target.load import resolve_target
for weights in (False, True):
    source = resolve_target("owner/tiny", weights=weights)
    print(source.revision, len(list(source.directory.glob("*.safetensors"))))
"""


def test_weights_are_fetched_once_they_are_needed_and_in_one_form_only(tmp_path: Path) -> None:
    repository = ARCHITECTURES["Llama"].save(tmp_path / "repository")
    for copy in ("original/model.safetensors", "consolidated.safetensors", "pytorch_model.bin", "model.gguf"):
        (repository / copy).parent.mkdir(exist_ok=True)
        (repository / copy).write_bytes(b"the same again")
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    with Hub(repository) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{hub.server_port}"
        command = [sys.executable, "-c", RESOLVE]
        ended = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, check=True, timeout=120
        )
        hub.shutdown()
    assert ended.stdout.splitlines() == [f"{COMMIT} 0", f"{COMMIT} 1"]
    assert set(hub.asked) == {"config.json", "generation_config.json", WEIGHTS}


def drop_a_shard(directory: Path) -> None:
    tensors = load_file(directory / WEIGHTS)
    halves = [dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])]
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index = {name: file for half, file in zip(halves, names, strict=True) for name in half}
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    torch.save(halves[0], directory / names[0])
    (directory / WEIGHTS).unlink()


def only_gguf(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "model-Q4_K_M.gguf").write_bytes(b"GGUF")


def code_of_its_own(directory: Path) -> None:
    change_config(directory, model_type="own_kind", auto_map={"AutoConfig": "configuration_own.OwnConfig"})


def another_shape(directory: Path) -> None:
    change_config(directory, hidden_size=64)


SPOILED: dict[str, tuple[Callable[[Path], Any], type[EagleOfflineError], str]] = {
    "unknown model type": (lambda d: change_config(d, model_type="own_kind"), DataError, "'own_kind' is not known to"),
    "code of its own": (code_of_its_own, UsageError, "--trust-remote-code"),
    "GGUF and a config": (only_gguf, DataError, "no weights here.*GGUF files are not read"),
    "GGUF alone": (lambda d: [only_gguf(d), (d / "config.json").unlink()], DataError, "no config.json.*GGUF"),
    "a .bin shard is missing": (drop_a_shard, DataError, "cannot be loaded.*00002-of-00002"),
    "another shape": (another_shape, DataError, "cannot be loaded"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_is_no_target_costs_one_line(name: str, tmp_path: Path) -> None:
    spoil, kind, message = SPOILED[name]
    directory = ARCHITECTURES["Llama"].save(tmp_path / "target")
    spoil(directory)
    with pytest.raises(kind, match=message) as caught:
        load_model(resolve_target(str(directory)), "cpu", None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "code"), [("code of its own", 2), ("a .bin shard is missing", 4)])
def test_the_command_line_says_it_and_exits(name: str, code: int, tmp_path: Path) -> None:
    target = shutil.copytree(builders.shared_target(), tmp_path / "target")
    SPOILED[name][0](target)
    ended = builders.precompute(tmp_path / "cache", target)
    assert ended.code == code, ended.err
    assert ended.errors[-1].startswith("error: ")
    assert "Traceback" not in ended.err


@pytest.mark.parametrize("name", ["encoder", "reads both ways"])
def test_the_command_line_refuses_what_is_no_causal_decoder(name: str, tmp_path: Path) -> None:
    architecture, reason = REFUSED[name]
    target = replace(architecture, changes={**architecture.changes, "vocab_size": builders.VOCAB_SIZE}).save(
        tmp_path / "target"
    )
    builders.make_tokenizer().save_pretrained(target)
    ended = builders.run_cli(
        *builders.precompute_arguments(tmp_path / "cache", target), "--aux-layer-ids", "0", "1", "2"
    )
    assert ended.code == MismatchError.exit_code, ended.err
    assert reason in ended.errors[-1]


def test_rows_longer_than_learned_positions_are_refused_before_any_is_run(tmp_path: Path) -> None:
    limits = HFEagle3TargetModel(ARCHITECTURES["GPT2"].make(), [0, 1, 2]).position_limits
    assert limits == PositionLimits(longest_row=64)
    limits.check(64)
    with pytest.raises(UsageError, match=r"rows of up to 65 tokens.*reach 64: pass --seq-length 64"):
        limits.check(65)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", PositionLimits()),
        ("OPT", PositionLimits(longest_row=64)),
        ("GPTJ", PositionLimits(longest_row=64)),
        ("GPTBigCode", PositionLimits(longest_row=64)),
        ("Bloom", PositionLimits()),
        ("Falcon alibi", PositionLimits()),
        ("Gemma3 text", PositionLimits()),
        ("Phi3 longrope", PositionLimits(frequency_switch=LONGROPE["original_max_position_embeddings"])),
    ],
)
def test_how_far_positions_reach(name: str, expected: PositionLimits) -> None:
    assert HFEagle3TargetModel(ARCHITECTURES[name].make(), [0, 1, 2]).position_limits == expected


def test_frequencies_that_change_with_every_length_bound_the_rows() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = replace(ARCHITECTURES["Llama"], changes={"rope_parameters": rope}).make()
    assert HFEagle3TargetModel(model, [0, 1, 2]).position_limits == PositionLimits(longest_row=64)


def test_rows_on_either_side_of_a_switch_of_frequencies_keep_their_order() -> None:
    target = HFEagle3TargetModel(ARCHITECTURES["Phi3 longrope"].make(), [0, 2, 4])
    lengths = [9, 41, 20, 21]
    batch = torch.zeros(4, 41, dtype=torch.int64)
    for row, length in enumerate(lengths):
        batch[row, :length] = torch.arange(3 + row, 3 + row + length)
    layers, last = target.capture(batch, lengths)
    for row, length in enumerate(lengths):
        alone, alone_last = target.capture(batch[row : row + 1, :length])
        torch.testing.assert_close(last[row, :length], alone_last[0], rtol=1e-4, atol=1e-4)
        for one, many in zip(alone, layers, strict=True):
            torch.testing.assert_close(many[row, :length], one[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(target.capture(batch)[1][0, :9], last[0, :9], atol=1e-2)


def test_a_config_is_read_without_any_weight(tmp_path: Path) -> None:
    directory = ARCHITECTURES["Llama"].save(tmp_path)
    (directory / WEIGHTS).unlink()
    assert load_config(resolve_target(str(directory))).vocab_size == 96


def test_a_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    directory = ARCHITECTURES["Llama"].save(tmp_path)
    tensors = load_file(directory / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(DataError, match=r"1 weights are missing.*model\.norm\.weight"):
        load_model(resolve_target(str(directory)), "cpu", None)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 64),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}, 256),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
             "original_max_position_embeddings": 20}},
            80,
        ),
    ],
)  # fmt: skip
def test_what_rotary_positions_were_made_for(changes: dict[str, Any], expected: int) -> None:
    known = ARCHITECTURES["Llama"]
    assert rotary_reach(replace(known, changes={**known.changes, **changes}).config()) == expected


@pytest.mark.parametrize("name", ["GPT2", "Bloom", "Falcon alibi", "Mamba"])
def test_what_has_no_rotary_positions_has_no_reach(name: str) -> None:
    assert rotary_reach(ARCHITECTURES[name].config()) is None


def test_rows_beyond_the_trained_positions_are_said_once(tmp_path: Path) -> None:
    target = builders.save_target(tmp_path / "target", max_position_embeddings=48)
    long = builders.precompute(tmp_path / "long", target, dry_run=True)
    assert long.code == 0, long.err
    (line,) = [line for line in long.err.splitlines() if "positions were made for" in line]
    assert re.search(r"rows of up to \d+ tokens, .* made for 48: .*--seq-length 48", line)
    short = builders.precompute(tmp_path / "short", target, dry_run=True, seq_length=48)
    assert short.code == 0, short.err
    assert "positions were made for" not in short.err
