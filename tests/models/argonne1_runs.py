"""A small Argonne 1.x, and what it makes of a batch or of a short training run at any layout, with what it dropped."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from argonne.checkpoint import load_pieces, load_tensors, moment_pieces, save_checkpoint, weight_pieces
from argonne.checkpoint.format import step_directory
from argonne.data import Assignment
from argonne.models import Argonne1Config, Argonne1Model, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.families.argonne1 import ARGONNE1
from argonne.models.recompute import Recompute
from argonne.parallel import (
    Draws,
    Dropout,
    Layout,
    PipelinePlan,
    Precision,
    ProcessGroups,
    check_declarations,
    check_gradients,
    complete_gradients,
    regions_of,
)
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from tests.whole import Parts

STEPS, GLOBAL_BATCH, SEQUENCE, VOCABULARY = 3, 8, 12, 53
DOUBLE = Precision(torch.float64, torch.float64)
DROPPING = Argonne1Config(24, 4, 6, VOCABULARY, 40, 16, attention_dropout=0.3, residual_dropout=0.2)
PLAIN = Argonne1Config(24, 4, 6, VOCABULARY, 40, 16, 1e-5, "gelu", 0.0, 0.0, 0.0)
TIED = Argonne1Config(24, 4, 6, VOCABULARY, None, 16, 1e-3, "gelu_new", 0.0, 0.0, 0.0, True)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Case:
    """One way to train the model."""

    layout: Layout = Layout()  # noqa: RUF009 - frozen
    schedule: str = "1f1b"
    kind: str = "replicate"
    accumulation: int = 1
    recompute: Recompute = Recompute.NONE
    documents: bool = False
    config: Argonne1Config = DROPPING

    @property
    def plan(self) -> PipelinePlan:
        return PipelinePlan.of(self.schedule, self.layout.pipeline)  # type: ignore[arg-type]

    def __str__(self) -> str:
        told = [str(self.layout), self.schedule, self.kind, f"accumulation {self.accumulation}"]
        return ", ".join([*told, f"recompute {self.recompute}", *(["documents"] * self.documents)])


def their_model(config: Argonne1Config) -> GPT2LMHeadModel:
    """``transformers``' own, in float64, with weights that hide nothing; its probabilities are drop-able modules."""
    said = ARGONNE1.write(config, {"bos_token_id": None, "eos_token_id": None}, "float64")
    theirs = GPT2LMHeadModel(GPT2Config(**said, attn_implementation="eager")).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return theirs


def ids_of(step: int) -> Tensor:
    """``[global batch, sequence + 1]``: those of global samples ``step * GLOBAL_BATCH`` and so on."""
    return torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=torch.Generator().manual_seed(70 + step))


