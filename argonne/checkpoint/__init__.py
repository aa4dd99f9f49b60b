"""Checkpoints: whole tensors in a Hugging Face directory, valid or not there at all."""

from argonne.checkpoint.fingerprint import weights_fingerprint
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
from argonne.checkpoint.load import load_pieces, load_tensors, load_trainer, tensor_files
from argonne.checkpoint.pieces import MOMENTS, MUON_MOMENT, Piece, moment_pieces, reset_moments, weight_pieces
from argonne.checkpoint.retention import checkpoints, newest_valid, prune, resolve, trusted
from argonne.checkpoint.save import save_checkpoint
