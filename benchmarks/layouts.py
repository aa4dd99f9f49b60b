"""What does each way to share out a training step cost? The same steps in every layout of the same processes.

``torchrun --standalone --nproc-per-node 8 benchmarks/layouts.py``, or ``python benchmarks/layouts.py --nproc 2``. All
contestants train one model on the same batches in the same processes; their first losses must agree. They take turns,
and each ratio is of one round, so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from functools import partial

from argonne.launch import drive, guarded, parse, world_size
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import (
    ArgonneError,
    Layout,
    ProcessGroups,
    choose_device,
    process_groups,
)
from argonne.parallel.communication.collectives import barrier
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from benchmarks.report import environment, table, write_json
from benchmarks.two import TwoOnCpu

TOLERANCE = 2e-3
"""Of the first losses, relative; in bfloat16 they differ by about 1e-3, in float32 by 1e-6."""


@dataclass(frozen=True)
class Flags:
    """What to train, and how often."""

    launch: TwoOnCpu = field(default_factory=TwoOnCpu)
    layers: int = 8
    """Transformer blocks."""
    hidden: int = 256
    """Width of the residual stream."""
    heads: int = 8
    """Query heads; half as many key-value heads."""
    vocab: int = 8192
    """Tokens in the vocabulary."""
    sequence: int = 512
    """Tokens in a sequence."""
    batch: int = 8
    """Sequences in a step: so many micro-batches of one in a pipeline, one micro-batch otherwise."""
    rounds: int = 5
    """Turns of each contestant."""
    steps: int = 2
    """Timed steps in a turn."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/layouts_<device>.json]."""

    @property
    def config(self) -> ArgonneConfig:
        return ArgonneConfig(
            self.hidden,
            self.layers,
            self.heads,
            max(1, self.heads // 2),
            self.vocab,
            max_position_embeddings=self.sequence,
        )


@dataclass(frozen=True)
class Contestant:
    """One layout."""

    name: str
    layout: Layout
    kind: str = "replicate"
    schedule: str = "1f1b"


def contestants(ranks: int) -> list[Contestant]:
    """One axis at a time, over all the processes."""
    return [
        Contestant("tensor", Layout(tensor=ranks)),
        Contestant("tensor + sequence", Layout(tensor=ranks, sequence_parallel=True)),
        *(Contestant(f"pipeline, {s}", Layout(pipeline=ranks), schedule=s) for s in SCHEDULES),
        Contestant("context", Layout(context=ranks)),
        Contestant("data", Layout(data=ranks)),
        Contestant("data, zero1", Layout(data=ranks), "zero1"),
        Contestant("data, fsdp", Layout(data=ranks), "fsdp"),
    ]


def check(flags: Flags, ranks: int) -> None:
    """Raise ``ArgonneError`` unless every contestant can train the model."""
    if ranks < 2:
        raise ArgonneError(f"nproc={ranks} has nothing to share out; legal: 2 or more (with fewer GPUs, --device cpu)")
    if flags.batch % ranks or flags.sequence % (2 * ranks):
        raise ArgonneError(
            f"batch={flags.batch} or sequence={flags.sequence} cannot be shared out over {ranks} processes; legal: "
            f"multiples of {ranks} and {2 * ranks}"
        )
    for contestant in contestants(ranks):
        flags.config.check_layout(contestant.layout)
        plan = PipelinePlan.of(contestant.schedule, contestant.layout.pipeline)  # type: ignore[arg-type]
        plan.check_layers(flags.layers)
        plan.check_micro_batches(flags.batch)


def build(contestant: Contestant, flags: Flags, everyone: ProcessGroups) -> tuple[Callable[[], float], dict[str, Any]]:
    """What takes one step and returns its loss; and what it holds and says of itself."""
    groups = ProcessGroups.from_world(contestant.layout, everyone.device)
    precision = resolve_precision("auto", groups.device)
    plan = PipelinePlan.of(contestant.schedule, groups.pipeline.size)  # type: ignore[arg-type]
    build_model = partial(ArgonneModel, flags.config)
    model, replicas = build_replicas(build_model, Execution(groups, precision, plan=plan), contestant.kind)  # type: ignore[arg-type]
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, weight_decay=0.1))
    learner.initialise(seed=0)
    generator = torch.Generator().manual_seed(0)
    batch = torch.randint(0, flags.vocab, (flags.batch, flags.sequence + 1), generator=generator).to(groups.device)
    mine = batch[groups.data.rank :: groups.data.size]
    mine = mine.unflatten(0, (flags.batch, 1) if groups.pipeline.size > 1 else (1, -1))

    step_batch = Batch(mine[..., :-1], mine[..., 1:], divisor=flags.batch * flags.sequence)

    def step() -> float:
        return train_step(learner, step_batch, CrossEntropyLoss(), 1e-3, gradient_clip=1.0).loss

    facts: dict[str, Any] = {"layout": str(contestant.layout), "bubble": None}
    facts["trained_mib"] = sum(s.parameter.nbytes for s in replicas.parameters) / 2**20
    if groups.pipeline.size > 1:
        assert isinstance(model, ArgonneModel)
        facts["bubble"] = model.pipeline(flags.batch, 1, flags.sequence).bubble(model.costs)
    return step, facts


