"""How fast the tensor-parallel ranks talk: all-reduce, all-gather and reduce-scatter, in the manner of nccl-tests.

``torchrun --standalone --nproc-per-node 8 benchmarks/tp_allreduce.py``, or without torchrun
``python benchmarks/tp_allreduce.py --nproc 2``: Gloo on CPUs, NCCL on GPUs, the same code. Four parts: message
sizes; the activation all-reduce of each preset; that all-reduce hidden beside a matrix product; symmetric memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script, in this process and in its ranks

from argonne.launch import drive, guarded, parse, world_size
from argonne.models import preset
from argonne.models.config import PRESETS, ArgonneConfig
from argonne.parallel import ArgonneError, Layout, ProcessGroups, choose_device, process_groups
from argonne.parallel.communication.collectives import collectively, gather_objects
from benchmarks.bandwidth_report import against_peak, plot_bandwidths, show, wrong_elements
from benchmarks.collective_timing import ALL_REDUCE, OPERATIONS, Budget, exact_period, time_collective
from benchmarks.memory import Need, available_memory, parse_size, ranks_sharing, require_memory, size_text
from benchmarks.overlap import overlap_bytes, time_overlap
from benchmarks.report import environment, write_json
from benchmarks.symmetric_memory import VARIANTS, time_symmetric_memory, unfinished
from benchmarks.topology import nvlink_peak
from benchmarks.two import TwoOnCpu

_REPORTED_VARIABLES = ("OMP_NUM_THREADS", "CUDA_DEVICE_MAX_CONNECTIONS", "NCCL_ALGO", "NCCL_PROTO", "NCCL_NVLS_ENABLE")


@dataclass(frozen=True)
class Flags:
    """What to measure; a default in brackets depends on the device."""

    launch: TwoOnCpu = field(default_factory=TwoOnCpu)
    min_bytes: str = "1K"
    """The smallest message; K, M, G and T are powers of 1024."""
    max_bytes: str | None = None
    """The largest message [1G on GPU, 256M on CPU]."""
    factor: int = 4
    """From one size to the next."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of every buffer [bfloat16 on GPU, float32 on CPU]."""
    iterations: int = 50
    """Timed calls of each figure, at most."""
    warmup: int = 5
    """Calls before them, at most."""
    seconds: float = 1.0
    """Timed calls are fewer where a figure would take longer, but never fewer than three."""
    presets: tuple[str, ...] = tuple(PRESETS)
    """The models whose activation all-reduce is measured."""
    tokens: int = 4096
    """Tokens of that activation: micro-batch x context."""
    overlap_tokens: int | None = None
    """Tokens of the all-reduce and of the matrix product beside it [tokens on GPU, 256 on CPU]."""
    output: Path | None = None
    """The JSON to write, and the plot beside it [benchmarks/results/tp_allreduce_<device>.json]."""


@dataclass(frozen=True)
class Recipe:
    """The flags, resolved for a device and a number of ranks."""

    sizes: tuple[int, ...]
    """Bytes of the messages, ascending; each a whole number of 16 bytes for each rank."""
    dtype: torch.dtype
    budget: Budget
    models: dict[str, ArgonneConfig]
    tokens: int
    overlap_tokens: int
    output: Path


