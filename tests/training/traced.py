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
from argonne.parallel import PipelinePlan, Precision, ProcessGroups
from argonne.training.optimizer import build_optimizer
from argonne.training.run.setup import PRECISIONS
from argonne.training.step import Learner, train_step
from argonne.training.trace import StepTrace
from argonne.training.trace_file import write_trace

LEAVES, SEQUENCES, POSITIONS, LAYERS, VOCABULARY = 4, 2, 16, 4, 203
SHAPE = ArgonneConfig(32, LAYERS, 4, 2, VOCABULARY, max_position_embeddings=POSITIONS, intermediate_size=48)


def trace(groups: ProcessGroups, run: Path, steps: int, options: dict[str, Any], fault: Any = None) -> None:
    """Train and trace ``steps`` steps into the directory ``run``; ``fault(learner, step)`` comes before each.

    The options: ``blocks`` (None: fast mode), ``kind``, ``schedule``, ``precision``, ``recompute``, ``tied``.
    """
    config = ArgonneConfig(**{**vars(SHAPE), "tie_word_embeddings": options.get("tied", True)})
    precision: Precision = PRECISIONS[options.get("precision", "fp32")]
    plan = PipelinePlan.of(options.get("schedule", "1f1b"), groups.pipeline.size)
    blocks, recompute = options.get("blocks", 2), options.get("recompute", False)
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


Fault = Callable[[Learner, int], None]


def next_up(values: Tensor) -> Tensor:
    """Each moved by one ulp."""
    return torch.nextafter(values, torch.full_like(values, torch.inf))
