"""A replicated parameter says where it is used; gradients of its copies that differ, or are missing, are found."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.parallel import (
    ColumnParallelLinear,
    Constant,
    Layout,
    LayoutError,
    Normal,
    Precision,
    ProcessGroups,
    RowParallelLinear,
    ShardSpec,
    Use,
    check_declarations,
    check_gradients,
    complete_gradients,
    copy_to_region,
    gather_from_region,
    initialise,
    record,
    reduce_from_region,
    replicated,
    scatter_to_region,
    sharded,
    sharded_parameters,
)
from tests.parallel.operands import values
from tests.pool import RankPool
from tests.whole import assert_close

DOUBLE = Precision(torch.float64, torch.float64)
LAYOUTS = [Layout(tensor=2), Layout(tensor=2, data=2), Layout(tensor=2, sequence_parallel=True)]
TOKENS, PATCH, HIDDEN, HEADS, DIM, CLASSES = 8, 5, 6, 4, 3, 7


def refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except LayoutError as error:
        return str(error)
    return "nothing was refused"


USES: dict[str, Use] = {
    "patches.weight": "outside",
    "patches.bias": "outside",
    "positions": "outside",
    "across_heads": "inside",
    "scale": "between",
    "last.weight": "outside",
    "last.bias": "outside",
    "head.weight": "outside",
}


class Vision(nn.Module):
    """A small vision transformer: patches and positions before the pairs, one weight for all heads in one, a scale
    between them, a norm and a head behind; ``uses`` replaces what is declared of some of them, None: nothing is."""

    def __init__(self, groups: ProcessGroups, uses: dict[str, Use | None]) -> None:
        super().__init__()
        self.groups, self.uses = groups, USES | uses
        self.patches = nn.Linear(PATCH, HIDDEN, dtype=torch.float64)
        self.positions = nn.Parameter(torch.empty(TOKENS, HIDDEN, dtype=torch.float64))
        self.norm = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.scale = nn.Parameter(torch.empty(HIDDEN, dtype=torch.float64))
        self.up = ColumnParallelLinear(HIDDEN, HEADS * DIM, groups, bias=True, precision=DOUBLE)
        self.across_heads = nn.Parameter(torch.empty(DIM, dtype=torch.float64))
        self.down = RowParallelLinear(HEADS * DIM, HIDDEN, groups, bias=True, precision=DOUBLE)
        self.last = nn.LayerNorm(HIDDEN, dtype=torch.float64)
        self.head = nn.Linear(HIDDEN, CLASSES, bias=False, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x) + self.positions
        if self.groups.sequence_parallel:
            x = scatter_to_region(x, self.groups.tensor, dim=0)
        inner = self.up(self.norm(x) * self.scale).unflatten(-1, (-1, DIM))
        x = x + self.down((F.gelu(inner) * self.across_heads).flatten(-2))
        if self.groups.sequence_parallel:
            x = gather_from_region(x, self.groups.tensor, dim=0)
        return self.head(self.last(x))

    def shard_specs(self) -> dict[str, ShardSpec]:
        shapes = {name: p.shape for name, p in self.named_parameters()}
        return {
            name: replicated(name, shapes[name], self.groups, Normal(0.5), used=use)
            for name, use in self.uses.items()
            if use is not None
        }


def gradients(groups: ProcessGroups, uses: dict[str, Use | None], check: bool) -> tuple[dict[str, Tensor], str]:
    """This rank's complete gradients, and what ``check_gradients`` says of them."""
    model = Vision(groups, uses)
    parameters = sharded_parameters(model, groups)
    initialise(parameters, seed=4)
    number = groups.replicas.rank
    x = values(4, TOKENS, PATCH, kind="normal", seed=2).chunk(groups.replicas.size)[number]
    sum(model(sample).square().sum() for sample in x).backward()  # type: ignore[union-attr]
    complete_gradients(parameters, groups)
    said = refusal(lambda: check_gradients(parameters, groups)) if check else ""
    return {s.name: s.parameter.grad.clone() for s in parameters if s.parameter.grad is not None}, said


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_gradients_follow_from_where_parameters_are_used(ranks: RankPool, layout: Layout) -> None:
    ((dense, _),) = ranks.run(Layout(), gradients, {}, False)
    alone = {*USES, "norm.weight", "norm.bias", "down.bias"}
    for rank, (found, said) in enumerate(ranks.run(layout, gradients, {}, True)):
        assert said == "nothing was refused"
        for name in alone:
            assert_close(found[name], dense[name], 1e-12, f"{name} on rank {rank}")


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_a_wrong_word_is_seen_in_the_gradient_or_found_by_the_check(ranks: RankPool, layout: Layout) -> None:
    ((dense, _),) = ranks.run(Layout(), gradients, {}, False)
    mistakes: dict[str, Use] = {"across_heads": "outside", "scale": "outside", "positions": "inside"}
    for name, use in mistakes.items():
        results = ranks.run(layout, gradients, {name: use}, True)
        right = use == "outside" and name == "scale" and not layout.sequence_parallel
        for found, said in results:
            assert torch.allclose(found[name], dense[name], rtol=1e-9) == right
            if use == "outside" and not right:  # every copy has another gradient
                assert f"the gradient of {name!r} differs between ranks" in said
            else:  # equal on both ranks, and twice what it should be: only a dense layer can tell
                assert said == "nothing was refused"


