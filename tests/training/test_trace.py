from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from argonne.parallel import Layout
from argonne.training.trace_file import first_difference, read_trace, trace_path
from tests.pool import RankPool
from tests.training.traced import trace

LAYOUTS: dict[str, tuple[Layout, dict[str, Any]]] = {
    "tp2": (Layout(tensor=2), {}),
    "tp2 sp": (Layout(tensor=2, sequence_parallel=True), {}),
    "pp2": (Layout(pipeline=2), {}),
    "pp2 interleaved": (Layout(pipeline=2), {"schedule": "interleaved"}),
    "pp2 zb": (Layout(pipeline=2), {"schedule": "zb"}),
    "dp2": (Layout(data=2), {}),
    "dp2 zero1": (Layout(data=2), {"kind": "zero1"}),
    "dp2 fsdp": (Layout(data=2), {"kind": "fsdp"}),
    "recomputed": (Layout(), {"recompute": True}),
    "2x2 sp": (Layout(tensor=2, pipeline=2, sequence_parallel=True), {"recompute": True}),
}


@pytest.fixture(scope="module")
def alone(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alone") / "run"
    ranks.run(Layout(), trace, path, 2, {})
    return path


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_trace_of_a_reproducible_run_is_the_same_file_at_every_layout(
    ranks: RankPool, alone: Path, tmp_path: Path, name: str
) -> None:
    layout, options = LAYOUTS[name]
    ranks.run(layout, trace, tmp_path / "run", 2, options)
    assert first_difference(alone, tmp_path / "run") is None
    for step in (1, 2):
        assert trace_path(tmp_path / "run", step).read_bytes() == trace_path(alone, step).read_bytes()
