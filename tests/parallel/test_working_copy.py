"""Products see the weights as they are, cast once a step; and with the copies every bit is what it is without them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from argonne.models import ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import ColumnParallelLinear, Layout, ProcessGroups, data_parallel
from argonne.parallel.pipeline_parallel.plan import PipelinePlan
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from tests.models.closed_form import tiny
from tests.parallel.operands import values
from tests.pool import RankPool

BF16 = PRECISIONS["bf16"]


def layer() -> tuple[ColumnParallelLinear, Any]:
    groups = ProcessGroups.single()
    module = ColumnParallelLinear(6, 5, groups, precision=BF16)
    module.weight.data.copy_(values(5, 6, kind="normal", seed=1))
    return module, data_parallel(module, groups, precision=BF16)


def write(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.3)


def replace_memory(weight: nn.Parameter) -> None:
    weight.data = 1.3 * weight.data


def assert_sees(module: ColumnParallelLinear) -> None:
    x = values(3, 6, kind="normal", seed=2).bfloat16()
    assert torch.equal(module(x), x @ module.weight.detach().bfloat16().t())
    with torch.no_grad():
        assert torch.equal(module(x), x @ module.weight.bfloat16().t())


@pytest.mark.parametrize("change", [write, replace_memory])
def test_a_product_sees_what_is_written_to_a_weight_before_anyone_publishes_it(change: Any) -> None:
    module, replicas = layer()
    assert_sees(module)
    assert replicas.facts(1) == []
    for _ in range(2):
        replicas.publish()
        assert module.working.bytes == 2 * module.weight.numel()
        assert_sees(module)
        change(module.weight)
        assert_sees(module)


def test_publishing_is_enough_where_autograd_does_not_see_the_writing() -> None:
    module, replicas = layer()
    replicas.publish()
    module.weight.data.mul_(1.3)
    replicas.publish()
    assert_sees(module)


def test_a_weight_that_changes_between_forward_and_backward_is_no_silent_fault() -> None:
    module, replicas = layer()
    replicas.publish()
    x = values(3, 6, kind="normal", seed=2).bfloat16().requires_grad_()
    loss = module(x).sum()
    write(module.weight)
    module(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_one_dtype_needs_no_copy(name: str) -> None:
    groups = ProcessGroups.single()
    module = ColumnParallelLinear(6, 5, groups, precision=PRECISIONS[name])
    data_parallel(module, groups, precision=PRECISIONS[name]).publish()
    assert module.working.bytes == 0


class Casts(TorchDispatchMode):
    """Counts casts to half width by the shape of what is cast."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and result.dtype == torch.bfloat16:
            self.found[tuple(result.shape)] += 1
        return result


def learner(groups: ProcessGroups, kind: str = "replicate", schedule: str = "1f1b", **options: Any) -> Learner:
    blocks, tied = options.get("blocks"), options.get("tied", True)
    plan = PipelinePlan.of(schedule, groups.pipeline.size)  # type: ignore[arg-type]
    execution = Execution(groups, BF16, plan=plan, recompute=Recompute.FULL, reproducible=blocks)
    config = tiny(tie_word_embeddings=tied, num_hidden_layers=2 * groups.pipeline.size)
    model, replicas = build_replicas(partial(ArgonneModel, config), execution, kind)  # type: ignore[arg-type]
    optimizer = build_optimizer(replicas.parameters, 0.1, pinned=blocks is not None)
    return Learner(model=model, replicas=replicas, optimizer=optimizer)


def steps(own: Learner, count: int = 2) -> tuple[list[Any], list[Tensor]]:
    own.initialise(seed=4)
    ids = torch.randint(30, (4, 2, 8), generator=torch.Generator().manual_seed(own.model.groups.data.rank))
    batch = Batch(ids[..., :-1], ids[..., 1:], divisor=56.0 * own.model.groups.data.size)
    told = [train_step(own, batch, CrossEntropyLoss(), 1e-2, 1.0) for _ in range(count)]
    told.append(float(own.model.evaluate(batch.micro_batch(0), CrossEntropyLoss())))
    return told, [s.parameter.detach().clone() for s in own.parameters]


def test_a_step_casts_each_matrix_once_however_many_micro_batches_and_recomputations() -> None:
    own = learner(ProcessGroups.single())
    matrices = {tuple(m.weight.shape) for m in own.replicas.copies if m.working.at_once}
    assert len(own.replicas.copies) == 9  # four of each block, and the embedding, which is the head
    steps(own, count=1)
    with Casts() as casts:
        steps(own, count=1)  # publishes once as it begins, and once after its step
    weights = Counter(tuple(m.weight.shape) for m in own.replicas.copies)
    assert {shape: casts.found[shape] for shape in matrices} == {shape: 2 * weights[shape] for shape in matrices}
    assert own.replicas.facts(1)[0].endswith("GiB of weights in the compute dtype")


def with_and_without(groups: ProcessGroups, kind: str, schedule: str, options: dict[str, Any]) -> tuple[bool, int]:
    """Whether nothing differs in any bit, and how many modules have computed with copies."""
    found, used = [], 0
    for copies in (True, False):
        own = learner(groups, kind, schedule, **options)
        own.replicas.copies = own.replicas.copies if copies else []
        found.append(steps(own))
        used += sum(module.working.bytes > 0 for module in own.replicas.copies)
    (told, weights), (expected, others) = found
    return told == expected and all(map(torch.equal, weights, others)), used


CASES = [
    (Layout(tensor=2, sequence_parallel=True), "replicate", "1f1b", {"tied": False}),
    (Layout(pipeline=2), "replicate", "zb", {}),
    (Layout(data=2), "zero1", "1f1b", {"blocks": 2}),
    (Layout(data=2), "fsdp", "1f1b", {}),
]


@pytest.mark.parametrize(("layout", "kind", "schedule", "options"), CASES, ids=lambda x: str(x))
def test_copies_change_no_bit_of_losses_norms_and_weights(
    ranks: RankPool, layout: Layout, kind: str, schedule: str, options: dict[str, Any]
) -> None:
    for is_equal, copies in ranks.run(layout, with_and_without, kind, schedule, options):
        assert is_equal
        assert bool(copies) == (kind != "fsdp"), "FSDP gathers in the compute dtype, and keeps no copy besides"
