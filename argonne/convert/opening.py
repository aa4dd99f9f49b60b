"""Opening a model in whatever form it lies on the disk."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from argonne.checkpoint import checkpoints, is_checkpoint, load_trainer, trusted
from argonne.checkpoint.format import TRAINER
from argonne.convert.directories import read_config, read_weights
from argonne.convert.distributed import is_distributed, read_distributed
from argonne.convert.gpt2 import complete, gpt2_config, gpt2_shapes, with_full_names
from argonne.convert.names import argonne1_from_gpt2, argonne2_name, gpt2_from_argonne1, llama_from_argonne2
from argonne.convert.old_files import EMBEDDING, OldFile, read_old
from argonne.convert.pickles import load_pickle
from argonne.convert.shapes import (
    SPECIAL,
    OldFileFlags,
    llama_config,
    llama_shapes,
    require_tensors,
    without_tied_head,
)
from argonne.convert.stored import Progress, Stored, StoredModel
from argonne.models import from_huggingface, to_huggingface
from argonne.parallel import ProcessGroups
from argonne.parallel.errors import ArgonneError

OLD_TYPES = ("argonne", "argonne2")
"""``model_type`` of the directories that the original's last save wrote: 1.x and 2.x."""


def open_model(path: Path, flags: OldFileFlags, stack: ExitStack) -> StoredModel:
    """The model at ``path``: an old file, a Hugging Face directory, a distributed checkpoint, or a run here.

    Args:
        path: a file or a directory.
        flags: what an old file does not say of its shape; nothing else needs them.
        stack: closes the files that stay open.

    Raises:
        ArgonneError: there is no such thing, or it is damaged, or not all there.
    """
    if not path.exists():
        raise ArgonneError(f"{str(path)!r} does not exist")
    if path.is_file():
        if path.suffix in (".safetensors", ".gguf"):
            raise ArgonneError(f"{str(path)!r} is one file of a model; legal: a directory, or a file of torch.save")
        try:
            return _from_old(read_old(load_pickle(path), flags.take_first_rank), flags)
        except ArgonneError as error:
            raise _about(path, error) from None
    form = "Hugging Face directory"
    if is_checkpoint(path) or checkpoints(path):
        path, reports = trusted(path, ProcessGroups.single())
        form = "; ".join([f"checkpoint {path.name}", *reports])
    try:
        if (path / "config.json").exists() and read_config(path).get("model_type") in OLD_TYPES:
            return _from_old_directory(path, flags, stack)
        if flags != OldFileFlags():
            name, value = next((name, value) for name, value in asdict(flags).items() if value not in (None, False))
            raise ArgonneError(f"{name}={str(value)!r} has no effect: its config.json says it; legal: leave it out")
        if is_distributed(path):
            return _from_huggingface(path, read_distributed(path), "distributed checkpoint")
        return _from_huggingface(path, read_weights(path, stack), form)
    except ArgonneError as error:
        raise _about(path, error) from None


def _about(path: Path, error: ArgonneError) -> ArgonneError:
    """The error, beginning with what it is about."""
    return error if str(path) in str(error) else ArgonneError(f"{str(path)!r}: {error}")


def _from_old(old: OldFile, flags: OldFileFlags) -> StoredModel:
    told = flags.told(old.config)
    if old.version == "argonne1":
        tensors = {name: tensor for name, tensor in old.tensors.items() if not name.endswith(".attn.mask")}
        tensors = without_tied_head(tensors, "head.weight", EMBEDDING["argonne1"])
        gpt2 = gpt2_config(tensors, told)
        wanted = {
            name: Stored(shape, torch.float32, lambda: torch.empty(0)) for name, shape in gpt2_shapes(gpt2).items()
        }
        require_tensors(tensors, {name: each.shape for name, each in argonne1_from_gpt2(wanted).items()})
        return StoredModel(gpt2_from_argonne1(tensors), gpt2, progress=old.progress, form="file of Argonne 1.x")
    tensors = without_tied_head(old.tensors, "lm_head.weight", EMBEDDING["argonne2"])
    shape = llama_config(tensors, told)
    require_tensors(tensors, {argonne2_name(name): each for name, each in llama_shapes(shape).items()})
    dtype = str(tensors[EMBEDDING["argonne2"]].dtype).removeprefix("torch.")
    config = to_huggingface(shape, SPECIAL, dtype)
    form = "file of Argonne 2.x"
    return StoredModel(llama_from_argonne2(tensors), config, shape, progress=old.progress, form=form)


def _from_old_directory(path: Path, flags: OldFileFlags, stack: ExitStack) -> StoredModel:
    old = replace(read_old(read_weights(path, stack)), config=read_config(path))
    version = old.version.removeprefix("argonne")
    return replace(_from_old(old, flags), beside=path, form=f"directory of Argonne {version}.x")


def _from_huggingface(path: Path, tensors: dict[str, Stored], form: str) -> StoredModel:
    config = read_config(path)
    if config.get("model_type") == "gpt2":
        tensors = without_tied_head(with_full_names(tensors), "lm_head.weight", "transformer.wte.weight")
        config["tie_word_embeddings"] = "lm_head.weight" not in tensors
        config = complete(config)
        require_tensors(tensors, gpt2_shapes(config))
        return StoredModel(tensors, config, beside=path, form=form, progress=_progress(path))
    shape = from_huggingface(path)
    if shape.tie_word_embeddings:
        tensors = without_tied_head(tensors, "lm_head.weight", "model.embed_tokens.weight")
    require_tensors(tensors, llama_shapes(shape))
    return StoredModel(tensors, config, shape, beside=path, form=form, progress=_progress(path))


def _progress(path: Path) -> Progress:
    """How far a checkpoint of a run here says it is."""
    if not (path / TRAINER).exists():
        return Progress()
    saved = load_trainer(path)
    step, tokens = (saved.get(name) for name in ("step", "tokens"))
    return Progress(step if type(step) is int else None, tokens if type(tokens) is int else None)
