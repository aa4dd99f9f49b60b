"""Every sum over the ranks of an axis: of activations, gradients, losses, norms and flags.

In what order the ranks' numbers are added is said by the axis, and read here alone. FSDP2 sums the gradients of its own
shards (``data_parallel/fully_shard.py``); a softmax over a vocabulary that is shared out combines gathered statistics
in rank order (``tensor_parallel/cross_entropy.py``). Nobody else adds what comes from another rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from numpy.typing import NDArray
from torch import Tensor

from argonne.parallel.communication import collectives, recording, tree
from argonne.parallel.communication.collectives import Pending
from argonne.parallel.communication.groups import Axis, Summation
from argonne.parallel.errors import ArgonneError


def sum_over(tensor: Tensor, axis: Axis, site: str | None = None) -> Tensor:
    """The sum of ``tensor`` (contiguous) over ``axis``, equal on all its ranks; in place outside ``torch.compile``.

    ``site``, here and below, is that of the forward when a backward calls (``recording.site``).
    """
    return start_sum(tensor, axis, site, wait=True).wait()


def sum_array(array: NDArray[Any], axis: Axis) -> None:
    """``sum_over`` in place, of what is in NumPy (contiguous): as soon as can be where memory is shared."""
    if axis.shared is not None and array.nbytes <= axis.shared.capacity and not recording.is_recording():
        axis.shared.sum_array(array)
    else:
        sum_over(torch.from_numpy(array), axis)


def start_sum(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin ``sum_over``: ``tensor`` may be overwritten and must be left alone until waited.

    With ``wait`` nothing is meant to run beside it.
    """
    if axis.summation == "fast" or _any_order_is_the_tree(axis):
        return collectives.start_all_reduce(tensor, axis, site, wait=wait)
    if axis.summation == "tree":
        return tree.start_tree_sum(tensor, axis, site, wait=wait)
    raise _unknown(axis)


def sum_and_scatter(tensor: Tensor, axis: Axis, site: str | None = None) -> Tensor:
    """The sum over ``axis`` of part ``axis.rank`` of ``tensor``, cut along dimension 0.

    Raises:
        ArgonneError: dimension 0 cannot be cut into equal parts.
    """
    return start_sum_and_scatter(tensor, axis, site, wait=True).wait()


def start_sum_and_scatter(tensor: Tensor, axis: Axis, site: str | None = None, *, wait: bool = False) -> Pending:
    """Begin ``sum_and_scatter``; as for ``start_sum``."""
    if axis.summation == "fast" or _any_order_is_the_tree(axis):
        return collectives.start_reduce_scatter(tensor, axis, site, wait=wait)
    if axis.summation == "tree":
        return tree.start_tree_sum_and_scatter(tensor, axis, site, wait=wait)
    raise _unknown(axis)


def sum_of_losses(losses: Sequence[Tensor], axis: Axis) -> Tensor:
    """What the losses of a rank's micro-batches add up to, in their order; in a reproducible run in float64.

    There, additions of so few numbers of 24 bits do not round: what the replicas' sums add up to has no order.
    """
    stacked = torch.stack(list(losses))
    return stacked.sum() if axis.summation == "fast" else stacked.double().sum()


def sum_of_two(tensor: Tensor, axis: Axis, first: int, second: int) -> Tensor:
    """The sum of ``tensor`` over the ranks ``first`` and ``second`` of ``axis``, in place; only they call this.

    Two numbers have one sum, in whichever order: this is the same on both ranks under every policy.
    """
    return tensor.add_(collectives.exchange(tensor, axis, first, second))


def _any_order_is_the_tree(axis: Axis) -> bool:
    """Whether the order that is asked for is any: that of one number or two, which have one sum."""
    return axis.summation == "tree" and axis.size <= 2


def _unknown(axis: Axis) -> ArgonneError:
    legal = ", ".join(get_args(Summation))
    return ArgonneError(f"summation={axis.summation!r} of axis {axis.name!r} is not known; legal: {legal}")
