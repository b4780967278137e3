"""Hub datasets: which split and revision is read, and what is said when the hub gives nothing."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from eagle_offline.errors import DataError, EagleOfflineError, UsageError
from eagle_offline.text.rows import iter_rows
from eagle_offline.text.sources import pinned_inputs, resolve_sources
from tests.text.reading import assert_one_line, numbered
from tests.text.tiny_tokenizers import write_jsonl


def test_hub_dataset_is_read_with_split_and_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    commit = "0123456789" * 4

    def load(hub_id: str, split: str | None, revision: str | None) -> datasets.DatasetDict | datasets.Dataset:
        calls.append((hub_id, split, revision))
        dataset = datasets.Dataset.from_list(numbered(1, 2), split="train")
        dataset.info.download_checksums = {f"hf://datasets/{hub_id}@{commit}/a.json": {}}
        return dataset if split else datasets.DatasetDict(train=dataset, test=dataset)

    monkeypatch.setattr(datasets, "load_dataset", load)
    (source,) = resolve_sources("owner/name", split="[:2]", revision="main")
    assert [row.value for row in iter_rows(source)] == numbered(1, 2)
    assert calls == [("owner/name", "train[:2]", "main"), ("owner/name", "train[:2]", commit)]
    assert (source.name, source.revision) == ("owner/name", commit)
    assert [row.value for row in iter_rows(resolve_sources("owner/name")[0])] == numbered(1, 2)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionError("Couldn't reach\nit"), DataError),
        (ValueError("Unknown split \"x\". Should be one of ['train']."), UsageError),
    ],
)
def test_hub_failure_is_one_line(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[EagleOfflineError]
) -> None:
    def load(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(expected) as error:
        resolve_sources("owner/name", split="x")
    assert_one_line(error, "owner/name")


def test_each_hub_input_has_its_own_split_and_revision(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def load(hub_id: str, split: str | None, revision: str | None) -> datasets.Dataset:
        calls.append((hub_id, split, revision))
        dataset = datasets.Dataset.from_list(numbered(len(calls)), split="train")
        dataset.info.download_checksums = {f"hf://datasets/{hub_id}@{COMMITS[revision or 'main']}/a.json": {}}
        return dataset

    monkeypatch.setattr(datasets, "load_dataset", load)
    local = write_jsonl(tmp_path / "a.jsonl", numbered(9))
    inputs = ["a/b@v1:train_sft[:5%]", str(local), "a/b:test", "a/b@refs/pr/3:test", "c/d"]
    sources = resolve_sources(inputs, split="[:1]", revision="main")
    assert calls == [
        ("a/b", "train_sft[:5%]", "v1"),
        ("a/b", "test", "main"),
        ("a/b", "test", "refs/pr/3"),
        ("c/d", "train[:1]", "main"),
    ]
    assert [source.name for source in sources] == [
        "a/b:train_sft[:5%]", "a.jsonl", f"a/b@{COMMITS['main']}:test", f"a/b@{COMMITS['refs/pr/3']}:test", "c/d",
    ]  # fmt: skip
    assert pinned_inputs(inputs, sources) == (
        f"a/b@{COMMITS['v1']}:train_sft[:5%]",
        str(local),
        f"a/b@{COMMITS['main']}:test",
        f"a/b@{COMMITS['refs/pr/3']}:test",
        f"c/d@{COMMITS['main']}",
    )
    with pytest.raises(UsageError) as error:
        resolve_sources(["a/b:test", "a/b@main:test"])
    assert_one_line(error, "a/b", "twice")


COMMITS = {name: f"{number}123456789" * 4 for number, name in enumerate(["main", "v1", "refs/pr/3"])}
