"""``drive``: how many ranks there are, who starts them, and which flags of launching are refused."""

from __future__ import annotations

import ast
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import argonne.launch
from argonne.launch import LaunchFlags, RestartFlags, drive
from argonne.launch.allocation import KEEPING, keep_freed_memory
from argonne.launch.refusal import reports_loss
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from argonne.parallel.communication.environment import RESTARTS_LEFT
from benchmarks.two import TwoOnCpu
from tests.pool import RankPool

ROOM = Path(argonne.launch.__file__).parent
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", RESTARTS_LEFT, "TORCHELASTIC_RUN_ID")


@dataclass(frozen=True)
class Config:
    """What any driver's configuration must have, and nothing else."""

    launch: LaunchFlags = field(default_factory=LaunchFlags)


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The processes and the restarts of each launch, none of which is made."""
    calls: list[tuple[int, int]] = []

    def launch(processes: int, restarts: int, *, on_gpus: bool) -> None:
        assert on_gpus == (torch.cuda.device_count() > 0)
        calls.append((processes, restarts))

    monkeypatch.setattr(sys.modules[drive.__module__], "launch", launch)
    return calls


def driven(flags: LaunchFlags) -> list[Any]:
    """What ``check`` is told, then what ``main`` is given, if it runs in this process."""
    seen: list[Any] = []
    drive(lambda config: seen.append(config), lambda config, processes: seen.append(processes), Config(flags))
    return seen


def test_one_process_runs_here_and_several_are_started(started: list[tuple[int, int]]) -> None:
    assert driven(LaunchFlags()) == [1, Config()]
    assert started == []
    assert driven(LaunchFlags(nproc=3)) == [3]
    assert driven(TwoOnCpu()) == [2]
    assert started == [(3, 0), (2, 0)]


def test_one_process_that_is_to_be_started_again_is_started_too(started: list[tuple[int, int]]) -> None:
    assert driven(RestartFlags(max_restarts=2)) == [1]
    assert started == [(1, 2)]


def test_ranks_keep_what_they_free_unless_their_environment_says_how_they_allocate() -> None:
    environment = {"PATH": "/bin"}
    keep_freed_memory(environment)
    assert environment == {"PATH": "/bin", **KEEPING}
    for name in ("GLIBC_TUNABLES", "MALLOC_ARENA_MAX", "LD_PRELOAD"):
        own = {name: "of the user"}
        keep_freed_memory(own)
        assert own == {name: "of the user"}


def test_every_gpu_has_a_process_unless_the_device_is_the_cpu(
    started: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert driven(LaunchFlags()) == [4]
    assert driven(TwoOnCpu()) == [4]
    assert driven(LaunchFlags(device="cpu")) == [1, Config(LaunchFlags(device="cpu"))]
    with pytest.raises(ArgonneError, match="nproc=5 is more than this machine's GPUs; legal: 1 to 4, or --device cpu"):
        driven(LaunchFlags(nproc=5))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (LaunchFlags(nproc=0), "nproc=0 is not legal; legal: 1 or more"),
        (LaunchFlags(nproc=-2), "nproc=-2 is not legal; legal: 1 or more"),
        (RestartFlags(max_restarts=-1), "max_restarts=-1 is not legal; legal: 0 or more"),
    ],
)
def test_a_number_that_is_none_of_processes_is_refused_by_every_driver(flags: LaunchFlags, message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        driven(flags)
    assert str(refusal.value) == message


def test_under_a_launcher_restarts_are_its_own_affair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert driven(RestartFlags()) == [2, Config(RestartFlags())]
    with pytest.raises(ArgonneError, match="max_restarts=3 is for ranks .*; legal: .*torchrun --max-restarts 3"):
        driven(RestartFlags(max_restarts=3))
    monkeypatch.setenv(RESTARTS_LEFT, "3")  # the launcher is this command itself
    assert driven(RestartFlags(max_restarts=3)) == [2, Config(RestartFlags(max_restarts=3))]


def test_the_status_of_main_is_the_status_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(sys.modules[drive.__module__], "leave_for_good", left.append)
    for status in (None, 0, 4):
        drive(lambda config, status=status: status, lambda config, processes: None, Config())  # type: ignore[misc]
    assert left == [4]


def reporting(groups: ProcessGroups) -> bool:
    return reports_loss()


def test_one_rank_reports_the_loss_of_another(ranks: RankPool) -> None:
    assert sum(ranks.run(Layout(tensor=3), reporting)) == 1
    assert reports_loss(), "a process alone says what it has to say"


def test_the_room_imports_nothing_of_training_models_or_data() -> None:
    allowed = ("argonne.launch", "argonne.output", "argonne.parent")
    within_parallel = ("communication", "communication.environment", "errors", "legal")
    allowed += tuple(f"argonne.parallel.{name}" for name in within_parallel)
    for file in ROOM.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if name.startswith("argonne."):
                    assert name.startswith("argonne.launch.") or name in allowed, f"{file.name} imports {name}"
