"""The thresholds by which rows are dropped: whatever they are, streaming, caches and the rule agree."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.data import DataError, SequenceStream, check_block_size, encode
from argonne.data.tokens.filters import FILTERS, NO_FILTERS, Filters, rejection, tokenise_rows
from argonne.parallel import ArgonneError
from tests.data.files import build

SHARES = st.sampled_from([0, 0.0, 0.1, 0.3, 0.49, 0.5, 0.51, 0.9, 1, 1.0]) | st.floats(0, 1)
ANY = st.builds(Filters, st.integers(0, 60), SHARES, SHARES, st.integers(1, 20))
TEXTS = st.text(st.one_of(st.sampled_from("0123456789#$ ab\n"), st.characters()), max_size=120)


def rule(text: str, filters: Filters) -> str | None:
    """The filter as it is written down."""
    if not text:
        return "empty"
    if len(text) > filters.long_characters:
        if sum(c.isdigit() for c in text) / len(text) > filters.max_digits:
            return "digits"
        if sum(c.isalpha() or c.isspace() for c in text) / len(text) < filters.min_readable:
            return "symbols"
    return None


@given(TEXTS, ANY)
def test_the_filter_equals_the_rule_for_any_thresholds(text: str, filters: Filters) -> None:
    assert rejection(text, filters) == rule(text, filters)


@given(st.text(st.sampled_from("01# ab"), min_size=1, max_size=80), ANY)
def test_the_filter_equals_the_rule_where_texts_are_plain_and_near_the_thresholds(text: str, filters: Filters) -> None:
    assert rejection(text, filters) == rule(text, filters)


@given(TEXTS)
def test_without_filters_every_text_that_is_not_empty_is_kept(text: str) -> None:
    assert rejection(text, NO_FILTERS) == (None if text else "empty")
    assert rejection(None, NO_FILTERS) == "not_text"


ROWS = [
    "word " * 20,
    "1" * 60,
    "#" * 60,
    "1" * 30 + "a" * 30,
    "few words",
    "a",
    "",
    None,
    "1" * 12,
    "a" * 40 + "#" * 20,
]
SOME = [FILTERS, NO_FILTERS, Filters(70), Filters(max_digits=0.2), Filters(min_readable=0.9), Filters(min_tokens=14)]


@pytest.mark.parametrize("filters", SOME, ids=str)
def test_streaming_and_caches_deliver_the_rows_that_the_thresholds_keep(
    shards_of, tokenizer, tmp_path, filters: Filters
) -> None:
    shards = shards_of([[ROWS, ROWS[::-1]], [ROWS[:5]]], ("parquet", "stream"))
    rows = [*ROWS, *ROWS[::-1], *ROWS[:5]]
    outcomes = tokenise_rows(rows, lambda texts: encode(tokenizer, texts), None, filters)
    wanted = [token for each in outcomes if not isinstance(each, str) for token in each.tolist()]
    stream = SequenceStream(shards, tokenizer, len(wanted) - 1, 1, None, [0], filters=filters)
    assert stream.next_sequence(0).tokens.tolist() == wanted
    built = build(shards, tokenizer, tmp_path, filters=filters)
    assert built.read(0, built.tokens)[0].tokens.tolist() == wanted
    assert sum(built.dropped.values()) == len(rows) - built.documents
    check_block_size(shards, tokenizer, len(wanted) - 1, filters=filters)
    with pytest.raises(DataError, match=f"the data holds only {len(wanted)}"):
        check_block_size(shards, tokenizer, len(wanted), filters=filters)


def test_other_processes_make_the_same_cache(shards_of, tokenizer, tmp_path, small_units) -> None:
    shards = shards_of([[ROWS, ROWS[::-1]], [ROWS[:5]]])
    one, two = (build(shards, tokenizer, tmp_path / str(n), processes=n, filters=Filters(70, 0.9)) for n in (1, 2))
    assert one.fingerprint == two.fingerprint


def test_thresholds_decide_more_than_nothing(shards_of, tokenizer, tmp_path) -> None:
    """Each of those above keeps other rows: no two of them could be taken for each other."""
    shards = shards_of([[ROWS]])
    caches = [build(shards, tokenizer, tmp_path, filters=filters) for filters in SOME]
    assert len({cache.path for cache in caches}) == len({cache.fingerprint for cache in caches}) == len(SOME)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"long_characters": -1}, "filter_long_characters=-1 is not legal; legal: 0 or more"),
        ({"long_characters": 2.5}, "filter_long_characters=2.5 is not legal; legal: a whole number, 0 or more"),
        ({"max_digits": 1.5}, "filter_max_digits=1.5 is not legal; legal: a number, 0 to 1"),
        ({"max_digits": float("nan")}, "filter_max_digits=nan is not legal; legal: a number, 0 to 1"),
        ({"min_readable": -0.1}, "filter_min_readable=-0.1 is not legal; legal: a number, 0 to 1"),
        ({"min_readable": "half"}, "filter_min_readable='half' is not legal; legal: a number, 0 to 1"),
        ({"min_tokens": 0}, "filter_min_tokens=0 is not legal; legal: 1 or more"),
        ({"min_tokens": True}, "filter_min_tokens=True is not legal; legal: a whole number, 1 or more"),
    ],
)
def test_a_threshold_that_is_none_is_refused_with_what_is_legal(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        Filters(**given)
    assert str(refusal.value) == message
