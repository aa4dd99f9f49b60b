"""A faster encoder for byte-level BPE, taken into use only where it is proven to give the tokenizer's own ids.

tiktoken and tokenizers both merge, again and again, the leftmost pair of the lowest rank. They differ in what may
merge: tokenizers takes the pairs that it lists, tiktoken any two neighbours whose bytes together are a token. Let
the tokens be in the order of their merges, and S(t) what BPE with the tokens before t makes of the bytes of t. If
S(t) is two parts, and these are a pair listed for t, then by induction on t both programs do the same merges: where
the earlier tokens are exhausted, neighbours that form t are S(t); and after t is made, no earlier token can arise,
as its bytes alone would then give it without t. `_check_merges` computes whether S(t) is the listed pair.

What is left are the pieces that text is cut into. `_pattern` admits only expressions that the two regular
expression engines read alike, `_disputed` compares their character classes over the characters that Unicode assigns,
and a text with any other character is left to the tokenizer.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

from argonne.data.documents import TokenIds

# What ByteLevel cuts with when it is not given the pieces: the expression of GPT-2.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CONTRACTIONS = ("(?i:'s|'t|'re|'ve|'m|'ll|'d)", "(?i:[sdmt]|ll|ve|re)")
_CLASS = r"\\p\{[A-Z][a-z]?\}|\\[sS]"
_ITEM = rf"(?:{_CLASS}|\\[rn]|[ '/a-z])"
_TERM = rf"(?:{'|'.join(map(re.escape, _CONTRACTIONS))}|\[\^?{_ITEM}+\]|{_ITEM})(?:[?*+]\+?|\{{\d+(?:,\d+)?\}})?"
_EXPRESSION = re.compile(rf"(?:{_TERM}|\(\?!\\S\))+(?:\|(?:{_TERM}|\(\?!\\S\))+)*")

# A special token that every encoding has: without one tiktoken would look for an empty string.
_NEVER = "\0argonne\0"

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


class Declined(Exception):
    """Why a tokenizer keeps to its own path, in one line."""


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
            mergeable_ranks={_bytes(token): rank for rank, token in enumerate(ids)},
            special_tokens={_NEVER: len(ids)},
        )
        self._ids: TokenIds = np.array([*ids.values(), -1], dtype=np.int32)
        self._lengths = np.array([*map(len, ids), 0], dtype=np.int64)
        self._normalizer = normalizer
        self._prefix_space = prefix_space
        normal = (lambda text: text) if normalizer is None else normalizer.normalize_str
        self._added = tuple({form for content in added for form in (content, normal(content))})
        self._first = tuple({content[0] for content in self._added})
        self._unsure, self._known = _suspects(frozenset(_classes(pattern)))

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
        try:
            ranks = self._encoding.encode_to_numpy(text, disallowed_special=())
        except BaseException as error:
            if not contained(error):
                raise
            return None  # its regular expressions have a stack of limited depth
        if self._lengths[ranks].sum() != size:
            return None  # a character that no alternative of the expression takes was left out
        return self._ids[ranks]

    def _has_added(self, text: str) -> bool:
        return any(first in text for first in self._first) and any(content in text for content in self._added)


def byte_pair(backend: Tokenizer, sample: Sequence[str] = ()) -> BytePair:
    """The fast encoder that equals `backend`, where special tokens in a text are ordinary text.

    Args:
        sample: texts on which the ids are compared, besides `AWKWARD`.

    Raises:
        Declined: there is none, or none that is proven to be equal.
    """
    found = _built(backend.to_str())
    for text in (*AWKWARD, *sample):
        ids = found(text)
        if ids is not None and ids.tolist() != backend.encode(text, add_special_tokens=False).ids:
            raise Declined(f"its ids differ from those of tiktoken for {text[:40]!r}")
    return found


def contained(error: BaseException) -> bool:
    """Whether an exception concerns one text: a panic in Rust is raised as no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


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
    ids = {token: fields["model"]["vocab"][token] for token in _check_merges(fields["model"])}
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


