"""The batch of a run in the layout it is given: its global batch is the run's, whatever the layout."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from argonne.parallel.communication.layout import divisors
from argonne.parallel.errors import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import ResumeConfig, RunConfig
from argonne.training.run.file import Search, StoredRun

Flags = TypeVar("Flags", bound=RunConfig)


def as_found(config: RunConfig, saved: StoredRun | None) -> RunConfig:
    """The flags with the micro-batch that the run's search found, if they ask for the one that it began with."""
    search = None if saved is None else saved.search
    if search is None or config.training.initial_batch_size != search.initial:
        return config
    return with_micro_batch(config, search.micro_batch)


def with_micro_batch(config: Flags, size: int) -> Flags:
    """The flags as if they had asked for micro-batches of ``size`` sequences."""
    return replace(config, training=replace(config.training, initial_batch_size=size))


def with_shape(config: Flags, shape: BatchShape) -> Flags:
    """The flags as if they had asked for micro-batches as those of ``shape``, and so many."""
    training = replace(
        config.training, initial_batch_size=shape.micro_batch, gradient_accumulation_steps=shape.accumulation
    )
    return replace(config, training=training)


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
    return _keeping(kept, asked, config, saved.search)


def batch_of_resume(config: ResumeConfig, replicas: int, global_batch: int, search: Search | None = None) -> BatchShape:
    """What the command asks for, which may be another batch; its accumulation, unless named, keeps ``global_batch``.

    Raises:
        ArgonneError: no accumulation does.
    """
    asked = _asked(config, replicas)
    if "gradient_accumulation_steps" in config.given:
        return asked
    return _keeping(global_batch, asked, config, None if names_micro_batch(config) else search)


def names_micro_batch(config: ResumeConfig) -> bool:
    """Whether the command says a micro-batch."""
    return bool({"batch_size", "initial_batch_size"} & config.given)


def _keeping(global_batch: int, asked: BatchShape, config: RunConfig, search: Search | None) -> BatchShape:
    """``asked``, with as many micro-batches as keep the global batch; smaller ones where nobody chose their size."""
    micro_batch, (each, left) = asked.micro_batch, divmod(global_batch, asked.replicas)
    if search is not None and not left and not config.parallel.reproducible:
        micro_batch = max(size for size in divisors(each) if size <= micro_batch)
    return BatchShape.keeping(global_batch, micro_batch, asked.replicas, asked.block_size)


def _asked(config: RunConfig, replicas: int) -> BatchShape:
    training = config.training
    return BatchShape(
        training.initial_batch_size, training.gradient_accumulation_steps, replicas, config.data.block_size
    )
