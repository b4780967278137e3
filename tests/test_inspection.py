"""What `inspect-manifest` says of a cache is what its files hold, and a stranger's cache cannot act on who reads it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pytest
import torch
from tokenizers import Tokenizer

from eagle_offline import open_cache
from eagle_offline.cache.manifest import read_manifest
from eagle_offline.cache.writer import ensure_index
from eagle_offline.cli import main
from eagle_offline.inspection import describe_cache
from eagle_offline.inspection_page import render_text
from tests import builders
from tests.cache.mutations import resealed
from tests.test_imports import HEAVY, command, loaded_after

SCHEMA = Path(__file__).parent.parent / "schemas" / "inspection.schema.json"
WIZARD = {"messages": [{"role": "wizard", "content": "?"}, {"role": "assistant", "content": "!"}]}
NUM_LAYERS, HIDDEN_SIZE = builders.NUM_LAYERS, builders.HIDDEN_SIZE


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


def inspected(cache: Path, *flags: object, code: int = 0) -> dict[str, Any]:
    """What `--json` prints: it ends with the code, is ASCII, strict JSON, and follows the schema."""
    ended = builders.run_cli("inspect-manifest", cache, "--json", *flags)
    assert ended.code == code, ended.err
    assert ended.out.isascii()
    said = json.loads(ended.out, parse_constant=refuse)
    jsonschema.validate(said, json.loads(SCHEMA.read_text()))
    return said


def page(cache: Path, *flags: object, code: int = 0) -> str:
    ended = builders.run_cli("inspect-manifest", cache, *flags)
    assert ended.code == code, ended.err
    return ended.out


def line(shown: str, name: str) -> str:
    """The value of a line of the page."""
    return next(row[len(name) :].strip() for row in shown.splitlines() if row.startswith(name))


def rows_of_shards(cache: Path) -> Iterator[dict[str, Any]]:
    """Every stored sample, in cache order, by pyarrow alone; one a row of a batch of a shard."""
    for name in sorted(path.name for path in cache.glob("shard-*.arrow")):
        for batch in pa.ipc.open_file(pa.memory_map(str(cache / name))).read_all().to_batches():
            yield from batch.to_pylist()


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [*builders.conversations(10), "{broken", {"messages": []}, WIZARD, WIZARD]
    return builders.write_jsonl(tmp_path_factory.mktemp("chat") / "chat.jsonl", rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, chat: Path) -> Path:
    return builders.make_cache(tmp_path_factory.mktemp("inspected") / "cache", None, chat)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def drop_index(cache: Path) -> None:
    for path in cache.glob("index-*"):
        path.unlink()


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_bytes())
    change(document)
    path.write_text(json.dumps(resealed(document)))


def edit_identity(cache: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest as its author could have: records and seals follow."""
    edit(cache / "manifest.json", change)
    digest = read_manifest(cache).identity.digest
    for record in cache.glob("commit-*.json"):
        edit(record, lambda document: document.update(identity_digest=digest))
    drop_index(cache)


def test_counts_are_those_of_the_shards(whole: Path) -> None:
    said, rows = inspected(whole), list(rows_of_shards(whole))
    assert said["samples"] == len(rows) == 10
    assert said["tokens"] == sum(len(row["input_ids"]) for row in rows)
    assert said["supervised_tokens"] == sum(sum(row["loss_mask"]) for row in rows)
    assert said["target_positions"] == sum(len(row["target_argmax"]) for row in rows)
    assert said["complete"] is True
    assert said["shards"] == {"total": 3, "committed": 3, "missing_ranges": []}
    assert said["last_runs"] == [{"file": "status.json", "state": "done", "exit_code": 0, "why": ""}]
    shown = page(whole)
    assert line(shown, "samples") == "10 of 10"
    assert line(shown, "supervised tokens").endswith(f"{said['supervised_tokens'] / said['tokens']:.1%}")


