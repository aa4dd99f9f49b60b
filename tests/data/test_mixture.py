from __future__ import annotations

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from argonne.data import (
    Assignment,
    BatchStream,
    DataError,
    Mixture,
    SequenceStream,
    Weighted,
    parse_globs,
    states_of_source,
)

BLOCK, LANES = 9, 4
weights = st.lists(st.floats(0.02, 5), min_size=1, max_size=4)


class Numbers:
    """A stream whose every lane counts."""

    def __init__(self, lanes: int = LANES, block_size: int = BLOCK) -> None:
        self.lanes, self.block_size, self.served = lanes, block_size, tuple(range(lanes))


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 10**9), st.integers(1, 3000))
def test_among_any_run_of_samples_the_shares_are_the_weights_up_to_a_few_samples(shares, first, count) -> None:
    mixture = Mixture([Numbers() for _ in shares], shares)
    found = Counter(mixture.source(number) for number in range(first, first + count))
    for source, share in enumerate(shares):
        # Twice the bound on the discrepancy of the golden ratio's sequence: 2 + 1 / log(golden ratio) * log(count).
        bound = 2 * (2 + 2.08 * np.log(count + 1))
        assert abs(found[source] - count * share / sum(shares)) <= bound


def test_the_source_of_a_sample_is_known_to_the_last_bit() -> None:
    mixture = Mixture([Numbers(), Numbers(), Numbers()], [0.5, 0.3, 0.2])
    golden = Fraction(0x9E3779B97F4A7C15, 1 << 64)
    for number in range(500):
        place = (number + 1) * golden % 1
        assert mixture.source(number) == (0 if place < Fraction(0.5) else 1 if place < Fraction(0.8) else 2)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 3)), min_size=1, max_size=4),
    st.lists(st.floats(0.1, 1), min_size=2, max_size=3),
)
def test_a_mixture_goes_on_exactly_through_stops_and_layouts(shards_of, corpus_of, tokenizer, segments, shares) -> None:
    corpora = [shards_of(corpus_of([[5 + source, 4], [3]], seed=source)) for source in range(len(shares))]

    def run(segments):
        states, sample, delivered = {}, 0, []
        for steps, ranks, micro in segments:
            streams = []
            for rank in range(ranks):
                served = range(rank, LANES, ranks)
                sources = [
                    SequenceStream(shards, tokenizer, BLOCK, LANES, None, served, states_of_source(states, s, LANES))
                    for s, shards in enumerate(corpora)
                ]
                streams.append(BatchStream(Mixture(sources, shares), Assignment(micro, 1, ranks), rank, sample))
            for _ in range(steps):
                batches = [stream.next_batch() for stream in streams]
                queues = [iter(batch.tokens[0]) for batch in batches]
                delivered += [next(queues[number % ranks]) for number in range(sample, sample + micro * ranks)]
                sample += micro * ranks
            states = {key: state for batch in batches for key, state in batch.states.items()}
            assert sorted(states) == list(range(LANES * len(shares)))
        return delivered, states

    delivered, states = run(segments)
    whole, steady = run([(len(delivered), 1, 1)])
    np.testing.assert_array_equal(delivered, whole)
    assert states == steady


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [((), 1.0)]),
        (["a/*.parquet", "b"], [(("a/*.parquet", "b"), 1.0)]),
        (["a/*.parquet:3", "b:1"], [(("a/*.parquet",), 0.75), (("b",), 0.25)]),
        (["a:0.5"], [(("a",), 1.0)]),
        (["s3://host:9000"], [(("s3://host:9000",), 1.0)]),
        (["s3://host:9000/x/*.parquet:2e-1", "b:.8"], [(("s3://host:9000/x/*.parquet",), 0.2), (("b",), 0.8)]),
    ],
)
def test_globs_with_weights_are_corpora_of_their_own(words, expected) -> None:
    found = parse_globs(words)
    assert [(each.globs, pytest.approx(each.weight)) for each in found] == expected


def test_a_file_whose_name_ends_like_a_weight_is_a_file(tmp_path: Path) -> None:
    name = tmp_path / "part:7"
    name.write_bytes(b"x")
    assert parse_globs([str(name)]) == (Weighted((str(name),), 1.0),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["a:1", "b"], "data_glob='b' has no weight but others have; legal: GLOB:WEIGHT for all, or for none"),
        (["a:0", "b:1"], "data_glob='a:0' has a weight of 0; legal: more than 0"),
        (["a:-1"], "data_glob='a:-1' has a weight of -1"),
        (["a:1e999"], "data_glob='a:1e999' has a weight of inf"),
    ],
)
def test_weights_that_mean_nothing_are_refused(words, message) -> None:
    with pytest.raises(DataError, match=message):
        parse_globs(words)


def test_streams_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(DataError, match="differ in lanes or block_size"):
        Mixture([Numbers(4), Numbers(8)], [1, 1])
    with pytest.raises(DataError, match=r"weights=\[1, 0\] of 2 streams"):
        Mixture([Numbers(), Numbers()], [1, 0])
    with pytest.raises(DataError, match="lacks lane 5"):
        states_of_source(dict.fromkeys(range(5)), 1, 4)
