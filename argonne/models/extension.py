"""Several new positions of each row behind what a cache has of it: where they lie, and what they see.

To layers they are neighbours in one sequence, one row's after another's, none of them padding: only attention, which
takes the rows apart, pads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Extension:
    """New positions of several rows, ``total`` of them in all."""

    rows: int
    widest: int
    """The most that a row has."""
    row: Tensor
    """``[total]`` whose each is."""
    column: Tensor
    """``[total]`` the number of each among those of its row."""
    positions: Tensor
    """``[total]`` where in its row each is."""
    mask: Tensor
    """``[rows, 1, widest, seen]``: what each sees of all that is kept."""

    @classmethod
    def of(cls, before: Sequence[int], counts: Sequence[int], device: torch.device) -> Extension:
        """Of rows that have so many positions ``before``, and so many new ones."""
        widest, seen = max(counts), max(own + new for own, new in zip(before, counts, strict=True))
        begins, lengths = (torch.tensor(list(each), device=device) for each in (before, counts))
        row = torch.arange(len(before), device=device).repeat_interleave(lengths)
        column = torch.arange(len(row), device=device) - (lengths.cumsum(0) - lengths)[row]
        last = begins[:, None] + torch.arange(widest, device=device)
        mask = torch.arange(seen, device=device) <= last[:, :, None]
        return cls(len(before), widest, row, column, begins[row] + column, mask[:, None])

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Put ``new`` ``[total, heads, dim]`` where it belongs in ``[rows, heads, positions, dim]``."""
        kept[self.row, :, self.positions] = new

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, used: Sequence[int] | None, pinned: bool = False
    ) -> Tensor:
        """Attention of each new position to all of its row up to itself.

        Args:
            query: ``[total, heads, dim]``.
            keys: ``[rows, kv heads, seen, dim]``, the new ones among them.
            values: likewise.
            used: the key-value head of each query head, where it is not that of runs of equally many.
            pinned: as of ``context_parallel_attention``.

        Returns:
            The shape of ``query``.
        """
        width = query.shape[-1]
        apart = query.new_zeros(self.rows, query.shape[1], self.widest, width)
        apart[self.row, :, self.column] = query
        if used is not None:
            keys, values = keys[:, used], values[:, used]
        padding = -width % (16 // query.element_size()) if pinned else 0
        if padding:  # as in context_parallel_attention
            apart, keys, values = (F.pad(x, (0, padding)) for x in (apart, keys, values))
        grouped = apart.shape[1] != keys.shape[1]
        found = F.scaled_dot_product_attention(apart, keys, values, self.mask, scale=width**-0.5, enable_gqa=grouped)
        return found[self.row, :, self.column, :width]
