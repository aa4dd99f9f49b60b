"""The shape of an optimizer step's batch: the one place where its sizes are multiplied and divided."""

from __future__ import annotations

from dataclasses import dataclass

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
