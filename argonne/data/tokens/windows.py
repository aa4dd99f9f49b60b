"""A long document, tokenised window by window with the ids that it has as a whole, in memory for one window."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np
from tokenizers import Tokenizer

from argonne.data.tokens.filters import TokenIds

# Characters. The windows bound the memory: tokenizers needs up to a few hundred bytes for each character.
WINDOW = 1 << 17
LARGEST_WINDOW = 1 << 22
# A cut is looked for within so many characters before the end of a window.
REACH = 1 << 12
# What follows a cut within its window, in pieces that are tokenised each by itself: usually words.
PIECES = 8
CUTS_TRIED = 4


class Windows:
    """Cuts where a window's ids are the same whether or not the text before the cut is there.

    A window ends in ids that its last characters have alone, too; these begin at a cut, and at least `PIECES` pieces
    follow it, as the end of a window may change the last of them. The next window begins at the cut. Where no cut
    is found, the window grows.

    Args:
        backend: the tokenizer, as it is to be used; here it only says where the pieces begin.
        encode: the ids of each text, as a whole.
    """

    def __init__(
        self,
        backend: Tokenizer,
        encode: Callable[[list[str]], list[TokenIds | None]],
        window: int = WINDOW,
        largest: int = LARGEST_WINDOW,
    ) -> None:
        self.window = window
        self._encode = encode
        self._largest = largest
        self._backend = backend
        added = backend.get_added_tokens_decoder().values()
        self._longest_added = max((len(token.content) for token in added), default=0)

    def __call__(self, text: str) -> TokenIds | None:
        """The ids of `text`; None where it cannot be tokenised, or cut into windows of less than the largest size."""
        parts: list[TokenIds] = []
        start, size = 0, self.window
        while start + size < len(text):
            end = start + size
            (ids,) = self._encode([text[start:end]])
            if ids is None:
                return None
            for cut in self._cuts(text, start, end):
                (tail,) = self._encode([text[cut:end]])
                if tail is not None and PIECES <= len(tail) < len(ids) and np.array_equal(ids[-len(tail) :], tail):
                    parts.append(ids[: -len(tail)])
                    start, size = cut, self.window
                    break
            else:
                if size == self._largest:
                    return None
                size = min(2 * size, self._largest)
        (rest,) = self._encode([text[start:]])
        return None if rest is None else np.concatenate([*parts, rest])

    @functools.cached_property
    def _pieces(self) -> Tokenizer:
        pieces = Tokenizer.from_str(self._backend.to_str())
        pieces.encode_special_tokens = self._backend.encode_special_tokens
        pieces.post_processor = None  # it may trim the spaces off the offsets
        return pieces

    def _cuts(self, text: str, start: int, end: int) -> Iterator[int]:
        """A few beginnings of pieces, from the middle of the reach outwards; those at a space come first.

        A space is a good place: some tokenizers put one before a text that has none.
        """
        first = max(start + 1, end - min(REACH, (end - start) // 2))
        encoding = self._pieces.encode(text[first:end], add_special_tokens=False)
        pieces = encoding.word_ids
        begins = [
            first + offset
            for (offset, _), before, piece in zip(encoding.offsets[1:], pieces, pieces[1:], strict=False)
            if piece != before
        ]
        usable = [begin for begin in begins[1:-PIECES] if begin < end - self._longest_added]
        middle = (first + end) // 2
        usable.sort(key=lambda begin: (not text[begin].isspace(), abs(begin - middle)))
        yield from usable[:CUTS_TRIED]
