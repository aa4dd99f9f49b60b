"""The layers one after another, over data and tensor parallel ranks, equal a dense model: gradients and steps."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Normal,
    Partition,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    clip_gradients,
    complete_gradients,
    gather_from_region,
    global_gradient_norm,
    scatter_to_region,
    sharded_parameters,
    vocab_parallel_linear_cross_entropy,
)
from tests.parallel.operands import SEEDS, values
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
LAYOUTS = [
    Layout(),
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(tensor=3, sequence_parallel=True),
    Layout(tensor=4),
    Layout(tensor=4, sequence_parallel=True),
    Layout(data=2, tensor=2),
    Layout(data=2, tensor=2, sequence_parallel=True),
    *(
        pytest.param(layout, marks=pytest.mark.slow)
        for layout in (
            Layout(tensor=8, sequence_parallel=True),
            Layout(data=2, tensor=4, sequence_parallel=True),
            Layout(data=4, tensor=2, sequence_parallel=True),
        )
    ),
]


@dataclass(frozen=True)
class Case:
    blocks: int
    hidden: int
    features: int
    """Of the feed-forward layers; not always a multiple of the ranks."""
    tokens: int
    """Of one replica."""
    vocabulary: int
    seed: int


@st.composite
def cases(draw: st.DrawFn, layout: Layout) -> Case:
    tokens = layout.tensor * draw(st.integers(1, 4))
    features = draw(st.integers(layout.tensor, 4 * layout.tensor))
    return Case(
        draw(st.integers(1, 3)), draw(st.integers(3, 7)), features, tokens, draw(st.integers(2, 60)), draw(SEEDS)
    )


class Block(nn.Module):
    """Column-parallel, GELU, row-parallel, and a norm that declares nothing."""

    def __init__(self, case: Case, groups: ProcessGroups) -> None:
        super().__init__()
        part = Partition.split("", case.features, groups.tensor.size, uneven=True)
        self.up = ColumnParallelLinear(case.hidden, [part], groups, bias=True, precision=DOUBLE)
        self.down = RowParallelLinear(part, case.hidden, groups, bias=True, precision=DOUBLE)
        self.norm = nn.LayerNorm(case.hidden, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(F.gelu(self.up(x))))


def dense_block(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    w = {name.removeprefix(prefix): weight for name, weight in weights.items() if name.startswith(prefix)}
    inner = F.gelu(x @ w["up.weight"].T + w["up.bias"])
    return F.layer_norm(x + inner @ w["down.weight"].T + w["down.bias"], x.shape[-1:], w["norm.weight"], w["norm.bias"])


def stack(groups: ProcessGroups, case: Case) -> tuple[Tensor, Tensor, Parts, Parts, float]:
    """Output, input gradient, weights, complete gradients and their norm, for this replica's tokens."""
    model = nn.Sequential(*(Block(case, groups) for _ in range(case.blocks)))
    parameters = sharded_parameters(model, groups)
    perturb(model, groups, case.seed)
    x = batch_of(case, groups.data.rank).requires_grad_()
    inner = scatter_to_region(x, groups.tensor, dim=0) if groups.sequence_parallel else x
    inner = model(inner)
    y = gather_from_region(inner, groups.tensor, dim=0) if groups.sequence_parallel else inner
    y.backward(batch_of(case, 100 + groups.data.rank))
    complete_gradients(parameters, groups)
    norm = global_gradient_norm(parameters, groups).item()
    parts = parts_of(model, groups, lambda p: p), parts_of(model, groups, lambda p: p.grad)
    return y.detach(), x.grad, *parts, norm


def batch_of(case: Case, number: int) -> Tensor:
    return values(case.tokens, case.hidden, kind="normal", seed=case.seed + 1 + number)


