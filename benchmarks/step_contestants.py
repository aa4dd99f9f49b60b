"""The ways to compute one training step, taking turns on one set of weights; see ``pretrain_step.py``."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from argonne.kernels.dispatch import interprets
from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution
from argonne.models.compilation import compile_block
from argonne.models.recompute import Recompute
from argonne.models.replicas import build_replicas
from argonne.parallel import ArgonneError, ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.optimizer import build_optimizer
from argonne.training.run.compilation import prepare_blocks
from benchmarks.kept import Kept
from benchmarks.step_profile import StepProfile, profile_step

LOSS_TOLERANCE = {"bf16": 2e-3, "fp32": 1e-5}
"""Of the first losses, relative to the first contestant's."""
NORM_TOLERANCE = {"bf16": 2e-2, "fp32": 1e-3}
"""Of the first gradients' norms: each gradient is rounded more often than the loss."""
PHASES = ("forward", "backward", "optimizer")

Result = TypeVar("Result")


@dataclass(frozen=True)
class Contestant:
    """One way to compute the step."""

    kernels: Literal["torch", "triton"]
    compiled: bool = False
    recompute: str = "none"
    """As ``--recompute`` has it."""
    attention: str | None = None
    """Of ``BACKENDS``, the one that must be taken; None: as PyTorch chooses."""

    @property
    def name(self) -> str:
        words = [self.kernels, "compiled" if self.compiled else "eager"]
        words += [f"recompute {self.recompute}"] * (self.recompute != "none")
        return ", ".join(words + [f"{self.attention} attention"] * (self.attention is not None))


BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
CONTESTS = ("kernels", "memory")


def contestants(device: torch.device, compiled: bool, contest: str = "kernels") -> list[Contestant]:
    """Those that can run; the first is what the others are compared with.

    ``kernels``: torch's and Triton's, eager and compiled, with full recomputation and none. ``memory``: every kind of
    recomputation, and every attention, with the kernels that the device takes by itself.
    """
    kernels: tuple[Literal["torch", "triton"], ...] = ("torch", "triton")
    if device.type != "cuda" and not interprets():
        kernels = kernels[:1]
    modes = (False, True) if compiled else (False,)
    if contest == "kernels":
        return [Contestant(*choice) for choice in itertools.product(kernels, modes, ("none", "full"))]
    found = [Contestant(kernels[-1])]
    for word in ("full", "selective", "2"):
        found += [Contestant(kernels[-1], mode, word) for mode in modes]
    return found + [Contestant(kernels[-1], attention=name) for name in BACKENDS]


@dataclass
class Record:
    """What is known of a contestant."""

    first_loss: float | None = None
    gradient_norm: float | None = None
    turns: list[dict[str, float]] = field(default_factory=list)
    """Seconds of a step and of each of ``PHASES``, a turn each."""
    peak_memory: int = 0
    """Bytes."""
    closed_form: int | None = None
    """What they should be, about."""
    profile: StepProfile | None = None
    no_profile: str | None = None
    """Why there is none."""
    failure: str | None = None
    """Why there is no more."""

    @classmethod
    def of(cls, kept: dict[str, Any] | None) -> Record:
        """From ``asdict``, by way of JSON."""
        found = cls(**(kept or {}))
        if isinstance(found.profile, dict):
            found.profile = StepProfile(**found.profile)
        return found

    def is_whole(self, rounds: int) -> bool:
        """Whether there is nothing left to measure."""
        profiled = self.profile is not None or self.no_profile is not None
        return self.failure is not None or (len(self.turns) >= rounds and profiled)


