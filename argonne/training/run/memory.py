"""What to say when memory has run out: the sizes of this run, and what would make them smaller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from argonne.launch.out_of_memory import told
from argonne.models.recompute import Recompute
from argonne.parallel import ProcessGroups
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig


def memory_told(
    config: RunConfig, shape: BatchShape, groups: ProcessGroups, when: Callable[[], str]
) -> AbstractContextManager[None]:
    """Within, memory that runs out ends this rank with one line: ``when``, with which sizes, and what to change."""

    def what() -> str:
        sizes = f"micro-batch {shape.micro_batch} x block_size={shape.block_size} at {groups.layout}"
        return f"{when()}, with {sizes}; legal: {_smaller(config, shape)}{what_helps(config, groups)}"

    return told(what)


def what_helps(config: RunConfig, groups: ProcessGroups, smallest: int | None = None) -> str:
    """What takes less memory than these flags; ``smallest`` is the micro-batch that was tried last."""
    replicas, parallel = groups.replicas.size > 1, config.parallel
    ways = [
        ("a smaller --min-batch-size", smallest is not None and smallest > 1),
        ("--recompute full", config.recompute != Recompute.FULL),
        ("--fsdp", replicas and not parallel.fsdp),
        ("more processes with --tensor-parallel or --pipeline-parallel", True),
        ("a smaller --block-size", smallest is not None),
    ]
    return ", ".join(way for way, helps in ways if helps)


def _smaller(config: RunConfig, shape: BatchShape) -> str:
    """Half of the micro-batch, with the same global batch; a reproducible run cannot have that."""
    half = shape.micro_batch // 2
    if config.parallel.reproducible or not half or shape.micro_batch % 2:
        return ""
    return (
        f"--initial-batch-size {half} --gradient-accumulation-steps {2 * shape.accumulation} (the same global batch), "
    )
