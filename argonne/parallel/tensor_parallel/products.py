"""The matrix products of the parallel linear layers, with their communication in flight beside them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from argonne.parallel.communication.collectives import all_gather, start_all_gather
from argonne.parallel.communication.groups import Axis
from argonne.parallel.communication.recording import site
from argonne.parallel.communication.reduction import start_sum, start_sum_and_scatter
from argonne.parallel.errors import ArgonneError
from argonne.parallel.tensor_parallel.blocks import WHOLE, Cut
from argonne.parallel.tensor_parallel.deferral import accumulate, current_queue
from argonne.parallel.tensor_parallel.gemm import (
    as_matrix,
    lies_for_rows,
    product,
    product_of_rows,
    stays_ours,
    suits_onednn,
)
from argonne.parallel.tensor_parallel.precision import Precision
from argonne.parallel.tensor_parallel.working_copy import in_dtype


class _Product(torch.autograd.Function):
    """``x @ W^T + b`` over an axis; backward hides its communication behind the products.

    The input gradient is a partial sum: its all-reduce (or, when the tokens are shared out, its
    reduce-scatter) is in flight while the weight gradient is computed. With shared-out tokens only this
    rank's are kept for backward; the others are gathered again beside the product for the input gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        axis: Axis,
        shares_tokens: bool,
        precision: Precision,
        cut: Cut,
        copy: Tensor | None,
    ) -> Tensor:
        ctx.axis, ctx.shares_tokens, ctx.site, ctx.cut = axis, shares_tokens, site(), cut
        used = weight.to(precision.compute) if copy is None else copy
        ctx.main = weight if precision.accumulate_in_product and weight.requires_grad else None
        ctx.parameters = (weight, bias) if current_queue() is not None else None
        ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
        ctx.save_for_backward(x, used)
        whole = all_gather(x, axis).flatten(0, 1) if shares_tokens else x
        return cut.forward(whole, used, None if bias is None else bias.to(precision.compute))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        gathering = start_all_gather(x, ctx.axis, ctx.site) if ctx.shares_tokens and needs_weight else None
        x_gradient = weight_gradient = bias_gradient = summing = None
        if needs_x:
            x_gradient = ctx.cut.input_gradient(gradient, weight)
        if gathering is not None:
            x = gathering.wait()
        if x_gradient is not None:
            start = start_sum_and_scatter if ctx.shares_tokens else start_sum
            summing = start(x_gradient.contiguous(), ctx.axis, ctx.site)
        queue = current_queue() if ctx.parameters is not None else None
        if queue is not None:
            queue.append(lambda: _accumulate_later(ctx, needs_weight, needs_bias, gradient, x))
        else:
            weight_gradient, bias_gradient = _parameter_gradients(ctx, needs_weight, needs_bias, gradient, x)
        if summing is not None:
            x_gradient = summing.wait()
        return x_gradient, weight_gradient, bias_gradient, None, None, None, None, None


def _parameter_gradients(
    ctx: Any, needs_weight: bool, needs_bias: bool, gradient: Tensor, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Those of weight and bias; None where none is needed, or where it went straight into ``.grad``."""
    weight_gradient = bias_gradient = None
    rows = as_matrix(gradient)
    if needs_weight:
        columns = as_matrix(x)
        if ctx.main is None:
            weight_gradient = ctx.cut.weight_gradient(rows, columns).to(ctx.weight_dtype)
        else:
            add_product(_main_gradient(ctx.main), rows, columns)
    if needs_bias:
        bias_gradient = ctx.cut.bias_gradient(rows).to(ctx.bias_dtype)
    return weight_gradient, bias_gradient


@torch.no_grad()
def _accumulate_later(ctx: Any, needs_weight: bool, needs_bias: bool, gradient: Tensor, x: Tensor) -> None:
    gradients = _parameter_gradients(ctx, needs_weight, needs_bias, gradient, x)
    for parameter, found in zip(ctx.parameters, gradients, strict=True):
        if found is not None:
            accumulate(parameter, found)


def local_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, precision: Precision, cut: Cut = WHOLE, copy: Tensor | None = None
) -> Tensor:
    """``x @ weight^T + bias`` in the compute dtype, without communication: as cheap as ``F.linear``."""
    _require_fit(x, weight)
    ours = torch.is_grad_enabled() and (suits_onednn(x) or stays_ours(x)) and precision.compute == torch.float32
    if cut or precision.accumulate_in_product or ours or current_queue() is not None:
        return _Product.apply(x, weight, bias, Axis("none"), False, precision, cut, copy)
    compute = precision.compute
    multiply = product_of_rows if lies_for_rows(weight) and not torch.is_grad_enabled() else F.linear
    return multiply(x, in_dtype(weight, compute, copy), None if bias is None else bias.to(compute))


def column_parallel_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    axis: Axis,
    precision: Precision,
    sequence_parallel: bool = False,
    cut: Cut = WHOLE,
    copy: Tensor | None = None,
) -> Tensor:
    """``x @ weight^T + bias`` for this rank's rows of the weight.

    Args:
        x: ``[..., in]``, the same on every rank of ``axis``; under sequence parallelism this rank's share
            ``[tokens / ranks, ..., in]``.
        weight: ``[local_out, in]``.
        bias: ``[local_out]``, or None.
        precision: the dtypes; weight and bias are in that of the parameters.
        sequence_parallel: dimension 0 of ``x`` is shared out over ``axis``.
        cut: this rank's canonical blocks of the rows, of an axis that has such (``Axis.blocks``).
        copy: the weight in the compute dtype, where there is one (``WorkingCopy``).

    Returns:
        ``[..., local_out]`` of all tokens. The gradient of ``x`` is the sum over the ranks.

    Raises:
        ArgonneError: the shapes do not fit each other.
    """
    if axis.group is None:
        return local_linear(x, weight, bias, precision, cut, copy)
    _require_fit(x, weight, sequence_parallel)
    if not (torch.is_grad_enabled() or cut):
        whole = all_gather(x, axis).flatten(0, 1) if sequence_parallel else x
        compute, multiply = precision.compute, product_of_rows if lies_for_rows(weight) else product
        return multiply(whole, in_dtype(weight, compute, copy), None if bias is None else bias.to(compute))
    return _Product.apply(x, weight, bias, axis, sequence_parallel, precision, cut, copy)


def _require_fit(x: Tensor, weight: Tensor, shares_tokens: bool = False) -> None:
    if x.ndim < 1 + shares_tokens or x.shape[-1] != weight.shape[1]:
        legal = "this rank's share of the tokens and " if shares_tokens else ""
        raise ArgonneError(
            f"x {list(x.shape)} does not fit this rank's weight {list(weight.shape)}; legal: "
            f"[{'tokens / ranks, ' if shares_tokens else ''}..., {weight.shape[1]}], {legal}all features of the weight"
        )


def add_product(total: Tensor, rows: Tensor, columns: Tensor) -> None:
    """Add ``rows^T @ columns`` to ``total``, without rounding the product to the dtype of its factors."""
    if rows.dtype == total.dtype:
        total.addmm_(rows.t(), columns)
    elif rows.is_cuda:
        torch.addmm(total, rows.t(), columns, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(rows.t().to(total.dtype), columns.to(total.dtype))


def _main_gradient(parameter: Tensor) -> Tensor:
    """``parameter.grad`` in float32 or more, zeros if there was none."""
    if parameter.grad is None:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        if parameter.dtype != dtype:
            parameter.grad_dtype = dtype
        parameter.grad = torch.zeros_like(parameter, dtype=dtype)
    return parameter.grad