@torch.no_grad()
def perturb(model: nn.Module, groups: ProcessGroups, seed: int) -> None:
    """Away from zero biases and unit norms; whatever the layout, the same whole tensors."""
    for sharded in sharded_parameters(model, groups):
        for region in sharded.spec.regions:
            Normal(0.7).fill(sharded.parameter[region.local_index], seed, region.name, region.whole_shape, region.start)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_a_stack_of_blocks_equals_dense(ranks: RankPool, layout: Layout) -> None:
    @given(cases(layout))
    @settings(max_examples=12)
    def claim(case: Case) -> None:
        results = ranks.run(layout, stack, case)
        weights = assemble(weights for _, _, weights, _, _ in results)
        gradients = assemble(gradients for *_, gradients, _ in results)
        for weight in weights.values():
            weight.requires_grad_()
        for replica in range(layout.data):
            x = batch_of(case, replica).requires_grad_()
            y = x
            for block in range(case.blocks):
                y = dense_block(weights, f"{block}.", y)
            y.backward(batch_of(case, 100 + replica))
            # Behind a norm of nearly constant vectors a gradient may be nothing but rounding.
            scale = 1e-5 * batch_of(case, 100 + replica).norm().item()
            for rank in range(replica * layout.tensor, (replica + 1) * layout.tensor):
                found, x_gradient, *_ = results[rank]
                assert_close(found, y.detach(), 1e-10, f"output on rank {rank}")
                assert_close(x_gradient, x.grad, 1e-10, f"input gradient on rank {rank}", scale)
        magnitude = torch.cat([weight.grad.flatten() for weight in weights.values()]).norm().item()
        assert set(gradients) == set(weights)
        for name, weight in weights.items():
            assert_close(gradients[name], weight.grad, 1e-10, f"gradient of {name}", scale=1e-4 * magnitude)
        for rank, (*_, norm) in enumerate(results):
            assert norm == pytest.approx(magnitude, rel=1e-10), f"rank {rank}"

    claim()


class LanguageModel(nn.Module):
    """Both ends of a vocabulary, tied, around the blocks."""

    def __init__(self, case: Case, groups: ProcessGroups) -> None:
        super().__init__()
        self.embedding = VocabParallelEmbedding(case.vocabulary, case.hidden, groups, precision=DOUBLE)
        self.blocks = nn.Sequential(*(Block(case, groups) for _ in range(case.blocks)))

    def loss(self, ids: Tensor) -> Tensor:
        x = self.blocks(self.embedding(ids[:-1]))
        return vocab_parallel_linear_cross_entropy(x, self.embedding, ids[1:])


STEPS, RATE, LIMIT = 3, 0.1, 2.0


def ids_of(case: Case, replica: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(case.seed + 10 * step + replica)
    return torch.randint(0, case.vocabulary, (case.tokens + 1,), generator=generator)


def train(groups: ProcessGroups, case: Case) -> tuple[list[float], Parts, Parts]:
    """The losses of this replica's tokens, and the weights before and after some clipped steps."""
    model = LanguageModel(case, groups)
    parameters = sharded_parameters(model, groups)
    perturb(model, groups, case.seed)
    before = parts_of(model, groups, lambda p: p)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(STEPS):
        loss = model.loss(ids_of(case, groups.data.rank, step))
        loss.backward()
        complete_gradients(parameters, groups)
        clip_gradients(parameters, global_gradient_norm(parameters, groups), LIMIT)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, before, parts_of(model, groups, lambda p: p)


def train_dense(weights: dict[str, Tensor], case: Case, replicas: int) -> list[list[float]]:
    """The losses of each replica's tokens at each step; the weights are trained in place."""
    table = []
    for step in range(STEPS):
        leaves = {name: weight.clone().requires_grad_() for name, weight in weights.items()}
        losses = []
        for replica in range(replicas):
            ids = ids_of(case, replica, step)
            x = leaves["embedding.weight"][ids[:-1]]
            for block in range(case.blocks):
                x = dense_block(leaves, f"blocks.{block}.", x)
            losses.append(F.cross_entropy(x @ leaves["embedding.weight"].T, ids[1:], reduction="sum"))
        torch.stack(losses).sum().backward()
        norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values()]).norm()
        for name, leaf in leaves.items():
            weights[name] -= RATE * leaf.grad * min(1.0, LIMIT / (norm.item() + 1e-6))
        table.append([loss.item() for loss in losses])
    return table


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_steps_of_a_tied_language_model_equal_dense_and_leave_replicas_bit_identical(
    ranks: RankPool, layout: Layout
) -> None:
    @given(cases(layout))
    @settings(max_examples=8)
    def claim(case: Case) -> None:
        results = ranks.run(layout, train, case)
        weights = assemble(before for _, before, _ in results)
        found = assemble(after for *_, after in results)  # compares what several ranks hold, to the bit
        table = train_dense(weights, case, layout.data)
        for rank, (losses, _, _) in enumerate(results):
            expected = [losses[rank // layout.tensor] for losses in table]
            assert losses == pytest.approx(expected, rel=1e-9), f"losses on rank {rank}"
        assert set(found) == set(weights)
        for name, weight in weights.items():
            assert_close(found[name], weight, 1e-9, f"{name} after {STEPS} steps")

    claim()
