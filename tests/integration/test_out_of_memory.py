"""Memory in whole runs: a limit that halves the micro-batch, and memory that runs out on one rank or on all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.integration.runs import command, finish, history, metrics, start, succeed, weights, words_of
from tests.warm import SERVERS, environment

FAILING = """
import os, sys

import torch

from argonne.launch import drive, guarded, parse
from argonne.training import trainer
from argonne.training.config import RunConfig
from argonne.training.run.checks import check
from argonne.training.run.workflow import pretrain

take_step = trainer.train_step


def failing(state, *rest):
    if state.step == 2 and os.environ["RANK"] in os.environ["FAIL_ON"]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return take_step(state, *rest)


trainer.train_step = failing
if __name__ == "__main__":
    guarded(lambda: drive(pretrain, check, parse(RunConfig, sys.argv[1:])))
"""


@pytest.mark.parametrize("failing", ["1", "01"], ids=["one rank", "all ranks"])
def test_memory_that_runs_out_is_one_line_from_one_rank(flags: dict[str, Any], tmp_path: Path, failing: str) -> None:
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    words = words_of({"--nproc": 2, **flags, "--data-parallel": 2, "--output-dir": tmp_path / "run"})
    status, output = SERVERS.run([str(script), *words], environment(FAIL_ON=failing), timeout=120)
    told = [line for line in output.splitlines() if line.startswith("argonne: ")]
    assert status == 2, output
    assert len(told) == 1, output
    assert told[0].startswith("argonne: error: memory ran out on rank ")
    assert " after step 2, with micro-batch 2 x block_size=32 at data=2; legal: --initial-batch-size 1 " in told[0]
    assert "Traceback" not in output
    assert len(metrics(tmp_path / "run")) == 2


def begun_anew(driver: str, flags: dict[str, Any]) -> str:
    """What a driver prints that runs in a process of its own, which has imported nothing."""
    done = finish(start(command(driver, flags, nproc=1)))
    assert done.status == 0, done.output
    return done.output


def test_a_limit_of_little_more_than_the_interpreter_is_kept_to(flags: dict[str, Any], tmp_path: Path) -> None:
    """What PyTorch imports for a first step is the interpreter's."""
    least = {**flags, "--total-steps": 1, "--save-interval": 1, "--gradient-accumulation-steps": 1}
    begun_anew("pretrain", {**least, "--initial-batch-size": 1, "--output-dir": tmp_path / "least"})
    limit = 1.2 * metrics(tmp_path / "least")[-1]["memory_gib"]
    asked = {"--initial-batch-size": 8192, "--min-batch-size": 1, "--memory-limit": limit}
    output = begun_anew("pretrain", {**least, **asked, "--output-dir": tmp_path / "found"})
    size = json.loads((tmp_path / "found" / "run.json").read_text())["search"]["micro_batch"]
    assert 1 < size < 8192, output
    assert metrics(tmp_path / "found")[-1]["memory_gib"] < limit


@pytest.mark.exhaustive
def test_a_limit_halves_the_micro_batch_and_the_run_keeps_to_it(flags: dict[str, Any], tmp_path: Path) -> None:
    """At TP 2. The interpreter takes much of the limit, so that which size fits depends on the machine."""
    few = {**flags, "--total-steps": 2, "--save-interval": 2, "--gradient-accumulation-steps": 3, "--block-size": 64}
    few |= {"--intermediate-size": 4000, "--disable-gradient-checkpointing": None}
    asked = {**few, "--initial-batch-size": 1024, "--min-batch-size": 1, "--memory-limit": 1.0}
    output = succeed("pretrain", {**asked, "--output-dir": tmp_path / "found"})
    record = json.loads((tmp_path / "found" / "run.json").read_text())
    size = record["search"]["micro_batch"]
    assert 1 < size < 1024, output
    assert f"micro-batch {size} of 1024 fits, in " in output
    assert record["global_batch"] == 3 * size
    assert all(line["memory_gib"] < 1.0 for line in metrics(tmp_path / "found"))

    succeed("pretrain", {**few, "--initial-batch-size": size, "--output-dir": tmp_path / "started"})
    assert history(tmp_path / "found") == history(tmp_path / "started")
    assert weights(tmp_path / "found") == weights(tmp_path / "started")
