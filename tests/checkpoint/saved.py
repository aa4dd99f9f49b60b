"""Checkpoints of a small model with values drawn from a seed: saved, loaded, compared and damaged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from argonne.checkpoint import Piece, load_pieces, moment_pieces, save_checkpoint, weight_pieces
from argonne.checkpoint import save as module
from argonne.files import write_json
from argonne.models import ArgonneConfig, ArgonneModel, Execution, to_huggingface
from argonne.parallel import Layout, Normal, ProcessGroups, Region
from argonne.training.optimizer import build_optimizer
from tests.whole import Parts

# 4 query heads on 2 key-value heads: at tensor=4 these are shared; 29 tokens: uneven, and padded.
CONFIG = ArgonneConfig(20, 2, 4, 2, 29, 12, 6, max_position_embeddings=8, tie_word_embeddings=False)
LAYOUTS = [Layout(), Layout(tensor=2), Layout(tensor=4), Layout(data=2, tensor=2)]


def pieces_of(groups: ProcessGroups) -> tuple[list[Piece], list[Piece]]:
    """The weights and the moments of an empty model on this rank."""
    model = ArgonneModel(CONFIG, Execution(groups))
    parameters = model.sharded_parameters()
    return weight_pieces(parameters), moment_pieces(build_optimizer(parameters, 0.1), parameters)


def drawn(groups: ProcessGroups, seed: int) -> tuple[list[Piece], list[Piece]]:
    """The same pieces with values that depend on the seed, the name and the place only; nobody may change them."""
    return _drawn_alone(seed) if groups.world.size == 1 else _drawn(groups, seed)


@functools.cache
def _drawn_alone(seed: int) -> tuple[list[Piece], list[Piece]]:
    return _drawn(ProcessGroups.single(), seed)


def _drawn(groups: ProcessGroups, seed: int) -> tuple[list[Piece], list[Piece]]:
    weights, moments = pieces_of(groups)
    for piece in (*weights, *moments):
        Normal(1.0).fill(piece.part, seed, piece.name, piece.region.whole_shape, piece.region.start)
    return weights, moments


def write_rest(directory: Path) -> None:
    write_json(directory / "config.json", to_huggingface(CONFIG, {"eos_token_id": 2}, "float32"))
    write_json(directory / "trainer.json", {"step": 1})
    (directory / "tokenizer").mkdir()
    (directory / "tokenizer" / "vocab.txt").write_text("a\nb\n")


def save(groups: ProcessGroups, root: Path, step: int, seed: int, file_bytes: int | None = None) -> Path:
    usual = module.MAX_FILE_BYTES
    module.MAX_FILE_BYTES = usual if file_bytes is None else file_bytes
    try:
        return save_checkpoint(root, step, *drawn(groups, seed), write_rest, groups)
    finally:
        module.MAX_FILE_BYTES = usual


def load(groups: ProcessGroups, directory: Path) -> Parts:
    weights, moments = pieces_of(groups)
    for piece in (*weights, *moments):
        piece.part.fill_(torch.nan)
    load_pieces(directory, [*weights, *moments])
    return named([*weights, *moments])


def load_and_save(groups: ProcessGroups, directory: Path, root: Path, step: int) -> Path:
    weights, moments = pieces_of(groups)
    load_pieces(directory, [*weights, *moments])
    return save_checkpoint(root, step, weights, moments, write_rest, groups)


def named(pieces: list[Piece]) -> Parts:
    """The parts with the names under which they are saved."""
    return [
        (Region(p.name, *(getattr(p.region, f) for f in ("whole_shape", "start", "shape", "local_start", "holders"))),
         p.part.clone())
        for p in pieces
    ]  # fmt: skip


def expected_values(seed: int) -> dict[str, Tensor]:
    weights, moments = drawn(ProcessGroups.single(), seed)
    return {piece.name: piece.part.clone() for piece in (*weights, *moments)}


def assert_equal_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def bytes_of(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def remove(path: Path) -> None:
    path.unlink()


def cut_last_byte(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def flip(position: float) -> Callable[[Path], None]:
    def flip_one_bit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 1
        path.write_bytes(content)

    return flip_one_bit


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGES = {
    "removed": remove,
    "truncated": cut_last_byte,
    "emptied": empty,
    "lengthened": lengthen,
    "first bit flipped": flip(0),
    "a middle bit flipped": flip(0.5),
    "last bit flipped": flip(1),
    "zeroed": zero,
}


def load_weights(groups: ProcessGroups, directory: Path) -> Parts:
    weights, _ = pieces_of(groups)
    load_pieces(directory, weights)
    return named(weights)
