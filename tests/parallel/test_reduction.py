"""Every sum over an axis is made in one place, which asks the axis how."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel import ArgonneError, Axis, Layout, ProcessGroups, record
from argonne.parallel.communication import collectives
from argonne.parallel.communication.reduction import (
    start_sum,
    start_sum_and_scatter,
    sum_and_scatter,
    sum_of_two,
    sum_over,
)
from tests.pool import RankPool

ROOT = Path(__file__).parents[2]
COMMUNICATION = ROOT / "argonne" / "parallel" / "communication"

SUMS = {name for name in (*vars(collectives), *vars(dist), *dir(torch.ops._c10d_functional)) if "reduce" in name}
SUMS |= {"all_reduce", "all_reduce_", "reduce_scatter_tensor", "reduce_scatter_tensor_coalesced"}
SENDS = {
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_gather_single", "all_to_all"),
    *("all_to_all_single", "barrier", "batch_isend_irecv", "broadcast", "broadcast_object_list", "gather"),
    *("gather_object", "irecv", "isend", "monitored_barrier", "recv", "recv_object_list", "scatter"),
    *("scatter_object_list", "send", "send_object_list"),
}


def names(path: Path) -> Iterator[str]:
    """Every name that a file imports or uses."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for alias in node.names:
                yield from (alias.name.rpartition(".")[2], alias.asname or "")


def uses_of_distributed(path: Path) -> Iterator[str]:
    """What a file takes from ``torch.distributed`` itself."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed"):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in ("dist", "torch.distributed"):
            yield node.attr


def test_no_module_but_reduction_adds_up_what_the_ranks_have() -> None:
    assert {"all_reduce", "start_all_reduce", "reduce_scatter", "start_reduce_scatter"} <= SUMS
    allowed = {COMMUNICATION / "collectives.py", COMMUNICATION / "reduction.py"}
    files = [path for path in (ROOT / "argonne").rglob("*.py") if path not in allowed]
    found = {(path.relative_to(ROOT).as_posix(), name) for path in files for name in set(names(path)) & SUMS}
    # What FSDP2 is told of the dtype in which it adds, and functools.reduce, are no collectives.
    assert {name for _, name in found} <= {"reduce", "reduce_dtype"}, found
    assert not [path for path in files for name in uses_of_distributed(path) if name == "reduce"]
    outside = [path for room in ("benchmarks", "examples") for path in (ROOT / room).rglob("*.py")]
    ours = {"start_all_reduce", "start_reduce_scatter"}
    for path in outside:  # a benchmark may time torch's own, but takes no sum of ours from elsewhere
        assert not set(names(path)) & ours, path
        tree = ast.parse(path.read_text(encoding="utf-8"))
        taken = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
        assert not {alias.name for node in taken if node.module.endswith("collectives") for alias in node.names} & SUMS


MAY_SEND = [COMMUNICATION / name for name in ("collectives.py", "isolation.py")]
"""What sends, and what stands in for it where nothing is to be sent."""


def test_no_module_but_collectives_sends_past_the_recorder() -> None:
    files = [path for path in (ROOT / "argonne").rglob("*.py") if path not in MAY_SEND]
    found = {(path.name, name) for path in files for name in set(uses_of_distributed(path)) & (SENDS | SUMS)}
    assert not found, found


def sums(groups: ProcessGroups, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor], list[tuple[object, ...]]]:
    """Every kind of sum over three ranks, the raw collectives' of the same numbers, and what was recorded."""
    axis, generator = groups.tensor, torch.Generator().manual_seed(groups.tensor.rank)
    x = torch.randn(6, 2, dtype=dtype, generator=generator)
    with record() as log:
        found = [sum_over(x.clone(), axis, "here"), start_sum(x.clone(), axis).wait()]
        found += [sum_and_scatter(x, axis, "there"), start_sum_and_scatter(x, axis).wait()]
    if axis.rank != 1:
        found.append(sum_of_two(x.clone(), axis, 0, 2))
    raw = [collectives.all_reduce(x.clone(), axis)] * 2 + [collectives.reduce_scatter(x, axis)] * 2
    parts = collectives.all_gather(x, axis)
    raw += [parts[0] + parts[2]] if axis.rank != 1 else []
    return found, raw, [(c.op, c.module, c.phase, c.is_async) for c in log.collectives]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_fast_sums_are_those_of_the_collectives_and_recorded_as_such(ranks: RankPool, dtype: torch.dtype) -> None:
    for found, raw, recorded in ranks.run(Layout(tensor=3), sums, dtype):
        for ours, theirs in zip(found, raw, strict=True):
            assert torch.equal(ours, theirs)
        assert recorded == [
            ("all_reduce", "here", "backward", False),
            ("all_reduce", "", "outside", True),
            ("reduce_scatter", "there", "backward", False),
            ("reduce_scatter", "", "outside", True),
        ]


def test_over_one_process_a_sum_is_what_it_is_given() -> None:
    x, axis = torch.randn(4, 3), Axis("none")
    for add in (sum_over, sum_and_scatter):
        assert add(x, axis) is x
    for start in (start_sum, start_sum_and_scatter):
        assert start(x, axis).wait() is x


@pytest.mark.parametrize("add", [sum_over, start_sum, sum_and_scatter, start_sum_and_scatter])
def test_a_policy_that_is_not_known_is_refused_wherever_numbers_are_added(add: Callable[..., object]) -> None:
    axis = replace(Axis("data"), summation="ordered")  # type: ignore[arg-type]
    with pytest.raises(ArgonneError, match=r"^summation='ordered' of axis 'data' is not known; legal: fast, tree$"):
        add(torch.ones(2), axis)
