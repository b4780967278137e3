"""A lossy cache trains as a cache of its decoded values does, bit for bit, and holds what the format says it holds.

The decoded cache is written here by hand: the values are those of the oracle, read from the stored bytes, and they are
stored raw.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import pytest
import torch

from eagle_offline import open_cache
from eagle_offline.cache import codec
from eagle_offline.cache.encodings import encoding_of
from eagle_offline.cache.layout import FieldLayout
from eagle_offline.cache.manifest import Identity, Manifest, read_manifest, write_manifest
from eagle_offline.cache.reader import Cache, Sample
from eagle_offline.cache.samples import StoredSample
from eagle_offline.cache.writer import ensure_index, write_shard
from eagle_offline.data.stored_pack import PackReader
from eagle_offline.data.stored_pack import StoredPack as Pack
from eagle_offline.objectives.fused_loss import TargetRows
from eagle_offline.objectives.ttt_loss import TTTLoss
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.objective import UnrollObjective
from eagle_offline.training.packs import plan_pack
from tests.builders import SCRATCH, make_cache, shared_chat
from tests.oracles import encodings as oracle
from tests.training.caches import DRAFT_VOCAB_SIZE, checkpoint_tensors, metrics, settings, train

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NUM_SAMPLES, SHARD_SIZE = 12, 4
ORDER = [3, 11, 0, 7, 7, 5, 2]


@dataclass(frozen=True)
class Kind:
    """Flags of a precompute."""

    state_encoding: str = "planes"
    mantissa_bits: int | None = None
    target_encoding: str = "factored"
    top_k: int | None = None
    dtype: str = "bf16"


EXACT = Kind()
LOSSY = {
    "fp8": Kind("fp8"),
    "5 bits": Kind(mantissa_bits=5),
    "4 bits": Kind(mantissa_bits=4),
    "3 bits": Kind(mantissa_bits=3),
    "2 bits": Kind(mantissa_bits=2),
    "topk": Kind(target_encoding="topk", top_k=20),
    "topk, 4 bits": Kind(mantissa_bits=4, target_encoding="topk", top_k=20),
    "dense, 4 bits": Kind(mantissa_bits=4, target_encoding="dense"),
    "dense, fp8": Kind("fp8", target_encoding="dense"),
    "topk, fp8, fp16": Kind("fp8", target_encoding="topk", top_k=150, dtype="fp16"),
}
DENSE = Kind(target_encoding="dense")
WHOLE_TOP_K = Kind(target_encoding="topk", top_k=DRAFT_VOCAB_SIZE)


def made(kind: Kind, seed: int = 0) -> Path:
    return _made(kind, seed)


@once
def _made(kind: Kind, seed: int) -> Path:
    return make_cache(
        SCRATCH / f"lossy-{seed}-{'-'.join(str(flag) for flag in vars(kind).values())}",
        data=shared_chat(NUM_SAMPLES, seed),
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        **vars(kind),
    )


def fields_of(cache: Cache) -> list[FieldLayout]:
    return cache.manifest.identity.capture.fields


def plain_columns(cache: Cache, index: int) -> list[tuple[FieldLayout, list[bytes], int]]:
    """Each field of a sample with its columns decompressed, and how many rows they have."""
    stored, start, found = cache.read_stored(index), 0, []
    for field in fields_of(cache):
        count = len(codec.column_names(field))
        num_rows = stored.num_rows(field)
        columns = [memoryview(column) for column in stored.columns[start : start + count]]
        planes = codec.unpack(field, columns, num_rows, framed=stored.framed)
        found.append((field, [plane.tobytes() for plane in planes], num_rows))
        start += count
    return found


@once
def decoded_by_oracle(kind: Kind, seed: int, index: int) -> list[torch.Tensor]:
    return [
        oracle.decoded(
            field.encoding,
            columns,
            num_rows,
            field.width,
            TORCH[field.dtype],
            field.mantissa_bits,
            field.top_k or 0,
        )
        for field, columns, num_rows in plain_columns(open_cache(made(kind, seed)), index)
    ]


def raw_identity(identity: Identity) -> Identity:
    capture = identity.capture
    fields = [
        FieldLayout(name=field.name, width=field.width, dtype=field.dtype, encoding="raw", rows=field.rows)
        for field in capture.fields
    ]
    target = "factored" if capture.target_encoding == "factored" else "dense"
    changes: dict[str, Any] = {"fields": fields, "state_encoding": "raw", "target_encoding": target}
    return identity.model_copy(update={"capture": capture.model_copy(update=changes)})


def written_decoded(kind: Kind, seed: int = 0) -> Path:
    """The cache of the same samples with the oracle's values in raw fields."""
    return _written_decoded(kind, seed)


