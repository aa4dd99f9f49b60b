"""From the stream on one rank to the batch on every rank: tokenised once for the ranks that share a batch."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from einops import rearrange
from torch import Tensor

from argonne.data import Batch, BatchStream, DataError, LaneState, Prefetcher
from argonne.data.staging import Staged, Staging
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import all_gather, broadcast, gather_objects
from argonne.parallel.communication.reduction import sum_over


@dataclass(frozen=True)
class Fed:
    """One optimizer step's part of the global batch, on the device of every rank that needs it."""

    tokens: Tensor
    """``[accumulation, micro_batch, block_size + 1]`` ids."""
    documents: Tensor | None
    """The same shape: the number of each token's document within its sequence; None unless asked for."""
    digest: str | None
    """A hash of the global batch's ids in their order, the same at every layout; on feeding ranks only."""
    states: Mapping[int, LaneState]
    """The state of each lane that this rank feeds, once this batch is consumed."""
    next_sample: int
    """The number of the first global sample after this batch; 0 on ranks that do not feed."""
    weights: Tensor | None = None
    """As ``tokens``: what the loss of each counts; None: each counts 1."""
    weight: int = 0
    """The sum of the weights of all targets of the global batch, the same on every rank; 0 where there are none."""

    def targets(self, ignored: int) -> Tensor:
        """``[accumulation, micro_batch, block_size]``: the token behind each, or ``ignored`` where that weighs nothing.

        Weights are 0 or 1. So said, loss and gradients come in one pass; ``Batch.weights`` takes a second.
        """
        targets = self.tokens[..., 1:]
        return targets if self.weights is None else targets.masked_fill(self.weights[..., 1:] == 0, ignored)


class BatchFeed:
    """Reads ahead on the first of the ranks that share a batch (``groups.model``), and hands it out to them.

    What ``Fed.states`` tells belongs to the batch that was handed out, however far the reading is ahead.

    Args:
        stream: on the ranks that read.
        shape: ``[accumulation, micro_batch, block_size + 1]`` of each batch.
        groups: the processes.
        documents: hand out the numbers of documents too.
        depth: batches that are read ahead.
        weights: hand out the weights of tokens too, which the stream then has.
    """

    def __init__(
        self,
        stream: BatchStream | None,
        shape: tuple[int, int, int],
        groups: ProcessGroups,
        documents: bool = False,
        depth: int = 2,
        weights: bool = False,
    ) -> None:
        self.groups = groups
        self.documents, self.weights = documents, weights
        # Ids, and where they are asked for the numbers of their documents, and their weights.
        self.shape = (1 + documents + weights, *shape)
        self.stream = stream
        self.prefetcher: Prefetcher[tuple[Batch, Staged]] | None = None
        if stream is not None:
            staging = Staging(groups.device)

            def read() -> tuple[Batch, Staged]:
                batch = stream.next_batch()
                parts: list[npt.NDArray[np.generic]] = [batch.tokens.reshape(-1)]
                if documents:
                    parts.append(batch.documents.reshape(-1))
                if weights:
                    assert batch.weights is not None
                    parts.append(batch.weights.reshape(-1))
                # One element more says that the batch is there.
                message = np.concatenate([*parts, [1]], dtype=np.int64)
                return batch, staging.put(message)

            self.prefetcher = Prefetcher(read, depth)

    def next(self) -> Fed:
        """The next batch (collective over ``groups.model``).

        Raises:
            DataError: on every rank of the group, when the data could not be read on.
        """
        batch: Batch | None = None
        problem: str | None = None
        message: Tensor | None = None
        if self.prefetcher is not None:
            try:
                batch, staged = self.prefetcher.get()
                message = staged.take()
            except DataError as error:
                problem = str(error)
        if message is None:
            message = torch.zeros(math.prod(self.shape) + 1, dtype=torch.int64, device=self.groups.device)
        message = broadcast(message, self.groups.model)
        if message[-1] != 1:
            told = [line for line in gather_objects(problem, self.groups.model) if line]
            raise DataError(told[0])
        tokens, *rest = message[:-1].view(self.shape)
        documents = rest.pop(0) if self.documents else None
        weights = rest.pop(0) if self.weights else None
        weight = 0 if weights is None else int(sum_over(weights[..., 1:].sum(), self.groups.data).item())
        if batch is None:
            return Fed(tokens, documents, None, {}, 0, weights, weight)
        return Fed(tokens, documents, self._digest(batch), batch.states, batch.step_sample, weights, weight)

    def close(self) -> None:
        """Stop reading ahead."""
        if self.prefetcher is not None:
            self.prefetcher.close()

    def _digest(self, batch: Batch) -> str:
        assert self.stream is not None
        assignment = self.stream.assignment
        samples = rearrange(batch.tokens, "accumulation batch token -> (accumulation batch) token").astype("<i8")
        hashes = [hashlib.blake2b(sample.tobytes(), digest_size=16).digest() for sample in samples]
        mine = torch.from_numpy(np.frombuffer(b"".join(hashes), dtype=np.uint8).copy())
        everyone = all_gather(mine.to(self.groups.device), self.groups.data).view(-1, 16).cpu().numpy()
        ordered = everyone[assignment.places(batch.step_sample - assignment.global_batch)]
        return hashlib.blake2b(ordered.tobytes(), digest_size=16).hexdigest()
