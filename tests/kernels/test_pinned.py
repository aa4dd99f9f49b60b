"""The kernels of a reproducible run: as exact as the others, and with bits that do not depend on what lies beside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.kernels import rms_norm, swiglu
from argonne.kernels.swiglu import VECTOR
from argonne.parallel import ArgonneError

SEEDS = st.integers(0, 2**31)


def drawn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def traced(gate: Tensor, up: Tensor, gradient: Tensor, pinned: bool = True) -> list[Tensor]:
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    y = swiglu(*leaves, pinned=pinned)
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient)]


def exact(gate: Tensor, up: Tensor, gradient: Tensor) -> list[Tensor]:
    leaves = [gate.double().detach().requires_grad_(), up.double().detach().requires_grad_()]
    y = F.silu(leaves[0]) * leaves[1]
    return [y.detach(), *torch.autograd.grad(y, leaves, gradient.double())]


@given(st.integers(1, 9), st.integers(1, 200), SEEDS)
def test_pinned_swiglu_is_as_exact_as_the_other(rows: int, columns: int, seed: int) -> None:
    operands = [drawn(rows, columns, seed=seed + number) for number in range(3)]
    expected = exact(*operands)
    for pinned in (True, False):
        for found, whole in zip(traced(*operands, pinned=pinned), expected, strict=True):
            assert ((found - whole).abs() <= 3e-6 * whole.abs() + 1e-6).all()


@given(st.integers(0, 9), st.integers(1, 3), SEEDS)
def test_swiglu_of_one_tensor_has_the_bits_of_two(rows: int, vectors: int, seed: int) -> None:
    packed, gradient = drawn(rows, 2 * vectors * VECTOR, seed=seed), drawn(rows, vectors * VECTOR, seed=seed + 1)
    expected = traced(*(half.contiguous() for half in packed.chunk(2, -1)), gradient, pinned=False)
    leaf = packed.clone().requires_grad_()
    y = swiglu(leaf)
    (found,) = torch.autograd.grad(y, leaf, gradient)
    assert torch.equal(y, expected[0])
    assert torch.equal(found, torch.cat(expected[1:], -1))


@given(st.integers(1, 6), st.lists(st.integers(1, 70), min_size=1, max_size=5), SEEDS)
@example(3, [1, 5, 64, 7], 1)
def test_an_element_of_pinned_swiglu_has_the_same_bits_wherever_it_lies(rows: int, cuts: list[int], seed: int) -> None:
    columns = sum(cuts)
    packed, gradient = drawn(rows, 2, columns, seed=seed), drawn(rows, columns, seed=seed + 1)

    def of(run: slice) -> list[Tensor]:
        leaf = packed[..., run].reshape(rows, -1).clone().requires_grad_()
        y = swiglu(leaf, pinned=True)
        (found,) = torch.autograd.grad(y, leaf, gradient[:, run].contiguous())
        return [y.detach(), found.view(rows, 2, -1)]

    whole, start = of(slice(0, columns)), 0
    for width in cuts:
        run = slice(start, start + width)
        assert all(torch.equal(part, x[..., run]) for part, x in zip(of(run), whole, strict=True))
        start += width


@given(st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), SEEDS)
def test_whole_vectors_need_no_pinning(rows: int, vectors: int, blocks: int, seed: int) -> None:
    width = vectors * VECTOR
    operands = [drawn(rows, blocks * width, seed=seed + number) for number in range(3)]
    whole = traced(*operands, pinned=False)
    for block in range(blocks):
        run = slice(block * width, (block + 1) * width)
        part = traced(*(x[:, run].contiguous() for x in operands), pinned=False)
        assert all(torch.equal(one, x[:, run]) for one, x in zip(part, whole, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pinned_swiglu_of_extreme_values_is_finite(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -200.0, -104.0, -88.8, -1e-30, 0.0, 1e-30, 88.8, 200.0, 1e4], dtype=dtype)
    up, gradient = torch.full_like(gate, 0.5), torch.full_like(gate, 2.0)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    for found, whole in zip(traced(gate, up, gradient), exact(gate, up, gradient), strict=True):
        assert found.isfinite().all()
        assert torch.allclose(found.double(), whole, rtol=tolerance, atol=1e-30)


def normed(x: Tensor, residual: Tensor | None, weights: list[Tensor], gradient: Tensor) -> tuple[list[Tensor], ...]:
    """Results, gradients of the inputs, and those of the weights."""
    inputs = [one.clone().requires_grad_() for one in (x, residual) if one is not None]
    leaves = [weight.clone().requires_grad_() for weight in weights]
    weight = leaves if len(leaves) > 1 else leaves[0]
    found = rms_norm(inputs[0], weight, 1e-5, residual=inputs[1] if len(inputs) > 1 else None)
    results = list(found) if isinstance(found, tuple) else [found]
    made = torch.autograd.grad(sum((y * gradient).sum() for y in results), [*inputs, *leaves])
    return [y.detach() for y in results], list(made[: len(inputs)]), list(made[len(inputs) :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("with_residual", [False, True])
def test_a_weight_for_each_of_several_runs_of_rows_is_one_weight(dtype: torch.dtype, with_residual: bool) -> None:
    @given(st.integers(2, 5), st.integers(1, 6), st.integers(1, 40), SEEDS)
    def claim(blocks: int, each: int, hidden: int, seed: int) -> None:
        x, residual, gradient = (drawn(blocks * each, hidden, seed=seed + number, dtype=dtype) for number in range(3))
        weight = drawn(hidden, seed=seed + 3)
        other = residual if with_residual else None
        results, of_inputs, (of_weight,) = normed(x, other, [weight], gradient)
        found, inputs, weights = normed(x, other, [weight] * blocks, gradient)
        assert all(torch.equal(one, y) for one, y in zip([*found, *inputs], [*results, *of_inputs], strict=True))
        assert torch.allclose(torch.stack(weights).double().sum(0), of_weight.double(), rtol=1e-3, atol=1e-3)
        for block, own in enumerate(weights):
            rows = slice(block * each, (block + 1) * each)
            alone = normed(x[rows], None if other is None else other[rows], [weight], gradient[rows])[2][0]
            assert torch.allclose(own, alone, rtol=1e-4, atol=1e-3), "that of its rows alone"

    claim()


def test_rows_that_are_not_so_many_runs_are_refused() -> None:
    with pytest.raises(ArgonneError, match="7 tokens are not 2 equal blocks of a reproducible sum; legal: a multiple"):
        rms_norm(torch.ones(7, 3), [torch.ones(3, requires_grad=True)] * 2, 1e-5).sum().backward()
