"""Fully sharded data parallelism: PyTorch's FSDP2 (arXiv 2304.11277) under the declarations of this package."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from argonne.parallel.communication.collectives import Pending
from argonne.parallel.communication.groups import Axis, ProcessGroups
from argonne.parallel.communication.isolation import unobserved
from argonne.parallel.communication.reduction import start_sum, sum_and_scatter
from argonne.parallel.data_parallel.buckets import LateGradient, OverlappedReduction, gradient_bytes, plan_buckets
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.parallel.data_parallel.strategy import DataParallel, rows_of_a_full_rank, rows_of_rank
from argonne.parallel.errors import ArgonneError
from argonne.parallel.sharding.spec import ShardedParameter, narrow_rows
from argonne.parallel.sharding.uses import UsedApart
from argonne.parallel.tensor_parallel.precision import Precision


@dataclass(frozen=True)
class _ShardingAxes:
    """Where a rank stands among its replicas: in a group that shares out rows, of several that have all of them."""

    within: Axis
    """The replicas that share out rows."""
    across: Axis
    """The replicas with the same rows, one of each group."""
    holders: tuple[int, ...]
    """Those as ranks of ``groups.replicas``."""

    @classmethod
    def of(cls, replicas: Axis, shard: int | None) -> _ShardingAxes:
        """This rank's, where each ``shard`` neighbours are a group (collective over the replicas)."""
        if shard is None or shard == replicas.size:
            return cls(replicas, Axis("across", ranks=(replicas.ranks[replicas.rank],)), (replicas.rank,))
        group, rank = divmod(replicas.rank, shard)
        holders = tuple(range(rank, replicas.size, shard))
        neighbours = range(group * shard, (group + 1) * shard)
        return cls(_axis("within", replicas, neighbours), _axis("across", replicas, holders), holders)


class FullyShard(DataParallel):
    """Each replica has some rows of every parameter, of its gradient and of the optimizer's state.

    The parameters of a block are gathered just before it computes, in forward and again in backward, where its
    gradients are then reduce-scattered and added to this rank's rows, in every micro-batch: no rank ever has the whole
    gradient. Parameters outside the blocks stay gathered from the first forward to the last backward of a step.

    With ``shard`` the rows are shared out within groups of so many neighbouring replicas, and the groups are replicas
    of each other: their rows are summed once a step, in all-reduces that run beside the last backward.

    FSDP2's collectives do not announce themselves to ``record``. Under a narrower compute dtype it gathers
    every parameter in that, so that the weights of norms are rounded too.

    ``parameters`` are plain tensors that share the memory of the model's own, which are now DTensors. Saving
    and loading go through them; ``sharded_parameters(model)`` no longer describes the model.

    Parameters may be on ``meta``: they then exist on the device one module of ``blocks`` at a time, as zeros, so that
    no rank ever has the whole model.

    Raises:
        ArgonneError: a parameter is a scalar, or the precision makes gradients of two dtypes.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: ProcessGroups,
        precision: Precision,
        declared: Sequence[ShardedParameter],
        blocks: Iterable[nn.Module],
        forward_methods: Sequence[str],
        stages: Sequence[nn.Module],
        shard: int | None,
        bucket_bytes: int,
    ) -> None:
        if precision.accumulate_in_product and precision.compute.itemsize < torch.float32.itemsize:
            raise ArgonneError(
                f"accumulate_in_product with compute={precision.compute} makes gradients of two dtypes, which FSDP "
                "does not reduce together; legal: accumulate_in_product=False, or kind='replicate' or 'zero1'"
            )
        for sharded in declared:
            if sharded.parameter.ndim == 0:
                raise ArgonneError(f"{sharded.name} is a scalar, which cannot be cut into rows; legal: a vector of 1")
        self._modules = [*blocks, *(stages or [model])]
        homes = {
            id(p): (module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)
        }
        axes = _ShardingAxes.of(groups.replicas, shard)
        assert axes.within.group is not None, "there is one replica only"
        with unobserved():
            mesh = DeviceMesh.from_group(axes.within.group, groups.device.type, mesh_dim_names=("replicas",))
        for module in self._modules:
            _materialise(module, groups.device)
            fully_shard(module, mesh=mesh, mp_policy=_policy(precision, groups.reproducible))
            assert isinstance(module, FSDPModule)
            if groups.reproducible:
                module.set_custom_reduce_scatter(_TreeReduceScatter(axes.within))  # type: ignore[arg-type]
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
        for root in stages or [model]:
            assert isinstance(root, FSDPModule)
            # A loss that is computed outside its call may need the head in the backward of another micro-batch too.
            root.set_reshard_after_backward(False, recurse=False)
        for name in forward_methods:
            register_fsdp_forward_method(model, name)
        self._dtensors = [getattr(*homes[id(sharded.parameter)]) for sharded in declared]
        pairs = zip(declared, self._dtensors, strict=True)
        super().__init__([_own_rows(sharded, dtensor, axes) for sharded, dtensor in pairs], groups)
        if groups.reproducible:
            self._take_leaves(model, axes.within)
        self._across = axes.across
        trained = [dtensor for dtensor in self._dtensors if dtensor.requires_grad and axes.across.size > 1]
        self._buckets = plan_buckets(trained, bucket_bytes * axes.within.size)
        self._reduction = OverlappedReduction(self._buckets, self._start)

    def begin(self, micro_batches: int, deferred: bool = False) -> None:
        if deferred:
            raise ArgonneError("kind='fsdp' cannot wait for deferred gradients; legal: replicate, zero1")
        super().begin(micro_batches)
        for dtensor in self._dtensors:
            dtensor.grad = None
        self._reduction.begin(micro_batches, deferred)

    def complete(self) -> None:
        self.publish()
        self._sum_over_groups()
        for sharded, dtensor in zip(self.parameters, self._dtensors, strict=True):
            if not dtensor.requires_grad:
                continue
            if dtensor.grad is None:  # used by no replica; zeros as in the other kinds
                sharded.parameter.grad = torch.zeros_like(sharded.parameter)
            else:
                sharded.parameter.grad = _local(dtensor.grad)
                dtensor.grad = None  # FSDP2 would add the next one to it
        super().complete()

    def publish(self) -> None:
        """The memory is shared; only whole parameters that a pass has left gathered are dropped."""
        for module in self._modules:
            assert isinstance(module, FSDPModule)
            module.reshard()

    def _take_leaves(self, model: nn.Module, axis: Axis) -> None:
        """Sum the micro-batches' rows as leaves of a tree, and those of uses apart by ourselves."""
        apart = {
            id(getattr(module, name)): uses
            for module in model.modules()
            if isinstance(module, UsedApart)
            for name, uses in module.uses_apart().items()
        }
        leaves: list[tuple[str, Tensor]] = []
        for number, dtensor in enumerate(self._dtensors):
            sharded = self.parameters[number]
            if not dtensor.requires_grad:
                continue
            leaves.append((sharded.name, dtensor))
            if (uses := apart.get(id(dtensor))) is not None:
                rows = sharded.parameter
                aliases = tuple(nn.Parameter(rows.data) for _ in range(uses.count))
                self.parameters[number] = replace(sharded, aliases=aliases)
                leaves += ((sharded.name, alias) for alias in aliases)
                uses.taken = functools.partial(self._take_uses, aliases, axis)
        self.leaves = LeafSums(leaves, sum(gradient_bytes(p) for own in self.parameters for p in own.trained))

    @torch.no_grad()
    def _take_uses(self, aliases: Sequence[nn.Parameter], axis: Axis, gradients: Sequence[Tensor]) -> None:
        """This rank's rows of the gradients of a weight's uses, summed over the replicas: one collective."""
        width = rows_of_a_full_rank(len(gradients[0]), axis)
        stacked = torch.stack(list(gradients)).to(torch.promote_types(aliases[0].dtype, torch.float32))
        buffer = stacked.new_zeros(len(aliases), axis.size * width, *stacked.shape[2:])
        buffer[:, : stacked.shape[1]] = stacked
        by_rank = buffer.unflatten(1, (axis.size, width)).transpose(0, 1).contiguous()
        own = sum_and_scatter(by_rank, axis)[0]
        for alias, rows in zip(aliases, own, strict=True):
            alias.grad = rows[: len(alias)].to(alias.dtype)
            assert self.leaves is not None
            self.leaves.take(alias)

    def _start(self, number: int) -> Pending:
        """Begin to sum a bucket of this rank's rows over the groups."""
        bucket = self._buckets[number]
        rows = [torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad) for p in bucket]
        return start_sum(torch.cat([part.flatten() for part in rows]), self._across)

    def _sum_over_groups(self) -> None:
        totals = self._reduction.finish()
        if self._reduction.is_late:
            raise LateGradient
        for bucket, total in zip(self._buckets, totals, strict=True):
            for p, part in zip(bucket, total.split([_local(p).numel() for p in bucket]), strict=True):
                if p.grad is not None:
                    _local(p.grad).copy_(part.view_as(_local(p)))


