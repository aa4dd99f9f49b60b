"""Column- and row-parallel layers, each alone, equal one dense layer: outputs and every gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    LayoutError,
    Partition,
    Precision,
    ProcessGroups,
    Region,
    RowParallelLinear,
    complete_gradients,
    regions_of,
    sharded_parameters,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

SIZES = [1, 2, 4]  # at module scope: pytest then runs each size in one go, and ranks join a job once


def values(*shape: int, kind: str, seed: int) -> Tensor:
    """Normal float64, or small integers in float32: their sums of products are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "integers":
        return torch.randint(-8, 9, shape, generator=generator).float()
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def assert_same(found: Tensor, expected: Tensor, kind: str, what: str) -> None:
    if kind == "integers":
        assert torch.equal(found, expected), f"{what}: off by {(found - expected).abs().max()} at most"
    else:
        assert_close(found, expected, 1e-12, what)


def fill(layer: nn.Module, groups: ProcessGroups, wholes: dict[str, Tensor]) -> None:
    """Overwrite this rank's parts of the named whole tensors."""
    for region, part in regions_of(sharded_parameters(layer, groups)):
        part.copy_(wholes[region.name][region.whole_index])


def column(
    groups: ProcessGroups,
    out: int | list[Partition],
    gather: bool,
    wholes: dict[str, Tensor],
    x: Tensor,
    gradients: list[dict[str, Tensor]],
) -> tuple[Tensor, list[Region], Tensor, Parts]:
    """Forward and backward; rank r is given ``gradients[r]``, of which it uses the outputs that it holds."""
    precision = Precision(x.dtype, x.dtype)
    bias = any(name.endswith("bias") for name in wholes)
    layer = ColumnParallelLinear(x.shape[-1], out, groups, bias=bias, gather_output=gather, precision=precision)
    fill(layer, groups, wholes)
    x = x.clone().requires_grad_()
    y = layer(x)
    regions = list(layer.shard_specs()["weight"].regions)
    if gather:
        gradient = gradients[0]["weight"]
    else:
        gradient = torch.zeros_like(y)
        for region, whole in ((r, gradients[groups.tensor.rank][key(r)]) for r in regions):
            gradient[..., region.local_index[0]] = whole[..., region.whole_index[0]]
    y.backward(gradient)
    complete_gradients(sharded_parameters(layer, groups), groups)
    assert x.grad is not None
    return y.detach(), regions, x.grad, parts_of(layer, groups, lambda p: p.grad)


def key(region: Region) -> str:
    return region.name.removeprefix("../")


def check_column(
    ranks: RankPool,
    size: int,
    parts: dict[str, Partition],
    out: int | list[Partition],
    x: Tensor,
    kind: str,
    bias: bool,
    gather: bool,
    seed: int,
) -> None:
    """``parts`` by the name of their weight."""
    wholes: dict[str, Tensor] = {}
    for i, (name, part) in enumerate(parts.items()):
        wholes[name] = values(part.features, x.shape[-1], kind=kind, seed=seed + i)
        if bias:
            wholes[name.replace("weight", "bias")] = values(part.features, kind=kind, seed=seed + 100 + i)
    gradients = [
        {
            name: values(*x.shape[:-1], part.features, kind=kind, seed=seed + 1000 * (rank + 1) + i)
            for i, (name, part) in enumerate(parts.items())
        }
        for rank in range(size)
    ]
    results = ranks.run(Layout(tensor=size), column, out, gather, wholes, x, gradients)

    # Dense: the same product once, with the sum over the ranks of what each was given for what it holds.
    leaves = {name: whole.clone().requires_grad_() for name, whole in wholes.items()}
    whole_x = x.clone().requires_grad_()
    outputs = {}
    for name, part in parts.items():
        outputs[name] = whole_x @ leaves[name].T + (leaves[name.replace("weight", "bias")] if bias else 0)
        total = torch.zeros_like(outputs[name])
        for rank in range(1 if gather else size):
            held = range(size) if gather else part.held[rank]
            for block in held:
                rows = slice(block * part.block, (block + 1) * part.block)
                total[..., rows] += gradients[rank][name][..., rows]
        outputs[name].backward(total)
    for rank, (y, regions, x_gradient, _) in enumerate(results):
        for region in regions:
            expected = outputs[key(region)].detach()
            if gather:
                assert_same(y, expected, kind, f"gathered output on rank {rank}")
            else:
                found = y[..., region.local_index[0]]
                assert_same(found, expected[..., region.whole_index[0]], kind, f"output {key(region)} on rank {rank}")
        assert_same(x_gradient, whole_x.grad, kind, f"input gradient on rank {rank}")
    found_gradients = assemble(parts for *_, parts in results)
    assert set(found_gradients) == set(wholes)
    for name, gradient in found_gradients.items():
        assert_same(gradient, leaves[name].grad, kind, f"gradient of {name}")


