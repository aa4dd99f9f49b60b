"""Files that only grow: whatever the disk does, whole pieces in their order, and none missing once it can be."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.training import appended
from argonne.training.appended import AppendedFile


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """The kernel then writes what fits and refuses the rest, as a full disk does."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("room", [0, 1, 6, 7, 13, 20])
def test_what_a_full_disk_kept_out_is_written_with_the_next_piece(tmp_path: Path, room: int) -> None:
    file = AppendedFile(tmp_path / "log")
    file.append("first\n")
    with files_of_at_most(6 + room):
        for number in range(3):
            with pytest.raises(OSError, match=r"\[Errno 27\].*log'"):
                file.append(f"{number} " + "x" * 40 + "\n")
            assert file.path.read_text() == "first\n", "a torn line is cut off at once"
    file.append("last\n")
    assert file.path.read_text() == "first\n" + "".join(f"{n} " + "x" * 40 + "\n" for n in range(3)) + "last\n"


def test_a_torn_line_that_could_not_be_cut_off_at_once_is_cut_off_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, "copy on write")

    file = AppendedFile(tmp_path / "log")
    file.append("first\n")
    with monkeypatch.context() as patch, files_of_at_most(9):
        patch.setattr(os, "truncate", refuse)
        for _ in range(2):
            with pytest.raises(OSError, match="log'"):
                file.append("second\n")
    assert file.path.read_text() == "first\nsec"
    file.append("third\n")
    assert file.path.read_text() == "first\nsecond\nsecond\nthird\n"


def test_waiting_pieces_are_bounded_and_a_file_that_was_taken_away_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(appended, "WAITING", 3)
    file = AppendedFile(tmp_path / "away" / "log")
    for number in range(5):
        with pytest.raises(FileNotFoundError):
            file.append(f"{number}\n")
    file.path.parent.mkdir()
    file.append("5\n")
    assert file.path.read_text() == "3\n4\n5\n"
    file.path.unlink()
    file.append("6\n")
    assert file.path.read_text() == "6\n"


def test_text_that_no_file_can_hold_is_written_so_that_it_can(tmp_path: Path) -> None:
    file = AppendedFile(tmp_path / "log")
    file.append("Gr\u00fc\u00dfe \ud800\n")
    assert file.path.read_bytes() == "Grüße \\ud800\n".encode()


@given(st.lists(st.tuples(st.binary(max_size=5).map(lambda b: b.replace(b"\n", b"")), st.booleans())), st.booleans())
def test_lines_are_dropped_wherever_they_are(
    tmp_path_factory: pytest.TempPathFactory, lines: list[tuple[bytes, bool]], ended: bool
) -> None:
    file = AppendedFile(tmp_path_factory.mktemp("run") / "log")
    marked = [(b"+" if kept else b"-") + line for line, kept in lines]
    file.path.write_bytes(b"\n".join(marked) + (b"\n" if ended and marked else b""))
    asked: list[bytes] = []

    def wanted(line: bytes) -> bool:
        asked.append(line.rstrip(b"\n"))
        return line.startswith(b"+")

    assert file.keep(wanted) == any(line.startswith(b"-") for line in marked)
    assert asked == marked
    assert file.path.read_bytes() == b"".join(line + b"\n" for line in marked if line.startswith(b"+"))
    assert [path.name for path in file.path.parent.iterdir()] == ["log"]


def test_dropping_lines_of_a_long_file_takes_no_more_memory_than_of_a_short_one(tmp_path: Path) -> None:
    file, draw = AppendedFile(tmp_path / "log"), random.Random(3)
    file.path.write_bytes(b"".join(b"%d %s\n" % (n, draw.randbytes(300).hex().encode()) for n in range(50_000)))
    with file.path.open("ab") as end:  # garbage has no lines
        end.truncate(end.tell() + (20 << 20))
    size = file.path.stat().st_size
    tracemalloc.start()
    file.keep(lambda line: not line.startswith((b"17 ", b"\0", b"49999 ")))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 45 << 20
    assert peak < 8 << 20
    numbers = [int(line.split()[0]) for line in file.path.open("rb")]
    assert numbers == [n for n in range(49_999) if n != 17]
