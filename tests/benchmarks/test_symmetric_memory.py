"""A fault of symmetric memory is a line of the report, on every rank, and never a hang."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from argonne.parallel import Layout, ProcessGroups
from benchmarks import symmetric_memory
from benchmarks.collective_timing import Budget
from tests.pool import RankPool


def faulty_symmetric_memory(groups: ProcessGroups) -> dict[str, Any]:
    """Symmetric memory played by Gloo: of its three variants one works and one fails on one rank only."""

    class Handle:
        multicast_ptr = 0

    def play(variant: str, handle: Any, groups: ProcessGroups) -> Any:
        if variant == symmetric_memory.MULTICAST:
            return real(variant, handle, groups)
        if variant == "two_shot_all_reduce_" and groups.tensor.rank == 1:
            raise RuntimeError("no such kernel\nand a long trace")
        return lambda tensor: (dist.all_reduce(tensor, group=groups.tensor.group), tensor)[1]

    real = symmetric_memory._operator
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(symmetric_memory, "_allocate", lambda size, dtype, groups: torch.empty(size // 4))
        patch.setattr(symmetric_memory, "_rendezvous", lambda buffer, groups: Handle())
        patch.setattr(symmetric_memory, "_operator", play)
        patch.setattr(symmetric_memory, "_finish", lambda device: None)
        return symmetric_memory.time_symmetric_memory([64, 128], torch.float32, Budget(3, 0, 1.0), groups)


def test_a_variant_that_fails_on_one_rank_is_not_available_on_any(ranks: RankPool) -> None:
    for found in ranks.run(Layout(tensor=2), faulty_symmetric_memory):
        assert found["two_shot_all_reduce_"] == "not available: rank 1: no such kernel"
        assert found["multimem_all_reduce_"] == "not available: no multicast between these GPUs"
        assert [(record["bytes"], record["wrong"]) for record in found["one_shot_all_reduce"]] == [(64, 0), (128, 0)]


def test_a_kernel_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck:
        def record_event(self) -> Stuck:
            return self

        def query(self) -> bool:
            return False

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stuck())
    monkeypatch.setattr(symmetric_memory, "DEADLINE", 0.01)
    with pytest.raises(TimeoutError, match="did not finish") as told:
        symmetric_memory._finish(torch.device("cuda"))
    assert symmetric_memory.unfinished({"one_shot_all_reduce": f"not available: {told.value}"})
    assert not symmetric_memory.unfinished({"one_shot_all_reduce": [], "other": "not available: no kernel"})