def test_lengths_are_those_of_the_shards(whole: Path) -> None:
    said, rows = inspected(whole), list(rows_of_shards(whole))
    lengths = [len(row["input_ids"]) for row in rows]
    bars = said["length_histogram"]
    for bar in bars:
        assert bar["samples"] == sum(bar["from"] <= length <= bar["to"] for length in lengths)
    assert sum(bar["samples"] for bar in bars) == len(rows)
    supervised = [sum(row["loss_mask"]) for row in rows]
    ends = {"longest": (lengths, max), "shortest": (lengths, min), "most_supervised": (supervised, max)}
    for name, (values, end) in {**ends, "least_supervised": (supervised, min)}.items():
        index = values.index(end(values))
        row = rows[index]
        assert said["extremes"][name] == {
            "index": index, "sample_id": row["sample_id"], "num_tokens": lengths[index],
            "num_supervised": supervised[index],
        }  # fmt: skip


def test_sizes_are_those_of_the_files(whole: Path) -> None:
    said = inspected(whole)
    shards = sum(len(content) for content in builders.shard_bytes(whole).values())
    assert said["shard_bytes"] == shards
    assert said["bytes_per_token"] == shards / said["tokens"]
    raw = 2 * NUM_LAYERS * HIDDEN_SIZE * said["tokens"]
    assert (said["raw_states_bytes"], said["share_of_raw_states"]) == (raw, shards / raw)
    parts = {part["name"]: part["num_bytes"] for part in said["parts"]}
    on_disk = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file())
    assert sum(parts.values()) == on_disk
    assert sum(part["share"] for part in said["parts"]) == pytest.approx(1)
    assert parts["head"] == (whole / "head.safetensors").stat().st_size
    assert parts["embeddings"] == (whole / "embeddings.safetensors").stat().st_size
    assert parts["tokenised corpus"] == sum(path.stat().st_size for path in (whole / "tokens").iterdir())
    assert parts["tokenizer and configs"] == sum(path.stat().st_size for path in (whole / "target").iterdir())
    rows = list(rows_of_shards(whole))
    for field in ("aux_1", "aux_3", "aux_4", "last_hidden_state"):
        stored = sum(len(value) for row in rows for name, value in row.items() if name.startswith(f"{field}."))
        assert stored <= parts[field] <= stored + 200, "but for Arrow's offsets"
    disk = shutil.disk_usage(whole)
    assert abs(said["free_bytes"] - disk.free) < disk.total / 10
    assert f"{said['share_of_raw_states']:.1%}: bf16, all {NUM_LAYERS} layers" in page(whole)


def test_shares_of_the_draft_vocabulary_are_those_of_what_the_target_said(whole: Path) -> None:
    said, cache = inspected(whole)["draft_vocabulary"], open_cache(whole)
    ids = cache.selected_token_ids
    inside = mass = supervised = tokens = 0.0
    for sample in cache:
        positions = sample.supervision.positions
        of_mask = sample.loss_mask[positions]
        inside += float(torch.isin(sample.supervision.target_argmax, ids)[of_mask].sum())
        logits = cache.head.logits(sample.supervision.last_hidden_state)
        mass += float(logits.double().softmax(-1)[:, ids].sum(-1)[of_mask].sum())
        tokens += float(torch.isin(sample.input_ids, ids)[sample.loss_mask].sum())
        supervised += float(sample.loss_mask.sum())
    assert said["size"] == len(ids) == builders.DRAFT_VOCAB_SIZE
    assert said["argmax_share"] == inside / supervised
    assert said["mass_share"] == pytest.approx(mass / supervised, rel=1e-3)
    assert said["supervised_tokens_share"] == pytest.approx(tokens / supervised)
    assert said["note"] is None
    assert line(page(whole), "  target's choices") == f"{inside / supervised:.2%} in it"


def test_a_share_that_was_never_recorded_is_said_to_be_unknown(copy: Path) -> None:
    for record in copy.glob("commit-*.json"):
        edit(record, lambda r: r["samples"].update({name: [0] * len(r["samples"]["row"]) for name in UNRECORDED}))
    drop_index(copy)
    said = inspected(copy)["draft_vocabulary"]
    assert (said["argmax_share"], said["mass_share"]) == (None, None)
    assert said["note"] in line(page(copy), "  target's probability")
    assert "not known" in line(page(copy), "  target's probability")