def run(flags: Flags) -> None:
    """Measure, print the table, write the JSON."""
    device = choose_device(flags.launch.device)
    with process_groups(Layout(data=world_size()), device) as everyone:
        found = {}
        steps = {}
        for contestant in contestants(everyone.world.size):
            steps[contestant.name], found[contestant.name] = build(contestant, flags, everyone)
        first = {name: step() for name, step in steps.items()}
        for name, loss in first.items():
            if abs(loss - first["tensor"]) > TOLERANCE * first["tensor"]:
                raise ArgonneError(f"the first loss of {name} is {loss}, but {first['tensor']} of tensor")
        rates: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(flags.rounds):
            for name, step in steps.items():
                barrier(everyone.world)
                began = time.perf_counter()
                for _ in range(flags.steps):
                    step()
                barrier(everyone.world)
                rates[name].append(flags.steps * flags.batch * flags.sequence / (time.perf_counter() - began))
            if everyone.is_first:
                print(f"round {number + 1} of {flags.rounds} done", flush=True)
        if everyone.is_first:
            report(flags, everyone, found, rates)


def report(flags: Flags, groups: ProcessGroups, found: dict[str, Any], rates: dict[str, list[float]]) -> None:
    """The table on screen, and the same as JSON."""
    rows = []
    for name, facts in found.items():
        facts |= {"tokens_per_second": rates[name], "median": median(rates[name])}
        facts["ratio"] = median(a / b for a, b in zip(rates[name], rates["data"], strict=True))
        bubble = "-" if facts["bubble"] is None else f"{facts['bubble']:.0%}"
        rows.append((name, f"{facts['ratio']:.2f}", f"{facts['median']:,.0f}", bubble, f"{facts['trained_mib']:.1f}"))
    machine = environment(groups.device)
    where = machine.get("gpu", machine["cpu"])
    print(f"\n{where}, {groups.world.size} processes, torch {machine['torch']}; medians of {flags.rounds} rounds")
    print(table(("layout", "x data", "tokens/s", "bubble", "MiB trained by a rank"), rows))
    output = flags.output or Path(__file__).parent / "results" / f"layouts_{groups.device.type}.json"
    config = {
        name: getattr(flags, name) for name in ("layers", "hidden", "heads", "vocab", "sequence", "batch", "steps")
    }
    write_json(
        output,
        {"benchmark": "layouts", "environment": machine, "ranks": groups.world.size, "model": config, "layouts": found},
    )
    print(f"\nwritten: {output}")


if __name__ == "__main__":
    guarded(lambda: drive(run, check, parse(Flags, sys.argv[1:])))