def resolve(flags: Flags, device: str, ranks: int) -> Recipe:
    """The recipe of ``ranks`` ranks on ``device`` (its type). Raises ``ArgonneError`` for what is not legal."""
    on_gpu = device == "cuda"
    for name, least in (("factor", 2), ("iterations", 1), ("warmup", 0), ("tokens", 1), ("overlap_tokens", 1)):
        value = getattr(flags, name)
        if value is not None and value < least:
            raise ArgonneError(f"{name}={value} is not legal; legal: {least} or more")
    if not 0 < flags.seconds < float("inf"):
        raise ArgonneError(f"seconds={flags.seconds} is not legal; legal: more than 0")
    if ranks < 2:
        raise ArgonneError(
            f"nproc={ranks} has nothing to communicate; legal: 2 or more (with fewer GPUs, --device cpu)"
        )
    dtype = getattr(torch, flags.dtype or ("bfloat16" if on_gpu else "float32"))
    if not exact_period(ranks, dtype):
        name = str(dtype).removeprefix("torch.")
        raise ArgonneError(f"dtype={name!r} cannot count {ranks} ranks exactly; legal: float32")
    smallest = parse_size("min_bytes", flags.min_bytes)
    default = "1G" if on_gpu else "256M"
    largest = parse_size("max_bytes", default if flags.max_bytes is None else flags.max_bytes)
    quantum = 16 * ranks  # bytes: the widest load of a GPU's thread, in each rank's part
    if smallest < quantum:
        raise ArgonneError(
            f"min_bytes={flags.min_bytes!r} is less than 16 bytes for each of {ranks} ranks; legal: {quantum} or more"
        )
    if smallest > largest:
        raise ArgonneError(
            f"min_bytes={flags.min_bytes!r} is more than max_bytes={size_text(largest)!r}; "
            f"legal: up to {size_text(largest)}"
        )
    output = flags.output or Path(__file__).parent / "results" / f"tp_allreduce_{device}.json"
    if output.suffix != ".json":  # the plot beside it would take its place, or a directory
        raise ArgonneError(f"output={str(output)!r} is not a JSON file; legal: a path that ends in .json")
    sizes = [smallest]
    while sizes[-1] * flags.factor <= largest:
        sizes.append(sizes[-1] * flags.factor)
    return Recipe(
        sizes=tuple(size // quantum * quantum for size in sizes),
        dtype=dtype,
        budget=Budget(flags.iterations, flags.warmup, flags.seconds),
        models={name: preset(name) for name in flags.presets},
        tokens=flags.tokens,
        overlap_tokens=flags.overlap_tokens or (flags.tokens if on_gpu else 256),
        output=output,
    )


def needs(recipe: Recipe, ranks: int) -> Iterator[Need]:
    """The memory of each part, on each rank; the parts run one after the other."""
    # An all-gather or a reduce-scatter holds the whole buffer and a part; Gloo stages the whole once more
    # (measured), and so does symmetric memory for its result.
    copies = 2 + 1 / ranks
    yield Need("max_bytes", recipe.sizes[-1], copies, step=2**20, show=size_text)
    for config in recipe.models.values():
        yield Need("tokens", recipe.tokens, config.hidden_size * recipe.dtype.itemsize)
        yield Need("overlap_tokens", recipe.overlap_tokens, *overlap_bytes(config, ranks, recipe.dtype))


def check(flags: Flags, ranks: int) -> None:
    """Refuse what can be refused before any rank starts."""
    recipe = resolve(flags, choose_device(flags.launch.device).type, ranks)
    try:
        recipe.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgonneError(f"output={str(recipe.output)!r} cannot be written: {error.strerror}") from None


def run(flags: Flags) -> None:
    """Every rank's benchmark; the first rank prints and writes."""
    device = choose_device(flags.launch.device)
    recipe = resolve(flags, device.type, world_size())
    with process_groups(Layout(tensor=world_size()), device) as groups:
        collectively(lambda: _require_memory(recipe, groups), groups.world)
        report = _measure(recipe, groups)
        if groups.is_first:  # what is known, lest the part that rests on a private interface end the run
            write_json(recipe.output, report)
        report["symmetric_memory"] = _symmetric_memory(recipe, report["nvlink"], groups)
        if groups.is_first:
            write_json(recipe.output, report)
            show(report)
            plot = recipe.output.with_suffix(".png")
            drawn = plot_bandwidths(report, plot)
            print(f"\nwritten: {recipe.output}" + (f" and {plot}" if drawn else ""))
            if not drawn:
                print(f"note: no {plot.name}, because matplotlib is not installed")
        if unfinished(report["symmetric_memory"]):
            gather_objects(None, groups.world)  # every rank has written what it writes
            raise RuntimeError("an all-reduce over symmetric memory timed out on the GPU")
    if wrong := wrong_elements(report):
        sys.exit(f"argonne: {wrong} elements of the results are wrong" if groups.is_first else 1)


def _require_memory(recipe: Recipe, groups: ProcessGroups) -> None:
    available = available_memory(groups.device)
    for need in needs(recipe, groups.tensor.size):
        require_memory(need, available, ranks_sharing(groups.device, groups.world.size))


def _measure(recipe: Recipe, groups: ProcessGroups) -> dict[str, Any]:
    """All but symmetric memory, as the report's JSON."""
    began = time.monotonic()

    def say(part: str, record: dict[str, Any]) -> None:
        if groups.is_first:
            times = [f"{key[:-3].replace('_', ' ')} {record[key]:.1f} us" for key in record if "median" in key]
            print(
                f"[{time.monotonic() - began:5.1f} s] {part} {size_text(record['bytes'])}: {', '.join(times)}",
                flush=True,
            )

    nvlink = nvlink_peak(groups)
    ranks = groups.tensor.size
    like: dict[str, Any] = {"dtype": recipe.dtype, "device": groups.device}
    largest = recipe.sizes[-1] // recipe.dtype.itemsize
    full, part = torch.empty(largest, **like), torch.empty(largest // ranks, **like)
    sweep = []
    for operation in OPERATIONS:
        for size in recipe.sizes:
            elements = size // recipe.dtype.itemsize
            record = time_collective(operation, full[:elements], part[: elements // ranks], recipe.budget, groups)
            sweep.append(against_peak(record, nvlink))
            say(operation.name, record)
    del full, part

    activations, overlaps = [], []
    for name, config in recipe.models.items():
        activation = torch.empty(recipe.tokens * config.hidden_size, **like)
        record = time_collective(ALL_REDUCE, activation, activation[:0], recipe.budget, groups)
        shape = {"preset": name, "tokens": recipe.tokens, "hidden": config.hidden_size}
        activations.append(against_peak({**shape, **record}, nvlink))
        say(f"{name} activation", record)
        del activation
    for name, config in recipe.models.items():
        budget = replace(recipe.budget, seconds=3 * recipe.budget.seconds)  # three figures at once
        record = time_overlap(config, recipe.overlap_tokens, recipe.dtype, budget, groups)
        overlaps.append({"preset": name, **record})
        say(f"{name} overlap", record)
    return {
        "benchmark": "tp_allreduce",
        "environment": environment(groups.device),
        "variables": {name: os.environ[name] for name in _REPORTED_VARIABLES if name in os.environ},
        "threads": torch.get_num_threads(),
        "device": groups.device.type,
        "backend": "nccl" if groups.device.type == "cuda" else "gloo",
        "ranks": ranks,
        "dtype": str(recipe.dtype).removeprefix("torch."),
        "seconds": round(time.monotonic() - began, 1),
        "nvlink": nvlink,
        "sweep": sweep,
        "activations": activations,
        "overlap": overlaps,
        "symmetric_memory": dict.fromkeys(VARIANTS, "not available: the run ended before it"),
    }


def _symmetric_memory(recipe: Recipe, nvlink: dict[str, Any] | str, groups: ProcessGroups) -> dict[str, Any]:
    if groups.device.type == "cuda":
        torch.cuda.empty_cache()  # symmetric memory comes from an allocator of its own
    results = time_symmetric_memory(recipe.sizes, recipe.dtype, recipe.budget, groups)
    return {
        name: [against_peak(record, nvlink) for record in result] if isinstance(result, list) else result
        for name, result in results.items()
    }


if __name__ == "__main__":
    guarded(lambda: drive(run, check, parse(Flags, sys.argv[1:])))
