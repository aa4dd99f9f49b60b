"""FSDP keeps its promise of memory in every micro-batch, and hybrid sharding trains like one process."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import DTensor

from argonne.models import ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import ArgonneError, Layout, ProcessGroups, data_parallel, initialise, record
from argonne.parallel.data_parallel.kinds import check_shard
from argonne.parallel.pipeline_parallel.plan import PipelinePlan
from tests.parallel.replicas import (
    CONFIG,
    DOUBLE,
    SHARED_HEAD,
    TIED,
    Plan,
    assert_equals_one_process,
    backward,
    batches,
    build,
)
from tests.pool import RankPool

FOUR = Layout(data=4)


def gradients_alive(groups: ProcessGroups, plan: Plan) -> list[tuple[int, int]]:
    """After each micro-batch: elements of gradients that FSDP holds whole, and elements of this rank's rows."""
    model, strategy = build(groups, plan)
    strategy.begin(plan.accumulation)
    found = []
    for batch in batches(groups, plan.accumulation, 0):
        backward(model, batch)
        found.append((whole_gradients(model), sharded_gradients(model)))
    strategy.complete()
    return found


def shared_out(model: ArgonneModel) -> Iterator[Any]:
    """What FSDP keeps of each parameter."""
    for module in {*model.modules(), *model.stages.values()}:
        state: Any = module._get_fsdp_state() if hasattr(module, "_get_fsdp_state") else None
        for group in getattr(state, "_fsdp_param_groups", [getattr(state, "_fsdp_param_group", None)]):
            yield from group.fsdp_params if group else []


def whole_gradients(model: ArgonneModel) -> int:
    """Elements of every gradient that FSDP keeps of a whole parameter, added up."""
    whole = 0
    for held in shared_out(model):
        gradient = getattr(held, "_unsharded_param", held.sharded_param).grad
        if not isinstance(gradient, DTensor) and gradient is not None:
            whole += gradient.numel()
        if held.unsharded_accumulated_grad is not None:
            whole += held.unsharded_accumulated_grad.numel()
    return whole


def sharded_gradients(model: ArgonneModel) -> int:
    """Elements of this rank's rows of all gradients."""
    gradients = [held.sharded_param.grad for held in shared_out(model)]
    return sum(gradient.to_local().numel() for gradient in gradients if gradient is not None)


@pytest.mark.parametrize(
    "plan",
    [
        Plan("fsdp", accumulation=3, recompute=Recompute.SELECTIVE),
        Plan("fsdp", accumulation=3, shard=2, recompute=Recompute(2)),
    ],
)
def test_no_whole_gradient_is_alive_after_any_micro_batch(ranks: RankPool, plan: Plan) -> None:
    size = plan.shard or 4
    shapes = [p.shape for p in ArgonneModel(CONFIG, Execution(ProcessGroups.single(), DOUBLE)).parameters()]
    for rank, found in enumerate(ranks.run(FOUR, gradients_alive, plan)):
        place = rank % size
        rows = [max(0, min(-(-s[0] // size), s[0] - place * -(-s[0] // size))) for s in shapes]
        own = sum(r * shape.numel() // shape[0] for r, shape in zip(rows, shapes, strict=True))
        assert found == [(0, own)] * 3, f"rank {rank}"


def pipelined_gradients_alive(groups: ProcessGroups, schedule: str) -> list[int]:
    """Elements of whole gradients at the end of each backward of each stage of a pipeline."""
    plan = PipelinePlan.of(schedule, groups.pipeline.size)  # type: ignore[arg-type]
    model, strategy = build_replicas(
        partial(ArgonneModel, CONFIG_OF_FOUR), Execution(groups, DOUBLE, plan=plan), "fsdp"
    )
    initialise(strategy.parameters, seed=3)
    strategy.publish()
    found: list[int] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: found.append(whole_gradients(model)))
    ids = torch.randint(0, 29, (4, 2, 7), generator=torch.Generator().manual_seed(0))
    strategy.begin(4)
    model.forward_backward(Batch(ids[..., :-1], ids[..., 1:], divisor=48.0), CrossEntropyLoss())
    strategy.complete()
    return found


CONFIG_OF_FOUR = type(CONFIG)(7, 4, 4, 2, 29, 10, 4, 16)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "gpipe"])
def test_a_pipeline_reduces_in_every_micro_batch_too(ranks: RankPool, schedule: str) -> None:
    block = max(p.numel() for p in ArgonneModel(CONFIG_OF_FOUR, Execution(ProcessGroups.single(), DOUBLE)).parameters())
    for found in ranks.run(Layout(pipeline=2, data=2), pipelined_gradients_alive, schedule):
        # A hook is called when rows are reduced: of what comes later in the same backward there may be a parameter.
        assert len(found) % 4 == 0
        assert found, "no gradient was made"
        assert max(found) <= 2 * block


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_groups_of_two_train_like_one_process(ranks: RankPool, config: Any, accumulation: int) -> None:
    assert_equals_one_process(ranks, FOUR, Plan("fsdp", config, accumulation, shard=2))


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True], ids=["", "sequence"])
def test_groups_of_tensor_parallel_ranks_train_like_one_process(ranks: RankPool, sequence_parallel: bool) -> None:
    """Some gradients are partial over the holders: one group alone may add them."""
    layout = Layout(data=4, tensor=2, sequence_parallel=sequence_parallel)
    assert_equals_one_process(ranks, layout, Plan("fsdp", SHARED_HEAD, 3, shard=2))


