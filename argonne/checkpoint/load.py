"""Reading a checkpoint: each rank reads only the slices that its regions need, so any layout opens any other's."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from argonne.checkpoint.format import INDEX, MANIFEST, TRAINER, CheckpointError, read_manifest, require_intact
from argonne.checkpoint.pieces import Piece
from argonne.files import read_object

_DTYPES = ("F16", "BF16", "F32", "F64")


def load_pieces(directory: Path, pieces: Iterable[Piece], verify: bool = True) -> None:
    """Overwrite each piece with its part of the whole tensor of that name.

    Args:
        directory: a checkpoint, or any Hugging Face directory of safetensors.
        verify: compare the files of a checkpoint with its manifest first. Without, the ranks have done so
            together (``newest_valid``), which spares each of them the reading of what the others want.

    Raises:
        CheckpointError: a tensor is missing, or has another shape, or a file is not as it was written.
    """
    pieces, files = list(pieces), tensor_files(directory)
    if verify:
        read = {files.get(_stored_name(piece.name, files)) for piece in pieces}
        require_intact(directory, lambda name: name in read)
    with ExitStack() as stack:
        opened = functools.cache(lambda file: stack.enter_context(safe_open(directory / file, framework="pt")))
        for piece in pieces:
            name = _stored_name(piece.name, files)
            if name not in files:
                raise CheckpointError(f"checkpoint {str(directory)!r} has no tensor {piece.name!r}")
            file = files[name]
            try:
                stored = opened(file).get_slice(name)
                _require_shape(piece, tuple(stored.get_shape()), repr(str(directory)))
                _require_dtype(piece, stored.get_dtype(), directory)
                piece.part.copy_(stored[piece.region.whole_index])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{str(directory / file)!r} cannot be read: {error}") from error


@torch.no_grad()
def load_tensors(tensors: Mapping[str, Tensor], pieces: Iterable[Piece]) -> None:
    """As ``load_pieces``, from whole tensors in memory: a ``state_dict``, say. What no piece asks for is left alone."""
    for piece in pieces:
        if piece.name not in tensors:
            raise CheckpointError(f"the tensors in memory have no {piece.name!r}")
        whole = tensors[piece.name]
        _require_shape(piece, tuple(whole.shape), "memory")
        piece.part.copy_(whole[piece.region.whole_index])


def load_trainer(directory: Path) -> dict[str, Any]:
    """``trainer.json`` of a checkpoint. Raises ``CheckpointError`` when it is not there, or not as it was written."""
    try:
        if (directory / MANIFEST).exists():
            require_intact(directory, lambda name: name == TRAINER)
        return read_object(directory / TRAINER)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(directory / TRAINER)!r} cannot be read: {error}") from error


def _stored_name(name: str, files: Mapping[str, str]) -> str:
    """The name of a tensor in files that may be of a model saved without its head: such have no ``transformer.``."""
    prefix, _, bare = name.partition(".")
    if name in files or bare not in files or any(each.startswith(f"{prefix}.") for each in files):
        return name
    return bare


def _require_shape(piece: Piece, shape: tuple[int, ...], place: str) -> None:
    if shape != piece.region.whole_shape:
        raise CheckpointError(
            f"{piece.name!r} in {place} has shape {shape}; this model's is {piece.region.whole_shape}"
        )


def _require_dtype(piece: Piece, stored: str, directory: Path) -> None:
    """Refuse numbers that mean something else than they say: those of quantised weights wait for their scales."""
    if stored not in _DTYPES:
        raise CheckpointError(
            f"{piece.name!r} in {str(directory)!r} is stored as {stored}; legal: {', '.join(_DTYPES)} (weights that "
            "are not quantised)"
        )


def tensor_files(directory: Path) -> dict[str, str]:
    """The file of each tensor: from the manifest, or as Hugging Face keeps them.

    Raises:
        CheckpointError: there are no safetensors, or what lists them cannot be read.
    """
    if (directory / MANIFEST).exists():
        return {name: record.file for name, record in read_manifest(directory).tensors.items()}
    index, single = directory / INDEX, directory / "model.safetensors"
    try:
        if index.exists():
            return {name: str(file) for name, file in dict(read_object(index)["weight_map"]).items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(index)!r} cannot be read: {error}") from error
    try:
        if single.exists():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(single)!r} cannot be read: {error}") from error
    raise CheckpointError(f"{str(directory)!r} holds no safetensors weights")
