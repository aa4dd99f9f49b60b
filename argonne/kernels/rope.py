"""Rotary position embedding, half-split as in Llama (arXiv 2104.09864)."""

from __future__ import annotations

from torch import Tensor

from argonne.kernels.dispatch import Backend, refuse, uses_triton
from argonne.kernels.rotation import rotated
from argonne.parallel.recomputed import recomputed


def apply_rope(
    x: Tensor, cos: Tensor, sin: Tensor, *, positions: Tensor | None = None, backend: Backend = "auto"
) -> Tensor:
    """Rotate each pair ``(x[i], x[i + rotated / 2])`` of a head by its position's angle; never in place.

    Args:
        x: ``[..., sequence, heads, head_dim]``, any strides.
        cos, sin: ``[positions, rotated / 2]``. Where ``rotated`` is less than ``head_dim``, the rest of each head
            passes through (partial rotary embedding).
        positions: ``[..., sequence]`` rows of the tables, integers; ``0, 1, 2, ...`` when left out.

    Returns:
        The shape and dtype of ``x``: the tables' wider dtype is used inside and never leaks out, so that
        attention sees its compute dtype.

    Raises:
        KernelError: the shapes do not fit, or the backend cannot compute them.
    """
    _check(x, cos, sin, positions)
    return recomputed(_triton if uses_triton(backend, x=x, cos=cos, sin=sin) else rotated, x, cos, sin, positions)


def apply_rope_packed(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_value_heads: int,
    *,
    positions: Tensor | None = None,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys rotated as by ``apply_rope``, and values, of rows that hold all three.

    One launch; backward writes the packed gradient at once, where splitting would copy it together.

    Args:
        qkv: ``[..., sequence, query_heads + 2 * key_value_heads, head_dim]``: queries, then keys, then values.
        cos, sin, positions: as for ``apply_rope``.
        key_value_heads: heads of the keys, and of the values.

    Returns:
        ``[..., sequence, its heads, head_dim]`` of queries, keys and values; the values are a view of ``qkv``.

    Raises:
        KernelError: as for ``apply_rope``.
    """
    _check(qkv, cos, sin, positions)
    heads = qkv.shape[-2]
    if not 0 < 2 * key_value_heads < heads:
        refuse("key_value_heads", key_value_heads, f"1 to {(heads - 1) // 2}")
    turn = _packed_triton if uses_triton(backend, qkv=qkv, cos=cos, sin=sin) else _packed
    return recomputed(turn, qkv, cos, sin, positions, key_value_heads)


def _triton(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> Tensor:
    from argonne.kernels.gpu.rope import call

    turned: Tensor = call(_flat(x), cos, sin, _flat_positions(positions), 1.0)
    return turned.view(x.shape)


def _packed_triton(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    from argonne.kernels.gpu.rope import call_packed

    found = call_packed(_flat(qkv), cos, sin, _flat_positions(positions), _parts(qkv, key_value_heads))
    query, key, value = found if qkv.dim() == 4 else (part.unflatten(0, qkv.shape[:-3]) for part in found)
    return query, key, value


def _packed(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, key_value_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    turned = rotated(qkv[..., :-key_value_heads, :], cos, sin, positions)
    query, key = turned.split(_parts(qkv, key_value_heads)[:2], dim=-2)
    return query, key, qkv[..., -key_value_heads:, :]


def _parts(qkv: Tensor, key_value_heads: int) -> list[int]:
    """The heads of queries, keys and values."""
    return [qkv.shape[-2] - 2 * key_value_heads, key_value_heads, key_value_heads]


def _check(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None) -> None:
    if x.dim() < 3:
        refuse("x", list(x.shape), "[..., sequence, heads, head_dim]")
    length, _, width = x.shape[-3:]
    if cos.dim() != 2 or 2 * cos.shape[1] > width or (positions is None and len(cos) < length):
        refuse("cos", list(cos.shape), f"[{length} or more positions, {width // 2} or fewer pairs]")
    if sin.shape != cos.shape:
        refuse("sin", list(sin.shape), f"{list(cos.shape)} as cos")
    if positions is not None and (positions.shape != x.shape[:-2] or positions.is_floating_point()):
        refuse("positions", f"{list(positions.shape)} {positions.dtype}", f"integers {list(x.shape[:-2])}")


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 4 else x.reshape(-1, *x.shape[-3:])


def _flat_positions(positions: Tensor | None) -> Tensor | None:
    return None if positions is None else positions.reshape(-1).contiguous()
