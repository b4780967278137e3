"""`schemas/` says what the code reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from benchmarks.caches import small_cache
from eagle_offline.cache.layout import record_file
from eagle_offline.schemas_from_code import schemas

DIRECTORY = Path(__file__).parent.parent / "schemas"


@pytest.mark.parametrize("name", sorted(schemas()))
def test_schema_on_disk_is_the_one_of_the_code(name):
    assert json.loads((DIRECTORY / name).read_text()) == schemas()[name], "run `make schemas`"


def test_no_schema_is_left_over():
    assert {path.name for path in DIRECTORY.glob("*.json")} == set(schemas())


def test_files_of_a_cache_follow_their_schemas(tmp_path):
    cache = small_cache(tmp_path, num_conversations=10)
    for file, schema in (
        ("manifest.json", "manifest"),
        (record_file(0), "commit-record"),
        ("tokens/tokens.json", "token-table"),
    ):
        jsonschema.validate(
            json.loads((cache / file).read_text()), json.loads((DIRECTORY / f"{schema}.schema.json").read_text())
        )
