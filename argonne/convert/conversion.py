"""From one form to another: opened, checked, and written beside its name before it has that name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError

from argonne.checkpoint.resume_state import RESUME_STATE, ResumeState
from argonne.convert.directories import write_beside, write_directory
from argonne.convert.distributed import write_distributed
from argonne.convert.gguf_file import check_gguf, require_gguf, write_gguf
from argonne.convert.names import argonne1_from_gpt2, argonne2_name
from argonne.convert.old_writing import write_old
from argonne.convert.opening import open_model
from argonne.convert.progress import resume_state
from argonne.convert.shapes import OldFileFlags, argonne1_words, argonne2_words
from argonne.convert.stored import StoredModel
from argonne.data import load_tokenizer, write_tokenizer
from argonne.data.errors import one_line
from argonne.files import TEMPORARY, make_directory, replacing, sync
from argonne.models import Argonne1Config, ArgonneConfig
from argonne.parallel.errors import ArgonneError

Form = Literal["huggingface", "dcp", "argonne2", "argonne1", "gguf"]


@dataclass(frozen=True)
class ConvertFlags:
    """What to make of a model."""

    to: Form = "huggingface"
    """A directory of huggingface or dcp, or a file of argonne2, argonne1 or gguf."""
    tokenizer_path: Path | None = None
    """Directory of the tokenizer to put beside the weights (gguf: in the file) [the one beside them]."""
    dtype: Literal["float32", "float16", "bfloat16", "float64"] | None = None
    """Dtype of the weights [as they are]."""
    resume_state: bool = False
    """Write resume_state.json too, of a file of the original: its step, tokens and place in the data, from which
    pretrain.py --init-from OUT --resume-state goes on (huggingface)."""
    old: OldFileFlags = field(default_factory=OldFileFlags)


def convert(source: Path, target: Path, flags: ConvertFlags) -> str:
    """Make ``target`` of the model at ``source``, and say in a line what was made.

    Raises:
        ArgonneError: there is something at ``target``, or no whole model at ``source``, or it has no such form.
    """
    if target.exists() or target.is_symlink():
        raise ArgonneError(f"{str(target)!r} exists; legal: a path where nothing is")
    if flags.tokenizer_path is not None and flags.to in ("argonne1", "argonne2"):
        raise ArgonneError(
            f"tokenizer_path={str(flags.tokenizer_path)!r} has no effect: the original's files have none"
        )
    if flags.resume_state and flags.to != "huggingface":
        raise ArgonneError(f"resume_state=True has no effect with --to {flags.to}; legal: --to huggingface")
    with ExitStack() as stack:
        model = open_model(source, flags.old, stack)
        state = _state(source, model) if flags.resume_state else None
        model = model.in_dtype(None if flags.dtype is None else getattr(torch, flags.dtype))
        write = _WRITERS[flags.to](model, flags)
        try:
            make_directory(target.absolute().parent)
            with (_new_directory if flags.to in ("huggingface", "dcp") else replacing)(target) as temporary:
                write(temporary)
                if state is not None:
                    state.write(temporary)
            sync(target.absolute().parent)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch's writer raises the second
            raise ArgonneError(f"{str(target)!r} could not be written: {one_line(error)}") from error
    count = sum(math.prod(tensor.shape) for tensor in model.tensors.values())
    kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in model.tensors.values()}))
    line = f"{source} ({model.form}) -> {target} ({flags.to}): {count:,} parameters in {kinds}"
    return line if state is None else f"{line}; {RESUME_STATE}: {state}"


def _state(source: Path, model: StoredModel) -> ResumeState:
    try:
        return resume_state(model)
    except ArgonneError as error:
        raise ArgonneError(f"{str(source)!r}: {error}") from None


def _huggingface(model: StoredModel, flags: ConvertFlags) -> Callable[[Path], None]:
    model, tokenizer = _with_tokenizer(model, flags)
    return lambda directory: write_directory(model, directory, tokenizer)


def _dcp(model: StoredModel, flags: ConvertFlags) -> Callable[[Path], None]:
    model, tokenizer = _with_tokenizer(model, flags)

    def write(directory: Path) -> None:
        write_distributed(model.tensors, directory)
        write_beside(model, directory, tokenizer)

    return write


def _argonne2(model: StoredModel, flags: ConvertFlags) -> Callable[[Path], None]:
    if not isinstance(model.shape, ArgonneConfig) or model.shape.family != "llama":
        raise _no_such("argonne2", model, "llama")
    told = replace(model, config=argonne2_words(model.shape))
    tensors = {argonne2_name(name): tensor for name, tensor in model.tensors.items()}
    tied = ("lm_head.weight", "embed_tokens.weight") if model.is_tied else None
    return lambda path: write_old(tensors, tied, told, path)


def _argonne1(model: StoredModel, flags: ConvertFlags) -> Callable[[Path], None]:
    if not isinstance(model.shape, Argonne1Config):
        raise _no_such("argonne1", model, "gpt2")
    told = replace(model, config=argonne1_words(model.shape))
    tensors = argonne1_from_gpt2(model.tensors)
    tied = ("head.weight", "token_embedding.weight") if model.is_tied else None
    return lambda path: write_old(tensors, tied, told, path)


def _gguf(model: StoredModel, flags: ConvertFlags) -> Callable[[Path], None]:
    require_gguf()
    check_gguf(model)
    directory = flags.tokenizer_path or model.beside
    if directory is None:
        raise ArgonneError("--to gguf needs a tokenizer, and there is none beside the weights; legal: --tokenizer-path")
    tokenizer = load_tokenizer(directory)
    return lambda path: write_gguf(model, tokenizer, path, path.name.removesuffix(TEMPORARY).removesuffix(".gguf"))


_WRITERS: dict[Form, Callable[[StoredModel, ConvertFlags], Callable[[Path], None]]] = {
    "huggingface": _huggingface,
    "dcp": _dcp,
    "argonne2": _argonne2,
    "argonne1": _argonne1,
    "gguf": _gguf,
}


def _no_such(form: str, model: StoredModel, kind: str) -> ArgonneError:
    return ArgonneError(f"model_type={model.shape.family!r} has no place in a file of {form}; legal: {kind!r}")


def _with_tokenizer(model: StoredModel, flags: ConvertFlags) -> tuple[StoredModel, Callable[[Path], None] | None]:
    """The model with the ids of the tokenizer that the flags name, and what writes that."""
    if flags.tokenizer_path is None:
        return model, None
    tokenizer = load_tokenizer(flags.tokenizer_path)
    size, rows = max(tokenizer.get_vocab().values()) + 1, model.shape.vocab_size
    if size > rows:
        raise ArgonneError(f"tokenizer_path={str(flags.tokenizer_path)!r} has {size} tokens; legal: {rows} at most")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}

    def write(directory: Path) -> None:
        write_tokenizer(tokenizer, directory)

    return replace(model, config={**model.config, **ids}), write


@contextmanager
def _new_directory(target: Path) -> Iterator[Path]:
    """A directory to write to, which then becomes ``target``; if the writing fails, nothing is left of it."""
    temporary = target.with_name(target.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        sync(temporary)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
