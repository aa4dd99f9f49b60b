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
from argonne.convert.names import (
    argonne1_from_gpt2,
    argonne2_name,
    gpt2_from_argonne1,
    llama_from_argonne2,
    with_full_names,
)
from argonne.convert.old_files import EMBEDDING, OldFile, read_old
from argonne.convert.pickles import load_pickle
from argonne.convert.shapes import (
    SPECIAL,
    OldFileFlags,
    argonne1_shape,
    argonne2_shape,
    require_tensors,
    tensor_shapes,
    without_tied_head,
)
from argonne.convert.stored import Progress, Stored, StoredModel
from argonne.models import Argonne1Config, ModelConfig, from_huggingface, to_huggingface
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
    """The model of an old file: checked under the names that its owner knows, then renamed."""
    told, embedding = flags.told(old.config), EMBEDDING[old.version]
    dtype = str(old.tensors[embedding].dtype).removeprefix("torch.")
    if old.version == "argonne1":
        found = {name: tensor for name, tensor in old.tensors.items() if not name.endswith(".attn.mask")}
        found = without_tied_head(found, "head.weight", embedding)
        shape: ModelConfig = argonne1_shape(found, told)
        wanted = {
            name: Stored(size, torch.float32, lambda: torch.empty(0)) for name, size in tensor_shapes(shape).items()
        }
        require_tensors(found, {name: each.shape for name, each in argonne1_from_gpt2(wanted).items()})
        tensors, form = gpt2_from_argonne1(found), "file of Argonne 1.x"
    else:
        found = without_tied_head(old.tensors, "lm_head.weight", embedding)
        shape = argonne2_shape(found, told)
        require_tensors(found, {argonne2_name(name): size for name, size in tensor_shapes(shape).items()})
        tensors, form = llama_from_argonne2(found), "file of Argonne 2.x"
    return StoredModel(tensors, to_huggingface(shape, SPECIAL, dtype), shape, progress=old.progress, form=form)


def _from_old_directory(path: Path, flags: OldFileFlags, stack: ExitStack) -> StoredModel:
    old = replace(read_old(read_weights(path, stack)), config=read_config(path))
    version = old.version.removeprefix("argonne")
    return replace(_from_old(old, flags), beside=path, form=f"directory of Argonne {version}.x")


def _from_huggingface(path: Path, tensors: dict[str, Stored], form: str) -> StoredModel:
    shape = from_huggingface(path)
    if isinstance(shape, Argonne1Config):
        tensors = with_full_names(tensors)
    if shape.tie_word_embeddings:
        embedding = "transformer.wte.weight" if isinstance(shape, Argonne1Config) else "model.embed_tokens.weight"
        tensors = without_tied_head(tensors, "lm_head.weight", embedding)
    require_tensors(tensors, tensor_shapes(shape))
    return StoredModel(tensors, read_config(path), shape, beside=path, form=form, progress=_progress(path))


def _progress(path: Path) -> Progress:
    """How far a checkpoint of a run here says it is."""
    if not (path / TRAINER).exists():
        return Progress()
    saved = load_trainer(path)
    step, tokens = (saved.get(name) for name in ("step", "tokens"))
    return Progress(step if type(step) is int else None, tokens if type(tokens) is int else None)
