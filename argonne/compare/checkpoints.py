"""Checkpoints by their bytes: is one as it was written, and do two hold the same, whatever layouts wrote them?"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from argonne.checkpoint import MANIFEST, CheckpointError, is_checkpoint, load_trainer, read_manifest, resolve
from argonne.checkpoint.format import TRAINER, TensorRecord, file_fault, record_tensor
from argonne.compare.finding import Finding, at_most
from argonne.compare.ulp import difference
from argonne.training.run.identity import differences


@dataclass
class Examined:
    """What a checkpoint holds, as its bytes say."""

    directory: Path
    faults: list[str] = field(default_factory=list)
    """A line for each thing that is not as it was written."""
    tensors: dict[str, TensorRecord] = field(default_factory=dict)
    """All that could be read, with the hashes of the values that lie there now."""
    unread: set[str] = field(default_factory=set)
    """Tensors that are listed and could not be read; ``faults`` says why."""
    trainer: Mapping[str, Any] | None = None
    """``trainer.json``, where the checkpoint has one that is as it was written."""
    files: int = 0
    """Those that the manifest lists."""
    bytes: int = 0
    """In those files."""

    @property
    def summary(self) -> str:
        """One line for a checkpoint without faults."""
        counts = f"{self.files:,} files, {len(self.tensors):,} tensors, {self.bytes:,} bytes"
        return f"{self.directory} is as it was written: {counts}"


def checkpoint_at(path: Path) -> Path:
    """The checkpoint that a path given by a user means: a step directory, sound or not, or the newest one of a run.

    Raises:
        CheckpointError: there is nothing there, or nothing that is a checkpoint.
    """
    return path if path.is_dir() and is_checkpoint(path) else resolve(path)[-1]


def examine(directory: Path) -> Examined:
    """Read every byte of a checkpoint: the checksum of each file, the hash of each tensor, what is missing or extra."""
    found = Examined(directory)
    try:
        manifest = read_manifest(directory)
    except CheckpointError as error:
        found.faults.append(str(error))
        return found
    found.files, found.bytes = len(manifest.files), sum(record.size for record in manifest.files.values())
    listed: dict[str, dict[str, TensorRecord]] = defaultdict(dict)
    for name, record in manifest.tensors.items():
        listed[record.file][name] = record
    with tqdm(total=found.bytes, desc=directory.name, unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for name, file in manifest.files.items():
            fault = file_fault(directory / name, file)
            found.faults += [f"{directory / name} {fault}"] if fault else []
            if name in listed or name.endswith(".safetensors"):
                _read_tensors(found, name, listed.pop(name, {}), bool(fault))
            elif name == TRAINER and not fault:
                found.trainer = _trainer(found)
            bar.update(file.size)
    for name, tensors in listed.items():
        found.unread |= set(tensors)
        found.faults += [f"tensor {each} is listed in {directory / name}, no file of the manifest" for each in tensors]
    known = {MANIFEST, *manifest.files, *listed}
    for path in sorted(directory.rglob("*")):
        if str(path.relative_to(directory)) not in known and (path.is_symlink() or not path.is_dir()):
            found.faults.append(f"{path} is not in the manifest")
    return found


def _trainer(found: Examined) -> Mapping[str, Any] | None:
    try:
        return load_trainer(found.directory)
    except CheckpointError as error:
        found.faults.append(str(error))
        return None


def _read_tensors(found: Examined, file: str, listed: Mapping[str, TensorRecord], is_damaged: bool) -> None:
    """Hash every tensor of a file, and compare it with what the manifest lists."""
    path = found.directory / file
    try:
        with safe_open(path, framework="pt") as stored:
            names = set(stored.keys())
            for name in sorted(names):
                now = record_tensor(stored.get_tensor(name), file)
                found.tensors[name] = now
                if name not in listed:
                    found.faults.append(f"tensor {name} in {path} is not in the manifest")
                elif now != listed[name]:
                    found.faults.append(f"tensor {name} in {path} {_changed(listed[name], now)}")
    except (OSError, SafetensorError) as error:
        found.unread |= set(listed) - set(found.tensors)
        if not is_damaged:  # else it was named
            found.faults.append(f"{path} cannot be read: {error}")
        return
    for name in sorted(set(listed) - names):
        found.unread.add(name)
        found.faults.append(f"tensor {name} is missing in {path}")


def _changed(before: TensorRecord, now: TensorRecord) -> str:
    for what in ("shape", "dtype"):
        if getattr(before, what) != getattr(now, what):
            return f"has {what} {getattr(now, what)} instead of {getattr(before, what)}"
    return "has changed since it was written (SHA-256 of its value differs)"


def compare_checkpoints(one: Path, other: Path) -> Iterator[Finding]:
    """Are both checkpoints as they were written, and equal: weights, moments and the trainer's state?

    Compared is what their bytes say, not what their manifests do. The last finding says that all is equal, if it is.
    """
    both = [examine(one), examine(other)]
    for examined in both:
        yield from map(Finding, examined.faults)
        if not examined.faults:
            yield Finding(examined.summary, differs=False)
    a, b = both
    unequal = list(_compare_tensors(a, b)) + list(_compare_state(a, b))
    yield from unequal
    if not unequal and not a.faults and not b.faults:
        yield Finding(f"equal: {len(a.tensors):,} tensors, bit for bit{_state_line(a)}", differs=False)


def _compare_tensors(one: Examined, other: Examined) -> Iterator[Finding]:
    """The tensors that differ, worst first."""
    if not (one.tensors and other.tensors):  # what could not be read is a fault
        return
    lines = [
        f"tensor {name} is in {here.directory} only"
        for here, there in ((one, other), (other, one))
        for name in sorted(set(here.tensors) - set(there.tensors) - there.unread)
    ]
    common = sorted(set(one.tensors) & set(other.tensors))
    unequal = [name for name in common if _value(one.tensors[name]) != _value(other.tensors[name])]
    ranked: list[tuple[tuple[int, int, int], str]] = []
    for name in tqdm(unequal, desc="comparing", unit="tensor", leave=False, disable=None):
        a, b = one.tensors[name], other.tensors[name]
        for what in ("shape", "dtype"):
            if getattr(a, what) != getattr(b, what):
                lines.append(f"tensor {name}: {what} {getattr(a, what)} against {getattr(b, what)}")
                break
        else:
            values = [_load(examined, name) for examined in (one, other)]
            if found := difference(*values):  # None: it changed while this ran
                ranked.append((found.badness, f"tensor {name}: {found.told(*values)}"))
    lines += [line for _, line in sorted(ranked, key=lambda each: each[0], reverse=True)]
    yield from at_most(lines, "tensors that differ")


def _value(record: TensorRecord) -> TensorRecord:
    """The record without the file: how tensors are shared out over files is no part of what they are."""
    return replace(record, file="")


def _load(examined: Examined, name: str) -> Tensor:
    path = examined.directory / examined.tensors[name].file
    try:
        with safe_open(path, framework="pt") as stored:
            return stored.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read: {error}") from error


def _compare_state(one: Examined, other: Examined) -> Iterator[Finding]:
    if one.trainer is not None and other.trainer is not None:
        lines = differences(_state(one.trainer), _state(other.trainer))
        yield from at_most([f"trainer state: {line}" for line in lines], "entries of the trainer's state that differ")


def _state(trainer: Mapping[str, Any]) -> dict[str, Any]:
    """What of ``trainer.json`` is the same in every layout, and decides how training goes on."""
    data = trainer.get("data")
    place = {name: data.get(name) for name in ("next_sample", "lanes")} if isinstance(data, Mapping) else data
    return {name: trainer.get(name) for name in ("step", "tokens", "optimizer_step", "loss_scale")} | {"data": place}


def _state_line(examined: Examined) -> str:
    state = _state(examined.trainer or {})
    told = [f"{name} {state[name]:,}" for name in ("step", "tokens") if isinstance(state[name], int)]
    return "; " + ", ".join([*told, "the same position in the data"]) if told else ""
