"""What is recomputed is computed once more, when backward first asks, and no bit of a gradient tells of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.kernels import Backend, apply_rope_packed, rms_norm, swiglu
from argonne.parallel.recomputed import recomputed, selectively
from tests.parallel.operands import values

CALLS: list[str] = []


def noted(name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*inputs: Tensor) -> Tensor:
        CALLS.append(name)
        return function(*inputs)

    return call


def gradients(run: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Of the inputs, through a result that all of them have a part in."""
    own = [x.clone().requires_grad_() for x in inputs]
    y = run(*own)
    return list(torch.autograd.grad(y, own, torch.arange(y.numel(), dtype=y.dtype).view_as(y).cos()))


def block(x: Tensor, gain: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, backend: Backend = "torch") -> Tensor:
    """Attention and feed-forward as blocks have them, with a view of a result and a result of two calls on the way."""
    heads = F.linear(rms_norm(x, gain, 1e-6, backend=backend), w1).view(1, len(x), 4, -1)
    cos, sin = values(2, len(x), heads.shape[-1] // 2, kind="normal", seed=8).to(x.dtype)
    query, key, value = apply_rope_packed(heads, cos, sin, 1, backend=backend)
    found = F.scaled_dot_product_attention(*(h.transpose(1, 2) for h in (query, key, value)), enable_gqa=True)
    normal, x = rms_norm(found.transpose(1, 2).reshape(len(x), -1), gain, 1e-6, residual=x, backend=backend)
    chained = recomputed(torch.sin, recomputed(torch.tanh, normal))
    return x + F.linear(swiglu(F.linear(chained, w2), backend=backend), w3)


def has_the_same_bits(dtype: torch.dtype, backend: Backend = "torch") -> bool:
    """Whether the gradients of a block are the same where it runs selectively."""
    shapes = (5, 8), (8,), (16, 8), (12, 8), (8, 6)
    inputs = [values(*shape, kind="normal", seed=seed).to(dtype) for seed, shape in enumerate(shapes)]
    run = partial(block, backend=backend)
    return all(map(torch.equal, gradients(run, *inputs), gradients(partial(selectively, run), *inputs)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_block_has_the_same_gradients_to_the_bit(dtype: torch.dtype) -> None:
    assert has_the_same_bits(dtype)


def test_each_call_is_repeated_once_and_only_those() -> None:
    def run(x: Tensor) -> Tensor:
        cheap = recomputed(noted("cheap", lambda x: x.sin() * x.cos()), x)
        return noted("dear", torch.exp)(cheap) * cheap.view(-1).view_as(cheap)

    x = values(3, 4, kind="normal", seed=1)
    CALLS.clear()
    expected = gradients(run, x)
    assert CALLS == ["cheap", "dear"]
    CALLS.clear()
    found = gradients(lambda x: selectively(run, x), x)
    assert CALLS == ["cheap", "dear", "cheap"]
    assert torch.equal(found[0], expected[0])


def test_a_second_backward_of_one_graph_is_as_the_first() -> None:
    x = values(3, 4, kind="normal", seed=1).requires_grad_()
    y = selectively(lambda x: recomputed(lambda x: x.sin() * x.exp(), x) ** 2, x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    assert torch.equal(first, torch.autograd.grad(y, x)[0])


def test_what_comes_out_otherwise_the_second_time_is_no_silent_fault() -> None:
    times: list[int] = []

    def fickle(x: Tensor) -> Tensor:
        times.append(1)
        return x.sin() if len(times) == 1 else x + 1

    x = values(3, kind="normal", seed=1).requires_grad_()
    y = selectively(lambda x: recomputed(fickle, x) ** 2, x)
    with pytest.raises(RuntimeError, match="kept 1 tensors for backward, and now 0"):
        y.sum().backward()


def test_outside_of_a_block_nothing_is_repeated_nor_after_a_fault_in_one() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("as it is meant to")

    x = values(3, kind="normal", seed=1).requires_grad_()
    with pytest.raises(ValueError, match="as it is meant to"):
        selectively(lambda x: recomputed(fails, x), x)
    CALLS.clear()
    recomputed(noted("cheap", torch.sin), x).sum().backward()
    assert CALLS == ["cheap"]
