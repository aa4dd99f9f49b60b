"""Is a training step faster compiled than eager? ``python benchmarks/compiled.py --nproc 2``

The same model, batch and layout in both ways, which take turns in one run: the ratio of the medians, and of the CPU
time of all ranks together, which a busy machine does not change; how long compiling took, and how far the losses are
apart.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import ArgonneError, Layout, ProcessGroups, choose_device, process_groups
from argonne.parallel.communication.collectives import barrier
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.legal import require_whole
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.optimizer import build_optimizer
from argonne.training.run.compilation import prepare_blocks
from argonne.training.step import Learner, train_step
from benchmarks.report import environment, table, write_json

MICRO_BATCH, ACCUMULATION = 2, 2


@dataclass(frozen=True)
class OneOnCpu(LaunchFlags):
    """How many processes are started, and where."""

    nproc: int | None = None
    """Processes to start when not under torchrun [every GPU, or 1 on CPU]."""

    on_cpu: ClassVar[int] = 1


@dataclass(frozen=True)
class Flags:
    """What to measure."""

    launch: OneOnCpu = field(default_factory=OneOnCpu)
    hidden: tuple[int, ...] = (512, 1024)
    """Widths of the models, multiples of 128, of 4 blocks each."""
    block_size: int = 512
    """Tokens of a sequence; a step has four sequences for each replica."""
    recompute: str = "none"
    """Compute each block once more in backward."""
    iterations: int = 20
    """Timed steps of each."""
    output: Path | None = None
    """The JSON to write, where what was measured on other numbers of ranks is kept
    [benchmarks/results/compiled_<device>.json]."""


def check(flags: Flags, ranks: int) -> None:
    """Raise ``ArgonneError`` unless there is something to train."""
    for hidden in flags.hidden:
        require_whole("hidden", hidden, 128)
        if hidden % 128:
            raise ArgonneError(f"hidden={hidden} is not legal; legal: a multiple of 128")
    require_whole("block_size", flags.block_size, 16)
    require_whole("iterations", flags.iterations, 1)


def run(flags: Flags) -> None:
    """Every rank's part; the first rank prints and writes."""
    device = choose_device(flags.launch.device)
    with process_groups(Layout(data=world_size()), device) as everyone:
        records = [
            measured(flags, hidden, name, groups_of(layout, everyone), kind)
            for hidden in flags.hidden
            for name, (layout, kind) in layouts(everyone.world.size).items()
        ]
        if not everyone.is_first:
            return
        rows = [
            (
                f"{record['hidden']} hidden, {record['layout']}",
                *(f"{record[f'{what}ratio']:.2f}" for what in ("", "cpu_")),
                *(f"{record[f'{way}_median_ms']:,.0f}" for way in ("eager", "compiled")),
                f"{record['compile_seconds']:.0f}",
                f"{record['loss_difference']:.0e}",
            )
            for record in records
        ]
        heads = (
            "step",
            "eager / compiled",
            "in CPU time",
            "eager, ms",
            "compiled, ms",
            "to compile, s",
            "losses apart",
        )
        print(table(heads, rows), flush=True)
        output = flags.output or Path(__file__).parent / "results" / f"compiled_{device.type}.json"
        kept = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
        name = f"{everyone.world.size} ranks{', recompute ' + flags.recompute if flags.recompute != 'none' else ''}"
        write_json(output, {**kept, name: {"environment": environment(device), "records": records}})
        print(f"written: {output}")


def groups_of(layout: Layout, everyone: ProcessGroups) -> ProcessGroups:
    return everyone if everyone.world.size == 1 else ProcessGroups.from_world(layout, everyone.device)


def layouts(ranks: int) -> dict[str, tuple[Layout, Kind]]:
    """Each axis alone over all the ranks."""
    if ranks == 1:
        return {"one process": (Layout(), "replicate")}
    return {
        f"tensor {ranks}": (Layout(tensor=ranks), "replicate"),
        f"tensor {ranks} + sequence": (Layout(tensor=ranks, sequence_parallel=True), "replicate"),
        f"data {ranks}, fsdp": (Layout(data=ranks), "fsdp"),
        f"pipeline {ranks}": (Layout(pipeline=ranks), "replicate"),
    }


def measured(flags: Flags, hidden: int, name: str, groups: ProcessGroups, kind: Kind) -> dict[str, Any]:
    """One line of the table, as JSON."""
    torch.compiler.reset()
    shape = ArgonneConfig(hidden, 4, hidden // 64, hidden // 128, 8192, max_position_embeddings=flags.block_size)
    learners = [build(flags, shape, groups, kind, compiled) for compiled in (False, True)]
    began = time.perf_counter()
    if problem := prepare_blocks(learners[1].model, MICRO_BATCH, flags.block_size, documents=False):
        raise ArgonneError(f"{problem}; legal: a machine that can compile")
    seconds, losses = time.perf_counter() - began, []
    actions: list[Callable[[], object]] = []
    for learner in learners:
        batch = one_batch(shape, groups)
        losses.append(train_step(learner, batch, CrossEntropyLoss(), 1e-3, gradient_clip=1.0).loss)
        actions.append(partial(train_step, learner, batch, CrossEntropyLoss(), 1e-3, gradient_clip=1.0))
    passed, spent = in_turns(actions, flags.iterations, groups)
    (eager, compiled), (eager_cpu, compiled_cpu) = passed.median(1).values.tolist(), spent.sum(1).tolist()
    return {
        "layout": name,
        "hidden": hidden,
        "iterations": flags.iterations,
        "model": asdict(shape),
        "ratio": eager / compiled,
        "cpu_ratio": eager_cpu / compiled_cpu,
        "compile_seconds": seconds,
        "loss_difference": abs(losses[0] - losses[1]) / losses[0],
        "eager_median_ms": 1e3 * eager,
        "compiled_median_ms": 1e3 * compiled,
        "seconds": dict(zip(("eager", "compiled"), passed.tolist(), strict=True)),
    }


def in_turns(actions: Sequence[Callable[[], object]], rounds: int, groups: ProcessGroups) -> tuple[Tensor, Tensor]:
    """Seconds ``[actions, rounds]`` that passed on the first rank, and of CPU time of all ranks together."""
    passed, spent = torch.zeros(2, len(actions), rounds, dtype=torch.float64).unbind()
    for turn in range(rounds):
        for number, action in enumerate(actions):
            barrier(groups.world)
            began, began_cpu = time.perf_counter(), time.process_time()
            action()
            passed[number, turn] = time.perf_counter() - began
            spent[number, turn] = time.process_time() - began_cpu
    return passed, sum_over(spent.to(groups.device), groups.world).cpu()


def build(flags: Flags, shape: ArgonneConfig, groups: ProcessGroups, kind: Kind, compiled: bool) -> Learner:
    precision = resolve_precision("auto", groups.device)
    execution = Execution(groups, precision, recompute=Recompute.of(flags.recompute), compile=compiled)
    model, replicas = build_replicas(partial(ArgonneModel, shape), execution, kind)
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(seed=0)
    return learner


def one_batch(shape: ArgonneConfig, groups: ProcessGroups) -> Batch:
    """The same at each step, in memory as the trainer has it."""
    size = (ACCUMULATION, MICRO_BATCH, shape.max_position_embeddings + 1)
    ids = torch.randint(0, shape.vocab_size, size, generator=torch.Generator().manual_seed(0)).to(groups.device)
    return Batch(ids[..., :-1], ids[..., 1:], divisor=groups.data.size * ids[..., 1:].numel())


if __name__ == "__main__":
    guarded(lambda: drive(run, check, parse(Flags, sys.argv[1:])))
