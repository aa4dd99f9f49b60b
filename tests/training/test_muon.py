"""Muon is its formula, on whole tensors of the blocks' matrices alone, each owned by one rank of those that have it."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.models import ArgonneModel, Execution, build_replicas, replicas_of
from argonne.models.families.argonne1 import Argonne1Config
from argonne.models.families.argonne1_model import Argonne1Model
from argonne.parallel import (
    ArgonneError,
    Collective,
    Layout,
    ProcessGroups,
    clip_gradients,
    global_gradient_norm,
    initialise,
    record,
    regions_of,
    replicated,
)
from argonne.parallel.sharding.wholes import Claim, in_rounds, plan_wholes
from argonne.training.muon import Muon, cost, orthogonalise
from argonne.training.optimizer import build_muon, build_optimizer, moments_of, set_learning_rate
from tests import dense
from tests.models.own import Small
from tests.pool import RankPool
from tests.training.test_optimizer import ALONE, CONFIG, DOUBLE, draw_gradients, model_of, wholes
from tests.whole import Parts, assemble, assert_close


def by_singular_values(matrix: Tensor) -> Tensor:
    """Five times the quintic, of the singular values of a matrix of norm 1; its singular vectors stay."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / max(float(s.square().sum().sqrt()), 1e-7)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@settings(max_examples=6)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 0.95, 0.6]), st.sampled_from([0.0, 0.3]))
def test_steps_equal_the_formula(seed: int, momentum: float, decay: float) -> None:
    """Of the blocks' matrices, q, k, v, gate and up apart; AdamW's of all else, its decay too."""
    model, generator = model_of(seed), torch.Generator().manual_seed(seed)
    parameters = replicas_of(model, model.execution, "replicate").parameters
    optimizer = build_muon(parameters, ALONE, decay, momentum=momentum)
    reference = dense.Run(wholes(model, "data"))
    matrices = {name for name, weight in reference.weights.items() if weight.ndim == 2 and ".layers." in name}
    assert len(matrices) == 7
    buffers = {name: torch.zeros_like(reference.weights[name]) for name in matrices}
    for rate in (0.0, 3e-2, 1e-2):
        draw_gradients(parameters, generator)
        clip_gradients(parameters, global_gradient_norm(parameters, ALONE), 1.0)
        gradients = wholes(model, "grad")
        set_learning_rate(optimizer, rate)
        optimizer.step()
        reference.update({name: gradients[name] for name in gradients.keys() - matrices}, rate, decay)
        for name in matrices:
            buffers[name] = momentum * buffers[name] + gradients[name]
            step = by_singular_values(gradients[name] + momentum * buffers[name])
            weight = reference.weights[name]
            scale = 0.2 * max(weight.shape) ** 0.5
            reference.weights[name] = weight - rate * (scale * step + decay * weight)
    for name, weight in wholes(model, "data").items():
        assert_close(weight, reference.weights[name], 1e-11, name)
    kept = {piece.name: piece.part for piece in moments_of(optimizer, parameters)}
    expected = {f"{name}.momentum_buffer": buffer for name, buffer in buffers.items()}
    for what, moments in (("exp_avg", reference.first), ("exp_avg_sq", reference.second)):
        expected |= {f"{name}.{what}": moment for name, moment in moments.items()}
    assert kept.keys() == expected.keys()
    for name, moment in kept.items():
        assert_close(moment, expected[name], 1e-11, name)