UNRECORDED = ("num_in_vocab", "vocab_mass")


def test_identity_is_the_manifests(whole: Path) -> None:
    said, shown = inspected(whole), page(whole)
    manifest = json.loads((whole / "manifest.json").read_bytes())
    manifest.pop("self_digest")
    assert said["manifest"] == manifest
    identity = manifest["identity"]
    for fact in (
        identity["target"]["id"], identity["target"]["architecture"], identity["target"]["checkpoint_digest"],
        identity["text"]["tokenizer_digest"], identity["text"]["template_digest"], said["identity_digest"],
        "1 3 4  (3 of 8", "chat.jsonl (", manifest["environment"]["packages"]["torch"], said["begun_at"],
    ):  # fmt: skip
        assert fact in shown, fact
    assert "converted from" not in shown
    assert "rms error of the last step" not in shown


def test_a_converted_cache_names_the_one_it_was_made_from(copy: Path) -> None:
    origin: dict[str, Any] = {"identity_digest": "ab" * 16, "samples": "0:10"}
    origin["earlier"] = {"identity_digest": "cd" * 16, "samples": None, "earlier": None}
    edit_identity(copy, lambda manifest: manifest["identity"].update(converted_from=origin))
    assert inspected(copy)["manifest"]["identity"]["converted_from"] == origin
    shown = page(copy)
    assert line(shown, "converted from") == f"{'ab' * 16}, 0:10"
    assert f"{'cd' * 16}, all samples" in shown
    assert "rms error of the last step" in shown


ENCODINGS: dict[str, dict[str, Any]] = {
    "exact": {},
    "three bits": {"mantissa_bits": 3},
    "fp8": {"state_encoding": "fp8"},
    "dense": {"target_encoding": "dense"},
    "topk": {"target_encoding": "topk", "top_k": 8},
}


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("encoded")
    return {name: builders.make_cache(place / name.replace(" ", "-"), **flags) for name, flags in ENCODINGS.items()}


def values(cache: Path, field: str) -> torch.Tensor:
    """All values of a field, in float64."""
    parts = []
    for sample in open_cache(cache):
        if field == "aux":
            parts.append(sample.aux_hidden_states[:, :HIDDEN_SIZE])
        else:
            parts.append(getattr(sample.supervision, field))
    return torch.cat([part.flatten() for part in parts]).double()


@pytest.mark.parametrize(
    ("name", "field", "shown_as", "losses"),
    [
        ("exact", "aux", "bf16 planes", []),
        ("exact", "last_hidden_state", "bf16 planes", []),
        ("three bits", "aux", "bf16 planes", ["3 mantissa bits"]),
        ("three bits", "last_hidden_state", "bf16 planes", ["3 mantissa bits"]),
        ("fp8", "aux", "bf16 fp8", ["fp8"]),
        ("dense", "target_probs", "bf16 planes", []),
        ("topk", "target_probs", "bf16 topk", ["top 8"]),
    ],
)
def test_an_encoding_has_its_bits_and_its_error(
    encoded: dict[str, Path], name: str, field: str, shown_as: str, losses: list[str]
) -> None:
    column = "aux_1" if field == "aux" else field
    said = next(found for found in inspected(encoded[name])["fields"] if found["name"] == column)
    decoded = values(encoded[name], field)
    exact = values(encoded["dense" if field == "target_probs" else "exact"], field)
    assert said["values"] == decoded.numel()
    assert said["bits_per_value"] == 8 * said["stored_bytes"] / decoded.numel()
    assert (said["losses"], said["exact"]) == (losses, not losses)
    row = next(row for row in page(encoded[name]).splitlines() if row.startswith(column) and shown_as in row)
    if losses:
        error = math.sqrt(float((decoded - exact).square().sum() / exact.square().sum()))
        assert said["relative_rms_error"] == pytest.approx(error, rel=0.02 if name == "topk" else 1e-4)
        assert f"{said['relative_rms_error']:.2e}" in row
    else:
        assert said["relative_rms_error"] is None
        assert torch.equal(decoded, exact)
        assert row.split()[-2:] == ["0", "nothing"]


