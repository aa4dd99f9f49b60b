"""Any kind of data parallelism trains like one process on the whole batch, and holds the bytes that it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from argonne.checkpoint import MOMENTS
from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.models.recompute import Recompute
from argonne.parallel import Layout, Precision, ProcessGroups, regions_of
from argonne.training.optimizer import build_optimizer
from tests.losses import losses
from tests.parallel.operands import values
from tests.parallel.replicas import (
    CONFIG,
    DOUBLE,
    KINDS,
    SHARED_HEAD,
    TIED,
    Plan,
    assert_equals_one_process,
    backward,
    batches,
    build,
    evaluate,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_two_replicas_train_like_one_process(
    ranks: RankPool, kind: str, accumulation: int, config: ArgonneConfig
) -> None:
    recompute = Recompute.FULL if accumulation == 3 else Recompute.SELECTIVE
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
    shapes = [p.shape for p in ArgonneModel(CONFIG, Execution(ProcessGroups.single(), DOUBLE)).parameters()]
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


def step_gradients(groups: ProcessGroups, plan: Plan, forwards_first: bool = False) -> Parts:
    """The gradients of the first step."""
    model, strategy = build(groups, plan)
    strategy.begin(plan.accumulation)
    sums = (losses(model, batch[:, :-1], batch[:, 1:]).sum() for batch in batches(groups, plan.accumulation, 0))
    for loss in list(sums) if forwards_first else sums:
        loss.backward()
    strategy.complete()
    return [
        (region, sharded.parameter.grad[region.local_index])
        for sharded in strategy.parameters
        for region in sharded.spec.regions
    ]


@pytest.mark.parametrize("recompute", [Recompute.SELECTIVE, Recompute.FULL], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_all_forwards_may_come_before_the_backwards(ranks: RankPool, kind: str, recompute: Recompute) -> None:
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
