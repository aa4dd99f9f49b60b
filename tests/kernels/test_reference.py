"""The torch references against float64 formulas written apart from them."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.kernels import (
    RMSNorm,
    RotaryEmbedding,
    SwiGLU,
    apply_rope,
    apply_rope_packed,
    cross_entropy,
    rms_norm,
    rope_tables,
    swiglu,
)
from argonne.parallel import Objective
from tests import dense
from tests.whole import assert_close

HALF = [torch.bfloat16, torch.float16]
# The most by which rounding once moves a value: half a unit in the last place, relative.
ROUNDING = {torch.bfloat16: 2.0**-9 * 2, torch.float16: 2.0**-12 * 2}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_rounded_once(found: Tensor, exact: Tensor) -> None:
    """Each element is within half a unit in the last place (and float32's own error) of ``exact``."""
    bound = exact.abs() * ROUNDING[found.dtype] * (1 + 1e-3) + torch.finfo(found.dtype).tiny
    worst = ((found.double() - exact).abs() - bound).max().item()
    assert worst <= 0, f"off by {worst:.1e} more than one rounding"


@given(
    st.lists(st.integers(1, 4), max_size=3), st.integers(1, 40), st.sampled_from([1e-6, 1e-5, 0.1]), st.integers(0, 99)
)
def test_rms_norm_equals_the_formula(leading: list[int], hidden: int, eps: float, seed: int) -> None:
    x, weight = 3 * normal(*leading, hidden, seed=seed), normal(hidden, seed=seed + 1)
    found = rms_norm(x, weight, eps)
    assert found.dtype == torch.float64
    assert_close(found, dense.norm(x, weight, eps), 1e-14, "rms_norm")


@pytest.mark.parametrize("dtype", HALF)
def test_rms_norm_of_half_width_is_rounded_once(dtype: torch.dtype) -> None:
    x, weight = (10 * normal(64, 300, seed=1)).to(dtype), normal(300, seed=2).float()
    found = rms_norm(x, weight, 1e-6)
    assert found.dtype == dtype
    assert_rounded_once(found, dense.norm(x.double(), weight.double(), 1e-6))


def test_rms_norm_of_zero_is_zero_and_of_large_float16_is_finite() -> None:
    weight = torch.ones(64)
    assert (rms_norm(torch.zeros(3, 64), weight, 1e-6) == 0).all()
    large = torch.full((1, 64), 6e4, dtype=torch.float16)  # its square is past float16
    assert torch.equal(rms_norm(large, weight, 1e-6), torch.ones(1, 64, dtype=torch.float16))


def test_rms_norm_does_not_depend_on_the_scale_of_its_input() -> None:
    x, weight = normal(5, 33, seed=3), normal(33, seed=4)
    assert_close(rms_norm(1024 * x, weight, 0.0), rms_norm(x, weight, 0.0), 1e-15, "scaled input")


def test_rope_tables_are_right_to_float64_at_the_last_positions() -> None:
    getcontext().prec = 50
    positions, head_dim, theta = 131_072, 12, 10_000
    cos, sin = rope_tables(positions, head_dim, theta, torch.float64)
    assert cos.shape == sin.shape == (positions, head_dim // 2)
    turn = 2 * Decimal("3.14159265358979323846264338327950288419716939937510")
    for position in (0, 1, 4095, positions - 1):
        for pair in range(head_dim // 2):
            angle = position * Decimal(theta) ** (Decimal(-2 * pair) / head_dim) % turn
            # The angle itself is rounded to float64, at up to half a unit in its last place.
            slack = 1e-15 + position * 2.0**-52
            assert cos[position, pair].item() == pytest.approx(math.cos(angle), abs=slack)
            assert sin[position, pair].item() == pytest.approx(math.sin(angle), abs=slack)


def test_rope_tables_in_float32_are_the_float64_ones_rounded() -> None:
    for narrow, wide in zip(rope_tables(5000, 16, 1e4), rope_tables(5000, 16, 1e4, torch.float64), strict=True):
        assert narrow.dtype == torch.float32
        assert torch.equal(narrow, wide.float())


ROPES = st.tuples(st.lists(st.integers(1, 3), max_size=2), st.integers(1, 9), st.integers(1, 8), st.integers(0, 99))


@given(ROPES, st.sampled_from([10.0, 1e4, 5e5]))
def test_rope_turns_each_half_split_pair_as_a_complex_number(
    drawn: tuple[list[int], int, int, int], theta: float
) -> None:
    leading, length, pairs, seed = drawn
    x = normal(*leading, length, 2 * pairs, seed=seed)
    found = apply_rope(x[..., None, :], *rope_tables(length, 2 * pairs, theta, torch.float64)).squeeze(-2)
    assert_close(found, dense.rotate(x, theta), 1e-14, "rotation")


def test_rope_scores_depend_on_the_distance_only() -> None:
    query, key = normal(1, 10, seed=5).expand(30, 10), normal(1, 10, seed=6).expand(30, 10)
    tables = rope_tables(30, 10, 1e4, torch.float64)
    turned = [apply_rope(x[:, None], *tables)[:, 0] for x in (query, key)]
    scores = turned[0] @ turned[1].T
    for distance in (-7, 0, 1, 12):
        diagonal = scores.diagonal(distance)
        assert_close(diagonal, diagonal[:1].expand_as(diagonal), 1e-13, f"scores at distance {distance}")
    assert (scores.diagonal(1)[0] - scores.diagonal(2)[0]).abs() > 1e-3


@pytest.mark.parametrize("dtype", [*HALF, torch.float32])
def test_rope_keeps_the_compute_dtype_and_rounds_once(dtype: torch.dtype) -> None:
    x = normal(2, 3, 50, 16, seed=7).to(dtype)
    found = apply_rope(x.transpose(1, 2), *rope_tables(50, 16, 1e4)).transpose(1, 2)
    assert found.dtype == dtype
    exact = dense.rotate(x.double(), 1e4)
    if dtype == torch.float32:
        assert_close(found.double(), exact, 1e-6, "rotation")
    else:
        # The two products may nearly cancel: float32's error is that of their size.
        error = (found.double() - exact).abs()
        assert (error <= exact.abs() * ROUNDING[dtype] * (1 + 1e-3) + 1e-6).all()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=3), st.integers(0, 99))
def test_swiglu_equals_the_formula(shape: list[int], seed: int) -> None:
    gate, up = 4 * normal(*shape, seed=seed), normal(*shape, seed=seed + 1)
    assert_close(swiglu(gate, up), gate / (1 + torch.exp(-gate)) * up, 1e-14, "swiglu")


@pytest.mark.parametrize("dtype", HALF)
def test_swiglu_of_half_width_is_rounded_once(dtype: torch.dtype) -> None:
    gate, up = (4 * normal(40, 50, seed=1)).to(dtype), normal(40, 50, seed=2).to(dtype)
    found = swiglu(gate, up)
    assert found.dtype == dtype
    g = gate.double()
    assert_rounded_once(found, g / (1 + torch.exp(-g)) * up.double())


def test_swiglu_of_extreme_gates_is_their_limit() -> None:
    gate = torch.tensor([1e4, -1e4, 0.0])
    assert torch.equal(swiglu(gate, torch.tensor([2.0, 2.0, 2.0])), torch.tensor([2e4, 0.0, 0.0]))


def test_gradients_equal_finite_differences() -> None:
    x, weight = normal(3, 6, seed=1).requires_grad_(), normal(6, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-5), (x, weight))
    tables = rope_tables(3, 6, 100.0, torch.float64)
    assert torch.autograd.gradcheck(lambda x: apply_rope(x[:, None], *tables), (x,))
    packed = normal(2, 3, 5, 6, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(lambda qkv: apply_rope_packed(qkv, *tables, 2), (packed,))
    residual = normal(3, 6, seed=5).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w, r: rms_norm(x, w, 1e-5, residual=r), (x, weight, residual))
    targets, objective = torch.tensor([4, -100, 0]), Objective(0.1, 0.01)
    assert torch.autograd.gradcheck(lambda z: cross_entropy(z, targets, objective), (x,))
    assert torch.autograd.gradcheck(swiglu, (x, normal(3, 6, seed=3).requires_grad_()))
    assert torch.autograd.gradcheck(swiglu, (x,))


