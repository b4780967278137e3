"""What a draft was trained for and from; travels with every checkpoint and every export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from eagle_offline.errors import DataError, one_line

ORIGIN_FILE: Final = "origin.json"


class MergedAdapter(BaseModel):
    """A LoRA adapter that is merged into a target: hub id or directory name, resolved revision, files' digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    revision: str | None
    digest: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f" at {self.revision}"
        return f"{self.id}{revision} (digest {self.digest})"


class DraftOrigin(BaseModel):
    """The target a draft belongs to, the cache it learned from, and how far it got.

    Attributes:
        target_id: hub id, or the directory's name.
        target_revision: resolved commit of a hub model.
        target_digest: of the target's weights and config, as `eagle_offline.provenance.digest_merged` makes it.
        target_adapter: what is merged into that target, None for the target as it is.
        target_architecture: class name of the causal LM.
        target_num_layers, target_hidden_size, target_vocab_size: its shape.
        tokenizer_digest, template_digest: of what turned text into tokens.
        aux_layer_ids: 0-based decoder layers whose outputs the draft reads.
        cache_digest: of the cache's identity.
        dataset: the corpus, as the cache's manifest names it.
        draft_vocab_digest, draft_vocab_coverage: the draft vocabulary, and its share of the supervised tokens.
        objective: ``eagle3`` or ``peagle``.
        ttt_steps: unroll steps of EAGLE-3. num_depths: depths of P-EAGLE.
        embeddings_trained: whether the token embeddings differ from the target's.
        init_from: the draft whose weights it started from, as the user called it; None for the target's alone.
        step: optimizer steps done.
        heldout: the last validation's metrics up to this step; filled in by the exporter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["eagle-offline-draft"] = "eagle-offline-draft"
    version: Literal[1] = 1
    target_id: str
    target_revision: str | None
    target_digest: str
    target_adapter: MergedAdapter | None = None
    target_architecture: str
    target_num_layers: int = Field(gt=0)
    target_hidden_size: int = Field(gt=0)
    target_vocab_size: int = Field(gt=0)
    tokenizer_digest: str
    template_digest: str
    aux_layer_ids: list[int]
    cache_digest: str
    dataset: dict[str, Any]
    draft_vocab_digest: str
    draft_vocab_coverage: float = Field(ge=0, le=1)
    objective: str
    ttt_steps: int | None = Field(default=None, gt=0)
    num_depths: int | None = Field(default=None, gt=0)
    embeddings_trained: bool
    init_from: str | None = None
    step: int = Field(ge=0)
    heldout: dict[str, Any] | None = None

    def to_json(self) -> str:
        """Return the content of ``origin.json``."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"


def read_origin(directory: Path) -> DraftOrigin | None:
    """Read a draft's origin; None for a draft that was made elsewhere and has none.

    Raises:
        DataError: there is one, but it cannot be read.
    """
    path = directory / ORIGIN_FILE
    try:
        return DraftOrigin.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path}: not a draft's origin: {one_line(error)}") from error
    except ValidationError as error:
        raise DataError(f"{path}: not a draft's origin: {_first_fault(error)}") from error


def _first_fault(error: ValidationError) -> str:
    """Return the first field that is wrong and what is wrong with it."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return one_line(f"{field}: {first['msg']}" if field else first["msg"])
