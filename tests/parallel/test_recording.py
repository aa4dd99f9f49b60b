"""``record`` sees every collective: what it moves, over which ranks, when, how long; and leaves nothing behind."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from argonne.parallel import Collective, Layout, ProcessGroups, complete_gradients, record, sharded_parameters
from argonne.parallel.communication import recording
from argonne.parallel.communication.collectives import (
    all_gather,
    all_reduce,
    barrier,
    broadcast,
    gather_objects,
    reduce_scatter,
    start_all_gather,
    start_all_reduce,
    start_reduce_scatter,
)
from tests.parallel.recorded import FeedForward, places
from tests.pool import RankPool


def each_once(groups: ProcessGroups, axis_name: str) -> list[Collective]:
    axis = getattr(groups, axis_name)
    with record() as log:
        all_reduce(torch.ones(3, 4, dtype=torch.bfloat16), axis)
        all_gather(torch.ones(3, 4), axis)
        reduce_scatter(torch.ones(8, 4, dtype=torch.float64), axis)
        broadcast(torch.ones(5, dtype=torch.int64), axis)
        gather_objects({"a": 1}, axis)
        start_all_reduce(torch.ones(2), axis).wait()
        start_all_gather(torch.ones(3, 4), axis).wait()
        start_reduce_scatter(torch.ones(4), axis).wait()
    return log.collectives


@pytest.mark.parametrize(
    ("layout", "axis", "ranks_of"),
    [
        (Layout(tensor=2), "tensor", {0: (0, 1), 1: (0, 1)}),
        (Layout(tensor=2), "world", {0: (0, 1), 1: (0, 1)}),
        (Layout(tensor=4), "tensor", dict.fromkeys(range(4), (0, 1, 2, 3))),
        (Layout(data=2, tensor=2), "tensor", {0: (0, 1), 1: (0, 1), 2: (2, 3), 3: (2, 3)}),
        (Layout(data=2, tensor=2), "data", {0: (0, 2), 1: (1, 3), 2: (0, 2), 3: (1, 3)}),
    ],
)
def test_every_collective_is_recorded_with_its_ranks_shape_dtype_and_whole_bytes(
    ranks: RankPool, layout: Layout, axis: str, ranks_of: dict[int, tuple[int, ...]]
) -> None:
    for rank, found in enumerate(ranks.run(layout, each_once, axis)):
        size = len(ranks_of[rank])
        assert [(c.op, c.shape, c.dtype, c.bytes, c.is_async) for c in found] == [
            ("all_reduce", (3, 4), torch.bfloat16, 24, False),
            ("all_gather", (3, 4), torch.float32, size * 48, False),
            ("reduce_scatter", (8, 4), torch.float64, 256, False),
            ("broadcast", (5,), torch.int64, 40, False),
            ("gather_objects", (), None, 0, False),
            ("all_reduce", (2,), torch.float32, 8, True),
            ("all_gather", (3, 4), torch.float32, size * 48, True),
            ("reduce_scatter", (4,), torch.float32, 16, True),
        ], f"rank {rank}"
        assert {(c.axis, c.ranks) for c in found} == {(axis, ranks_of[rank])}, f"rank {rank}"
        assert {(c.module, c.phase) for c in found} == {("", "outside")}, f"rank {rank}"


def spans(groups: ProcessGroups) -> tuple[list[Collective], float, tuple[float, float]]:
    before = time.perf_counter()
    with record() as log:
        pending = start_all_reduce(torch.ones(4), groups.tensor)
        unfinished = log.collectives[0].finished
        barrier(groups.world)
        pending.wait()
    return log.collectives, unfinished, (before, time.perf_counter())


def test_a_collective_spans_from_its_start_to_its_wait(ranks: RankPool) -> None:
    for (in_flight, meeting), unfinished, (before, after) in ranks.run(Layout(tensor=2), spans):
        assert unfinished == float("inf")
        assert before < in_flight.started < meeting.started < meeting.finished < in_flight.finished < after
        assert (meeting.op, meeting.axis, meeting.shape, meeting.dtype, meeting.bytes) == (
            "barrier",
            "world",
            (),
            None,
            0,
        )
        assert (in_flight.is_async, meeting.is_async) == (True, False)


def is_off() -> bool:
    hooks = nn.modules.module
    return recording._recorder is None and not hooks._global_forward_hooks and not hooks._global_forward_pre_hooks


def failing(model: FeedForward, x: Tensor) -> None:
    """A forward that fails two modules deep."""

    def fail(module: nn.Module, inputs: Any) -> None:
        raise KeyError("in up")

    with model.up.register_forward_pre_hook(fail):
        model(x)


def faults(groups: ProcessGroups) -> dict[str, Any]:
    found: dict[str, Any] = {}
    one = torch.ones(1)
    with record() as outer:
        with pytest.raises(RuntimeError, match="do not nest"), record():
            pass
        all_reduce(one, groups.tensor)
    found["the outer block goes on"] = len(outer.collectives) == 1
    found["off after a block"] = is_off()

    model = FeedForward(groups)
    with pytest.raises(KeyError, match="in up"), record(model):
        failing(model, torch.ones(2, 4))
    found["off after an exception"] = is_off()

    with record(model) as log:
        with pytest.raises(KeyError, match="in up"):
            failing(model, torch.ones(2, 4))
        model(torch.ones(2, 4))
        all_reduce(one, groups.tensor)
    found["modules left by an exception are left"] = places(log.collectives)

    with record() as log:
        pass
    all_reduce(one, groups.tensor)
    y = model(torch.ones(2, 4, requires_grad=True))
    found["nothing outside of a block"] = log.collectives
    with record(model) as log:
        y.sum().backward()
    found["of a forward outside of any block"] = places(log.collectives)
    with record(model) as log:
        y = model(torch.ones(2, 4, requires_grad=True))
    y.sum().backward()
    found["of a backward outside of its block"] = places(log.collectives)
    return found


def test_blocks_do_not_nest_and_leave_nothing_behind_even_after_an_exception(ranks: RankPool) -> None:
    for found in ranks.run(Layout(tensor=2), faults):
        assert found == {
            "the outer block goes on": True,
            "off after a block": True,
            "off after an exception": True,
            "modules left by an exception are left": [
                ("down", "forward", "all_reduce"),
                ("", "outside", "all_reduce"),
            ],
            "nothing outside of a block": [],
            "of a forward outside of any block": [("", "backward", "all_reduce")],
            "of a backward outside of its block": [("down", "forward", "all_reduce")],
        }


def test_an_axis_of_one_process_has_no_collectives(ranks: RankPool) -> None:
    groups = ProcessGroups.single()
    model = FeedForward(groups)
    with record(model, check=groups) as log:  # nothing to agree on either
        model(torch.ones(2, 4, requires_grad=True)).sum().backward()
        complete_gradients(sharded_parameters(model, groups), groups)
        barrier(groups.world)
    assert log.collectives == each_once(groups, "tensor") == []
    assert str(log) == "no collectives"
    for found in ranks.run(Layout(tensor=2), each_once, "data"):
        assert found == []


def written(groups: ProcessGroups) -> tuple[str, list[int], list[int]]:
    model = nn.ModuleDict({"block": FeedForward(groups), "block2": FeedForward(groups)})
    with record(model) as log:
        model["block2"](model["block"](torch.ones(2, 4, requires_grad=True))).sum().backward()
        barrier(groups.world)
        start_all_reduce(torch.ones(300, 1), groups.world)
    counts = [len(log.select("block")), len(log.select("block", phase="forward")), len(log.select(op="all_reduce"))]
    return str(log), counts, [log.bytes("block"), log.bytes(phase="outside"), log.bytes()]


def test_a_log_reads_line_by_line_and_can_be_selected_from(ranks: RankPool) -> None:
    span = r" +\d+\.\d{3} \.\. +(\d+\.\d{3}|inf) ms"
    expected = [
        span + r" {6,} +32 B  all_reduce \[2, 4\] float32 over tensor \(ranks 0, 1\) at block\.down \(forward\)",
        span + r" {6,} +32 B  all_reduce \[2, 4\] float32 over tensor \(ranks 0, 1\) at block2\.down \(forward\)",
        span + r" async +32 B  all_reduce \[2, 4\] float32 over tensor \(ranks 0, 1\) at block2\.up \(backward\)",
        span + r" async +32 B  all_reduce \[2, 4\] float32 over tensor \(ranks 0, 1\) at block\.up \(backward\)",
        span + r" {6,} +0 B  barrier over world \(ranks 0, 1\) \(outside\)",
        span + r" async +1,200 B  all_reduce \[300, 1\] float32 over world \(ranks 0, 1\) \(outside\)",
    ]
    for text, counts, moved in ranks.run(Layout(tensor=2), written):
        lines = text.split("\n")
        assert len(lines) == len(expected)
        for line, pattern in zip(lines, expected, strict=True):
            assert re.fullmatch(pattern, line), line
        assert lines[0].startswith("     0.000")
        assert [" inf ms" in line for line in lines] == [False] * 5 + [True], "only the last is not waited for"
        assert len({line.index(" B  ") for line in lines}) == 1, "the columns are not aligned"
        assert counts == [2, 1, 5]  # block2 is not within block
        assert moved == [64, 1200, 1328]
