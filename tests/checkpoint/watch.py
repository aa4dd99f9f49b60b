"""What a piece of code does to the files below a directory, in order; and its end at any of these moments."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from argonne.checkpoint import format as checkpoint_format
from argonne.checkpoint import save as checkpoint_save


@dataclass(frozen=True)
class Operation:
    """One change of what is on the disk: write, sync, rename, remove or make."""

    kind: str
    path: Path
    target: Path | None = None


class Killed(BaseException):
    """Nothing that is done after this leaves a trace."""


_listeners: list[Callable[[str, tuple[Any, ...]], None]] = []


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    for listener in _listeners:
        listener(event, arguments)


@contextlib.contextmanager
def watched(
    root: Path, patch: pytest.MonkeyPatch, kill_at: int | None = None, skip_sync: int | None = None
) -> Iterator[list[Operation]]:
    """The operations below ``root``, each entered before it is done.

    Before operation ``kill_at`` the process is dead: it and all later ones fail. Of the syncs, number ``skip_sync``
    is neither done nor entered.
    """
    if _hear not in vars(sys).setdefault("_argonne_hooks", []):
        sys._argonne_hooks.append(_hear)  # type: ignore[attr-defined]  # a hook stays for the life of the process
        sys.addaudithook(_hear)
    done: list[Operation] = []
    syncs = 0

    def enter(kind: str, path: Any, target: Any = None) -> None:
        where = Path(os.fsdecode(path))
        if root not in (where, *where.parents):
            return
        if kill_at is not None and len(done) >= kill_at:
            raise Killed
        done.append(Operation(kind, where, None if target is None else Path(os.fsdecode(target))))

    def listen(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(arguments[0], str | bytes | os.PathLike):
            if arguments[2] & (os.O_WRONLY | os.O_RDWR):
                enter("write", arguments[0])
        elif event == "os.rename":
            enter("rename", arguments[0], arguments[1])
        elif event == "os.mkdir":
            enter("make", arguments[0])
        elif event in ("os.remove", "os.rmdir"):
            path, folder = arguments
            inside = folder not in (-1, None)
            enter("remove", os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path) if inside else path)

    def fsync(descriptor: int) -> None:
        nonlocal syncs
        syncs += 1
        if syncs - 1 != skip_sync:
            enter("sync", os.readlink(f"/proc/self/fd/{descriptor}"))
            real_fsync(descriptor)

    def exchange(first: Path, second: Path) -> bool:
        enter("rename", first, second)
        if not real_exchange(first, second):
            done.pop()
            return False
        return True

    def save_file(tensors: Any, path: Path, **options: Any) -> None:
        enter("write", path)
        real_save(tensors, path, **options)

    real_fsync, real_exchange, real_save = os.fsync, checkpoint_format.exchange, checkpoint_save.save_file
    with patch.context() as inner:
        inner.setattr(os, "fsync", fsync)
        inner.setattr(checkpoint_format, "exchange", exchange)
        inner.setattr(checkpoint_save, "save_file", save_file)
        _listeners.append(listen)
        try:
            yield done
        finally:
            _listeners.remove(listen)


def lost_with_the_power(operations: list[Operation], root: Path, names: list[str]) -> list[str]:
    """What a power cut could take from a save of ``names`` into ``root``: empty if the order of it was right."""
    last = {op.path: number for number, op in enumerate(operations) if op.kind == "write"}
    synced: dict[Path, list[int]] = {}
    for number, op in enumerate(operations):
        if op.kind == "sync":
            synced.setdefault(op.path, []).append(number)
    found = []

    def require(path: Path, after: int, before: int, what: str) -> None:
        if not any(after < number < before for number in synced.get(path, [])):
            found.append(f"{path} is not synced {what}")

    renames = {op.target: number for number, op in enumerate(operations) if op.kind == "rename"}
    (final, placed), *_ = [
        (target, at) for target, at in renames.items() if operations[at].path.name.endswith(".tmp") and target
        and target.parent == root
    ]  # fmt: skip
    temporary = operations[placed].path
    manifest = next(n for n, op in enumerate(operations) if op.kind == "write" and "manifest.json" in op.path.name)
    for name in names:
        written = max(last.get(temporary / name, -1), renames.get(temporary / name, -1))
        require(temporary / name, written, manifest, "between its writing and the manifest's")
    for number, op in enumerate(operations):
        if op.kind == "rename" and op.path in last:  # a file
            require(op.path, last[op.path], number, "before it gets its name")
        if op.kind == "make" and op.path.parent != temporary:
            require(op.path.parent, number, placed, "after a directory was made in it")
    for directory in {temporary, *((temporary / name).parent for name in names)}:
        require(directory, renames[temporary / "manifest.json"], placed, "between the manifest and the renaming")
    gone = [
        number for number, op in enumerate(operations)
        if number > placed and (op.kind == "remove" or (op.kind == "rename" and op.target != final))
    ]  # fmt: skip
    require(root, placed, min(gone, default=len(operations)), f"after {final.name} was placed, before another goes")
    return found
