"""Any kind of data parallelism trains like one process on the whole batch, overlaps, and keeps what it promises."""

from __future__ import annotations

import functools
import itertools
import time
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.checkpoint import MOMENTS
from argonne.models import ArgonneConfig, ArgonneModel
from argonne.parallel import (
    Axis,
    DataParallel,
    Layout,
    Log,
    Precision,
    ProcessGroups,
    clip_gradients,
    data_parallel,
    global_gradient_norm,
    initialise,
    record,
    regions_of,
)
from argonne.parallel.communication.collectives import all_reduce
from argonne.parallel.data_parallel.buckets import plan_buckets
from argonne.parallel.data_parallel.strategy import rows_of_rank
from argonne.parallel.errors import ArgonneError
from argonne.training.optimizer import build_optimizer, set_learning_rate
from tests.parallel.operands import values
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close

KINDS = ["replicate", "zero1", "fsdp"]
DOUBLE = Precision(torch.float64, torch.float64)
# Rows that 2 and 4 replicas cannot share out evenly: 7 of the norms, 10 and 20 of the fused projection.
CONFIG = ArgonneConfig(
    hidden_size=7,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    vocab_size=29,
    intermediate_size=10,
    max_position_embeddings=16,
)
SEQUENCES, LENGTH, STEPS = 12, 6, 3
SMALL = 2000  # bytes: several buckets even of this model


@dataclass(frozen=True)
class Plan:
    """One training run; the batch of a step is the same whatever the layout."""

    kind: str = "replicate"
    config: ArgonneConfig = CONFIG
    accumulation: int = 1
    recompute: bool = False
    precision: Precision = DOUBLE
    bucket_bytes: int = SMALL
    shard: int | None = None


@dataclass
class Outcome:
    """What a rank saw of a run."""

    losses: list[float]
    norms: list[float]
    tensors: list[tuple[str, Parts]]
    """Weights and moments."""
    spoken: Parts
    """A one for each element of the weights that this rank speaks for."""
    logits: list[Tensor]
    """Of an evaluation before, and one after the training."""


def build(groups: ProcessGroups, plan: Plan) -> tuple[ArgonneModel, DataParallel]:
    """A model that begins at values away from any symmetry, set through ``strategy.parameters``."""
    model = ArgonneModel(plan.config, groups, plan.precision)
    model.model.recompute = plan.recompute
    strategy = data_parallel(
        model,
        groups,
        plan.kind,
        precision=plan.precision,
        blocks=model.model.layers,
        forward_methods=("loss", "next_token_logits"),
        shard=plan.shard,
        bucket_bytes=plan.bucket_bytes,
    )
    initialise(strategy.parameters, seed=3)
    for region, part in regions_of(strategy.parameters):
        noise = values(*region.whole_shape, kind="normal", seed=sum(map(ord, region.name)))
        part.mul_(1.5).add_(0.1 * noise[region.whole_index])
    strategy.publish()
    return model, strategy


