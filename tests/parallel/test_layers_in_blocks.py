"""The layers of a reproducible run, alone: the same bits at any number of tensor-parallel ranks, and close to dense."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Objective,
    Partition,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    complete_gradients,
    data_parallel,
    initialise,
    sharded_parameters,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_logits,
)
from argonne.parallel.data_parallel.kinds import Kind
from tests.parallel.operands import fill, own_tokens, under, whole_tokens
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

BLOCKS = 4
EVERYTHING = Objective(label_smoothing=0.1, z_loss=0.01, ignore_index=2)
Found = tuple[Tensor, Tensor, Parts]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Linear:
    """A column-parallel layer of fused parts, then a row-parallel one."""

    sizes: tuple[int, ...]
    """Features in a block of each part."""
    width: int
    out: int
    tokens: int
    """Of each token block."""
    bias: bool = True
    sequence: bool = False
    compute: torch.dtype = torch.float32
    seed: int = 0

    @property
    def wholes(self) -> dict[str, Tensor]:
        total, found = sum(self.sizes) * BLOCKS, {}
        shapes = {f"part{i}": (size * BLOCKS, self.width) for i, size in enumerate(self.sizes)}
        for number, (name, shape) in enumerate({**shapes, "1": (self.out, total)}.items()):
            found[f"{name}.weight"] = draw(*shape, seed=self.seed + number)
            if self.bias:
                found[f"{name}.bias"] = draw(shape[0], seed=self.seed + 50 + number)
        return found

    @property
    def x(self) -> Tensor:
        return draw(self.tokens * BLOCKS, self.width, seed=self.seed + 97).to(self.compute)

    @property
    def gradient(self) -> Tensor:
        return draw(self.tokens * BLOCKS, self.out, seed=self.seed + 98).to(self.compute)


def linear(groups: ProcessGroups, case: Linear) -> Found:
    groups = under(groups, case.sequence).in_blocks(BLOCKS)
    ranks, precision = groups.tensor.size, Precision(torch.float32, case.compute)
    parts = [Partition.split(f"part{i}", size * BLOCKS, ranks) for i, size in enumerate(case.sizes)]
    # Of the joined parts a rank has its blocks of each: the second layer's columns are in the order of the first's.
    total = sum(case.sizes) * BLOCKS
    layers = nn.Sequential(
        ColumnParallelLinear(case.width, parts, groups, bias=case.bias, precision=precision),
        RowParallelLinear(total, case.out, groups, bias=case.bias, precision=precision),
    )
    fill(layers, groups, case.wholes)
    strategy = data_parallel(layers, groups)
    strategy.begin(1)
    x = own_tokens(case.x, groups).clone().requires_grad_()
    y = layers[0](x)
    if len(parts) == 1:
        y = layers[1](y)
        gradient = own_tokens(case.gradient, groups)
    else:  # in an order of blocks that does not depend on the ranks
        split = y.split([part.local_features(groups.tensor.rank) for part in parts], 1)
        own = [part.chunk(groups.tensor.own_blocks, 1) for part in split]
        y = layers[1](torch.cat([piece for block in zip(*own, strict=True) for piece in block], 1))
        gradient = own_tokens(case.gradient, groups)
    y.backward(gradient)
    strategy.complete()
    return y.detach(), x.grad, parts_of(layers, groups, lambda p: p.grad)


def dense_linear(case: Linear) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    leaves = {name: whole.double().requires_grad_() for name, whole in case.wholes.items()}
    x = case.x.double().requires_grad_()
    parts = [F.linear(x, leaves[f"part{i}.weight"], leaves.get(f"part{i}.bias")) for i in range(len(case.sizes))]
    blocks = zip(*(part.chunk(BLOCKS, 1) for part in parts), strict=True)
    y = F.linear(torch.cat([piece for block in blocks for piece in block], 1), leaves["1.weight"], leaves.get("1.bias"))
    y.backward(case.gradient.double())
    return y.detach(), x.grad, {name: leaf.grad for name, leaf in leaves.items()}


def joined(results: list[Found], sequence: bool) -> dict[str, Tensor]:
    found = {"output": whole_tokens([y for y, _, _ in results], sequence)}
    found["input"] = whole_tokens([x for _, x, _ in results], sequence)
    return found | assemble(parts for *_, parts in results)


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    assert set(found) == set(expected)
    for name, whole in expected.items():
        assert torch.equal(found[name], whole), f"{name} {what}: off by {(found[name] - whole).abs().max()}"


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_linear_layers_have_the_same_bits_at_every_number_of_ranks(ranks: RankPool, compute: torch.dtype) -> None:
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple),
        st.integers(1, 40),
        st.integers(1, 20),
        st.integers(1, 5),
        st.booleans(),
        st.integers(0, 2**31),
    )
    @settings(max_examples=10)
    @example((6, 3, 3), 24, 24, 4, True, 1)
    @example((8,), 64, 48, 8, True, 2)
    def claim(sizes: tuple[int, ...], width: int, out: int, tokens: int, bias: bool, seed: int) -> None:
        case = Linear(sizes, width, out, tokens, bias, compute=compute, seed=seed)
        one = joined(ranks.run(Layout(), linear, case), False)
        y, x, gradients = dense_linear(case)
        for name, whole in {"output": y, "input": x, **gradients}.items():
            assert_close(one[name].double(), whole, 1e-5 if compute == torch.float32 else 0.03, name, scale=1e-3)
        for size in (2, 4):
            for sequence in (False, True):
                split = replace(case, sequence=sequence)
                found = joined(ranks.run(Layout(tensor=size), linear, split), sequence)
                require_same(found, one, f"at {size} ranks, sequence={sequence}")

    claim()


@dataclass(frozen=True)
class Vocabulary:
    """An embedding and a head, and the loss of the next token."""

    vocabulary: int
    hidden: int
    tokens: int
    """Of each token block."""
    objective: Objective = EVERYTHING
    reduction: str = "sum"
    fused: bool = True
    sequence: bool = False
    seed: int = 0

    @property
    def wholes(self) -> dict[str, Tensor]:
        return {
            "0.weight": draw(self.vocabulary, self.hidden, seed=self.seed),
            "1.weight": draw(self.vocabulary, self.hidden, seed=self.seed + 1),
            "1.bias": draw(self.vocabulary, seed=self.seed + 2),
        }

    @property
    def ids(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed + 3)
        return torch.randint(0, self.vocabulary, (2, self.tokens * BLOCKS), generator=generator)

    @property
    def scale(self) -> Tensor:
        return torch.tensor(0.37) if self.reduction == "sum" else draw(self.tokens * BLOCKS, seed=self.seed + 4)


def losses_of(vectors: Tensor, head: VocabParallelHead, case: Vocabulary, targets: Tensor) -> Tensor:
    if case.fused:
        return vocab_parallel_linear_cross_entropy(vectors, head, targets, case.objective, case.reduction)
    logits = vocab_parallel_logits(vectors, head)
    losses = vocab_parallel_cross_entropy(logits, targets, head.range, head.axis, case.objective)
    return losses.sum() if case.reduction == "sum" else losses


def predicted(groups: ProcessGroups, case: Vocabulary) -> tuple[Tensor, Tensor, Parts]:
    groups = under(groups, case.sequence).in_blocks(BLOCKS)
    embedding = VocabParallelEmbedding(case.vocabulary, case.hidden, groups)
    head = VocabParallelHead(case.vocabulary, case.hidden, groups, bias=True)
    layers = nn.Sequential(embedding, head)
    fill(layers, groups, case.wholes)
    strategy = data_parallel(layers, groups)
    strategy.begin(1)
    ids, targets = case.ids
    vectors = embedding(ids)
    loss = losses_of(vectors, head, case, targets)
    loss.backward(case.scale)
    strategy.complete()
    return loss.detach(), vectors.detach(), parts_of(layers, groups, lambda p: p.grad)


def dense_predicted(case: Vocabulary) -> dict[str, Tensor]:
    leaves = {name: whole.double().requires_grad_() for name, whole in case.wholes.items()}
    ids, targets = case.ids
    logits = F.linear(leaves["0.weight"][ids], leaves["1.weight"], leaves["1.bias"])
    options: dict[str, Any] = {"ignore_index": case.objective.ignore_index, "reduction": "none"}
    losses = F.cross_entropy(logits, targets, label_smoothing=case.objective.label_smoothing, **options)
    counted = targets != case.objective.ignore_index
    losses = losses + torch.where(counted, case.objective.z_loss * logits.logsumexp(1).square(), 0.0)
    loss = losses.sum() if case.reduction == "sum" else losses
    loss.backward(case.scale.double())
    return {"loss": loss.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("fused", [True, False])
def test_head_and_loss_have_the_same_bits_at_every_number_of_ranks(
    ranks: RankPool, reduction: str, fused: bool
) -> None:
    """Of 13 tokens some blocks have none."""

    def joined_of(case: Vocabulary, size: int) -> dict[str, Tensor]:
        results = ranks.run(Layout(tensor=size), predicted, case)
        assert all(torch.equal(loss, results[0][0]) for loss, *_ in results)
        vectors = whole_tokens([own for _, own, _ in results], case.sequence)
        return {"loss": results[0][0], "vectors": vectors} | assemble(parts for *_, parts in results)

    @given(
        st.sampled_from([5, 13, 33, 1003]),
        st.integers(1, 24),
        st.integers(1, 12),
        st.sampled_from([Objective(), EVERYTHING, Objective(label_smoothing=1.0, ignore_index=0)]),
        st.integers(0, 2**31),
    )
    @settings(max_examples=8)
    @example(13, 16, 5, EVERYTHING, 1)
    @example(1003, 24, 40, EVERYTHING, 2)
    def claim(vocabulary: int, hidden: int, tokens: int, objective: Objective, seed: int) -> None:
        case = Vocabulary(vocabulary, hidden, tokens, objective, reduction, fused, seed=seed)
        one = joined_of(case, 1)
        for name, whole in dense_predicted(case).items():
            assert_close(one[name].double(), whole, 1e-4, name, scale=1e-2)
        for size in (2, 4):
            for sequence in (False, True):
                found = joined_of(replace(case, sequence=sequence), size)
                require_same(found, one, f"at {size} ranks, sequence={sequence}")

    claim()


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_without_blocks_the_layers_are_the_library_s(compute: torch.dtype) -> None:
    groups, precision = ProcessGroups.single(), Precision(torch.float32, compute)
    x, gradient = draw(6, 24, seed=1).to(compute), draw(6, 20, seed=2).to(compute)
    for kind in (ColumnParallelLinear, RowParallelLinear):
        layer = kind(24, 20, groups, bias=True, precision=precision)
        fill(layer, groups, {"weight": draw(20, 24, seed=3), "bias": draw(20, seed=4)})
        with torch.no_grad():
            expected = F.linear(x, layer.weight.to(compute), layer.bias.to(compute))
            assert torch.equal(layer(x), expected), kind.__name__
        layer(x).backward(gradient)
        assert not layer.cut
        assert torch.equal(layer.bias.grad, gradient.sum(0).float()), kind.__name__


def biased(groups: ProcessGroups, micro_batches: int) -> Parts:
    """Gradients completed without a ``DataParallel``, of a loss whose own gradient is one number for all."""
    groups = groups.in_blocks(BLOCKS)
    layer = RowParallelLinear(8, 6, groups, bias=True)
    parameters = sharded_parameters(layer, groups)
    initialise(parameters, seed=3)
    for number in range(micro_batches):
        whole = draw(12, 8, seed=groups.data.rank * micro_batches + number)
        mine = whole.chunk(groups.tensor.size, 1)[groups.tensor.rank]
        layer(mine).sum().backward()
    complete_gradients(parameters, groups)
    return [(region, region.part_of(s.parameter.grad).clone()) for s in parameters for region in s.spec.regions]


def test_uses_apart_are_completed_without_data_parallel_too(ranks: RankPool) -> None:
    alone = assemble([biased(ProcessGroups.single(), 2)])
    rows = torch.cat([draw(12, 8, seed=seed) for seed in range(2)])
    assert torch.equal(alone["bias"], torch.full((6,), 24.0))
    torch.testing.assert_close(alone["weight"], rows.sum(0).expand(6, 8))
    for layout, count in ((Layout(tensor=2), 2), (Layout(data=2), 1), (Layout(tensor=2, data=2), 1)):
        found = assemble(ranks.run(layout, biased, count))
        assert torch.equal(found["bias"], alone["bias"])
        torch.testing.assert_close(found["weight"], alone["weight"])


def frozen_bias(groups: ProcessGroups, kind: Kind) -> tuple[Tensor, bool]:
    """What a step with weight decay makes of a bias that is not trained, and whether it had a gradient."""
    groups = groups.in_blocks(BLOCKS)
    layer = RowParallelLinear(8, 6, groups, bias=True)
    initialise(sharded_parameters(layer, groups), seed=3)
    layer.bias.data.fill_(0.5)
    layer.bias.requires_grad_(False)
    replicas = data_parallel(layer, groups, kind)
    optimizer = torch.optim.AdamW([s.parameter for s in replicas.parameters], lr=0.1, weight_decay=0.5)
    replicas.begin(2)
    for seed in range(2):
        layer(draw(12, 8, seed=seed).chunk(groups.tensor.size, 1)[groups.tensor.rank]).sum().backward()
    replicas.complete()
    optimizer.step()
    replicas.publish()
    (bias,) = (s.parameter for s in replicas.parameters if s.name == "bias")
    return bias.detach().clone(), bias.grad is not None


@pytest.mark.parametrize("kind", ["replicate", "zero1", "fsdp"])
@pytest.mark.parametrize("layout", [Layout(), Layout(data=2), Layout(tensor=2, data=2)], ids=str)
def test_a_vector_that_is_not_trained_stays_as_it_is_in_a_reproducible_run(
    ranks: RankPool, layout: Layout, kind: Kind
) -> None:
    for bias, has_gradient in ranks.run(layout, frozen_bias, kind):
        assert torch.equal(bias, torch.full_like(bias, 0.5))
        assert not has_gradient
