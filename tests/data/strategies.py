"""What hypothesis draws for several of these tests: corpora, lanes, boundary tokens, layouts."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

seeds = st.integers(0, 10**6)
lane_counts = st.integers(1, 6)
boundaries = st.sampled_from([None, (0, 2)])
"""(BOS, EOS) ids, or none."""
layouts = st.tuples(st.integers(1, 3), st.sampled_from([1, 2, 3, 4, 6]), st.integers(1, 3), st.integers(1, 3))
"""Steps, data-parallel size, sequences of a micro-batch, micro-batches of a step."""


def run(examples: int) -> settings:
    """So many examples, however slow the machine; fixtures of a function may serve all of them."""
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))


def shapes(most_rows: int, most_groups: int = 4, least_rows: int = 0) -> st.SearchStrategy[list[list[int]]]:
    """Rows of each row group of up to 3 shards; every shard has some."""
    groups = st.lists(st.integers(least_rows, most_rows), min_size=1, max_size=most_groups)
    return st.lists(groups, min_size=1, max_size=3).filter(lambda shards: all(map(sum, shards)))
