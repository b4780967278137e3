"""Writes the JSON Schemas of everything that stands on disk from the records that read it.

Run ``python -m eagle_offline.schemas_from_code schemas`` after a record changed; a test compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from eagle_offline import config
from eagle_offline.cache.layout import CommitRecord, FieldLayout
from eagle_offline.cache.manifest import Manifest
from eagle_offline.text.token_table import TokenTableMeta
from eagle_offline.training.logbook import MetricsRow

_RECORDS: dict[str, type[BaseModel]] = {
    "manifest": Manifest,
    "commit-record": CommitRecord,
    "field-layout": FieldLayout,
    "token-table": TokenTableMeta,
    "metrics-row": MetricsRow,
    "tokenize-settings": config.TokenizeSettings,
    "precompute-settings": config.PrecomputeSettings,
    "train-settings": config.TrainSettings,
}


def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema (draft 2020-12) of every record, by file name."""
    return {
        f"{name}.schema.json": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **record.model_json_schema(mode="validation"),
        }
        for name, record in _RECORDS.items()
    }


def write_schemas(directory: Path) -> None:
    """Write every schema to ``directory``."""
    for name, schema in schemas().items():
        (directory / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
