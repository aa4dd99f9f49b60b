"""The search for a micro-batch in one process: which sizes, what is kept of it, what is refused, and in which words."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from argonne.launch.out_of_memory import complaint
from argonne.models import Execution, LanguageModel
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.parallel.errors import OutOfMemory
from argonne.training import trainer
from argonne.training.config import ModelFlags, RunConfig
from argonne.training.machine import GIB
from argonne.training.run import rough
from argonne.training.run import search as room
from argonne.training.run.batch import with_micro_batch
from argonne.training.run.directory import read_run
from argonne.training.run.file import Search, StoredRun
from argonne.training.run.memory import USABLE
from argonne.training.run.rehearsal import Rehearsed, rehearse
from argonne.training.run.resume import parse_resume, resume
from argonne.training.run.rough import Rough
from argonne.training.run.search import sizes
from argonne.training.run.setup import prepare
from argonne.training.run.workflow import pretrain
from tests.integration.runs import history, weights
from tests.models.own import Small
from tests.training.small_run import small_run

INITIAL, FITS = 12, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    config = small_run(tmp_path_factory.mktemp("search"))
    return with_training(config, initial_batch_size=INITIAL, min_batch_size=2)


@pytest.fixture
def rehearsed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes that are tried, of which the largest that fits is ``FITS``."""
    tried: list[int] = []

    def rehearse(
        config: RunConfig, workload: Any, groups: Any, size: int, limit: float, computes: bool = False
    ) -> Rehearsed:
        tried.append(size)
        return Rehearsed(size <= FITS, 2 * GIB, GIB)

    monkeypatch.setattr(room, "rehearse", rehearse)
    monkeypatch.setattr(room, "surely_fits", lambda *_: False)
    return tried


def with_training(config: RunConfig, **training: Any) -> RunConfig:
    return replace(config, training=replace(config.training, **training))


def in_directory(config: RunConfig, directory: Path, stop: int | None = None) -> RunConfig:
    return replace(config, run=replace(config.run, output_dir=directory, stop_at_step=stop))


@pytest.mark.parametrize(
    ("initial", "least", "expected"),
    [
        (512, 4, [512, 256, 128, 64, 32, 16, 8, 4]),
        (12, 2, [12, 6, 3, 2]),
        (7, 4, [7, 4]),
        (2, 4, [2]),
        (1, 1, [1]),
    ],
)
def test_sizes_are_halves_down_to_the_smallest(initial: int, least: int, expected: list[int]) -> None:
    config = with_training(RunConfig(), initial_batch_size=initial, min_batch_size=least)
    assert list(sizes(config)) == expected


def test_sizes_of_a_reproducible_run_are_whole_blocks(config: RunConfig) -> None:
    parallel = replace(config.parallel, reproducible=True, reproducible_blocks=8)
    of_three = replace(config.data, block_size=4)
    assert list(sizes(replace(config, parallel=parallel, data=of_three))) == [12, 6, 2]


