"""Checkpoints: whole tensors in a Hugging Face directory, valid or not there at all."""

from argonne.checkpoint.format import CheckpointError, faults, read_manifest, step_directory, step_of
from argonne.checkpoint.load import load_pieces, load_trainer, weight_pieces
from argonne.checkpoint.retention import checkpoints, newest_valid, prune, resolve
from argonne.checkpoint.save import Piece, save_checkpoint

__all__ = [
    "CheckpointError",
    "Piece",
    "checkpoints",
    "faults",
    "load_pieces",
    "load_trainer",
    "newest_valid",
    "prune",
    "read_manifest",
    "resolve",
    "save_checkpoint",
    "step_directory",
    "step_of",
    "weight_pieces",
]
