"""Loss masks that stand beside a dump: an Arrow dataset, as `datasets` saves it, whose rows number the dump's files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eagle_offline.errors import DataError, UsageError, one_line
from eagle_offline.importing.dumps import digest_values, masks, token_ids
from eagle_offline.provenance import digest_bytes

_ROWS_AT_ONCE = 256
_COLUMNS = ("input_ids", "loss_mask")


class LossMasks:
    """What is known of each row of such a dataset.

    Args:
        directory: of the dataset.
        seq_length: of the corpus; no more tokens of a row are looked at.

    Raises:
        UsageError: no such dataset. DataError: it has no token ids and loss masks, or they cannot be read.
    """

    def __init__(self, directory: Path, seq_length: int):
        dataset = _load(directory)
        ids, found = np.empty(len(dataset), np.uint64), np.empty(len(dataset), np.uint64)
        number = 0
        try:
            for batch in dataset.with_format("numpy").iter(_ROWS_AT_ONCE):
                for row_ids, row_mask in zip(*(batch[name] for name in _COLUMNS), strict=True):
                    place = f"{directory} row {number}"
                    if len(row_ids) != len(row_mask):
                        raise DataError(f"{place}: {len(row_ids)} token ids and a loss mask of {len(row_mask)}")
                    ids[number] = digest_values(token_ids(place, np.asarray(row_ids))[:seq_length])
                    found[number] = digest_values(masks(place, "loss_mask", np.asarray(row_mask))[:seq_length])
                    number += 1
        except (OSError, ValueError, TypeError) as error:  # of Arrow, too
            raise DataError(f"{directory}: its rows cannot be read: {one_line(error)}") from error
        self._ids, self._masks = ids, found
        self.digest = digest_bytes(ids.tobytes() + found.tobytes())

    def of(self, files: Sequence[Path], ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the masks' digests for files of one sample each, and where the token ids are those of the dataset.

        Args:
            files: called ``hs_{row}.safetensors``; of another name, or beyond the dataset, none has a mask.
            ids: uint64, what each sample is known by.
        """
        rows = np.array([_row_of(file, len(self._ids)) for file in files], np.int64)
        return self._masks[rows], (rows >= 0) & (self._ids[rows] == ids)


def _row_of(file: Path, count: int) -> int:
    number = file.stem.removeprefix("hs_")
    return int(number) if number.isdecimal() and int(number) < count else -1


def is_dataset(directory: Path) -> bool:
    """Say whether a directory holds a dataset that `datasets` saved."""
    return (directory / "state.json").is_file() and (directory / "dataset_info.json").is_file()


def _load(directory: Path) -> Any:
    import datasets

    if not is_dataset(directory):
        raise UsageError(
            f"--loss-masks {directory}: holds no dataset; expected state.json and dataset_info.json, as "
            "datasets.Dataset.save_to_disk and speculators' prepare-data write them"
        )
    try:
        dataset = datasets.load_from_disk(str(directory))
    except Exception as error:  # whatever a loader raises for a stranger's files: the user sees one line
        raise DataError(f"--loss-masks {directory}: cannot be loaded: {one_line(error)}") from error
    lacking = [name for name in _COLUMNS if name not in dataset.column_names]
    if lacking or not len(dataset):
        raise DataError(f"--loss-masks {directory}: {len(dataset)} rows, without {' and '.join(lacking) or 'any'}")
    return dataset.select_columns(list(_COLUMNS))