def undeclared(groups: ProcessGroups, names: list[str]) -> str:
    model = Vision(groups, dict.fromkeys(names))
    return refusal(lambda: sharded_parameters(model, groups))


@pytest.mark.parametrize("name", ["positions", "patches.weight", "head.weight", "across_heads"])
def test_what_is_no_norm_and_not_declared_is_refused_by_name_under_sequence_parallelism(
    ranks: RankPool, name: str
) -> None:
    for said in ranks.run(Layout(tensor=2, sequence_parallel=True), undeclared, [name]):
        assert f"no shard_specs() declares {name} of " in said
        assert "legal: replicated(..., used='between', 'inside' or 'outside')" in said
    assert ranks.run(Layout(tensor=2), undeclared, [name]) == ["nothing was refused"] * 2
    assert ranks.run(Layout(), undeclared, [name]) == ["nothing was refused"]


def frozen(groups: ProcessGroups) -> int:
    return len(sharded_parameters(nn.Linear(3, 2).requires_grad_(False), groups))


def test_what_is_not_trained_needs_no_declaration(ranks: RankPool) -> None:
    assert ranks.run(Layout(tensor=2, sequence_parallel=True), frozen) == [2, 2]


def told(groups: ProcessGroups) -> list[str]:
    return [
        refusal(lambda: replicated("w", (3,), groups)),
        refusal(lambda: replicated("w", (3,), groups, partial_gradient=True)),
        refusal(lambda: replicated("w", (3,), groups, partial_gradient=True, used="inside")),
        refusal(lambda: replicated("w", (3,), groups, used="around")),  # type: ignore[arg-type]
    ]


def test_replicated_guesses_nothing_under_sequence_parallelism(ranks: RankPool) -> None:
    for said, partial, both, other in ranks.run(Layout(tensor=2, sequence_parallel=True), told):
        assert said.startswith("replicated('w') does not say where the parameter is used")
        assert partial == "nothing was refused"
        assert "used='inside' and partial_gradient=True; legal: one" in both
        assert "used='around' of replicated('w') is not known; legal: between, inside, outside" in other


