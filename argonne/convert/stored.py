"""A whole tensor that lies on a disk, and a model of such: all that conversion holds of a model at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.models import ModelConfig
from argonne.parallel.errors import ArgonneError


@dataclass(frozen=True)
class Stored:
    """One whole tensor, known by its shape and dtype, and read when it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    load: Callable[[], Tensor]
    """Reads it; each time anew."""

    @classmethod
    def of(cls, tensor: Tensor) -> Stored:
        """A tensor that is mapped from its file already, or in memory."""
        return cls(tuple(tensor.shape), tensor.dtype, lambda: tensor)

    @property
    def bytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize

    def transposed(self) -> Stored:
        """The matrix with rows and columns exchanged."""
        return Stored(self.shape[::-1], self.dtype, lambda: self.load().T.contiguous())

    def reshaped(self, shape: tuple[int, ...]) -> Stored:
        """The same values in another shape."""
        return Stored(shape, self.dtype, lambda: self.load().reshape(shape))

    def to(self, dtype: torch.dtype) -> Stored:
        """The same numbers in another dtype."""
        return self if dtype == self.dtype else Stored(self.shape, dtype, lambda: self.load().to(dtype))

    def part(self, dim: int, start: int, length: int) -> Stored:
        """Rows (columns) from ``start`` on."""
        shape = tuple(length if each == dim else size for each, size in enumerate(self.shape))
        return Stored(shape, self.dtype, lambda: self.load().narrow(dim, start, length).contiguous())


def concatenated(name: str, parts: Sequence[Stored], dim: int) -> Stored:
    """The parts of a tensor after each other along ``dim``; ``ArgonneError`` if they do not fit together."""
    first = parts[0]
    for part in parts:
        others = [shape[:dim] + shape[dim + 1 :] for shape in (first.shape, part.shape)]
        if len(first.shape) <= dim or others[0] != others[1] or part.dtype != first.dtype:
            raise ArgonneError(
                f"tensor {name!r} has parts that do not fit together: {list(first.shape)} in {first.dtype} and "
                f"{list(part.shape)} in {part.dtype}"
            )
    shape = (*first.shape[:dim], sum(part.shape[dim] for part in parts), *first.shape[dim + 1 :])
    return Stored(shape, first.dtype, lambda: torch.cat([part.load() for part in parts], dim))


@dataclass(frozen=True)
class Progress:
    """How far the training was that wrote the weights; None for what the file does not say."""

    step: int | None = None
    tokens: int | None = None
    data_position: Mapping[str, Any] | None = None
    said: Mapping[str, Any] | None = None
    """All that a file of the original says besides weights, unread; None for anything else."""


@dataclass(frozen=True)
class StoredModel:
    """A model on a disk, under Hugging Face's names, whatever it is called there."""

    tensors: Mapping[str, Stored]
    """By the names of ``LlamaForCausalLM``, say. A tied head is left out."""
    config: Mapping[str, Any]
    """What its ``config.json`` says."""
    shape: ModelConfig
    """The same as it is built here."""
    beside: Path | None = None
    """The directory of its tokenizer, if it has one."""
    form: str = ""
    """What it was opened from, in words."""
    progress: Progress = field(default_factory=Progress)

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return "lm_head.weight" not in self.tensors

    def in_dtype(self, dtype: torch.dtype | None) -> StoredModel:
        """The model with all of its weights in ``dtype``; None: as they are."""
        if dtype is None:
            return self
        name = str(dtype).removeprefix("torch.")
        told = {key: name for key in ("dtype", "torch_dtype") if key in self.config}
        tensors = {each: tensor.to(dtype) for each, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, config={**self.config, **told})
