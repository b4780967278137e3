"""Writes the JSON Schemas of everything that stands on disk from the records that read it.

Run ``python -m eagle_offline.schemas_from_code schemas`` after a record changed; a test compares.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from eagle_offline import capture_settings, config
from eagle_offline.cache.aside import AsideReasons
from eagle_offline.cache.layout import CommitRecord, FieldLayout
from eagle_offline.cache.manifest import Manifest
from eagle_offline.draft.origin import DraftOrigin
from eagle_offline.inspection_record import Inspection
from eagle_offline.precompute.estimate_record import Estimate
from eagle_offline.serving.results import Evaluation
from eagle_offline.text.token_table import TokenTableMeta
from eagle_offline.train_settings import TrainSettings
from eagle_offline.training.logbook import MetricsRow

_RECORDS: dict[str, type[BaseModel]] = {
    "manifest": Manifest,
    "commit-record": CommitRecord,
    "field-layout": FieldLayout,
    "aside-reasons": AsideReasons,
    "token-table": TokenTableMeta,
    "metrics-row": MetricsRow,
    "draft-origin": DraftOrigin,
    "evaluation": Evaluation,
    "estimate": Estimate,
    "inspection": Inspection,
    "tokenize-settings": capture_settings.TokenizeSettings,
    "precompute-settings": capture_settings.PrecomputeSettings,
    "import-settings": capture_settings.ImportSettings,
    "verify-settings": config.VerifySettings,
    "repair-settings": config.RepairSettings,
    "convert-settings": config.ConvertSettings,
    "train-settings": TrainSettings,
    "export-settings": config.ExportSettings,
    "evaluate-settings": config.EvaluateSettings,
}


# Documents that carry the digest of their own content; see `eagle_offline.cache.manifest.seal`.
_SEALED = ("manifest", "commit-record")

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema (draft 2020-12) of every record, by file name."""
    described = {}
    for name, record in _RECORDS.items():
        schema = {"$schema": _DIALECT, **record.model_json_schema(mode="validation")}
        if name in _SEALED:
            schema["properties"] = {
                **schema["properties"],
                "self_digest": {"pattern": "^[0-9a-f]{32}$", "type": "string"},
            }
            schema["required"] = [*schema["required"], "self_digest"]
        described[f"{name}.schema.json"] = schema
    return described


def write_schemas(directory: Path) -> None:
    """Write every schema to ``directory``."""
    for name, schema in schemas().items():
        (directory / name).write_text(json.dumps(schema, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    write_schemas(Path(sys.argv[1]))
