"""A save that fails on one rank fails on all, and leaves the checkpoints that were there."""

from __future__ import annotations

from pathlib import Path

import pytest

from argonne.checkpoint import CheckpointError, faults, save_checkpoint
from argonne.checkpoint import save as module
from argonne.parallel import Layout, ProcessGroups
from tests.checkpoint.saved import bytes_of, drawn, save, write_rest
from tests.pool import RankPool


def save_with_fault(groups: ProcessGroups, root: Path, step: int, bad: int, fault: str) -> str:
    """A save in which rank ``bad`` fails as ``fault`` says; the message that this rank raises."""

    def fail(*args: object, **kwargs: object) -> None:
        if groups.world.rank == bad:
            raise (OSError if fault != "unforeseen" else RuntimeError)("no space left on device")
        real(*args, **kwargs)

    name = {"tensors": "save_file", "commit": "commit"}.get(fault, "save_file")
    real = getattr(module, name)
    rest = write_rest
    if fault in ("tensors", "commit"):
        setattr(module, name, fail)
    else:
        real = write_rest
        rest = fail
    usual, module.MAX_FILE_BYTES = module.MAX_FILE_BYTES, 1000
    try:
        save_checkpoint(root, step, *drawn(groups, 9), rest, groups)
    except CheckpointError as error:
        return str(error)
    finally:
        module.MAX_FILE_BYTES = usual
        if fault in ("tensors", "commit"):
            setattr(module, name, real)
    return "saved"


@pytest.mark.parametrize(
    ("fault", "bad"),
    [("tensors", 0), ("tensors", 1), ("commit", 0), ("the rest", 0), ("unforeseen", 0)],
)
def test_a_save_that_fails_on_one_rank_raises_on_all_and_leaves_earlier_checkpoints(
    ranks: RankPool, tmp_path: Path, fault: str, bad: int
) -> None:
    earlier = ranks.run(Layout(tensor=2), save, tmp_path, 1, 3)[0]
    before = bytes_of(earlier)
    messages = ranks.run(Layout(tensor=2), save_with_fault, tmp_path, 2, bad, fault)
    assert messages[0] == messages[1]
    assert messages[0].startswith("the checkpoint of step 2 could not be written: ")
    assert "no space left on device" in messages[0]
    assert bytes_of(earlier) == before
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    # And the next save is a sound one.
    assert faults(ranks.run(Layout(tensor=2), save, tmp_path, 2, 3)[0]) == []


def test_a_failed_save_leaves_the_valid_checkpoint_of_the_same_step(ranks: RankPool, tmp_path: Path) -> None:
    earlier = ranks.run(Layout(), save, tmp_path, 1, 3)[0]
    before = bytes_of(earlier)
    (message,) = ranks.run(Layout(), save_with_fault, tmp_path, 1, 0, "commit")
    assert message.startswith("the checkpoint of step 1 could not be written: ")
    assert earlier.exists(), "the valid checkpoint of step 1 is gone"
    assert bytes_of(earlier) == before


def save_where_nothing_can_be(groups: ProcessGroups, root: Path) -> str:
    try:
        save(groups, root, 1, 0)
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_directory_that_cannot_be_made_is_refused_on_every_rank(ranks: RankPool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    for message in ranks.run(Layout(tensor=2), save_where_nothing_can_be, tmp_path / "file" / "run"):
        assert message.startswith("the checkpoint of step 1 could not be written: ")
