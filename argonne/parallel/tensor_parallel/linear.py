"""Linear layers whose weight is shared out over the tensor-parallel ranks (arXiv 1909.08053, section 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from argonne.parallel.communication.groups import ProcessGroups
from argonne.parallel.communication.layout import require_divisible
from argonne.parallel.communication.reduction import sum_array
from argonne.parallel.communication.regions import (
    gather_from_region,
    reduce_from_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
)
from argonne.parallel.errors import ArgonneError, LayoutError
from argonne.parallel.sharding.declare import replicated
from argonne.parallel.sharding.initialisation import Constant, Initialiser, Normal
from argonne.parallel.sharding.partition import Partition, check_partition
from argonne.parallel.sharding.placement import Placement
from argonne.parallel.sharding.region import Region, ShardSpec
from argonne.parallel.sharding.uses import Uses
from argonne.parallel.tensor_parallel.blocks import Cut, cut_parts, heads_of_others
from argonne.parallel.tensor_parallel.gemm import Array, prepared_for_rows
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.products import column_parallel_linear, local_linear
from argonne.parallel.tensor_parallel.token_blocks import add_bias, uses_by_token_blocks
from argonne.parallel.tensor_parallel.working_copy import WorkingCopy


class ColumnParallelLinear(nn.Module):
    """``y = x W^T + b`` with the output features shared out; several whole tensors may be fused in one GEMM.

    Under sequence parallelism (``groups.layout``) the input is this rank's share of the tokens.

    Args:
        out_features: those of the one whole tensor, or the partitions of those that are fused, in their order.
        groups: the processes; the weight is cut over ``groups.tensor``.
        bias: add a bias, cut like the output.
        gather_output: return the whole output on every rank instead of this rank's part.
        initialiser: how each whole weight begins; default normal with std ``in_features ** -0.5``.
        bias_initialiser: how each whole bias begins; default zero.

    Raises:
        LayoutError: the output features are not divisible by the number of ranks, or ``gather_output``
            is asked of fused or shared parts, or of parts in another order than the ranks.
        ArgonneError: ``bias_initialiser`` is given without ``bias``.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int | Sequence[Partition],
        groups: ProcessGroups,
        *,
        bias: bool = False,
        gather_output: bool = False,
        initialiser: Initialiser | None = None,
        bias_initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__()
        self.axis = groups.tensor
        self.in_features = in_features
        self.sequence_parallel = groups.sequence_parallel
        if isinstance(out_features, int):
            out_features = [Partition.split("", out_features, self.axis.size)]
        self.parts = tuple(out_features)
        for part in self.parts:
            check_partition(part, self.axis.size)
        if gather_output and not (len(self.parts) == 1 and self.parts[0].is_in_order):
            raise LayoutError(
                "gather_output=True is not defined for fused or shared parts, or parts that are not in the order of "
                "the ranks; legal: False"
            )
        self.gather_output = gather_output
        self.bias_initialiser = bias_initialiser_of(bias, bias_initialiser)
        self.initialiser = initialiser or Normal(in_features**-0.5)
        self.precision, self.working = precision, WorkingCopy(precision)
        self.splits = [part.local_features(self.axis.rank) for part in self.parts]
        self.cut = Cut(outputs=cut_parts(self.parts, self.axis), apart=heads_of_others(self.parts, self.axis))
        self.weight = nn.Parameter(torch.empty(sum(self.splits), in_features, dtype=precision.parameters))
        self.bias = nn.Parameter(torch.empty(sum(self.splits), dtype=precision.parameters)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` (the same on every rank) -> ``[..., local features]``, or all if gathered.

        Under sequence parallelism ``[tokens / ranks, ..., in_features]`` -> ``[tokens, ..., local features]``.
        """
        copy = self.working.of(self.weight)
        y = column_parallel_linear(
            x, self.weight, self.bias, self.axis, self.precision, self.sequence_parallel, self.cut, copy
        )
        if not self.gather_output:
            return y
        (part,) = self.parts
        sizes = None if part.is_even else [part.local_features(rank) for rank in range(self.axis.size)]
        return gather_from_region(y, self.axis, sizes=sizes)

    def of_rows(self) -> Callable[[Array], Array]:
        """``forward`` of a few rows that every rank has, without gradients, in fast mode: no more than the product.

        Here and below, in one dtype, and as long as the weight stays where it is.
        """
        return prepared_for_rows(self.weight, self.bias)

    def output_placement(self) -> Placement:
        return Placement() if self.gather_output else Placement(self.parts)

    def shard_specs(self) -> dict[str, ShardSpec]:
        specs = {"weight": ShardSpec(self._regions("weight", (self.in_features,)), self.initialiser)}
        if self.bias is not None:
            specs["bias"] = ShardSpec(self._regions("bias", ()), self.bias_initialiser)
        return specs

    def _regions(self, kind: str, tail: tuple[int, ...]) -> tuple[Region, ...]:
        regions, local = [], 0
        for part in self.parts:
            name, whole = f"../{part.name}.{kind}" if part.name else kind, (part.features, *tail)
            for holders, held, own in part.runs(self.axis.rank):
                regions.append(Region.slab(name, whole, 0, held, holders, local + own.start, part.is_shared))
            local += part.local_features(self.axis.rank)
        return tuple(regions)

    def extra_repr(self) -> str:
        parts = ", ".join(f"{part.name or 'out'}={part.features}" for part in self.parts)
        return f"in={self.in_features}, {parts}, rank {self.axis.rank} of {self.axis.size}"


class RowParallelLinear(nn.Module):
    """``y = x W^T + b`` with the input features shared out; the ranks' partial results are summed.

    Under sequence parallelism (``groups.layout``) the sum leaves each rank its share of the tokens.

    Args:
        in_features: width of the whole input, or the partition by which the ranks have it.
        groups: the processes; the weight is cut over ``groups.tensor``.
        bias: add a bias, once, after the sum; it is replicated.
        input_is_parallel: the input is this rank's part already; otherwise every rank has the whole of it.
        initialiser: how the whole weight begins; default normal with std ``in_features ** -0.5``.
        bias_initialiser: how the bias begins; default zero.

    Raises:
        LayoutError: the input features are not divisible by the number of ranks, are shared, or are
            unequal parts of an input that is not parallel.
        ArgonneError: ``bias_initialiser`` is given without ``bias``.
    """

    def __init__(
        self,
        in_features: int | Partition,
        out_features: int,
        groups: ProcessGroups,
        *,
        bias: bool = False,
        input_is_parallel: bool = True,
        initialiser: Initialiser | None = None,
        bias_initialiser: Initialiser | None = None,
        precision: Precision = Precision(),
    ) -> None:
        super().__init__()
        self.axis = groups.tensor
        self.sequence_parallel = groups.sequence_parallel
        if isinstance(in_features, int):
            require_divisible("in_features", in_features, "tensor_parallel", self.axis.size)
            in_features = Partition.split("", in_features, self.axis.size)
        check_partition(in_features, self.axis.size)
        if in_features.is_shared or not (input_is_parallel or in_features.is_even):
            raise LayoutError("in_features of RowParallelLinear are shared, or unequal and whole; legal: equal parts")
        self.part = in_features
        self.input_is_parallel = input_is_parallel
        self.groups = groups
        self.in_features = in_features.features
        self.out_features = out_features
        self.initialiser = initialiser or Normal(self.in_features**-0.5)
        self.bias_initialiser = bias_initialiser_of(bias, bias_initialiser)
        self.precision, self.working = precision, WorkingCopy(precision)
        self.cut = Cut(inputs=cut_parts((self.part,), self.axis))
        local = self.part.local_features(self.axis.rank)
        self.weight = nn.Parameter(torch.empty(out_features, local, dtype=precision.parameters))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=precision.parameters)) if bias else None
        self._uses = None if self.bias is None else uses_by_token_blocks(groups)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., local features]`` -> ``[..., out_features]``, the same on every rank.

        Under sequence parallelism ``[tokens, ..., local features]`` -> ``[tokens / ranks, ..., out_features]``.
        """
        if not self.input_is_parallel:
            x = scatter_to_region(x, self.axis)
        copy = self.working.of(self.weight)
        if self.axis.group is None and not self.cut:
            return local_linear(x, self.weight, self.bias, self.precision, copy=copy)
        partial = local_linear(x, self.weight, None, self.precision, self.cut, copy)
        if self.sequence_parallel and partial.ndim < 2:
            raise ArgonneError(f"x {list(x.shape)} has no tokens to share out; legal: [tokens, ..., local features]")
        leave = reduce_scatter_to_sequence_region if self.sequence_parallel else reduce_from_region
        y = leave(partial, self.axis)
        if self.bias is None:
            return y
        biases = (self.bias,) if self._uses is None else self._uses.of(self.bias)
        return add_bias(y, [bias.to(self.precision.compute) for bias in biases])

    def of_rows(self) -> Callable[[Array], Array]:
        """``forward`` of a few rows whose sum every rank gets, without gradients, in fast mode: product and sum."""
        if self.axis.group is None:
            return prepared_for_rows(self.weight, self.bias)
        multiply, axis, bias = prepared_for_rows(self.weight), self.axis, self.bias

        def of_rows(x: Array) -> Array:
            y = multiply(x)
            sum_array(y, axis)
            if bias is not None:
                y += bias.numpy()
            return y

        return of_rows

    def uses_apart(self) -> dict[str, Uses]:
        return {} if self._uses is None else {"bias": self._uses}

    def shard_specs(self) -> dict[str, ShardSpec]:
        whole, runs = (self.out_features, self.in_features), self.part.runs(self.axis.rank)
        regions = tuple(Region.slab("weight", whole, 1, held, holders, own.start) for holders, held, own in runs)
        specs = {"weight": ShardSpec(regions, self.initialiser)}
        if self.bias is not None:
            specs["bias"] = replicated("bias", (self.out_features,), self.groups, self.bias_initialiser, used="between")
        return specs

    def input_placement(self) -> Placement:
        return Placement((replace(self.part, name=""),)) if self.input_is_parallel else Placement()

    def output_placement(self) -> Placement:
        return Placement(shares_tokens=self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"in={self.in_features}, out={self.out_features}, rank {self.axis.rank} of {self.axis.size}"


def bias_initialiser_of(bias: bool, initialiser: Initialiser | None) -> Initialiser:
    """How the bias of a layer begins: with zeros unless its ``bias_initialiser`` says otherwise.

    Raises:
        ArgonneError: there is no bias to begin.
    """
    if initialiser is not None and not bias:
        raise ArgonneError(f"bias_initialiser={initialiser} has no effect with bias=False; legal: None, or bias=True")
    return initialiser or Constant(0.0)
