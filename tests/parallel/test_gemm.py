"""oneDNN's float32 products equal PyTorch's own: exactly for integers, and whatever the strides."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from argonne.parallel import Precision
from argonne.parallel.tensor_parallel import gemm
from argonne.parallel.tensor_parallel.gemm import product, suits_onednn
from argonne.parallel.tensor_parallel.products import local_linear


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN is there on CPUs that MKL suits, too, and must be right there."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(gemm, "_mkl_is_slow_here", lambda: True)


def integers(*shape: int, seed: int) -> Tensor:
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(st.lists(st.integers(0, 5), max_size=3), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans())
def test_a_product_of_integers_is_exact_for_any_shape_and_stride(
    leading: list[int], inner: int, outer: int, transposed: bool, bias: bool
) -> None:
    a, b = integers(*leading, inner, seed=1), integers(outer, inner, seed=2)
    if transposed:
        b = b.t().contiguous().t()
    added = integers(outer, seed=3) if bias else None
    found = product(a, b, added)
    expected = (a.double() @ b.double().t() + (0 if added is None else added.double())).float()
    assert found.shape == expected.shape
    assert torch.equal(found, expected)


@pytest.mark.parametrize("ready", [False, True])
@given(st.lists(st.integers(0, 2), max_size=3), st.integers(0, 9), st.integers(0, 9), st.booleans(), st.booleans())
@example([0], 0, 2, False, False)
def test_a_product_of_few_rows_is_exact_whichever_library_computes_it(
    ready: bool, leading: list[int], inner: int, outer: int, laid_out: bool, bias: bool
) -> None:
    a, b = integers(*leading, inner, seed=1), torch.nn.Parameter(integers(outer, inner, seed=2))
    if laid_out:
        gemm.lay_out_for_rows(b)
    added = integers(outer, seed=3) if bias else None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(gemm, "_openblas_is_ready", lambda: ready)
        found = gemm.product_of_rows(a, b, added)
        assert torch.equal(found, torch.nn.functional.linear(a, b, added))
        if len(leading) == 1:
            assert torch.equal(torch.from_numpy(gemm.prepared_for_rows(b, added)(a.numpy())), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(st.integers(0, 40), st.integers(0, 12), st.integers(0, 12), st.booleans())
@example(40, 12, 1, False)
@example(40, 1, 12, False)
def test_a_transposed_product_is_exact_and_contiguous_whichever_factor_comes_first(
    dtype: torch.dtype, rows: int, m: int, n: int, spread: bool
) -> None:
    a, b = (integers(rows, 2 * width, seed=width).to(dtype)[:, : width if spread else None] for width in (m, n))
    found = gemm.transposed_product(a, b)
    assert found.is_contiguous()
    assert torch.equal(found, (a.double().t() @ b.double()).to(dtype))


def test_a_linear_layer_without_communication_has_the_gradients_of_torch() -> None:
    leaves = [integers(4, 7, seed=1), integers(5, 7, seed=2), integers(5, seed=3)]
    found = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = [leaf.clone().requires_grad_() for leaf in leaves]
    gradient = integers(4, 5, seed=4)
    local_linear(*found, Precision()).backward(gradient)
    torch.nn.functional.linear(*expected).backward(gradient)
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_other_dtypes_and_a_switched_off_onednn_go_the_usual_way() -> None:
    assert suits_onednn(torch.ones(1))
    assert not suits_onednn(torch.ones(1, dtype=torch.float64))
    assert not suits_onednn(torch.ones(1, dtype=torch.bfloat16))
    with torch.backends.mkldnn.flags(enabled=False):
        assert not suits_onednn(torch.ones(1))
