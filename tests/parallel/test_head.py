"""An output head with a bias, its gathered logits and its losses equal their dense forms in float64."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ArgonneError,
    ColumnParallelLinear,
    Constant,
    Layout,
    Normal,
    Objective,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelHead,
    complete_gradients,
    initialise,
    sharded_parameters,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_logits,
)
from argonne.parallel.tensor_parallel import linear_cross_entropy as module
from tests.parallel.operands import (
    KINDS,
    SEEDS,
    assert_same,
    fill,
    leading_dimensions,
    own_tokens,
    under,
    values,
    whole_tokens,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

SIZES = [1, 2, 3]


@dataclass(frozen=True)
class Case:
    """A whole weight and bias, and their operands, which every process makes again from the seed."""

    vocabulary: int
    hidden: int
    leading: tuple[int, ...]
    sequence: bool = False
    gather: bool = True
    kind: str = "normal"
    seed: int = 0

    def drawn(self, *shape: int, offset: int) -> Tensor:
        return values(*shape, kind=self.kind, seed=self.seed + offset)

    @property
    def wholes(self) -> dict[str, Tensor]:
        weight = self.drawn(self.vocabulary, self.hidden, offset=0)
        return {"weight": weight, "bias": self.drawn(self.vocabulary, offset=1)}

    @property
    def x(self) -> Tensor:
        return self.drawn(*self.leading, self.hidden, offset=2)

    @property
    def gradient(self) -> Tensor:
        return self.drawn(*self.leading, self.vocabulary, offset=3)


@st.composite
def cases(draw: st.DrawFn, size: int) -> Case:
    sequence = draw(st.booleans())
    leading = draw(leading_dimensions(size, sequence))
    shape = draw(st.integers(1, 60)), draw(st.integers(1, 5)), leading
    return Case(*shape, sequence, draw(st.booleans()), draw(KINDS), draw(SEEDS))


@dataclass(frozen=True)
class Found:
    """What one rank has after forward and backward."""

    result: Tensor
    x_gradient: Tensor
    gradients: Parts
    padding: float
    """What is in the rows past the rank's tokens, of the parameters and of their gradients."""
    held: tuple[int, int]


def found_of(layer: VocabParallelHead, groups: ProcessGroups, result: Tensor, x: Tensor) -> Found:
    complete_gradients(sharded_parameters(layer, groups), groups)
    assert x.grad is not None
    rows = [whole[layer.range.tokens :] for p in layer.parameters() for whole in (p.detach(), p.grad)]
    padding = sum(float(row.abs().sum()) for row in rows)
    gradients = parts_of(layer, groups, lambda p: p.grad)
    return Found(result.detach().clone(), x.grad, gradients, padding, (layer.range.start, layer.range.stop))


def head_of(groups: ProcessGroups, case: Case) -> tuple[VocabParallelHead, Tensor]:
    precision, gather = Precision(case.x.dtype, case.x.dtype), case.gather
    layer = VocabParallelHead(
        case.vocabulary, case.hidden, groups, bias=True, gather_output=gather, precision=precision
    )
    fill(layer, groups, case.wholes)
    return layer, own_tokens(case.x, groups).clone().requires_grad_()


def logits(groups: ProcessGroups, case: Case) -> Found:
    groups = under(groups, case.sequence)
    layer, x = head_of(groups, case)
    y = layer(x)
    assert torch.equal(
        vocab_parallel_logits(x, layer), y[..., layer.range.start : layer.range.stop] if case.gather else y
    )
    y.backward(case.gradient if case.gather else case.gradient[..., layer.range.start : layer.range.stop])
    return found_of(layer, groups, y, x)


@pytest.mark.parametrize("size", SIZES, scope="module")
def test_logits_with_a_bias_and_all_gradients_equal_dense_gathered_or_not(ranks: RankPool, size: int) -> None:
    @given(cases(size))
    @example(Case(5, 3, (12,), True))  # ranks without a token
    @example(Case(5, 3, (12,), False, False))
    @settings(max_examples=60)
    def claim(case: Case) -> None:
        results = ranks.run(Layout(tensor=size), logits, case)
        x, wholes = case.x.requires_grad_(), {name: w.requires_grad_() for name, w in case.wholes.items()}
        expected = F.linear(x, wholes["weight"], wholes["bias"])
        expected.backward(case.gradient)
        for rank, found in enumerate(results):
            own = expected if case.gather else expected[..., slice(*found.held)]
            assert_same(found.result, own.detach(), case.kind, f"logits on rank {rank}")
            assert found.padding == 0, f"rank {rank}"
        assert_same(whole_tokens([f.x_gradient for f in results], case.sequence), x.grad, case.kind, "input gradient")
        gradients = assemble(found.gradients for found in results)
        assert set(gradients) == {"weight", "bias"}
        for name, gradient in gradients.items():
            assert_same(gradient, wholes[name].grad, case.kind, f"gradient of the {name}")

    claim()