def batches(groups: ProcessGroups, accumulation: int, step: int) -> list[Tensor]:
    """This replica's micro-batches of a step."""
    ids = torch.randint(0, 29, (SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return list(ids.chunk(groups.replicas.size)[groups.replicas.rank].chunk(accumulation))


def backward(model: ArgonneModel, batch: Tensor) -> Tensor:
    loss = model.loss(batch[:, :-1], batch[:, 1:], reduction="sum") / (SEQUENCES * LENGTH)
    loss.backward()
    return loss.detach()


def evaluate(model: ArgonneModel) -> Tensor:
    return model.next_token_logits(torch.tensor([[1, 5, 2, 8], [3, 3, 7, 0]]))


def train(groups: ProcessGroups, plan: Plan) -> Outcome:
    model, strategy = build(groups, plan)
    optimizer = build_optimizer(strategy.parameters, weight_decay=0.1)
    losses, norms, logits = [], [], [evaluate(model)]
    for step in range(STEPS):
        strategy.begin(plan.accumulation)
        total = torch.zeros((), dtype=torch.float64)
        for batch in batches(groups, plan.accumulation, step):
            total += backward(model, batch)
        strategy.complete()
        norm = global_gradient_norm(strategy.parameters, groups)
        clip_gradients(strategy.parameters, norm, 0.5)
        set_learning_rate(optimizer, 1e-2)
        optimizer.step()
        optimizer.zero_grad()
        strategy.publish()
        losses.append(all_reduce(total, groups.replicas).item())
        norms.append(norm.item())
    logits.append(evaluate(model))
    tensors = [("weight", [(r, part.clone()) for r, part in regions_of(strategy.parameters)])]
    for moment in MOMENTS:
        held = [
            (region, optimizer.state[sharded.parameter][moment][region.local_index])
            for sharded in strategy.parameters
            for region in sharded.spec.regions
        ]
        tensors.append((moment, held))
    spoken = [(r, torch.ones(r.shape)) for s in strategy.parameters for r in s.spec.regions if r.speaks(groups)]
    return Outcome(losses, norms, tensors, spoken, logits)


@functools.cache
def alone(config: ArgonneConfig) -> Outcome:
    """The same run in one process, without accumulation."""
    return train(ProcessGroups.single(), Plan(config=config))


def assert_equals_one_process(ranks: RankPool, layout: Layout, plan: Plan) -> None:
    results = ranks.run(layout, train, plan)
    expected = alone(plan.config)
    for rank, found in enumerate(results):
        assert found.losses == pytest.approx(expected.losses, rel=1e-10), f"losses of rank {rank}"
        assert found.norms == pytest.approx(expected.norms, rel=1e-10), f"gradient norms of rank {rank}"
        assert found.norms[0] > 0.5, "nothing is clipped"
        for logits, of_one in zip(found.logits, expected.logits, strict=True):
            assert_close(logits, of_one, 1e-9, f"logits of rank {rank}")
    for place, (what, parts) in enumerate(expected.tensors):
        of_one = assemble([parts])
        found = assemble(result.tensors[place][1] for result in results)
        assert set(found) == set(of_one)
        largest = max(whole.norm().item() for whole in of_one.values())
        for name, whole in of_one.items():
            assert_close(found[name], whole, 1e-9, f"{what} of {name}", scale=1e-3 * largest)
    counts: dict[str, Tensor] = {}
    for result in results:
        for region, ones in result.spoken:
            count = counts.setdefault(region.name, torch.zeros(region.whole_shape))
            count[region.whole_index] += ones
    for name, count in counts.items():
        assert (count == 1).all(), f"elements of {name} are spoken for {count.unique().tolist()} times"
    assert set(counts) == set(assemble([expected.tensors[0][1]]))


TIED = replace(CONFIG, tie_word_embeddings=True)
SHARED_HEAD = replace(CONFIG, num_key_value_heads=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_two_replicas_train_like_one_process(
    ranks: RankPool, kind: str, accumulation: int, config: ArgonneConfig
) -> None:
    recompute = accumulation == 3
    plan = Plan(kind, config, accumulation, recompute)
    assert_equals_one_process(ranks, Layout(data=2), plan)


@pytest.mark.parametrize("kind", KINDS)
def test_four_replicas_with_uneven_rows_train_like_one_process(ranks: RankPool, kind: str) -> None:
    assert_equals_one_process(ranks, Layout(data=4), Plan(kind, accumulation=3))


@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("config", [CONFIG, SHARED_HEAD, TIED], ids=["", "shared-head", "tied"])
def test_replicas_of_tensor_parallel_ranks_train_like_one_process(
    ranks: RankPool, kind: str, config: ArgonneConfig, sequence_parallel: bool
) -> None:
    layout = Layout(data=2, tensor=2, sequence_parallel=sequence_parallel)
    assert_equals_one_process(ranks, layout, Plan(kind, config, accumulation=3))


@pytest.mark.parametrize("kind", ["replicate", "zero1"])
def test_one_bucket_trains_like_one_process(ranks: RankPool, kind: str) -> None:
    assert_equals_one_process(ranks, Layout(data=2), Plan(kind, bucket_bytes=2**30))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_that_the_products_add_themselves_are_reduced_too(ranks: RankPool, kind: str) -> None:
    precision = replace(DOUBLE, accumulate_in_product=True)
    assert_equals_one_process(ranks, Layout(data=2), Plan(kind, accumulation=3, precision=precision))


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


def change_between_evaluations(groups: ProcessGroups, kind: str) -> list[Tensor]:
    """Logits before and after the values of ``strategy.parameters`` have changed, as when a checkpoint is loaded."""
    model, strategy = build(groups, Plan(kind))
    logits = [evaluate(model)]
    for region, part in regions_of(strategy.parameters):
        part.mul_(values(*region.whole_shape, kind="normal", seed=5)[region.whole_index])
    strategy.publish()
    return [*logits, evaluate(model)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_evaluation_after_publish_sees_the_new_values(ranks: RankPool, kind: str) -> None:
    expected = change_between_evaluations(ProcessGroups.single(), kind)
    assert not torch.allclose(*expected)
    for rank, found in enumerate(ranks.run(Layout(data=2), change_between_evaluations, kind)):
        for when, logits, of_one in zip(("before", "after"), found, expected, strict=True):
            assert_close(logits, of_one, 1e-10, f"logits {when} on rank {rank}")


def state_bytes(groups: ProcessGroups, plan: Plan) -> dict[str, int]:
    """Bytes on this rank at the end of a step, in tensors that are counted once."""
    model, strategy = build(groups, plan)
    optimizer = build_optimizer(strategy.parameters, weight_decay=0.1)
    strategy.begin(plan.accumulation)
    for batch in batches(groups, plan.accumulation, 0):
        backward(model, batch)
    strategy.complete()
    own = {id(s.parameter): s.parameter for s in strategy.parameters}
    in_model = [p.to_local() if hasattr(p, "to_local") else p.data for p in model.parameters()]
    gradients = [p.grad for p in {**own, **{id(p): p for p in model.parameters()}}.values()]
    return {
        "parameters": sum(p.nbytes for p in in_model),
        "gradients": sum(g.nbytes for g in gradients if g is not None),
        "moments": sum(optimizer.state[p][moment].nbytes for p in own.values() for moment in MOMENTS),
        "shared": sum(
            (s.parameter.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()) * s.parameter.nbytes
            for s, p in zip(strategy.parameters, in_model, strict=True)
        ),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_bytes_of_parameters_gradients_and_moments_are_their_closed_forms(
    ranks: RankPool, kind: str, size: int
) -> None:
    shapes = [p.shape for p in ArgonneModel(CONFIG, ProcessGroups.single(), DOUBLE).parameters()]
    whole = sum(8 * shape.numel() for shape in shapes)
    for rank, found in enumerate(ranks.run(Layout(data=size), state_bytes, Plan(kind, accumulation=3))):
        rows = [max(0, min(-(-s[0] // size), s[0] - rank * -(-s[0] // size))) for s in shapes]
        own = sum(8 * r * shape.numel() // shape[0] for r, shape in zip(rows, shapes, strict=True))
        expected = {
            "replicate": {"parameters": whole, "gradients": whole, "moments": 2 * whole, "shared": whole},
            "zero1": {"parameters": whole, "gradients": own, "moments": 2 * own, "shared": own},
            "fsdp": {"parameters": own, "gradients": own, "moments": 2 * own, "shared": own},
        }
        assert found == expected[kind], f"rank {rank}"


class Used(nn.Module):
    """Parameters whose gradients are the values that they are multiplied with."""

    def __init__(self, shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
        super().__init__()
        self.parts = nn.ParameterList(
            values(*shape, kind="integers", seed=i).to(dtype) for i, (shape, dtype) in enumerate(shapes)
        )

    def forward(self, factors: list[Tensor | None]) -> Tensor:
        used = [(p * f).sum().double() for p, f in zip(self.parts, factors, strict=True) if f is not None]
        return torch.stack(used).sum()


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


def step_gradients(groups: ProcessGroups, plan: Plan, forwards_first: bool = False) -> Parts:
    """The gradients of the first step."""
    model, strategy = build(groups, plan)
    strategy.begin(plan.accumulation)
    losses = (model.loss(batch[:, :-1], batch[:, 1:]).sum() for batch in batches(groups, plan.accumulation, 0))
    for loss in list(losses) if forwards_first else losses:
        loss.backward()
    strategy.complete()
    return [
        (region, sharded.parameter.grad[region.local_index])
        for sharded in strategy.parameters
        for region in sharded.spec.regions
    ]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_forwards_may_come_before_the_backwards(ranks: RankPool, kind: str, recompute: bool) -> None:
    expected = assemble([step_gradients(ProcessGroups.single(), Plan())])
    plan = Plan(kind, accumulation=3, recompute=recompute)
    found = assemble(ranks.run(Layout(data=2), step_gradients, plan, True))
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-10, f"gradient of {name}")


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_stay_float32_and_as_exact_as_one_process_makes_them_in_bfloat16(ranks: RankPool, kind: str) -> None:
    plan = Plan(kind, accumulation=3, precision=Precision(torch.float32, torch.bfloat16))
    exact = assemble([step_gradients(ProcessGroups.single(), Plan())])
    of_one = assemble([step_gradients(ProcessGroups.single(), plan)])
    found = assemble(ranks.run(Layout(data=2), step_gradients, plan))
    # FSDP2 rounds the weights of norms too.
    allowed = 2.0 if kind == "fsdp" else 1.05
    for gradients in (of_one, found):
        assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    off, off_of_one = (
        torch.cat([(gradients[name] - exact[name]).flatten() for name in exact]).norm().item()
        for gradients in (found, of_one)
    )
    assert off <= allowed * off_of_one


def refused(groups: ProcessGroups, what: str) -> str:
    """The message of what must not be done."""
    model = Used([((3,), torch.float64)])
    used: list[Tensor | None] = [torch.ones(3, dtype=torch.float64)]
    try:
        if what == "kind":
            data_parallel(model, groups, "ddp")
        elif what == "precision":
            data_parallel(
                model, groups, "fsdp", precision=Precision(compute=torch.bfloat16, accumulate_in_product=True)
            )
        elif what.startswith("scalar"):
            model.parts.append(torch.zeros(()))
            data_parallel(model, groups, what.split()[1])
        else:
            strategy = data_parallel(model, groups, what.split()[1])
            if "unbegun" not in what:
                strategy.begin(2 if "few" in what else 1, deferred="deferred" in what)
            for _ in range(2 if "many" in what else 1):
                model(used).backward()
            if "twice" in what:
                strategy.begin(1)
            strategy.complete()
    except (ArgonneError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("kind", "ArgonneError: data parallel kind='ddp' is not known; legal: replicate, zero1, fsdp"),
        ("precision", "ArgonneError: accumulate_in_product with compute=torch.bfloat16 makes gradients of two dtypes"),
        ("scalar zero1", "ArgonneError: parts.1 of shape [] and strides [] cannot be cut into rows"),
        ("scalar fsdp", "ArgonneError: parts.1 is a scalar"),
        ("many replicate", "LateGradient: a gradient was added to after its bucket was sent"),
        ("many zero1", "LateGradient: a gradient was added to after its bucket was sent"),
        ("deferred fsdp", "ArgonneError: kind='fsdp' cannot wait for deferred gradients; legal: replicate, zero1"),
        ("twice replicate", "RuntimeError: begin() was called twice without complete() between"),
        ("unbegun zero1", "RuntimeError: complete() was called without begin()"),
    ],
)
def test_what_would_go_wrong_silently_is_refused(ranks: RankPool, what: str, message: str) -> None:
    for found in ranks.run(Layout(data=2), refused, what):
        assert found.startswith(message)
