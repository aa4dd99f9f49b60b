"""Checkpoints: whole tensors in a Hugging Face directory, valid or not there at all."""

from argonne.checkpoint.format import (
    MANIFEST,
    CheckpointError,
    faults,
    is_checkpoint,
    is_small,
    read_manifest,
    require_intact,
    step_directory,
    step_of,
)
from argonne.checkpoint.load import load_pieces, load_trainer, weight_pieces
from argonne.checkpoint.retention import checkpoints, newest_valid, prune, resolve, trusted
from argonne.checkpoint.save import Piece, save_checkpoint

__all__ = [
    "MANIFEST",
    "CheckpointError",
    "Piece",
    "checkpoints",
    "faults",
    "is_checkpoint",
    "is_small",
    "load_pieces",
    "load_trainer",
    "newest_valid",
    "prune",
    "read_manifest",
    "require_intact",
    "resolve",
    "save_checkpoint",
    "step_directory",
    "step_of",
    "trusted",
    "weight_pieces",
]
