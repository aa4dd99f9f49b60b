"""Which backend computes a kernel: the readable torch reference, or the Triton program."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, NoReturn

import torch
from torch import Tensor

from argonne.parallel.errors import ArgonneError

Backend = Literal["auto", "torch", "triton"]
"""``auto`` is Triton for CUDA tensors of a dtype that it supports, torch for all others."""

BACKENDS = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels read and write; they compute in float32."""

_HAS_TRITON = importlib.util.find_spec("triton") is not None
"""Found once: the compiler cannot follow a search for packages."""


class KernelError(ArgonneError, ValueError):
    """An argument that a kernel does not support; the message names it, its value and what is accepted."""


def uses_triton(backend: Backend, **tensors: Tensor | None) -> bool:
    """Whether Triton computes this call.

    Raises:
        KernelError: ``triton`` was asked for, and a tensor, named by its keyword, is not for it.
    """
    if backend == "torch":
        return False
    if backend == "auto":  # at every call: a loop takes half of what a generator does
        for tensor in tensors.values():
            if tensor is not None and not (tensor.is_cuda and tensor.dtype in DTYPES):
                return False
        return _HAS_TRITON
    if backend not in BACKENDS:
        raise KernelError(f"backend={backend!r} is not known; legal: {', '.join(BACKENDS)}")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not (tensor.is_cuda or interprets()):
            raise KernelError(f"{name} is on {tensor.device}; backend='triton' accepts cuda (or TRITON_INTERPRET=1)")
        if tensor.dtype not in DTYPES:
            raise KernelError(f"{name} is {tensor.dtype}; backend='triton' accepts {', '.join(map(str, DTYPES))}")
    if not _HAS_TRITON:
        raise KernelError("backend='triton' needs the package triton, which is not installed; legal here: auto, torch")
    return True


def interprets() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def refuse(name: str, value: object, legal: str) -> NoReturn:
    """Raise ``KernelError`` in the words of all kernels."""
    raise KernelError(f"{name}={value} is not supported; legal: {legal}")
