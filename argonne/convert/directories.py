"""Hugging Face directories: opened by the slice that is wanted, and written in files of about a gibibyte."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from argonne.checkpoint.format import INDEX, MANIFEST, TensorRecord
from argonne.checkpoint.load import tensor_files
from argonne.checkpoint.save import file_groups, write_index
from argonne.convert.pickles import load_pickle
from argonne.convert.stored import Stored, StoredModel
from argonne.files import read_object, sync, write_json
from argonne.parallel.errors import ArgonneError

PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
# What a directory says of its tokenizer and of generating; all else in it is weights, or about the training.
BESIDE = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken"),
    *("generation_config.json", "chat_template*", "additional_chat_templates"),
)
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a directory. Raises ``ArgonneError`` when it is not there, or is none."""
    try:
        return read_object(directory / "config.json")
    except (OSError, ValueError) as error:
        raise ArgonneError(f"{str(directory / 'config.json')!r} cannot be read: {error}") from error


def read_weights(directory: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every weight in a directory, from safetensors, or from ``pytorch_model.bin`` where there are none.

    Args:
        directory: of Hugging Face, or a checkpoint here.
        stack: closes the files.

    Raises:
        ArgonneError: there are no weights, or a file of them is missing or damaged.
    """
    if not any((directory / name).exists() for name in (MANIFEST, INDEX, "model.safetensors")):
        return {name: Stored.of(tensor) for name, tensor in _pickled(directory).items()}
    files, opened = tensor_files(directory), {}
    found: dict[str, Stored] = {}
    for name, file in files.items():
        if file.startswith("optimizer-"):
            continue
        try:
            if file not in opened:
                opened[file] = stack.enter_context(safe_open(directory / file, framework="pt"))
            stored = opened[file].get_slice(name)
            kind, shape = stored.get_dtype(), tuple(stored.get_shape())
        except (OSError, SafetensorError) as error:
            raise ArgonneError(f"{str(directory / file)!r} cannot be read: {error}") from error
        if kind not in _DTYPES:
            raise ArgonneError(f"tensor {name!r} in {file!r} is of dtype {kind}; legal: {', '.join(_DTYPES)}")
        found[name] = Stored(shape, getattr(torch, _DTYPES[kind]), _reader(opened[file], name))
    return found


def write_directory(model: StoredModel, directory: Path, write_tokenizer: Callable[[Path], None] | None) -> None:
    """Write ``config.json``, weights, and what lies beside them; ``write_tokenizer`` writes the latter instead."""
    records: dict[str, TensorRecord] = {}
    groups = list(file_groups({name: tensor.bytes for name, tensor in model.tensors.items()}))
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        # Copied: what two names share in a file, safetensors would refuse.
        whole = {name: model.tensors[name].load().clone(memory_format=torch.contiguous_format) for name in names}
        save_file(whole, directory / file, metadata={"format": "pt"})
        for name, tensor in whole.items():
            records[name] = TensorRecord(file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), "")
    write_index(directory, records)
    write_beside(model, directory, write_tokenizer)


def write_beside(model: StoredModel, directory: Path, write_tokenizer: Callable[[Path], None] | None) -> None:
    """``config.json`` and the tokenizer's files; then all that the directory has is on the disk."""
    write_json(directory / "config.json", dict(model.config))
    if write_tokenizer is not None:
        write_tokenizer(directory)
    elif model.beside is not None:
        for path in sorted({path for pattern in BESIDE for path in model.beside.glob(pattern)}):
            if path.is_dir():
                shutil.copytree(path, directory / path.name)
            else:
                shutil.copyfile(path, directory / path.name)
    for path in directory.rglob("*"):
        if path.is_file():
            sync(path)


def _reader(file: Any, name: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(name)


def _pickled(directory: Path) -> Mapping[str, Tensor]:
    """The tensors of the pickled form of a directory."""
    index = directory / PICKLED_INDEX
    try:
        files = set(dict(read_object(index)["weight_map"]).values()) if index.exists() else {PICKLED}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArgonneError(f"{str(index)!r} cannot be read: {error}") from error
    if not index.exists() and not (directory / PICKLED).exists():
        raise ArgonneError(f"{str(directory)!r} holds no weights: neither safetensors nor {PICKLED}")
    found: dict[str, Tensor] = {}
    for file in sorted(map(str, files)):
        loaded = load_pickle(directory / file)
        if not isinstance(loaded, Mapping) or not all(isinstance(each, Tensor) for each in loaded.values()):
            raise ArgonneError(f"{str(directory / file)!r} is no state dict; legal: tensors by name")
        found |= loaded
    return found
