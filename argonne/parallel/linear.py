"""Linear layers whose weight is shared out over the tensor-parallel ranks (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.parallel.collectives import gather_from_region, reduce_from_region
from argonne.parallel.errors import LayoutError
from argonne.parallel.groups import Axis, ProcessGroups
from argonne.parallel.layout import require_divisible
from argonne.parallel.precision import Precision
from argonne.parallel.random import Constant, Initialiser, Normal
from argonne.parallel.sharding import Region, ShardSpec, replicated


class _ColumnParallel(torch.autograd.Function):
    """``x @ W^T``; backward starts the sum of the input gradient, then computes the weight's beside it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.axis = axis
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        x_gradient = weight_gradient = bias_gradient = work = None
        if needs_x:
            x_gradient = (gradient @ weight).contiguous()
            work = dist.all_reduce(x_gradient, group=ctx.axis.group, async_op=True)
        rows = gradient.reshape(-1, gradient.shape[-1])
        if needs_weight:
            weight_gradient = rows.t() @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            bias_gradient = rows.sum(0)
        if work is not None:
            work.wait()
        return x_gradient, weight_gradient, bias_gradient, None


def column_parallel_linear(x: Tensor, weight: Tensor, bias: Tensor | None, axis: Axis) -> Tensor:
    """``x @ weight^T + bias`` for this rank's rows of the weight.

    Args:
        x: ``[..., in]``, the same on every rank of ``axis``.
        weight: ``[local_out, in]``.
        bias: ``[local_out]``, or None.

    Returns:
        ``[..., local_out]``. The gradient of ``x`` is the sum over the ranks; its all-reduce is in flight
        while the gradient of ``weight`` is computed.
    """
    if axis.group is None:
        return F.linear(x, weight, bias)
    return _ColumnParallel.apply(x, weight, bias, axis)


