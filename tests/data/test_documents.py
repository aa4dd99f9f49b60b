from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data.tokens import filters as documents
from argonne.data.tokens.filters import rejection, tokenise_rows


def rule(text: str) -> str | None:
    """The filter as it is written down."""
    if not text:
        return "empty"
    if len(text) > 50:
        if sum(c.isdigit() for c in text) / len(text) > 0.5:
            return "digits"
        if sum(c.isalpha() or c.isspace() for c in text) / len(text) < 0.3:
            return "symbols"
    return None


@pytest.mark.parametrize("row", [None, 3, 2.5, b"bytes", ["a"], float("nan")])
def test_a_row_that_is_not_a_string_is_not_text(row: object) -> None:
    assert rejection(row) == "not_text"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty"),
        (" ", None),
        ("1" * 50, None),
        ("#" * 50, None),
        ("1" * 51, "digits"),
        ("#" * 51, "symbols"),
        ("1" * 50 + "a" * 50, None),
        ("1" * 51 + "a" * 49, "digits"),
        ("a" * 15 + " " * 15 + "#" * 70, None),
        ("a" * 15 + " " * 14 + "#" * 71, "symbols"),
        ("1" * 50 + "#" * 50, "symbols"),
        ("\u00b2" * 60, "digits"),
        ("\u4e2d\u3000" * 30, None),
    ],
)
def test_thresholds_are_exact(text: str, reason: str | None) -> None:
    assert rejection(text) == reason


# With lone surrogates, and digits and letters beyond U+FFFF.
alphabet = st.one_of(st.sampled_from("0123456789#$ ab"), st.characters(), st.sampled_from("\ud800\U0001d7d8\U0001d400"))


@given(st.text(alphabet, max_size=120), st.sampled_from([1, 7, 60, documents.SLICE]))
def test_the_filter_equals_the_rule_for_any_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "SLICE", size)
        assert rejection(text) == rule(text)


@given(st.text(st.characters(max_codepoint=127), max_size=120))
def test_the_filter_equals_the_rule_for_ascii(text: str) -> None:
    assert rejection(text) == rule(text)


def test_a_huge_text_is_judged_in_little_memory() -> None:
    for text in ("1 " * 10_000_000 + "1", "\u0661\u3000" * 5_000_000 + "1"):
        tracemalloc.start()
        assert rejection(text) == "digits"
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 3 << 20


def by_length(texts: list[str]) -> list[np.ndarray | None]:
    """As many tokens as letters; "bad" cannot be tokenised."""
    return [None if text == "bad" else np.arange(len(text), dtype=np.int32) for text in texts]


def test_fewer_than_ten_tokens_is_short_and_boundary_tokens_do_not_count() -> None:
    for boundary, length in ((None, 10), ((7, 8), 12)):
        short, kept = tokenise_rows(["a" * 9, "a" * 10], by_length, boundary)
        assert short == "short"
        assert len(kept) == length
    assert kept.tolist() == [7, *range(10), 8]
    assert kept.dtype == np.int32


def test_each_row_has_its_own_outcome_in_order() -> None:
    rows = ["a" * 11, None, "bad", "", "a" * 12, "1" * 60]
    outcomes = [each if isinstance(each, str) else len(each) for each in tokenise_rows(rows, by_length, None)]
    assert outcomes == [11, "not_text", "untokenizable", "empty", 12, "digits"]