def test_what_is_missing_is_said_in_ranges(copy: Path) -> None:
    for shard in (0, 1):
        (copy / f"commit-{shard:06d}.json").unlink()
    (copy / "status.json").write_text(json.dumps({"state": "resumable", "exit_code": 5, "why": "asked to\nstop"}))
    said, shown = inspected(copy), page(copy)
    assert said["complete"] is False
    assert said["shards"] == {"total": 3, "committed": 1, "missing_ranges": [{"first": 0, "last": 1}]}
    assert said["samples"] == 2
    assert line(shown, "shards") == "1 of 3; 2 shards missing: 0–1"
    assert line(shown, "last run") == "resumable (status.json, exit code 5): asked to\\nstop"


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"state": "fine"}', '{"state": "done", "exit_code": "x"}'])
def test_a_status_that_is_none_is_said_to_be_unreadable(copy: Path, content: str) -> None:
    (copy / "status.json").write_text(content)
    (copy / "status-0003.json").write_text('{"state": "done", "exit_code": 0, "why": ""}')
    first, second = inspected(copy)["last_runs"]
    assert (first["file"], first["state"]) == ("status-0003.json", "done")
    assert (second["file"], second["state"]) == ("status.json", "unreadable")
    assert line(page(copy), "last run").startswith("unreadable")


def test_a_cache_with_no_shard_is_described(copy: Path) -> None:
    for pattern in ("commit-*", "shard-*", "index-*"):
        for path in copy.glob(pattern):
            path.unlink()
    said = inspected(copy)
    assert (said["samples"], said["extremes"], said["example"], said["bytes_per_token"]) == (0, None, None, None)
    assert said["draft_vocabulary"]["note"]
    assert "3 shards missing: 0–2" in page(copy)
    ended = builders.run_cli("inspect-manifest", copy, "--sample", 0)
    assert (ended.code, len(ended.errors)) == (2, 1)


def test_the_index_and_the_records_tell_the_same(copy: Path) -> None:
    record = copy / "commit-000001.json"
    edit(record, lambda r: r["lost"].append({"sample_id": 3, "reason": "non-finite states"}))
    drop_index(copy)
    by_records = inspected(copy)
    ensure_index(copy, read_manifest(copy).identity)
    assert list(copy.glob("index-*"))
    record.write_bytes(record.read_bytes()[:-1])  # no longer read
    by_index = inspected(copy)
    vocabulary = [said.pop("draft_vocabulary") for said in (by_records, by_index)]
    assert vocabulary[0]["mass_share"] == pytest.approx(vocabulary[1]["mass_share"])
    for said in (by_records, by_index):
        del said["parts"], said["free_bytes"]
    assert by_index == by_records


def test_rows_left_out_are_counted_and_shown_by_reason(whole: Path) -> None:
    said, shown = inspected(whole)["quarantine"], page(whole)
    listed = [json.loads(row) for row in (whole / "tokens" / "quarantine.jsonl").read_text().splitlines()]
    assert said["rows"] == len(listed) == 4
    assert said["reasons"] == Counter(row["reason"] for row in listed)
    for example in said["examples"]:
        assert example in listed
    assert {example["reason"] for example in said["examples"]} == set(said["reasons"])
    assert "chat.jsonl row 13: turn 1: the role is 'wizard'" in shown
    assert f"{whole}/{said['file']}" in shown


def test_a_cache_that_left_nothing_out_says_so(encoded: dict[str, Path]) -> None:
    said = inspected(encoded["exact"])
    assert said["quarantine"]["rows"] == 0
    assert not said["quarantine"]["reasons"]
    assert said["lost_in_capture"] == {}
    shown = page(encoded["exact"])
    assert "left out of the corpus: 0 rows" in shown
    assert "lost in capture" not in shown


