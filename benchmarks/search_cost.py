"""What trying a micro-batch for the search costs, beside the steps of a run of it: ``python -m benchmarks.search_cost``

One process and one thread on a CPU, float32, the demo's shape but for what the table says, two micro-batches a step (of
more, the search takes no more). There is half as much room again as the tensors of a step need. A process of its own
tries each size for the first time, and then again in turns with steps of the run; ratios are of medians. What PyTorch
imports when a process takes its first step, it has imported by then, as it has to for a run in any case.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import tyro

from argonne.data import train_tokenizer
from argonne.launch import RestartFlags
from argonne.models import Batch, CrossEntropyLoss
from argonne.parallel import ProcessGroups
from argonne.training.config import DataFlags, ModelFlags, RunConfig, RunFlags, TrainingFlags
from argonne.training.machine import GIB, resident_bytes
from argonne.training.run.memory import USABLE
from argonne.training.run.rehearsal import rehearse
from argonne.training.run.rough import Rough
from argonne.training.run.search import largest
from argonne.training.run.setup import prepare
from argonne.training.state import TrainingState
from argonne.training.step import train_step
from benchmarks.report import environment, table, write_json

MICRO_BATCHES, ROOM = 2, 1.5
SHAPES = (
    (32, 1, 16, 1),
    (64, 2, 64, 4),
    (64, 2, 64, 16),
    (64, 2, 64, 64),
    (128, 4, 128, 4),
    (128, 4, 128, 16),
    (128, 4, 128, 64),
    (256, 8, 512, 1),
    (256, 8, 512, 4),
    (512, 2, 512, 4),
    (512, 16, 512, 1),
)
"""Hidden size, layers, block size, sequences of a micro-batch."""


@dataclass(frozen=True)
class Options:
    """How often."""

    rounds: int = 5
    """A size is tried and steps are taken."""
    output: Path = Path(__file__).parent / "results" / "search_cost_cpu.json"
    """Where the JSON goes."""


def main(options: Options) -> None:
    machine, found = environment(torch.device("cpu")), []
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        text = ["some words and more of them, again and again"] * 99
        pq.write_table(pa.table({"text": text}), home / "part-0.parquet")
        train_tokenizer(text).save_pretrained(home / "tokenizer")
        for number, shape in enumerate(SHAPES):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # imports belong to the first
                found.append(process.submit(cost, home, shape, options.rounds).result())
            print(f"{number + 1}/{len(SHAPES)}: {found[-1]}", flush=True)
    print(f"{machine['cpu']}, torch {machine['torch']}, one thread")
    header = ("hidden x layers, sequences", "needs MiB", "numbers", "step s", "first", "again", "without numbers")
    rows = [
        (
            "{} x {}, {} x {}".format(*(own["shape"][index] for index in (0, 1, 3, 2))),
            f"{own['needs_bytes'] / 2**20:.1f}",
            "yes" if own["computed"] else "no",
            f"{own['step_seconds']:.3f}",
            *(f"{own[key]:.2f}" for key in ("first", "again", "without_numbers")),
        )
        for own in found
    ]
    print(table(header, rows))
    write_json(options.output, {"environment": machine, "micro_batches": MICRO_BATCHES, "sizes": found})
    print(f"written: {options.output}")


def cost(home: Path, shape: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    """The seconds of a step, and how many of them a search takes that tries one size."""
    torch.set_num_threads(1)
    hidden, layers, block_size, size = shape
    groups = ProcessGroups.single()
    config = RunConfig(
        model=ModelFlags("demo", hidden_size=hidden, num_hidden_layers=layers, intermediate_size=3 * hidden),
        data=DataFlags((f"{home}/*.parquet",), block_size=block_size, tokenizer_path=home / "tokenizer", data_lanes=1),
        training=TrainingFlags(10, size, gradient_accumulation_steps=MICRO_BATCHES, warmup_steps=1, precision="fp32"),
        launch=RestartFlags("cpu"),
        run=RunFlags(home / "run"),
    )
    workload = prepare(config, groups)
    state = TrainingState.build(config, workload, groups)
    state.initialise(0)
    shape_of_step = MICRO_BATCHES, size, block_size + 1
    ids = torch.randint(workload.model.shape["vocab_size"], shape_of_step)
    batch = Batch(ids[..., :-1], ids[..., 1:], divisor=float(ids[..., 1:].numel()))

    def step() -> None:
        train_step(state, batch, CrossEntropyLoss(), 1e-4, 1.0)

    step()
    needs = rehearse(config, workload, groups, size, math.inf, computes=True).needs

    def search() -> None:
        limit = (resident_bytes() + ROOM * needs) / USABLE / GIB
        limited = replace(config, training=replace(config.training, memory_limit=limit))
        assert largest([limited], workload, groups) is not None

    first = seconds(search)
    again, without, steps = [], [], []
    for _ in range(rounds):
        again.append(seconds(search))
        without.append(seconds(partial(rehearse, config, workload, groups, size, math.inf)))
        steps.append(seconds(step))
    median = statistics.median(steps)
    return {
        "shape": shape,
        "needs_bytes": needs,
        "computed": Rough.of(config, workload, groups, size).is_quick,
        "step_seconds": median,
        "first": first / median,
        "again": statistics.median(again) / median,
        "without_numbers": statistics.median(without) / median,
    }


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
