"""Exports are whole, clean for the engines they are meant for, and take no place but their own."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from eagle_offline import stages
from eagle_offline.config import ExportSettings
from eagle_offline.draft.files import write_draft
from eagle_offline.draft.origin import read_origin
from eagle_offline.errors import MismatchError, UsageError
from eagle_offline.serving import export as exporting
from eagle_offline.serving.check import check_draft
from eagle_offline.serving.drafts import ServedDraft, read_draft
from eagle_offline.serving.export import export_draft
from tests.serving.directories import (
    FLAT_KINDS,
    HIDDEN_SIZE,
    KINDS,
    PLAIN,
    Kind,
    flat,
    make_model,
    make_origin,
)

# By kind and layout: engines that must serve it as it was trained. Everything else must not look clean.
CLEAN = {
    "plain": {"flat": {"vllm", "sglang", "eagle"}, "speculators": {"vllm", "speculators"}},
    "eagle31": {"flat": {"vllm", "sglang"}, "speculators": {"vllm", "speculators"}},
    "two_layers": {"flat": {"vllm", "sglang"}, "speculators": {"vllm", "speculators"}},
    "full_vocabulary": {"flat": {"vllm", "sglang", "eagle"}, "speculators": {"vllm", "speculators"}},
    "trained_embeddings": {"flat": {"vllm", "eagle"}, "speculators": {"vllm", "speculators"}},
    "four_aux_layers": {"flat": {"vllm", "sglang"}, "speculators": {"vllm", "speculators"}},
    "llama3_rope": {"flat": {"vllm", "sglang"}, "speculators": {"vllm", "speculators"}},
    "linear_rope": {"flat": {"vllm", "sglang", "eagle"}, "speculators": {"vllm", "speculators"}},
    "qwen3": {"flat": {"vllm"}, "speculators": {"vllm", "speculators"}},
    "qwen3_two_layers_31": {"flat": {"vllm"}, "speculators": {"vllm", "speculators"}},
    "narrow": {"flat": {"vllm", "sglang", "eagle"}},
    "narrow_qwen3": {"flat": {"vllm"}},
    "peagle": {"flat": {"vllm"}, "speculators": {"vllm", "speculators"}},
    "peagle_four_layers": {"flat": {"vllm"}, "speculators": {"vllm", "speculators"}},
    "peagle_qwen3": {"flat": {"vllm"}, "speculators": {"vllm", "speculators"}},
    "peagle_narrow": {"flat": {"vllm"}},
    "peagle_normed": {"flat": {"vllm"}},
}
CASES = [(kind, layout) for kind, layouts in CLEAN.items() for layout in layouts]


def trained(tmp_path: Path, kind: Kind = PLAIN, **origin) -> ServedDraft:
    directory = tmp_path / "checkpoint"
    directory.mkdir(parents=True, exist_ok=True)
    write_draft(directory, make_model(kind), torch.tensor(kind.selected), make_origin(kind, **origin))
    return read_draft(directory)


def export(draft: ServedDraft, output_dir: Path, layout: str = "flat", **changes):
    given = {"target_name": "org/target", "target_architectures": ["LlamaForCausalLM"], "num_draft_tokens": 3}
    return export_draft(draft, layout, output_dir, **{**given, **changes})


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_an_export_is_clean_for_its_engines_and_no_others(tmp_path, kind, layout):
    result = export(trained(tmp_path, FLAT_KINDS[kind]), tmp_path / "out", layout)
    report = check_draft(tmp_path / "out")
    assert {engine for engine in result["engines"] if report.is_clean(engine)} == CLEAN[kind][layout]
    assert set(report.claimed) == CLEAN[kind][layout]
    assert report.is_clean_as_claimed
    assert result["engines"] == report.to_json()["engines"]


@pytest.mark.parametrize(("kind", "layout"), CASES)
def test_an_export_is_read_back_bit_for_bit(tmp_path, kind, layout):
    made = FLAT_KINDS[kind]
    draft = trained(tmp_path, made)
    export(draft, tmp_path / "out", layout, dtype="fp32")
    back = read_draft(tmp_path / "out")
    assert (back.layout, back.aux_layer_ids, back.origin) == (layout, draft.aux_layer_ids, draft.origin)
    assert torch.equal(back.selected_token_ids, draft.selected_token_ids)
    own = made.embeddings_trained or made.target_hidden_size != HIDDEN_SIZE
    assert back.has_embeddings == (own or layout == "speculators")
    for name, tensor in draft.model.state_dict().items():
        if name != "embed_tokens.weight" or back.has_embeddings:
            assert torch.equal(back.model.state_dict()[name], tensor), name
    names = ("rope_parameters", "rms_norm_eps", "head_dim", "hidden_act", "fc_norm", "norm_output", "layer_style",
             "parallel_drafting", "mask_token_id")  # fmt: skip
    for name in (*names, "target_hidden_size"):
        theirs, ours = getattr(draft.model.config, name), getattr(back.model.config, name)
        if name == "rope_parameters":
            ours = {key: value for key, value in ours.items() if key != "type"}
        assert ours == theirs, name


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_are_rounded_once_to_the_dtype_asked_for(tmp_path, dtype, expected):
    draft = trained(tmp_path)
    export(draft, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["fc.weight"], draft.model.fc.weight.to(expected))
    assert stored["d2t"].dtype == torch.int64


def test_an_export_holds_its_four_files_and_nothing_beside(tmp_path):
    export(trained(tmp_path), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "origin.json", "README.md"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "checkpoint"}
    assert read_origin(tmp_path / "out") == make_origin()


def test_a_former_export_is_replaced_and_anything_else_is_left_alone(tmp_path):
    draft = trained(tmp_path)
    export(draft, tmp_path / "out", dtype="fp32")
    export(draft, tmp_path / "out", "speculators")
    assert read_draft(tmp_path / "out").layout == "speculators"
    (tmp_path / "out" / "notes.txt").write_text("mine")
    foreign = flat().write(tmp_path / "foreign")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for place in (tmp_path / "out", foreign, tmp_path / "checkpoint"):
        with pytest.raises(MismatchError, match="choose another --output-dir"):
            export(draft, place)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_place_where_no_directory_can_be_is_a_usage_error_with_a_way_out(tmp_path):
    draft = trained(tmp_path)
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("x")
    link.symlink_to(tmp_path / "checkpoint")
    for place in (file, link, file / "below", file / "far" / "below", tmp_path / ("n" * 250), tmp_path / ("n" * 300)):
        with pytest.raises(UsageError, match="choose another") as raised:
            export(draft, place)
        assert "--output-dir" in str(raised.value)
        assert "\n" not in str(raised.value)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint", "file", "link"}


def test_a_kill_between_the_renames_loses_nothing_and_the_next_export_cleans_up(tmp_path, monkeypatch):
    draft = trained(tmp_path)
    export(draft, tmp_path / "out")
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from tests.serving.test_export import export, read_draft\n"
        "rename = os.rename\n"
        "def die(*names):\n"
        "    rename(*names)\n"
        "    os._exit(9)\n"
        "os.rename = die\n"
        "export(read_draft(Path(sys.argv[1])), Path(sys.argv[2]), 'speculators')\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    assert subprocess.run(arguments, cwd=Path(__file__).parents[2], check=False).returncode == 9
    left = [path for path in tmp_path.iterdir() if path.name != "checkpoint"]
    assert sorted(read_draft(path).layout for path in left) == ["flat", "speculators"]
    # As long as nothing is in place, both stay.
    with monkeypatch.context() as patched:
        patched.setattr(exporting, "model_card", fail)
        with pytest.raises(RuntimeError):
            export(draft, tmp_path / "out")
    assert {path for path in tmp_path.iterdir() if path.name != "checkpoint"} == set(left)
    mine = tmp_path / f".out.partial-{socket.gethostname()}-{os.getpid()}-0"
    other = tmp_path / left[0].name.replace(".out.", ".other.")
    foreign = tmp_path / ".out.partial-elsewhere-1-0"
    for path in (mine, other, foreign):
        path.mkdir()
    export(read_draft(tmp_path / "checkpoint"), tmp_path / "out")
    assert set(tmp_path.iterdir()) == {tmp_path / "checkpoint", tmp_path / "out", mine, other, foreign}


def fail(*_):
    raise RuntimeError("no card")


def test_an_export_that_fails_leaves_the_former_one(tmp_path, monkeypatch):
    draft = trained(tmp_path)
    export(draft, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(exporting, "model_card", fail)
    with pytest.raises(RuntimeError):
        export(draft, tmp_path / "out", "speculators")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"out", "checkpoint"}


def test_a_draft_of_another_make_can_be_exported(tmp_path):
    draft = read_draft(flat().write(tmp_path / "foreign"))
    result = export(draft, tmp_path / "out", "speculators", dtype="fp32")
    assert [found["rule"] for found in result["engines"]["speculators"]["problems"]] == ["embeddings-written"]
    assert not (tmp_path / "out" / "origin.json").exists()
    assert torch.equal(read_draft(tmp_path / "out").model.fc.weight, make_model().fc.weight)


def test_a_draft_of_another_width_is_exported_flat_with_its_embeddings(tmp_path):
    draft = trained(tmp_path, Kind(target_hidden_size=24))
    assert export(draft, tmp_path / "out")["embeddings"]
    report = check_draft(tmp_path / "out")
    assert set(report.claimed) == {"vllm", "sglang", "eagle"}
    assert report.is_clean_as_claimed
    with pytest.raises(MismatchError, match="--to flat"):
        export(draft, tmp_path / "nested", "speculators")


@pytest.mark.parametrize("kind", ["peagle_normed", "peagle_narrow"])
def test_a_p_eagle_draft_that_no_speculators_config_holds_is_exported_flat_alone(tmp_path, kind, capsys):
    draft = trained(tmp_path, FLAT_KINDS[kind])
    with pytest.raises(MismatchError, match=r"fits no speculators directory: .*: export it with --to flat$"):
        export(draft, tmp_path / "out", "speculators")
    settings = ExportSettings(run=tmp_path / "checkpoint", target="org/target", output_dir=tmp_path / "both")
    assert list(stages.export(settings)) == ["flat"]
    assert {path.name for path in (tmp_path / "both").iterdir()} == {"flat"}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: no speculators directory: its ")


def test_as_many_tokens_are_drafted_as_a_p_eagle_draft_was_trained_for(tmp_path, capsys):
    """By default no more than five either."""

    def served(tokens: int | None, **depths: int | None) -> int:
        drafts = {
            name: trained(tmp_path / name)
            if number is None
            else trained(tmp_path / name, FLAT_KINDS["peagle"], num_depths=number)
            for name, number in depths.items()
        }
        return stages.tokens_to_draft(drafts, tokens)

    assert served(None, chain=None) == served(None, deep=8) == served(None, chain=None, deep=8) == 5
    assert served(None, chain=None, deep=8, flat=3) == 3
    assert served(4, deep=4) == 4
    assert capsys.readouterr().err == ""
    assert served(6, chain=None, deep=8, flat=4) == 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "flat was trained to draft 4 tokens a round; those behind them in --num-draft-tokens 6 are hardly" in line
    settings = ExportSettings(run=tmp_path / "flat" / "checkpoint", target="org/target", to="flat")
    stages.export(settings)
    assert '"num_speculative_tokens": 4' in (tmp_path / "flat/checkpoint/export/flat/README.md").read_text()


def test_what_cannot_be_exported_is_refused_before_anything_is_written(tmp_path):
    draft = trained(tmp_path)
    made = flat()
    del made.config["eagle_config"], made.config["eagle_aux_hidden_state_layer_ids"]
    with pytest.raises(MismatchError, match="does not say which target layers"):
        export(read_draft(made.write(tmp_path / "foreign")), tmp_path / "out")
    for changes in ({"dtype": "int8"}, {"num_draft_tokens": 0}, {"layout": "other"}):
        with pytest.raises(UsageError):
            export(draft, tmp_path / "out", **changes)
    with torch.no_grad():
        draft.model.norm.weight[0] = 1e6
    with pytest.raises(MismatchError, match="holds NaN or infinity as fp16"):
        export(draft, tmp_path / "out", dtype="fp16")
    assert not (tmp_path / "out").exists()


def test_the_card_names_source_metrics_and_commands(tmp_path):
    export(trained(tmp_path), tmp_path / "my-draft", num_draft_tokens=4)
    card = (tmp_path / "my-draft" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "org/target"
    assert "speculative-decoding" in front["tags"]
    assert "library_name" not in front
    for said in ("d" * 32, "c" * 32, "chat.jsonl", "0.9700", "2.5000", "[1, 3, 4]", "[2, 4, 5]"):
        assert said in card, said
    speculative = json.loads(card.split("--speculative-config '")[1].split("'")[0])
    assert speculative == {"method": "eagle3", "model": "my-draft", "num_speculative_tokens": 4}
    assert (
        "python -m sglang.launch_server --model-path org/target --speculative-algorithm EAGLE3 "
        "--speculative-draft-model-path my-draft --speculative-num-steps 4 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 5"
    ) in card


@pytest.mark.parametrize("layout", ["flat", "speculators"])
def test_the_card_of_a_p_eagle_draft_serves_it_in_parallel(tmp_path, layout):
    export(trained(tmp_path, KINDS["peagle"]), tmp_path / "my-draft", layout, num_draft_tokens=4)
    card = (tmp_path / "my-draft" / "README.md").read_text()
    assert "A P-EAGLE draft model for" in card
    assert "p-eagle" in yaml.safe_load(card.split("---")[1])["tags"]
    speculative = json.loads(card.split("--speculative-config '")[1].split("'")[0])
    assert speculative == {
        "method": "eagle3", "model": "my-draft", "num_speculative_tokens": 4, "parallel_drafting": True,
    }  # fmt: skip
    assert "sglang.launch_server" not in card
    for said in ("| token that stands for one not known | 5 |", "| objective | peagle, 4 depths |"):
        assert said in card


def test_the_card_gives_no_command_for_an_engine_that_would_not_serve_it(tmp_path):
    export(trained(tmp_path, KINDS["trained_embeddings"]), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vllm serve" in card
    assert "sglang.launch_server" not in card
    assert "SGLang: not with this directory: the target's embeddings take the place of trained ones." in card


def test_an_empty_directory_may_be_filled(tmp_path):
    (tmp_path / "out").mkdir()
    export(trained(tmp_path), tmp_path / "out")
    shutil.rmtree(tmp_path / "checkpoint")
    assert read_draft(tmp_path / "out").layout == "flat"
