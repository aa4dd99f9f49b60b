"""Learning from a teacher at every kind of layout is learning from it in one process, and that from whole logits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from argonne.inference.opening import model_at
from argonne.models import ArgonneConfig, ArgonneModel, Batch, DistillationLoss, Execution, build_replicas
from argonne.models import from_huggingface as shape_at
from argonne.parallel import Layout, PipelinePlan, Precision, ProcessGroups
from argonne.parallel.communication.reduction import sum_over
from argonne.training.config import ParallelFlags, RunFlags
from argonne.training.distill_config import DistillConfig, DistillFlags
from argonne.training.optimizer import build_optimizer
from argonne.training.run.teacher import DistillationOfRun
from argonne.training.step import Learner, train_step
from tests.pool import RankPool
from tests.teachers import write_teacher

DOUBLE, SINGLE = (Precision(dtype, dtype) for dtype in (torch.float64, torch.float32))
VOCABULARY, SEQUENCE, GLOBAL_BATCH = 29, 16, 8
STUDENT = ArgonneConfig(16, 4, 4, 2, VOCABULARY, 24, SEQUENCE, initializer_range=0.3, tie_word_embeddings=False)
ALPHA, TEMPERATURE = 0.3, 2.0


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("teachers")
    write_teacher(home / "tied", 37, family="qwen2", attention_bias=True)
    write_teacher(home / "untied", 31, tie_word_embeddings=False)
    return home


def whole_batch() -> Batch:
    draw = torch.Generator().manual_seed(8)
    tokens = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=draw)
    documents = (torch.rand((GLOBAL_BATCH, SEQUENCE), generator=draw) < 0.2).long().cumsum(1)
    return Batch(tokens[:, :-1], tokens[:, 1:], documents, divisor=GLOBAL_BATCH * SEQUENCE)


def student_of(groups: ProcessGroups, schedule: Any, kind: Any, precision: Precision, blocks: int | None) -> Learner:
    execution = Execution(groups, precision, plan=PipelinePlan.of(schedule, groups.pipeline.size), reproducible=blocks)
    model, replicas = build_replicas(partial(ArgonneModel, STUDENT), execution, kind)
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=3)
    return learner


def learn(
    groups: ProcessGroups, teacher: Path, sharded: bool, schedule: Any, kind: Any, blocks: int | None = None
) -> tuple[list[float], list[float]]:
    """Loss and gradient norm of three steps; and the sums of CE and KL of the first."""
    precision = DOUBLE if blocks is None else SINGLE
    learner, whole = student_of(groups, schedule, kind, precision, blocks), whole_batch()
    assert whole.documents is not None
    everything, data = (whole.ids, whole.targets, whole.documents), groups.data
    ids, targets, apart = (x.chunk(data.size)[data.rank].unflatten(0, (-1, 2)) for x in everything)
    batch = replace(whole, ids=ids, targets=targets, documents=apart)
    config = DistillConfig(
        distill=DistillFlags(teacher, ALPHA, TEMPERATURE, teacher_tensor_parallel=sharded),
        parallel=ParallelFlags(pipeline_schedule=schedule, pipeline_parallel=groups.pipeline.size),
        run=RunFlags(),
    )
    of_run = DistillationOfRun(config.distillation, teacher, shape_at(teacher), "", config, tokens=VOCABULARY)
    parts: list[torch.Tensor] = []
    loss = of_run.build(learner.model, precision, parts)
    assert isinstance(loss, DistillationLoss)
    plan = config.parallel.plan(groups.layout)
    assert (loss.teacher is None) == (groups.pipeline.rank != plan.rank_of(plan.stages - 1))
    found, of_first = [], torch.zeros(2, dtype=torch.float64)
    for _ in range(3):
        result = train_step(learner, batch, loss, 1e-2, gradient_clip=1.0)
        assert result.norm is not None
        found += [result.loss, result.norm]
        if len(found) == 2:
            of_first = sum((part.double() for part in parts), of_first)
    for axis in (groups.pipeline, groups.replicas):
        of_first = sum_over(of_first, axis)
    if loss.teacher is not None:
        assert all(p.grad is None and not p.requires_grad for p in loss.teacher.model.parameters())
    return found, of_first.tolist()


def by_hand(teacher: Path) -> tuple[list[float], list[float]]:
    """Loss and norm of the first step, and its CE and KL, from logits that exist whole."""
    groups, whole = ProcessGroups.single(), whole_batch()
    student, expert = student_of(groups, "1f1b", "replicate", DOUBLE, None).model, model_at(teacher, groups, DOUBLE)
    assert isinstance(student, ArgonneModel)
    assert isinstance(expert, ArgonneModel)
    ours, theirs = (
        model.logits(whole.ids, whole.documents)[..., :VOCABULARY].flatten(0, 1) for model in (student, expert)
    )
    entropy = torch.nn.functional.cross_entropy(ours, whole.targets.flatten(), reduction="sum")
    student_log, expert_log = ((z / TEMPERATURE).log_softmax(-1) for z in (ours, theirs.detach()))
    divergence = (expert_log.exp() * (expert_log - student_log)).sum()
    loss = (ALPHA * entropy + (1 - ALPHA) * TEMPERATURE**2 * divergence) / whole.divisor
    loss.backward()
    norm = torch.stack([p.grad.square().sum() for p in student.parameters() if p.grad is not None]).sum().sqrt()
    return [loss.item(), norm.item()], [entropy.item(), divergence.item()]


CASES = [
    (Layout(tensor=2), "1f1b", "replicate", "tied", False),
    (Layout(tensor=2), "1f1b", "replicate", "untied", True),
    (Layout(tensor=2, sequence_parallel=True), "1f1b", "replicate", "tied", True),
    (Layout(pipeline=2), "zb", "replicate", "tied", False),
    (Layout(pipeline=2, tensor=2, sequence_parallel=True), "1f1b", "replicate", "untied", True),
    (Layout(pipeline=2, data=2), "gpipe", "fsdp", "untied", False),
    (Layout(context=2), "1f1b", "zero1", "tied", False),
]


@pytest.mark.parametrize(("layout", "schedule", "kind", "name", "sharded"), CASES, ids=lambda value: str(value))
def test_every_layout_learns_the_same(
    ranks: RankPool, teachers: Path, layout: Layout, schedule: str, kind: str, name: str, sharded: bool
) -> None:
    steps, parts = learn(ProcessGroups.single(), teachers / name, False, "1f1b", "replicate")
    first, of_first = by_hand(teachers / name)
    assert steps[:2] == pytest.approx(first, rel=1e-10)
    assert parts == pytest.approx(of_first, rel=1e-10)
    for found, apart in ranks.run(layout, learn, teachers / name, sharded, schedule, kind):
        assert found == pytest.approx(steps, rel=1e-9)
        assert apart == pytest.approx(parts, rel=1e-9)


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(pipeline=2), Layout(data=2, tensor=2)], ids=str)
def test_a_reproducible_run_learns_the_same_bits(ranks: RankPool, teachers: Path, layout: Layout) -> None:
    given = teachers / "tied", False, "1f1b", "replicate", 2
    expected, _ = learn(ProcessGroups.single(), *given)
    for found, _ in ranks.run(layout, learn, *given):
        assert found == expected
