"""The collectives, wrapped once: over an axis of one process each returns what it is given.

They are not differentiable; ``regions.py`` pairs each with its dual. Every one announces itself to
``recording.py``. Under ``torch.compile`` those on tensors become nodes of the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from argonne.parallel.communication import recording
from argonne.parallel.communication.groups import Axis, Exchanges
from argonne.parallel.communication.isolation import is_isolated
from argonne.parallel.errors import ArgonneError

T = TypeVar("T")

# torch 2.13 renames the two tensor collectives and warns of the old names; 2.11 has the old ones only.
_all_gather_tensor = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_tensor = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass
class Pending:
    """A collective in flight."""

    result: Tensor
    work: Any = None
    entry: recording.Collective | None = None
    in_graph: bool = False
    finish: Callable[[Tensor], Tensor] | None = None
    """What makes the result of what was received, where that is not it yet."""

    def wait(self) -> Tensor:
        """The result, once it may be read."""
        if self.in_graph:
            received = torch.ops._c10d_functional.wait_tensor(self.result)
        else:
            if self.work is not None:
                self.work.wait()
            recording.complete(self.entry)
            received = self.result
        return received if self.finish is None else self.finish(received)


def start_all_reduce(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to sum ``tensor`` (contiguous) over ``axis``; it may be overwritten and must be left alone until waited.

    ``site`` is that of the forward when a backward calls. With ``wait`` nothing is meant to run beside it.
    """
    if axis.group is None:
        return Pending(tensor)
    if torch.compiler.is_compiling():
        result = torch.ops._c10d_functional.all_reduce(tensor, "sum", axis.group.group_name)
        return Pending(result, in_graph=True)
    entry = recording.announce("all_reduce", axis, tensor, site, is_async=not wait)
    if wait and axis.shared is not None and axis.shared.fits(tensor):
        axis.shared.sum(tensor)
        return Pending(tensor, None, entry)
    if (sums := _sums(axis)) is not None:
        return Pending(tensor, sums.sum(tensor), entry)
    work = dist.all_reduce(tensor, group=axis.group, async_op=not wait)
    return Pending(tensor, work, entry)


def start_all_gather(
    tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False, into: Tensor | None = None
) -> Pending:
    """Begin to join every rank's ``tensor`` (equal shapes) along dimension 0, in rank order.

    The result is in ``into`` (contiguous) where it is given, outside ``torch.compile``.
    """
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():
        result = torch.ops._c10d_functional.all_gather_into_tensor(tensor, axis.size, axis.group.group_name)
        return Pending(result, in_graph=True)
    result = tensor.new_empty((axis.size * tensor.shape[0], *tensor.shape[1:])) if into is None else into
    entry = recording.announce("all_gather", axis, tensor, site, is_async=not wait)
    if wait and axis.shared is not None and axis.shared.fits(tensor):
        axis.shared.gather(tensor, result)
        return Pending(result, None, entry)
    if (sums := _sums(axis)) is not None:
        return Pending(result, sums.gather(tensor, result), entry)
    if into is not None and tensor.device.type == "cpu":
        return Pending(result, _Sends(result, tensor, axis), entry)
    work = _all_gather_tensor(result, tensor, group=axis.group, async_op=not wait)
    return Pending(result, work, entry)


def _sums(axis: Axis) -> Exchanges | None:
    return None if is_isolated() else axis.sums


class _Sends:
    """An all-gather of messages, straight to where they belong: Gloo's own goes through a buffer as large as all."""

    _TAG = 1  # of no other message

    def __init__(self, result: Tensor, tensor: Tensor, axis: Axis) -> None:
        assert axis.group is not None
        parts = result.chunk(axis.size)
        parts[axis.rank].copy_(tensor)
        others = [(axis.rank + step) % axis.size for step in range(1, axis.size)]
        self._works = [axis.group.recv([parts[other]], other, self._TAG) for other in reversed(others)]
        self._works += [axis.group.send([parts[axis.rank]], other, self._TAG) for other in others]

    def wait(self) -> None:
        for work in self._works:
            work.wait()


