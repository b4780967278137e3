"""Hub datasets: which split and revision is read, and what is said when the hub gives nothing."""

from __future__ import annotations

import datasets
import pytest

from eagle_offline.errors import DataError, EagleOfflineError, UsageError
from eagle_offline.text.rows import iter_rows
from eagle_offline.text.sources import resolve_sources
from tests.text.reading import assert_one_line, numbered


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