def test_samples_lost_in_capture_name_their_row(copy: Path) -> None:
    table = pa.ipc.open_file(pa.memory_map(str(copy / "tokens" / "tokens.arrow"))).read_all().to_pylist()
    record = copy / "commit-000000.json"
    edit(record, lambda r: r["lost"].extend({"sample_id": i, "reason": "non-finite states"} for i in (7, 8)))
    drop_index(copy)
    said = inspected(copy)
    assert said["lost_in_capture"] == {"non-finite states": 2}
    assert said["lost_examples"] == [
        {"reason": "non-finite states", "file": "chat.jsonl", "row": table[7]["row"], "detail": "sample 7"}
    ]
    assert f"2  non-finite states, such as chat.jsonl row {table[7]['row']}: sample 7" in page(copy)


def test_an_index_of_no_sample_is_read(copy: Path) -> None:
    def lose(record: dict[str, Any]) -> None:
        table = record["samples"]
        record["lost"] = [{"sample_id": number, "reason": "non-finite states"} for number in table["sample_id"]]
        record["samples"] = {name: [] for name in table}

    for record in copy.glob("commit-*.json"):
        edit(record, lose)
    drop_index(copy)
    ensure_index(copy, read_manifest(copy).identity)
    for record in copy.glob("commit-*.json"):
        record.write_text("{}")  # no longer read
    said = inspected(copy)
    assert (said["samples"], said["example"], said["complete"]) == (0, None, True)
    assert said["lost_in_capture"] == {"non-finite states": 10}
    assert "not known" in page(copy)


@pytest.mark.parametrize("number", [0, 1, 9])
def test_the_example_is_the_sample_of_the_shard(whole: Path, number: int) -> None:
    said, row = inspected(whole, "--sample", number)["example"], list(rows_of_shards(whole))[number]
    tokenizer = Tokenizer.from_file(str(whole / "target" / "tokenizer.json"))
    assert said["sample"]["index"] == number
    assert (said["sample"]["sample_id"], said["token_ids"]) == (row["sample_id"], row["input_ids"])
    assert (said["loss_mask"], said["first_token"], said["problem"]) == (row["loss_mask"], 0, None)
    assert "".join(said["tokens"]) == tokenizer.decode(row["input_ids"], skip_special_tokens=False)
    supervised = "".join(t for t, m in zip(said["tokens"], said["loss_mask"], strict=True) if m)
    shown = page(whole, "--sample", number)
    body = "\n".join(part[4:] for part in shown.splitlines() if part.startswith("  | "))
    assert "".join(part.split("]]")[0] for part in body.split("[[")[1:]) == supervised
    assert body.replace("[[", "").replace("]]", "") == "".join(said["tokens"])


def test_colour_takes_the_place_of_marks_on_a_terminal_only(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def on_a_terminal(*flags: str) -> str:
        out = Terminal()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
            main(["inspect-manifest", str(whole), *flags])
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = on_a_terminal()
    assert "\x1b[1;32m" in coloured
    assert "[[" not in coloured
    assert all(row.count("\x1b[1;32m") == row.count("\x1b[0m") for row in coloured.splitlines())
    assert "\x1b" not in on_a_terminal("--no-colour")
    assert "\x1b" not in page(whole)
    assert "\x1b[1;32m" in page(whole, "--colour")
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in on_a_terminal()
    assert "[[" in on_a_terminal()


def test_a_character_cut_by_tokens_stays_whole(tmp_path: Path) -> None:
    chat = builders.write_jsonl(
        tmp_path / "chat.jsonl",
        [{"messages": [{"role": "user", "content": "naïve?"}, {"role": "assistant", "content": "日本語 🙂"}]}],
    )
    cache = builders.make_cache(tmp_path / "cache", None, chat)
    example = inspected(cache)["example"]
    assert len(example["tokens"]) == len(example["token_ids"])
    assert "日本語 🙂" in "".join(example["tokens"])
    assert "[[日本語 🙂<|im_end|>]]" in page(cache)


def test_a_long_sample_is_cut_around_its_supervision_and_says_so(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "word " * 100}, {"role": "assistant", "content": "ok\n" * 200}]
    chat = builders.write_jsonl(tmp_path / "chat.jsonl", [{"messages": turns}])
    cache = builders.make_cache(tmp_path / "cache", None, chat, seq_length=1024)
    example, shown = inspected(cache)["example"], page(cache)
    row = next(rows_of_shards(cache))
    first = example["first_token"]
    assert row["loss_mask"].index(1) - 16 == first
    assert example["token_ids"] == row["input_ids"][first : first + 256]
    assert f"… {first:,} tokens before" in shown
    body = [part for part in shown.splitlines() if part.startswith("  | ")]
    assert len(body) <= 60
    ending = next(part for part in shown.splitlines() if part.endswith("tokens after"))
    assert 0 < int(ending.split()[1].replace(",", "")) < len(row["input_ids"])


