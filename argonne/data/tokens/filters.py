"""Which rows of a shard become documents, and why the others do not."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

TokenIds = npt.NDArray[np.int32]
Encode = Callable[[list[str]], "list[TokenIds | None]"]

NOT_TEXT, EMPTY, DIGITS, SYMBOLS, SHORT, UNTOKENIZABLE, UNREADABLE = REASONS = (
    "not_text",
    "empty",
    "digits",
    "symbols",
    "short",
    "untokenizable",
    "unreadable",
)

# The thresholds of the original Argonne pipeline.
LONG_CHARACTERS = 50
MAX_DIGITS = 0.5
MIN_READABLE = 0.3
MIN_TOKENS = 10
FILTERS = {
    "long_characters": LONG_CHARACTERS,
    "max_digits": MAX_DIGITS,
    "min_readable": MIN_READABLE,
    "min_tokens": MIN_TOKENS,
}
"""What decides which rows are dropped, as JSON values."""

DIGIT, READABLE = 1, 2
# Characters looked at together: what they take in memory stays in the processor's cache.
SLICE = 1 << 16
READABLE_ASCII = bytes(code for code in range(128) if chr(code).isalpha() or chr(code).isspace())


def rejection(text: object) -> str | None:
    """Why a row is dropped before it is tokenised, or None if it is kept.

    Only a text of more than 50 characters is judged by its digits (more than half: "digits") and by its
    letters and white space (less than 0.3 together: "symbols").
    """
    if not isinstance(text, str):
        return NOT_TEXT
    if not text:
        return EMPTY
    if len(text) <= LONG_CHARACTERS:
        return None
    if len(text) <= SLICE and text.isascii() and 2 * len(text.encode().translate(None, READABLE_ASCII)) <= len(text):
        return None  # almost every text: where half is readable, no more than half are digits
    digits, readable = _counts(text)
    if digits / len(text) > MAX_DIGITS:
        return DIGITS
    return SYMBOLS if readable / len(text) < MIN_READABLE else None


def tokenise_rows(rows: Sequence[object], encode: Encode, boundary: tuple[int, int] | None) -> list[TokenIds | str]:
    """For each row its token ids, or the reason (one of `REASONS`) for which it is dropped.

    `boundary` is the (BOS, EOS) pair put around each document; the two do not count as tokens of the text.
    """
    reasons = [rejection(row) for row in rows]
    kept = [row for row, reason in zip(rows, reasons, strict=True) if reason is None and isinstance(row, str)]
    encoded = iter(encode(kept))
    return [reason or _document(next(encoded), boundary) for reason in reasons]


def _document(tokens: TokenIds | None, boundary: tuple[int, int] | None) -> TokenIds | str:
    if tokens is None:
        return UNTOKENIZABLE
    if len(tokens) < MIN_TOKENS:
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
