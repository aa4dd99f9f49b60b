"""A search finds one size on all ranks, wherever and on whichever of them memory runs out, and leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest

import tests.pool
from argonne.training.config import RunConfig
from argonne.training.layout_flags import ParallelFlags
from tests.pool import RankPool
from tests.training.searching import LARGEST, Failure, searched, undisturbed
from tests.training.small_run import small_run

DEADLINE = 120  # seconds of a case, on a busy machine: a rank that is left waiting is found so

LAYOUTS = {
    "tensor": ParallelFlags(tensor_parallel=2),
    "pipeline": ParallelFlags(pipeline_parallel=2),
    "data": ParallelFlags(data_parallel=2),
    "fsdp": ParallelFlags(data_parallel=2, fsdp=True),
    "hybrid": ParallelFlags(data_parallel=4, fsdp=True, fsdp_shard=2),
    "zero1": ParallelFlags(data_parallel=2, zero1=True),
    "reproducible": ParallelFlags(tensor_parallel=2, reproducible=True, reproducible_blocks=2),
}
MUON = " by muon"
LAYOUTS |= {name + MUON: flags for name, flags in LAYOUTS.items()}
FIRST, SECOND, ALL = (0,), (1,), (0, 1)
CASES = [
    (name, Failure(where, on)) for name in LAYOUTS for where in ("forward", "backward", "update") for on in (FIRST, ALL)
]
CASES += [(name, Failure("limit")) for name in LAYOUTS]
QUICK = [
    ("tensor", Failure("forward", SECOND)),
    ("pipeline", Failure("backward", FIRST)),
    ("data", Failure("update", ALL)),
    ("fsdp", Failure("backward", SECOND)),
    ("hybrid", Failure("backward", (2,))),
    ("tensor", Failure("limit")),
    ("fsdp" + MUON, Failure("limit")),
]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tmp_path_factory.mktemp("search"))
    training = replace(config.training, initial_batch_size=16, min_batch_size=1)
    model = replace(config.model, num_hidden_layers=2, num_key_value_heads=2)
    return replace(config, model=model, training=training)


def check(ranks: RankPool, config: RunConfig, name: str, failure: Failure) -> None:
    optimizer: Literal["muon", "adamw"] = "muon" if name.endswith(MUON) else "adamw"
    config = replace(config, parallel=LAYOUTS[name], training=replace(config.training, optimizer=optimizer))
    layout = config.parallel.layout(4 if name.startswith("hybrid") else 2)
    found = ranks.run(layout, searched, config, failure)
    started_so = replace(config, training=replace(config.training, initial_batch_size=LARGEST))
    expected = ranks.run(layout, undisturbed, started_so)
    assert found == [(LARGEST, losses, True) for losses in expected]


@pytest.fixture(autouse=True)
def deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tests.pool, "TIMEOUT", DEADLINE)


@pytest.mark.parametrize(("name", "failure"), QUICK, ids=str)
def test_all_ranks_find_the_largest_size_that_fits(
    ranks: RankPool, small: RunConfig, name: str, failure: Failure
) -> None:
    check(ranks, small, name, failure)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "failure"), CASES, ids=str)
def test_all_ranks_find_the_largest_size_wherever_memory_runs_out(
    ranks: RankPool, small: RunConfig, name: str, failure: Failure
) -> None:
    check(ranks, small, name, failure)
