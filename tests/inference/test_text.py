"""The text of tokens as they come: never half a character, never the beginning of a stop string, nothing lost."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from argonne.inference.text import TextFollower, check_stops
from argonne.parallel import ArgonneError


def byte_level() -> PreTrainedTokenizerFast:
    """A token for each byte, and some of several: "ab", "bc", the first half of a euro sign, " x"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("b", "c"), ("â", "Ĥ"), ("Ġ", "x")]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZER = byte_level()
TEXTS = st.text(st.sampled_from("abc €é x\n😀"), max_size=12)


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def follow(prompt: str, tokens: list[int], stops: list[str]) -> tuple[str, list[str], int]:
    """The text, what was shown bit by bit, and how many tokens were taken."""
    shown: list[str] = []
    follower = TextFollower(TOKENIZER, ids(prompt), stops, shown.append)
    ended = [follower.take(token) for token in tokens[:1]]
    while not any(ended) and len(ended) < len(tokens):
        ended.append(follower.take(tokens[len(ended)]))
    return follower.close(), shown, len(ended)


@given(TEXTS, TEXTS)
def test_what_is_shown_is_the_text_in_whole_characters(prompt: str, text: str) -> None:
    found, shown, _ = follow(prompt, ids(text), [])
    assert found == "".join(shown) == text
    assert not any("\ufffd" in part for part in shown)


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=12))
def test_any_tokens_at_all_read_as_they_do_at_once(tokens: list[int]) -> None:
    found, shown, _ = follow("a", tokens, [])
    assert found == "".join(shown) == TOKENIZER.decode([*ids("a"), *tokens])[1:]


@given(TEXTS, TEXTS, st.lists(st.text(st.sampled_from("abc €x😀"), min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_whatever_its_tokens(
    prompt: str, text: str, stops: list[str]
) -> None:
    found, shown, taken = follow(prompt, ids(text), stops)
    assert "".join(shown) == found
    assert not any(stop in found for stop in stops)
    if not any(stop in text for stop in stops):
        assert (found, taken) == (text, len(ids(text)))
    else:
        assert any(text.startswith(found + stop) for stop in stops)
        # It is heard of with the token that completes it, and no token later.
        before = TOKENIZER.decode(ids(text)[: taken - 1])
        assert not any(stop in before for stop in stops)


def test_a_stop_string_over_several_tokens_is_never_shown_and_a_false_one_is() -> None:
    found, shown, taken = follow("", ids("x ab€ now"), ["b€"])
    assert (found, taken) == ("x a", len(ids("x ab€")))
    assert "".join(shown) == "x a"
    assert follow("", ids("x abc"), ["b€"])[0] == "x abc"
    # What the prompt ends with is no part of a stop string.
    assert follow("a", ids("bc"), ["ab"])[0] == "bc"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ArgonneError, match="stop='' ends every text before it begins; legal: at least one character"):
        check_stops(["a", ""])
