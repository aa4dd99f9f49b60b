"""Writing a checkpoint: whole tensors, gathered one at a time to the rank that writes their file.

Which tensors share a file, and in what order, depends on the whole tensors alone; so equal values make
equal files whatever the layout.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from argonne.checkpoint.format import (
    INDEX,
    CheckpointError,
    FileRecord,
    Manifest,
    TensorRecord,
    commit,
    record_file,
    record_tensor,
    step_directory,
)
from argonne.checkpoint.pieces import Piece
from argonne.files import TEMPORARY, make_directory, sync, write_json
from argonne.parallel import ProcessGroups, Region
from argonne.parallel.communication.collectives import gather_objects, transfer
from argonne.parallel.sharding.check import check_pieces

MAX_FILE_BYTES = 1 << 30
"""Whole tensors are collected into files of about this size: the host memory that a writer needs."""


@dataclass
class _Whole:
    """A whole tensor as the ranks together hold it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: list[tuple[int, Region]] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def save_checkpoint(
    root: Path,
    step: int,
    model: Sequence[Piece],
    optimizer: Sequence[Piece],
    write_rest: Callable[[Path], None],
    groups: ProcessGroups,
) -> Path:
    """Write ``root/step_XXXXXXXX`` and return it (collective).

    ``model`` and ``optimizer`` are this rank's parts of the weights and of the optimizer's moments. ``write_rest``
    writes the small files (configuration, tokenizer, trainer state) into the directory that it is given; it is called
    on the first rank only.

    Raises:
        LayoutError: on every rank, if their pieces do not make up whole tensors (``check_declarations``).
        CheckpointError: on every rank, if any of them could not write; nothing that was valid is touched.
    """
    check_pieces([(piece.name, piece.region, piece.part) for piece in (*model, *optimizer)], groups)
    final = step_directory(root, step)
    temporary = final.with_name(final.name + TEMPORARY)
    files: dict[str, FileRecord] = {}
    tensors: dict[str, TensorRecord] = {}
    problems: list[str] = []
    if groups.is_first:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            make_directory(temporary)
        except OSError as error:
            problems.append(str(error))
    problems = gather_objects(problems, groups.world)[0]
    if problems:
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {problems[0]}")
    for kind, pieces in (("model", model), ("optimizer", optimizer)):
        for written in gather_objects(_write_tensors(temporary, kind, pieces, groups), groups.world):
            files |= written.files
            tensors |= written.tensors
            problems += written.problems
    if groups.is_first and not problems:
        try:
            write_index(temporary, tensors)
            write_rest(temporary)
            for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
                name = str(path.relative_to(temporary))
                if name not in files:
                    sync(path)
                    files[name] = record_file(path)
            commit(temporary, final, Manifest(step, dict(sorted(files.items())), dict(sorted(tensors.items()))))
        except Exception as error:  # whatever it is, the other ranks wait for the outcome
            problems.append(str(error))
    problems = gather_objects(problems, groups.world)[0]
    if problems:
        if groups.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"the checkpoint of step {step} could not be written: {problems[0]}")
    return final


@dataclass
class _Written:
    files: dict[str, FileRecord] = field(default_factory=dict)
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _write_tensors(directory: Path, kind: str, pieces: Sequence[Piece], groups: ProcessGroups) -> _Written:
    """Gather and write every tensor of ``kind``; returns what this rank wrote."""
    mine = [p for p in pieces if p.region.is_owner(groups)]
    parts = {(p.name, p.region.start): p.part for p in mine}
    wholes: dict[str, _Whole] = {}
    for rank, held in enumerate(gather_objects([(p.name, p.region, p.part.dtype) for p in mine], groups.world)):
        for name, region, dtype in held:
            wholes.setdefault(name, _Whole(region.whole_shape, dtype)).sources.append((rank, region))
    writers = sorted({rank for whole in wholes.values() for rank, _ in whole.sources})
    files = list(file_groups({name: whole.bytes for name, whole in wholes.items()}))
    written = _Written()
    for number, names in enumerate(files):
        writer = writers[number % len(writers)]
        assembled = {name: _assemble(name, wholes[name], writer, parts, groups) for name in names}
        if groups.world.rank != writer:
            continue
        file = f"{kind}-{number + 1:05d}-of-{len(files):05d}.safetensors"
        whole_tensors = {name: tensor for name, tensor in assembled.items() if tensor is not None}
        try:
            save_file(whole_tensors, directory / file, metadata={"format": "pt"})
            sync(directory / file)
            written.files[file] = record_file(directory / file)
        except Exception as error:  # a full disk: the other ranks must hear of it, not wait for ever
            written.problems.append(f"{file}: {error}")
        written.tensors |= {name: record_tensor(tensor, file) for name, tensor in whole_tensors.items()}
    return written


def file_groups(sizes: Mapping[str, int]) -> Iterable[list[str]]:
    """Which whole tensors, of so many bytes each, share a file, in their order."""
    names: list[str] = []
    size = 0
    for name in sorted(sizes):
        if names and size + sizes[name] > MAX_FILE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += sizes[name]
    if names:
        yield names


def _assemble(
    name: str,
    whole: _Whole,
    writer: int,
    parts: dict[tuple[str, tuple[int, ...]], Tensor],
    groups: ProcessGroups,
) -> Tensor | None:
    """The whole tensor on its writer, through host memory; None on the other ranks."""
    me = groups.world.rank
    result = torch.empty(whole.shape, dtype=whole.dtype) if me == writer else None
    for source, region in whole.sources:
        if me == source:
            part = parts[name, region.start].detach().cpu().contiguous()
        elif result is not None:
            part = torch.empty(region.shape, dtype=whole.dtype)
        else:
            continue
        if source != writer:
            transfer(part, groups.world, source, writer)
        if result is not None:
            result[region.whole_index] = part
    return result


def write_index(directory: Path, tensors: Mapping[str, TensorRecord]) -> None:
    """The index with which Hugging Face finds each weight."""
    weights = {name: record for name, record in tensors.items() if record.file.startswith("model-")}
    size = sum(math.prod(r.shape) * getattr(torch, r.dtype).itemsize for r in weights.values())
    write_json(
        directory / INDEX,
        {
            "metadata": {"total_size": size},
            "weight_map": {name: r.file for name, r in sorted(weights.items())},
        },
    )