def batch_of(groups: ProcessGroups, step: int, accumulation: int, documents: bool = False) -> Batch:
    """This replica's micro-batches of a step, dealt out as a run deals them out."""
    replicas = groups.data.size
    dealt = Assignment(GLOBAL_BATCH // (accumulation * replicas), accumulation, replicas)
    samples = torch.from_numpy(dealt.samples(groups.data.rank, step * GLOBAL_BATCH))
    mine = ids_of(step)[samples - step * GLOBAL_BATCH]
    apart = (mine[..., :-1] % 6 == 0).long().cumsum(-1) if documents else None
    draws = Draws(9, step + 1, samples)
    return Batch(mine[..., :-1], mine[..., 1:], apart, divisor=GLOBAL_BATCH * SEQUENCE, draws=draws)


def gradients(groups: ProcessGroups, config: Argonne1Config, schedule: str) -> tuple[list[Tensor], float, Parts]:
    """With their weights: this rank's logits of the first step's ids, its loss, and the gradients of all weights."""
    plan = PipelinePlan.of(schedule, groups.pipeline.size)  # type: ignore[arg-type]
    model = Argonne1Model(config, Execution(groups, DOUBLE, plan=plan, recompute=Recompute.FULL))
    parameters = model.sharded_parameters()
    model.initialise(0)  # the padding of the vocabulary
    load_tensors(their_model(config).state_dict(), weight_pieces(parameters))
    batch = batch_of(groups, 0, 4)
    with torch.no_grad():
        logits = [model.next_token_logits(ids_of(0)[:, :-1])]
        if groups.pipeline.size == 1:
            logits.append(model.logits(ids_of(0)[:, :-1]))
    loss = model.forward_backward(batch, CrossEntropyLoss())
    for sharded in parameters:
        assert sharded.parameter.grad is not None, sharded.name
    complete_gradients(parameters, groups)
    check_gradients(parameters, groups)
    found = [(r, r.part_of(s.parameter.grad).clone()) for s in parameters for r in s.spec.regions]  # type: ignore[arg-type]
    return logits, loss.item(), found


def train(
    groups: ProcessGroups, case: Case, start: int = 0, stop: int = STEPS, directory: Path | None = None
) -> tuple[list[float], Parts, dict[str, Any]]:
    """The losses of steps ``start`` to ``stop``, the weights after them, and what was dropped (``Recorder``).

    With a ``directory``, begins with the checkpoint of step ``start`` there, if that is not 0, and leaves one of
    ``stop``.
    """
    build = partial(Argonne1Model, case.config)
    execution = Execution(groups, DOUBLE, plan=case.plan, recompute=case.recompute)
    model, replicas = build_replicas(build, execution, case.kind)  # type: ignore[arg-type]
    optimizer = build_optimizer(replicas.parameters, weight_decay=0.1)
    learner = Learner(model=model, replicas=replicas, optimizer=optimizer, step=start)
    weights = weight_pieces(replicas.parameters)
    if start:
        assert directory is not None
        with torch.no_grad():
            load_pieces(step_directory(directory, start), [*weights, *moment_pieces(optimizer, replicas.parameters)])
        for sharded in replicas.parameters:
            optimizer.state[sharded.parameter]["step"].fill_(start)
        replicas.publish()
    else:
        learner.initialise(seed=3)
    check_declarations(replicas.parameters, groups, values=True)
    losses, recorder = [], Recorder(groups)
    assert isinstance(model, nn.Module)
    for step in range(start, stop):
        batch = batch_of(groups, step, case.accumulation, case.documents)
        with recorder.watching(model, batch):
            losses.append(train_step(learner, batch, CrossEntropyLoss(), 1e-2 / (1 + step), gradient_clip=1.0).loss)
    if directory is not None:
        save_checkpoint(
            directory, stop, weights, moment_pieces(optimizer, replicas.parameters), lambda path: None, groups
        )
    return losses, [(region, part.clone()) for region, part in regions_of(replicas.parameters)], recorder.found


class Recorder:
    """What the dropouts of a rank dropped, as each of them hands it on."""

    def __init__(self, groups: ProcessGroups) -> None:
        self.groups = groups
        self.found: dict[str, Any] = defaultdict(list)
        """By site: ``(step, samples, rows or heads, dropped)`` of each micro-batch."""

    @contextmanager
    def watching(self, model: nn.Module, batch: Batch) -> Iterator[None]:
        """Record a step."""
        begun: dict[str, int] = defaultdict(int)
        draws = batch.draws
        assert draws is not None
        plain, of_heads = Dropout.forward, Dropout.of_heads

        def note(site: str, held: range, x: Tensor, y: Tensor) -> Tensor:
            if torch._C._current_graph_task_id() == -1:  # not once more in backward
                samples = draws.samples[begun[site]].tolist()
                begun[site] += 1
                self.found[site].append((draws.step, samples, held, ((y == 0) & (x != 0)).clone()))
            return y

        def forward(module: Dropout, x: Tensor, rows: Tensor | None) -> Tensor:
            share = range(self.groups.tensor.rank * len(x), (self.groups.tensor.rank + 1) * len(x))
            return note(
                module.site, share if self.groups.sequence_parallel else range(len(x)), x, plain(module, x, rows)
            )

        def heads_of(module: Dropout, x: Tensor, rows: Tensor, heads: range) -> Tensor:
            return note(module.site, heads, x, of_heads(module, x, rows, heads))

        Dropout.forward, Dropout.of_heads = forward, heads_of  # type: ignore[assignment, method-assign]
        try:
            yield
        finally:
            Dropout.forward, Dropout.of_heads = plain, of_heads  # type: ignore[method-assign]


def whole_masks(ranks: list[dict[str, Any]]) -> dict[tuple[str, int, int], Tensor]:
    """By site, step and sample: what was dropped of it; what several ranks have is the same, and nothing is missing."""
    found: dict[tuple[str, int, int], Tensor] = {}
    seen: dict[tuple[str, int, int], Tensor] = {}
    for of_rank in ranks:
        for site, notes in of_rank.items():
            for step, samples, held, dropped in notes:
                if "attn_dropout" in site:
                    shape = (DROPPING.num_attention_heads, *dropped.shape[2:])
                    places = [
                        (number, slice(held.start, held.stop), part)
                        for number, part in zip(samples, dropped, strict=True)
                    ]
                else:
                    shape = (SEQUENCE, dropped.shape[-1])
                    rows = [divmod(row, SEQUENCE) for row in held]
                    places = [(samples[n], slice(p, p + 1), dropped[i][None]) for i, (n, p) in enumerate(rows)]
                for number, place, part in places:
                    key = site, step, number
                    whole = found.setdefault(key, torch.zeros(shape, dtype=torch.bool))
                    there = seen.setdefault(key, torch.zeros(shape[0], dtype=torch.bool))
                    assert torch.equal(whole[place][there[place]], part[there[place]]), f"{key}: ranks dropped unlike"
                    whole[place], there[place] = part, True
    for key, there in seen.items():
        assert there.all(), f"{key}: {int((~there).sum())} rows or heads are missing"
    return found
