"""Dropout that drops the same elements at every layout: which, is a function of seed, step, site and place alone.

The generator is counter-based, as that of initial values: a word is the SplitMix64 hash (Steele et al. 2014) of a key
and a counter, made of plain 64-bit integer operations, so that a GPU draws what a CPU does. Every row of activations
has a key, made of the seed, the step, the number of its sequence and its position; each site (a module's name, a head)
makes another of it; and from there the elements of the row are counted. Two of them share a word of 64 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from argonne.parallel.errors import ArgonneError
from argonne.parallel.legal import require_share
from argonne.parallel.recomputed import recomputed
from argonne.parallel.sharding.initialisation import key_of
from argonne.parallel.sizes_only import turns

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = (30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))
_LAST_SHIFT = 31
_CHUNK = {"cpu": 1 << 16, "cuda": 1 << 24}  # words made at a time: what stays in a cache, and what fills a GPU


@dataclass(frozen=True)
class Draws:
    """What the random numbers of a training step depend on besides their site and place: the same at every layout."""

    seed: int
    step: int
    """The step that they are drawn in."""
    samples: Tensor
    """``[batch]`` or ``[micro-batches, batch]`` int64: the global numbers of the sequences."""

    def micro_batch(self, number: int) -> Draws:
        """Those of one micro-batch."""
        return replace(self, samples=self.samples[number])

    @property
    def key(self) -> int:
        """Of seed and step together: a 64-bit number, signed."""
        return _signed(key_of(self.seed, f"step {self.step}"))


def row_keys(key: int, samples: Tensor, positions: Tensor) -> Tensor:
    """The keys ``[batch, positions]`` of rows of sequences ``samples`` ``[batch]`` at ``positions`` ``[positions]``.

    ``key`` is that of seed and step. All are int64, on the device of ``positions``.
    """
    of_samples = _mixed(samples.to(positions.device) * _GOLDEN + key)
    return _mixed(of_samples[:, None] + (positions + 1) * _GOLDEN)


def kept(keys: Tensor, columns: int, probability: float) -> Tensor:
    """Which elements stay: bool ``[*keys.shape, columns]``, of which each is dropped with ``probability``."""
    words = -(-columns // 2)
    threshold = round(probability * 2**32) - 2**31
    counters = (torch.arange(words, device=keys.device) + 1) * _GOLDEN
    rows = keys.reshape(-1)
    found = torch.empty(len(rows), columns, dtype=torch.bool, device=keys.device)
    at_once = max(1, _CHUNK.get(keys.device.type, 1 << 20) // words)
    for begin in turns(range(0, len(rows), at_once)):
        drawn = _mixed(rows[begin : begin + at_once, None] + counters).view(torch.int32)
        torch.ge(drawn[:, :columns], threshold, out=found[begin : begin + at_once])
    return found.view(*keys.shape, columns)


class Dropout(nn.Module):
    """Elements of activations are zeroed with ``probability``, the others divided by what is left of 1.

    Args:
        probability: from 0 to less than 1.
        site: what it is called in the whole model: no two draw alike.

    Raises:
        ArgonneError: the probability is none, or nothing would stay.
    """

    def __init__(self, probability: float, site: str) -> None:
        super().__init__()
        require_dropout("probability", probability)
        self.probability, self.site = probability, site
        # In memory, and of no module: a graph of one block is that of all others too.
        self._key = torch.tensor(_signed(key_of(0, site)), device="cpu")

    def forward(self, x: Tensor, rows: Tensor | None) -> Tensor:
        """``[..., features]`` and the keys of its rows ``[...]`` -> the same; without keys nothing is dropped."""
        if rows is None or self.probability == 0:
            return x
        return _scaled(x, recomputed(self._stays, rows, x.shape[-1]), self.probability)

    def of_heads(self, x: Tensor, rows: Tensor, heads: range) -> Tensor:
        """Attention's probabilities ``[batch, heads, queries, keys]``, of which ``rows`` are those of the queries.

        ``heads`` are their numbers among all heads of the model.
        """
        return _scaled(x, self._stays(rows, x.shape[-1], heads.start, heads.stop), self.probability)

    def _stays(self, rows: Tensor, columns: int, *heads: int) -> Tensor:
        keep: Callable[..., Tensor] = torch.ops.argonne.kept if torch.compiler.is_compiling() else _kept
        return keep(rows, self._key, columns, self.probability, *heads)

    def extra_repr(self) -> str:
        return f"{self.probability}, site={self.site}"


def _kept(rows: Tensor, key: Tensor, columns: int, probability: float, begin: int = 0, end: int = 0) -> Tensor:
    """``kept`` of rows at the site of that ``key``; of ``[batch, queries]`` rows, for heads from ``begin`` on."""
    keys = _mixed(rows + key)
    if end:
        numbers = torch.arange(begin, end, device=rows.device) + 1
        keys = _mixed(keys[:, None] + (numbers * _GOLDEN)[:, None])
    return kept(keys, columns, probability)


# What is compiled calls this and does not look into it: its words wrap around, and its loop has many turns.
_LIBRARY = torch.library.Library("argonne", "FRAGMENT")
_LIBRARY.define("kept(Tensor rows, Tensor key, int columns, float probability, int begin=0, int end=0) -> Tensor")
_LIBRARY.impl("kept", _kept, "CompositeExplicitAutograd")


@torch.library.register_fake("argonne::kept", lib=_LIBRARY)
def _kept_shape(rows: Tensor, key: Tensor, columns: int, probability: float, begin: int = 0, end: int = 0) -> Tensor:
    shape = (len(rows), end - begin, *rows.shape[1:]) if end else tuple(rows.shape)
    return rows.new_empty(*shape, columns, dtype=torch.bool)


def require_dropout(name: str, value: float) -> None:
    """Raise ``ArgonneError`` unless ``value`` is a share of elements that may be dropped."""
    require_share(name, value)
    if value == 1:
        raise ArgonneError(f"{name}=1 is not legal, as nothing would stay; legal: 0 up to less than 1")


def _scaled(x: Tensor, stays: Tensor, probability: float) -> Tensor:
    return torch.where(stays, x / (1 - probability), 0.0)


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's hash of each of them, in place: ``words`` are a tensor that nobody else has."""
    for shift, factor in _MIX:
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, _LAST_SHIFT))


def _shifted(words: Tensor, by: int) -> Tensor:
    """Each moved right, with zeros on its left."""
    return (words >> by).bitwise_and_((1 << (64 - by)) - 1)


def _signed(word: int) -> int:
    """The low 64 bits of ``word`` as torch has them."""
    low = word & (2**64 - 1)
    return low - 2**64 if low >= 2**63 else low
