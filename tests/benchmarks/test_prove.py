"""benchmarks/prove.py: its command lines are accepted, and its verdict is no only where a bit differs."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from argonne.launch import parse
from argonne.training.batch_shape import BatchShape
from argonne.training.config import RunConfig
from argonne.training.run.reproducible import check_reproducible
from benchmarks.prove import MOVED, PLACES, TRAINING, Options, Outcome, Place, command, verdict

ENDED = Outcome(((4.0, 1.5), (3.0, 1.25)), "ab")


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.name)
def test_every_run_is_a_reproducible_one_of_pretrain_with_the_same_global_batch(tmp_path: Path, place: Place) -> None:
    words = command(Options(corpus=tmp_path, device="cpu"), place, tmp_path / "run", tmp_path / "tokenizer", 20)[2:]
    config = parse(RunConfig, words)
    layout = config.parallel.layout(place.processes)
    check_reproducible(config, layout, config.model.resolve(config.data.block_size))
    training = config.training
    shape = BatchShape(training.initial_batch_size, training.gradient_accumulation_steps, layout.data, 1)
    shape.check_reproducible(config.parallel.kind)
    assert config.launch.nproc == layout.world_size
    assert shape.global_batch == 4 * TRAINING["--initial-batch-size"]
    config.parallel.plan(layout).check_micro_batches(shape.accumulation)


def test_the_run_that_is_killed_goes_on_in_layouts_of_different_axes() -> None:
    assert len({place.flags[0] for place in MOVED}) == len(MOVED) == 3


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (ENDED, "the same bits: 2 runs have the same loss and gradient norm at each of 2 steps"),
        (replace(ENDED, tensors="cd"), "NOT THE SAME: TP 2 differs from one process in its weights or moments alone"),
        (
            replace(ENDED, steps=((4.0, 1.5), (3.0, math.nextafter(1.25, 2)))),
            "NOT THE SAME: TP 2 differs from one process from step 2",
        ),
        (replace(ENDED, steps=((4.0, 1.5),)), "NOT THE SAME: TP 2 differs from one process from step 2"),
    ],
)
def test_the_verdict_says_where_runs_part(other: Outcome, told: str) -> None:
    same, line = verdict({"one process": ENDED, "TP 2": other})
    assert same == (other == ENDED)
    assert line.startswith(told)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--steps", "5"], "steps=5 is not legal; legal: 6 or more"),
        (["--corpus", "nowhere"], "corpus='nowhere' has no train-*.parquet"),
        (["--step", "9"], "--step"),
    ],
)
def test_wrong_use_is_one_line(words: list[str], told: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.prove", *words], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert told in line