def test_what_is_found_is_kept_and_used_by_the_same_command_and_by_resume(
    config: RunConfig, rehearsed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = with_training(config, memory_limit=4)
    run, other = tmp_path / "run", tmp_path / "other"
    assert pretrain(in_directory(config, run, stop=2)) == 0
    printed = capsys.readouterr().out
    assert rehearsed == [12, 6, 3]
    assert printed.count("micro-batch 3 of 12 fits, in ") == 1
    assert "of 4.00 GiB a rank: the run's global batch is 3 x 2 micro-batches x 1 replica = 6\n" in printed
    assert "| 6 x 16 tokens a step |" in printed

    stored = read_run(run)
    assert stored is not None
    assert (stored.search, stored.global_batch) == (Search(INITIAL, FITS), 6)
    trainer = json.loads((run / "step_00000002" / "trainer.json").read_text())
    assert trainer["search"] == {"initial": INITIAL, "micro_batch": FITS, "here": None}
    assert trainer["flags"]["training"]["initial_batch_size"] == FITS

    assert pretrain(in_directory(config, run, stop=3)) == 0
    assert resume(parse_resume(["--checkpoint-path", str(run), "--device=cpu"])) == 0
    assert rehearsed == [12, 6, 3], "nothing is tried again"
    assert read_run(run) == replace(stored, first_layout=stored.first_layout)

    assert pretrain(in_directory(with_training(config, initial_batch_size=FITS), other)) == 0
    assert history(run) == history(other), "the losses of a run that is started with that size"
    assert weights(run) == weights(other)


def test_a_run_that_is_killed_before_its_first_save_does_not_search_again(
    config: RunConfig, rehearsed: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "train_step", killed)
        with pytest.raises(KeyboardInterrupt):
            pretrain(in_directory(config, tmp_path))
    assert rehearsed == [12, 6, 3]
    assert not list(tmp_path.glob("step_*"))
    assert pretrain(in_directory(config, tmp_path, stop=2)) == 0
    assert rehearsed == [12, 6, 3]
    assert {line["tokens"] for line in history(tmp_path)} == {96, 192}


def test_what_a_damaged_record_says_is_taken_from_a_checkpoint(
    config: RunConfig, rehearsed: list[int], tmp_path: Path
) -> None:
    assert pretrain(in_directory(config, tmp_path, stop=2)) == 0
    (tmp_path / "run.json").write_text("{")
    assert pretrain(in_directory(config, tmp_path, stop=3)) == 0
    assert rehearsed == [12, 6, 3]
    found = read_run(tmp_path)
    assert found is not None
    assert found.search == Search(INITIAL, FITS)


def test_a_search_of_another_kind_is_no_record() -> None:
    with pytest.raises(ValueError, match="its search is of another kind"):
        StoredRun.from_json({"identity": {}, "global_batch": 6, "first_layout": {}, "search": {"initial": "12"}})


def test_a_size_that_fits_at_once_is_no_news(
    config: RunConfig, rehearsed: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pretrain(in_directory(with_training(config, initial_batch_size=FITS), tmp_path, stop=1)) == 0
    assert rehearsed == [3]
    assert " fits" not in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["search"] is None


def test_what_nothing_fits_into_is_refused_with_the_sizes_and_what_helps(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What there is beside this process is more than weights and moments, and less than a step."""
    monkeypatch.setattr(room, "resident_bytes", lambda: 0)
    asked = with_training(config, memory_limit=0.0002, disable_gradient_checkpointing=True)
    with pytest.raises(ArgonneError) as refusal:
        pretrain(in_directory(asked, tmp_path / "run"))
    text, groups = str(refusal.value), ProcessGroups.single()
    assert room.Rough.of(asked, prepare(asked, groups), groups, 2).is_quick
    least = rehearse(asked, prepare(asked, groups), groups, 2, math.inf)
    assert f" tensors need {least.needs / GIB:.3g}, weights and moments {least.state / GIB:.3g} of them; " in text
    assert text.startswith(
        "no micro-batch from 12 down to 2 of block_size=16 fits into the memory of rank 0: of 0.0002 GiB "
        "(--memory-limit) 10% are left for what is not counted, the process has 0 itself, and tensors need "
    )
    assert text.endswith(
        " of them; legal: a smaller --min-batch-size, --recompute full, more processes with "
        "--tensor-parallel or --pipeline-parallel, a smaller --block-size"
    )
    assert not (tmp_path / "run").exists()


class Uncountable(Small):
    """It looks at the numbers that it computes with."""

    def forward(self, batch: Any) -> torch.Tensor:
        assert batch.ids.numpy().size
        return super().forward(batch)


def build(execution: Execution, vocabulary: int) -> LanguageModel:
    return Uncountable(execution, vocabulary)


def test_anothers_model_that_needs_its_numbers_is_counted_with_them_where_it_is_small(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half of what a micro-batch of 12 needs there is no room for one of 6, as the weights do not get fewer."""
    monkeypatch.setattr(room, "surely_fits", lambda *_: False)
    groups, own = ProcessGroups.single(), replace(config, model=ModelFlags())
    workload = prepare(own, groups, model=build)
    needs = rehearse(own, workload, groups, INITIAL, math.inf, computes=True).needs
    limited = with_training(own, memory_limit=needs / 2 / USABLE / GIB)
    monkeypatch.setattr(room, "resident_bytes", lambda: 0)
    found = room.largest([with_micro_batch(limited, size) for size in sizes(limited)], workload, groups)
    assert found is not None
    assert found.config.training.initial_batch_size == 3


def test_anothers_model_that_cannot_be_counted_starts_as_asked_or_is_refused_a_limit(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(room, "surely_fits", lambda *_: False)
    monkeypatch.setattr(rough, "WITHOUT_NUMBERS", 0)
    monkeypatch.setattr(rough, "EACH_WITHOUT_NUMBERS", 0)
    own = in_directory(replace(config, model=ModelFlags()), tmp_path / "run", stop=1)
    assert pretrain(own, build) == 0
    assert "note: whether micro-batch 12 fits into memory could not be found out (" in capsys.readouterr().out
    limited = in_directory(with_training(own, memory_limit=2), tmp_path / "limited")
    with pytest.raises(ArgonneError, match="memory_limit=2 cannot be kept, as the memory of this model's step cannot"):
        pretrain(limited, build)


def test_what_another_loss_holds_besides_the_model_is_tried_however_small_the_model(config: RunConfig) -> None:
    groups, limited = ProcessGroups.single(), with_training(config, memory_limit=4)
    workload, there = prepare(limited, groups), room.Room(4 * GIB, 0, "--memory-limit")
    alone = Rough.of(limited, workload, groups, 2)
    assert room.surely_fits(alone, limited, groups, there)
    assert alone.is_quick
    with_teacher = replace(workload, loss=mock.Mock(identity={"teacher": "another model"}))
    unknown = Rough.of(limited, with_teacher, groups, 2)
    assert not room.surely_fits(unknown, limited, groups, there)
    assert not unknown.is_quick


def test_where_there_is_little_room_what_a_rehearsal_frees_goes_back_to_the_system(
    config: RunConfig, rehearsed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the first size is tried; not where nothing has to be, as it takes time in every step."""
    groups, limited = ProcessGroups.single(), with_training(config, memory_limit=4)
    workload, tried_before = prepare(limited, groups), []
    monkeypatch.setattr(room, "return_large_blocks", lambda: tried_before.append(len(rehearsed)))
    room.largest([with_micro_batch(limited, FITS)], workload, groups)
    assert (tried_before, rehearsed) == ([0], [FITS])
    monkeypatch.setattr(room, "surely_fits", lambda *_: True)
    room.largest([with_micro_batch(limited, FITS)], workload, groups)
    assert (tried_before, rehearsed) == ([0], [FITS])


@pytest.mark.parametrize(
    ("least", "settled", "notes"),
    [
        (4, None, []),
        (12, None, ["--min-batch-size has no effect: initial_batch_size=12 is no more"]),
        (4, "nothing is tried", ["--min-batch-size has no effect: nothing is tried"]),
    ],
)
def test_a_flag_that_does_nothing_as_things_are_says_so(least: int, settled: str | None, notes: list[str]) -> None:
    """A limit always does something: where the size is settled, large blocks of memory go back at once."""
    config = with_training(RunConfig(), initial_batch_size=INITIAL, min_batch_size=least, memory_limit=1.0)
    config = replace(config, given=frozenset({"min_batch_size", "memory_limit"}))
    assert room.in_vain(config, settled) == [f"note: {note}" for note in notes]


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_a_limit_that_is_none_is_refused(limit: float) -> None:
    with pytest.raises(ArgonneError, match=r"memory_limit=\S+ is not legal; legal: more than 0"):
        with_training(RunConfig(), memory_limit=limit).check()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory"),
            True,
        ),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (MemoryError(), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
    ids=str,
)
def test_what_allocators_raise_is_known(error: Exception, is_memory: bool) -> None:
    assert (complaint(error) is error) == is_memory
    wrapped = RuntimeError("a stage has failed")
    wrapped.__cause__ = error
    assert (complaint(wrapped) is error) == is_memory


def test_memory_that_runs_out_while_training_is_told_with_the_sizes_and_what_to_change(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = trainer.train_step

    def fail(state: Any, *rest: Any) -> Any:
        if state.step == 2:
            return torch.empty(2**50)  # PyTorch's own words
        return step(state, *rest)

    monkeypatch.setattr(trainer, "train_step", fail)
    with pytest.raises(OutOfMemory) as told:
        pretrain(in_directory(config, tmp_path))
    text = str(told.value)
    assert text.startswith(
        "memory ran out on rank 0 after step 2, with micro-batch 12 x block_size=16 at tensor=1; legal:"
    )
    assert (
        "legal: --initial-batch-size 6 --gradient-accumulation-steps 4 (the same global batch), more processes" in text
    )
    assert "\n" not in text
    monkeypatch.undo()
    smaller = with_training(config, initial_batch_size=6, gradient_accumulation_steps=4)
    assert pretrain(in_directory(smaller, tmp_path)) == 0, "what it says is legal"
