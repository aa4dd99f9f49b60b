"""Traced steps of a small model under any layout, with faults planted on the way; what a rank runs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from argonne.data import Assignment
from argonne.data.assignment import Order
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import PipelinePlan, Precision, ProcessGroups
from argonne.parallel.communication.tree import TreeSum
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from argonne.training.trace import StepTrace
from argonne.training.trace_file import write_trace

Fault = Callable[[Learner, int], None]
LEAVES, SEQUENCES, POSITIONS, LAYERS, VOCABULARY = 4, 2, 16, 4, 203
SHAPE = ArgonneConfig(32, LAYERS, 4, 2, VOCABULARY, max_position_embeddings=POSITIONS, intermediate_size=48)


def trace(groups: ProcessGroups, run: Path, steps: int, options: dict[str, Any], fault: Fault | None = None) -> None:
    """Train and trace ``steps`` steps into the directory ``run``; ``fault(learner, step)`` comes before each.

    The options: ``blocks`` (None: fast mode), ``kind``, ``schedule``, ``precision``, ``recompute``, ``tied``.
    """
    config = ArgonneConfig(**{**vars(SHAPE), "tie_word_embeddings": options.get("tied", True)})
    precision: Precision = PRECISIONS[options.get("precision", "fp32")]
    plan = PipelinePlan.of(options.get("schedule", "1f1b"), groups.pipeline.size)
    blocks, recompute = options.get("blocks", 2), options.get("recompute", Recompute.NONE)
    execution = Execution(groups, precision, plan=plan, recompute=recompute, reproducible=blocks)
    kind = options.get("kind", "replicate")
    model, replicas = build_replicas(partial(ArgonneModel, config), execution, kind)
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, weight_decay=0.1))
    learner.initialise(0)
    order: Order = "strided" if kind == "fsdp" else "contiguous"
    data = groups.data
    assignment = Assignment(SEQUENCES, LEAVES // data.size, data.size, order)
    generator = torch.Generator().manual_seed(1)
    run.mkdir(exist_ok=True)
    for step in range(1, steps + 1):
        ids = torch.randint(VOCABULARY, (LEAVES, SEQUENCES, POSITIONS + 1), generator=generator)
        own = ids[list(assignment.leaves_of(data.rank))]
        batch = Batch(own[..., :-1].contiguous(), own[..., 1:].contiguous(), divisor=ids[..., 1:].numel())
        if fault is not None:
            fault(learner, step)
        hashes = StepTrace(model, assignment.leaves_of(data.rank), LEAVES, (SEQUENCES, POSITIONS))
        with hashes:
            train_step(learner, batch, hashes.loss(CrossEntropyLoss()), 1e-2, 1.0, hashes)
        lines = hashes.lines()
        if groups.is_first:
            write_trace(run, step, LEAVES, lines)


def next_up(values: Tensor) -> Tensor:
    """Each moved by one ulp."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))


def last_rank(learner: Learner) -> bool:
    """Whether this is the one rank of the job that a fault is planted on."""
    world = learner.model.groups.world
    return world.rank == world.size - 1


def weight_fault(name: str, at: int, learner: Learner, step: int) -> None:
    """One element of a parameter of one rank is an ulp off before step ``at``."""
    if step == at and last_rank(learner):
        (found,) = (sharded.parameter for sharded in learner.parameters if sharded.name == name)
        first = found.data.view(-1)[:1]
        first.copy_(next_up(first))


class _Off(torch.autograd.Function):
    """The identity, with one element of the gradient an ulp off."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wrong = gradient.clone()
        wrong[3, 5] = next_up(gradient[3, 5])
        return wrong


def input_gradient_fault(layer: int, at: int, micro_batch: int, learner: Learner, step: int) -> None:
    """In step ``at`` one rank hands on another gradient of the input of a block, of one of its micro-batches."""
    if step != at or not last_rank(learner):
        return
    seen = iter(range(LEAVES))

    def plant(block: torch.nn.Module, arguments: tuple[Any, ...]) -> Any:
        x, *rest = arguments
        return (_Off.apply(x), *rest) if next(seen, None) == micro_batch else None

    model = learner.model
    assert isinstance(model, ArgonneModel)
    model.model.block(layer).register_forward_pre_hook(plant)


class _Swapped(TreeSum):
    """Takes the second and the third leaf in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.leaves: list[Tensor] = []

    def add(self, leaf: Tensor) -> None:
        self.leaves.append(leaf)
        if len(self.leaves) == LEAVES:
            for number in (0, 2, 1, 3):
                super().add(self.leaves[number])
            self.leaves.clear()


def reduction_fault(name: str, at: int, learner: Learner, step: int) -> None:
    """In step ``at`` one rank adds the micro-batches' gradients of one parameter in another order."""
    (found,) = (sharded.parameter for sharded in learner.parameters if sharded.name == name)
    leaves = learner.replicas.leaves
    assert leaves is not None
    if last_rank(learner):
        leaves._sums[id(found)] = _Swapped() if step == at else TreeSum()


def update_fault(name: str, at: int, learner: Learner, step: int) -> None:
    """After the update of step ``at`` one element of a parameter of one rank is an ulp off."""
    if step == at:
        learner.optimizer.register_step_post_hook(lambda *_: weight_fault(name, at, learner, at))