@dataclass(frozen=True)
class OutputPart:
    """One whole tensor among the outputs of a column-parallel layer, cut into blocks that stay together.

    A block is a head, say. Ranks may share blocks: key-value heads are replicated when there are more
    ranks than heads.
    """

    name: str
    """The name of the sibling that the whole tensor is called after (``q_proj``), or ``""`` for the layer."""
    block: int
    """Output features in a block."""
    held: tuple[range, ...]
    """The blocks of each tensor-parallel rank."""

    @classmethod
    def split(cls, name: str, features: int, ranks: int) -> OutputPart:
        """Equal parts, one for each rank. Raises ``LayoutError`` when they cannot be equal."""
        require_divisible("out_features" if not name else f"out_features of {name}", features, "tensor_parallel", ranks)
        return cls(name, features // ranks, tuple(range(rank, rank + 1) for rank in range(ranks)))

    @property
    def features(self) -> int:
        """Output features of the whole tensor."""
        return self.block * (1 + max(block for held in self.held for block in held))

    def local_features(self, rank: int) -> int:
        return self.block * len(self.held[rank])

    def holders(self, block: int) -> tuple[int, ...]:
        return tuple(rank for rank, held in enumerate(self.held) if block in held)

    @property
    def is_shared(self) -> bool:
        return sum(len(held) for held in self.held) * self.block > self.features


class ColumnParallelLinear(nn.Module):
    """``y = x W^T + b`` with the output features shared out; several whole tensors may be fused in one GEMM.

    Args:
        in_features: width of the input.
        out: output features of the one whole tensor, or the parts that are fused, in their order.
        groups: the processes; the weight is cut over ``groups.tensor``.
        bias: add a bias, cut like the output.
        gather_output: return the whole output on every rank instead of this rank's part.
        initialiser: how each whole weight begins; default normal with std ``in_features ** -0.5``.
        precision: the dtypes.

    Raises:
        LayoutError: the output features are not divisible by the number of ranks, or ``gather_output``
            is asked of fused or shared parts.
    """

    def __init__(
        self,
        in_features: int,
        out: int | Sequence[OutputPart],
        groups: ProcessGroups,
        *,
        bias: bool = False,
        gather_output: bool = False,
        initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__()
        self.axis = groups.tensor
        self.in_features = in_features
        self.parts = (OutputPart.split("", out, self.axis.size),) if isinstance(out, int) else tuple(out)
        if gather_output and (len(self.parts) > 1 or self.parts[0].is_shared):
            raise LayoutError("gather_output=True is not defined for fused or shared parts; legal: False")
        self.gather_output = gather_output
        self.initialiser = initialiser or Normal(in_features**-0.5)
        self.precision = precision
        self.splits = [part.local_features(self.axis.rank) for part in self.parts]
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features, dtype=precision.parameters))
        self.bias = nn.Parameter(torch.empty(sum(self.splits), dtype=precision.parameters)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` (the same on every rank) -> ``[..., local features]``, or all if gathered."""
        compute = self.precision.compute
        bias = None if self.bias is None else self.bias.to(compute)
        y = column_parallel_linear(x, self.weight.to(compute), bias, self.axis)
        return gather_from_region(y, self.axis) if self.gather_output else y

    def shard_specs(self) -> dict[str, ShardSpec]:
        specs = {"weight": ShardSpec(self._regions("weight", (self.in_features,)), self.initialiser)}
        if self.bias is not None:
            specs["bias"] = ShardSpec(self._regions("bias", ()), Constant(0.0))
        return specs

    def _regions(self, kind: str, tail: tuple[int, ...]) -> tuple[Region, ...]:
        regions = []
        local = 0
        zeros = (0,) * len(tail)
        for part in self.parts:
            name = f"../{part.name}.{kind}" if part.name else kind
            for holders, run in groupby(part.held[self.axis.rank], key=part.holders):
                blocks = list(run)
                features = len(blocks) * part.block
                regions.append(
                    Region(
                        name,
                        whole_shape=(part.features, *tail),
                        start=(blocks[0] * part.block, *zeros),
                        shape=(features, *tail),
                        local_start=(local, *zeros),
                        holders=holders,
                        partial_gradient=part.is_shared,
                    )
                )
                local += features
        return tuple(regions)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{part.name or 'out'}={part.features}" for part in self.parts)
        return f"in={self.in_features}, {parts}, rank {self.axis.rank} of {self.axis.size}"


class RowParallelLinear(nn.Module):
    """``y = x W^T + b`` with the input features shared out; the ranks' partial results are summed.

    Args:
        in_features: width of the whole input, of which each rank has its part.
        out_features: width of the output.
        groups: the processes; the weight is cut over ``groups.tensor``.
        bias: add a bias, once, after the sum; it is replicated.
        initialiser: how the whole weight begins; default normal with std ``in_features ** -0.5``.
        precision: the dtypes.

    Raises:
        LayoutError: the input features are not divisible by the number of ranks.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        groups: ProcessGroups,
        *,
        bias: bool = False,
        initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__()
        self.axis = groups.tensor
        require_divisible("in_features", in_features, "tensor_parallel", self.axis.size)
        self.in_features = in_features
        self.out_features = out_features
        self.local_features = in_features // self.axis.size
        self.initialiser = initialiser or Normal(in_features**-0.5)
        self.precision = precision
        self.weight = nn.Parameter(torch.empty(out_features, self.local_features, dtype=precision.parameters))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=precision.parameters)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features / ranks]`` -> ``[..., out_features]``, the same on every rank."""
        compute = self.precision.compute
        y = reduce_from_region(F.linear(x, self.weight.to(compute)), self.axis)
        return y if self.bias is None else y + self.bias.to(compute)

    def shard_specs(self) -> dict[str, ShardSpec]:
        region = Region(
            "weight",
            whole_shape=(self.out_features, self.in_features),
            start=(0, self.axis.rank * self.local_features),
            shape=(self.out_features, self.local_features),
            local_start=(0, 0),
            holders=(self.axis.rank,),
        )
        specs = {"weight": ShardSpec((region,), self.initialiser)}
        if self.bias is not None:
            specs["bias"] = replicated("bias", (self.out_features,), self.axis.size, Constant(0.0))
        return specs

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank {self.axis.rank} of {self.axis.size}"
