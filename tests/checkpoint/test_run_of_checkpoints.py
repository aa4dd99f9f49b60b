"""The checkpoints of a run, in the order of steps: the newest valid one is found, old ones pruned, paths resolved."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from argonne.checkpoint import checkpoints, faults, newest_valid, prune, resolve, step_directory, step_of
from argonne.parallel import ArgonneError, Layout, ProcessGroups
from tests.checkpoint.saved import cut_last_byte, empty, remove
from tests.pool import RankPool


def find_newest(groups: ProcessGroups, root: Path) -> tuple[Path | None, list[str]]:
    return newest_valid(checkpoints(root), groups)


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2)], ids=str)
def test_newest_valid_passes_over_damaged_checkpoints_and_says_so_on_every_rank(
    ranks: RankPool, sound: Path, tmp_path: Path, layout: Layout
) -> None:
    assert ranks.run(layout, find_newest, tmp_path) == [(None, [])] * layout.world_size
    for step in (3, 20, 100, 1000):
        shutil.copytree(sound, step_directory(tmp_path, step))
    shutil.copytree(sound, tmp_path / "step_00002000.tmp")  # an interrupted save
    newest = step_directory(tmp_path, 1000)
    assert ranks.run(layout, find_newest, tmp_path) == [(newest, [])] * layout.world_size

    last = sorted(p for p in newest.glob("*.safetensors"))[-1]
    cut_last_byte(last)
    remove(step_directory(tmp_path, 100) / "config.json")
    for found, reports in ranks.run(layout, find_newest, tmp_path):
        assert found == step_directory(tmp_path, 20)
        size = last.stat().st_size
        assert reports == [
            "checkpoint step_00001000 is damaged and was passed over: "
            f"{last.name} has {size} bytes instead of {size + 1}",
            "checkpoint step_00000100 is damaged and was passed over: config.json is missing",
        ]
    for step in (3, 20):
        empty(step_directory(tmp_path, step) / "manifest.json")
    for found, reports in ranks.run(layout, find_newest, tmp_path):
        assert found is None
        assert [report.split()[1] for report in reports] == [f"step_{n:08d}" for n in (1000, 100, 20, 3)]


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [9]), (2, [5, 9]), (3, [2, 5, 9]), (50, [2, 5, 9]), (0, [9]), (-4, [9])]
)
def test_prune_keeps_the_newest_and_never_goes_below_one(
    sound: Path, tmp_path: Path, keep: int, left: list[int]
) -> None:
    for step in (9, 2, 5):
        shutil.copytree(sound, step_directory(tmp_path, step))
    (tmp_path / "step_00000011.tmp").mkdir()
    (tmp_path / "step_00000012.tmp").mkdir()
    (tmp_path / "step_00000012.tmp" / "model.safetensors").write_text("half")
    others = [tmp_path / "stats", tmp_path / "step_00000004.set-aside", tmp_path / "step_one"]
    for other in others:
        other.mkdir()
    gone = prune(tmp_path, keep)
    assert gone == [step_directory(tmp_path, step) for step in (2, 5, 9) if step not in left]
    assert checkpoints(tmp_path) == [step_directory(tmp_path, step) for step in left]
    assert all(faults(path) == [] for path in checkpoints(tmp_path))
    assert not list(tmp_path.glob("*.tmp"))
    assert all(other.exists() for other in others)
    assert prune(tmp_path, keep) == []


def test_steps_are_ordered_as_numbers(sound: Path, tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        shutil.copytree(sound, step_directory(tmp_path, step))
    assert [step_of(path) for path in checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]
    assert step_of(Path("step_00000005.tmp")) is None
    assert step_of(Path("step_5")) is None


def test_a_path_means_a_checkpoint_its_file_or_a_run(sound: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(sound, step_directory(tmp_path, step))
    one = step_directory(tmp_path, 2)
    assert resolve(one) == [one]
    assert resolve(one / "model.safetensors.index.json") == [one]
    assert resolve(tmp_path) == [one, step_directory(tmp_path, 10)]


def test_a_path_that_means_no_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "step_00000003").mkdir()
    for path, problem in (
        (tmp_path / "nowhere", "does not exist"),
        (tmp_path / "notes.txt", "is not part of a checkpoint"),
        (tmp_path, "holds no checkpoint"),
        (tmp_path / "step_00000003", "is not a readable manifest"),
    ):
        with pytest.raises(ArgonneError, match=problem):
            resolve(path)
