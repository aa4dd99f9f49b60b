"""The batch of a run: its global batch is kept in every layout, or refused by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from argonne.parallel import ArgonneError
from argonne.training.batch_shape import BatchShape
from argonne.training.config import DataFlags, ResumeConfig, ResumeFlags, RunConfig, TrainingFlags
from argonne.training.run.batch import batch_of, batch_of_resume
from argonne.training.run.file import StoredRun
from argonne.training.run.identity import RunIdentity

FLAGS = RunConfig(
    data=DataFlags(block_size=16), training=TrainingFlags(initial_batch_size=3, gradient_accumulation_steps=4)
)


def run_of(global_batch: int, replicas: int) -> StoredRun:
    return StoredRun(RunIdentity(), global_batch, {"data": replicas})


def test_a_new_run_has_the_batch_of_its_flags() -> None:
    assert batch_of(FLAGS, 2, None) == BatchShape(3, 4, 2, 16)


@pytest.mark.parametrize(("replicas", "accumulation"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_in_another_layout_accumulation_keeps_the_global_batch(replicas: int, accumulation: int) -> None:
    assert batch_of(FLAGS, replicas, run_of(24, 2)) == BatchShape(3, accumulation, replicas, 16)


def test_a_global_batch_that_cannot_be_kept_is_refused() -> None:
    with pytest.raises(ArgonneError, match="micro-batch 3 x data_parallel=5 does not divide .* global batch of 24"):
        batch_of(FLAGS, 5, run_of(24, 2))


def test_flags_that_ask_for_another_global_batch_are_refused() -> None:
    with pytest.raises(ArgonneError) as refusal:
        batch_of(FLAGS, 1, run_of(7, 2))
    assert str(refusal.value) == (
        "global batch 12 (initial_batch_size=3 x gradient_accumulation_steps=4 x data_parallel=1) is not the run's 7; "
        "legal: a product of 7"
    )


def test_a_resume_may_name_another_batch_and_keeps_it_otherwise() -> None:
    config = ResumeConfig(resume=ResumeFlags(Path("x")), data=FLAGS.data, training=FLAGS.training)
    assert batch_of_resume(config, 1, 24) == BatchShape(3, 8, 1, 16)
    named = replace(config, given=frozenset({"gradient_accumulation_steps"}))
    assert batch_of_resume(named, 1, 24) == BatchShape(3, 4, 1, 16)
    with pytest.raises(ArgonneError, match="does not divide the run's global batch of 7"):
        batch_of_resume(config, 1, 7)
