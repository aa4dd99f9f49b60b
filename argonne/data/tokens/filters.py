"""Which rows of a shard become documents, and why the others do not."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from argonne.data.errors import BROKEN
from argonne.parallel.legal import require_share, require_whole

TokenIds = npt.NDArray[np.int32]
Encode = Callable[[list[str]], "list[TokenIds | None]"]

NOT_TEXT, EMPTY, DIGITS, SYMBOLS, SHORT, UNTOKENIZABLE, UNREADABLE, BROKEN_LINE = REASONS = (
    "not_text",
    "empty",
    "digits",
    "symbols",
    "short",
    "untokenizable",
    "unreadable",
    BROKEN.value,
)


@dataclass(frozen=True)
class Filters:
    """The thresholds by which rows are dropped; those of the original Argonne pipeline unless told otherwise.

    What is no text, is empty or cannot be tokenised makes no document whatever they are.

    Raises:
        ArgonneError: a threshold is out of range, by the name of its flag.
    """

    long_characters: int = 50
    """Only a text of more characters is judged by them."""
    max_digits: float = 0.5
    """The largest share of its characters that may be digits, 0 to 1; 1 drops none."""
    min_readable: float = 0.3
    """The smallest share of its characters that must be letters or white space, 0 to 1; 0 drops none."""
    min_tokens: int = 10
    """The fewest tokens of a document, BOS and EOS not counted; 1 drops none."""

    def __post_init__(self) -> None:
        require_whole("filter_long_characters", self.long_characters, 0)
        require_whole("filter_min_tokens", self.min_tokens, 1)
        for field in ("max_digits", "min_readable"):
            require_share(f"filter_{field}", getattr(self, field))
            object.__setattr__(self, field, float(getattr(self, field)))


FILTERS = Filters()
"""Those of the original Argonne pipeline."""

NO_FILTERS = Filters(max_digits=1.0, min_readable=0.0, min_tokens=1)
"""Every text that has a token becomes a document."""

DIGIT, READABLE = 1, 2
# Characters looked at together: what they take in memory stays in the processor's cache.
SLICE = 1 << 16
READABLE_ASCII = bytes(code for code in range(128) if chr(code).isalpha() or chr(code).isspace())


def rejection(text: object, filters: Filters = FILTERS) -> str | None:
    """Why a row is dropped before it is tokenised, or None if it is kept.

    Only a text of more than ``long_characters`` is judged by its digits (a larger share than ``max_digits``: "digits")
    and by its letters and white space (a smaller share than ``min_readable``: "symbols").
    """
    if not isinstance(text, str):
        return BROKEN_LINE if text is BROKEN else NOT_TEXT
    if not text:
        return EMPTY
    length = len(text)
    if length <= filters.long_characters:
        return None
    usual = filters.max_digits >= 0.5 >= filters.min_readable and length <= SLICE and text.isascii()
    if usual and 2 * len(text.encode().translate(None, READABLE_ASCII)) <= length:
        return None  # almost every text: where half is readable, no more than half are digits
    digits, readable = _counts(text)
    if digits / length > filters.max_digits:
        return DIGITS
    return SYMBOLS if readable / length < filters.min_readable else None


def tokenise_rows(
    rows: Sequence[object], encode: Encode, boundary: tuple[int, int] | None, filters: Filters = FILTERS
) -> list[TokenIds | str]:
    """For each row its token ids, or the reason (one of `REASONS`) for which it is dropped.

    `boundary` is the (BOS, EOS) pair put around each document; the two do not count as tokens of the text.
    """
    reasons = [rejection(row, filters) for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None and isinstance(row, str)]
    encoded = iter(encode(kept))
    return [reason or _document(next(encoded), boundary, filters.min_tokens) for reason in reasons]


def _document(tokens: TokenIds | None, boundary: tuple[int, int] | None, min_tokens: int) -> TokenIds | str:
    if tokens is None:
        return UNTOKENIZABLE
    if len(tokens) < min_tokens:
        return SHORT
    if boundary is None:
        return tokens
    bos, eos = boundary
    return np.concatenate(([bos], tokens, [eos]), dtype=np.int32)


def _counts(text: str) -> tuple[int, int]:
    """How many of the characters are digits, and how many are letters or white space."""
    digits = readable = 0
    for start in range(0, len(text), SLICE):
        part = text[start : start + SLICE].encode("utf-32-le", "surrogatepass")
        kinds = _character_kinds()[np.frombuffer(part, dtype="<u4")]
        digits += np.count_nonzero(kinds == DIGIT)
        readable += np.count_nonzero(kinds == READABLE)
    return digits, readable


@functools.cache
def _character_kinds() -> npt.NDArray[np.uint8]:
    """For every code point: `DIGIT`, `READABLE` (a letter or white space), or 0 for anything else.

    A table look-up keeps the filter a hundred times cheaper than asking `str` about each character.
    """
    characters = map(chr, range(sys.maxunicode + 1))
    kinds = (DIGIT if c.isdigit() else READABLE if c.isalpha() or c.isspace() else 0 for c in characters)
    return np.fromiter(kinds, dtype=np.uint8, count=sys.maxunicode + 1)
