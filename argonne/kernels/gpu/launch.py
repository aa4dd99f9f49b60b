"""What all launches share: rows of any stride, block sizes, and the two ways into autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef, wrap_triton

Wrap = Callable[[Any], Any]
"""``direct`` in eager mode, ``torch.library.wrap_triton`` within an op."""


def direct(kernel: Any) -> Any:
    """Launch the kernel itself."""
    return kernel


def as_rows(x: Tensor) -> Tensor:
    """``[..., columns]`` as ``[rows, columns]`` whose last stride is 1, copied only where no view is one."""
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] <= 1 else rows.contiguous()


def cdiv(size: int, block: int) -> int:
    """Blocks that cover ``size``. Triton's own unwraps constants first, which takes 2 microseconds a call."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """The least that is ``size`` or more."""
    return 1 << max(0, int(size) - 1).bit_length()


def warps(elements: int) -> int:
    """Warps for a tile: 16 elements a thread (two 128-bit accesses of a half-width type), 4 to 32 warps."""
    return min(32, max(4, power_of_2(elements) // 512))


def differentiable(
    op: CustomOpDef,
    forward: Callable[..., Any],
    setup: Callable[..., None],
    backward: Callable[..., Any],
    backward_op: Callable[..., Any],
    backward_launch: Callable[..., Any],
) -> Callable[..., Any]:
    """The call of a kernel with gradients.

    Under ``torch.compile`` it is ``op``, which the compiler does not look into. In eager mode that would cost the
    host four times as much as the ``autograd.Function`` which is used there.

    Args:
        forward: what the op computes, launched without it.
        setup: ``setup(ctx, inputs, output)`` keeps what backward needs.
        backward: ``backward(launch, ctx, *gradients)``; ``launch`` is one of the next two.
        backward_op, backward_launch: the op of backward, and the launch without it.
    """

    def launch(ctx: Any, *arguments: Any) -> Any:
        # With a ``setup_context`` PyTorch would inspect the signature of every call, for 17 microseconds.
        output = forward(*arguments)
        setup(ctx, arguments, output)
        return output

    def in_eager(ctx: Any, *gradients: Tensor) -> Any:
        return backward(backward_launch, ctx, *gradients)

    def in_op(ctx: Any, *gradients: Tensor) -> Any:
        return backward(backward_op, ctx, *gradients)

    members = {
        "forward": staticmethod(launch),
        "backward": staticmethod(torch.autograd.function.once_differentiable(in_eager)),
    }
    function: Any = type(op._name, (torch.autograd.Function,), members)
    op.register_autograd(in_op, setup_context=setup)

    def call(*arguments: Any) -> Any:
        return op(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)

    return call


def within_op(launch: Callable[..., Any], composite: Callable[..., Any], example: Tensor, *arguments: Any) -> Any:
    """The body of an op: the kernel on CUDA, and the same in plain torch elsewhere."""
    return launch(*arguments, wrap=wrap_triton) if example.is_cuda else composite(*arguments)
