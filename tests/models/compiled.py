"""A training run of a few steps, eager and compiled, on the ranks of a layout; and what the compiler did meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.models import (
    Argonne1Config,
    ArgonneConfig,
    Batch,
    CrossEntropyLoss,
    Execution,
    ModelConfig,
    build_model,
    build_replicas,
    decoder,
)
from argonne.models.families import decoder_family
from argonne.models.recompute import Recompute
from argonne.parallel import Draws, Layout, PipelinePlan, Precision, ProcessGroups
from argonne.parallel.communication.regions import reduce_from_region
from argonne.parallel.errors import CollectiveMismatch
from argonne.training.optimizer import build_optimizer
from argonne.training.run.compilation import prepare_blocks
from argonne.training.step import Learner, train_step

SEQUENCE, VOCABULARY, MICRO_BATCH = 16, 53, 2


@dataclass(frozen=True)
class Case:
    """One way to train a small model."""

    layout: Layout = Layout()  # noqa: RUF009 - frozen
    kind: str = "replicate"
    family: str = "llama"
    documents: bool = False
    as_bounds: bool = False
    """Documents are kept apart as on a GPU, without a mask."""
    recompute: Recompute = Recompute.NONE
    precision: torch.dtype = torch.float32
    """Of the arithmetic; parameters are in float32 at least."""
    schedule: str = "1f1b"

    @property
    def config(self) -> ModelConfig:
        if self.family == "argonne1":
            return Argonne1Config(24, 4, 6, VOCABULARY, 40, 16, attention_dropout=0.3, residual_dropout=0.2)
        heads, key_value, width = (9, 3, 25) if self.layout.uneven_shards else (4, 2, 24)
        features = decoder_family(self.family).features(self.family in ("qwen2", "qwen3"))
        return ArgonneConfig(16, 4, heads, key_value, VOCABULARY, width, SEQUENCE, initializer_range=0.3, **features)

    def __str__(self) -> str:
        documents = "documents" * self.documents + " as bounds" * self.as_bounds
        named = (
            self.kind,
            self.family,
            documents,
            f"recompute {self.recompute}" * (self.recompute != Recompute.NONE),
            self.schedule,
        )
        usual = ("replicate", "llama", "", "1f1b")
        dtype = "" if self.precision == torch.float32 else f", {self.precision}"
        return ", ".join([str(self.layout), *(n for n in named if n not in usual)]) + dtype


@dataclass(frozen=True)
class Found:
    """What a rank made of a case, compiled or not."""

    losses: list[float]
    evaluated: float
    weights: list[Tensor]
    problem: str = ""
    graphs: int = 0
    """That were made before the first step, and after the last."""
    graphs_after: int = 0
    breaks: int = 0


def learner_of(groups: ProcessGroups, case: Case, compiled: bool) -> Learner:
    precision = Precision(torch.promote_types(case.precision, torch.float32), case.precision)
    plan = PipelinePlan.of(case.schedule, case.layout.pipeline)  # type: ignore[arg-type]
    execution = Execution(groups, precision, plan=plan, recompute=case.recompute, compile=compiled)
    model, replicas = build_replicas(lambda e: build_model(case.config, e), execution, case.kind)  # type: ignore[arg-type]
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=3)
    return learner


def batch_of(groups: ProcessGroups, case: Case, step: int) -> Batch:
    """Two micro-batches of this replica at that step, in memory as the trainer has them; documents end anywhere."""
    generator = torch.Generator().manual_seed(100 * step + groups.data.rank)
    ids = torch.randint(0, VOCABULARY, (2, MICRO_BATCH, SEQUENCE + 1), generator=generator)
    documents = (ids % (3 + step) == 0).long().cumsum(-1)[..., :-1] if case.documents else None
    draws = Draws(7, step, torch.arange(2 * MICRO_BATCH).view(2, MICRO_BATCH) + 99 * step)
    divisor = 2 * MICRO_BATCH * SEQUENCE * groups.data.size
    return Batch(ids[..., :-1], ids[..., 1:], documents, divisor=divisor, draws=draws)


def train(groups: ProcessGroups, case: Case, steps: int, compiled: bool) -> Found:
    """So many steps, with an evaluation of another number of sequences in their midst."""
    import torch._dynamo
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    learner, loss = learner_of(groups, case, compiled), CrossEntropyLoss()
    problem = prepare_blocks(learner.model, MICRO_BATCH, SEQUENCE, case.documents) if compiled else ""
    graphs, losses, evaluated = counters["stats"]["unique_graphs"], [], 0.0
    for step in range(steps):
        losses.append(train_step(learner, batch_of(groups, case, step), loss, 1e-2, gradient_clip=1.0).loss)
        if step == 1:
            one = batch_of(groups, case, 0).micro_batch(0)
            documents = None if one.documents is None else one.documents[:1]
            evaluated = float(learner.model.evaluate(Batch(one.ids[:1], one.targets[:1], documents), loss))
    weights = [sharded.parameter.detach().clone() for sharded in learner.parameters]
    breaks = sum(counters["graph_break"].values())
    return Found(losses, evaluated, weights, problem, graphs, counters["stats"]["unique_graphs"], breaks)


def eager_and_compiled(groups: ProcessGroups, case: Case, steps: int, interpreted: bool) -> tuple[Found, Found]:
    """The same steps in both ways; ``interpreted``: by the compiler's graphs, without its code, which takes seconds."""
    with ExitStack() as stack:
        stack.enter_context(as_graphs() if interpreted else nullcontext())
        stack.enter_context(varying_lengths() if case.as_bounds else nullcontext())
        return train(groups, case, steps, False), train(groups, case, steps, True)