def _axis(name: str, replicas: Axis, members: Sequence[int]) -> Axis:
    """Some of the replicas, this rank among them, with a process group that only they make."""
    ranks = tuple(replicas.ranks[member] for member in members)
    group = dist.new_group(list(ranks), use_local_synchronization=True)
    rank = list(members).index(replicas.rank)
    return replace(replicas, name=name, size=len(ranks), rank=rank, group=group, ranks=ranks)


def _materialise(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta and not isinstance(parameter, DTensor):
                real = nn.Parameter(torch.zeros_like(parameter, device=device), requires_grad=parameter.requires_grad)
                setattr(part, name, real)


class _TreeReduceScatter:
    """What FSDP2 sums its gradients with in a reproducible run: its interface, our order."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, *_: object, **__: object) -> None:
        output_tensor.copy_(sum_and_scatter(input_tensor.view(self.axis.size, -1), self.axis)[0])


def _policy(precision: Precision, reproducible: bool) -> MixedPrecisionPolicy:
    narrows = precision.compute != precision.parameters and not reproducible  # there the layers do, as without FSDP
    return MixedPrecisionPolicy(
        param_dtype=precision.compute if narrows else None,
        reduce_dtype=torch.promote_types(precision.parameters, torch.float32),
        cast_forward_inputs=False,  # the layers cast; position tables are wider than activations on purpose
    )


def _own_rows(sharded: ShardedParameter, dtensor: Tensor, axes: _ShardingAxes) -> ShardedParameter:
    rows = rows_of_rank(len(dtensor), axes.within)
    local = _local(dtensor)
    assert len(local) == len(rows), f"FSDP2 cuts {sharded.name} into other rows: {len(local)} here, not {len(rows)}"
    return narrow_rows(sharded, rows, nn.Parameter(local, requires_grad=dtensor.requires_grad), axes.holders)


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
