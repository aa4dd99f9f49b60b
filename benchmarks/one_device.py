"""Has a transformer block the same bits at TP 1, 2, 4 and 8? On one device: ``python benchmarks/one_device.py``

The ranks of each layout compute one after the other (``benchmarks/lockstep.py``) what they would compute on a device
each, forward and backward, in canonical blocks. One line a layout says whether the output, the gradient of the input
and the gradients of all weights have the bits of one rank, and those of a second time, as products of one shape must;
the exit status, whether all do. The cost of canonical blocks is timed beside the fast mode, in turns.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.launch import guarded, parse
from argonne.models import ArgonneConfig, Execution, preset
from argonne.models.decoder import Block, RotaryTables
from argonne.parallel import (
    ArgonneError,
    Layout,
    ProcessGroups,
    Region,
    choose_device,
    complete_gradients,
    initialise,
    sharded_parameters,
)
from argonne.parallel.communication.layout import require_blocks
from argonne.parallel.tensor_parallel.precision import resolve_precision
from argonne.training.run.reproducible import settle_process
from benchmarks.kept import Kept, where
from benchmarks.lockstep import in_lockstep
from benchmarks.report import environment


@dataclass(frozen=True)
class Flags:
    """What to compute, at which sizes of tensor parallelism."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where [CUDA when there is one]."""
    preset: str = "argonne-2.0-2b"
    """The shape whose block it is."""
    tensor: tuple[int, ...] = (1, 2, 4, 8)
    """Ranks, of each layout."""
    blocks: int = 8
    """Canonical blocks."""
    tokens: int | None = None
    """Of one sequence [4096 on CUDA, 64 on CPU]."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype [bf16 on CUDA, fp32 on CPU]."""
    rounds: int = 10
    """Timed turns."""
    resume: bool = False
    """Go on with what the output has of such a machine, with the same flags."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/one_device_<device>.json]."""


@dataclass(frozen=True)
class Computed:
    """What one rank has after a forward and a backward pass."""

    output: Tensor
    input_gradient: Tensor
    parts: list[tuple[Region, Tensor]]
    """Of the gradients of whole tensors."""


def check(flags: Flags) -> None:
    """Raise ``ArgonneError`` for what cannot be shared out."""
    shape = preset(flags.preset)
    for ranks in flags.tensor:
        require_blocks(flags.blocks, ranks)
        shape.check_layout(Layout(tensor=ranks))
    if flags.rounds < 1 or (flags.tokens is not None and (flags.tokens < 1 or flags.tokens % flags.blocks)):
        raise ArgonneError(
            f"rounds={flags.rounds}, tokens={flags.tokens} are not legal; legal: 1 or more, and multiples of "
            f"blocks={flags.blocks} tokens"
        )


def program_of(
    shape: ArgonneConfig, flags: Flags, tokens: int, blocks: int | None
) -> Callable[[ProcessGroups], Callable[[], Computed]]:
    """Makes a rank's part of the block, and what passes the same random values through it."""

    def build(groups: ProcessGroups) -> Callable[[], Computed]:
        execution = Execution(groups, resolve_precision(flags.precision, groups.device), reproducible=blocks)
        groups = execution.groups
        with groups.device:
            block = Block(shape, execution)
        parameters = sharded_parameters(block, groups)
        initialise(parameters, seed=1)
        inputs = RotaryTables(shape, execution).inputs(tokens)
        x, gradient = (drawn(tokens, shape.hidden_size, seed, execution) for seed in (2, 3))

        def run() -> Computed:
            block.zero_grad()
            mine = x.clone().requires_grad_()
            output = block(mine, inputs)
            output.backward(gradient)
            complete_gradients(parameters, groups)
            assert mine.grad is not None
            parts = [
                (region, region.part_of(s.parameter.grad).clone()) for s in parameters for region in s.spec.regions
            ]
            return Computed(output.detach(), mine.grad, parts)

        return run

    return build


def drawn(tokens: int, width: int, seed: int, execution: Execution) -> Tensor:
    values = torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))
    return values.to(execution.groups.device, execution.precision.compute)


