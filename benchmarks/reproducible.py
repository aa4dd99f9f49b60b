"""What does it cost to have the same bits at every layout? ``python benchmarks/reproducible.py``

Part "all-reduce": a sum over ranks in tree order beside the library's own, taking turns in one run: the ratio of the
medians, and of the CPU time of all ranks together, which a busy machine does not change. Part "step" (``--parts step
--nproc 2``): whole training steps of a reproducible run beside those of fast ones, in each layout, likewise.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from argonne.launch import LaunchFlags, drive, guarded, parse, world_size
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas, preset
from argonne.parallel import ArgonneError, Layout, ProcessGroups, choose_device, process_groups
from argonne.parallel.communication.collectives import barrier
from argonne.parallel.communication.reduction import sum_over
from argonne.parallel.data_parallel.kinds import Kind
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step
from benchmarks.collective_timing import Budget, measure
from benchmarks.memory import parse_size, size_text
from benchmarks.report import environment, table, write_json

Part = Literal["all-reduce", "step"]

STEP_MODEL = ArgonneConfig(512, 4, 8, 4, 8192, max_position_embeddings=512)
"""What part "step" trains, in blocks of its key-value heads, on two micro-batches of two sequences."""


@dataclass(frozen=True)
class EightOnCpu(LaunchFlags):
    """How many processes are started, and where; smaller groups are measured while the others wait."""

    nproc: int | None = None
    """Processes to start when not under torchrun [every GPU, or 8 on CPU]."""

    on_cpu: ClassVar[int] = 8


@dataclass(frozen=True)
class Flags:
    """What to measure."""

    launch: EightOnCpu = field(default_factory=EightOnCpu)
    parts: tuple[Part, ...] = ("all-reduce",)
    """Those to measure; of others, what the JSON has is kept."""
    sizes: tuple[str, ...] = ("1M", "16M", "64M")
    """Messages, in float32; K, M and G are powers of 1024."""
    iterations: int = 20
    """Timed calls of each."""
    preset: str | None = None
    """What part "step" trains [4 blocks of 512 hidden]."""
    seconds: float = 20.0
    """Timed calls are fewer where a figure would take longer, but never fewer than three."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/reproducible_<device>.json]."""


def check(flags: Flags, ranks: int) -> None:
    """Raise ``ArgonneError`` unless there is something to compare."""
    if ranks < 2:
        raise ArgonneError(f"nproc={ranks} has nothing to sum over; legal: 2 or more (with fewer GPUs, --device cpu)")
    if flags.iterations < 1:
        raise ArgonneError(f"iterations={flags.iterations} is not legal; legal: 1 or more")
    if not 0 < flags.seconds < float("inf"):
        raise ArgonneError(f"seconds={flags.seconds} is not legal; legal: more than 0")
    for size in flags.sizes:
        parse_size("sizes", size)
    step_model(flags)


def run(flags: Flags) -> None:
    """Every rank's part; the first rank prints and writes."""
    device = choose_device(flags.launch.device)
    measured: dict[str, Callable[[Flags, ProcessGroups], dict[str, Any]]] = {"all-reduce": all_reduces, "step": steps}
    with process_groups(Layout(data=world_size()), device) as groups:
        output = flags.output or Path(__file__).parent / "results" / f"reproducible_{device.type}.json"
        for part in flags.parts:
            report = measured[part](flags, groups)
            if groups.is_first:
                kept = json.loads(output.read_text(encoding="utf-8")) if output.exists() else {}
                name = f"{part}, {flags.preset}" if part == "step" and flags.preset else part
                write_json(output, {**kept, name: {"environment": environment(device), **report}})
        if groups.is_first:
            print(f"written: {output}")


