"""What a training step of one device costs, and where its time goes. ``python benchmarks/pretrain_step.py``

A contestant is a choice of the kernels (of torch, of Triton), of eager or compiled blocks, of what is recomputed in
backward and of the attention; ``--contest kernels`` or ``memory`` says which of them take part (``contestants`` of
``step_contestants.py``). A step is the loss of one micro-batch of random tokens, its backward and AdamW (fused, no
gradient clipping). *Compiled* are the forward and backward of each transformer block, as a run compiles them; the
embedding, the last norm, the head with its loss and the optimizer are eager in every contestant. Triton's kernels need
CUDA, or its interpreter; on a CPU torch's run alone, and compiled only with ``--compile on``.

All contestants take turns in one process on one set of weights and moments. The learning rate is zero: AdamW does all
its work and the weights stay, so every step of every contestant is the same one, and their losses and gradient norms
must agree. Each ratio is of one round, so that a slow minute of the machine falls on all of them; the other figures
are of each contestant's median round.

- step: the wall time of a turn, synchronised at both ends, over its steps. Forward, backward and optimizer are measured
  inside it, between CUDA events on a GPU. The head makes its gradients in forward, as the loss is fused with it.
- MFU = tokens/s x FLOPs of a token / peak. FLOPs of a token are ``ArgonneConfig.flops_per_token``: 6N +
  6 x layers x heads x head_dim x sequence, N being every parameter but an embedding that is not also the head, and
  attention causal. Others count attention as if it were not: 12 in place of the second 6, the second figure. What is
  recomputed is not counted in either. The peak is the device's dense bfloat16 peak
  from its data sheet; without one (a CPU), or in float32, MFU is not known.
- memory: the peak of a turn by ``torch.cuda.max_memory_allocated``, weights and moments included. On a CPU: the bytes
  of weights, moments and batch, and the most that the profiled step held of PyTorch's allocator beyond them.
  The closed form beside it is of what stays, gradients and what blocks keep for backward
  (``argonne/models/activations.py``), not of what comes and goes within a block.
- kernels: of one more step, under the profiler: CUDA kernels and copies by their time, operators on a CPU by their time
  without what they call. The attention backend is read from the names that ran in it.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # for a start as a script

from argonne.launch import guarded, parse, world_size
from argonne.models import ArgonneConfig, preset
from argonne.models.config import PRESETS
from argonne.parallel import ArgonneError, choose_device
from argonne.training.metrics import peak_flops
from benchmarks.kept import Kept, where
from benchmarks.memory import USABLE, available_memory
from benchmarks.report import environment, table
from benchmarks.step_contestants import (
    LOSS_TOLERANCE,
    NORM_TOLERANCE,
    PHASES,
    Contestant,
    Record,
    Trainer,
    contestants,
    measure,
)

_COUNTS = ("mfu", "mfu_uncut_attention")
_MEMORY = ("peak_memory_bytes", "closed_form_bytes")
NAME_WIDTH = 90
"""Of a kernel's name on screen; templates make some a thousand letters long."""
STATE_BYTES = 16
"""Of each parameter: its float32 weight, gradient and two moments."""


@dataclass(frozen=True)
class Flags:
    """What to train, and how often."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run [CUDA when there is one]."""
    preset: str | None = None
    """A named shape [argonne-2.5-1b on CUDA, demo on CPU]."""
    sequence: int | None = None
    """Tokens in a sequence [4096 on CUDA, 256 on CPU]."""
    micro_batch: int | None = None
    """Sequences in a step [4 on CUDA, 2 on CPU]."""
    rounds: int = 5
    """Turns of each contestant."""
    steps: int = 3
    """Timed steps in a turn."""
    warmup: int = 1
    """Steps before them in each turn: the allocator gets used to another contestant's sizes."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Compute dtype; weights and moments are kept in float32 [bf16 on CUDA, fp32 on CPU]."""
    compile: Literal["auto", "on", "off"] = "auto"
    """Whether compiled contestants take part too [on CUDA they do]."""
    contest: Literal["kernels", "memory"] = "kernels"
    """Who takes part: kernels of torch and of Triton, eager and compiled; or recomputation and attention."""
    resume: bool = False
    """Go on with what the output has of such a machine, with the same flags."""
    output: Path | None = None
    """The JSON to write [benchmarks/results/pretrain_step_<cpu, or the preset>.json]."""

    def settled(self, device: torch.device) -> Flags:
        """With the defaults of the device. Raises ``ArgonneError`` for what cannot run on it."""
        on_gpu = device.type == "cuda"
        defaults: dict[str, Any] = {"preset": "argonne-2.5-1b", "sequence": 4096, "micro_batch": 4}
        if not on_gpu:
            defaults = {"preset": "demo", "sequence": 256, "micro_batch": 2}
        chosen = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        chosen["precision"] = {"auto": "bf16" if on_gpu else "fp32"}.get(self.precision, self.precision)
        chosen["compile"] = {"auto": "on" if on_gpu else "off"}.get(self.compile, self.compile)
        flags = replace(self, **chosen)
        name = flags.preset if on_gpu else "cpu"
        return replace(flags, output=self.output or Path(__file__).parent / "results" / f"pretrain_step_{name}.json")

    @property
    def config(self) -> ArgonneConfig:
        shape = preset(self.preset)
        return replace(shape, max_position_embeddings=max(self.sequence, shape.max_position_embeddings))

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.micro_batch * self.sequence


