"""A tensor that a layer or a region cannot take is refused in one line of ours, before anything is sent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from argonne.parallel import (
    ArgonneError,
    ColumnParallelLinear,
    Layout,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    gather_from_region,
    gather_from_sequence_region,
    reduce_scatter_to_sequence_region,
    scatter_to_region,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from tests.pool import RankPool


def attempts(groups: ProcessGroups) -> dict[str, Callable[[], object]]:
    axis = groups.tensor
    column, row = ColumnParallelLinear(8, 12, groups), RowParallelLinear(12, 8, groups, bias=True)
    whole = RowParallelLinear(12, 8, groups, input_is_parallel=False)
    embedding, head = VocabParallelEmbedding(20, 8, groups), VocabParallelHead(20, 8, groups)
    targets = torch.zeros(8, dtype=torch.long)
    tokens = head.range.tokens
    return {
        "column: width": lambda: column(torch.ones(4, 7)),
        "column: a scalar": lambda: column(torch.tensor(1.0)),
        "column: one vector": lambda: column(torch.ones(8)),
        "row: the whole width": lambda: row(torch.ones(4, 12)),
        "row: one vector": lambda: row(torch.ones(6)),
        "row: odd tokens": lambda: row(torch.ones(5, 6)),
        "row: one token": lambda: row(torch.ones(1, 6)),
        "whole row: width": lambda: whole(torch.ones(4, 10)),
        "whole row: odd width": lambda: whole(torch.ones(4, 7)),
        "embedding: odd tokens": lambda: embedding(torch.arange(5)),
        "embedding: one id": lambda: embedding(torch.tensor(3)),
        "head: width": lambda: head(torch.ones(4, 9)),
        "scatter: odd tokens": lambda: scatter_to_region(torch.ones(5, 8), axis, dim=0),
        "scatter: no such dimension": lambda: scatter_to_region(torch.ones(5, 8), axis, dim=2),
        "gather: no such dimension": lambda: gather_from_region(torch.ones(4, 8), axis, dim=3),
        "gather: a scalar": lambda: gather_from_sequence_region(torch.tensor(1.0), axis),
        "reduce-scatter: a scalar": lambda: reduce_scatter_to_sequence_region(torch.tensor(1.0), axis),
        "reduce-scatter: odd tokens": lambda: reduce_scatter_to_sequence_region(torch.ones(3, 8), axis),
        "fused loss: all tokens": lambda: vocab_parallel_linear_cross_entropy(torch.ones(8, 8), head, targets),
        "fused loss: a share of the targets": lambda: vocab_parallel_linear_cross_entropy(
            torch.ones(4, 8), head, targets[:4]
        ),
        "loss: a share of the logits": lambda: vocab_parallel_cross_entropy(
            torch.ones(4, tokens), targets, head.range, axis
        ),
        "loss: all of the vocabulary": lambda: vocab_parallel_cross_entropy(
            torch.ones(8, 20 + tokens), targets, head.range, axis
        ),
    }


# What is legal without sequence parallelism.
PLAIN = {
    "column: one vector",
    "row: one vector",
    "row: odd tokens",
    "row: one token",
    "embedding: odd tokens",
    "embedding: one id",
    "fused loss: all tokens",
    "fused loss: a share of the targets",
}


def outcomes(groups: ProcessGroups) -> dict[str, str]:
    found = {}
    for name, attempt in attempts(groups).items():
        try:
            attempt()
            found[name] = ""
        except ArgonneError as error:
            found[name] = str(error)
    return found


@pytest.mark.parametrize("sequence", [False, True])
def test_wrong_shapes_are_one_line_that_says_what_is_legal(ranks: RankPool, sequence: bool) -> None:
    first, second = ranks.run(Layout(tensor=2, sequence_parallel=sequence), outcomes)
    for name, said in first.items():
        assert bool(said) == bool(second[name]), f"{name}: {said!r} and {second[name]!r}"
        legal = not sequence and name in PLAIN
        assert (said == "") == legal, f"{name}: {said!r}"
        assert legal or ("legal:" in said and "[" in said and "\n" not in said), f"{name}: {said!r}"
