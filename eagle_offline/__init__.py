"""Cache a frozen LLM's states once, then train EAGLE-3 and P-EAGLE drafts from the cache alone.

Names are imported when they are first used, so that ``import eagle_offline`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Cache": "eagle_offline.cache.reader",
    "Eagle3DraftConfig": "eagle_offline.draft.eagle3",
    "Eagle3DraftModel": "eagle_offline.draft.eagle3",
    "Eagle3StepMetrics": "eagle_offline.objectives.ttt",
    "Eagle3TargetBatch": "eagle_offline.target.hooks",
    "Eagle3TrainerModule": "eagle_offline.objectives.ttt",
    "HFEagle3TargetModel": "eagle_offline.target.hooks",
    "PEagleTrainerModule": "eagle_offline.objectives.peagle",
    "assign_cod_segments": "eagle_offline.objectives.cod",
    "compute_target_distribution": "eagle_offline.supervision",
    "create_peagle_mask_mod": "eagle_offline.element_attention",
    "default_aux_layer_ids": "eagle_offline.target.layout",
    "generate_cod_sample_indices": "eagle_offline.objectives.cod",
    "kl_div_loss": "eagle_offline.objectives.losses",
    "masked_soft_cross_entropy": "eagle_offline.objectives.losses",
    "open_cache": "eagle_offline.cache.reader",
    "shift_left_with_zero": "eagle_offline.alignment",
    "simulated_accept_length": "eagle_offline.objectives.acceptance",
}

__all__ = [
    "Cache",
    "Eagle3DraftConfig",
    "Eagle3DraftModel",
    "Eagle3StepMetrics",
    "Eagle3TargetBatch",
    "Eagle3TrainerModule",
    "HFEagle3TargetModel",
    "PEagleTrainerModule",
    "__version__",
    "assign_cod_segments",
    "compute_target_distribution",
    "create_peagle_mask_mod",
    "default_aux_layer_ids",
    "generate_cod_sample_indices",
    "kl_div_loss",
    "masked_soft_cross_entropy",
    "open_cache",
    "shift_left_with_zero",
    "simulated_accept_length",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'eagle_offline' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