def check(flags: Flags, available: int) -> None:
    """Raise ``ArgonneError`` unless settled ``flags`` are legal and the state fits ``available`` bytes."""
    if world_size() != 1:
        raise ArgonneError(f"WORLD_SIZE={world_size()}, but this is a benchmark of one process; legal: 1")
    for name, least in {"sequence": 1, "micro_batch": 1, "rounds": 1, "steps": 1, "warmup": 0}.items():
        if getattr(flags, name) < least:
            raise ArgonneError(f"{name}={getattr(flags, name)} is not legal; legal: {least} or more")
    need = STATE_BYTES * flags.config.parameter_count
    if need > available * USABLE:
        legal = [n for n, c in PRESETS.items() if STATE_BYTES * c.parameter_count <= available * USABLE]
        raise ArgonneError(
            f"preset={flags.preset!r} needs {need / 2**30:.1f} GiB for weights, gradients and moments, and "
            f"{available / 2**30:.1f} GiB are free; legal here: {', '.join(legal) or 'none'}"
        )


def figures(contestant: Contestant, record: Record, base: Record, flags: Flags, peak: float | None) -> dict[str, Any]:
    """All that is reported of a contestant, as JSON values; null where it failed or is not known."""
    found: dict[str, Any] = {**asdict(contestant), "failure": record.failure, "ratio": None, "tokens_per_second": None}
    found |= {f"{name}_seconds": None for name in ("step", *PHASES)}
    found |= {"mfu": None, "mfu_uncut_attention": None, "peak_memory_bytes": None, "closed_form_bytes": None}
    found |= {"first_loss": record.first_loss, "gradient_norm": record.gradient_norm, "rounds": record.turns}
    if record.failure is None:
        typical = sorted(record.turns, key=lambda turn: turn["step"])[(len(record.turns) - 1) // 2]
        rate = flags.tokens / typical["step"]
        found |= {f"{name}_seconds": seconds for name, seconds in typical.items()}
        found |= {"tokens_per_second": rate, "peak_memory_bytes": record.peak_memory}
        found["closed_form_bytes"] = record.closed_form
        found["ratio"] = median(a["step"] / b["step"] for a, b in zip(base.turns, record.turns, strict=True))
        if peak is not None:
            count = flags.config.flops_per_token(flags.sequence)
            found["mfu"] = rate * count / peak
            found["mfu_uncut_attention"] = rate * (2 * count - flags.config.flops_per_token(0)) / peak
    seen = record.profile
    found["profile"] = seen and {
        "attention_backend": seen.attention_backend,
        "attention_kernels": seen.attention_kernels,
        "kernel_seconds": seen.kernel_seconds,
        "most_expensive_kernels": seen.kernels,
    }
    return found


def report(flags: Flags, device: torch.device, records: dict[Contestant, Record]) -> dict[str, Any]:
    """What is to be written as JSON. Raises ``ArgonneError`` when no contestant came to the end."""
    peak = peak_flops(device) if flags.precision == "bf16" else None
    base = next((c for c, r in records.items() if r.failure is None), None)
    if base is None:
        raise ArgonneError(f"no contestant came to the end: {next(iter(records.values())).failure}")
    machine = environment(device) | {"threads": torch.get_num_threads()}
    if device.type == "cuda":
        machine["triton"] = version("triton")
    compiled = None
    if flags.compile == "on":
        from torch._dynamo.utils import counters  # brings the compiler, which takes seconds to import

        compiled = {"what": "each block's forward and backward", "graphs": counters["stats"]["unique_graphs"]}
        compiled["graph_breaks"] = sum(counters["graph_break"].values())
        compiled["reasons"] = [reason.partition("\n")[0][:200] for reason in counters["graph_break"]]
    return {
        "benchmark": "pretrain_step",
        "environment": machine,
        "contest": flags.contest,
        **{name: getattr(flags, name) for name in ("preset", "sequence", "micro_batch", "precision")},
        **{name: getattr(flags, name) for name in ("rounds", "steps", "warmup")},
        "config": asdict(flags.config),
        "parameters": flags.config.parameter_count,
        "flops_per_token": flags.config.flops_per_token(flags.sequence),
        "peak_flops": peak,
        "loss_tolerance": LOSS_TOLERANCE[flags.precision],
        "gradient_norm_tolerance": NORM_TOLERANCE[flags.precision],
        "compiled": compiled,
        "ratio_to": base.name,
        "contestants": {c.name: figures(c, r, records[base], flags, peak) for c, r in records.items()},
    }


def show(found: dict[str, Any]) -> None:
    """The same as tables on screen: the kernels of each contestant, then the contestants."""
    rows = []
    backends: dict[str, list[str]] = {}
    for name, own in found["contestants"].items():
        if (seen := own["profile"]) is not None:
            kernels = [
                (k["name"][:NAME_WIDTH], k["calls"], f"{1e3 * k['seconds']:.2f}", f"{k['share']:.1%}")
                for k in seen["most_expensive_kernels"]
            ]
            print(f"\n{name}: the most expensive of {1e3 * seen['kernel_seconds']:.1f} ms of kernels in a step")
            print(table(("kernel", "calls", "ms", "share"), kernels))
            backends.setdefault(seen["attention_backend"], []).append(name)
        if own["failure"] is not None:
            rows.append((name, "-", own["failure"][:60], *"--------"))
            continue
        times = [f"{1e3 * own[f'{part}_seconds']:.1f}" for part in ("step", *PHASES)]
        mfu = [f"{own[count]:.1%}" if own[count] is not None else "not known" for count in _COUNTS]
        memory = [f"{own[of] / 2**30:.2f}" if own[of] is not None else "-" for of in _MEMORY]
        rows.append((name, f"{own['ratio']:.2f}", *times, f"{own['tokens_per_second']:,.0f}", *mfu, *memory))
    machine = found["environment"]
    print(
        f"\n{found['preset']}, {found['micro_batch']} x {found['sequence']} tokens, {found['precision']}, "
        f"{machine.get('gpu', machine['cpu'])}, torch {machine['torch']}; medians of {found['rounds']} rounds"
    )
    header = (
        "contestant",
        f"x {found['ratio_to']}",
        "step ms",
        *PHASES,
        "tokens/s",
        "MFU",
        "uncut",
        "peak GiB",
        "closed form",
    )
    print(table(header, rows))
    for backend, names in backends.items():
        print(f"attention that ran: {backend} ({'all' if len(names) == len(rows) else '; '.join(names)})")
    if (compiled := found["compiled"]) is not None:
        print(f"compiled: {compiled['what']}; {compiled['graphs']} graphs, {compiled['graph_breaks']} graph breaks")
        print("".join(f"graph break: {reason}\n" for reason in compiled["reasons"]), end="")


def run(flags: Flags) -> None:
    """Measure, print the tables, write the JSON."""
    device = choose_device(flags.device)
    flags = flags.settled(device)
    check(flags, available_memory(device))
    kept = _kept(flags, device)
    if not kept.complete:
        trainer = Trainer(flags.config, (flags.micro_batch, flags.sequence), flags.precision, device)
        taking_part = contestants(device, flags.compile == "on", flags.contest)
        records = measure(trainer, taking_part, flags.rounds, flags.steps, flags.warmup, kept)
        kept.end(**report(flags, device, records))
    show(kept.found)
    print(f"\nwritten: {flags.output}")


def _kept(flags: Flags, device: torch.device) -> Kept:
    """What has been measured with such flags, if that is wanted."""
    names = ("preset", "sequence", "micro_batch", "precision", "rounds", "steps", "warmup", "contest")
    settings = {name: getattr(flags, name) for name in (*names, "compile")}
    machine = environment(device)
    told = {"benchmark": "pretrain_step", "environment": machine}
    return Kept(flags.output, where(machine.get("gpu")) | {"settings": settings}, told, flags.resume)


if __name__ == "__main__":
    guarded(lambda: run(parse(Flags, sys.argv[1:])))
