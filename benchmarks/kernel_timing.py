"""Times of a kernel's contestants: in CUDA graphs, with inputs that are not in L2, taking turns."""

from __future__ import annotations

import gc
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor

from benchmarks.kernel_contestants import Contestant, Inputs, inputs_of
from benchmarks.kernel_targets import Case, Direction, minimum_bytes, products_flops, verdicts

Call = Callable[[], Any]
Sample = Callable[[], float]
"""Seconds of one call, of one run of many."""

COLD = 4
"""What a turn through all copies of the inputs and outputs moves, in sizes of L2."""
LARGE = 40
"""Sizes of L2 from which one call alone leaves nothing of use in it: 2.5 % at most would be found there again."""
SHORTEST = 2e-3
"""Seconds that one replay should take at least, so that its start (microseconds) does not count."""
FAST_BYTES, FAST_FLOPS = 4e12, 8e14
"""A second's, of about an H200: to tell how many calls take ``SHORTEST``."""
LAUNCH = 1e-6
"""Seconds that a kernel takes at least, whatever its size."""
HOST_CALLS, HOST_ROUNDS = 100, 9
SMALL_TOKENS, SMALL_WIDTH = 16, 1024
"""A shape whose kernels end before the host is done with the call."""


class Timer(Protocol):
    """How calls are timed."""

    def within(self) -> AbstractContextManager[Any]:
        """Where what belongs to the calls is made: autograd runs a backward where its forward ran."""

    def copies(self, size: int) -> int:
        """Sets of inputs to turn through, for calls that move ``size`` bytes."""

    def prepare(self, calls: Sequence[Call], count: int, capturable: bool) -> Sample:
        """Make ``count`` calls, turning through ``calls``, ready to be timed."""


class GraphTimer:
    """Calls in a CUDA graph between two events; calls that cannot be captured are made one by one between them."""

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        """Not ``cold``: the inputs may be in L2, and calls are few; its times mean nothing."""
        self.stream = torch.cuda.Stream(device)
        self.cache = torch.cuda.get_device_properties(device).L2_cache_size if cold else 0

    def within(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.stream)

    def copies(self, size: int) -> int:
        return cold_copies(size, self.cache)

    def prepare(self, calls: Sequence[Call], count: int, capturable: bool) -> Sample:
        count = count if self.cache else len(calls)

        def run() -> None:
            # As many results are kept as there are sets of inputs: a result in the memory of the one before it would
            # be written to L2 and no further.
            kept: deque[Any] = deque(maxlen=len(calls))
            for call in itertools.islice(itertools.cycle(calls), count):
                kept.append(call())

        torch.cuda.synchronize()
        with self.within():
            for call in itertools.islice(itertools.cycle(calls), max(3, len(calls))):  # compiles, and fills caches
                call()
        torch.cuda.synchronize()
        if capturable:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream):
                run()
            run = graph.replay
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample() -> float:
            with self.within():
                start.record()
                run()
                end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3 / count

        sample()
        return sample


class WallTimer:
    """Calls one by one, by the host's clock: to see that everything runs where there is no GPU."""

    def __init__(self) -> None:
        self.prepared: list[tuple[int, int, bool]] = []
        """What was to be timed: sets of inputs, calls, and whether a graph could hold them."""

    def within(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def copies(self, size: int) -> int:
        return 2 if size else 1

    def prepare(self, calls: Sequence[Call], count: int, capturable: bool) -> Sample:
        self.prepared.append((len(calls), count, capturable))
        for call in calls:
            call()

        def sample() -> float:
            began = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - began) / len(calls)

        return sample


def cold_copies(size: int, cache: int) -> int:
    """Sets of inputs so that a call finds nothing of its own in a ``cache`` of so many bytes; ``size`` 0 is large."""
    return 1 if not size or size >= LARGE * cache else max(2, math.ceil(COLD * cache / size))


def calls_in_a_replay(size: int, flops: int, copies: int) -> int:
    """A multiple of ``copies`` that takes about ``SHORTEST`` seconds, or a little more."""
    seconds = max(size / FAST_BYTES, flops / FAST_FLOPS, LAUNCH)
    return copies * max(1, math.ceil(SHORTEST / seconds / copies))


def calls_of(contestant: Contestant, direction: Direction, inputs: Sequence[Inputs]) -> list[Call]:
    """A call of ``direction`` for each of ``inputs``; it returns what it made."""
    return [_call(contestant, direction, chosen) for chosen in inputs]


