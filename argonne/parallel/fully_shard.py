"""Fully sharded data parallelism: PyTorch's FSDP2 (arXiv 2304.11277) under the declarations of this package."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from argonne.parallel.errors import ArgonneError
from argonne.parallel.groups import ProcessGroups
from argonne.parallel.precision import Precision
from argonne.parallel.sharding import ShardedParameter, narrow_rows
from argonne.parallel.strategy import DataParallel, rows_of_rank


class FullyShard(DataParallel):
    """Each replica has some rows of every parameter, of its gradient and of the optimizer's state.

    The parameters of a block are gathered just before it computes, in forward and again in backward, where its
    gradients are then reduce-scattered; those outside the blocks stay gathered from forward to backward.
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
    ) -> None:
        if precision.accumulate_in_product and precision.compute.itemsize < torch.float32.itemsize:
            raise ArgonneError(
                f"accumulate_in_product with compute={precision.compute} makes gradients of two dtypes, which FSDP "
                "does not reduce together; legal: accumulate_in_product=False, or kind='replicate' or 'zero1'"
            )
        for sharded in declared:
            if sharded.parameter.ndim == 0:
                raise ArgonneError(f"{sharded.name} is a scalar, which cannot be cut into rows; legal: a vector of 1")
        self._model = model
        self._is_scheduled = bool(stages)
        self._modules = [*blocks, *(stages or [model])]
        homes = {
            id(p): (module, name) for module in model.modules() for name, p in module.named_parameters(recurse=False)
        }
        self._micro_batches = self._begun = 0
        assert groups.replicas.group is not None, "there is one replica only"
        mesh = DeviceMesh.from_group(groups.replicas.group, groups.device.type, mesh_dim_names=("replicas",))
        for module in self._modules:
            _materialise(module, groups.device)
            fully_shard(module, mesh=mesh, mp_policy=_policy(precision))
            assert isinstance(module, FSDPModule)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # Gloo knows no other
        if not stages:
            model.register_forward_hook(lambda module, inputs, output: self._listen(output))
        for name in forward_methods:
            register_fsdp_forward_method(model, name)
            setattr(model, name, self._heard(getattr(model, name)))
        self._dtensors = [getattr(*homes[id(sharded.parameter)]) for sharded in declared]
        pairs = zip(declared, self._dtensors, strict=True)
        super().__init__([_own_rows(sharded, dtensor, groups) for sharded, dtensor in pairs], groups)

    def begin(self, micro_batches: int, deferred: bool = False) -> None:
        if deferred:
            raise ArgonneError("kind='fsdp' cannot wait for deferred gradients; legal: replicate, zero1")
        super().begin(micro_batches)
        for dtensor in self._dtensors:
            dtensor.grad = None
        self._micro_batches, self._begun = micro_batches, 0

    def complete(self) -> None:
        if self._begun != self._micro_batches and not self._is_scheduled:
            raise RuntimeError(
                f"complete() after {self._begun} backward passes of {type(self._model).__name__}, but "
                f"begin(micro_batches={self._micro_batches})"
            )
        self._micro_batches = 0
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
        """The memory is shared; only whole parameters that an evaluation has left gathered are dropped."""
        for module in self._modules:
            assert isinstance(module, FSDPModule)
            module.reshard()

    def _heard(self, method: Any) -> Any:
        @functools.wraps(method)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            output = method(*arguments, **named)
            self._listen(output)
            return output

        return wrapped

    def _listen(self, output: Any) -> None:
        """Notice when backward comes to ``output`` of the model: a pass begins, and the last one communicates."""
        begun = False

        def begin(gradient: Tensor) -> None:
            nonlocal begun
            if begun or not self._micro_batches:
                return
            begun = True
            self._begun += 1
            last = self._begun == self._micro_batches
            assert isinstance(self._model, FSDPModule)
            self._model.set_requires_gradient_sync(last)
            self._model.set_is_last_backward(last)

        for tensor in output if isinstance(output, (tuple, list)) else [output]:
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(begin)


def _materialise(module: nn.Module, device: torch.device) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.is_meta and not isinstance(parameter, DTensor):
                real = nn.Parameter(torch.zeros_like(parameter, device=device), requires_grad=parameter.requires_grad)
                setattr(part, name, real)


def _policy(precision: Precision) -> MixedPrecisionPolicy:
    return MixedPrecisionPolicy(
        param_dtype=precision.compute if precision.compute != precision.parameters else None,
        reduce_dtype=torch.promote_types(precision.parameters, torch.float32),
        cast_forward_inputs=False,  # the layers cast; position tables are wider than activations on purpose
    )


def _own_rows(sharded: ShardedParameter, dtensor: Tensor, groups: ProcessGroups) -> ShardedParameter:
    rows = rows_of_rank(len(dtensor), groups.replicas)
    local = _local(dtensor)
    assert len(local) == len(rows), f"FSDP2 cuts {sharded.name} into other rows: {len(local)} here, not {len(rows)}"
    return narrow_rows(sharded, rows, nn.Parameter(local, requires_grad=dtensor.requires_grad))


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, sharing its memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local().detach()
