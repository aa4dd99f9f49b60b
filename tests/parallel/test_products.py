"""The products of the linear layers: what is in flight beside them, what is left out, and what one rank pays."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.parallel import ColumnParallelLinear, Layout, ProcessGroups, RowParallelLinear
from argonne.parallel.communication import collectives
from argonne.parallel.tensor_parallel import gemm
from tests.parallel.operands import own_tokens, under, values
from tests.pool import RankPool


class _Work:
    def __init__(self, work: Any, name: str, record: list[str]) -> None:
        self.work, self.name, self.record = work, name, record

    def wait(self) -> Any:
        self.record.append(f"{self.name} awaited")
        return self.work.wait()


PRODUCTS = {"mm", "bmm", "addmm", "_linear_pointwise"}  # the last is oneDNN's


class _MatrixProducts(TorchDispatchMode):
    """Records each matrix product by the shape of its result."""

    def __init__(self, record: list[str], names: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self.record, self.names = record, names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket.__name__ in PRODUCTS:
            self.record.append(self.names.get(tuple(result.shape), f"product {tuple(result.shape)}"))
        return result


COLLECTIVES = [
    ("all-reduce", dist, "all_reduce"),
    ("all-gather", collectives, "_all_gather_tensor"),
    ("reduce-scatter", collectives, "_reduce_scatter_tensor"),
]


def record_backward(groups: ProcessGroups, bias: bool, sequence: bool) -> list[str]:
    groups = under(groups, sequence)
    layer = ColumnParallelLinear(5, 6 * groups.tensor.size, groups, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(values(*parameter.shape, kind="integers", seed=1))
    x = own_tokens(values(8, 5, kind="integers", seed=2), groups).requires_grad_()
    y = layer(x)
    record: list[str] = []

    def recording(name: str, real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            assert kwargs.get("async_op") is True, f"the {name} blocks"
            record.append(f"{name} started")
            return _Work(real(*args, **kwargs), name, record)

        return call

    kept = [getattr(module, function) for _, module, function in COLLECTIVES]
    for (name, module, function), real in zip(COLLECTIVES, kept, strict=True):
        setattr(module, function, recording(name, real))
    try:
        with _MatrixProducts(record, {(8, 5): "input gradient", (6, 5): "weight gradient"}):
            y.backward(torch.ones_like(y))
    finally:
        for (_, module, function), real in zip(COLLECTIVES, kept, strict=True):
            setattr(module, function, real)
    return record


@pytest.mark.parametrize("bias", [False, True])
def test_the_all_reduce_is_in_flight_while_the_weight_gradient_is_computed(ranks: RankPool, bias: bool) -> None:
    for rank, record in enumerate(ranks.run(Layout(tensor=2), record_backward, bias, False)):
        expected = ["input gradient", "all-reduce started", "weight gradient", "all-reduce awaited"]
        assert record == expected, f"rank {rank}"


@pytest.mark.parametrize("bias", [False, True])
def test_the_second_gather_and_the_reduce_scatter_are_each_in_flight_beside_a_product(
    ranks: RankPool, bias: bool
) -> None:
    for rank, record in enumerate(ranks.run(Layout(tensor=2), record_backward, bias, True)):
        assert record == [
            "all-gather started",
            "input gradient",
            "all-gather awaited",
            "reduce-scatter started",
            "weight gradient",
            "reduce-scatter awaited",
        ], f"rank {rank}"


def kept_for_backward(groups: ProcessGroups, sequence: bool) -> list[tuple[int, ...]]:
    """The shapes of the tensors, parameters aside, that the forward keeps."""
    groups = under(groups, sequence)
    layer = ColumnParallelLinear(5, 6 * groups.tensor.size, groups)
    nn.init.ones_(layer.weight)
    kept: list[tuple[int, ...]] = []
    x = own_tokens(torch.ones(8, 5), groups).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer(x)
    return sorted(shape for shape in kept if shape != tuple(layer.weight.shape))


def test_under_sequence_parallelism_only_the_ranks_own_tokens_are_kept(ranks: RankPool) -> None:
    assert ranks.run(Layout(tensor=2), kept_for_backward, False) == [[(8, 5)]] * 2
    assert ranks.run(Layout(tensor=2), kept_for_backward, True) == [[(4, 5)]] * 2


def frozen_backward(groups: ProcessGroups, kind: str, trained: str, sequence: bool) -> tuple[set[str], list[str]]:
    """What has a gradient when only ``trained`` (x, weight or bias) needs one, and the products of backward."""
    groups = under(groups, sequence)
    make = ColumnParallelLinear if kind == "column" else RowParallelLinear
    layer = make(4, 4, groups, bias=True)
    x = own_tokens(torch.ones(6, 4), groups) if kind == "column" else torch.ones(6, 4 // groups.tensor.size)
    tensors = {"x": x, "weight": layer.weight, "bias": layer.bias}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name == trained)
        with torch.no_grad():
            tensor.fill_(1)
    loss, products = layer(x).sum(), []
    with _MatrixProducts(products, {}):
        loss.backward()
    return {name for name, tensor in tensors.items() if tensor.grad is not None}, products


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_backward_computes_only_what_is_needed(ranks: RankPool, size: int, kind: str) -> None:
    for sequence in (False, True):
        for trained, products in (("x", 1), ("weight", 1), ("bias", 0)):
            for rank, (found, made) in enumerate(
                ranks.run(Layout(tensor=size), frozen_backward, kind, trained, sequence)
            ):
                assert found == {trained}, f"rank {rank}"
                assert len(made) == products, f"rank {rank} makes {made} for the gradient of {trained}"


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def operators(layer: nn.Module, x: Tensor) -> list[str]:
    """Everything that is dispatched in forward and backward."""
    for parameter in layer.parameters():
        nn.init.ones_(parameter)
    x = x.clone().requires_grad_()
    with _Operators() as seen:
        y = layer(x)
        y.backward(torch.ones_like(y))
    return seen.names


@pytest.mark.parametrize("kind", [ColumnParallelLinear, RowParallelLinear])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
@pytest.mark.parametrize("sequence", [False, True])
def test_alone_a_layer_dispatches_what_torch_dispatches(
    monkeypatch: pytest.MonkeyPatch, kind: type[nn.Module], bias: bool, shape: tuple[int, ...], sequence: bool
) -> None:
    monkeypatch.setattr(gemm, "_mkl_is_slow_here", lambda: False)  # where it is, products are oneDNN's
    groups = replace(ProcessGroups.single(), layout=Layout(sequence_parallel=sequence))
    expected = operators(nn.Linear(4, 6, bias=bias), torch.ones(shape))
    assert operators(kind(4, 6, groups, bias=bias), torch.ones(shape)) == expected
