"""The hash of a global batch is that of its samples in their order, whoever holds them and wherever the step begins."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from argonne.data import Assignment, Batch
from argonne.parallel import Layout, ProcessGroups
from argonne.training.feed import BatchFeed
from tests.pool import RankPool

LENGTH, SAMPLES = 5, 6


def sample(number: int) -> np.ndarray:
    return (number * 1_000 + np.arange(LENGTH) ** 2).astype(np.int64)


class Samples:
    """Rank d of D reads the samples k with k mod D == d, from ``start`` on."""

    def __init__(self, groups: ProcessGroups, start: int) -> None:
        self.data, self.start = groups.data, start
        self.assignment = Assignment(1, SAMPLES // groups.data.size, groups.data.size)

    def next_batch(self) -> Batch:
        numbers = [k for k in range(self.start, self.start + SAMPLES) if k % self.data.size == self.data.rank]
        self.start += SAMPLES
        tokens = np.stack([sample(number) for number in numbers])[:, None]
        return Batch(tokens, np.zeros_like(tokens, dtype=np.int32), {}, self.start)


def digests(groups: ProcessGroups, start: int) -> list[str | None]:
    feed = BatchFeed(Samples(groups, start), (SAMPLES // groups.data.size, 1, LENGTH), groups)  # type: ignore[arg-type]
    found = [feed.next().digest for _ in range(2)]
    feed.close()
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_the_hash_is_of_the_samples_in_order_at_any_start(ranks: RankPool, size: int, start: int) -> None:
    """After the size of a batch has changed, a step need not begin at a multiple of the number of replicas."""
    expected = []
    for first in (start, start + SAMPLES):
        each = [hashlib.blake2b(sample(k).tobytes(), digest_size=16).digest() for k in range(first, first + SAMPLES)]
        expected.append(hashlib.blake2b(b"".join(each), digest_size=16).hexdigest())
    assert ranks.run(Layout(data=size), digests, start) == [expected] * size