@pytest.mark.parametrize("shape", [(24, 24), (9, 40), (40, 9), (1, 7)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_the_iterations_are_the_quintic_of_singular_values(
    shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    matrix = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = orthogonalise(matrix)
    assert found.dtype == dtype
    assert_close(found.double(), by_singular_values(matrix), tolerance, f"{list(shape)}")
    assert torch.equal(orthogonalise(torch.zeros_like(matrix)), torch.zeros_like(matrix))


def test_in_bfloat16_a_step_is_that_of_pytorchs_muon() -> None:
    """Which keeps the mean of gradients in place of their sum: the same direction, but for its rounding."""
    model, generator = model_of(4), torch.Generator().manual_seed(4)
    parameters = [s for s in replicas_of(model, model.execution, "replicate").parameters if s.is_block_matrix]
    adamw = build_optimizer([], weight_decay=0.0)
    optimizer = Muon(parameters, adamw, ALONE, weight_decay=0.1, dtype=torch.bfloat16)
    copies = {region.name: nn.Parameter(part.clone()) for region, part in regions_of(parameters)}
    other = torch.optim.Muon(copies.values(), lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = {name: weight.detach().clone() for name, weight in copies.items()}
    for _ in range(3):
        draw_gradients(parameters, generator)
        for sharded in parameters:
            assert sharded.parameter.grad is not None
            for region in sharded.spec.regions:
                copies[region.name].grad = region.part_of(sharded.parameter.grad).clone()
        set_learning_rate(optimizer, 0.02)
        optimizer.step()
        other.step()
    for region, part in regions_of(parameters):
        name = region.name
        assert_close(part - before[name], copies[name] - before[name], 0.1, name)


def test_what_is_not_trained_stays_and_is_sent_nowhere() -> None:
    model = model_of(2)
    frozen = model.model.block(0).mlp.down_proj.weight.requires_grad_(False)
    parameters = replicas_of(model, model.execution, "replicate").parameters
    before = frozen.clone()
    optimizer = build_muon(parameters, ALONE, weight_decay=0.1)
    assert len(optimizer.wholes.wholes) == 6
    for sharded in parameters:
        if sharded.parameter.requires_grad:
            sharded.parameter.grad = torch.ones_like(sharded.parameter)
    set_learning_rate(optimizer, 0.1)
    optimizer.step()
    assert torch.equal(frozen, before)
    optimizer.zero_grad()
    assert all(sharded.parameter.grad is None for sharded in parameters)


class Table(nn.Module):
    """A block with a matrix, an embedding of its own, and a table that its declaration calls one."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.linear, self.embedding = nn.Linear(hidden, 2 * hidden), nn.Embedding(5, hidden)
        self.places = nn.Parameter(torch.zeros(3, hidden))

    def shard_specs(self) -> dict[str, object]:
        spec = replicated("places", self.places.shape, ALONE, used="between")
        return {"places": replace(spec, is_table=True)}


def test_matrices_of_blocks_alone_are_orthogonalised() -> None:
    """Of any model: neither embedding nor head, nor what is looked up in a block, by any name."""
    own = Small(Execution(ALONE, DOUBLE))
    own.blocks = nn.ModuleList([*own.blocks, Table(own.hidden)])
    found = {s.name for s in replicas_of(own, own.execution, "replicate").parameters if s.is_block_matrix}
    assert found == {"blocks.0.up.weight", "blocks.0.down.weight", "blocks.1.linear.weight"}
    config = Argonne1Config(hidden_size=12, num_hidden_layers=1, num_attention_heads=2, vocab_size=11)
    old = Argonne1Model(config, Execution(ALONE, DOUBLE))
    found = {s.name for s in replicas_of(old, old.execution, "replicate").parameters if s.is_block_matrix}
    assert {name.split(".", 3)[-1] for name in found} == {
        "attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"
    }  # fmt: skip


def test_a_model_without_matrices_in_blocks_is_refused() -> None:
    own = Small(Execution(ALONE, DOUBLE))
    own.blocks = nn.ModuleList()
    with pytest.raises(
        ArgonneError, match=r"^optimizer='muon' finds no matrices of blocks in these parameters; legal: "
    ):
        build_muon(replicas_of(own, own.execution, "replicate").parameters, ALONE, weight_decay=0.1)


@st.composite
def claims(draw: st.DrawFn) -> list[list[Claim]]:
    """Of ranks that each have some rows of some tensors; of replicas, which have the same."""
    ranks, replicas = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    found: list[list[Claim]] = [[] for _ in range(ranks * replicas)]
    for number in range(draw(st.integers(1, 12))):
        rows, columns = draw(st.integers(1, 9)), draw(st.integers(1, 9))
        cuts = sorted(draw(st.lists(st.integers(0, rows), min_size=ranks - 1, max_size=ranks - 1)))
        for rank, (start, stop) in enumerate(zip([0, *cuts], [*cuts, rows], strict=True)):
            for replica in range(replicas if stop > start else 0):
                box = ((start, 0), (stop - start, columns))
                found[replica * ranks + rank].append(Claim(f"w{number}", (rows, columns), box, replica, True))
    return found


@given(claims(), st.integers(1, 100))
def test_owners_are_balanced_by_cost_and_sent_each_box_by_the_nearest(held: list[list[Claim]], elements: int) -> None:
    plan = plan_wholes(held, cost)
    load = [0.0] * len(held)
    for whole in plan:
        rows, columns = whole.shape
        assert cost(whole.shape) == rows * columns * min(rows, columns)
        load[whole.owner] += cost(whole.shape)
        holders = {rank for rank, _ in whole.holders}
        assert holders == {rank for rank, own in enumerate(held) if any(claim.name == whole.name for claim in own)}
        assert whole.owner in holders
        assert sum(box[1][0] for _, box in whole.sources) == rows
        replica = held[whole.owner][0].replica
        for rank, box in whole.sources:
            assert (rank, box) in whole.holders
            assert held[rank][0].replica == replica
    if all({rank for rank, _ in whole.holders} == set(range(len(held))) for whole in plan):
        ideal = sum(load) / len(load)
        assert max(load) <= ideal + max(cost(whole.shape) for whole in plan)
    rounds = in_rounds(plan, elements)
    assert sorted((w for each in rounds for w in each), key=plan.index) == plan
    for each in rounds:
        for owner in range(len(held)):
            sizes = [w.shape[0] * w.shape[1] for w in each if w.owner == owner]
            assert len(sizes) < 2 or sum(sizes) <= elements


def stepped(groups: ProcessGroups, elements: int) -> tuple[Parts, int, list[Collective]]:
    """Weights after two steps from gradients by their place, the rounds, and the exchanges of the second step."""
    _, replicas = build_replicas(partial(ArgonneModel, CONFIG), Execution(groups, DOUBLE), "zero1")
    initialise(replicas.parameters, seed=1)
    matrices = [sharded for sharded in replicas.parameters if sharded.is_block_matrix]
    others = [sharded for sharded in replicas.parameters if not sharded.is_block_matrix]
    optimizer = Muon(matrices, build_optimizer(others, 0.1), groups, 0.1, dtype=torch.float64, elements=elements)
    set_learning_rate(optimizer, 0.05)
    for sharded in replicas.parameters:
        sharded.parameter.grad = torch.zeros_like(sharded.parameter)
        for region in sharded.spec.regions:
            whole = torch.arange(math.prod(region.whole_shape), dtype=torch.float64).sin().view(region.whole_shape)
            region.part_of(sharded.parameter.grad).copy_(whole[region.whole_index])
    optimizer.step()
    with record(check=groups) as log:
        optimizer.step()
    parts = [(region, part.clone()) for region, part in regions_of(replicas.parameters)]
    return parts, len(optimizer.wholes.rounds), log.select(op="all_to_all")


def test_rounds_change_no_bit_and_overlap(ranks: RankPool) -> None:
    """Each exchange is still on its way when the next begins: beside it runs what is computed."""
    (alone, *_) = stepped(ProcessGroups.single(), 1 << 20)
    expected, layout = assemble([alone]), Layout(data=2, tensor=2)
    for elements, rounds in ((1 << 20, 1), (1, 2)):
        results = ranks.run(layout, stepped, elements)
        for name, weight in assemble(parts for parts, *_ in results).items():
            assert torch.equal(weight, expected[name]), name
        for _, count, exchanges in results:
            assert count == rounds
            assert len(exchanges) == 2 * rounds
            assert all(one.is_async and one.axis == "stage" for one in exchanges)
            for one, following in pairwise(exchanges) if rounds > 1 else ():
                assert following.started < one.finished
        assert sum(one.bytes for one in results[0][2]) > 0
