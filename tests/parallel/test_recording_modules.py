"""A recorded collective belongs to its module and phase, recomputed too; products begin within its span."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Precision,
    ProcessGroups,
    VocabParallelEmbedding,
    complete_gradients,
    copy_to_region,
    gather_from_region,
    gather_from_sequence_region,
    global_gradient_norm,
    record,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
    sharded_parameters,
)
from argonne.parallel.communication.collectives import all_reduce
from tests.parallel.recorded import FeedForward, Place, ProductStarts, places
from tests.pool import RankPool


class Region(nn.Module):
    """A region function at work in a module."""

    def __init__(self, function: Callable[..., Tensor], groups: ProcessGroups) -> None:
        super().__init__()
        self.function, self.axis = function, groups.tensor

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.axis)


REGIONS = [
    (copy_to_region, [], ["all_reduce"]),
    (reduce_from_region, ["all_reduce"], []),
    (gather_from_region, ["all_gather"], []),
    (scatter_to_region, [], ["all_gather"]),
    (gather_from_sequence_region, ["all_gather"], ["reduce_scatter"]),
    (reduce_scatter_to_sequence_region, ["reduce_scatter"], ["all_gather"]),
]


def region_in_a_module(groups: ProcessGroups, function: Callable[..., Tensor]) -> list[Place]:
    model = nn.ModuleDict({"outer": nn.Sequential(nn.Identity(), Region(function, groups))})
    with record(model) as log:
        model["outer"](torch.ones(4, 4, requires_grad=True)).sum().backward()
    return places(log.collectives)


@pytest.mark.parametrize(("function", "forward", "backward"), REGIONS)
def test_a_regions_backward_collective_belongs_to_the_module_of_its_forward(
    ranks: RankPool, function: Callable[..., Tensor], forward: list[str], backward: list[str]
) -> None:
    expected = [("outer.1", "forward", op) for op in forward] + [("outer.1", "backward", op) for op in backward]
    assert ranks.run(Layout(tensor=2), region_in_a_module, function) == [expected] * 2


def named_and_not(groups: ProcessGroups) -> tuple[list[Place], list[Place], list[Place]]:
    found = []
    for named in (True, False):
        model = nn.Sequential(VocabParallelEmbedding(16, 4, groups), nn.Sequential(FeedForward(groups)))
        with record(model if named else None) as log:
            model(torch.arange(4)).sum().backward()
        found.append(places(log.collectives))
    parameters = sharded_parameters(model, groups)
    with record(model) as log:
        complete_gradients(parameters, groups)
        global_gradient_norm(parameters, groups)
    return found[0], found[1], places(log.collectives)


def test_modules_are_called_by_their_names_in_the_model_or_else_by_their_class(ranks: RankPool) -> None:
    for named, unnamed, _ in ranks.run(Layout(tensor=2), named_and_not):
        assert named == [
            ("0", "forward", "all_reduce"),
            ("1.0.down", "forward", "all_reduce"),
            ("1.0.up", "backward", "all_reduce"),
        ]
        assert unnamed == [
            ("VocabParallelEmbedding", "forward", "all_reduce"),
            ("RowParallelLinear", "forward", "all_reduce"),
            ("ColumnParallelLinear", "backward", "all_reduce"),
        ]


def test_the_reduction_of_gradients_and_their_norm_is_outside_of_every_module(ranks: RankPool) -> None:
    # One all-reduce over data for each of 3 parameters; the norm's is over tensor.
    for *_, after in ranks.run(Layout(data=2, tensor=2), named_and_not):
        assert after == [("", "outside", "all_reduce")] * 4
    # Without data parallelism only what a rank knows in part is reduced: here, nothing but the norm.
    for *_, after in ranks.run(Layout(tensor=2), named_and_not):
        assert after == [("", "outside", "all_reduce")]


def recomputed(groups: ProcessGroups) -> list[Place]:
    model = nn.Sequential(FeedForward(groups), FeedForward(groups))
    with record(model) as log:
        x = torch.ones(2, 4, requires_grad=True)
        for block in model:
            x = checkpoint(block, x, use_reentrant=False)
        x.sum().backward()
        all_reduce(torch.ones(1), groups.tensor)
    return places(log.collectives)


def test_recomputed_modules_keep_their_names_though_recomputation_stops_early(ranks: RankPool) -> None:
    # The last all-reduce of a block is not repeated: its result is saved by no one.
    for found in ranks.run(Layout(tensor=2), recomputed):
        assert found == [
            ("0.down", "forward", "all_reduce"),
            ("1.down", "forward", "all_reduce"),
            ("1.up", "backward", "all_reduce"),
            ("0.up", "backward", "all_reduce"),
            ("", "outside", "all_reduce"),
        ]


def recomputed_midway(groups: ProcessGroups) -> list[Place]:
    model = nn.Sequential(FeedForward(groups), nn.Tanh())
    with record(model) as log:
        checkpoint(model, torch.ones(2, 4, requires_grad=True), use_reentrant=False).sum().backward()
    return places(log.collectives)


def test_a_collective_repeated_by_recomputation_is_recorded_again(ranks: RankPool) -> None:
    for found in ranks.run(Layout(tensor=2), recomputed_midway):
        assert found == [
            ("0.down", "forward", "all_reduce"),
            ("0.down", "forward", "all_reduce"),
            ("0.up", "backward", "all_reduce"),
        ]


def column_backward(groups: ProcessGroups, bias: bool, accumulate: bool) -> list[tuple[str, bool, Any]]:
    """The collectives of a backward, each with the products that began within its span."""
    precision = Precision(accumulate_in_product=accumulate)
    layer = ColumnParallelLinear(5, 6 * groups.tensor.size, groups, bias=bias, precision=precision)
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    tokens = 8 // groups.tensor.size if groups.sequence_parallel else 8
    with record() as log, ProductStarts() as products:
        y = layer(torch.ones(tokens, 5, requires_grad=True))
        products.seen.clear()
        y.sum().backward()
    backward = log.select(phase="backward")
    return [(entry.op, entry.is_async, products.within(entry)) for entry in backward]


X_GRADIENT, WEIGHT_GRADIENT = (8, 5), (6, 5)


@pytest.mark.parametrize("size", [2, 4], scope="module")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_the_weight_gradient_is_computed_within_the_span_of_the_input_gradients_all_reduce(
    ranks: RankPool, size: int, bias: bool, accumulate: bool
) -> None:
    for found in ranks.run(Layout(tensor=size), column_backward, bias, accumulate):
        assert found == [("all_reduce", True, [WEIGHT_GRADIENT])]


@pytest.mark.parametrize("size", [2, 4], scope="module")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_under_sequence_parallelism_each_product_is_computed_within_the_span_of_a_collective(
    ranks: RankPool, size: int, bias: bool, accumulate: bool
) -> None:
    """The input gradient beside the second gathering of the input, the weight gradient beside the reduce-scatter."""
    for found in ranks.run(Layout(tensor=size, sequence_parallel=True), column_backward, bias, accumulate):
        assert found == [("all_gather", True, [X_GRADIENT]), ("reduce_scatter", True, [WEIGHT_GRADIENT])]
