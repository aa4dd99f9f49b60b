"""The tools as one calls them, and faults planted in a checkpoint or a run for them to find."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from argonne.__main__ import main
from argonne.checkpoint import read_manifest
from argonne.checkpoint.format import commit, record_file, record_tensor


class Tool:
    """Calls ``python -m argonne`` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: Any) -> tuple[int, list[str]]:
        """The status and the lines that were printed."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return int(ended.value.code or 0), self._capsys.readouterr().out.splitlines()


Change = Callable[[Tensor], None]


def one_ulp_up(index: tuple[int, ...]) -> Change:
    """Make one element the next larger number."""

    def change(tensor: Tensor) -> None:
        tensor[index] = torch.nextafter(tensor[index], torch.tensor(torch.inf, dtype=tensor.dtype))

    return change


def plant(checkpoint: Path, name: str, change: Change) -> None:
    """Change a tensor under the manifest of before: what a disk may do."""
    file = checkpoint / read_manifest(checkpoint).tensors[name].file
    with safe_open(file, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(file)
    change(tensors[name])
    save_file(tensors, file, metadata=metadata)


def plant_honestly(checkpoint: Path, name: str, change: Change) -> None:
    """Change a tensor, and have the manifest say so: what another run would have written."""
    before = read_manifest(checkpoint)
    record = before.tensors[name]
    temporary = Path(shutil.copytree(checkpoint, checkpoint.with_name(checkpoint.name + ".tmp")))
    plant(temporary, name, change)
    now = record_tensor(load_file(temporary / record.file)[name], record.file)
    files = before.files | {record.file: record_file(temporary / record.file)}
    commit(temporary, checkpoint, replace(before, files=files, tensors=before.tensors | {name: now}))


def rewrite_honestly(checkpoint: Path, file: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file of a checkpoint, and have the manifest say so."""
    before = read_manifest(checkpoint)
    temporary = Path(shutil.copytree(checkpoint, checkpoint.with_name(checkpoint.name + ".tmp")))
    content = json.loads((temporary / file).read_text())
    change(content)
    (temporary / file).write_text(json.dumps(content))
    commit(temporary, checkpoint, replace(before, files=before.files | {file: record_file(temporary / file)}))


def edit_step(run: Path, step: int, **values: Any) -> None:
    """Give a step of ``metrics.jsonl`` other values."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["step"] == step:
            record.update(values)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def step_of_metrics(run: Path, step: int) -> dict[str, Any]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return next(record for record in map(json.loads, lines) if record["step"] == step)


def next_float32(value: float) -> float:
    return float(np.nextafter(np.float32(value), np.float32(np.inf)))
