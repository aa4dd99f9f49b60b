"""A save can be ended at any moment, by a signal or with the power: there are as many valid checkpoints as before."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from argonne.checkpoint import checkpoints, faults, newest_valid, prune, resolve, step_directory, step_of
from argonne.checkpoint import format as checkpoint_format
from argonne.parallel import ProcessGroups
from tests.checkpoint.saved import cut_last_byte, save
from tests.checkpoint.watch import Killed, lost_with_the_power, watched

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells which file is synced")
ALONE = ProcessGroups.single()


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """That a file is synced is noted; here no power goes, so that nothing need wait for a disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(params=["exchanged", "renamed twice"])
def replacing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How a checkpoint makes way for another of its step: at one blow, or where the disk cannot do that."""
    if request.param == "renamed twice":
        monkeypatch.setattr(checkpoint_format, "exchange", lambda first, second: False)
    return request.param


def save_and_prune(root: Path, step: int, seed: int, keep: int) -> None:
    prune(root, keep, save(ALONE, root, step, seed))


def valid_steps(root: Path) -> set[int | None]:
    return {step_of(path) for path in checkpoints(root) if not faults(path)}


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        save(ALONE, root, step, seed=step)
    return root


@pytest.mark.parametrize("step", [2, 3], ids=["again", "another"])
def test_a_save_killed_at_any_moment_leaves_as_many_valid_checkpoints_as_before(
    replacing: str, two_steps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    def killed_at(moment: int) -> bool:
        root = shutil.copytree(two_steps, tmp_path / str(moment))
        try:
            with watched(root, monkeypatch, kill_at=moment) as operations:
                save_and_prune(root, step, seed=9, keep=2)
        except Killed:
            told = f"killed after {[str(op.path.relative_to(root)) for op in operations[-3:]]}"
            assert len(valid_steps(root)) >= 2, told
            assert 2 in valid_steps(root), told
            if replacing == "exchanged":
                assert not faults(step_directory(root, 2)), told
            assert newest_valid(resolve(step_directory(root, 2)), ALONE)[0] is not None, told
            save_and_prune(root, 4, seed=4, keep=9)  # what was left is no hindrance, and is put in order
            assert valid_steps(root) in ({1, 2, 4}, {2, step, 4}, {1, 2, step, 4}), told
            assert all(path.name == f"step_{step_of(path):08d}" for path in root.iterdir()), told
            return True
        return False

    moments = next(moment for moment in range(1000) if not killed_at(moment))
    assert moments > 30


def test_the_copy_that_was_replaced_stays_while_it_is_the_only_valid_one_of_its_step(tmp_path: Path) -> None:
    save(ALONE, tmp_path, 2, seed=1)
    step_directory(tmp_path, 2).rename(tmp_path / "step_00000002.replaced")
    again = save(ALONE, tmp_path / "elsewhere", 2, seed=1).rename(step_directory(tmp_path, 2))
    save(ALONE, tmp_path, 5, seed=1)
    cut_last_byte(next(again.glob("optimizer-*")))
    prune(tmp_path, keep=2)
    assert newest_valid(checkpoints(tmp_path)[:2], ALONE)[0] == tmp_path / "step_00000002.replaced"


@pytest.mark.parametrize("keep", [1, 2])
def test_prune_never_deletes_the_last_valid_checkpoint(tmp_path: Path, keep: int) -> None:
    for step in (1, 2, 3, 4):
        save(ALONE, tmp_path, step, seed=step)
    for step in (3, 4):
        cut_last_byte(next(step_directory(tmp_path, step).glob("model-*.safetensors")))
    assert prune(tmp_path, keep) == [step_directory(tmp_path, step) for step in (1, *((3,) if keep == 1 else ()))]
    assert valid_steps(tmp_path) == {2}


def test_prune_keeps_no_more_than_it_is_told_where_one_of_those_is_valid(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save(ALONE, tmp_path, step, seed=step)
    cut_last_byte(next(step_directory(tmp_path, 4).glob("model-*.safetensors")))
    assert prune(tmp_path, keep=2) == [step_directory(tmp_path, step) for step in (1, 2)]
    assert valid_steps(tmp_path) == {3}


def test_a_checkpoint_that_cannot_be_deleted_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save(ALONE, tmp_path, step, seed=step)

    def refuse(*names: object) -> None:
        raise PermissionError("not permitted")

    monkeypatch.setattr("os.replace", refuse)
    assert prune(tmp_path, 1) == []
    assert valid_steps(tmp_path) == {1, 2}


@pytest.mark.parametrize("again", [False, True], ids=["first", "again"])
def test_what_a_save_counts_on_is_on_the_disk_before_it_is_counted_on(
    replacing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: bool
) -> None:
    """With any one of its syncs left out, a power cut could take what the rest of the save relies on."""

    def lost(run: str, skip_sync: int | None) -> tuple[list[str], int]:
        root = tmp_path / run
        if again:
            save(ALONE, root, 1, seed=3)
        with watched(tmp_path, monkeypatch, skip_sync=skip_sync) as operations:
            directory = save(ALONE, root, 1, 4, file_bytes=4000)
        names = [str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()]
        names.remove("manifest.json")
        return lost_with_the_power(operations, root, names), sum(op.kind == "sync" for op in operations)

    found, syncs = lost("whole", None)
    assert found == []
    assert syncs > 12
    for left_out in range(syncs):
        assert lost(f"without {left_out}", left_out)[0], f"without sync {left_out} nothing is missed"