def _call(contestant: Contestant, direction: Direction, inputs: Inputs) -> Call:
    given: list[Any] = []
    for name in contestant.arguments:
        value = inputs[name]
        if isinstance(value, Tensor) and name in contestant.trained and not value.requires_grad:
            value = (value.clone() if contestant.writes else value.detach()).requires_grad_()
        given.append(value)
    function = contestant.function
    if contestant.by_hand or direction == "forward":
        return lambda: function(*given)
    trained = [value for name, value in zip(contestant.arguments, given, strict=True) if name in contestant.trained]

    def forward() -> tuple[Tensor, ...]:
        made = function(*given)
        return made if isinstance(made, tuple) else (made,)

    outputs = forward()
    # Of losses ones, as a sum of them has; of activations numbers like themselves.
    gradients = [torch.ones_like(y) if y.dim() < 2 else torch.randn_like(y) for y in outputs]
    if direction == "backward":
        return lambda: torch.autograd.grad(outputs, trained, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), trained, gradients)


def clone_calls(size: int, copies: int, device: torch.device) -> list[Call]:
    """``torch.clone`` of tensors so large that it moves ``size`` bytes."""
    tensors = [torch.zeros(max(1, size // 4), dtype=torch.bfloat16, device=device) for _ in range(copies)]
    return [tensor.clone for tensor in tensors]


def measure(
    case: Case,
    direction: Direction,
    entrants: dict[str, Contestant | str],
    device: torch.device,
    timer: Timer,
    rounds: int,
) -> dict[str, Any]:
    """The record of a case and direction; who cannot take part is in it with the reason.

    Raises:
        Exception: Argonne's own kernel failed, or the clone.
    """
    import torch._functorch.config as compiled

    size, flops = minimum_bytes(case, direction), products_flops(case)
    copies = timer.copies(size)
    count = calls_in_a_replay(size, flops, copies)
    inputs = [inputs_of(case, device, seed) for seed in range(copies)]
    samples: dict[str, Sample] = {}
    absent: dict[str, str] = {}
    if size:
        with timer.within():
            calls = clone_calls(size, copies, device)
        samples["torch.clone"] = timer.prepare(calls, count, True)
    for name, entrant in entrants.items():
        if isinstance(entrant, str):
            absent[name] = entrant
        elif direction not in entrant.directions:
            absent[name] = f"has no {direction} alone"
        else:
            try:
                # A compiled backward would otherwise give away what a second one needs.
                with compiled.patch(donated_buffer=False):
                    with timer.within():
                        calls = calls_of(entrant, direction, inputs)
                    samples[name] = timer.prepare(calls, count, entrant.capturable)
            except Exception as error:
                if name == "argonne":
                    raise
                absent[name] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
    seconds: dict[str, list[float]] = {name: [] for name in samples}
    for _ in range(rounds):
        for name, sample in samples.items():
            seconds[name].append(sample())
    middle = {name: median(values) for name, values in seconds.items()}
    return {
        "kernel": case.kernel,
        "direction": direction,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "bytes": size,
        "flops": flops,
        "copies": copies,
        "calls": count,
        "contestants": {name: _times(name, seconds, middle, size, entrants) for name in seconds} | absent,
        "targets": verdicts(case, direction, middle),
    }


def _times(
    name: str,
    seconds: dict[str, list[float]],
    middle: dict[str, float],
    size: int,
    entrants: dict[str, Contestant | str],
) -> dict[str, Any]:
    entrant = entrants.get(name)
    found: dict[str, Any] = {
        "median_us": middle[name] * 1e6,
        "min_us": min(seconds[name]) * 1e6,
        "max_us": max(seconds[name]) * 1e6,
        "timed": "graph" if not isinstance(entrant, Contestant) or entrant.capturable else "eager",
        "of_clone": None,
        "gb_per_s": None,
    }
    if size:
        found["of_clone"] = median(c / own for c, own in zip(seconds["torch.clone"], seconds[name], strict=True))
        found["gb_per_s"] = size / middle[name] / 1e9
    return found


def host_microseconds(case: Case, entrant: Contestant, device: torch.device, calls: int = HOST_CALLS) -> float:
    """What an eager forward call costs the host, with gradients wanted, at a shape that costs a GPU next to nothing."""
    small = {name: min(getattr(case, name), SMALL_WIDTH) for name in ("hidden", "feed_forward", "vocabulary")}
    tensors = inputs_of(replace(case, tokens=SMALL_TOKENS, **small), device)
    call = _call(entrant, "forward", tensors)
    rounds = []
    collects = gc.isenabled()
    gc.disable()
    try:
        for _ in range(HOST_ROUNDS if calls > 1 else 2):
            wait(device)
            began = time.perf_counter()
            for _ in range(calls):
                call()
            rounds.append((time.perf_counter() - began) / calls)
    finally:
        if collects:
            gc.enable()
    wait(device)
    return median(rounds[1:]) * 1e6  # the first compiles


def wait(device: torch.device) -> None:
    """Until the device has done everything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