def refused(groups: ProcessGroups, case: Case) -> str:
    """What is said where block 2 sums one thing twice on the first rank, which is done once, and two on the others."""
    with as_graphs():
        model = learner_of(groups, case, compiled=True).model
        mlp, axis = model.blocks[2].mlp, groups.tensor
        plain, is_first = mlp.forward, groups.is_first

        def forward(x: Tensor) -> Tensor:
            y: Tensor = plain(x)
            other = y if is_first else 2 * y
            return reduce_from_region(y, axis) + reduce_from_region(other, axis)

        mlp.forward = forward
        with pytest.raises(CollectiveMismatch) as refusal:
            prepare_blocks(model, MICRO_BATCH, SEQUENCE, case.documents)
    return str(refusal.value)


def without_a_compiler(groups: ProcessGroups, case: Case, rank: int) -> tuple[Found, Found]:
    """The same steps eagerly, and compiled where that fails on one rank."""
    import torch._inductor.compile_fx

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler is here\nas all of these lines tell")

    with as_graphs():
        eager = train(groups, case, 2, False)
        if groups.world.rank != rank:
            return eager, train(groups, case, 2, True)
        with mock.patch.object(torch._inductor.compile_fx, "compile_fx_inner", fail):
            return eager, train(groups, case, 2, True)


def attend(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, _: Tensor, *__: int, **___: Any) -> Tensor:
    """What stands in for flash attention of documents: ``[positions, heads, dim]``, and where they end."""
    document = torch.searchsorted(ends, torch.arange(len(query)), right=True)
    seen = (document[:, None] == document[None]).tril()
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, seen, enable_gqa=True)[0].transpose(0, 1)


@contextmanager
def varying_lengths() -> Iterator[None]:
    """Documents are told as a GPU is told of them: where they begin and end, of as many as there are."""
    from torch.nn.attention import varlen

    with (
        mock.patch.object(decoder, "can_vary_length", return_value=True),
        mock.patch.object(varlen, "varlen_attn", attend),
    ):
        yield


@contextmanager
def as_graphs() -> Iterator[None]:
    """Have the compiler stop where it would write code, and its graphs run as they are."""
    import torch._inductor.compile_fx
    from functorch.compile import make_boxed_func

    def as_it_is(graph: Any, *_: Any, **__: Any) -> Any:
        return make_boxed_func(graph.forward)

    with mock.patch.object(torch._inductor.compile_fx, "compile_fx_inner", as_it_is):
        yield
