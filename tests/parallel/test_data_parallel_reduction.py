"""Each bucket is reduced once, beside the last backward; gradients of any shape are summed and values published."""

from __future__ import annotations

import itertools
import time
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import Axis, Layout, Log, Precision, ProcessGroups, data_parallel, record, regions_of
from argonne.parallel.data_parallel.buckets import plan_buckets
from argonne.parallel.data_parallel.strategy import rows_of_rank
from tests.parallel.operands import values
from tests.parallel.replicas import KINDS, Plan, Used, backward, batches, build
from tests.pool import RankPool
from tests.whole import Parts, assemble


def overlap(groups: ProcessGroups, plan: Plan) -> tuple[Log, list[float], int]:
    """The collectives of one step, when each backward returned, and how many buckets there are."""
    model, strategy = build(groups, plan)
    parameters = list(model.parameters())
    strategy.begin(plan.accumulation)
    returned = []
    with record(model) as log:
        for batch in batches(groups, plan.accumulation, 0):
            backward(model, batch)
            returned.append(time.perf_counter())
        strategy.complete()
    return log, returned, len(plan_buckets(parameters, plan.bucket_bytes))


@pytest.mark.parametrize(("kind", "op"), [("replicate", "all_reduce"), ("zero1", "reduce_scatter")])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_each_bucket_is_reduced_once_beside_the_last_backward(
    ranks: RankPool, kind: str, op: str, accumulation: int
) -> None:
    for log, returned, buckets in ranks.run(Layout(data=2), overlap, Plan(kind, accumulation=accumulation)):
        reductions = log.select(axis="replicas")
        assert buckets > 4
        assert [c.op for c in reductions] == [op] * buckets
        assert all(c.is_async for c in reductions)
        last_backward = (returned[-2] if accumulation > 1 else 0.0, returned[-1])
        for number, c in enumerate(reductions):
            assert last_backward[0] < c.started < last_backward[1], f"bucket {number} is not sent in the last backward"
            assert c.finished > last_backward[1], f"bucket {number} is waited for in backward"


Case = dict[str, Any]
LATE = 50  # the pass of gradients that come after backward


def factors(case: Case, replica: int, batch: int) -> list[Tensor | None]:
    """What a replica multiplies each parameter with in one micro-batch; None where it does not use it."""
    return [
        None if (i, replica) in case["unused"] else values(*s, kind="integers", seed=97 * i + 7 * replica + batch).to(d)
        for i, (s, d) in enumerate(case["shapes"])
    ]


def reduce_plain(groups: ProcessGroups, case: Case) -> tuple[Parts, Parts, list[Tensor]]:
    """Gradients, then values after one has been added to each; those of the model itself last."""
    model = Used(case["shapes"])
    strategy = data_parallel(model, groups, case["kind"], bucket_bytes=case["bucket_bytes"])
    for _ in range(2):  # the second step finds what the first has left
        strategy.begin(case["micro_batches"], case["deferred"])
        for batch in range(case["micro_batches"]):
            model(factors(case, groups.replicas.rank, batch)).backward()
        if case["deferred"]:
            for parameter, late in zip(model.parts, factors(case, groups.replicas.rank, LATE), strict=True):
                if late is not None:
                    parameter.grad += late
        strategy.complete()
        gradients = [
            (region, sharded.parameter.grad[region.local_index].clone())
            for sharded in strategy.parameters
            for region in sharded.spec.regions
        ]
        for sharded in strategy.parameters:
            assert sharded.parameter.grad.dtype == sharded.parameter.dtype
            sharded.parameter.grad = None
    for _, part in regions_of(strategy.parameters):
        part += 1
    strategy.publish()
    moved = [(region, part.clone()) for region, part in regions_of(strategy.parameters)]
    held = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return gradients, moved, [p.detach() for p in held]


