"""Which weights a directory holds, told without reading all of them."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from argonne.checkpoint.format import CheckpointError
from argonne.checkpoint.load import tensor_files
from argonne.checkpoint.pieces import MOMENTS, MUON_MOMENT


def weights_fingerprint(directory: Path) -> str:
    """A SHA-256 (hex) of the name, the dtype, the shape and three rows of each weight: first, middle and last.

    Training changes all rows of a matrix, so that two states of one model differ here. How the weights are shared out
    over files does not show.

    Raises:
        CheckpointError: a file cannot be read.
    """
    files, digest = tensor_files(directory), hashlib.sha256()
    with ExitStack() as stack:
        opened = functools.cache(lambda path: stack.enter_context(safe_open(path, framework="pt")))
        for name in sorted(each for each in files if not each.endswith((*MOMENTS, MUON_MOMENT))):
            path = directory / files[name]
            try:
                stored = opened(path).get_slice(name)
                digest.update(f"{name} {stored.get_dtype()} {stored.get_shape()}".encode())
                for part in _samples(stored):
                    digest.update(part)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error
    return digest.hexdigest()


def _samples(stored: Any) -> Iterator[bytes]:
    shape = stored.get_shape()
    if not shape or 0 in shape:
        return
    for row in sorted({0, shape[0] // 2, shape[0] - 1}) if len(shape) > 1 else [slice(None)]:
        part = stored[row : row + 1] if isinstance(row, int) else stored[row]
        yield part.contiguous().view(torch.uint8).numpy().tobytes()