@pytest.mark.parametrize("number", [-1, 10, 10**30])
def test_a_sample_that_is_not_there_is_refused_in_one_line(whole: Path, number: int) -> None:
    ended = builders.run_cli("inspect-manifest", whole, "--sample", number)
    assert (ended.code, len(ended.errors), ended.out) == (2, 1, "")
    assert "0 to 9" in ended.errors[0]


@pytest.mark.parametrize("harm", ["missing", "garbage", "another", "directory"])
def test_without_a_tokenizer_ids_are_shown_and_it_says_why(copy: Path, harm: str) -> None:
    file = copy / "target" / "tokenizer.json"
    size = file.stat().st_size
    file.unlink()
    if harm == "garbage":
        file.write_bytes(b"{" * size)
    elif harm == "another":
        file.write_text(json.dumps({"version": "1.0", "model": {"type": "BPE"}}).ljust(size))
    elif harm == "directory":
        file.mkdir()
    code = 0 if harm in ("garbage", "another") else 4
    said, shown = inspected(copy, code=code), page(copy, code=code)
    assert said["example"]["tokens"] is None
    assert "target/tokenizer.json" in said["example"]["problem"]
    assert "not as text: target/tokenizer.json" in shown
    assert " ".join(map(str, said["example"]["token_ids"][:5])) in shown
    if code:
        assert any("target/tokenizer.json" in problem for problem in said["problems"])
        assert "PROBLEMS (1)" in shown


@pytest.mark.parametrize("name", ["tokens.arrow", "tokens.json"])
@pytest.mark.parametrize("content", [b"", b"{}", b"ARROW1\0\0"])
def test_a_token_table_that_is_none_leaves_the_page(copy: Path, name: str, content: bytes) -> None:
    (copy / "tokens" / name).write_bytes(content)
    said, shown = inspected(copy, code=4), page(copy, code=4)
    assert said["example"]["tokens"] is None
    assert "tokens/tokens.arrow cannot be read" in said["example"]["problem"]
    assert f"tokens/{name}" in shown


def test_a_token_table_of_another_corpus_is_not_shown_as_the_sample(copy: Path) -> None:
    edit(copy / "commit-000000.json", lambda r: r["samples"]["num_supervised"].__setitem__(0, 1))
    drop_index(copy)
    assert "holds another sample" in inspected(copy, "--sample", 0)["example"]["problem"]


def test_what_is_missing_or_of_another_size_is_a_problem(copy: Path) -> None:
    shard = next(copy.glob("shard-000001-*"))
    shard.write_bytes(shard.read_bytes() + b"x")
    next(copy.glob("shard-000002-*")).unlink()
    (copy / "head.safetensors").unlink()
    (copy / "commit-000000.json").write_text("{}")
    problems = inspected(copy, code=4)["problems"]
    assert len(problems) == 4
    for part in ("commit-000000.json", "head.safetensors: missing", "expected", "shard-000002"):
        assert any(part in problem for problem in problems), part
    assert "PROBLEMS (4)" in page(copy, code=4)


