"""The dtypes of the linear layers: what is computed in which, and where a gradient is rounded."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelHead,
    complete_gradients,
    sharded_parameters,
)
from tests.parallel.operands import (
    KINDS,
    SEEDS,
    SIZES,
    assert_same,
    attention_parts,
    fill,
    own_tokens,
    under,
    values,
    whole_tokens,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of


def column_then_row(groups: ProcessGroups, sequence: bool, wholes: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """The pair of one transformer layer: bf16 or float32 compute on float32 weights."""
    groups = under(groups, sequence)
    precision = Precision(torch.float32, x.dtype)
    up = ColumnParallelLinear(x.shape[-1], 24, groups, precision=precision)
    down = RowParallelLinear(24, 5, groups, precision=precision)
    fill(up, groups, {"weight": wholes["up"]})
    fill(down, groups, {"weight": wholes["down"]})
    x = own_tokens(x, groups).clone().requires_grad_()
    y = down(up(x))
    y.sum().backward()
    for layer in (up, down):
        assert layer.weight.dtype == torch.float32
        assert layer.weight.grad is not None
        assert layer.weight.grad.dtype == torch.float32
    assert x.grad is not None
    return [y.detach(), x.grad]


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_column_then_row_computes_in_the_compute_dtype_with_float32_masters(
    ranks: RankPool, size: int, dtype: torch.dtype, sequence: bool
) -> None:
    wholes = {"up": values(24, 3, kind="integers", seed=1).clamp(-1, 1)}
    wholes["down"] = values(5, 24, kind="integers", seed=2).clamp(-1, 1)
    x = values(size, 3, kind="integers", seed=3).clamp(-2, 2).to(dtype)
    whole_x = x.float().clone().requires_grad_()
    expected = whole_x @ wholes["up"].T @ wholes["down"].T
    expected.sum().backward()
    results = ranks.run(Layout(tensor=size), column_then_row, sequence, wholes, x)
    y, gradient = (whole_tokens([result[i] for result in results], sequence) for i in range(2))
    assert y.dtype == dtype
    assert gradient.dtype == dtype
    assert torch.equal(y.float(), expected.detach())
    assert torch.equal(gradient.float(), whole_x.grad)


TOKENS, WIDTH, OUT = 24, 24, 48


@dataclass(frozen=True)
class Run:
    """Two micro-batches through one layer."""

    layer: str
    parameters: torch.dtype
    compute: torch.dtype
    kind: str = "normal"
    sequence: bool = False
    frozen: bool = False
    seed: int = 0

    @property
    def weight(self) -> Tensor:
        return values(OUT, WIDTH, kind=self.kind, seed=self.seed).to(self.parameters)

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        """The whole input, and the gradient of the whole output."""
        seed = self.seed + 10 * number
        x, gradient = (values(TOKENS, n, kind=self.kind, seed=seed + n) for n in (WIDTH, OUT))
        return x.to(self.compute), gradient.to(self.compute)

    def reference(self) -> Tensor:
        """The whole weight's gradient, in float64."""
        batches = [self.batch(number) for number in range(2)]
        return sum((gradient.double().T @ x.double() for x, gradient in batches), torch.zeros(()))


