"""Under ``torch.compile`` the layers are one graph with no break: the collectives are nodes of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    Objective,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    VocabParallelEmbedding,
    VocabParallelHead,
    complete_gradients,
    initialise,
    sharded_parameters,
    vocab_parallel_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from tests.pool import RankPool
from tests.whole import assert_close

VOCABULARY, HIDDEN = 41, 12
LAYOUTS = [Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True)]


class Network(nn.Module):
    """Every parallel layer once, and both forms of the loss."""

    def __init__(self, groups: ProcessGroups, precision: Precision) -> None:
        super().__init__()
        self.embed = VocabParallelEmbedding(VOCABULARY, HIDDEN, groups, precision=precision)
        self.norm = nn.LayerNorm(HIDDEN, dtype=precision.parameters)
        self.up = ColumnParallelLinear(HIDDEN, 16, groups, bias=True, precision=precision)
        self.down = RowParallelLinear(16, HIDDEN, groups, bias=True, precision=precision)
        self.head = VocabParallelHead(VOCABULARY, HIDDEN, groups, precision=precision)
        self.axis = groups.tensor

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        # Not the same loss twice: what is computed twice is merged, on some ranks only (docs/parallel.md).
        smooth, plain = Objective(label_smoothing=0.1, z_loss=1e-3), Objective()
        whole = vocab_parallel_cross_entropy(self.head(x), targets, self.head.range, self.axis, smooth).sum()
        return whole + vocab_parallel_linear_cross_entropy(x, self.head, targets, plain)


def eager_and_compiled(
    groups: ProcessGroups, backend: str, fullgraph: bool, accumulate: bool
) -> list[dict[str, Tensor]]:
    """The loss and every gradient, eager and compiled."""
    model = Network(groups, Precision(torch.float64, torch.float64, accumulate))
    parameters = sharded_parameters(model, groups)
    initialise(parameters, seed=1)
    generator = torch.Generator().manual_seed(2)
    ids, targets = torch.randint(0, VOCABULARY, (2, 8), generator=generator)
    torch._dynamo.reset()
    compiled: Callable[..., Tensor] = torch.compile(model, backend=backend, fullgraph=fullgraph)
    found = []
    for function in (model, compiled):
        model.zero_grad()
        loss = function(ids, targets)
        loss.backward()
        complete_gradients(parameters, groups)
        found.append({"loss": loss.detach()} | {s.name: s.parameter.grad.clone() for s in parameters})
    return found


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_one_graph_with_the_collectives_in_it_equals_eager(ranks: RankPool, layout: Layout, backend: str) -> None:
    for rank, (eager, compiled) in enumerate(ranks.run(layout, eager_and_compiled, backend, True, False)):
        for name, value in eager.items():
            assert_close(compiled[name], value, 1e-12, f"{name} on rank {rank}")


def test_accumulation_in_the_product_runs_in_eager_beside_compiled_code(ranks: RankPool) -> None:
    layout = Layout(tensor=2, sequence_parallel=True)
    for rank, (eager, compiled) in enumerate(ranks.run(layout, eager_and_compiled, "aot_eager", False, True)):
        for name, value in eager.items():
            assert_close(compiled[name], value, 1e-12, f"{name} on rank {rank}")
