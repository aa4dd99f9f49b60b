"""What a rank saves and loads: moments by any name, and weights from tensors in memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from argonne.checkpoint import (
    CheckpointError,
    load_tensors,
    moment_pieces,
    reset_moments,
    weight_pieces,
)
from argonne.parallel import (
    ArgonneError,
    ColumnParallelLinear,
    Layout,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    initialise,
    sharded_parameters,
)
from tests.pool import RankPool
from tests.whole import Parts, assemble


def small(groups: ProcessGroups) -> nn.Sequential:
    """An odd vocabulary, and both kinds of linear layers."""
    return nn.Sequential(
        VocabParallelEmbedding(13, 6, groups),
        ColumnParallelLinear(6, 8, groups, bias=True),
        RowParallelLinear(8, 5, groups, bias=True),
    )


def drawn() -> dict[str, Tensor]:
    """A whole tensor for each weight of ``small``, and one that it does not have."""
    shapes = {"0.weight": (13, 6), "1.weight": (8, 6), "1.bias": (8,), "2.weight": (5, 8), "2.bias": (5,), "3": (2,)}
    generator = torch.Generator().manual_seed(4)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def loaded(groups: ProcessGroups) -> Parts:
    pieces = weight_pieces(sharded_parameters(small(groups), groups))
    load_tensors(drawn(), pieces)
    return [(piece.region, piece.part.clone()) for piece in pieces]


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=4)], ids=str)
def test_weights_from_tensors_in_memory_are_each_ranks_parts_of_them(ranks: RankPool, layout: Layout) -> None:
    found, expected = assemble(ranks.run(layout, loaded)), drawn()
    assert set(found) == set(expected) - {"3"}
    for name, whole in found.items():
        assert torch.equal(whole, expected[name]), name


def test_a_tensor_that_memory_lacks_or_has_in_another_shape_is_one_line() -> None:
    groups = ProcessGroups.single()
    pieces, tensors = weight_pieces(sharded_parameters(small(groups), groups)), drawn()
    with pytest.raises(CheckpointError, match=r"^'1.bias' in memory has shape \(7,\); this model's is \(8,\)$"):
        load_tensors({**tensors, "1.bias": torch.zeros(7)}, pieces)
    del tensors["2.weight"]
    with pytest.raises(CheckpointError, match="^the tensors in memory have no '2.weight'$"):
        load_tensors(tensors, pieces)


def test_moments_are_pieces_of_any_optimizer_under_the_names_that_it_gives_them() -> None:
    groups = ProcessGroups.single()
    model = small(groups)
    parameters = sharded_parameters(model, groups)
    initialise(parameters, seed=0)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.arange(5)).square().sum().backward()
    sgd.step()
    pieces = {piece.name: piece.part for piece in moment_pieces(sgd, parameters, ["momentum_buffer"])}
    assert torch.equal(pieces["2.bias.momentum_buffer"], sgd.state[model[2].bias]["momentum_buffer"])
    assert len(pieces) == 5


def test_moments_that_are_not_there_yet_are_one_line_and_begin_at_zero() -> None:
    groups = ProcessGroups.single()
    model = small(groups)
    parameters, optimizer = sharded_parameters(model, groups), torch.optim.AdamW(model.parameters())
    with pytest.raises(ArgonneError, match=r"^the optimizer keeps no 'exp_avg' of '0.weight'; legal: \[\]$"):
        moment_pieces(optimizer, parameters)
    reset_moments(optimizer, parameters, step=3)
    pieces = moment_pieces(optimizer, parameters)
    assert {piece.name for piece in pieces} == {
        f"{name}.{moment}" for name in set(drawn()) - {"3"} for moment in ("exp_avg", "exp_avg_sq")
    }
    assert not any(piece.part.any() for piece in pieces)
    assert all(optimizer.state[sharded.parameter]["step"] == 3 for sharded in parameters)
