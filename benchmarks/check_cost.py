"""What share of a save's time is the check of the declarations? ``python benchmarks/check_cost.py --nproc 2``.

The demo model with its moments, once in each way that the processes can share it out: every round saves a checkpoint
and times the check that each save makes, alone.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

import torch

from argonne.checkpoint import moment_pieces, save_checkpoint, weight_pieces
from argonne.launch import drive, guarded, parse, world_size
from argonne.models import ArgonneModel, Execution, build_replicas, preset
from argonne.parallel import ArgonneError, Layout, ProcessGroups, choose_device, initialise, process_groups
from argonne.parallel.communication.collectives import barrier, gather_objects
from argonne.parallel.sharding.check import check_pieces
from argonne.training.optimizer import build_optimizer
from benchmarks.report import environment, table
from benchmarks.two import TwoOnCpu


@dataclass(frozen=True)
class Flags:
    """What to save, and how often."""

    launch: TwoOnCpu = field(default_factory=TwoOnCpu)
    preset: str = "demo"
    """The shape."""
    rounds: int = 7
    """Saves of each layout."""


def check(flags: Flags, ranks: int) -> None:
    """Raise ``ArgonneError`` unless there is something to time."""
    if flags.rounds < 1:
        raise ArgonneError(f"rounds={flags.rounds} is not legal; legal: 1 or more")
    preset(flags.preset)


def contestants(ranks: int) -> dict[str, tuple[Layout, str]]:
    """The layouts and the kinds of replicas: the more copies there are, the more is compared."""
    if ranks == 1:
        return {"one process": (Layout(), "replicate")}
    return {
        "tensor": (Layout(tensor=ranks), "replicate"),
        "data": (Layout(data=ranks), "replicate"),
        "data, zero1": (Layout(data=ranks), "zero1"),
        "data, fsdp": (Layout(data=ranks), "fsdp"),
    }


def run(flags: Flags) -> None:
    """Time every layout, and print the share."""
    device = choose_device(flags.launch.device)
    with process_groups(Layout(data=world_size()), device) as everyone, tempfile.TemporaryDirectory() as own:
        directory = Path(gather_objects(own, everyone.world)[0])
        rows = []
        for name, (layout, kind) in contestants(everyone.world.size).items():
            groups = everyone if everyone.world.size == 1 else ProcessGroups.from_world(layout, device)
            saves, checks = times(flags, groups, kind, directory)
            share = median(b / a for a, b in zip(saves, checks, strict=True))
            rows.append((name, f"{share:.2%}", f"{1e3 * median(checks):.2f}", f"{1e3 * median(saves):.0f}"))
        if everyone.is_first:
            machine = environment(device)
            where = machine.get("gpu", machine["cpu"])
            print(f"{flags.preset} on {where}, {everyone.world.size} processes, torch {machine['torch']}")
            print(table(("layout", "check / save", "check, ms", "save, ms"), rows))


def times(flags: Flags, groups: ProcessGroups, kind: str, directory: Path) -> tuple[list[float], list[float]]:
    """Seconds of each save, which includes its check, and of the same check alone."""
    build = partial(ArgonneModel, preset(flags.preset))
    _, replicas = build_replicas(build, Execution(groups), kind)  # type: ignore[arg-type]
    initialise(replicas.parameters, seed=0)
    replicas.publish()
    weights = weight_pieces(replicas.parameters)
    moments = moment_pieces(build_optimizer(replicas.parameters, weight_decay=0.1), replicas.parameters)
    told = [(piece.name, piece.region, piece.part) for piece in (*weights, *moments)]
    saves, checks = [], []
    for number in range(flags.rounds):
        save = partial(save_checkpoint, directory, number, weights, moments, lambda path: None, groups)
        saves.append(timed(groups, save))
        checks.append(timed(groups, lambda: check_pieces(told, groups)))
    return saves, checks


def timed(groups: ProcessGroups, action: Callable[[], object]) -> float:
    """Seconds until the last rank is through."""
    barrier(groups.world)
    began = time.perf_counter()
    action()
    if groups.device.type == "cuda":
        torch.cuda.synchronize()
    barrier(groups.world)
    return time.perf_counter() - began


if __name__ == "__main__":
    guarded(lambda: drive(run, check, parse(Flags, sys.argv[1:])))
