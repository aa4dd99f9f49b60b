"""What every kind of data parallelism does for a training step, and which rows of a parameter a rank has."""

from __future__ import annotations

from collections.abc import Sequence

from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.parallel.sharding.gradients import sum_partial_gradients
from argonne.parallel.sharding.spec import ShardedParameter
from argonne.parallel.tensor_parallel.working_copy import KeepsWorkingCopy


class DataParallel:
    """Keeps the ranks of ``groups.replicas`` at one model. This base is a replica on its own.

        strategy.begin(micro_batches)
        for batch in micro_batches: loss(batch).backward()
        strategy.complete()
        norm, clipping, optimizer step: over strategy.parameters
        strategy.publish()

    Every method is collective over all ranks of a stage. Gradients are added up, never averaged: the loss is
    divided by the number of target tokens of the global batch.
    """

    def __init__(self, parameters: Sequence[ShardedParameter], groups: ProcessGroups) -> None:
        self.parameters = list(parameters)
        """What the optimizer updates, norm and clipping see and a checkpoint saves."""
        self.groups = groups
        self.leaves: LeafSums | None = None
        """What adds up the micro-batches of a reproducible run."""
        self.copies: list[KeepsWorkingCopy] = []
        """The modules whose weights are cast once a step."""
        if groups.reproducible and groups.replicas.size == 1:
            self.leaves = LeafSums.of(self.parameters)

    def facts(self, micro_batches: int) -> list[str]:
        """What a run of so many micro-batches a step says of itself as it begins: what it keeps besides."""
        copies = sum(module.working.bytes for module in self.copies) / 2**30
        found = [f"{copies:.2f} GiB of weights in the compute dtype"] if copies else []
        if self.leaves is None:
            return found
        kept, each = self.leaves.most(micro_batches), self.leaves.gradient_bytes / 2**30
        blocks = self.groups.tensor.blocks
        gradients = "gradient" if kept == 1 else "gradients"
        return [*found, f"same bits at any layout: {blocks} blocks, up to {kept} {gradients} of {each:.2f} GiB kept"]

    def begin(self, micro_batches: int, deferred: bool = False) -> None:
        """Call before the backward passes of an optimizer step. Gradients that are there are dropped.

        ``micro_batches`` is the number of backward passes that each parameter will see. ``deferred``: some
        gradients are added later than autograd says that they are (a pipeline puts off those of its weights),
        so that nothing is sent before ``complete``.
        """
        for sharded in self.parameters:
            for parameter in (sharded.parameter, *sharded.aliases):
                parameter.grad = None
        if self.leaves is not None:
            self.leaves.begin(micro_batches)

    def complete(self) -> None:
        """Call after the backward passes: every gradient in ``parameters`` is then that of the global batch."""
        if self.leaves is not None:
            self.leaves.finish()
        sum_partial_gradients(self.parameters, self.groups)

    def publish(self) -> None:
        """Call when the values of ``parameters`` have changed: the model computes with them from now on.

        That is after an optimizer step, initialisation or loading.
        """
        for module in self.copies:
            module.working.publish(module.weight)


def rows_of_rank(rows: int, axis: Axis) -> range:
    """The rows that this rank of ``axis`` has of ``rows``: ``ceil(rows / size)``, the last ranks fewer or none.

    The chunks of ``torch.chunk``, which FSDP2 makes too.
    """
    each = rows_of_a_full_rank(rows, axis)
    return range(min(axis.rank * each, rows), min((axis.rank + 1) * each, rows))


def rows_of_a_full_rank(rows: int, axis: Axis) -> int:
    """The most rows that a rank of ``axis`` has of ``rows``, and 1 at least."""
    return max(1, -(-rows // axis.size))
