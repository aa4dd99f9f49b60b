"""How a kernel is timed: copies of its inputs, replays of a graph, and a clone beside it."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.kernel_timing import GraphTimer, calls_in_a_replay, clone_calls, cold_copies
from tests.benchmarks.kernel_cases import CPU


def test_inputs_turn_through_several_sizes_of_the_cache() -> None:
    cache = 50 * 2**20
    for size in (2**16, 2**24, 2**26, 2**29):
        copies = cold_copies(size, cache)
        assert copies >= 2
        assert copies * size >= 4 * cache
    assert cold_copies(40 * cache, cache) == cold_copies(0, cache) == 1


def test_a_replay_is_whole_turns_and_long_enough() -> None:
    assert calls_in_a_replay(size=134_217_728, flops=0, copies=7) == 63  # 33.6 us each at 4 TB/s
    assert calls_in_a_replay(size=0, flops=10**15, copies=1) == 1
    assert calls_in_a_replay(size=4_096_000, flops=0, copies=50) == 2000
    assert calls_in_a_replay(size=4096, flops=0, copies=1) <= 2001  # a microsecond each at least


def test_a_clone_moves_as_many_bytes() -> None:
    (call,) = clone_calls(1000, 1, CPU)
    assert 2 * call().nbytes == 1000


class FakeCuda:
    """``torch.cuda``, as far as the timer uses it, of a GPU on which every replay takes 6 ms; it notes what happens."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.stream = self.graph = lambda *arguments, stream=None: nullcontext()
        self.Stream = lambda device: "a stream"

    def synchronize(self) -> None:
        self.log.append("wait")

    def get_device_properties(self, device: torch.device) -> Any:
        return SimpleNamespace(L2_cache_size=50 * 2**20)

    def CUDAGraph(self) -> Any:
        self.log.append("graph")
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        note = self.log.append
        return SimpleNamespace(
            record=lambda: note("event"), synchronize=lambda: note("end"), elapsed_time=lambda other: 6.0
        )


@pytest.mark.parametrize("capturable", [True, False])
def test_the_timer_warms_up_captures_and_times_a_replay(monkeypatch: pytest.MonkeyPatch, capturable: bool) -> None:
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    timer = GraphTimer(torch.device("cuda"))
    assert timer.copies(2**24) == 13
    calls = [lambda n=n: cuda.log.append(f"call {n}") for n in range(2)]
    sample = timer.prepare(calls, 4, capturable)
    turns = ["call 0", "call 1", "call 0", "call 1"]
    warm = ["wait", *turns[:3], "wait"]
    once = ["event", *(["replay"] if capturable else turns), "event", "end"]
    assert cuda.log == [*warm, *(["graph", *turns] if capturable else []), *once]
    cuda.log.clear()
    assert sample() == pytest.approx(6e-3 / 4)
    assert cuda.log == once