@st.composite
def cases(draw: st.DrawFn, kind: str, replicas: int) -> Case:
    count = draw(st.integers(1, 5))
    dtypes = [torch.float64] if kind == "fsdp" else [torch.float64, torch.float32, torch.bfloat16]
    shape = st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple)
    unused = draw(st.sets(st.tuples(st.integers(1, 5), st.integers(0, replicas - 1))))
    if kind == "fsdp":  # every replica must make the same gradients
        unused = {(i, r) for i, _ in unused for r in range(replicas)}
    return {
        "kind": kind,
        "shapes": [(draw(shape), draw(st.sampled_from(dtypes))) for _ in range(count)],
        "micro_batches": draw(st.integers(1, 3)),
        "bucket_bytes": draw(st.sampled_from([1, 100, 500, 10_000])),
        "unused": unused,
        "deferred": kind != "fsdp" and draw(st.booleans()),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "layout",
    [
        Layout(data=3),
        Layout(data=2, context=2),
        pytest.param(Layout(data=2, context=2, tensor=2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_parameters_of_any_shape_are_summed_and_published(ranks: RankPool, layout: Layout, kind: str) -> None:
    replicas = layout.data * layout.context

    @given(cases(kind, replicas))
    @settings(max_examples=15, phases=[Phase.generate])  # to shrink would start the ranks anew each time
    def claim(case: Case) -> None:
        results = ranks.run(layout, reduce_plain, case)
        gradients = assemble(parts for parts, _, _ in results)
        moved = assemble(parts for _, parts, _ in results)
        before = Used(case["shapes"]).parts
        for i, (shape, dtype) in enumerate(case["shapes"]):
            passes = [*range(case["micro_batches"]), *([LATE] if case["deferred"] else [])]
            made = [factors(case, r, b)[i] for r in range(replicas) for b in passes]
            expected = sum((f for f in made if f is not None), torch.zeros(shape, dtype=dtype))
            assert torch.equal(gradients[f"parts.{i}"], expected), f"gradient {i} of {shape}"
            for rank, (*_, held) in enumerate(results):
                assert torch.equal(held[i], before[i] + 1), f"parameter {i} of {shape} in the model of rank {rank}"
            assert torch.equal(moved[f"parts.{i}"], before[i] + 1)

    claim()


@given(st.integers(1, 40), st.integers(1, 9))
def test_rows_of_a_rank_are_those_of_torch_chunk(rows: int, size: int) -> None:
    chunks = list(torch.arange(rows).chunk(size))
    chunks += [torch.arange(0)] * (size - len(chunks))
    for rank, chunk in enumerate(chunks):
        assert list(rows_of_rank(rows, Axis("replicas", size, rank))) == chunk.tolist()


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans())), st.integers(1, 400))
def test_buckets_hold_every_parameter_once_in_backward_order(shapes: list[tuple[int, bool]], capacity: int) -> None:
    parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64 if d else torch.float32)) for n, d in shapes]
    place = {id(parameter): i for i, parameter in enumerate(reversed(parameters))}
    buckets = [[place[id(p)] for p in bucket] for bucket in plan_buckets(parameters, capacity)]
    assert sorted(itertools.chain(*buckets)) == list(range(len(parameters)))
    assert all(bucket == sorted(bucket) for bucket in buckets)
    assert [bucket[-1] for bucket in buckets] == sorted(bucket[-1] for bucket in buckets)
    for bucket in plan_buckets(parameters, capacity):
        assert len({p.dtype for p in bucket}) == 1
        assert len(bucket) == 1 or sum(p.nbytes for p in bucket) <= capacity


def widened(groups: ProcessGroups, kind: str) -> list[torch.dtype]:
    """The gradients' dtypes of a bfloat16 model whose products add to float32."""
    precision = Precision(torch.bfloat16, torch.bfloat16, accumulate_in_product=True)
    model, strategy = build(groups, Plan(kind, precision=precision))
    for _ in range(2):
        strategy.begin(1)
        backward(model, batches(groups, 1, 0)[0])
        strategy.complete()
    return [sharded.parameter.grad.dtype for sharded in strategy.parameters]


@pytest.mark.parametrize("kind", ["replicate", "zero1"])
def test_gradients_wider_than_their_parameters_stay_so(ranks: RankPool, kind: str) -> None:
    for dtypes in ranks.run(Layout(data=2), widened, kind):
        assert set(dtypes) == {torch.float32}