@once
def _written_decoded(kind: Kind, seed: int) -> Path:
    source = made(kind, seed)
    cache, directory = open_cache(source), SCRATCH / f"decoded-{made(kind, seed).name}"
    ignored = shutil.ignore_patterns("manifest.json", "commit-*", "shard-*", "index-*", "status*")
    shutil.copytree(source, directory, ignore=ignored)
    old = read_manifest(source)
    identity = raw_identity(old.identity)
    write_manifest(
        directory, Manifest(identity=identity, defaults=old.defaults, files=old.files, environment=old.environment)
    )

    def rewritten(index: int) -> StoredSample:
        stored = cache.read_stored(index)
        columns: list[Any] = []
        for field, values in zip(identity.capture.fields, decoded_by_oracle(kind, seed, index), strict=True):
            columns += codec.encode(field, values)
        return StoredSample(
            sample_id=stored.sample_id,
            input_ids=stored.input_ids.copy(),
            loss_mask=stored.loss_mask.copy(),
            target_argmax=stored.target_argmax.copy(),
            target_log_normalizer=stored.target_log_normalizer.copy(),
            columns=columns,
        )

    for shard in range(identity.num_shards):
        samples = [rewritten(index) for index in range(len(cache)) if cache.shards[index] == shard]
        write_shard(directory, identity, shard, samples, {})
    ensure_index(directory, identity)
    return directory


def stored_rows(sample: Sample) -> torch.Tensor:
    rows = sample.supervision.last_hidden_state
    found = sample.supervision.target_probs if rows is None else rows
    assert found is not None
    return found


def same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return found.dtype == expected.dtype and torch.equal(
        found.contiguous().view(kind), expected.contiguous().view(kind)
    )


def merged(states: Sequence[Any]) -> torch.Tensor:
    return torch.cat([part.merge() for part in states])


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSY)
def test_samples_are_what_the_oracle_reads_from_the_bytes(name):
    cache = open_cache(made(LOSSY[name]))
    twin = open_cache(written_decoded(LOSSY[name]))
    assert len(cache) == len(twin) == NUM_SAMPLES
    for index in range(NUM_SAMPLES):
        sample, other = cache[index], twin[index]
        *aux, target = decoded_by_oracle(LOSSY[name], 0, index)
        assert same_bits(sample.aux_hidden_states, torch.cat(aux, dim=1))
        assert same_bits(stored_rows(sample), target)
        assert same_bits(other.aux_hidden_states, sample.aux_hidden_states)
        assert same_bits(stored_rows(other), stored_rows(sample))


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_captured_states_are_the_exact_ones_rounded(bits):
    """Two captures of one target: exact, and with fewer bits."""
    exact, lossy = open_cache(made(EXACT)), open_cache(made(Kind(mantissa_bits=bits)))
    table = torch.from_numpy(oracle.rounded_words(bits).astype("int32"))
    for index in range(NUM_SAMPLES):
        for find in (lambda sample: sample.aux_hidden_states, stored_rows):
            words = find(exact[index]).contiguous().view(torch.int16).int() & 0xFFFF
            found = find(lossy[index]).contiguous().view(torch.int16).int() & 0xFFFF
            assert torch.equal(found, table[words.long()])


def test_captured_fp8_states_are_the_exact_ones_on_the_grid():
    exact, lossy = open_cache(made(EXACT)), open_cache(made(LOSSY["fp8"]))
    width = fields_of(exact)[0].width
    for index in range(0, NUM_SAMPLES, 4):
        wide, found = exact[index].aux_hidden_states.double(), lossy[index].aux_hidden_states.double()
        for row, back in zip(wide.view(-1, width), found.view(-1, width), strict=True):
            codes, scale = oracle.fp8_row(row.tolist())
            expected = torch.tensor([oracle.e4m3_value(code) for code in codes]) * scale
            away = (back - expected).abs() > expected.abs() * 2.0**-8
            assert all(oracle.is_near_an_e4m3_tie(value / scale) for value in row[away].tolist())
            assert ((back - row).abs() <= row.abs() * (2.0**-4 + 2.0**-7) + scale * 2.0**-10).all()


