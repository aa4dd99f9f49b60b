"""Every product of the axes on up to eight ranks, and the short training run that all of them must agree on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import torch

from argonne.checkpoint import load_pieces, save_checkpoint, weight_pieces
from argonne.checkpoint.format import step_directory
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.families import decoder_family
from argonne.parallel import (
    AXES,
    Layout,
    Precision,
    ProcessGroups,
    check_declarations,
    check_gradients,
    regions_of,
)
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan
from argonne.training.optimizer import Optimizer, build_muon, build_optimizer, moments_of
from argonne.training.step import Learner, train_step
from tests.whole import Parts

STEPS, GLOBAL_BATCH, SEQUENCE, VOCABULARY = 20, 8, 16, 53
DOUBLE = Precision(torch.float64, torch.float64)
KINDS = ("replicate", "zero1", "fsdp")


@dataclass(frozen=True)
class Case:
    """One way to train the model."""

    layout: Layout
    schedule: str = "1f1b"
    kind: str = "replicate"
    tied: bool = True
    accumulation: int = 1
    blocks: int = 0
    """0: one more than there are stages, which no number of stages but 1 divides."""
    shard: int | None = None
    """Replicas of a group of ``fsdp``; None: all of them are one."""
    documents: bool = False
    """Sequences are packed of documents that do not see each other."""
    family: str = "llama"
    """qwen3: with norms of heads, and biases in all of attention."""
    optimizer: str = "adamw"

    @property
    def plan(self) -> PipelinePlan:
        return PipelinePlan.of(self.schedule, self.layout.pipeline)  # type: ignore[arg-type]

    @property
    def layers(self) -> int:
        return self.blocks or self.plan.stages + 1

    @property
    def config(self) -> ArgonneConfig:
        # Of 9 heads, 3 for keys and values, and 25 features, no number of ranks has equal shares.
        heads, key_value, features = (9, 3, 25) if self.layout.uneven_shards else (8, 2, 24)
        return ArgonneConfig(
            16,
            self.layers,
            heads,
            key_value,
            VOCABULARY,
            features,
            SEQUENCE,
            initializer_range=0.3,
            tie_word_embeddings=self.tied,
            **decoder_family(self.family).features(self.family == "qwen3"),
        )

    def __str__(self) -> str:
        schedule = f", {self.schedule}" if self.layout.pipeline > 1 else ""
        kind = f", {self.kind}" if self.layout.data * self.layout.context > 1 else ""
        kind += "" if self.shard is None else f" in groups of {self.shard}"
        head = "tied" if self.tied else "untied"
        packed = ", documents" if self.documents else ""
        uneven = ", uneven" if self.layout.uneven_shards else ""
        family = "" if self.family == "llama" else f", {self.family}"
        muon = "" if self.optimizer == "adamw" else f", {self.optimizer}"
        return f"{self.layout}{uneven}{schedule}{kind}, {head}, accumulation {self.accumulation}{packed}{family}{muon}"


def every_case() -> Iterator[Case]:
    """All legal ones of 2, 4 and 8 ranks; tied and untied heads, and both accumulations, take turns.

    Then, where there are tensor-parallel ranks, the same sizes once more with shards of unequal width.
    """
    even = list(_even_cases())
    yield from even
    of_sizes: dict[tuple[int, ...], list[Case]] = {}
    for case in even:
        if case.layout.tensor > 1:
            of_sizes.setdefault(tuple(getattr(case.layout, axis) for axis in AXES), []).append(case)
    for turn, cases in enumerate(of_sizes.values()):
        case = cases[turn % len(cases)]
        yield replace(case, layout=replace(case.layout, uneven_shards=True))


def _even_cases() -> Iterator[Case]:
    turn = 0
    for sizes in product((1, 2, 4, 8), repeat=len(AXES)):
        named = dict(zip(AXES, sizes, strict=True))
        ranks = Layout(**named).world_size
        if ranks == 1 or ranks > 8:
            continue
        schedules = SCHEDULES if named["pipeline"] > 1 else ("1f1b",)
        kinds = KINDS if named["data"] * named["context"] > 1 else ("replicate",)
        sequence = (False, True) if named["tensor"] > 1 else (False,)
        replicas = named["data"] * named["context"]
        shards = [(kind, None) for kind in kinds] + [("fsdp", size) for size in (2, 4) if size < replicas]
        for schedule, (kind, shard), share in product(schedules, shards, sequence):
            if kind == "fsdp" and schedule == "zb":
                continue  # refused
            least = named["pipeline"] if schedule in ("1f1b", "interleaved") else 1
            most = GLOBAL_BATCH // named["data"]
            accumulation = max(least, min(most, (1, 4)[turn % 2]))
            yield Case(
                Layout(**named, sequence_parallel=share),
                schedule,
                kind,
                tied=turn // 2 % 2 == 0,
                accumulation=accumulation,
                shard=shard,
                documents=turn % 3 == 2,
                family="qwen3" if turn % 5 == 3 else "llama",
            )
            turn += 1


def batches() -> torch.Tensor:
    """``[steps, global batch, sequence + 1]`` ids."""
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, VOCABULARY, (STEPS, GLOBAL_BATCH, SEQUENCE + 1), generator=generator)


def documents_of(batch: torch.Tensor) -> torch.Tensor:
    """Numbers ``[..., sequence]`` of documents that begin, in each sequence elsewhere, at every sixth of the ids."""
    return (batch[..., :-1] % 6 == 0).long().cumsum(-1)


def train(
    groups: ProcessGroups, case: Case, start: int = 0, stop: int = STEPS, directory: Path | None = None
) -> tuple[list[float], Parts]:
    """The loss of each step from ``start`` to ``stop`` and the weights after the last, as the trainer makes them.

    With a ``directory``, begins with the checkpoint of step ``start`` there, if that is not 0, and leaves one of
    step ``stop``.
    """
    build = partial(ArgonneModel, case.config)
    model, replicas = build_replicas(build, Execution(groups, DOUBLE, plan=case.plan), case.kind, case.shard)  # type: ignore[arg-type]
    optimizer: Optimizer = build_optimizer(replicas.parameters, weight_decay=0.1)
    if case.optimizer == "muon":
        optimizer = build_muon(replicas.parameters, groups, weight_decay=0.1)
    learner = Learner(model=model, replicas=replicas, optimizer=optimizer, step=start)
    weights = weight_pieces(replicas.parameters)
    if start:
        assert directory is not None
        with torch.no_grad():
            load_pieces(step_directory(directory, start), [*weights, *moments_of(optimizer, replicas.parameters)])
        for sharded in replicas.parameters:
            optimizer.state[sharded.parameter]["step"].fill_(start)
        replicas.publish()
    else:
        learner.initialise(seed=3)
    check_declarations(replicas.parameters, groups, values=True)  # no false alarm in any layout
    losses = []
    for step, batch in list(enumerate(batches()))[start:stop]:
        mine = batch[groups.data.rank :: groups.data.size].unflatten(0, (case.accumulation, -1))
        documents = documents_of(mine) if case.documents else None
        step_batch = Batch(mine[..., :-1], mine[..., 1:], documents, divisor=GLOBAL_BATCH * SEQUENCE)
        if step == start:
            replicas.begin(case.accumulation, deferred=model.defers_weight_gradients)
            model.forward_backward(step_batch, CrossEntropyLoss())
            replicas.complete()
            check_gradients(replicas.parameters, groups)
        losses.append(train_step(learner, step_batch, CrossEntropyLoss(), 1e-2 / (1 + step), gradient_clip=1.0).loss)
    if directory is not None:
        moments = moments_of(optimizer, replicas.parameters)
        save_checkpoint(directory, stop, weights, moments, lambda path: None, groups)
    return losses, [(region, part.clone()) for region, part in regions_of(replicas.parameters)]
