"""PyTorch's distributed checkpoints (DCP): one tensor at a time by name, ``config.json`` beside them."""

from __future__ import annotations

import io
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from argonne.convert.stored import Stored
from argonne.data.errors import one_line
from argonne.parallel.errors import ArgonneError

METADATA = ".metadata"

# What the description of a checkpoint is made of. It is a pickle, which PyTorch reads whatever it asks for.
_MAY_NAME = {
    *(("torch.distributed.checkpoint.metadata", name) for name in dir(dcp.metadata)),
    *(("torch.distributed.checkpoint.filesystem", name) for name in ("_StorageInfo", "_StoragePrefix")),
    *(("torch.serialization", name) for name in ("_get_layout",)),
    *(("torch", name) for name in dir(torch) if isinstance(getattr(torch, name), torch.dtype | torch.layout)),
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
    ("builtins", "set"),
    ("builtins", "slice"),
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MAY_NAME:
            raise ValueError(f"it asks for {module + '.' + name!r}, which a checkpoint does not need")
        return super().find_class(module, name)


class _Reader(dcp.FileSystemReader):
    """The library's reader, with a description that was read without running what is in it."""

    def __init__(self, directory: Path, metadata: Metadata) -> None:
        super().__init__(str(directory))
        self._metadata = metadata

    def read_metadata(self, *arguments: Any, **options: Any) -> Metadata:
        return self._metadata


class _Planner(DefaultSavePlanner):
    """Reads each tensor when it is about to be written."""

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        super().__init__(flatten_state_dict=False)
        self._tensors = tensors

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._tensors[index.fqn].load().contiguous()


def is_distributed(directory: Path) -> bool:
    """Whether a directory is a distributed checkpoint."""
    return (directory / METADATA).is_file()


def read_distributed(directory: Path) -> dict[str, Stored]:
    """The tensors of a distributed checkpoint; what else it has, an optimizer's state say, is left alone.

    Where the model was one entry of what was saved, ``model.`` comes off its tensors' names.

    Raises:
        ArgonneError: its description cannot be read, or asks for more than one needs.
    """
    path = directory / METADATA
    try:
        metadata = _Unpickler(io.BytesIO(path.read_bytes())).load()
        if not isinstance(metadata, Metadata):
            raise ValueError(f"it holds a {type(metadata).__name__}")
        if getattr(metadata, "storage_meta", None) is None:
            metadata.storage_meta = StorageMeta()
        described = {n: d for n, d in metadata.state_dict_metadata.items() if isinstance(d, TensorStorageMetadata)}
        reader = _Reader(directory, metadata)
        for name, each in described.items():
            if sum(math.prod(chunk.sizes) for chunk in each.chunks) != math.prod(each.size):
                raise ValueError(f"the parts of tensor {name!r} do not make up the whole")
        found = {
            name: Stored(tuple(each.size), each.properties.dtype, _loader(reader, directory, name, each))
            for name, each in described.items()
        }
    except Exception as error:  # a damaged pickle may raise anything
        raise ArgonneError(f"{str(path)!r} cannot be read: {one_line(error)}") from error
    nested = ("model.model.", "model.lm_head.", "model.transformer.")
    if any(name.startswith(nested) for name in found):
        return {name.removeprefix("model."): tensor for name, tensor in found.items() if name.startswith(nested)}
    return {name: tensor for name, tensor in found.items() if not name.startswith("optim")}


def write_distributed(tensors: Mapping[str, Stored], directory: Path) -> None:
    """Write a distributed checkpoint: a file of its own for each tensor, and no more than that in memory."""
    empty = {n: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for n, tensor in tensors.items()}
    writer = dcp.FileSystemWriter(str(directory), single_file_per_rank=False, sync_files=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.save(empty, storage_writer=writer, planner=_Planner(tensors), no_dist=True)


def _loader(reader: _Reader, directory: Path, name: str, described: TensorStorageMetadata) -> Callable[[], Tensor]:
    def load() -> Tensor:
        whole = torch.empty(described.size, dtype=described.properties.dtype)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                dcp.load({name: whole}, storage_reader=reader, no_dist=True)
        except BaseException as error:  # the library raises what is none of Python's usual errors
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise ArgonneError(f"tensor {name!r} in {str(directory)!r} cannot be read: {_cause(error)}") from error
        return whole

    return load


def _cause(error: BaseException) -> str:
    """What lies behind a ``CheckpointException``, which tells each rank's error with its traceback."""
    failures = getattr(error, "failures", None)
    first = next(iter(failures.values()))[0] if failures else error
    return one_line(first)
