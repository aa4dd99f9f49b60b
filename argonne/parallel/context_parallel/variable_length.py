"""Packed documents: where they end in a batch, and attention within each of them by flash attention on a GPU."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

FLASH_DTYPES = (torch.bfloat16, torch.float16)
FLASH_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class DocumentBounds:
    """The documents of a batch, laid end to end."""

    cumulative: Tensor
    """int32 ``[documents + 1]``: where each begins among the ``batch * sequence`` positions, and their number."""
    longest: int
    """Positions of the longest document, or more."""
    takes_groups: bool = False
    """Whether attention takes fewer key-value heads than queries; asked here, as the compiler cannot follow that."""


def document_bounds(documents: Tensor, compiled: bool = False) -> DocumentBounds:
    """Where the documents of ``[batch, sequence]`` numbers begin: at every change of number, and in every row.

    For ``compiled`` code they tell of any documents: how many there are may change, and the longest is a sequence.
    """
    changes = torch.ones_like(documents, dtype=torch.bool)
    changes[:, 1:] = documents[:, 1:] != documents[:, :-1]
    begins = changes.flatten().nonzero().flatten()
    cumulative = torch.cat([begins, begins.new_tensor([documents.numel()])])
    if compiled:
        cumulative = cumulative.int()
        torch._dynamo.maybe_mark_dynamic(cumulative, 0)
        return DocumentBounds(cumulative, documents.shape[1], _offers("enable_gqa"))
    return DocumentBounds(cumulative.int(), int(cumulative.diff().max()), _offers("enable_gqa"))


@functools.cache
def _offers(option: str) -> bool:
    """Whether this PyTorch has variable-length attention with ``option``: 2.11 has it without groups of heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return option in inspect.signature(varlen_attn).parameters


def can_vary_length(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether ``variable_length_attention`` can compute there; elsewhere documents are masked."""
    fits = dtype in FLASH_DTYPES and head_dim % 8 == 0 and head_dim <= 256
    if device.type != "cuda" or not fits or not _offers("window_size"):
        return False
    return torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY


def variable_length_attention(query: Tensor, key: Tensor, value: Tensor, bounds: DocumentBounds) -> Tensor:
    """Causal attention within each document, without a mask and without the work that a mask throws away.

    Args:
        query: ``[batch, heads, sequence, dim]``, bfloat16 or float16, on a GPU.
        key: ``[batch, kv_heads, sequence, dim]``.
        value: ``[batch, kv_heads, sequence, dim]``.

    Returns:
        ``[batch, heads, sequence, dim]``
    """
    from torch.nn.attention import varlen

    attend: Any = varlen.varlen_attn  # its types differ from release to release
    options = {"enable_gqa": query.shape[1] != key.shape[1]} if bounds.takes_groups else {}
    if not options:
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
    flat = [rearrange(x, "batch head sequence dim -> (batch sequence) head dim") for x in (query, key, value)]
    ends, longest = bounds.cumulative, bounds.longest
    out = attend(*flat, ends, ends, longest, longest, window_size=(-1, 0), **options)
    return rearrange(out, "(batch sequence) head dim -> batch head sequence dim", batch=len(query))