class Trainer:
    """The one model, which becomes each contestant in turn."""

    def __init__(
        self,
        config: ArgonneConfig,
        shape: tuple[int, int],
        precision: str,
        device: torch.device,
    ) -> None:
        """``shape`` is of the micro-batch: sequences, and tokens in each."""
        self.device, self.precision = device, precision
        self.execution = Execution(ProcessGroups.single(device), PRECISIONS[precision], kernels="torch")
        model, self.replicas = build_replicas(partial(ArgonneModel, config), self.execution, "replicate")
        assert isinstance(model, ArgonneModel)
        self.model = model
        self.cross_entropy = CrossEntropyLoss()
        self.contestant = Contestant("torch")
        self.model.initialise(seed=0)
        self.replicas.publish()
        self.optimizer = build_optimizer(self.replicas.parameters, weight_decay=0.1)
        generator = torch.Generator().manual_seed(0)
        sequences, tokens = shape
        self.batch = torch.randint(0, config.vocab_size, (sequences, tokens + 1), generator=generator).to(device)
        self.compiled: dict[str, list[Any]] = {}
        """For each choice of kernels, what its blocks' forwards are, compiled."""

    def become(self, contestant: Contestant) -> None:
        """Compute as ``contestant`` does from here on, but for what ``compile`` has to make first."""
        for module in self.model.modules():
            for name in ("backend", "kernels"):
                if hasattr(module, name):
                    setattr(module, name, contestant.kernels)
        self.cross_entropy = CrossEntropyLoss(kernels=contestant.kernels)
        for number, block in enumerate(self.model.blocks):
            block.__dict__.pop("forward", None)
            if contestant.compiled and contestant.kernels in self.compiled:
                block.forward = self.compiled[contestant.kernels][number]
        self.contestant = contestant
        for stage in self.model.stages.values():
            stage.execution = replace(stage.execution, recompute=Recompute.of(contestant.recompute))

    def compile(self) -> None:
        """Compile the blocks for this contestant's kernels as a run does, unless they have been.

        Raises:
            RuntimeError: what keeps the compiler from it.
        """
        if self.contestant.kernels in self.compiled:
            return
        for block in self.model.blocks:
            compile_block(block)
        sequences, tokens = self.batch.shape
        problem = prepare_blocks(self.model, sequences, tokens - 1, documents=False)
        if problem:
            raise RuntimeError(problem)
        self.compiled[self.contestant.kernels] = [block.forward for block in self.model.blocks]

    def loss(self) -> torch.Tensor:
        """In nats, the mean of the micro-batch."""
        batch = Batch(self.batch[:, :-1], self.batch[:, 1:])
        return self.cross_entropy(self.model(batch), self.model.head, batch) / batch.ids.numel()

    def first(self) -> tuple[float, float]:
        """The loss and the norm of its gradient; compiles what is to be compiled."""
        if self.contestant.compiled:
            self.compile()
        loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        self.optimizer.zero_grad()
        return loss.item(), norm.item()

    def step(self) -> list[Any]:
        """One step; the moments around its phases."""
        moments = [self.moment()]
        loss = self.loss()
        moments.append(self.moment())
        loss.backward()
        moments.append(self.moment())
        self.optimizer.step()
        self.replicas.publish()
        self.optimizer.zero_grad()
        moments.append(self.moment())
        return moments

    def turn(self, steps: int, warmup: int) -> tuple[dict[str, float], int]:
        """Seconds of a step and of its phases, the mean of a turn; on a GPU also its peak memory in bytes."""
        for _ in range(warmup):
            self.step()
        self.synchronise()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        began = time.perf_counter()
        taken = [self.step() for _ in range(steps)]
        self.synchronise()
        seconds = {"step": (time.perf_counter() - began) / steps}
        for number, phase in enumerate(PHASES):
            seconds[phase] = sum(_between(*m[number : number + 2]) for m in taken) / steps
        return seconds, torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def held(self) -> int:
        """Bytes of what stays from step to step."""
        moments = [m for state in self.optimizer.state.values() for m in state.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *self.model.buffers(), *moments, self.batch))

    def closed_form(self) -> int | None:
        """Bytes at the peak of an eager step: what stays, gradients, and what blocks keep for backward.

        Left out is what comes and goes within a block, and the logits of some tokens. None where this version has no
        closed form, or the compiler decides what is kept.
        """
        try:
            from argonne.models.activations import Micro, kept_by_blocks
        except ImportError:
            return None
        if self.contestant.compiled:
            return None
        own = self.contestant
        execution = replace(self.execution, kernels=own.kernels, recompute=Recompute.of(own.recompute))
        micro = Micro(execution, len(self.batch), self.batch.shape[1] - 1)
        kept = kept_by_blocks(self.model.widths, micro, range(len(self.model.blocks)))
        copies = sum(module.working.bytes for module in self.replicas.copies)
        return self.held() + sum(p.nbytes for p in self.model.parameters()) + copies + kept

    def moment(self) -> Any:
        """Now, on the device's own clock."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def attempt(self, contestant: Contestant, work: Callable[[], Result], record: Record) -> Result | None:
        """What ``work`` returns, as ``contestant``; None, and the record says why, if it cannot be computed."""
        self.become(contestant)
        try:
            with nullcontext() if contestant.attention is None else sdpa_kernel(BACKENDS[contestant.attention]):
                return work()
        except torch.OutOfMemoryError:
            record.failure = "out of memory"
        except Exception as error:
            if not contestant.compiled and contestant.attention is None:
                raise
            # A compiler's faults are of many types, and no backend of attention takes every shape. The others have
            # been measured, and its row says what it was.
            said = (str(error).strip() or "-").splitlines()[0][:200]
            is_absent = any(words in said for words in ("No available kernel", "No viable backend"))
            record.failure = "not here for this shape" if is_absent else f"{type(error).__name__}: {said}"
        # Not in the handlers: their traceback holds the step's tensors.
        self.optimizer.zero_grad()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None


def _between(earlier: Any, later: Any) -> float:
    return later - earlier if isinstance(later, float) else earlier.elapsed_time(later) / 1e3


def require_agreement(first: dict[str, tuple[float, float]], precision: str) -> None:
    """Raise ``ArgonneError`` unless the first losses and gradient norms agree, by contestant."""
    (base, expected), *others = first.items()
    for name, found in [(base, expected), *others]:
        for what, tolerance, a, b in zip(
            ("loss", "gradient norm"), (LOSS_TOLERANCE, NORM_TOLERANCE), found, expected, strict=True
        ):
            if not abs(a - b) <= tolerance[precision] * abs(b):  # also when one of them is not a number
                raise ArgonneError(
                    f"the first {what} of {name!r} is {a}, but {b} of {base!r}; legal in {precision}: a relative "
                    f"difference of {tolerance[precision]:g} at most"
                )


def measure(
    trainer: Trainer, taking_part: Sequence[Contestant], rounds: int, steps: int, warmup: int, kept: Kept
) -> dict[Contestant, Record]:
    """First steps, which must agree; ``rounds`` turns of each, one after the other; a profiled step each.

    A turn is of ``steps`` steps, after ``warmup`` others. What ``kept`` has by a contestant's name is not measured
    again; of one that is not whole there, the first step is taken once more, as it is what compiles.

    Raises:
        ArgonneError: the first steps do not agree, or none can be taken.
    """
    records = {contestant: Record.of(kept.cases.get(contestant.name)) for contestant in taking_part}
    waiting = {contestant: record for contestant, record in records.items() if not record.is_whole(rounds)}
    for contestant, record in waiting.items():
        began = time.perf_counter()
        found = trainer.attempt(contestant, trainer.first, record)
        if found is not None:
            record.first_loss, record.gradient_norm = found
        kept.keep(contestant.name, asdict(record))
        told = record.failure or f"first step in {time.perf_counter() - began:.1f} s"
        print(f"{contestant.name}: {told}", flush=True)
    first = {c.name: (r.first_loss, r.gradient_norm) for c, r in records.items() if r.failure is None}
    if not first:
        raise ArgonneError(f"no contestant can take a step: {next(iter(records.values())).failure}")
    require_agreement(first, trainer.precision)
    for number in range(rounds):
        for contestant, record in waiting.items():
            if record.failure is not None or len(record.turns) > number:
                continue
            turn = trainer.attempt(contestant, lambda: trainer.turn(steps, warmup), record)
            if turn is not None:
                record.turns.append(turn[0])
                record.peak_memory = max(record.peak_memory, turn[1])
            kept.keep(contestant.name, asdict(record))
        print(f"round {number + 1} of {rounds} done", flush=True)
    for contestant, record in waiting.items():
        if record.failure is None:
            _add_profile(trainer, contestant, record)
            kept.keep(contestant.name, asdict(record))
    return records


def _add_profile(trainer: Trainer, contestant: Contestant, record: Record) -> None:
    profiling = Record()  # what the profiler has no memory for has been timed all the same
    record.profile = trainer.attempt(contestant, lambda: profile_step(trainer.step, trainer.device), profiling)
    record.no_profile, record.closed_form = profiling.failure, trainer.closed_form()
    if record.no_profile is not None:
        print(f"{contestant.name}: no profile, {record.no_profile}", flush=True)
    if record.profile is not None and record.profile.allocated is not None:
        record.peak_memory = trainer.held() + record.profile.allocated
