"""Training needs the cache and nothing else: no target, no tokenizer, no hub, no network."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.builders import make_cache, run_cli, save_target, shared_chat

# Whatever loads a target, reads text or talks to anyone raises; then the command line runs as ever.
GUARDED = """
import importlib.abc, socket, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("eagle_offline.target", "eagle_offline.text", "eagle_offline.precompute")):
            raise AssertionError(f"training imported {name}")

def refuse(what):
    def raising(*_, **__):
        raise AssertionError(f"training called {what}")
    return raising

sys.meta_path.insert(0, Refuse())
socket.socket.connect = refuse("socket.connect")
socket.socket.connect_ex = refuse("socket.connect_ex")
socket.create_connection = refuse("socket.create_connection")
socket.getaddrinfo = refuse("socket.getaddrinfo")
import huggingface_hub, transformers
for name in ("hf_hub_download", "snapshot_download"):
    setattr(huggingface_hub, name, refuse(name))
for name in ("AutoModelForCausalLM", "AutoModel", "AutoTokenizer", "AutoConfig"):
    getattr(transformers, name).from_pretrained = refuse(name)
transformers.PreTrainedModel.from_pretrained = refuse("PreTrainedModel.from_pretrained")
transformers.PreTrainedTokenizerFast.from_pretrained = refuse("PreTrainedTokenizerFast.from_pretrained")
if sys.argv[1] == "--try":
    exec(sys.argv[2])
else:
    from eagle_offline.cli import main
    main(sys.argv[1:])
"""


def guarded(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARDED, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )


def test_training_succeeds_where_loading_the_target_raises_and_the_target_is_gone(tmp_path):
    target = save_target(tmp_path / "target")
    cache = make_cache(tmp_path / "cache", target=target, data=shared_chat(16))
    shutil.rmtree(target)
    ended = guarded(
        "train", "--cache", cache, "--output-dir", tmp_path / "run", "--heldout-share", 0.2, "--ttt-steps", 2,
        "--num-epochs", 1, "--tokens-per-batch", 300,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["steps"] > 1
    assert (tmp_path / "run" / "latest").is_file()
    # Nor does what it wrote say where the target was.
    for path in (tmp_path / "run").rglob("*.json*"):
        assert str(target) not in path.read_text(), path


def test_the_guard_does_raise():
    """The test above would pass with a guard that stops nothing."""
    attempts = (
        "import eagle_offline.target.load",
        "import eagle_offline.text.sources",
        "from eagle_offline import HFEagle3TargetModel",
        "import transformers; transformers.AutoModelForCausalLM.from_pretrained('x')",
        "import transformers; transformers.AutoTokenizer.from_pretrained('x')",
        "import huggingface_hub; huggingface_hub.snapshot_download('x/y')",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    )
    code = "\n".join(f"try:\n    {attempt}\nexcept AssertionError:\n    print('refused')" for attempt in attempts)
    ended = guarded("--try", code)
    assert ended.stdout.split() == ["refused"] * len(attempts), ended.stderr


def test_the_cache_alone_is_needed(tmp_path):
    """Not even the corpus: the tokens of the cache may be gone."""
    cache = make_cache(tmp_path / "cache", data=shared_chat(16))
    shutil.rmtree(cache / "tokens")
    ended = run_cli(
        "train", "--cache", cache, "--output-dir", tmp_path / "run", "--heldout-share", 0.2, "--max-steps", 1
    )
    assert ended.code == 0, ended.err