def start_all_to_all(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to send rank r ``tensor[r]`` of ``[axis.size, ...]``; entry r of the result is what rank r has sent."""
    if axis.group is None:
        return Pending(tensor)
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():
        even = [1] * axis.size
        result = torch.ops._c10d_functional.all_to_all_single(tensor, even, even, axis.group.group_name)
        return Pending(result, in_graph=True)
    result = torch.empty_like(tensor)
    entry = recording.announce("all_to_all", axis, tensor, site, is_async=not wait)
    work = dist.all_to_all_single(result, tensor, group=axis.group, async_op=not wait)
    return Pending(result, work, entry)


def start_uneven_all_to_all(tensor: Tensor, sends: Sequence[int], receives: Sequence[int], axis: Axis) -> Pending:
    """Begin to send rank r of ``axis`` its ``sends[r]`` elements of ``tensor`` (flat, one rank's after another's).

    The result is what the ranks have sent: ``receives[r]`` elements of rank r. The log knows its bytes and no shape, as
    that is not the same on every rank.
    """
    if axis.group is None:
        return Pending(tensor)
    result = tensor.new_empty(sum(receives))
    entry = recording.announce("all_to_all", axis, is_async=True)
    if entry is not None:
        entry.bytes = tensor.nbytes
    work = dist.all_to_all_single(result, tensor, list(receives), list(sends), group=axis.group, async_op=True)
    return Pending(result, work, entry)


def start_reduce_scatter(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin to sum ``tensor`` over ``axis``, each rank keeping its equal part of dimension 0.

    Raises:
        ArgonneError: dimension 0 cannot be cut into equal parts.
    """
    if axis.group is None:
        return Pending(tensor)
    require_equal_parts(tensor, axis)
    tensor = tensor.contiguous()
    if torch.compiler.is_compiling():
        name = axis.group.group_name
        result = torch.ops._c10d_functional.reduce_scatter_tensor(tensor, "sum", axis.size, name)
        return Pending(result, in_graph=True)
    result = tensor.new_empty((tensor.shape[0] // axis.size, *tensor.shape[1:]))
    entry = recording.announce("reduce_scatter", axis, tensor, site, is_async=not wait)
    if (sums := _sums(axis)) is not None:
        return Pending(result, sums.sum_and_scatter(tensor, result), entry)
    work = _reduce_scatter_tensor(result, tensor, group=axis.group, async_op=not wait)
    return Pending(result, work, entry)


def require_equal_parts(tensor: Tensor, axis: Axis, dim: int = 0) -> None:
    """Raise ``ArgonneError`` unless a dimension of ``tensor`` can be cut into a part for each rank of ``axis``."""
    if tensor.shape[dim] % axis.size:
        raise ArgonneError(
            f"dimension {dim} of {list(tensor.shape)} cannot be shared out over {axis.name} in equal parts; "
            f"legal: a multiple of {axis.size}"
        )


def all_reduce(tensor: Tensor, axis: Axis, site: str | None = None) -> Tensor:
    """The sum of ``tensor`` (contiguous) over ``axis``, computed in place outside ``torch.compile``."""
    return start_all_reduce(tensor, axis, site, wait=True).wait()


def all_gather(tensor: Tensor, axis: Axis, site: str | None = None) -> Tensor:
    """Every rank's ``tensor`` (equal shapes), stacked: ``[axis.size, *tensor.shape]``."""
    joined = start_all_gather(tensor if tensor.dim() else tensor.view(1), axis, site, wait=True).wait()
    return joined.view(axis.size, *tensor.shape)


def reduce_scatter(tensor: Tensor, axis: Axis, site: str | None = None) -> Tensor:
    """The sum over ``axis`` of part ``axis.rank`` of ``tensor``, cut along dimension 0."""
    return start_reduce_scatter(tensor, axis, site, wait=True).wait()


def broadcast(tensor: Tensor, axis: Axis, source: int = 0) -> Tensor:
    """Overwrite ``tensor`` with that of rank ``source`` of ``axis``, and return it."""
    if axis.group is not None:
        entry = recording.announce("broadcast", axis, tensor)
        if axis.shared is not None and axis.shared.fits(tensor):
            axis.shared.broadcast(tensor, source)
        else:
            dist.broadcast(tensor, src=axis.ranks[source], group=axis.group)
        recording.complete(entry)
    return tensor


def exchange(tensor: Tensor, axis: Axis, first: int, second: int) -> Tensor:
    """What the other of the two ranks ``first`` and ``second`` of ``axis`` hands in; only they call this."""
    other = axis.ranks[second if axis.rank == first else first]
    received = torch.empty_like(tensor, memory_format=torch.contiguous_format)
    entry = recording.announce("exchange", replace(axis, ranks=tuple(axis.ranks[r] for r in (first, second))), tensor)
    operations = [
        dist.P2POp(dist.isend, tensor.contiguous(), other, axis.group),
        dist.P2POp(dist.irecv, received, other, axis.group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    recording.complete(entry)
    return received


def transfer(tensor: Tensor, axis: Axis, source: int, target: int) -> Tensor:
    """Send ``tensor`` from rank ``source`` of ``axis`` to rank ``target``, which overwrites its own; only they call."""
    pair = tuple(axis.ranks[rank] for rank in (source, target))
    entry = recording.announce("transfer", replace(axis, ranks=pair), tensor)
    if axis.rank == source:
        dist.send(tensor.contiguous(), pair[1], axis.group)
    else:
        dist.recv(tensor, pair[0], axis.group)
    recording.complete(entry)
    return tensor


def barrier(axis: Axis) -> None:
    """Wait for every process of ``axis``."""
    if axis.group is not None:
        entry = recording.announce("barrier", axis)
        dist.barrier(axis.group)
        recording.complete(entry)


def gather_objects(value: T, axis: Axis) -> list[T]:
    """Every rank's small Python ``value``, in rank order. For set-up and saves, not for training steps."""
    if axis.group is None or is_isolated():
        return [value] * axis.size
    gathered: list[Any] = [None] * axis.size
    entry = recording.announce("gather_objects", axis)
    dist.all_gather_object(gathered, value, group=axis.group)
    recording.complete(entry)
    return gathered


def collectively(action: Callable[[], T], axis: Axis) -> T:
    """Run ``action`` on every rank; if it is refused on any, raise an ``ArgonneError`` of it on all of them.

    So that a fault which one rank alone can see (a file, say) leaves no other waiting.
    """
    problem = None
    try:
        result = action()
    except (ArgonneError, OSError) as error:
        problem = str(error)
    for found in gather_objects(problem, axis):
        if found is not None:
            raise ArgonneError(found)
    return result


def from_first(action: Callable[[], T], axis: Axis) -> T:
    """What ``action`` makes on the first rank alone, on every rank; or ``collectively``, why it cannot."""
    made = collectively(lambda: action() if axis.rank == 0 else None, axis)
    first: T = gather_objects(made, axis)[0]  # type: ignore[assignment]
    return first