def _check_merges(model: dict[str, Any]) -> dict[str, int]:
    """The rank of each token, bytes first, if the proof above holds."""
    if model["type"] != "BPE":
        raise Declined(f"its model is {model['type']}, not BPE")
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(option):
            raise Declined(f"its model has {option}={model[option]}")
    vocabulary: dict[str, int] = model["vocab"]
    missing = [byte for byte in _ALPHABET if byte not in vocabulary]
    if missing:
        raise Declined(f"its vocabulary lacks {len(missing)} of the 256 bytes")
    ranks = {byte: rank for rank, byte in enumerate(_ALPHABET)}
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
        alphabet = set(_ALPHABET)
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
        """Whether BPE makes of the bytes of `pair` these two tokens: nothing merges across the cut before.

        Goes back in time: of the two tokens that meet at the cut, the one of the higher rank was made last; until
        then its part met the other token. `limit` is the rank from which on the two no longer meet.
        """
        left, right = pair
        limit = sys.maxsize
        while True:
            if self._made.get((left, right), sys.maxsize) < limit:
                return False
            if left < self._atoms and right < self._atoms:
                return True
            # Of equal tokens the left one is made first; so is one of the rank of `left` that ends further right.
            parts = self._parts[max(left, right)]
            if parts is None:
                return False
            if left > right:
                limit, left = left, parts[1]
            else:
                limit, right = right + 1, parts[0]


def _named(part: dict[str, Any] | None) -> str:
    if part is None:
        return "None"
    inner = part.get("pretokenizers") or part.get("normalizers")
    return f"{part['type']}[{', '.join(map(_named, inner))}]" if inner else str(part["type"])


def _byte_characters() -> list[str]:
    """The characters by which ByteLevel names the bytes 0 to 255: their own where that can be seen."""
    seen = {*range(33, 127), *range(161, 173), *range(174, 256)}
    spare = itertools.count(256)
    return [chr(byte if byte in seen else next(spare)) for byte in range(256)]


_ALPHABET = _byte_characters()
_BYTES = {ord(character): byte for byte, character in enumerate(_ALPHABET)}


def _bytes(token: str) -> bytes:
    return token.translate(_BYTES).encode("latin-1")


def _classes(pattern: str) -> Iterable[str]:
    """Of an expression, all that depends on the engine's tables of characters."""
    yield from (each.replace(r"\S", r"\s") for each in re.findall(_CLASS, pattern))
    if "(?i:" in pattern:
        yield from (f"(?i:{letter})" for letter in "stremvld")


@functools.cache
def _suspects(classes: frozenset[str]) -> tuple[re.Pattern[str], frozenset[str]]:
    """An expression for the characters to look at again, and those among them that are known all the same.

    The two engines agree on all others. The expression names every character beyond U+FFFF, as long lists of these
    would make it slow.
    """
    agreed = frozenset(_assigned()).difference(*map(_disputed, classes))
    unsure = (code for code in range(0x10000) if chr(code) not in agreed)
    runs = (list(run) for _, run in itertools.groupby(enumerate(unsure), lambda item: item[1] - item[0]))
    ranges = "".join(f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs)
    return re.compile(f"[{ranges}\U00010000-\U0010ffff]"), frozenset(each for each in agreed if each > "\uffff")


@functools.cache
def _assigned() -> str:
    """The characters that Unicode assigns, as far as Python knows, with the private ones of the first plane."""
    kinds = ((chr(code), unicodedata.category(chr(code))) for code in range(0x40000))
    return "".join(each for each, kind in kinds if kind not in ("Cn", "Cs", "Co") or "\ue000" <= each <= "\uf8ff")


@functools.cache
def _cased() -> str:
    return "".join(each for each in _assigned() if not each == each.lower() == each.upper() == each.casefold())


@functools.cache
def _disputed(expression: str) -> frozenset[str]:
    """The characters that one engine puts into a class and the other does not."""
    import tiktoken

    # A letter whose case is ignored may only equal others that have case.
    among = _cased() if expression.startswith("(?i:") else _assigned()
    each_byte = {bytes([byte]): byte for byte in range(256)}
    encoding = tiktoken.Encoding(
        "class", pat_str=f"(?:{expression})+", mergeable_ranks=each_byte, special_tokens={_NEVER: 256}
    )
    ours = bytes(encoding.encode_ordinary(among)).decode()
    splitter = pre_tokenizers.Split(Regex(f"(?:{expression})+"), "removed", invert=True)
    theirs = "".join(piece for piece, _ in splitter.pre_tokenize_str(among))
    return frozenset() if ours == theirs else frozenset(ours) ^ frozenset(theirs)