def accumulate(groups: ProcessGroups, run: Run) -> list[tuple[Parts, list[Tensor], torch.dtype | None]]:
    """By the plain path and by accumulation: the weight's gradient, those of the inputs, and a dtype."""
    groups = under(groups, run.sequence)
    rank, size = groups.tensor.rank, groups.tensor.size
    own_rows = slice(rank * OUT // size, (rank + 1) * OUT // size)
    found = []
    for in_product in (False, True):
        precision = Precision(run.parameters, run.compute, in_product)
        layer: nn.Module
        if run.layer == "head":
            layer = VocabParallelHead(OUT, WIDTH, groups, precision=precision)
        else:
            make = ColumnParallelLinear if run.layer == "column" else RowParallelLinear
            layer = make(WIDTH, OUT, groups, precision=precision)
        fill(layer, groups, {"weight": run.weight})
        layer.weight.requires_grad_(not run.frozen)
        inputs = []
        for number in range(2):
            x, gradient = run.batch(number)
            if run.layer == "row":
                x, gradient = x.chunk(size, -1)[rank], own_tokens(gradient, groups)
            else:
                held = slice(layer.range.start, layer.range.stop) if run.layer == "head" else own_rows
                x, gradient = own_tokens(x, groups), gradient[:, held]
            inputs.append(x.clone().requires_grad_())
            layer(inputs[-1]).backward(gradient)
        gradient = layer.weight.grad
        parts = [] if gradient is None else parts_of(layer, groups, lambda p: p.grad)
        found.append((parts, [x.grad for x in inputs], None if gradient is None else gradient.dtype))
    return found


LAYERS = ["column", "row", "head"]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_accumulation_over_micro_batches_equals_the_plain_path_in_float64(
    ranks: RankPool, size: int, layer: str
) -> None:
    @given(KINDS, st.booleans(), SEEDS)
    @settings(max_examples=6)
    def claim(kind: str, sequence: bool, seed: int) -> None:
        dtype = values(1, kind=kind, seed=0).dtype
        run = Run(layer, dtype, dtype, kind, sequence, seed=seed)
        results = ranks.run(Layout(tensor=size), accumulate, run)
        plain, accumulated = (assemble(result[path][0] for result in results)["weight"] for path in range(2))
        assert_same(plain, run.reference().to(dtype), kind, "gradient by the plain path")
        assert_same(accumulated, run.reference().to(dtype), kind, "gradient by accumulation")
        for rank, ((_, plain_inputs, _), (_, inputs, _)) in enumerate(results):
            for one, other in zip(plain_inputs, inputs, strict=True):
                assert torch.equal(one, other), f"input gradient on rank {rank}"

    claim()


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 2, 4], scope="module")
def test_accumulation_keeps_what_the_plain_path_rounds_to_bfloat16(
    ranks: RankPool, size: int, parameters: torch.dtype, layer: str, sequence: bool
) -> None:
    run = Run(layer, parameters, torch.bfloat16, sequence=sequence)
    results = ranks.run(Layout(tensor=size), accumulate, run)
    for rank, ((*_, plain_dtype), (*_, dtype)) in enumerate(results):
        assert plain_dtype == parameters, f"rank {rank}"
        assert dtype == torch.float32, f"rank {rank}"
    reference = run.reference()
    plain, accumulated = (assemble(result[path][0] for result in results)["weight"] for path in range(2))
    error, plain_error = ((found.double() - reference).norm() / reference.norm() for found in (accumulated, plain))
    # Products of bfloat16 are exact in float32; only their sums are rounded.
    assert error < 1e-6, f"off by {error:.1e}"
    assert plain_error > 1e-3, f"the plain path is off by {plain_error:.1e} only: nothing has been compared"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_accumulation_leaves_a_frozen_weight_alone(ranks: RankPool, size: int, layer: str) -> None:
    run = Run(layer, torch.bfloat16, torch.bfloat16, frozen=True)
    for rank, ((_, plain_inputs, plain), (_, inputs, dtype)) in enumerate(
        ranks.run(Layout(tensor=size), accumulate, run)
    ):
        assert plain is None, f"rank {rank}"
        assert dtype is None, f"rank {rank} has a gradient of a frozen weight"
        for one, other in zip(plain_inputs, inputs, strict=True):
            assert torch.equal(one, other), f"input gradient on rank {rank}"


def accumulate_shared(groups: ProcessGroups, x: Tensor, gradient: Tensor) -> Parts:
    precision = Precision(torch.bfloat16, torch.bfloat16, accumulate_in_product=True)
    size = groups.tensor.size
    layer = ColumnParallelLinear(x.shape[-1], attention_parts(size, 1, 3, size), groups, precision=precision)
    layer(x).backward(gradient[groups.tensor.rank])
    complete_gradients(sharded_parameters(layer, groups), groups)
    return parts_of(layer, groups, lambda p: p.grad)


def test_a_float32_gradient_of_shared_bfloat16_blocks_is_summed_in_float32(ranks: RankPool) -> None:
    x = values(TOKENS, 5, kind="normal", seed=1).bfloat16()
    gradient = values(2, TOKENS, 9, kind="normal", seed=2).bfloat16()  # 3 queries, 3 keys, 3 values on each rank
    found = assemble(ranks.run(Layout(tensor=2), accumulate_shared, x, gradient))
    both = gradient.double().sum(0)
    for name, columns in (("k_proj", slice(3, 6)), ("v_proj", slice(6, 9))):
        expected = both[:, columns].T @ x.double()
        error = (found[f"{name}.weight"].double() - expected).norm() / expected.norm()
        assert error < 1e-6, f"gradient of {name} is off by {error:.1e}"
