"""The batch of a run in the layout it is given: its global batch is the run's, whatever the layout."""

from __future__ import annotations

from dataclasses import replace

from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.file import StoredRun


def as_found(config: RunConfig, saved: StoredRun | None) -> RunConfig:
    """The flags with the micro-batch that the run's search found, if they ask for the one that it began with."""
    search = None if saved is None else saved.search
    if search is None or config.training.initial_batch_size != search.initial:
        return config
    return with_micro_batch(config, search.micro_batch)


def with_micro_batch(config: RunConfig, size: int) -> RunConfig:
    """The flags as if they had asked for micro-batches of ``size`` sequences."""
    return replace(config, training=replace(config.training, initial_batch_size=size))


def batch_of(config: RunConfig, replicas: int, saved: StoredRun | None) -> BatchShape:
    """The flags' batch, or what keeps the saved run's global batch with so many data-parallel ranks.

    The flags mean the same run when their product with this layout, or with the run's first, is its batch.

    Raises:
        ArgonneError: the global batch cannot be kept, or is asked to be another.
    """
    asked = _asked(config, replicas)
    if saved is None:
        return asked
    kept = saved.global_batch
    if kept not in (asked.global_batch, _asked(config, saved.first_replicas).global_batch):
        raise ArgonneError(
            f"global batch {asked.global_batch} (initial_batch_size={asked.micro_batch} x gradient_accumulation_steps="
            f"{asked.accumulation} x data_parallel={replicas}) is not the run's {kept}; legal: a product of {kept}"
        )
    return BatchShape.keeping(kept, asked.micro_batch, replicas, asked.block_size)


def batch_of_resume(config: ResumeConfig, replicas: int, global_batch: int) -> BatchShape:
    """What the command asks for, which may be another batch; its accumulation, unless named, keeps ``global_batch``.

    Raises:
        ArgonneError: no accumulation does.
    """
    asked = _asked(config, replicas)
    if "gradient_accumulation_steps" in config.given:
        return asked
    return BatchShape.keeping(global_batch, asked.micro_batch, replicas, asked.block_size)


def _asked(config: RunConfig, replicas: int) -> BatchShape:
    training = config.training
    return BatchShape(
        training.initial_batch_size, training.gradient_accumulation_steps, replicas, config.data.block_size
    )
