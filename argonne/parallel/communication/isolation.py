"""Collectives that reach nobody: a rank computes alone what takes as much memory as with the others.

    with isolated():
        model(x).sum().backward()

Where memory may run out on one rank, the others must not be waiting for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_depth = 0  # of the blocks of ``isolated`` in this process


def is_isolated() -> bool:
    """Whether nothing can be heard of other ranks."""
    return _depth > 0


@contextmanager
def isolated() -> Iterator[None]:
    """Within, every collective of this process ends at once, in the memory that it was given, and nothing is sent.

    That holds for everything that goes through ``torch.distributed``, FSDP2's and the pipelines' too, outside
    ``torch.compile``. A rank finds what it has itself in place of what others would have sent, and ones where it only
    receives: numbers that are finite where its own are, and the vote of PyTorch's pipelines for shapes that are stated.
    """
    global _depth
    several_at_once = dist.batch_isend_irecv
    dist.batch_isend_irecv = _one_by_one  # NCCL counts the messages of a batch
    _depth += 1
    try:  # a lone process has no collectives, and looking for them costs as much as a small operator
        with _Isolated() if dist.is_initialized() else nullcontext():
            yield
    finally:
        _depth -= 1
        dist.batch_isend_irecv = several_at_once


def unobserved() -> AbstractContextManager[None]:
    """For what cannot be made while operators are replaced: within ``isolated``, a block in which they are not."""
    return _disable_current_modes() if is_isolated() else nullcontext()


class _Isolated(TorchDispatchMode):
    """Takes the place of the operators that ``torch.distributed`` hands its tensors to."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "c10d":
            return func(*args, **(kwargs or {}))
        if fill := _FILLING.get(func.overloadpacket):
            fill(*args[:2])
        work = _done()
        return (args[0], work) if len(func._schema.returns) > 1 else work


def _done() -> Any:
    """What a collective returns that has been waited for."""
    from torch._C._distributed_c10d import FakeWork

    return FakeWork().boxed()


def _one_by_one(p2p_op_list: list[dist.P2POp]) -> list[dist.Work]:
    for operation in p2p_op_list:
        if operation.op is dist.irecv:
            operation.tensor.fill_(1)
    return []


@torch.no_grad()
def _repeat(output: torch.Tensor, own: torch.Tensor) -> None:
    for part in output.view(-1).split(own.numel()) if own.numel() else ():  # of FSDP2 one of them is ``own``
        part.copy_(own.reshape(-1))


@torch.no_grad()
def _keep_first(output: torch.Tensor, own: torch.Tensor) -> None:
    kept = min(output.numel(), own.numel())
    output.view(-1)[:kept].copy_(own.reshape(-1)[:kept])
    output.view(-1)[kept:].fill_(1)  # of unequal parts, more is received than is sent


@torch.no_grad()
def _repeat_each(outputs: Sequence[Sequence[torch.Tensor]], own: Sequence[torch.Tensor]) -> None:
    for of_ranks, tensor in zip(outputs, own, strict=True):
        for output in of_ranks:
            output.copy_(tensor)


@torch.no_grad()
def _fill(tensors: Sequence[torch.Tensor], *_: Any) -> None:
    for tensor in tensors:
        tensor.fill_(1)


# What is left out here leaves in place what was there: sums, broadcasts, messages that are sent.
_FILLING: dict[Any, Any] = {
    torch.ops.c10d._allgather_base_: _repeat,
    torch.ops.c10d.allgather_: _repeat_each,
    torch.ops.c10d._reduce_scatter_base_: _keep_first,
    torch.ops.c10d.alltoall_base_: _keep_first,
    torch.ops.c10d.recv_: _fill,
}
