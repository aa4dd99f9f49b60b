"""A log of every collective that this process takes part in, for tests, benchmarks and debugging.

    with record(model) as log:
        model(x).sum().backward()
    print(log)

Every collective of ``argonne.parallel`` announces itself here before it starts. What ``torch.compile`` has
compiled is not seen: its collectives are nodes of the graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from argonne.parallel.communication.agreement import Agreement
from argonne.parallel.communication.groups import Axis, ProcessGroups


@dataclass
class Collective:
    """One collective, as this process saw it."""

    op: str
    """``all_reduce | all_gather | all_to_all | reduce_scatter | broadcast | exchange | transfer |
    gather_objects | barrier``. What ``torch.distributed.pipelining`` and FSDP send is not seen."""
    axis: str
    """The name of the axis: ``tensor``, ``data``, ``world``, ..."""
    ranks: tuple[int, ...]
    """The global ranks that take part."""
    shape: tuple[int, ...]
    """Of the tensor that this process hands in."""
    dtype: torch.dtype | None
    """None for collectives without a tensor."""
    bytes: int
    """Of the whole tensor: what an all-reduce sums, an all-gather returns, and a reduce-scatter or an all-to-all takes.
    So an all-reduce of n bytes moves as much as one of these and an all-gather of n bytes each. 0 without one."""
    module: str
    """The innermost module at whose call the collective belongs, by its name in the model; ``""`` for none."""
    phase: str
    """``forward`` (also when it is computed again during backward), ``backward``, or ``outside``: no module is
    running (losses, gradient reduction, norms, saves)."""
    is_async: bool
    """Whether other work may run between its start and its wait."""
    started: float
    """When it was issued, in seconds of ``time.perf_counter``."""
    finished: float = float("inf")
    """When its wait returned (with NCCL: when this process's stream was told to wait); infinite until then."""

    def __str__(self) -> str:
        what = f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')} " if self.dtype else ""
        where = f" at {self.module} ({self.phase})" if self.module else f" ({self.phase})"
        return f"{self.op} {what}over {self.axis} (ranks {', '.join(map(str, self.ranks))}){where}"


@dataclass
class Log:
    """The collectives of one ``record`` block, in the order in which this process issued them."""

    collectives: list[Collective] = field(default_factory=list)

    def select(self, module: str | None = None, **fields: Any) -> list[Collective]:
        """Those whose fields have these values, within ``module`` (itself and what it contains)."""
        return [
            c
            for c in self.collectives
            if (module is None or c.module == module or c.module.startswith(module + "."))
            and all(getattr(c, name) == value for name, value in fields.items())
        ]

    def bytes(self, module: str | None = None, **fields: Any) -> int:
        """The bytes of ``select(...)``, added up."""
        return sum(c.bytes for c in self.select(module, **fields))

    def __str__(self) -> str:
        """One line for each collective: its span in milliseconds from the first, its bytes, what and where."""
        if not self.collectives:
            return "no collectives"
        origin = self.collectives[0].started
        return "\n".join(
            f"{1e3 * (c.started - origin):10.3f} .. {1e3 * (c.finished - origin):10.3f} ms"
            f"{' async' if c.is_async else '      '} {c.bytes:>12,} B  {c}"
            for c in self.collectives
        )


class _Recorder:
    """The state of a ``record`` block: the log, which module is running, and the checking mode if it is on."""

    def __init__(self, model: nn.Module | None, agreement: Agreement | None) -> None:
        self.log = Log()
        self.names = {module: name for name, module in model.named_modules()} if model is not None else {}
        self.running: list[str] = []
        self.agreement = agreement

    def enter(self, module: nn.Module, inputs: Any) -> None:
        self.running.append(self.names.get(module, type(module).__name__))

    def leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.running.pop()


_recorder: _Recorder | None = None  # a debugging aid of this process; no layer reads it


def site() -> str:
    """The module that is running, for a region function to hand to the collectives of its backward."""
    if torch.compiler.is_compiling() or _recorder is None:
        return ""
    return _recorder.running[-1] if _recorder.running else ""


def announce(
    op: str, axis: Axis, tensor: Tensor | None = None, site: str | None = None, is_async: bool = False
) -> Collective | None:
    """Say that this process is about to issue ``op``; ``site`` is given by backwards only.

    Raises:
        CollectiveMismatch: in checking mode, the ranks are not about to issue the same collective.
    """
    if _recorder is None:
        return None
    running = _recorder.running
    module = site if site is not None else running[-1] if running else ""
    phase = "backward" if site is not None else "forward" if running else "outside"
    shape, dtype, size = ((), None, 0) if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.nbytes)
    size *= axis.size if op == "all_gather" else 1
    entry = Collective(
        op, axis.name, axis.ranks, shape, dtype, size, module, phase, is_async, started=time.perf_counter()
    )
    if _recorder.agreement is not None:
        _recorder.agreement.check(entry.ranks, str(entry))
        entry.started = time.perf_counter()
    _recorder.log.collectives.append(entry)
    return entry


def is_recording() -> bool:
    """Whether a block of ``record`` is open."""
    return _recorder is not None


def is_checking() -> bool:
    """Whether a block of ``record(check=...)`` is open over several ranks, so that costly checks are welcome."""
    return _recorder is not None and _recorder.agreement is not None


def complete(entry: Collective | None) -> None:
    """Say that the result of ``entry`` has been waited for."""
    if entry is not None:
        entry.finished = time.perf_counter()


@contextmanager
def record(model: nn.Module | None = None, check: ProcessGroups | None = None, patience: float = 5.0) -> Iterator[Log]:
    """Record every collective that this process issues inside the block.

    Args:
        model: names the modules; without it they are called by their class.
        check: also compare the sequences of all ranks of these groups, before anything is sent: the first
            difference is reported in one line, instead of a hang or of mixed-up data. Entering and leaving
            are then collective over all ranks. Slow: for debugging.
        patience: seconds that a rank waits in checking mode for the others to arrive at the same collective;
            at both ends of the block it is a minute at least.

    Raises:
        CollectiveMismatch: the same on every rank: at the collective at which the ranks differ, or where a
            rank would next meet one of those, the end of the block at the latest.
        RuntimeError: another ``record`` block is active.
    """
    global _recorder
    if _recorder is not None:
        raise RuntimeError("record() is active already; its blocks do not nest")
    agreement = None
    if check is not None and check.world.size > 1:
        agreement = Agreement(check.world.rank, check.world.ranks, patience)
    recorder = _Recorder(model, agreement)
    hooks: Sequence[Any] = (
        nn.modules.module.register_module_forward_pre_hook(recorder.enter),
        nn.modules.module.register_module_forward_hook(recorder.leave, always_call=True),
    )
    _recorder = recorder
    try:
        with agreement or nullcontext():
            yield recorder.log
    finally:
        _recorder = None
        for hook in hooks:
            hook.remove()
