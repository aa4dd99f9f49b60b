"""What a checkpoint directory is: its names, its manifest, and the moment at which it becomes valid.

A checkpoint is written to ``step_XXXXXXXX.tmp``; the manifest, written last, lists every other file with
its size and SHA-256, and every whole tensor with the SHA-256 of its value. The directory is then renamed.
One without a manifest that holds is not a checkpoint. Where a step is saved again, and the two cannot change
places at one blow, the one before is ``step_XXXXXXXX.replaced`` meanwhile: still a checkpoint of that step.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from argonne.files import TEMPORARY, exchange, read_object, seal, set_aside, sync, write_json
from argonne.parallel.errors import ArgonneError

MANIFEST = "manifest.json"
TRAINER = "trainer.json"
INDEX = "model.safetensors.index.json"
REPLACED = ".replaced"
"""Ends the name of a checkpoint that another of the same step is about to replace."""
_STEP = re.compile(r"step_(\d{8,})(\.replaced(-\d+)?)?")
_READ = 1 << 22


class CheckpointError(ArgonneError):
    """A checkpoint that is missing, damaged, or of another model."""


@dataclass(frozen=True)
class FileRecord:
    """One file of a checkpoint."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class TensorRecord:
    """One whole tensor of a checkpoint, wherever it is stored."""

    file: str
    shape: tuple[int, ...]
    dtype: str
    sha256: str
    """Of the value's bytes, row-major: equal for equal values, whatever layout wrote them."""


@dataclass(frozen=True)
class Manifest:
    """Everything in a checkpoint but the manifest itself."""

    step: int
    files: dict[str, FileRecord]
    tensors: dict[str, TensorRecord]


def step_directory(root: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies."""
    return root / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a directory's name says, or None for any other name."""
    match = _STEP.fullmatch(path.name)
    return int(match.group(1)) if match else None


def record_file(path: Path) -> FileRecord:
    """Size and SHA-256 of a file as it lies on disk."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_READ):
            digest.update(block)
    return FileRecord(path.stat().st_size, digest.hexdigest())


def record_tensor(tensor: Tensor, file: str) -> TensorRecord:
    """Shape, dtype and SHA-256 of a whole CPU tensor's value."""
    data = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    digest = hashlib.sha256(data.numpy().data).hexdigest()
    return TensorRecord(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), digest)


def commit(temporary: Path, final: Path, manifest: Manifest) -> None:
    """Make a complete temporary directory the checkpoint ``final``.

    At every moment of it, a step that had a valid checkpoint has one: killed, it leaves the one before or this one.
    """
    listed = asdict(manifest)
    write_json(temporary / MANIFEST, {"format": 1, "sha256": seal(listed), **listed})
    # The names of the files: without them on the disk, what is in the files is lost with the power.
    for directory in (*(path for path in temporary.rglob("*") if path.is_dir()), temporary):
        sync(directory)
    if not final.exists():
        os.replace(temporary, final)
    elif not exchange(temporary, final):
        set_aside(final, REPLACED)
        os.replace(temporary, final)
    sync(final.parent)
    for before in (temporary, *final.parent.glob(final.name + REPLACED + "*")):
        delete(before)


def delete(directory: Path) -> bool:
    """Remove a checkpoint, or what there is of one; renamed first, so that no part of it looks like one.

    Returns whether it went: a file system that will not let go of it is no reason to end a run.
    """
    try:
        if TEMPORARY not in directory.name:
            directory = set_aside(directory, TEMPORARY)
    except OSError:
        return False
    shutil.rmtree(directory, ignore_errors=True)
    return True


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a checkpoint. Raises ``CheckpointError`` when it is missing or damaged."""
    path = directory / MANIFEST
    try:
        found = read_object(path)
        if found["sha256"] != seal({name: found[name] for name in ("step", "files", "tensors")}):
            raise ValueError("it has changed since it was written (SHA-256 differs)")
        return Manifest(
            step=found["step"],
            files={name: FileRecord(**record) for name, record in found["files"].items()},
            tensors={
                name: TensorRecord(**{**record, "shape": tuple(record["shape"])})
                for name, record in found["tensors"].items()
            },
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{str(path)!r} is not a readable manifest: {error}") from error


def faults(
    directory: Path, part: int = 0, parts: int = 1, wanted: Callable[[str], bool] = lambda name: True
) -> list[str]:
    """What is wrong with a checkpoint: empty when every file has the size and checksum it was written with.

    Processes may share the reading: each looks at the files numbered ``part``, ``part + parts``, ... Of those, only
    files whose names are ``wanted`` are looked at.
    """
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name, expected in list(manifest.files.items())[part::parts]:
        fault = file_fault(directory / name, expected) if wanted(name) else ""
        if fault:
            found.append(f"{name} {fault}")
    return found


def is_checkpoint(directory: Path) -> bool:
    """Whether a directory has a manifest to go by, or by its name must have one."""
    return (directory / MANIFEST).exists() or step_of(directory.resolve()) is not None


def require_intact(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Raise ``CheckpointError`` if ``directory`` is a checkpoint and a ``wanted`` file is not as it was written.

    A directory that is none, of a Hugging Face model say, has no manifest to go by and is left to its reader.
    """
    if is_checkpoint(directory) and (found := faults(directory, wanted=wanted)):
        raise CheckpointError(f"checkpoint {str(directory)!r} is damaged: {found[0]}")


def is_small(name: str) -> bool:
    """Whether a file of a checkpoint holds no tensors: configuration, tokenizer, trainer state."""
    return not name.endswith(".safetensors")


def file_fault(path: Path, expected: FileRecord) -> str:
    """What is wrong with one file of a checkpoint, as the end of a sentence; empty when it is as it was written."""
    try:
        if not path.is_file():
            return "is missing"
        if path.stat().st_size != expected.size:
            return f"has {path.stat().st_size} bytes instead of {expected.size}"
        if record_file(path) != expected:
            return "has changed since it was written (SHA-256 differs)"
    except OSError as error:  # a bad sector, say: other processes wait for what this one finds
        return f"cannot be read: {error}"
    return ""