def differences(ranks: list[Computed], alone: Computed) -> list[str]:
    """What has other bits than one rank has, by name."""
    whole = {region.name: part for region, part in alone.parts}
    found = set()
    for each in ranks:
        pairs = [("output", each.output, alone.output), ("input gradient", each.input_gradient, alone.input_gradient)]
        pairs += [(region.name, part, whole[region.name][region.whole_index]) for region, part in each.parts]
        found |= {name for name, part, expected in pairs if not torch.equal(part, expected)}
    return sorted(found)


def repeats(ranks: list[Computed], again: list[Computed]) -> bool:
    """Whether each rank has the same bits a second time."""
    return all(
        torch.equal(x, y)
        for one, two in zip(ranks, again, strict=True)
        for x, y in zip(_tensors(one), _tensors(two), strict=True)
    )


def _tensors(found: Computed) -> list[Tensor]:
    return [found.output, found.input_gradient, *(part for _, part in found.parts)]


def cost(shape: ArgonneConfig, flags: Flags, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds of a forward and a backward pass of one rank: fast, and in canonical blocks; medians of turns."""
    groups = ProcessGroups.single(device)
    programs = {name: program_of(shape, flags, tokens, b)(groups) for name, b in _ways(flags).items()}
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(flags.rounds + 1):
        for name, program in programs.items():
            _wait(device)
            began = time.perf_counter()
            program()
            _wait(device)
            if round_:
                seconds[name].append(time.perf_counter() - began)
    return {name: median(times) for name, times in seconds.items()}


def _ways(flags: Flags) -> dict[str, int | None]:
    return {"fast": None, f"{flags.blocks} blocks": flags.blocks}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def run(flags: Flags) -> int:
    """Print the table and write the JSON; 0 if every layout has the bits of one rank."""
    check(flags)
    device = choose_device(flags.device)
    settle_process(device)
    tokens = flags.tokens or (4096 if device.type == "cuda" else 64)
    shape = preset(flags.preset)
    shape = replace(shape, max_position_embeddings=max(tokens, shape.max_position_embeddings))
    build = program_of(shape, flags, tokens, flags.blocks)
    output = flags.output or Path(__file__).parent / "results" / f"one_device_{device.type}.json"
    machine = environment(device)
    model = {"preset": flags.preset, "tokens": tokens, "blocks": flags.blocks, "precision": flags.precision}
    identity = where(machine.get("gpu")) | {"settings": {**model, "rounds": flags.rounds, "tensor": flags.tensor}}
    kept = Kept(output, identity, {"benchmark": "one_device", "environment": machine, **model}, flags.resume)
    if not all(_name(ranks) in kept for ranks in flags.tensor):
        (alone,), _, _ = in_lockstep(Layout(), device, build)
    records: list[dict[str, Any]] = []
    for ranks in flags.tensor:
        if _name(ranks) not in kept:
            results, again, collectives = in_lockstep(Layout(tensor=ranks), device, build)
            record = {"differs": differences(results, alone), "repeats": repeats(results, again)}
            kept.keep(_name(ranks), {"tensor": ranks, "collectives": collectives, **record})
        records.append(kept.cases[_name(ranks)])
        print(_line(records[-1]), flush=True)
    seconds = kept.measured("cost", lambda: cost(shape, flags, tokens, device))
    fast, in_blocks = seconds.values()
    print(f"{flags.blocks} blocks / fast: {in_blocks / fast:.2f} ({in_blocks * 1e3:.1f} ms / {fast * 1e3:.1f} ms)")
    failures = sum(bool(r["differs"]) or not r["repeats"] for r in records)
    kept.end(failures, records=records, seconds=seconds)
    print(f"written: {output}")
    return int(failures > 0)


def _name(ranks: int) -> str:
    return f"TP {ranks}"


def _line(record: dict[str, Any]) -> str:
    same = ", ".join(record["differs"]) + " differ from one rank" if record["differs"] else "the bits of one rank"
    told = "twice" if record["repeats"] else "and others a second time"
    return f"{_name(record['tensor'])}, {record['collectives']} collectives: {same}, {told}"


if __name__ == "__main__":
    guarded(lambda: sys.exit(run(parse(Flags, sys.argv[1:]))))
