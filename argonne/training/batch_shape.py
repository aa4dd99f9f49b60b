"""The shape of an optimizer step's batch: the one place where its sizes are multiplied and divided."""

from __future__ import annotations

from dataclasses import dataclass

from argonne.data import Assignment
from argonne.data.assignment import Order
from argonne.parallel.communication.layout import divisors
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.errors import ArgonneError


@dataclass(frozen=True)
class BatchShape:
    """What every optimizer step consumes: ``replicas`` x ``accumulation`` x ``micro_batch`` sequences."""

    micro_batch: int
    """Sequences of a micro-batch on each data-parallel rank."""
    accumulation: int
    """Micro-batches of a step on each data-parallel rank."""
    replicas: int
    """Data-parallel ranks."""
    block_size: int
    """Target tokens of a sequence."""

    @property
    def global_batch(self) -> int:
        """Sequences of a step: the same at every layout of a run."""
        return self.micro_batch * self.accumulation * self.replicas

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of a step, over which its loss is the mean."""
        return self.global_batch * self.block_size

    @property
    def ids(self) -> tuple[int, int, int]:
        """``[accumulation, micro_batch, block_size + 1]``: one replica's token ids of a step, inputs and targets."""
        return self.accumulation, self.micro_batch, self.block_size + 1

    @classmethod
    def keeping(cls, global_batch: int, micro_batch: int, replicas: int, block_size: int) -> BatchShape:
        """The shape with as many micro-batches as make ``global_batch``.

        Raises:
            ArgonneError: no number of them does.
        """
        if global_batch % (micro_batch * replicas):
            raise ArgonneError(
                f"micro-batch {micro_batch} x data_parallel={replicas} does not divide the run's global batch of "
                f"{global_batch}; legal: a product that does (resume.py may change the batch: say "
                "--gradient-accumulation-steps too)"
            )
        return cls(micro_batch, global_batch // (micro_batch * replicas), replicas, block_size)

    def assignment(self, kind: Kind, reproducible: bool) -> Assignment:
        """Who has which samples, under that kind of data parallelism.

        A reproducible run deals out leaves: under ``fsdp``, which sums over the replicas at each micro-batch, those of
        one micro-batch are neighbours; otherwise those of one replica are.
        """
        leaves: Order = "strided" if kind == "fsdp" else "contiguous"
        order: Order = leaves if reproducible else "interleaved"
        return Assignment(self.micro_batch, self.accumulation, self.replicas, order)

    def check_reproducible(self, kind: Kind) -> None:
        """Refuse a number of replicas that cannot add up a step's micro-batches in the order of one process.

        That is one aligned binary tree: pairs of neighbours, pairs of pairs. What is added up first, the micro-batches
        of a replica, or under ``fsdp`` the replicas' of one micro-batch, must be a branch of it.

        Raises:
            ArgonneError: it is not.
        """
        leaves = self.accumulation * self.replicas
        branches = {size: size if kind == "fsdp" else leaves // size for size in divisors(leaves)}
        legal = [size for size, branch in branches.items() if branch == leaves or branch & (branch - 1) == 0]
        if self.replicas not in legal:
            raise ArgonneError(
                f"data_parallel={self.replicas} with gradient_accumulation_steps={self.accumulation} is not "
                f"reproducible as {kind}: a sum over {branches[self.replicas]} micro-batches is no branch of the "
                f"binary tree over the {leaves} of a step; legal data_parallel sizes: {', '.join(map(str, legal))}"
            )
