"""A faster encoder for byte-level BPE, taken into use only where it is proven to give the tokenizer's own ids.

Two things are proven before: that tiktoken and tokenizers merge alike (`merges.py`), and that they cut text into the
same pieces. `_pattern` admits only expressions that the two regular expression engines read alike, and a text with a
character that they may class differently (`character_classes.py`) is left to the tokenizer. What might still go wrong
is tried on `AWKWARD`.
"""

from __future__ import annotations

import functools
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer, normalizers

from argonne.data.tokens.character_classes import CLASS, NEVER, suspects
from argonne.data.tokens.filters import TokenIds
from argonne.data.tokens.merges import Declined, ranked_tokens, token_bytes

T = TypeVar("T")

# What ByteLevel cuts with when it is not given the pieces: the expression of GPT-2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)")
_ITEM = rf"(?:{CLASS}|\\[rn]|[ '/a-z])"
_TERM = rf"(?:{'|'.join(map(re.escape, _CONTRACTIONS))}|\[\^?{_ITEM}+\]|{_ITEM})(?:[?*+]\+?|\{{\d+(?:,\d+)?\}})?"
_EXPRESSION = re.compile(rf"(?:{_TERM}|\(\?!\\S\))+(?:\|(?:{_TERM}|\(\?!\\S\))+)*")

_SPACES = "  a   b\t\tc \n d\n\n\n e \r\n\r\n  \n f \u00a0\u2003\u3000g \x0b\x0c\x85\u2028 "
AWKWARD = (
    _SPACES,
    " " * 60,
    "\n" * 60 + " \n" * 20,
    " leading and trailing ",
    "I'm you're WE'LL they'D it'S 'tis don\u2019t O'\u017f 'RE'Ve''s",
    "1 12 123 1234567890 3.14 1,000,000 \u0663\u0664 \u00bd\u00b2 \u2167 x1y2z3",
    "\u4e2d\u6587\u5206\u8bcd\u3002\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4 \u0e44\u0e17\u0e22",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f44d\U0001f3fd",
    "e\u0301 \u00e9 a\u0323\u0302 \u1100\u1161\u11a8 \u0928\u093f \u212b \u03a9\u0345 q\u0307\u0323 \u0301alone",
    "\0nul\x01\x02\x1b[0m\x7f\x80\x9f\ufeff\ufffd",
    "<|endoftext|><|im_start|>user<pad></s>[CLS] <unk><mask> <tool_call>",
    "for (int i=0;i<n;++i){\n\tx[i] += y->z;  // \\n\n}\n\n\tdef f(self):\n        return {'a': [1, 2]}\n",
    "https://example.com/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt $$$ !!!???... ---===***",
    "CamelCaseWord snake_case_word SCREAMING \u00dcn\u00efc\u00f6d\u00eb \u0130\u0131 stra\u00dfe \ufb01ne",
    "a" * 300,
    "abcdefghij" * 60,
    "Donaudampfschifffahrtsgesellschaft" * 8,
)


class BytePair:
    """The ids of a text, or None where this text is to go through the tokenizer itself.

    Args:
        ids: the id of each token, in the order of their ranks.
        pattern: its matches are the pieces.
        prefix_space: the text starts with a space in any case.
        normalizer: NFC, or None.
        added: tokens that are cut out of a text before anything else.
    """

    def __init__(
        self,
        ids: dict[str, int],
        pattern: str,
        prefix_space: bool,
        normalizer: normalizers.Normalizer | None,
        added: Sequence[str],
    ) -> None:
        import tiktoken

        self._encoding = tiktoken.Encoding(
            "argonne",
            pat_str=pattern,
            mergeable_ranks={token_bytes(token): rank for rank, token in enumerate(ids)},
            special_tokens={NEVER: len(ids)},
        )
        self._ids: TokenIds = np.array([*ids.values(), -1], dtype=np.int32)
        self._lengths = np.array([*map(len, ids), 0], dtype=np.int64)
        self._normalizer = normalizer
        self._prefix_space = prefix_space
        normal = (lambda text: text) if normalizer is None else normalizer.normalize_str
        self._added = tuple({form for content in added for form in (content, normal(content))})
        self._first = tuple({content[0] for content in self._added})
        self._unsure, self._known = suspects(pattern)

    def __call__(self, text: str) -> TokenIds | None:
        if not text or self._has_added(text):
            return None
        size = len(text)
        ascii_only = text.isascii()
        if not ascii_only:
            if not self._known.issuperset(self._unsure.findall(text)):
                return None
            # For characters that Unicode assigns, being normalised does not depend on its version.
            if self._normalizer is not None and not unicodedata.is_normalized("NFC", text):
                text = self._normalizer.normalize_str(text)
                if self._has_added(text):
                    return None
            size = len(text.encode())
        if self._prefix_space and text[0] != " ":
            text = " " + text
            size += 1
        ranks = unless_refused(lambda: self._encoding.encode_to_numpy(text, disallowed_special=()))
        if ranks is None:
            return None  # its regular expressions have a stack of limited depth
        if self._lengths[ranks].sum() != size:
            return None  # a character that no alternative of the expression takes was left out
        return self._ids[ranks]

    def _has_added(self, text: str) -> bool:
        return any(first in text for first in self._first) and any(content in text for content in self._added)


def byte_pair(backend: Tokenizer) -> BytePair:
    """The fast encoder that equals `backend`, where special tokens in a text are ordinary text.

    Raises:
        Declined: there is none, or none that is proven to be equal.
    """
    found = _built(backend.to_str())
    for text in AWKWARD:
        ids = found(text)
        if ids is not None and ids.tolist() != backend.encode(text, add_special_tokens=False).ids:
            raise Declined(f"its ids differ from those of tiktoken for {text[:40]!r}")
    return found


def contained(error: BaseException) -> bool:
    """Whether an exception concerns one text: a panic in Rust is raised as no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def unless_refused(encode: Callable[[], T]) -> T | None:
    """What `encode` makes of a text; None where the library cannot take it."""
    try:
        return encode()
    except BaseException as error:
        if not contained(error):
            raise
        return None


@functools.lru_cache(maxsize=2)  # the proof takes seconds, and some encoders are not shared
def _built(specification: str) -> BytePair:
    try:
        import tiktoken

        tiktoken.Encoding.encode_to_numpy  # noqa: B018
    except (ImportError, AttributeError):
        raise Declined("tiktoken is not installed") from None
    fields = json.loads(specification)
    normalizer = fields["normalizer"]
    if normalizer not in (None, {"type": "NFC"}):
        raise Declined(f"its normalizer {_named(normalizer)} is not NFC")
    pattern, prefix_space = _pattern(fields["pre_tokenizer"])
    ids = {token: fields["model"]["vocab"][token] for token in ranked_tokens(fields["model"])}
    added = [token["content"] for token in fields["added_tokens"] if not token["special"]]
    return BytePair(ids, pattern, prefix_space, normalizers.NFC() if normalizer else None, added)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> tuple[str, bool]:
    """The expression whose matches are the pieces, and whether the text starts with a space in any case."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": bool(prefix_space)}:
            return GPT2, prefix_space
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
            ],
        } if _EXPRESSION.fullmatch(pattern):
            return pattern, False
    raise Declined(f"its pre-tokenizer {_named(pre_tokenizer)} cannot be expressed")


def _named(part: dict[str, Any] | None) -> str:
    if part is None:
        return "None"
    inner = part.get("pretokenizers") or part.get("normalizers")
    return f"{part['type']}[{', '.join(map(_named, inner))}]" if inner else str(part["type"])
