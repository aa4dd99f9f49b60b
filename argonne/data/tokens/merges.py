"""Whether tiktoken makes of any bytes the tokens that a byte-level BPE makes of them: a proof by its merges.

Both merge, again and again, the leftmost pair of the lowest rank. They differ in what may merge: tokenizers takes the
pairs that it lists, tiktoken any two neighbours whose bytes together are a token. Let the tokens be in the order of
their merges, and S(t) what BPE with the tokens before t makes of the bytes of t. If S(t) is two parts, and these are a
pair listed for t, then by induction on t both programs do the same merges: where the earlier tokens are exhausted,
neighbours that form t are S(t); and after t is made, no earlier token can arise, as its bytes alone would then give it
without t. `ranked_tokens` computes whether S(t) is the listed pair.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator
from typing import Any


class Declined(Exception):
    """Why a tokenizer keeps to its own path, in one line."""


def _byte_characters() -> list[str]:
    """The characters by which ByteLevel names the bytes 0 to 255: their own where that can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte if byte in seen else next(spare)) for byte in range(256)]


ALPHABET = _byte_characters()
_BYTES = {ord(character): byte for byte, character in enumerate(ALPHABET)}


def token_bytes(token: str) -> bytes:
    """What a token of ByteLevel stands for."""
    return token.translate(_BYTES).encode("latin-1")


def ranked_tokens(model: dict[str, Any]) -> dict[str, int]:
    """The rank of each token of a BPE `model`, bytes first, if the proof above holds.

    Raises:
        Declined: it does not.
    """
    if model["type"] != "BPE":
        raise Declined(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise Declined(f"its model has {option}={model[option]}")
    vocabulary: dict[str, int] = model["vocab"]
    if missing := [byte for byte in ALPHABET if byte not in vocabulary]:
        raise Declined(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    ranks = {byte: rank for rank, byte in enumerate(ALPHABET)}
    merges = _Merges(len(ranks))
    pairs = (tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"])
    # Some tokenizers list every way to cut a token in two, one after the other.
    for token, group in itertools.groupby(pairs, "".join):
        if token in ranks:
            raise Declined(f"its merges come back to {token!r}")
        cuts = list(group)
        reached = next(filter(merges.reached, _ranked(cuts, ranks)), None)
        if reached is None:
            # Such a token is only found whole, if that is looked for, and if no way to make it is ever open.
            cuts += ((token[:at], token[at:]) for at in range(1, len(token)))
            for part in itertools.chain.from_iterable(cut for cut in cuts if vocabulary.keys() >= set(cut)):
                if part not in ranks:
                    raise Declined(f"its merges make {token!r} of {part!r}, which comes later")
            if not model["ignore_merges"] or any(map(merges.reached, _ranked(cuts, ranks))):
                raise Declined(f"its merge for {token!r} is not the one that is reached by rank")
        merges.append(reached)
        ranks[token] = len(ranks)
    if model["ignore_merges"]:
        alphabet = set(ALPHABET)
        for token in vocabulary.keys() - ranks.keys():
            if alphabet.issuperset(token):
                raise Declined(f"its token {token!r} is of no merge")
    return ranks


def _ranked(cuts: Iterable[tuple[str, ...]], ranks: dict[str, int]) -> Iterator[tuple[int, int]]:
    """The ranks of the two parts of each cut, where both have one."""
    for left, right in cuts:
        if left in ranks and right in ranks:
            yield ranks[left], ranks[right]


class _Merges:
    """Tokens by rank, each with the two parts that BPE makes it of."""

    def __init__(self, atoms: int) -> None:
        self._atoms = atoms
        self._parts: list[tuple[int, int] | None] = [None] * atoms
        self._made: dict[tuple[int, int], int] = {}

    def append(self, parts: tuple[int, int] | None) -> None:
        """The next token; None for one that no merges lead to."""
        if parts is not None:
            self._made[parts] = len(self._parts)
        self._parts.append(parts)

    def reached(self, pair: tuple[int, int]) -> bool:
        """Whether BPE makes of the bytes of `pair` these two tokens: no merge spans the cut between them.

        BPE makes tokens by rank, and those of one rank from left to right. Alone, each side becomes its token; so it
        does beside the other, unless a merge spans the cut, of two tokens that meet there at some time. Which do is
        found by going back from the end, where it is `pair`: of two that meet the one of the higher rank was made last
        (of equal ones the right one), so that before it its part at the cut met the other.

        Two that meet do so until one of them is taken into a larger token, the one that was undone last. A merge of
        the two comes before that if its rank is lower, and at the same rank if it begins further left: so where that
        token is right of the cut, but not where it is left of it. In time is thus a rank below `limit`.

        So "a", "b", "c", "bc" = b + c and "ab" = a + b, in this order: ("a", "bc") is reached, as b was in bc before
        ab could take it. Were "ab" listed before "bc", the two would meet as (a, b) below the limit, and it is not.
        """
        left, right = pair
        limit = sys.maxsize
        while True:
            if self._made.get((left, right), sys.maxsize) < limit:
                return False
            if left < self._atoms and right < self._atoms:
                return True
            parts = self._parts[max(left, right)]
            if parts is None:
                return False
            if left > right:
                limit, left = left, parts[1]
            else:
                limit, right = right + 1, parts[0]