LEADING = st.lists(st.integers(1, 4), min_size=0, max_size=3)
KINDS = st.sampled_from(["normal", "integers"])


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_column_parallel_output_and_gradients_equal_dense(ranks: RankPool, size: int, gather: bool) -> None:
    @given(LEADING, st.integers(1, 9), st.integers(1, 5), st.booleans(), KINDS, st.integers(0, 2**31))
    def claim(leading: list[int], width: int, local: int, bias: bool, kind: str, seed: int) -> None:
        x = values(*leading, width, kind=kind, seed=seed + 7)
        part = Partition.split("", size * local, size)
        check_column(ranks, size, {"weight": part}, size * local, x, kind, bias, gather, seed)

    claim()


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_fused_column_parallel_parts_equal_separate_dense_layers(ranks: RankPool, size: int) -> None:
    @given(st.lists(st.integers(1, 4), min_size=2, max_size=3), st.booleans(), KINDS, st.integers(0, 2**31))
    def claim(locals_: list[int], bias: bool, kind: str, seed: int) -> None:
        x = values(2, 3, 5, kind=kind, seed=seed + 7)
        out = [Partition.split(f"part{i}_proj", size * local, size) for i, local in enumerate(locals_)]
        parts = {f"{part.name}.weight": part for part in out}
        check_column(ranks, size, parts, out, x, kind, bias, False, seed)

    claim()