def test_modules_compute_what_their_functions_do() -> None:
    norm, rotary, gate = RMSNorm(6), RotaryEmbedding(9, 4, 100.0), SwiGLU()
    assert [name for module in (norm, rotary, gate) for name in module.state_dict()] == ["weight"]
    x, residual = normal(2, 5, 6, seed=1).float(), normal(2, 5, 6, seed=2).float()
    assert torch.equal(norm(x), rms_norm(x, torch.ones(6), 1e-6))
    for found, expected in zip(norm(x, residual), rms_norm(x, norm.weight, 1e-6, residual=residual), strict=True):
        assert torch.equal(found, expected)
    heads, where = x.unflatten(0, (2, 1)).transpose(1, 2), torch.tensor([[0, 8, 1, 1, 2], [5, 4, 3, 2, 1]])
    assert torch.equal(rotary(heads, where), apply_rope(heads, *rope_tables(9, 4, 100.0), positions=where))
    assert torch.equal(gate(x), swiglu(x))
    assert torch.equal(gate(x, residual), swiglu(x, residual))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_packed_rope_is_rope_of_the_parts(
    batch: int, length: int, group: int, key_value_heads: int, pairs: int, rest: int
) -> None:
    heads = group * key_value_heads
    qkv = normal(batch, length, heads + 2 * key_value_heads, 2 * pairs + rest, seed=1)
    tables = rope_tables(length + 2, 2 * pairs, 100.0, torch.float64)
    query, key, value = apply_rope_packed(qkv, *tables, key_value_heads)
    parts = qkv.split([heads, key_value_heads, key_value_heads], 2)
    assert torch.equal(query, apply_rope(parts[0], *tables))
    assert torch.equal(key, apply_rope(parts[1], *tables))
    assert torch.equal(value, parts[2])
    turned = dense.rotate(parts[0][..., : 2 * pairs].transpose(1, 2), 100.0).transpose(1, 2)
    assert_close(query[..., : 2 * pairs], turned, 1e-14, "the part that turns")
    assert torch.equal(query[..., 2 * pairs :], parts[0][..., 2 * pairs :])