def test_a_record_of_another_manifest_does_not_count(copy: Path) -> None:
    edit(copy / "commit-000000.json", lambda r: r.update(identity_digest="0" * 32))
    drop_index(copy)
    said = inspected(copy, code=4)
    assert said["shards"]["committed"] == 2
    assert said["problems"] == ["commit-000000.json: was made under another manifest"]


EVIL = "\x1b[2J\x1b]0;x\x07\u202e\x9b31m\ud800\r\n"


def test_nothing_a_strangers_cache_says_reaches_the_terminal_unescaped(copy: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["identity"]["target"].update(id=EVIL, architecture=EVIL, revision=EVIL)
        manifest["identity"]["dataset"]["sources"][0]["name"] = EVIL
        manifest["environment"] = {"device_model": EVIL, "packages": {"torch": EVIL, EVIL: 1}, "nan": math.nan, "x": {}}

    edit_identity(copy, change)
    edit(copy / "commit-000000.json", lambda r: r["lost"].append({"sample_id": 0, "reason": EVIL}))
    edit(copy / "commit-000001.json", lambda r: r["column_bytes"].update({EVIL: 3}))
    (copy / "status.json").write_text(json.dumps({"state": "failed", "exit_code": 1, "why": EVIL}))
    edit(copy / "tokens" / "tokens.json", lambda meta: meta.update(reasons={EVIL: 2}))
    left_out = {"file": EVIL, "row": 1, "reason": EVIL, "detail": EVIL}
    (copy / "tokens" / "quarantine.jsonl").write_text(json.dumps(left_out) + "\n")
    edit(copy / "target" / "tokenizer.json", lambda t: t["added_tokens"][2].update(content=EVIL.replace("\ud800", "")))
    shown = page(copy, code=4)
    assert "\\x1b[2J" in shown
    assert all(character.isprintable() or character == "\n" for character in shown)
    said = inspected(copy, code=4)
    assert said["manifest"]["identity"]["target"]["id"] == EVIL
    assert said["manifest"]["environment"]["nan"] is None
    assert EVIL not in said["column_bytes"]


def test_sizes_that_no_disk_holds_are_bounded(copy: Path) -> None:
    huge = 10**400
    edit(copy / "commit-000000.json", lambda r: r["column_bytes"].update(input_ids=huge, loss_mask=-huge))
    edit(copy / "commit-000001.json", lambda r: r.update(file_bytes=huge))
    edit(copy / "commit-000002.json", lambda r: r["samples"].update(vocab_mass=[1e308] * len(r["samples"]["row"])))
    drop_index(copy)
    inspected(copy, code=4)
    assert max(map(len, page(copy, code=4).splitlines())) < 1100
    edit(copy / "manifest.json", lambda manifest: manifest["files"]["head.safetensors"].update(num_bytes=huge))
    refused = builders.run_cli("inspect-manifest", copy)
    assert refused.code == 4
    assert "head.safetensors" in refused.err
    assert len(refused.err) < 1000


def test_long_lists_are_cut_on_the_page(copy: Path) -> None:
    source = {"name": "n" * 10_000, "digest": "d", "num_bytes": 1, "revision": None, "split": None}
    edit_identity(copy, lambda manifest: manifest["identity"]["dataset"].update(sources=[source] * 1000))
    edit(copy / "tokens" / "tokens.json", lambda meta: meta.update(reasons={f"r{i}": 1 for i in range(5000)}))
    shown, said = page(copy, code=4), inspected(copy, code=4)
    assert len(said["quarantine"]["reasons"]) == 100
    assert "and 92 more reasons" in shown
    assert len(shown) < 20_000


def test_a_page_is_made_from_the_json_alone(whole: Path) -> None:
    described = describe_cache(whole)
    assert render_text({**inspected(whole), "free_bytes": described["free_bytes"]}) == render_text(described)


def test_the_page_with_its_text_needs_neither_torch_nor_transformers(whole: Path) -> None:
    for flags in ((), ("--json",), ("--sample", 3)):
        loaded = loaded_after(command("inspect-manifest", whole, *flags))
        assert "tokenizers" in loaded
        assert not loaded & (HEAVY | {"zarr", "safetensors", "jinja2"})
