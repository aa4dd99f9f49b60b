"""The claims of test_interpreted.py on a GPU, at the sizes of training; nothing here runs without one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from argonne.parallel import Objective
from tests.kernels import numerics
from tests.kernels.test_dispatch import op_calls
from tests.kernels.test_interpreted import EVERYTHING, assert_rms_norm, assert_swiglu

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def on_gpu() -> Iterator[None]:
    with torch.device("cuda"):
        yield


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 81, 170, 2048, 4080, 8192, 8200, 16384, 16400])
def test_rms_norm(columns: int, dtype: torch.dtype, strided: bool, residual: bool) -> None:
    errors = numerics.rms_norm_errors((3, 700, columns), dtype, residual, strided)
    assert_rms_norm(errors, dtype, 2100 * columns)


@pytest.mark.parametrize("columns", [33, 4080, 8300])
def test_the_gradient_of_the_norms_weight_repeats_to_the_bit(columns: int) -> None:
    assert numerics.weight_gradient_twice(5000, columns)


@pytest.mark.parametrize("packed", [0, 8])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "rotated"), [(170, 170), (128, 128), (81, 54), (64, 32)])
def test_rope(width: int, rotated: int, dtype: torch.dtype, strided: bool, positions: bool, packed: int) -> None:
    errors = numerics.rope_errors((2, 513, 24, width), rotated, dtype, strided, positions, packed)
    bound = 3e-7 if dtype == torch.float32 else 4e-3
    assert all(error.highest <= bound for error in errors.values()), errors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [81, 11008])
def test_swiglu(columns: int, dtype: torch.dtype, strided: bool, packed: bool) -> None:
    assert_swiglu(numerics.swiglu_errors((3, 300, columns), dtype, strided, packed), dtype)


@pytest.mark.parametrize("objective", [Objective(), EVERYTHING], ids=["plain", "smoothed"])
@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "ranks"), [(151_665, 1), (151_665, 8), (81, 1)])
def test_cross_entropy(columns: int, ranks: int, dtype: torch.dtype, strided: bool, objective: Objective) -> None:
    loss, gradient = numerics.cross_entropy_errors(300, columns, dtype, strided, objective, ranks)
    assert loss <= 2e-6
    assert gradient.norm <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("name", op_calls())
def test_op_is_registered_as_torch_wants_it(name: str) -> None:
    with torch.device("cpu"):
        op, arguments = op_calls()[name]
    moved = [a.detach().cuda().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in arguments]
    torch.library.opcheck(op, tuple(moved))
