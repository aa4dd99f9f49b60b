"""A run that is continued where its micro-batch does not fit keeps its global batch, in smaller micro-batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from argonne.parallel import ArgonneError, ProcessGroups
from argonne.training.batch_shape import BatchShape
from argonne.training.config import ResumeConfig, ResumeFlags, RunConfig
from argonne.training.layout_flags import ParallelFlags
from argonne.training.machine import GIB
from argonne.training.run import search as room
from argonne.training.run.batch import batch_of, batch_of_resume
from argonne.training.run.file import Search, StoredRun
from argonne.training.run.identity import RunIdentity
from argonne.training.run.refit import _shapes, refit
from argonne.training.run.rehearsal import Rehearsed
from argonne.training.run.resume import parse_resume, resume
from argonne.training.run.setup import prepare
from argonne.training.run.workflow import pretrain
from tests.integration.runs import history
from tests.pool import RankPool
from tests.training.searching import LARGEST, Failure, injected, random_state
from tests.training.small_run import small_run
from tests.training.test_search import in_directory, with_training


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of 12 sequences a step, in micro-batches of 6."""
    return with_training(small_run(tmp_path_factory.mktemp("refit")), initial_batch_size=6, min_batch_size=1)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are tried; under a limit of 4 GiB no more than 3 sequences fit."""
    tried: list[int] = []

    def rehearse(
        config: RunConfig, workload: Any, groups: Any, size: int, limit: float, computes: bool = False
    ) -> Rehearsed:
        tried.append(size)
        return Rehearsed(size <= (3 if config.training.memory_limit == 4 else 100), 2 * GIB, GIB)

    monkeypatch.setattr(room, "rehearse", rehearse)
    monkeypatch.setattr(room, "surely_fits", lambda *_: False)
    monkeypatch.setattr(room, "resident_bytes", lambda: GIB)  # of this process, which has run other tests before
    return tried


def record(run: Path) -> tuple[Any, int]:
    stored = json.loads((run / "run.json").read_text())
    return stored["search"], stored["global_batch"]


def test_under_a_limit_that_is_new_the_run_goes_on_with_its_batch_and_keeps_what_fits(
    config: RunConfig, rehearsed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    limited = with_training(config, memory_limit=4)
    assert pretrain(in_directory(config, undisturbed)) == 0
    assert pretrain(in_directory(config, run, stop=1)) == 0
    assert (rehearsed, record(run)) == ([6, 6], (None, 12))
    assert pretrain(in_directory(limited, run, stop=2)) == 0
    assert rehearsed == [6, 6, 6, 4, 3]
    told = " of 4.00 GiB a rank: a step has 4 micro-batches on each replica, so that the run's global batch stays 12\n"
    assert told in capsys.readouterr().out
    assert record(run) == ({"initial": 6, "micro_batch": 6, "here": 3}, 12)
    stats = json.loads(max((run / "stats").glob("*.json")).read_text())
    assert (stats["batch_size"], stats["gradient_accumulation_steps"]) == (3, 4)

    assert pretrain(in_directory(limited, run, stop=3)) == 0
    assert resume(parse_resume(["--checkpoint-path", str(run), "--device=cpu"])) == 0
    assert len(rehearsed) == 5, "nothing is tried again"
    assert record(run)[0]["here"] == 3
    losses = [[line[name] for line in history(run)] for name in ("loss", "batch_hash", "tokens")]
    expected = [[line[name] for line in history(undisturbed)] for name in ("loss", "batch_hash", "tokens")]
    assert losses[0] == pytest.approx(expected[0], rel=1e-5)
    assert losses[2] == expected[2]

    words = ["--checkpoint-path", str(run), "--device=cpu", "--total-steps=5", "--memory-limit=9"]
    assert resume(parse_resume(words)) == 0
    assert rehearsed[5:] == [6], "what the run began with comes back where it fits"
    assert record(run)[0]["here"] is None


def test_to_begin_anew_searches_anew(config: RunConfig, rehearsed: list[int], tmp_path: Path) -> None:
    asked = with_training(config, initial_batch_size=12, memory_limit=4)
    assert pretrain(in_directory(asked, tmp_path / "run", stop=2)) == 0
    words = ["--checkpoint-path", str(tmp_path / "run"), "--force-from-scratch", "--device=cpu", "--stop-at-step=1"]
    anew = [*words, "--output-dir", str(tmp_path / "anew"), "--memory-limit=9"]
    assert resume(parse_resume(anew)) == 0
    assert rehearsed == [12, 6, 3, 12]
    assert record(tmp_path / "anew") == (None, 24)


def test_a_reproducible_run_is_refused_a_smaller_one_by_name(
    config: RunConfig, rehearsed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(config, parallel=replace(config.parallel, reproducible=True))
    assert pretrain(in_directory(config, tmp_path, stop=1)) == 0
    named = replace(with_training(config, memory_limit=4), given=frozenset({"min_batch_size"}))
    with pytest.raises(ArgonneError) as refusal:
        pretrain(in_directory(named, tmp_path))
    text = str(refusal.value)
    assert text.startswith("micro-batch 6 of block_size=16 does not fit into the memory of rank 0: of 4 GiB ")
    assert text.endswith(
        ", as the micro-batch is part of what a reproducible run is; legal: more processes with --tensor-parallel or "
        "--pipeline-parallel"
    )
    assert "note: --min-batch-size has no effect: the micro-batch is part of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("parallel", "shape", "least", "expected"),
    [
        (ParallelFlags(), BatchShape(6, 4, 1, 16), 1, [6, 4, 3, 2, 1]),
        (ParallelFlags(data_parallel=2), BatchShape(6, 2, 2, 16), 3, [6, 4, 3]),
        (ParallelFlags(), BatchShape(2, 6, 1, 16), 4, [2]),
        # Two ranks cannot do 5 micro-batches in two equal rounds.
        (ParallelFlags(pipeline_parallel=2, pipeline_schedule="interleaved"), BatchShape(5, 4, 1, 16), 1, [5, 2, 1]),
    ],
)
def test_sizes_divide_the_batch_and_suit_the_pipeline(
    parallel: ParallelFlags, shape: BatchShape, least: int, expected: list[int]
) -> None:
    layout = parallel.layout(parallel.pipeline_parallel * parallel.data_parallel)
    groups = mock.Mock(spec=ProcessGroups, layout=layout)
    config = replace(with_training(RunConfig(), min_batch_size=least), parallel=parallel)
    found = list(_shapes(config, groups, shape))
    assert [each.micro_batch for each in found] == expected
    assert {each.global_batch for each in found} == {shape.global_batch}


def test_a_micro_batch_that_nobody_chose_becomes_one_that_divides(config: RunConfig) -> None:
    saved = StoredRun(RunIdentity(), 12, {"data": 1}, Search(24, 6))
    assert batch_of(config, 4, saved) == BatchShape(3, 1, 4, 16)
    resumed = ResumeConfig(resume=ResumeFlags(Path("x")), data=config.data, training=config.training)
    assert batch_of_resume(resumed, 4, 12, saved.search) == BatchShape(3, 1, 4, 16)
    named = replace(resumed, given=frozenset({"batch_size"}))
    for refused in (
        lambda: batch_of(config, 4, replace(saved, search=None)),
        lambda: batch_of_resume(named, 4, 12, saved.search),
        lambda: batch_of(config, 5, saved),
    ):
        with pytest.raises(ArgonneError, match="does not divide the run's global batch of 12"):
            refused()


def refitted(groups: ProcessGroups, config: RunConfig, failure: Failure) -> tuple[BatchShape, Search | None, bool]:
    """What a run of micro-batches of 8 goes on with, and whether random streams are as they were."""
    shape, workload, before = BatchShape(8, 4, groups.data.size, 16), prepare(config, groups), random_state()
    failing = injected(failure, groups.world.rank, config.data.block_size)
    with failing, mock.patch.object(room, "surely_fits", return_value=False):
        shape, found = refit(config, workload, groups, shape, {}, None, computes=True)
    return shape, found, random_state() == before


@pytest.mark.parametrize(
    ("parallel", "failure"),
    [
        (ParallelFlags(tensor_parallel=2), Failure("backward", (1,))),
        (ParallelFlags(data_parallel=2, fsdp=True), Failure("update", (0,))),
    ],
    ids=str,
)
def test_all_ranks_find_one_size_where_one_runs_out(
    ranks: RankPool, config: RunConfig, parallel: ParallelFlags, failure: Failure
) -> None:
    model = replace(config.model, num_key_value_heads=2)
    config = replace(config, parallel=parallel, model=model)
    expected = BatchShape(LARGEST, 8, parallel.data_parallel, 16), Search(8, 8, LARGEST), True
    assert ranks.run(parallel.layout(2), refitted, config, failure) == [expected] * 2
