"""Every Triton program, forward and backward, against float64: interpreted, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.parallel import Layout, Objective
from tests.kernels import numerics
from tests.kernels.numerics import Errors, Interpreter
from tests.pool import RankPool
from tests.whole import assemble, assert_close

ULP = 0.51
"""Of what is computed in float32 and rounded once to half width."""
WIDE = 3e-7
"""Largest error over largest value, of float32."""
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
FEW = settings(max_examples=12)
EVERYTHING = Objective(label_smoothing=0.1, z_loss=1e-3)


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    pool = Interpreter()
    yield pool
    pool.close()


def assert_rms_norm(errors: Errors, dtype: torch.dtype, elements: int) -> None:
    if dtype == torch.float32:
        assert all(error.highest <= WIDE for error in errors.values()), errors
    else:
        assert errors["y"].ulp <= ULP, errors
        # 1.7e-3 is the mean over many roundings to bfloat16; one alone may be 2^-8.
        assert errors["dx"].norm <= (1.7e-3 if elements > 10_000 else 2**-8), errors
        assert "s" not in errors or errors["s"].ulp <= ULP, errors
    assert errors["dw"].norm <= 1e-6, errors


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("columns", [4080, 170, 81, 8192, 8200, 16400, 1])
def test_rms_norm_holds_its_contract(
    interpreter: Interpreter, columns: int, dtype: torch.dtype, residual: bool
) -> None:
    errors = interpreter.errors(numerics.rms_norm_errors, (3, columns), dtype, residual, False)
    assert_rms_norm(errors, dtype, 3 * columns)


def test_rms_norm_of_any_shape_and_strides_holds_its_contract(interpreter: Interpreter) -> None:
    @FEW
    @given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 700), DTYPES, st.booleans(), st.booleans())
    def claim(leading: list[int], columns: int, dtype: torch.dtype, residual: bool, strided: bool) -> None:
        errors = interpreter.errors(numerics.rms_norm_errors, (*leading, columns), dtype, residual, strided)
        assert_rms_norm(errors, dtype, 0)

    claim()


@pytest.mark.parametrize("rows", [0, 1])
def test_no_row_and_one_row_are_rows_too(interpreter: Interpreter, rows: int) -> None:
    half = torch.bfloat16
    assert_rms_norm(interpreter.errors(numerics.rms_norm_errors, (rows, 81), half, True, True), half, 0)
    assert_swiglu(interpreter.errors(numerics.swiglu_errors, (rows, 81), half, True, True), half)
    turned = interpreter.errors(numerics.rope_errors, (rows, 3, 2, 6), 4, torch.float32, True, True, 1)
    assert all(error.highest <= WIDE for error in turned.values())
    assert interpreter.errors(numerics.cross_entropy_errors, rows, 81, half, True, EVERYTHING, 1)[0] <= 2e-6


def test_the_gradient_of_the_norms_weight_repeats_to_the_bit(interpreter: Interpreter) -> None:
    assert interpreter.errors(numerics.weight_gradient_twice, 530, 33)
    assert interpreter.errors(numerics.weight_gradient_twice, 5, 8300)


@pytest.mark.parametrize("packed", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "rotated"), [(170, 170), (128, 128), (81, 54), (6, 2)])
def test_rope_holds_its_contract(
    interpreter: Interpreter, width: int, rotated: int, dtype: torch.dtype, packed: int
) -> None:
    errors = interpreter.errors(numerics.rope_errors, (2, 3, 4, width), rotated, dtype, False, False, packed)
    bound = WIDE if dtype == torch.float32 else 4e-3
    assert all(error.highest <= bound for error in errors.values()), errors


@pytest.mark.parametrize("packed", [0, 1])
def test_rope_finds_its_rows_where_sequences_lie_apart(interpreter: Interpreter, packed: int) -> None:
    errors = interpreter.errors(numerics.rope_errors, (3, 2, 2, 6), 6, torch.float32, True, False, packed)
    assert all(error.highest <= WIDE for error in errors.values()), errors


def test_rope_of_any_shape_strides_and_positions_holds_its_contract(interpreter: Interpreter) -> None:
    sizes = st.tuples(st.integers(0, 2), st.integers(0, 4), st.integers(1, 5), st.integers(2, 90))

    @FEW
    @given(sizes, st.data(), st.sampled_from([torch.float32, torch.bfloat16]), st.booleans(), st.booleans())
    def claim(
        shape: tuple[int, int, int, int], data: st.DataObject, dtype: torch.dtype, strided: bool, positions: bool
    ) -> None:
        rotated = 2 * data.draw(st.integers(1, shape[3] // 2))
        packed = data.draw(st.integers(0, 3))
        errors = interpreter.errors(numerics.rope_errors, shape, rotated, dtype, strided, positions, packed)
        bound = WIDE if dtype == torch.float32 else 4e-3
        assert all(error.highest <= bound for error in errors.values()), errors

    claim()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [11008, 1025, 81])
def test_swiglu_holds_its_contract(interpreter: Interpreter, columns: int, dtype: torch.dtype, packed: bool) -> None:
    errors = interpreter.errors(numerics.swiglu_errors, (2, columns), dtype, False, packed)
    assert_swiglu(errors, dtype)


def test_swiglu_of_any_shape_and_strides_holds_its_contract(interpreter: Interpreter) -> None:
    @FEW
    @given(st.lists(st.integers(0, 3), max_size=2), st.integers(1, 3000), DTYPES, st.booleans(), st.booleans())
    def claim(leading: list[int], columns: int, dtype: torch.dtype, strided: bool, packed: bool) -> None:
        assert_swiglu(interpreter.errors(numerics.swiglu_errors, (*leading, columns), dtype, strided, packed), dtype)

    claim()


def assert_swiglu(errors: Errors, dtype: torch.dtype) -> None:
    if dtype == torch.float32:
        assert all(error.highest <= WIDE for error in errors.values()), errors
    else:
        assert all(error.ulp <= ULP for error in errors.values()), errors


def test_tensors_whose_last_stride_is_not_1_are_taken_too(interpreter: Interpreter) -> None:
    found, expected = (interpreter.errors(numerics.of_columns, backend) for backend in ("triton", "torch"))
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert_close(ours, theirs, 1e-6, f"tensor {number}")


def test_swiglu_of_extreme_gates_is_its_limit(interpreter: Interpreter) -> None:
    found = interpreter.errors(numerics.swiglu_at_the_ends)
    limits = [[2e4, 200.0, 0, 0, 0, 0], [2.0, 2.0, 1.0, 0, 0, 0], [1e4, 100.0, 0, 0, 0, 0]]
    for tensor, limit in zip(found, limits, strict=True):
        torch.testing.assert_close(tensor, torch.tensor(limit), rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("objective", [Objective(), EVERYTHING], ids=["plain", "smoothed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("columns", "ranks"), [(151_665, 1), (151_665, 8), (8193, 1), (81, 1), (20, 4)])
def test_cross_entropy_holds_its_contract(
    interpreter: Interpreter, columns: int, ranks: int, dtype: torch.dtype, objective: Objective
) -> None:
    rows = 2 if columns > 1000 else 7
    loss, gradient = interpreter.errors(numerics.cross_entropy_errors, rows, columns, dtype, False, objective, ranks)
    assert loss <= 2e-6
    assert gradient.norm <= (1e-6 if dtype == torch.float32 else 4e-3)


def test_cross_entropy_of_any_shape_and_strides_holds_its_contract(interpreter: Interpreter) -> None:
    @FEW
    @given(st.integers(0, 6), st.integers(1, 3000), DTYPES, st.booleans(), st.booleans(), st.sampled_from([1, 2, 5]))
    def claim(rows: int, columns: int, dtype: torch.dtype, strided: bool, everything: bool, ranks: int) -> None:
        objective = EVERYTHING if everything else Objective()
        loss, gradient = interpreter.errors(
            numerics.cross_entropy_errors, rows, columns, dtype, strided, objective, ranks
        )
        assert loss <= 2e-6
        assert gradient.norm <= (1e-6 if dtype == torch.float32 else 4e-3)

    claim()


@pytest.mark.parametrize("shift", [1e3, -1e3])
def test_a_shift_of_all_logits_changes_no_loss(interpreter: Interpreter, shift: float) -> None:
    loss, gradient = interpreter.errors(
        numerics.cross_entropy_errors, 7, 3000, torch.float32, False, Objective(), 1, shift
    )
    assert loss <= 2e-6
    assert gradient.norm <= 1e-6


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)], ids=str)
def test_a_model_of_triton_programs_is_the_model_of_the_references(
    interpreter: Interpreter, ranks: RankPool, layout: Layout
) -> None:
    expected = ranks.run(layout, numerics.trained_model, "torch")
    found = interpreter.run(layout, numerics.trained_model, "triton")
    for (loss, _), (wanted, _) in zip(found, expected, strict=True):
        assert_close(loss, wanted, 1e-6, "loss")
    gradients = [assemble(parts for _, parts in results) for results in (found, expected)]
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[1].items():
        assert_close(gradients[0][name], value, 2e-6, f"gradient of {name}")


def test_what_is_recomputed_selectively_has_the_bits_that_it_had(interpreter: Interpreter) -> None:
    assert interpreter.errors(numerics.recomputed_bits)
