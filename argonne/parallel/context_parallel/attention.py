"""Context parallelism: the processes of an axis share every sequence, and causal attention over it stays exact.

Everything but attention treats positions one by one, so a rank computes its share of them alone. For attention
it gathers the keys and values of all ranks (Llama 3, arXiv 2407.21783, section 3.3.2): under grouped-query
attention they are far smaller than the queries, and any mask can be applied as it would be on one rank.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.isolation import unobserved
from argonne.parallel.communication.regions import gather_from_sequence_region
from argonne.parallel.context_parallel.variable_length import DocumentBounds, variable_length_attention
from argonne.parallel.errors import ArgonneError, LayoutError

_VECTOR_BYTES = 16  # a row that begins at a multiple of it is multiplied as the first is, on a CPU


def context_positions(sequence: int, axis: Axis) -> Tensor:
    """The positions of a sequence that this rank holds: int64 ``[sequence / axis.size]``, in the order it holds them.

    The sequence is cut into ``2 * axis.size`` equal chunks, and rank r has chunks r and ``2 * axis.size - 1 - r``:
    so every rank has the same number of pairs of a query and a key that it may see. With one run of the sequence
    each, the last rank would have nearly twice the average, and the others would wait for it.

    Raises:
        LayoutError: the chunks cannot be equal.
    """
    return torch.cat([torch.arange(chunk.start, chunk.stop) for chunk in _held_chunks(sequence, axis)])


def shard_sequence(x: Tensor, axis: Axis, dim: int = 1) -> Tensor:
    """This rank's positions of a tensor that every rank has whole: ids, targets, rotary tables.

    Its backward, if there is one, does not sum over the ranks.

    Raises:
        LayoutError: dimension ``dim`` cannot be shared out.
    """
    if axis.size == 1:
        return x
    # Narrowed rather than indexed: no list of positions has to reach the tensor's device.
    return torch.cat([x.narrow(dim, chunk.start, len(chunk)) for chunk in _held_chunks(x.shape[dim], axis)], dim)


def context_parallel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: Axis,
    documents: Tensor | None = None,
    bounds: DocumentBounds | None = None,
    *,
    pinned: bool = False,
) -> Tensor:
    """Causal attention over sequences of which each rank of ``axis`` holds ``context_positions``.

    One all-gather of keys and values in forward, one reduce-scatter of their gradients in backward, both in their
    dtype. Over an axis of one process, without documents, this is ``F.scaled_dot_product_attention``.

    Args:
        query: ``[batch, heads, local, dim]``; ``heads`` is a multiple of ``kv_heads``.
        key: ``[batch, kv_heads, local, dim]``.
        value: ``[batch, kv_heads, local, dim]``.
        axis: the context axis; ``local`` is ``sequence / axis.size``.
        documents: integers ``[batch, sequence]``, the same on every rank, of the whole sequence. Positions
            with different numbers do not see each other. Without them flash attention can be used on a GPU.
        bounds: of the same documents, where ``can_vary_length``: with them too, over an axis of one process.
        pinned: give each head the same bits whichever heads lie beside it. A CPU's products have others for rows that
            begin between two vectors: heads that are no whole number of vectors are padded with zeros.

    Returns:
        ``[batch, heads, local, dim]``

    Raises:
        LayoutError: the sequence cannot be shared out over the axis.
        ArgonneError: ``documents`` is not of the whole sequence, or the heads cannot be grouped.
    """
    batch, heads, local, _ = query.shape
    if heads % key.shape[1]:
        raise ArgonneError(f"{heads} query heads cannot share {key.shape[1]} key-value heads; legal: a multiple")
    sequence = local * axis.size
    if documents is not None and documents.shape != (batch, sequence):
        raise ArgonneError(f"documents has shape {list(documents.shape)}; legal: [{batch}, {sequence}], all positions")
    padding = -query.shape[-1] % (_VECTOR_BYTES // query.element_size()) if pinned else 0
    if not padding:
        return _attention(query, key, value, axis, documents, bounds)
    width = query.shape[-1]
    query, key, value = (F.pad(x, (0, padding)) for x in (query, key, value))
    return _attention(query, key, value, axis, documents, bounds, width**-0.5)[..., :width]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    axis: Axis,
    documents: Tensor | None,
    bounds: DocumentBounds | None,
    scale: float | None = None,
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    if axis.size == 1 and bounds is not None:
        return variable_length_attention(query, key, value, bounds)
    if axis.size == 1 and documents is None:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)
    sequence = query.shape[2] * axis.size
    chunks = _held_chunks(sequence, axis)
    key, value = _gather_in_order(key, value, axis)
    outputs = []
    for own, chunk in zip(query.split([len(chunk) for chunk in chunks], dim=2), chunks, strict=True):
        # What comes after the chunk is left out of the product, not masked in it.
        seen_key, seen_value = key[:, :, : chunk.stop], value[:, :, : chunk.stop]
        mask = _mask(chunk, documents, query.device)
        attended = F.scaled_dot_product_attention(own, seen_key, seen_value, mask, scale=scale, enable_gqa=grouped)
        outputs.append(attended)
    return torch.cat(outputs, dim=2)


def _held_chunks(sequence: int, axis: Axis) -> list[range]:
    """The runs of positions that this rank holds, in the order in which it holds them."""
    if axis.size == 1:
        return [range(sequence)]
    count = 2 * axis.size
    if sequence % count:
        raise LayoutError(
            f"block_size={sequence} cannot be shared out over context_parallel={axis.size} in equal chunks; "
            f"legal: a multiple of 2 x context_parallel = {count}"
        )
    length = sequence // count
    return [range(i * length, (i + 1) * length) for i in (axis.rank, count - 1 - axis.rank)]


def _gather_in_order(key: Tensor, value: Tensor, axis: Axis) -> tuple[Tensor, Tensor]:
    """``[batch, kv_heads, local, dim]`` of every rank -> ``[batch, kv_heads, sequence, dim]`` in natural order."""
    if axis.size == 1:
        return key, value
    ranks = gather_from_sequence_region(torch.stack([key, value]), axis)
    early, late = ranks.chunk(2, dim=3)
    # One copy puts the chunks where they belong: the early ones ascend with the rank, the late ones descend.
    in_order = torch.cat([*early.chunk(axis.size), *reversed(late.chunk(axis.size))], dim=3)
    key, value = in_order.unbind(0)
    return key, value


def _mask(chunk: range, documents: Tensor | None, device: torch.device) -> Tensor:
    """What the queries of ``chunk`` may see of the positions before its end: themselves and what is earlier.

    With ``documents`` a boolean ``[batch, 1, len(chunk), chunk.stop]``.
    """
    if documents is None:
        if torch.compiler.is_compiling():  # which cannot follow what is below
            everything = torch.ones(len(chunk), chunk.stop, dtype=torch.bool, device=device)
            return everything.tril(diagonal=chunk.start)
        from torch.nn.attention.bias import causal_lower_right  # brings the compiler, which takes seconds to import

        # The last query sees the last key. Never materialised where flash attention takes it.
        with unobserved():
            return causal_lower_right(len(chunk), chunk.stop)
    seen = documents[:, : chunk.stop]
    same = rearrange(seen[:, chunk.start :], "batch query -> batch 1 query 1") == rearrange(
        seen, "batch key -> batch 1 1 key"
    )
    return same.tril(diagonal=chunk.start)
