"""The bytes of a text are counted to its tokens, each once."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from argonne.data import Encoder
from argonne.data.tokens.byte_lengths import CHARACTERS, ByteLengths

TEXTS = [
    "plain words and more of them",
    "caf\u00e9 \U0001f600\U0001f600 na\u00efve \u4e2d\u6587",
    "  two  spaces\n\n\tand a tab ",
    "x" * 400,
]


def words() -> PreTrainedTokenizerFast:
    """One that leaves white space out."""
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "plain": 1, "words": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def pieces() -> PreTrainedTokenizerFast:
    """One that writes spaces in its own way, and falls back to bytes."""
    vocabulary = {
        "<unk>": 0,
        **{f"<0x{code:02X}>": code + 1 for code in range(256)},
        "\u2581": 257,
        "a": 258,
        "\u2581a": 259,
    }
    backend = Tokenizer(models.BPE(vocabulary, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace(), decoders.ByteFallback()])
    return PreTrainedTokenizerFast(tokenizer_object=backend)


@pytest.mark.parametrize("text", TEXTS)
def test_the_lengths_of_all_tokens_add_up_to_the_text(tokenizer, text: str) -> None:
    for each in (tokenizer, words(), pieces()):
        (ids,) = Encoder(each, fast=False)([text])
        assert ids is not None
        lengths = ByteLengths(each).of(text, ids, 10**6)
        assert len(lengths) == len(ids)
        assert lengths.sum() == len(text.encode())
        assert (lengths >= 0).all()


def test_each_token_of_a_byte_level_tokenizer_has_its_own_bytes(tokenizer) -> None:
    text = " ".join(TEXTS[:1] * 3) + "\n  and so on"
    (ids,) = Encoder(tokenizer)([text])
    expected = [len(token) for token in tokenizer.convert_ids_to_tokens(ids.tolist())]
    assert ByteLengths(tokenizer).of(text, ids, 10**6).tolist() == expected


def test_only_as_much_of_a_text_is_read_as_is_wanted(tokenizer) -> None:
    text = "some words of a long text " * 200
    (ids,) = Encoder(tokenizer)([text])
    lengths = ByteLengths(tokenizer)
    whole = lengths.of(text, ids, len(ids))
    assert len(text) > CHARACTERS * 7
    assert np.array_equal(lengths.of(text, ids, 7), whole[:7])
    other = ids.copy()
    other[0] += 1  # ids that the tokenizer does not give: no token is told from another
    assert lengths.of(text, other, len(ids)).sum() == len(text)
