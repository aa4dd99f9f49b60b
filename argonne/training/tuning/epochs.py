"""The number of steps of a run that counts them by passes over its data (``--epochs``), the same at every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from argonne.data.chat.packing import Pass
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import collectively, gather_objects
from argonne.training.config import RunConfig
from argonne.training.run.file import StoredRun
from argonne.training.run.job import log
from argonne.training.run.setup import Workload
from argonne.training.tuning.config import TuneConfig


def steps_as_saved(config: RunConfig, saved: StoredRun | None) -> RunConfig:
    """The flags with the steps that the run has, if it counted them by the passes that the flags ask for."""
    sequences = None if saved is None else saved.identity.sequences
    if saved is None or sequences is None or not isinstance(config, TuneConfig):
        return config
    return _with_steps(config, sequences, saved.global_batch)


def with_steps(
    config: RunConfig, workload: Workload, groups: ProcessGroups, global_batch: int
) -> tuple[RunConfig, Workload]:
    """The steps of a new run (collective): the flags and the workload with it, and the first rank says what it found.

    The number of sequences of a pass is part of the run's data from then on. It is counted once.

    Raises:
        ArgonneError: on every rank, why the data cannot be read, or used.
    """
    if not isinstance(config, TuneConfig) or config.training.passes is None:
        return config, workload
    source = config.data.source

    def count() -> Pass | None:
        if not groups.is_first:
            return None
        assert workload.tokenizer is not None
        return workload.data.count(source, workload.tokenizer)

    found: Pass | None = gather_objects(collectively(count, groups.world), groups.world)[0]
    assert found is not None
    passes = config.training.passes
    config = _with_steps(config, found.sequences, global_batch)
    data = replace(workload.data, sequences=found.sequences)
    training = config.training
    log(
        groups,
        str(found),
        f"{passes} x {found.sequences:,} sequences in steps of {global_batch}: {training.total_steps:,} steps",
    )
    schedule: dict[str, Any] = {**(workload.identity.schedule or {}), "total_steps": training.total_steps}
    identity = replace(workload.identity, data=data.identity, schedule=schedule)
    return config, replace(workload, data=data, identity=identity)


def _with_steps(config: TuneConfig, sequences: int, global_batch: int) -> TuneConfig:
    passes = config.training.passes
    if passes is None:
        return config
    total = -(-passes * sequences // global_batch)
    return replace(config, training=replace(config.training, total_steps=total, epochs=None))
