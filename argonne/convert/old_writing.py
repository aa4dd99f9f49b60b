"""Writing the original's files, one tensor at a time."""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.serialization import set_default_mmap_options, skip_data

from argonne.convert.stored import Stored, StoredModel
from argonne.files import sync


def write_old(tensors: Mapping[str, Stored], tied: tuple[str, str] | None, model: StoredModel, path: Path) -> None:
    """Write a checkpoint as the original's: ``model_state_dict``, and how far the training was where that is known.

    The file is laid out first and then filled through a map of it, so that no more than a tensor is in memory. Its
    records of weights have no checksum.

    Args:
        tensors: under the original's names.
        tied: the head, which is saved too, and the embedding that it is.
        model: what is known besides of the model.
        path: the file.
    """
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in tensors.items()}
    if tied is not None:
        empty[tied[0]] = empty[tied[1]]
    progress = {
        "global_step": model.progress.step,
        "tokens_processed": model.progress.tokens,
        "data_position": None if model.progress.data_position is None else dict(model.progress.data_position),
    }
    told: dict[str, Any] = {"model_state_dict": empty, "config": dict(model.config)}
    with skip_data():
        torch.save(told | {name: value for name, value in progress.items() if value is not None}, path)
    with set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(path, weights_only=True, mmap=True)["model_state_dict"]
    for name, tensor in tensors.items():
        mapped[name].copy_(tensor.load())
    del mapped
    sync(path)