def attention_parts(heads: int, key_value_heads: int, dim: int, size: int) -> list[Partition]:
    """Query heads cut equally; each rank has the key-value heads that its query heads use."""
    own = tuple(range(r * heads // size, (r + 1) * heads // size) for r in range(size))
    group = heads // key_value_heads
    shared = tuple(range(h[0] // group, h[-1] // group + 1) for h in own)
    return [Partition("q_proj", dim, own), Partition("k_proj", dim, shared), Partition("v_proj", dim, shared)]


@pytest.mark.parametrize(
    ("size", "heads", "key_value_heads"),
    [(2, 4, 1), (2, 6, 3), (4, 4, 1), (4, 4, 2), (4, 8, 2), (4, 12, 3), (4, 12, 6)],
)
@pytest.mark.parametrize("kind", ["normal", "integers"])
def test_shared_blocks_equal_dense_and_their_gradients_are_summed_over_the_holders(
    ranks: RankPool, size: int, heads: int, key_value_heads: int, kind: str
) -> None:
    out = attention_parts(heads, key_value_heads, 3, size)
    assert out[1].is_shared
    assert not out[0].is_shared
    x = values(3, 4, 6, kind=kind, seed=heads)
    check_column(ranks, size, {f"{p.name}.weight": p for p in out}, out, x, kind, True, False, seed=heads)


def row(
    groups: ProcessGroups, wholes: dict[str, Tensor], x: Tensor, gradient: Tensor
) -> tuple[Tensor, slice, Tensor, Parts]:
    precision = Precision(x.dtype, x.dtype)
    out_features, in_features = wholes["weight"].shape
    layer = RowParallelLinear(in_features, out_features, groups, bias="bias" in wholes, precision=precision)
    fill(layer, groups, wholes)
    columns = layer.shard_specs()["weight"].regions[0].whole_index[1]
    local = x[..., columns].clone().requires_grad_()
    y = layer(local)
    y.backward(gradient)
    complete_gradients(sharded_parameters(layer, groups), groups)
    assert local.grad is not None
    return y.detach(), columns, local.grad, parts_of(layer, groups, lambda p: p.grad)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_row_parallel_output_and_gradients_equal_dense(ranks: RankPool, size: int) -> None:
    @given(LEADING, st.integers(1, 5), st.integers(1, 9), st.booleans(), KINDS, st.integers(0, 2**31))
    def claim(leading: list[int], local: int, out: int, bias: bool, kind: str, seed: int) -> None:
        x = values(*leading, size * local, kind=kind, seed=seed)
        wholes = {"weight": values(out, size * local, kind=kind, seed=seed + 1)}
        if bias:
            wholes["bias"] = values(out, kind=kind, seed=seed + 2)
        gradient = values(*leading, out, kind=kind, seed=seed + 3)
        results = ranks.run(Layout(tensor=size), row, wholes, x, gradient)

        leaves = {name: whole.clone().requires_grad_() for name, whole in wholes.items()}
        whole_x = x.clone().requires_grad_()
        expected = whole_x @ leaves["weight"].T + leaves.get("bias", 0)
        expected.backward(gradient)
        for rank, (y, columns, x_gradient, _) in enumerate(results):
            assert_same(y, expected.detach(), kind, f"output on rank {rank}")
            assert_same(x_gradient, whole_x.grad[..., columns], kind, f"input gradient on rank {rank}")
        gradients = assemble(parts for *_, parts in results)
        for name, whole in leaves.items():
            assert_same(gradients[name], whole.grad, kind, f"gradient of {name}")

    claim()


def column_then_row(groups: ProcessGroups, wholes: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of one transformer layer: bf16 or float32 compute on float32 weights."""
    precision = Precision(torch.float32, x.dtype)
    up = ColumnParallelLinear(x.shape[-1], 8, groups, precision=precision)
    down = RowParallelLinear(8, 5, groups, precision=precision)
    fill(up, groups, {"weight": wholes["up"]})
    fill(down, groups, {"weight": wholes["down"]})
    x = x.clone().requires_grad_()
    y = down(up(x))
    y.sum().backward()
    for layer in (up, down):
        assert layer.weight.dtype == torch.float32
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
    assert x.grad is not None
    return y.detach(), x.grad


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_column_then_row_computes_in_the_compute_dtype_with_float32_masters(
    ranks: RankPool, size: int, dtype: torch.dtype
) -> None:
    wholes = {"up": values(8, 3, kind="integers", seed=1).clamp(-1, 1)}
    wholes["down"] = values(5, 8, kind="integers", seed=2).clamp(-1, 1)
    x = values(2, 3, kind="integers", seed=3).clamp(-2, 2).to(dtype)
    whole_x = x.float().clone().requires_grad_()
    expected = whole_x @ wholes["up"].T @ wholes["down"].T
    expected.sum().backward()
    for y, gradient in ranks.run(Layout(tensor=size), column_then_row, wholes, x):
        assert y.dtype == dtype
        assert gradient.dtype == dtype
        assert torch.equal(y.float(), expected.detach())
        assert torch.equal(gradient.float(), whole_x.grad)


class _Work:
    def __init__(self, work: Any, record: list[str]) -> None:
        self.work, self.record = work, record

    def wait(self) -> Any:
        self.record.append("all-reduce awaited")
        return self.work.wait()


class _MatrixProducts(TorchDispatchMode):
    """Records each matrix product by the shape of its result."""

    def __init__(self, record: list[str], names: dict[tuple[int, ...], str]) -> None:
        super().__init__()
        self.record, self.names = record, names

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm):
            self.record.append(self.names.get(tuple(result.shape), f"product {tuple(result.shape)}"))
        return result


def record_backward(groups: ProcessGroups, bias: bool) -> list[str]:
    layer = ColumnParallelLinear(5, 6 * groups.tensor.size, groups, bias=bias)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(values(*parameter.shape, kind="integers", seed=1))
    x = values(7, 5, kind="integers", seed=2).requires_grad_()
    y = layer(x)
    record: list[str] = []
    real = dist.all_reduce

    def recording(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        assert kwargs.get("async_op") is True, "the all-reduce blocks"
        assert tuple(tensor.shape) == (7, 5), "not the gradient of the input"
        record.append("all-reduce started")
        return _Work(real(tensor, *args, **kwargs), record)

    dist.all_reduce = recording
    try:
        with _MatrixProducts(record, {(7, 5): "input gradient", (6, 5): "weight gradient"}):
            y.backward(torch.ones_like(y))
    finally:
        dist.all_reduce = real
    return record


@pytest.mark.parametrize("bias", [False, True])
def test_column_parallel_all_reduce_is_in_flight_while_the_weight_gradient_is_computed(
    ranks: RankPool, bias: bool
) -> None:
    for rank, record in enumerate(ranks.run(Layout(tensor=2), record_backward, bias)):
        expected = ["input gradient", "all-reduce started", "weight gradient", "all-reduce awaited"]
        assert record == expected, f"rank {rank}"


def frozen_backward(groups: ProcessGroups, train_input: bool) -> tuple[bool, bool]:
    layer = ColumnParallelLinear(3, 4, groups)
    torch.nn.init.ones_(layer.weight)
    layer.weight.requires_grad_(not train_input)
    x = torch.ones(2, 3, requires_grad=train_input)
    layer(x).sum().backward()
    return x.grad is not None, layer.weight.grad is not None


@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_column_parallel_backward_computes_only_what_is_needed(ranks: RankPool, size: int) -> None:
    assert ranks.run(Layout(tensor=size), frozen_backward, True) == [(True, False)] * size
    assert ranks.run(Layout(tensor=size), frozen_backward, False) == [(False, True)] * size


def refusals(groups: ProcessGroups) -> list[str]:
    part = Partition("", 1, (range(0, 1), range(0, 1)))
    fused = [Partition.split("a", 2, 2), Partition.split("b", 2, 2)]
    found = []
    for make in (
        lambda: ColumnParallelLinear(4, 9, groups),
        lambda: RowParallelLinear(9, 4, groups),
        lambda: Partition.split("gate_proj", 9, 2),
        lambda: ColumnParallelLinear(4, [part], groups, gather_output=True),
        lambda: ColumnParallelLinear(4, fused, groups, gather_output=True),
    ):
        with pytest.raises(LayoutError) as refusal:
            make()
        found.append(str(refusal.value))
    return found


def test_layers_refuse_what_cannot_be_shared_out_naming_the_legal_sizes(ranks: RankPool) -> None:
    for messages in ranks.run(Layout(tensor=2), refusals):
        assert messages == [
            "out_features=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            "in_features=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            "out_features of gate_proj=9 is not divisible by tensor_parallel=2; legal sizes: 1, 3, 9",
            "gather_output=True is not defined for fused, shared or unequal parts; legal: False",
            "gather_output=True is not defined for fused, shared or unequal parts; legal: False",
        ]
