"""The tokenizer of a run that is given none: trained on its data, and kept with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from argonne.checkpoint import checkpoints, faults, is_small, read_manifest
from argonne.checkpoint.format import INDEX, TRAINER, record_file
from argonne.data import DataError, OnBad, Shard, fingerprint, load_tokenizer, read_texts, train_tokenizer
from argonne.files import TEMPORARY, read_object, set_aside, sync, write_json

RECORD = "trained_on.json"
# The small files of a checkpoint that are not its tokenizer's.
_OTHERS = ("config.json", "generation_config.json", INDEX, TRAINER)

TOKENIZER_TRAINING_BYTES = 16 << 20
"""The fallback tokenizer is trained on this much text at most, from the beginning of the data."""


def train_kept_tokenizer(shards: Sequence[Shard], path: Path, on_bad: OnBad = "raise") -> None:
    """The fallback: a byte-level BPE of the data's own text, kept at ``path`` with what it was trained on.

    One that is damaged or gone is taken from a checkpoint of the run, or trained again where there is none yet.
    """
    data = fingerprint(shards)
    kept, wrong = _kept(path)
    if wrong and checkpoints(path.parent):
        kept = _from_checkpoint(path, data, wrong)
    if kept == data:
        return
    if wrong and path.exists():
        print(f"the tokenizer in {path} is damaged ({wrong}) and is made again", flush=True)
    print("no --tokenizer-path: training a byte-level BPE of 12,000 on the data", flush=True)
    tokenizer = train_tokenizer(_some_text(shards, on_bad))
    _place(path, data, tokenizer.save_pretrained)


def _kept(path: Path) -> tuple[str | None, str]:
    """The data that the tokenizer at ``path`` was trained on, or what is wrong with what lies there."""
    try:
        record = read_object(path / RECORD)
        data, files = record["data"], record.get("files", {})  # an earlier version wrote no files
        for name, sha256 in files.items():
            if record_file(path / name).sha256 != sha256:
                return None, f"{name} has changed since it was written (SHA-256 differs)"
        if not (path / "tokenizer.json").is_file():
            return None, "tokenizer.json is missing"
        if not files:
            load_tokenizer(path)
        return (data, "") if isinstance(data, str) else (None, f"{RECORD} does not say what data it is of")
    except KeyError as error:
        return None, f"{RECORD} lacks {error}"
    except (OSError, ValueError, TypeError, AttributeError, DataError) as error:
        return None, str(error)


def _from_checkpoint(path: Path, data: str, wrong: str) -> str | None:
    """Put the newest intact copy of the tokenizer at ``path``; returns the data it was trained on, None without one."""
    for checkpoint in reversed(checkpoints(path.parent)):
        if faults(checkpoint, wanted=is_small):
            continue
        names = [n for n in read_manifest(checkpoint).files if is_small(n) and Path(n).name not in _OTHERS]

        def copy(target: Path, checkpoint: Path = checkpoint, names: list[str] = names) -> None:
            for name in names:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(checkpoint / name, target / name)

        print(f"the tokenizer in {path} is damaged or gone ({wrong}); its copy in {checkpoint.name} took its place")
        _place(path, data, copy)
        return data
    return None


def _place(path: Path, data: str, fill: Callable[[Path], object]) -> None:
    """Let ``fill`` write a tokenizer, and put it at ``path`` once all of it is on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    files = sorted(file for file in temporary.rglob("*") if file.is_file())
    for file in files:
        sync(file)
    sums = {str(file.relative_to(temporary)): record_file(file).sha256 for file in files}
    write_json(temporary / RECORD, {"data": data, "files": sums})
    sync(temporary)
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.exists():
        set_aside(path)
    os.replace(temporary, path)
    sync(path.parent)


def _some_text(shards: Sequence[Shard], on_bad: OnBad) -> Iterator[str]:
    left = TOKENIZER_TRAINING_BYTES
    for shard in shards:
        for row_group in range(len(shard.rows)):
            try:
                texts = read_texts(shard, row_group)
            except DataError:
                if on_bad == "raise":
                    raise
                continue  # the lanes report it
            for text in texts:
                if isinstance(text, str):
                    yield text
                    left -= len(text.encode(errors="replace"))
                if left <= 0:
                    return
