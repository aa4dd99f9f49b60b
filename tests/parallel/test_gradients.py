"""After backward: partial gradients add up, the norm counts each element once, clipping is that of the whole."""

from __future__ import annotations

import math
from datetime import timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Partition,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    clip_gradients,
    complete_gradients,
    global_gradient_norm,
    regions_of,
    sharded_parameters,
)
from argonne.parallel.communication.collectives import barrier
from argonne.parallel.communication.job import TRAINING_TIMEOUT
from tests.parallel.operands import attention_parts, under, values
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
HIDDEN, VOCABULARY = 4, 13


def build(groups: ProcessGroups) -> nn.ModuleDict:
    """One of each: cut rows, shared blocks, cut columns, a replicated bias and norm, padding rows."""
    size = groups.tensor.size
    return nn.ModuleDict(
        {
            "embed": VocabParallelEmbedding(VOCABULARY, HIDDEN, groups, precision=DOUBLE),
            "qkv": ColumnParallelLinear(HIDDEN, attention_parts(4, 2, 3, size), groups, bias=True, precision=DOUBLE),
            "o": RowParallelLinear(12, HIDDEN, groups, bias=True, precision=DOUBLE),
            "norm": nn.LayerNorm(HIDDEN, dtype=torch.float64),
        }
    )


def set_gradients(model: nn.Module, groups: ProcessGroups, kind: str) -> None:
    """Gradients as after backward: each rank's share of a partial one differs, every other is the whole's."""
    rank, replica = groups.tensor.rank, groups.data.rank
    for sharded in sharded_parameters(model, groups):
        gradient = torch.zeros_like(sharded.parameter)
        for i, region in enumerate(sharded.spec.regions):
            seed = sum(map(ord, region.name)) + 1000 * replica
            if region.partial_gradient and len(region.holders) > 1:
                seed += 10_000 * (rank + 1) + 7 * i
                gradient[region.local_index] = values(*region.shape, kind=kind, seed=seed)
            else:
                whole = values(*region.whole_shape, kind=kind, seed=seed)
                gradient[region.local_index] = whole[region.whole_index]
        sharded.parameter.grad = gradient


def complete(groups: ProcessGroups, kind: str, limit: float) -> tuple[Parts, Parts, float, Parts]:
    model = build(groups)
    set_gradients(model, groups, kind)
    before = parts_of(model, groups, lambda p: p.grad)
    parameters = sharded_parameters(model, groups)
    complete_gradients(parameters, groups)
    after = parts_of(model, groups, lambda p: p.grad)
    norm = global_gradient_norm(parameters, groups)
    clip_gradients(parameters, norm, limit)
    return before, after, norm.item(), parts_of(model, groups, lambda p: p.grad)


LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=3, sequence_parallel=True),
    Layout(tensor=4),
    Layout(tensor=4, sequence_parallel=True),
    Layout(data=2),
    Layout(data=2, tensor=2),
    Layout(data=2, tensor=2, sequence_parallel=True),
    pytest.param(Layout(data=2, tensor=4, sequence_parallel=True), marks=pytest.mark.slow),
]
# What every rank holds, but sees only its tokens of under sequence parallelism.
BETWEEN_LAYERS = ("norm.weight", "norm.bias", "o.bias")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_completed_gradients_are_the_sums_of_what_the_ranks_knew(ranks: RankPool, layout: Layout) -> None:
    results = ranks.run(layout, complete, "integers", 1.0)
    expected: dict[tuple[str, tuple[int, ...]], Tensor] = {}
    for rank, (before, *_) in enumerate(results):
        tensor = layout.coordinates(rank)[-1]
        for region, part in before:
            name = region.name
            partial = name.split(".")[0] in ("k_proj", "v_proj") and len(region.holders) > 1
            partial |= layout.sequence_parallel and name in BETWEEN_LAYERS
            # A whole gradient is counted once for each replica; a partial one for each rank as well.
            if partial or tensor == region.holders[0]:
                at = (name, region.start)
                expected[at] = expected.get(at, 0) + part
    for rank, (_, after, *_) in enumerate(results):
        for region, part in after:
            assert torch.equal(part, expected[region.name, region.start]), f"{region.name} on rank {rank}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_global_norm_is_that_of_the_whole_tensors_and_clipping_scales_them(ranks: RankPool, layout: Layout) -> None:
    results = ranks.run(layout, complete, "normal", 0.75)
    wholes = assemble(after for _, after, *_ in results)
    clipped = assemble(after for *_, after in results)
    expected = torch.cat([whole.flatten() for whole in wholes.values()]).norm().item()
    norms = [norm for _, _, norm, _ in results]
    assert norms == [norms[0]] * layout.world_size
    assert norms[0] == pytest.approx(expected, rel=1e-12)
    for name, whole in wholes.items():
        torch.testing.assert_close(clipped[name], whole * (0.75 / (expected + 1e-6)), rtol=1e-12, atol=0)
    total = torch.cat([whole.flatten() for whole in clipped.values()]).norm().item()
    assert total == pytest.approx(0.75, rel=1e-6)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_never_enlarges_and_bounds_the_norm(size: float, limit: float) -> None:
    layer = nn.Linear(3, 2)
    parameters = sharded_parameters(layer, ProcessGroups.single())
    groups = ProcessGroups.single()
    for i, parameter in enumerate(layer.parameters()):
        parameter.grad = size * values(*parameter.shape, kind="normal", seed=i).float()
    kept = [parameter.grad.clone() for parameter in layer.parameters()]
    norm = global_gradient_norm(parameters, groups)
    clip_gradients(parameters, norm, limit)
    assert global_gradient_norm(parameters, groups) <= limit * (1 + 1e-6) or norm <= limit
    if norm + 1e-6 <= limit:
        assert all(torch.equal(p.grad, g) for p, g in zip(layer.parameters(), kept, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (7,), (5, 3)])
