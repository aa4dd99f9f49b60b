"""A byte-level BPE tokenizer as GGUF has it, under the name by which llama.cpp knows how it cuts text into words."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerFast

from argonne.data.tokens.tokenizer import plain_backend
from argonne.parallel.errors import ArgonneError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""Kinds of token, as GGUF numbers them."""

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"

# The steps of a pre-tokenizer before its bytes are named, and whether whole words are looked up before they are merged.
_KNOWN: dict[tuple[tuple[tuple[str, str], ...], bool], str] = {
    ((("regex", _GPT2),), False): "gpt-2",
    ((("digits", ""), ("regex", _GPT2)), False): "smollm",
    ((("regex", _WORDS + r"\p{N}" + _REST),), False): "qwen2",
    ((("regex", _WORDS + r"\p{N}{1,3}" + _REST),), True): "llama-bpe",
}
_LEGAL = "legal: byte-level BPE that cuts text as one of gpt-2, smollm, qwen2 and llama-bpe does"


@dataclass(frozen=True)
class GGUFTokenizer:
    """What is written of a tokenizer."""

    pre: str
    """``tokenizer.ggml.pre``."""
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    special: dict[str, int]
    """Ids of ``bos``, ``eos``, ``unk``, ``pad`` and ``mask``, where there is such a token."""
    adds: dict[str, bool]
    """Whether it puts ``bos`` before and ``eos`` after a text by itself."""
    chat_template: str | None


def gguf_tokenizer(tokenizer: PreTrainedTokenizerFast, vocabulary: int) -> GGUFTokenizer:
    """The tokenizer with a token for each of ``vocabulary`` rows of the embedding.

    Raises:
        ArgonneError: llama.cpp has no tokenizer that gives the same ids.
    """
    state = json.loads(plain_backend(tokenizer).to_str())
    pre = _pre_tokenizer(state)
    by_id = {number: token for token, number in state["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, NORMAL)
    for added in state["added_tokens"]:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    if max(by_id) >= vocabulary:
        raise ArgonneError(f"the tokenizer has {max(by_id) + 1} tokens and the model rows for {vocabulary}")
    numbers = range(vocabulary)
    return GGUFTokenizer(
        pre=pre,
        tokens=[by_id.get(number, f"[PAD{number}]") for number in numbers],
        kinds=[kinds.get(number, UNUSED) for number in numbers],
        merges=[each if isinstance(each, str) else " ".join(each) for each in state["model"]["merges"]],
        special=_special(tokenizer),
        adds=_adds(tokenizer),
        chat_template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _pre_tokenizer(state: dict[str, Any]) -> str:
    """The name of what cuts a text into words as this tokenizer does."""
    model = state["model"]
    if model["type"] != "BPE":
        raise ArgonneError(f"the tokenizer is {model['type']}; {_LEGAL}")
    for field in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(field):
            raise ArgonneError(f"the tokenizer has {field}={model[field]!r}, which llama.cpp has not; {_LEGAL}")
    steps = tuple(_steps(state["pre_tokenizer"]))
    name = _KNOWN.get((steps, bool(model.get("ignore_merges"))))
    if name is None:
        raise ArgonneError(f"the tokenizer cuts text by rules that llama.cpp has no name for; {_LEGAL}")
    normalizer = (state["normalizer"] or {}).get("type")
    if normalizer is not None and (name, normalizer) != ("qwen2", "NFC"):  # llama.cpp leaves it out for Qwen itself
        raise ArgonneError(f"the tokenizer changes text before it cuts it ({normalizer}); {_LEGAL}")
    return name


def _steps(pre_tokenizer: Any) -> list[tuple[str, str]]:
    """What a pre-tokenizer does, one cut after the other; what is not known here is ``unknown``."""
    kind = (pre_tokenizer or {}).get("type")
    if kind == "Sequence":
        return [step for each in pre_tokenizer["pretokenizers"] for step in _steps(each)]
    if kind == "Digits" and pre_tokenizer["individual_digits"]:
        return [("digits", "")]
    if kind == "Split" and pre_tokenizer["behavior"] == "Isolated" and not pre_tokenizer["invert"]:
        return [("regex", str(pre_tokenizer["pattern"].get("Regex")))]
    if kind == "ByteLevel" and not pre_tokenizer["add_prefix_space"]:
        return [("regex", _GPT2)] if pre_tokenizer.get("use_regex", True) else []
    return [("unknown", str(kind))]


def _special(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    names = {name: getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad", "mask")}
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items() if token is not None}
    return {name: number for name, number in ids.items() if isinstance(number, int)}


def _adds(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    plain, whole = (tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
    return {"bos": whole[0] != plain[0], "eos": whole[-1] != plain[-1]}