def test_captured_top_k_is_the_dense_distribution_s():
    dense, kept = open_cache(made(DENSE)), open_cache(made(LOSSY["topk"]))
    for index in range(NUM_SAMPLES):
        exact, found = stored_rows(dense[index]).double(), stored_rows(kept[index]).double()
        assert torch.equal(found.topk(20, dim=1).values, exact.topk(20, dim=1).values)
        torch.testing.assert_close(found.sum(1), exact.sum(1), rtol=2.0**-7, atol=0)
        assert ((found == found.amin(dim=1, keepdim=True)).sum(dim=1) >= DRAFT_VOCAB_SIZE - 20).all()
        is_kept = found > found.amin(dim=1, keepdim=True)
        torch.testing.assert_close(found[is_kept], exact[is_kept], rtol=0, atol=0)


def test_a_lossy_cache_is_smaller():
    def size(kind: Kind) -> int:
        return sum(path.stat().st_size for path in made(kind).glob("shard-*"))

    sizes = [size(kind) for kind in (EXACT, *(Kind(mantissa_bits=bits) for bits in (5, 4, 3, 2)))]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 5
    assert size(LOSSY["topk"]) < size(DENSE)


# --- how it is read --------------------------------------------------------------------------------------------------


def assert_packs_alike(found: Pack, expected: Pack) -> None:
    assert found.sample_ids == expected.sample_ids
    for name in ("input_ids", "loss_mask", "target_slots", "target_argmax"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    assert same_bits(merged(found.aux_states), merged(expected.aux_states))
    assert same_bits(merged(found.target_states), merged(expected.target_states))


def merge_as_a_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU too, columns are put together by operations on tensors."""
    monkeypatch.setattr(codec, "merge", lambda field, planes: encoding_of(field).merge(field, list(planes)))


@pytest.mark.parametrize("layers", [None, [0, 2]])
@pytest.mark.parametrize("name", LOSSY)
def test_packs_hold_the_decoded_values_merged_or_not(name, layers, monkeypatch):
    merge_as_a_device_does(monkeypatch)
    cache, twin = open_cache(made(LOSSY[name])), open_cache(written_decoded(LOSSY[name]))
    expected = PackReader(layers).read([(twin, index) for index in ORDER])
    for is_merged in (False, True):
        pack = PackReader(layers, merged=is_merged).read([(cache, index) for index in ORDER])
        assert_packs_alike(pack, expected)
        for states in (*pack.aux_states, *pack.target_states):
            whole = states.merge()
            for start, stop in ((0, states.num_rows), (3, 4), (5, 5), (7, states.num_rows - 1)):
                assert same_bits(states.between(start, stop), whole[start:stop])
            for index in ([], [0], [4, 1, 1, len(whole) - 1]):
                rows = torch.tensor(index, dtype=torch.int64)
                assert same_bits(states.rows(rows).merge(), whole[rows])
    unmerged = PackReader(layers, merged=False).read([(cache, index) for index in ORDER])
    encodings = [{field.encoding for field in states.fields} for states in unmerged.aux_states]
    assert encodings == [{fields_of(cache)[0].encoding}]


@pytest.mark.parametrize("is_merged", [False, True])
def test_unlike_encodings_mix_in_one_pack(is_merged):
    kinds = [EXACT, LOSSY["fp8"], LOSSY["4 bits"], LOSSY["2 bits"], Kind("raw")]
    caches = [open_cache(made(kind)) for kind in kinds]
    twins = [open_cache(written_decoded(kind)) for kind in kinds]
    places = [(number % 5, index) for number, index in enumerate([*ORDER, 1, 1, 4])] + [(0, 2), (0, 3), (1, 3)]
    pack = PackReader(merged=is_merged).read([(caches[number], index) for number, index in places])
    assert_packs_alike(pack, PackReader().read([(twins[number], index) for number, index in places]))


@pytest.mark.parametrize("name", ["topk", "topk, fp8, fp16", "dense, 4 bits"])
def test_probabilities_reach_the_loss_as_decoded(name):
    """What the loss asks for of stored rows, chunk by chunk, is the decoded rows in float32."""
    cache = open_cache(made(LOSSY[name]))
    stored = PackReader(merged=False).read([(cache, index) for index in ORDER])
    pack = plan_pack(stored, cache.selected_token_mask, UnrollObjective(TTTLoss(3)), torch.device("cpu"))
    whole = torch.cat([stored_rows(cache[index]) for index in ORDER]).float()
    (states,) = stored.target_states
    for rows in (TargetRows(states.between, None), TargetRows.of(merged(pack.target_states), None)):
        count = states.num_rows if rows.rows == states.between else len(merged(pack.target_states))
        found = torch.cat([rows.probs(start, min(start + 9, count)) for start in range(0, count, 9)])
        assert found.dtype == torch.float32
        if rows.rows == states.between:
            assert torch.equal(found, whole)


# --- training --------------------------------------------------------------------------------------------------------


def run_on(directory: Path, *caches: Path, **changes: Any) -> Path:
    chosen: TrainSettings = settings(directory, **{"cache": caches, "num_epochs": 1, "ttt_steps": 2, **changes})
    train(chosen)
    return directory


def assert_same_training(run: Path, expected: Path) -> None:
    ours, theirs = checkpoint_tensors(run), checkpoint_tensors(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    rows = metrics(run)
    assert rows == metrics(expected)
    assert sum("loss" in row for row in rows) > 2


AS_STORED = ["fp8", "4 bits", "topk", "topk, fp8, fp16"]


@pytest.mark.parametrize(
    ("name", "device_path"), [*((name, False) for name in LOSSY), *((name, True) for name in AS_STORED)]
)
def test_training_on_a_lossy_cache_is_training_on_its_decoded_values(name, device_path, tmp_path, monkeypatch):
    if device_path:
        merge_as_a_device_does(monkeypatch)
        monkeypatch.setattr(
            PackReader, "for_device", classmethod(lambda cls, device, layers=None: PackReader(layers, merged=False))
        )
    run = run_on(tmp_path / "lossy", made(LOSSY[name]))
    assert_same_training(run, decoded_run(LOSSY[name]))


@once
def decoded_run(kind: Kind) -> Path:
    return run_on(SCRATCH / f"run-{written_decoded(kind).name}", written_decoded(kind))


def test_lossy_caches_train_otherwise_than_the_exact_one():
    """Else the promise above would hold for nothing."""
    exact = checkpoint_tensors(decoded_run(EXACT))
    for name in ("fp8", "5 bits", "2 bits"):
        assert not all(torch.equal(checkpoint_tensors(decoded_run(LOSSY[name]))[key], exact[key]) for key in exact)


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in metrics(run) if "loss" in row]


def test_top_k_of_the_whole_vocabulary_trains_as_dense_and_fewer_come_near(tmp_path):
    dense = losses(run_on(tmp_path / "dense", made(DENSE)))
    whole = losses(run_on(tmp_path / "whole", made(WHOLE_TOP_K)))
    few = losses(run_on(tmp_path / "few", made(Kind(target_encoding="topk", top_k=1))))
    some = losses(run_on(tmp_path / "some", made(Kind(target_encoding="topk", top_k=100))))
    assert whole == pytest.approx(dense, rel=1e-6)
    assert some == pytest.approx(dense, rel=0.02)
    worst = [max(abs(a - b) for a, b in zip(run, dense, strict=True)) for run in (whole, some, few)]
    assert worst == sorted(worst)


@pytest.mark.parametrize(
    ("one", "other"), [("fp8", "4 bits"), ("2 bits", "5 bits"), ("dense, 4 bits", "dense, fp8")], ids=str
)
def test_mixtures_of_unlike_encodings_train_as_their_decoded_values(one, other, tmp_path):
    chosen = (LOSSY[one], 0), (LOSSY[other], 1)
    run = run_on(tmp_path / "lossy", *(made(kind, seed) for kind, seed in chosen))
    assert_same_training(run, run_on(tmp_path / "decoded", *(written_decoded(kind, seed) for kind, seed in chosen)))
