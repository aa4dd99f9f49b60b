"""Weight gradients on request: a zero-bubble pipeline computes them when a stage would wait (arXiv 2401.10241).

Within ``deferring(queue)`` the backward of the parallel linear layers computes the gradient of its input only,
which the stage before waits for, and appends to ``queue`` what computes and accumulates the weight's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Queue = list[Callable[[], None]]

_queue: Queue | None = None  # of the pass that runs; backward may run in another thread than the one that began it


@contextmanager
def deferring(queue: Queue) -> Iterator[None]:
    """Run a forward or backward pass whose weight gradients are put off; forwards need it to be able to."""
    global _queue
    before, _queue = _queue, queue
    try:
        yield
    finally:
        _queue = before


def current_queue() -> Queue | None:
    """Where weight gradients go now; None: they are computed at once."""
    return None if torch.compiler.is_compiling() else _queue


@torch.no_grad()
def accumulate(parameter: nn.Parameter, gradient: Tensor) -> None:
    """Add to ``parameter.grad`` as a backward pass would, and call the hooks that it would."""
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad.add_(gradient)
    for hook in list((parameter._post_accumulate_grad_hooks or {}).values()):
        hook(parameter)