def test_clipping_rounds_the_product_to_a_narrow_gradient_and_not_the_factor(dtype: torch.dtype, shape: tuple) -> None:
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    layer = nn.ParameterDict({"weight": parameter})
    parameter.grad = values(15, kind="normal", seed=1)[: math.prod(shape)].view(shape).to(dtype)
    norm, limit, scale = torch.tensor(3.7, dtype=torch.float64), 0.83, 2.0**12
    wanted = (parameter.grad.float() * (limit / (norm + 1e-6) / scale).float()).to(dtype)
    clip_gradients(sharded_parameters(layer, ProcessGroups.single()), norm, limit, scale)
    torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=0)


def test_norm_is_float64_however_small_the_gradients() -> None:
    layer = nn.Linear(1000, 1000, bias=False)
    layer.weight.grad = torch.full((1000, 1000), 1e-30)  # squares vanish in float32
    norm = global_gradient_norm(sharded_parameters(layer, ProcessGroups.single()), ProcessGroups.single())
    assert norm.dtype == torch.float64
    assert norm.item() == pytest.approx(1e-27, rel=1e-6)


def test_parameters_without_gradient_are_passed_over() -> None:
    layer = nn.Linear(3, 2)
    parameters = sharded_parameters(layer, ProcessGroups.single())
    groups = ProcessGroups.single()
    complete_gradients(parameters, groups)
    assert global_gradient_norm(parameters, groups) == 0
    clip_gradients(parameters, torch.tensor(5.0, dtype=torch.float64), 1.0)
    assert layer.weight.grad is None


def train_padding(groups: ProcessGroups) -> tuple[float, Parts]:
    """A few AdamW steps with weight decay on an embedding that has padding rows."""
    layer = VocabParallelEmbedding(VOCABULARY, HIDDEN, groups, precision=DOUBLE)
    for region, part in regions_of(sharded_parameters(layer, groups)):
        part.copy_(values(*region.whole_shape, kind="normal", seed=1)[region.whole_index])
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for step in range(3):
        layer(torch.arange(VOCABULARY)).square().sum().mul(step + 1).backward()
        optimizer.step()
        optimizer.zero_grad()
    padding = layer.weight.detach()[layer.range.tokens :].abs().sum().item()
    return padding, parts_of(layer, groups, lambda p: p)


@pytest.mark.parametrize("size", [2, 4])
def test_padding_rows_stay_zero_through_optimizer_steps(ranks: RankPool, size: int) -> None:
    ((_, alone),) = ranks.run(Layout(), train_padding)
    results = ranks.run(Layout(tensor=size), train_padding)
    assert [padding for padding, _ in results] == [0.0] * size
    torch.testing.assert_close(
        assemble(parts for _, parts in results)["weight"], assemble([alone])["weight"], rtol=1e-12, atol=0
    )


def complete_uneven(groups: ProcessGroups) -> Parts:
    # Ranks 0 and 1 share block 1; ranks 2 and 3 share nothing, and must still take part.
    part = Partition("", 2, (range(0, 2), range(1, 2), range(2, 3), range(3, 5)))
    layer = ColumnParallelLinear(3, [part], groups)
    layer.weight.grad = torch.full_like(layer.weight, 10.0**groups.tensor.rank)
    groups.set_timeout(timedelta(seconds=3))
    try:
        complete_gradients(sharded_parameters(layer, groups), groups)
        barrier(groups.world)
    finally:
        groups.set_timeout(TRAINING_TIMEOUT)
    return parts_of(layer, groups, lambda p: p.grad)


def test_a_block_shared_by_some_ranks_only_is_summed_over_those(ranks: RankPool) -> None:
    whole = assemble(ranks.run(Layout(tensor=4), complete_uneven))["weight"]
    assert whole[:, 0].tolist() == [1, 1, 11, 11, 100, 100, 1000, 1000, 1000, 1000]


def complete_in_two_dtypes(groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    """The gradients of a float32 bias and a float64 norm, each rank's 1 + 2 ** -(20 or 40)."""
    groups = under(groups, True)
    model = nn.ModuleList([RowParallelLinear(4, 3, groups, bias=True), nn.LayerNorm(3, dtype=torch.float64)])
    for parameter in model.parameters():
        exponent = 40 if parameter.dtype == torch.float64 else 20
        parameter.grad = torch.full_like(parameter, 1 + 2.0**-exponent)
    complete_gradients(sharded_parameters(model, groups), groups)
    return model[0].bias.grad, model[1].weight.grad


def test_partial_gradients_of_two_dtypes_are_each_summed_in_their_own(ranks: RankPool) -> None:
    for rank, (bias, norm) in enumerate(ranks.run(Layout(tensor=2), complete_in_two_dtypes)):
        assert bias.dtype == torch.float32
        assert norm.dtype == torch.float64
        assert (bias == 2 + 2.0**-19).all(), f"float32 gradient on rank {rank}: {bias}"
        assert (norm == 2 + 2.0**-39).all(), f"float64 gradient on rank {rank} is off by {(norm - 2 - 2.0**-39).max()}"
