"""What a batch is known by, and what the ranks that share it are handed, whatever the layout and the first sample."""

from __future__ import annotations

import numpy as np
import pytest
from torch import Tensor

from argonne.data import BatchStream, DataPosition, LaneState
from argonne.data.lanes.packing import Packed
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.communication.layout import AXES
from argonne.training.feed import BatchFeed
from tests.pool import RankPool

BLOCK, SAMPLES, START = 5, 12, 3
"""START is a multiple of no number of replicas below: after the batch size changed, steps may begin anywhere."""


class Numbered:
    """One lane: sequence n, and the numbers of its documents, are drawn from n alone."""

    block_size, lanes, served = BLOCK, 1, (0,)

    def __init__(self, number: int) -> None:
        self.number = number

    def next_sequence(self, lane: int) -> Packed:
        draw = np.random.default_rng(self.number)
        self.number += 1
        return Packed(draw.integers(1000, size=BLOCK + 1), draw.integers(3, size=BLOCK + 1, dtype=np.int32))

    def state(self, lane: int) -> LaneState:
        return LaneState(DataPosition(0, 0, 0, self.number))


def two_steps(groups: ProcessGroups, micro_batch: int) -> list[tuple[str | None, Tensor, Tensor | None]]:
    """Digest, tokens and documents of each."""
    data = groups.data
    accumulation = SAMPLES // (micro_batch * data.size)
    reading = groups.model.rank == 0
    stream = BatchStream(
        Numbered(START),
        dp_rank=data.rank,
        dp_size=data.size,
        micro_batch=micro_batch,
        accumulation=accumulation,
        start_sample=START,
    )
    feed = BatchFeed(stream if reading else None, (accumulation, micro_batch, BLOCK + 1), groups, documents=True)
    batches = [feed.next() for _ in range(2)]
    feed.close()
    return [(batch.digest, batch.tokens, batch.documents) for batch in batches]


@pytest.mark.parametrize(
    ("layout", "micro_batch"),
    [(Layout(), 4), (Layout(data=2), 3), (Layout(data=4), 1), (Layout(tensor=2, data=2), 2)],
    ids=str,
)
def test_every_rank_has_its_samples_and_the_hash_is_that_of_one_process(
    ranks: RankPool, layout: Layout, micro_batch: int
) -> None:
    alone = [digest for digest, _, _ in ranks.run(Layout(), two_steps, 6)[0]]
    assert len({*alone}) == 2
    for rank, found in enumerate(ranks.run(layout, two_steps, micro_batch)):
        replica = layout.coordinates(rank)[AXES.index("data")]
        for step, (digest, tokens, documents) in enumerate(found):
            assert digest == alone[step] if digest else rank % layout.tensor
            first = START + step * SAMPLES
            own = [k for k in range(first, first + SAMPLES) if k % layout.data == replica]
            for sample, ids, apart in zip(own, tokens.flatten(0, 1), documents.flatten(0, 1), strict=True):
                wanted = Numbered(sample).next_sequence(0)
                assert ids.tolist() == wanted.tokens.tolist(), f"sample {sample} on rank {rank}"
                assert apart.tolist() == wanted.documents.tolist(), f"documents of sample {sample} on rank {rank}"
