"""Opening a model, no rank reads or holds more than its part: measured in bytes, of the file and of the process."""

from __future__ import annotations

import ctypes
import gc
import json
import math
import sys
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from argonne.checkpoint import load, load_pieces, weight_pieces
from argonne.models import ArgonneConfig, ArgonneModel, Execution, build_model, from_huggingface, to_huggingface
from argonne.models.families import decoder_family
from argonne.parallel import Layout, ProcessGroups
from tests.pool import RankPool

MIB = 1 << 20
CONFIG = ArgonneConfig(512, 2, 8, 4, 8192, 2048, **decoder_family("qwen3").features(True))
"""46 MiB in float32."""


GIVEN: list[int] = []
"""Bytes of each slice that was read."""


class Slice:
    """A slice of safetensors that counts what it gives."""

    def __init__(self, stored: Any) -> None:
        self._stored, self.get_shape, self.get_dtype = stored, stored.get_shape, stored.get_dtype

    def __getitem__(self, index: Any) -> torch.Tensor:
        found = self._stored[index]
        GIVEN.append(found.nbytes)
        return found


class Counting:
    """An opened file of safetensors whose slices count."""

    def __init__(self, *words: Any, **options: Any) -> None:
        self._file = safe_open(*words, **options)
        self.keys = self._file.keys

    def __enter__(self) -> Counting:
        self._file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)

    def get_slice(self, name: str) -> Slice:
        return Slice(self._file.get_slice(name))


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


class Peak:
    """The most anonymous memory while it is entered, above what there was before."""

    def __enter__(self) -> Peak:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what the process has and does not use would hide what it takes now
        self._before = self._most = anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self._most, anonymous()) - self._before

    def _watch(self) -> None:
        while not self._stop.wait(0.0005):
            self._most = max(self._most, anonymous())


def opened(groups: ProcessGroups, directory: Path, layout: Layout, rank: int) -> tuple[int, list[int], int]:
    """The bytes of a rank's parameters, of each slice that it reads, and of the memory that opening takes."""
    GIVEN.clear()
    with mock.patch.object(load, "safe_open", Counting), Peak() as peak:
        model = build_model(from_huggingface(directory), Execution(ProcessGroups.of_rank(layout, rank)))
        load_pieces(directory, weight_pieces(model.sharded_parameters()))
    held = sum(parameter.nbytes for parameter in model.parameters())
    return held, list(GIVEN), peak.bytes


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted as Linux tells it")
def test_no_rank_reads_or_holds_more_than_its_part(ranks: RankPool, tmp_path: Path) -> None:
    with torch.device("meta"):
        shapes = {
            region.name: region.whole_shape
            for sharded in ArgonneModel(CONFIG, Execution(ProcessGroups.single())).sharded_parameters()
            for region in sharded.spec.regions
        }
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_huggingface(CONFIG, {}, "float32")))
    whole = 4 * sum(math.prod(shape) for shape in shapes.values())
    for layout, rank in ((Layout(), 0), (Layout(tensor=2), 0), (Layout(tensor=2), 1), (Layout(tensor=4), 3)):
        ((held, slices, peak),) = ranks.run(Layout(), opened, tmp_path, layout, rank)
        assert sum(slices) == held, f"{layout}, rank {rank} reads more or less than it holds"
        assert held <= whole / layout.tensor + MIB  # norms are on every rank
        # Each slice is copied to its place before the next is read.
        assert held / 2 <= peak <= held + max(slices) + 4 * MIB, f"{layout}, rank {rank}: {peak / MIB:.1f} MiB"
