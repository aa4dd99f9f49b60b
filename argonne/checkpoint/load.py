"""Reading a checkpoint: each rank reads only the slices that its regions need, so any layout opens any other's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from argonne.checkpoint.format import INDEX, TRAINER, CheckpointError, read_manifest
from argonne.checkpoint.save import Piece
from argonne.parallel import ShardedParameter, regions_of


def load_pieces(directory: Path, pieces: Iterable[Piece]) -> None:
    """Overwrite each piece with its part of the whole tensor of that name.

    Args:
        directory: a checkpoint, or any Hugging Face directory of safetensors.
        pieces: what this rank wants.

    Raises:
        CheckpointError: a tensor is missing, or has another shape.
    """
    files = _tensor_files(directory)
    with ExitStack() as stack:
        opened: dict[str, Any] = {}
        for piece in pieces:
            if piece.name not in files:
                raise CheckpointError(f"checkpoint {str(directory)!r} has no tensor {piece.name!r}")
            file = files[piece.name]
            try:
                if file not in opened:
                    opened[file] = stack.enter_context(safe_open(directory / file, framework="pt"))
                stored = opened[file].get_slice(piece.name)
                if tuple(stored.get_shape()) != piece.region.whole_shape:
                    raise CheckpointError(
                        f"{piece.name!r} in {str(directory)!r} has shape {tuple(stored.get_shape())}; "
                        f"this model's is {piece.region.whole_shape}"
                    )
                piece.part.copy_(stored[piece.region.whole_index])
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{str(directory / file)!r} cannot be read: {error}") from error


def weight_pieces(parameters: Iterable[ShardedParameter]) -> list[Piece]:
    """This rank's parts of the weights, named as the whole tensors are."""
    return [Piece(region.name, region, part) for region, part in regions_of(list(parameters))]


def load_trainer(directory: Path) -> dict[str, Any]:
    """``trainer.json`` of a checkpoint. Raises ``CheckpointError`` when it is not there."""
    try:
        return json.loads((directory / TRAINER).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(directory / TRAINER)!r} cannot be read: {error}") from error


def _tensor_files(directory: Path) -> dict[str, str]:
    """The file of each tensor: from the manifest, or as Hugging Face keeps them."""
    if (directory / "manifest.json").exists():
        return {name: record.file for name, record in read_manifest(directory).tensors.items()}
    index, single = directory / INDEX, directory / "model.safetensors"
    try:
        if index.exists():
            return dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{str(index)!r} cannot be read: {error}") from error
    try:
        if single.exists():
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single.name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(single)!r} cannot be read: {error}") from error
    raise CheckpointError(f"{str(directory)!r} holds no safetensors weights")