class Routed(nn.Module):
    """Experts over the tensor-parallel ranks, each token to its best; ``enters``: the router's scores are copied in."""

    def __init__(self, groups: ProcessGroups, enters: bool) -> None:
        super().__init__()
        self.groups, self.enters = groups, enters
        self.router = nn.Parameter(torch.empty(4, HIDDEN, dtype=torch.float64))
        self.experts = nn.Parameter(torch.empty(4 // groups.tensor.size, HIDDEN, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        axis, each = self.groups.tensor, len(self.experts)
        scores = (x @ self.router.t()).softmax(-1)
        scores = copy_to_region(scores, axis) if self.enters else scores
        own = scores[:, axis.rank * each : (axis.rank + 1) * each]
        part = (own.unsqueeze(-1) * (x.unsqueeze(1) * self.experts)).sum(1)
        return reduce_from_region(part, axis)

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {
            "router": replicated("router", self.router.shape, self.groups, Normal(1.0), used="outside"),
            "experts": sharded("experts", (4, HIDDEN), 0, self.groups, Normal(1.0)),
        }


def route(groups: ProcessGroups, enters: bool, how: str) -> str:
    groups = groups.without_sequence_parallel()
    model = Routed(groups, enters)
    parameters = sharded_parameters(model, groups)
    initialise(parameters, seed=1)

    def step() -> None:
        x = values(4, HIDDEN, kind="normal", seed=3 + groups.replicas.rank)
        model(x).square().sum().backward()
        complete_gradients(parameters, groups)

    def recorded() -> None:
        with record(model, check=groups):
            step()

    if how == "record":
        return refusal(recorded)
    step()
    return refusal(lambda: check_gradients(parameters, groups))


@pytest.mark.parametrize("how", ["check_gradients", "record"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_a_router_without_its_copy_is_named(ranks: RankPool, layout: Layout, how: str) -> None:
    assert ranks.run(layout, route, True, how) == ["nothing was refused"] * layout.world_size
    found = ranks.run(layout, route, False, how)
    assert found == [found[0]] * layout.world_size
    assert "the gradient of 'router' differs between ranks 0, 1 by up to" in found[0]
    assert "experts" not in found[0]


def idle(groups: ProcessGroups, trained: bool) -> list[list[float] | None]:
    """Experts that only some replicas have used, and one that none has."""
    first, second, third = (nn.Linear(2, 1, bias=False) for _ in range(3))
    for expert in (first, second, third):
        expert.weight.requires_grad_(trained)
    model = nn.ModuleList([first, second, third])
    if trained:
        if groups.replicas.rank == 0:
            first.weight.grad = torch.tensor([[1.0, 2.0]])
        second.weight.grad = torch.tensor([[10.0, 20.0]])
    complete_gradients(sharded_parameters(model, groups.without_sequence_parallel()), groups)
    return [None if e.weight.grad is None else e.weight.grad.tolist()[0] for e in (first, second, third)]


@pytest.mark.parametrize("layout", [Layout(data=2), Layout(data=2, tensor=2), Layout(context=2)], ids=str)
def test_an_idle_expert_counts_zeros(ranks: RankPool, layout: Layout) -> None:
    assert ranks.run(layout, idle, True) == [[[1.0, 2.0], [20.0, 40.0], [0.0, 0.0]]] * layout.world_size
    assert ranks.run(layout, idle, False) == [[None, None, None]] * layout.world_size


def idle_part(groups: ProcessGroups) -> list[float]:
    """A weight inside a pair, of which one rank has used nothing."""
    holder = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2))})
    holder.shard_specs = lambda: {"w": replicated("w", (2,), groups, Constant(0.0), used="inside")}  # type: ignore[operator]
    parameters = sharded_parameters(holder, groups)
    check_declarations(parameters, groups)
    if groups.tensor.rank == 1:
        holder["w"].grad = torch.tensor([3.0, 4.0])
    complete_gradients(parameters, groups)
    check_gradients(parameters, groups)
    assert holder["w"].grad is not None
    return holder["w"].grad.tolist()


@pytest.mark.parametrize("layout", LAYOUTS, ids=str, scope="module")
def test_a_rank_that_has_used_no_part_counts_zeros_too(ranks: RankPool, layout: Layout) -> None:
    times = layout.data
    assert ranks.run(layout, idle_part) == [[3.0 * times, 4.0 * times]] * layout.world_size
