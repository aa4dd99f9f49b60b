"""From the stream on one rank to the batch on every rank: tokenised once for the ranks that share a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from argonne.data import Batch, BatchStream, DataError, LaneState, Prefetcher
from argonne.parallel import ProcessGroups
from argonne.parallel.collectives import all_gather, broadcast, gather_objects


@dataclass(frozen=True)
class Fed:
    """One optimizer step's part of the global batch, on the device of every rank that needs it."""

    tokens: Tensor
    """``[accumulation, micro_batch, block_size + 1]`` ids."""
    digest: str | None
    """A hash of the global batch's ids in their order, the same at every layout; on feeding ranks only."""
    states: Mapping[int, LaneState]
    """The state of each lane that this rank feeds, once this batch is consumed."""
    next_sample: int
    """The number of the first global sample after this batch; 0 on ranks that do not feed."""


class BatchFeed:
    """Reads ahead on the first of the ranks that share a batch (``groups.model``), and hands it out to them.

    What ``Fed.states`` tells belongs to the batch that was handed out, however far the reading is ahead.
    """

    def __init__(self, stream: BatchStream | None, shape: tuple[int, int, int], groups: ProcessGroups) -> None:
        self.groups = groups
        self.shape = shape
        self.prefetcher = Prefetcher(stream.next_batch) if stream is not None else None

    def next(self) -> Fed:
        """The next batch (collective over ``groups.model``).

        Raises:
            DataError: on every rank of the group, when the data could not be read on.
        """
        batch: Batch | None = None
        problem: str | None = None
        accumulation, micro_batch, length = self.shape
        # The ids, and one more element that says whether they are there.
        message = torch.zeros(accumulation * micro_batch * length + 1, dtype=torch.int64)
        if self.prefetcher is not None:
            try:
                batch = self.prefetcher.get()
                message[:-1] = torch.from_numpy(batch.tokens.reshape(-1))
                message[-1] = 1
            except DataError as error:
                problem = str(error)
        message = broadcast(message.to(self.groups.device), self.groups.model)
        if message[-1] != 1:
            told = [line for line in gather_objects(problem, self.groups.model) if line]
            raise DataError(told[0])
        tokens = message[:-1].view(self.shape)
        if batch is None:
            return Fed(tokens, None, {}, 0)
        return Fed(tokens, self._digest(batch), batch.states, batch.step_sample)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def _digest(self, batch: Batch) -> str:
        data = self.groups.data
        samples = rearrange(batch.tokens, "accumulation batch token -> (accumulation batch) token").astype("<i8")
        hashes = [hashlib.blake2b(sample.tobytes(), digest_size=16).digest() for sample in samples]
        mine = torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.uint8).copy())
        everyone = all_gather(mine.to(self.groups.device), data).view(data.size, -1, 16)
        # Rank d has the samples k with k % ranks == d: the first sample of the batch need not be rank 0's.
        first = (batch.step_sample - data.size * len(hashes)) % data.size
        ordered = rearrange(everyone.roll(-first, dims=0), "rank sample byte -> sample rank byte").contiguous()
        return hashlib.blake2b(ordered.cpu().numpy().tobytes(), digest_size=16).hexdigest()