def sent_across(groups: ProcessGroups, plan: Plan) -> tuple[list[int], list[int], int]:
    """Bytes summed across groups in each of two steps, those of this rank's gradients, and of all-reduces before."""
    model, strategy = build(groups, plan)
    sent, own, early = [], [], 0
    for step in range(2):
        strategy.begin(plan.accumulation)
        with record(model) as log:
            for number, batch in enumerate(batches(groups, plan.accumulation, step)):
                if number == plan.accumulation - 1:
                    early += len(log.select(axis="across"))
                backward(model, batch)
            strategy.complete()
        sent.append(sum(c.bytes for c in log.select(op="all_reduce", axis="across")))
        own.append(sum(s.parameter.grad.nbytes for s in strategy.parameters))
    return sent, own, early


@pytest.mark.parametrize("accumulation", [1, 3])
def test_the_sum_over_groups_waits_for_the_last_micro_batch(ranks: RankPool, accumulation: int) -> None:
    for sent, own, early in ranks.run(FOUR, sent_across, Plan("fsdp", accumulation=accumulation, shard=2)):
        assert early == 0
        assert sent == own


class Halves(torch.nn.Module):
    """Two parts, of which a micro-batch may use one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(torch.nn.Linear(3, 5, bias=False, dtype=torch.float64) for _ in range(2))
        for number, part in enumerate(self.parts):
            torch.nn.init.constant_(part.weight, number + 1.0)

    def forward(self, x: torch.Tensor, used: list[int]) -> torch.Tensor:
        return sum(self.parts[number](x).square().sum() for number in used)  # type: ignore[return-value]


def idle_at_last(groups: ProcessGroups, passes: list[list[int]], shard: int | None) -> list[list[list[float]]]:
    """Whole gradients after passes that use some of the parts each."""
    model = Halves()
    single = groups.replicas.size == 1
    strategy = data_parallel(model, groups, "fsdp", shard=None if single else shard, blocks=model.parts)
    strategy.begin(len(passes))
    for number, used in enumerate(passes):
        for replica in range(4) if single else [groups.replicas.rank]:
            model(torch.arange(3.0, dtype=torch.float64) + replica + 10 * number, used).backward()
    strategy.complete()
    gradients: list[list[list[float]]] = []
    for sharded, parameter in zip(strategy.parameters, model.parameters(), strict=True):
        held = sharded.parameter.grad
        if isinstance(parameter, DTensor):
            assert held is not None
            held = DTensor.from_local(
                held, parameter.device_mesh, parameter.placements, shape=parameter.shape, stride=parameter.stride()
            ).full_tensor()
        gradients.append(torch.zeros_like(parameter).tolist() if held is None else held.tolist())
    return gradients


@given(st.lists(st.sampled_from([[0], [1], [0, 1]]), min_size=1, max_size=3))
@settings(max_examples=6)
def test_a_part_that_the_last_micro_batch_does_not_use_is_summed_too(ranks: RankPool, passes: list[list[int]]) -> None:
    expected = idle_at_last(ProcessGroups.single(), passes, 2)
    for found in ranks.run(FOUR, idle_at_last, passes, 2):
        assert found == expected


def too_many_passes(groups: ProcessGroups) -> str:
    model, strategy = build(groups, Plan("fsdp", shard=2))
    strategy.begin(1)
    for batch in batches(groups, 3, 0):
        backward(model, batch)
    try:
        strategy.complete()
    except RuntimeError as error:
        return str(error)
    return "nothing"


def test_a_backward_after_the_sum_over_groups_is_refused(ranks: RankPool) -> None:
    for found in ranks.run(FOUR, too_many_passes):
        assert found.startswith("a gradient was added to after its bucket was sent")


@pytest.mark.parametrize(
    ("kind", "shard", "replicas", "message"),
    [
        ("fsdp", 3, 4, "fsdp_shard=3 does not cut the 4 data- and context-parallel .* legal sizes: 2, 4"),
        ("fsdp", 1, 6, "fsdp_shard=1 .* legal sizes: 2, 3, 6"),
        ("fsdp", 0, 4, "fsdp_shard=0 "),
        ("fsdp", -2, 4, "fsdp_shard=-2 "),
        ("fsdp", 8, 4, "fsdp_shard=8 .* legal sizes: 2, 4"),
        ("fsdp", 2, 1, "legal sizes: none, as there is one replica"),
        ("replicate", 2, 4, "fsdp_shard=2 has no meaning for kind='replicate'"),
        ("zero1", 2, 4, "fsdp_shard=2 has no meaning for kind='zero1'"),
    ],
)
def test_sizes_of_groups_that_do_not_fit_are_refused(kind: Any, shard: int, replicas: int, message: str) -> None:
    with pytest.raises(ArgonneError, match=message):
        check_shard(kind, shard, replicas)
