"""Characters that two engines of regular expressions may class differently: tiktoken's, and that of tokenizers.

Their tables are of different versions of Unicode. They are compared by what they do with each character that Unicode
assigns, as far as Python knows; any other may be assigned in one of the versions.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable

from tokenizers import Regex, pre_tokenizers

CLASS = r"\\p\{[A-Z][a-z]?\}|\\[sS]"
"""An expression for the classes that an expression may name."""
NEVER = "\0argonne\0"
"""A special token for encodings that have none, in which tiktoken would look for an empty string."""


@functools.cache
def suspects(pattern: str) -> tuple[re.Pattern[str], frozenset[str]]:
    """An expression for the characters to look at again, and those among them that are known all the same.

    The two engines agree on all others. The expression names every character beyond U+FFFF, as long lists of these
    would make it slow.
    """
    agreed = frozenset(_assigned()).difference(*map(_disputed, _classes(pattern)))
    unsure = (code for code in range(0x10000) if chr(code) not in agreed)
    runs = (list(run) for _, run in itertools.groupby(enumerate(unsure), lambda item: item[1] - item[0]))
    ranges = "".join(f"\\u{run[0][1]:04x}-\\u{run[-1][1]:04x}" for run in runs)
    return re.compile(f"[{ranges}\U00010000-\U0010ffff]"), frozenset(each for each in agreed if each > "\uffff")


def _classes(pattern: str) -> Iterable[str]:
    """Of an expression, all that depends on the engine's tables of characters."""
    yield from (each.replace(r"\S", r"\s") for each in re.findall(CLASS, pattern))
    if "(?i:" in pattern:
        yield from (f"(?i:{letter})" for letter in "stremvld")


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
        "class", pat_str=f"(?:{expression})+", mergeable_ranks=each_byte, special_tokens={NEVER: 256}
    )
    ours = bytes(encoding.encode_ordinary(among)).decode()
    splitter = pre_tokenizers.Split(Regex(f"(?:{expression})+"), "removed", invert=True)
    theirs = "".join(piece for piece, _ in splitter.pre_tokenize_str(among))
    return frozenset() if ours == theirs else frozenset(ours) ^ frozenset(theirs)
