"""A pseudorandom order of any length that takes no memory: each place is computed when it is asked for."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from argonne.data.errors import DataError

# Four rounds of random functions make a permutation that cannot be told from a random one (Luby and Rackoff,
# 1988), as long as the halves are large. The more rounds are for the small ones.
ROUNDS = 8
MIN_HALF_BITS = 3
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Permutation:
    """A one-to-one map of 0 .. length - 1 onto itself, drawn by (seed, epoch).

    A Feistel network permutes the numbers of 2 b bits, 4 ** b being length or more; a result of length or
    more is put in again until it is less, which must happen as the map is one-to-one: "cycle walking", the
    second method of J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002. At most
    4 turns are needed on average, but for very short lengths.

    Integer arithmetic alone: the same on every machine, for ever.

    Raises:
        DataError: `length` is less than 1.
    """

    length: int
    seed: int
    epoch: int
    _half: int = field(init=False, repr=False, compare=False)
    _keys: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.length < 1:
            raise DataError(f"length={self.length} of a permutation is not a positive number")
        half = max(MIN_HALF_BITS, -(-(self.length - 1).bit_length() // 2))
        drawn = hashlib.shake_256(f"argonne shuffle 1: {self.seed}, {self.epoch}".encode()).digest(8 * ROUNDS)
        keys = tuple(int.from_bytes(drawn[at : at + 8], "little") for at in range(0, len(drawn), 8))
        object.__setattr__(self, "_half", half)
        object.__setattr__(self, "_keys", keys)

    def __call__(self, place: int) -> int:
        """What stands at `place`; raises IndexError outside 0 .. length - 1."""
        if not 0 <= place < self.length:
            raise IndexError(f"place {place} is outside 0 to {self.length - 1}")
        place = self._network(place)
        while place >= self.length:
            place = self._network(place)
        return place

    def _network(self, number: int) -> int:
        half = self._half
        low = (1 << half) - 1
        left, right = number >> half, number & low
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & low)
        return left << half | right


def _mix(number: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every bit depends on every other."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & _MASK
    return number ^ number >> 31