@dataclass(frozen=True)
class Loss:
    case: Case
    objective: Objective = field(default_factory=Objective)
    fused: bool = True
    reduction: Literal["sum", "none"] = "sum"
    frozen: tuple[str, ...] = ()

    @property
    def targets(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.case.seed)
        targets = torch.randint(0, self.case.vocabulary, self.case.leading, generator=generator)
        return targets.masked_fill(
            torch.rand(self.case.leading, generator=generator) < 0.3, self.objective.ignore_index
        )

    @property
    def scale(self) -> Tensor:
        return (
            self.case.drawn(*self.case.leading, offset=9) if self.reduction == "none" else torch.tensor(-0.7).double()
        )

    def dense(self, x: Tensor, wholes: dict[str, Tensor]) -> Tensor:
        z = F.linear(x, wholes["weight"], wholes["bias"])
        options: dict[str, Any] = {"label_smoothing": self.objective.label_smoothing, "reduction": "none"}
        losses = F.cross_entropy(z, self.targets, ignore_index=self.objective.ignore_index, **options)
        squares = self.objective.z_loss * z.logsumexp(-1).square()
        losses = losses + torch.where(self.targets == self.objective.ignore_index, 0.0, squares)
        return losses.sum() if self.reduction == "sum" else losses


def trained(groups: ProcessGroups, loss: Loss) -> Found:
    groups = under(groups, loss.case.sequence)
    layer, x = head_of(groups, loss.case)
    for name in loss.frozen:
        layer.get_parameter(name).requires_grad_(False)
    apart = {"cpu": 16 if loss.case.gather else 1}  # rows of logits that are a little apart, as on a GPU
    with mock.patch.multiple(module, _CHUNK={"cpu": 1}, _FEWEST=5, _ROW=apart):  # 12 tokens in chunks of 5, 5 and 2
        if loss.fused:
            value = vocab_parallel_linear_cross_entropy(x, layer, loss.targets, loss.objective, loss.reduction)
        else:
            local = vocab_parallel_logits(x, layer)
            value = vocab_parallel_cross_entropy(local, loss.targets, layer.range, layer.axis, loss.objective)
            value = value.sum() if loss.reduction == "sum" else value
        value.backward(loss.scale)
    for name in loss.frozen:
        assert layer.get_parameter(name).grad is None
        layer.get_parameter(name).grad = torch.zeros_like(layer.get_parameter(name))
    return found_of(layer, groups, value, x)


@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("size", SIZES, scope="module")
def test_the_losses_of_a_head_with_a_bias_count_it(
    ranks: RankPool, size: int, fused: bool, reduction: Literal["sum", "none"], sequence: bool
) -> None:
    objectives = [Objective(), Objective(label_smoothing=0.2, z_loss=0.05)]
    for number, (objective, frozen) in enumerate([(o, f) for o in objectives for f in ((), ("weight",), ("bias",))]):
        loss = Loss(Case(21, 4, (12,), sequence, number % 2 == 0, seed=number), objective, fused, reduction, frozen)
        results = ranks.run(Layout(tensor=size), trained, loss)
        x, wholes = loss.case.x.requires_grad_(), {name: w.requires_grad_() for name, w in loss.case.wholes.items()}
        expected = loss.dense(x, wholes)
        expected.backward(loss.scale)
        for rank, found in enumerate(results):
            assert_close(found.result, expected.detach(), 1e-12, f"loss on rank {rank}")
            assert found.padding == 0, f"rank {rank}"
        assert x.grad is not None
        assert_close(whole_tokens([f.x_gradient for f in results], sequence), x.grad, 1e-12, "input gradient")
        for name, gradient in assemble(found.gradients for found in results).items():
            whole = wholes[name].grad
            assert whole is not None
            assert_close(
                gradient, torch.zeros_like(whole) if name in frozen else whole, 1e-12, f"gradient of the {name}"
            )


def layers_with_biases(groups: ProcessGroups, **options: Any) -> nn.ModuleDict:
    return nn.ModuleDict(
        {
            "column": ColumnParallelLinear(3, 12, groups, bias=True, **options),
            "row": RowParallelLinear(12, 5, groups, bias=True, **options),
            "head": VocabParallelHead(19, 3, groups, bias=True, **options),
        }
    )


def begun(groups: ProcessGroups, asked: bool) -> Parts:
    model = layers_with_biases(groups, **({"bias_initialiser": Normal(2.0)} if asked else {}))
    initialise(sharded_parameters(model, groups), seed=3)
    return [(region, part) for region, part in parts_of(model, groups, lambda p: p) if region.name.endswith("bias")]


@pytest.mark.parametrize("asked", [False, True])
def test_biases_begin_as_asked_with_the_same_values_at_every_size(ranks: RankPool, asked: bool) -> None:
    alone, *others = (assemble(ranks.run(Layout(tensor=size), begun, asked)) for size in SIZES)
    assert {name: len(whole) for name, whole in alone.items()} == {"column.bias": 12, "row.bias": 5, "head.bias": 19}
    for name, whole in alone.items():
        assert whole.count_nonzero() == (whole.numel() if asked else 0)
        for other in others:
            assert torch.equal(other[name], whole), name


@pytest.mark.parametrize("layer", [ColumnParallelLinear, RowParallelLinear, VocabParallelHead])
def test_a_beginning_of_no_bias_is_refused(layer: type[nn.Module]) -> None:
    with pytest.raises(ArgonneError) as refusal:
        layer(4, 4, ProcessGroups.single(), bias_initialiser=Constant(1.0))
    assert str(refusal.value) == (
        "bias_initialiser=Constant(value=1.0) has no effect with bias=False; legal: None, or bias=True"
    )
