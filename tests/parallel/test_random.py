"""Initial values depend on the seed, the name and the place of an element: on nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import Constant, Normal
from argonne.parallel.sharding import initialisation as module

SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


def whole(shape: tuple[int, ...], seed: int = 0, name: str = "w", std: float = 1.0) -> Tensor:
    tensor = torch.empty(shape)
    Normal(std).fill(tensor, seed, name, shape, (0,) * len(shape))
    return tensor


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """A whole shape with the start and the shape of a box in it, which may be empty."""
    shape = draw(SHAPES)
    start = tuple(draw(st.integers(0, extent)) for extent in shape)
    return shape, start, tuple(draw(st.integers(0, extent - at)) for extent, at in zip(shape, start, strict=True))


@given(boxes(), st.integers(0, 2**40), st.sampled_from(["w", "model.layers.3.mlp.up_proj.weight"]), st.booleans())
@settings(max_examples=200)
def test_any_box_equals_the_slice_of_the_whole(
    drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], seed: int, name: str, view: bool
) -> None:
    shape, start, extent = drawn
    index = tuple(slice(at, at + size) for at, size in zip(start, extent, strict=True))
    # Also into a view: a region of a fused parameter is one, and what lies around it is not touched.
    room = torch.full([size + 3 for size in extent], torch.nan) if view else torch.empty(extent)
    inside = tuple(slice(2, 2 + size) for size in extent) if view else (...,)
    Normal(0.3).fill(room[inside], seed, name, shape, start)
    assert torch.equal(room[inside], whole(shape, seed, name, 0.3)[index])
    if view:
        assert int(room.isnan().sum()) == room.numel() - math.prod(extent)


@given(SHAPES, st.integers(1, 40))
def test_elements_made_at_a_time_do_not_change_a_bit(shape: tuple[int, ...], chunk: int) -> None:
    usual = module._CHUNK
    expected = whole(shape)
    module._CHUNK = chunk
    try:
        assert torch.equal(whole(shape), expected)
    finally:
        module._CHUNK = usual


def test_values_do_not_depend_on_the_whole_shape_but_on_the_row_major_place() -> None:
    assert torch.equal(whole((6, 35)).flatten(), whole((210,)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_the_float32_values_converted(dtype: torch.dtype) -> None:
    tensor = torch.empty(50, 3, dtype=dtype)
    Normal(0.02).fill(tensor, 9, "w", (50, 3), (0, 0))
    assert torch.equal(tensor, whole((50, 3), 9, "w", 0.02).to(dtype))


def test_the_values_of_a_seed_are_fixed_for_ever() -> None:
    # A run that begins again with a later version begins with the same weights.
    expected = torch.tensor([-0.0228381362, 1.1398967505, 1.0836558342, 0.0430378318, 0.0065809828])
    torch.testing.assert_close(whole((5,), seed=1, name="model.norm.weight"), expected, rtol=1e-6, atol=1e-7)


def test_the_values_look_normal() -> None:
    n = 400_000
    x = whole((n,), seed=3).double()
    # Each bound is 4 standard errors of the moment over n independent standard normal draws.
    for power, moment, error in ((1, 0, 1), (2, 1, math.sqrt(2)), (3, 0, math.sqrt(15)), (4, 3, math.sqrt(96))):
        assert abs(x.pow(power).mean() - moment) < 4 * error / math.sqrt(n), f"moment {power}"
    cdf = 0.5 * (1 + torch.erf(x.sort().values / math.sqrt(2)))
    distance = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n)  # Kolmogorov-Smirnov at 0.1%
    assert 4.0 < x.abs().max() < 6.7
    for lag in (1, 2, 3, 4, 5, 8, 64, 1000):
        for f in (torch.Tensor.clone, torch.square):
            one, other = f(x[:-lag]) - f(x).mean(), f(x[lag:]) - f(x).mean()
            correlation = (one * other).mean() / f(x).var()
            assert abs(correlation) < 4.5 / math.sqrt(n), f"{f.__name__} at lag {lag}"


def test_seeds_and_names_give_unrelated_values() -> None:
    n = 100_000
    tensors = [
        whole((n,), 0, "a"),
        whole((n,), 1, "a"),
        whole((n,), 0, "b"),
        whole((n,), 10, "a"),
        whole((n,), 1, "0/a"),
    ]
    for i, one in enumerate(tensors):
        for other in tensors[:i]:
            assert abs((one * other).double().mean()) < 4.5 / math.sqrt(n)
    assert torch.equal(whole((9,), 0, "a"), whole((9,), 0, "a"))


def test_std_scales_the_same_draws() -> None:
    assert torch.equal(whole((100,), std=0.25), whole((100,)) * 0.25)
    assert (whole((100,), std=0.0) == 0).all()


def test_the_extreme_words_of_the_generator_give_finite_values(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extreme:
        def __init__(self, key: int, counter: int) -> None: ...

        def random_raw(self, count: int) -> np.ndarray:
            words = [0, 2**64 - 1, 2**32 - 1, 2**64 - 2**32]
            return np.array([words[i % 4] for i in range(count)], dtype=np.uint64)

    monkeypatch.setattr(module.np.random, "Philox", Extreme)
    values = whole((8,))
    assert values.isfinite().all()
    assert values.abs().max() == pytest.approx(math.sqrt(64 * math.log(2)))


@given(boxes(), st.floats(-2, 2, width=32))
def test_constant_fills_the_box(drawn: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]], value: float) -> None:
    shape, start, extent = drawn
    part = torch.empty(extent)
    Constant(value).fill(part, 0, "w", shape, start)
    assert (part == value).all()