def all_reduces(flags: Flags, everyone: ProcessGroups) -> dict[str, Any]:
    """Groups of 2, 4, ... neighbours one after the other, each message in both ways."""
    records = []
    for ranks in (2**k for k in range(1, everyone.world.size.bit_length())):
        if everyone.world.size % ranks:
            continue
        layout = Layout(tensor=ranks, data=everyone.world.size // ranks)
        groups = ProcessGroups.from_world(layout, everyone.device)
        if groups.data.rank == 0:
            own = replace(groups, world=groups.tensor)
            records += [time_all_reduce(parse_size("sizes", size), flags, own) for size in flags.sizes]
        barrier(everyone.world)
    if everyone.is_first:
        rows = [
            (
                f"{size_text(record['bytes'])} on {record['ranks']}",
                *(f"{record[f'{what}ratio']:.2f}" for what in ("", "cpu_")),
                *(f"{record[f'{name}_median_us'] / 1e3:.2f}" for name in ("fast", "tree")),
            )
            for record in records
        ]
        print(table(("all-reduce", "tree / fast", "in CPU time", "fast, ms", "tree, ms"), rows), flush=True)
    return {"backend": "nccl" if everyone.device.type == "cuda" else "gloo", "records": records}


def time_all_reduce(size: int, flags: Flags, groups: ProcessGroups) -> dict[str, Any]:
    """One line of the table, as JSON."""
    # A sum in place, again and again, leaves only zeros as they are.
    tensor = torch.zeros(size // 4, device=groups.device)
    axes = {"fast": groups.tensor, "tree": groups.in_blocks(groups.tensor.size).tensor}
    actions: list[Callable[[], Tensor]] = [lambda axis=axis: sum_over(tensor, axis) for axis in axes.values()]
    timings = measure(actions, Budget(flags.iterations, 2, flags.seconds), groups)
    fast, tree = cpu_seconds(actions, len(timings[0].seconds), groups)
    record: dict[str, Any] = {"ranks": groups.tensor.size, "bytes": size, "iterations": len(timings[0].seconds)}
    record["ratio"] = timings[1].median / timings[0].median
    record["cpu_ratio"] = tree / fast
    for name, timing in zip(axes, timings, strict=True):
        record |= timing.fields(f"{name}_")
    return record


def steps(flags: Flags, everyone: ProcessGroups) -> dict[str, Any]:
    """A training step in each layout over all the processes, fast and reproducible."""
    ranks = everyone.world.size
    layouts = {
        "tensor": (Layout(tensor=ranks), "replicate"),
        "tensor + sequence": (Layout(tensor=ranks, sequence_parallel=True), "replicate"),
        "data": (Layout(data=ranks), "replicate"),
        "data, zero1": (Layout(data=ranks), "zero1"),
        "data, fsdp": (Layout(data=ranks), "fsdp"),
    }
    model, records = step_model(flags), []
    for name, (layout, kind) in layouts.items():
        groups = ProcessGroups.from_world(layout, everyone.device)
        actions = [train(model, groups, kind, blocks) for blocks in (None, model.num_key_value_heads)]
        timings = measure(actions, Budget(flags.iterations, 1, flags.seconds), replace(groups, tensor=groups.world))
        count = len(timings[0].seconds)
        fast, tree = cpu_seconds(actions, max(2, count // 4), replace(groups, tensor=groups.world))
        record = {"layout": name, "iterations": count, "ratio": timings[1].median / timings[0].median}
        record["cpu_ratio"] = tree / fast
        for way, timing in zip(("fast", "reproducible"), timings, strict=True):
            record |= timing.fields(f"{way}_")
        records.append(record)
    if everyone.is_first:
        rows = [
            (
                record["layout"],
                *(f"{record[f'{what}ratio']:.2f}" for what in ("", "cpu_")),
                *(f"{record[f'{way}_median_us'] / 1e3:,.0f}" for way in ("fast", "reproducible")),
            )
            for record in records
        ]
        heads = ("step", "reproducible / fast", "in CPU time", "fast, ms", "reproducible, ms")
        print(table(heads, rows), flush=True)
    return {"ranks": ranks, "model": asdict(model), "records": records}


def step_model(flags: Flags) -> ArgonneConfig:
    """What part "step" trains, on sequences as long as it can see, up to 512."""
    shape = STEP_MODEL if flags.preset is None else preset(flags.preset)
    return replace(shape, max_position_embeddings=min(512, shape.max_position_embeddings))


def train(shape: ArgonneConfig, groups: ProcessGroups, kind: Kind, blocks: int | None) -> Callable[[], object]:
    """What takes one step of a model, in canonical blocks or fast."""
    execution = Execution(groups, resolve_precision("auto", groups.device), reproducible=blocks)
    model, replicas = build_replicas(partial(ArgonneModel, shape), execution, kind)
    optimizer = build_optimizer(replicas.parameters, weight_decay=0.1, pinned=blocks is not None)
    learner = Learner(model=model, replicas=replicas, optimizer=optimizer)
    learner.initialise(seed=0)
    sequence = shape.max_position_embeddings
    ids = torch.randint(0, shape.vocab_size, (2, 2, sequence + 1), generator=torch.Generator().manual_seed(0))
    batch = Batch(*(part.to(groups.device) for part in (ids[..., :-1], ids[..., 1:])), divisor=4 * sequence)
    return lambda: train_step(learner, batch, CrossEntropyLoss(), 1e-3, gradient_clip=1.0)


def cpu_seconds(actions: Sequence[Callable[[], object]], rounds: int, groups: ProcessGroups) -> list[float]:
    """Of all ranks and their threads together, for ``rounds`` calls of each action; they take turns."""
    spent = torch.zeros(len(actions), dtype=torch.float64, device=groups.device)
    for _ in range(rounds):
        for index, action in enumerate(actions):
            barrier(groups.tensor)
            began = time.process_time()
            action()
            spent[index] += time.process_time() - began
    return sum_over(spent, groups.tensor).tolist()


if __name__ == "__main__":
    guarded(lambda: drive(run, check, parse(Flags, sys.argv[1:])))
