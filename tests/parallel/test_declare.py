"""What is declared for others: by a parent for its children, even cuts in one word, transposed whole tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from argonne.checkpoint import load_pieces, save_checkpoint, weight_pieces
from argonne.parallel import (
    ColumnParallelLinear,
    Layout,
    LayoutError,
    Normal,
    ProcessGroups,
    Region,
    RowParallelLinear,
    ShardSpec,
    check_declarations,
    complete_gradients,
    data_parallel,
    global_gradient_norm,
    initialise,
    replicated,
    sharded,
    sharded_parameters,
    transposed,
)
from tests.parallel.operands import values
from tests.parallel.test_sharding import as_rank
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of


class Expert(nn.Module):
    """Two plain linear layers, whose parts the parent knows."""

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups, size = groups, groups.tensor.size
        self.w1 = nn.Linear(5, 8 // size, bias=False)
        self.inner = nn.ModuleDict({"w2": nn.Linear(8 // size, 5)})

    def shard_specs(self) -> dict[str, ShardSpec]:
        return {
            "w1.weight": sharded("w1.weight", (8, 5), 0, self.groups, Normal(0.3)),
            "inner.w2.weight": sharded("w2.weight", (5, 8), -1, self.groups, Normal(0.3)),
            "inner.w2.bias": replicated("w2.bias", (5,), self.groups, Normal(0.1), used="between"),
        }


def declared(groups: ProcessGroups) -> Parts:
    model = nn.ModuleDict({"one": Expert(groups), "two": Expert(groups)})
    parameters = sharded_parameters(model, groups)
    check_declarations(parameters, groups)
    initialise(parameters, seed=9)
    return parts_of(model, groups, lambda p: p)


@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(tensor=4), Layout(tensor=2, sequence_parallel=True)], ids=str
)
def test_a_parent_declares_for_its_children(ranks: RankPool, layout: Layout) -> None:
    alone = assemble(ranks.run(Layout(), declared))
    found = assemble(ranks.run(layout, declared))
    assert set(found) == {
        f"{expert}.{name}" for expert in ("one", "two") for name in ("w1.weight", "w2.weight", "w2.bias")
    }
    for name, whole in found.items():
        assert torch.equal(whole, alone[name]), name


def test_of_two_declarations_that_of_the_outer_module_counts() -> None:
    class Renamed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = ColumnParallelLinear(3, 4, ProcessGroups.single())

        def shard_specs(self) -> dict[str, ShardSpec]:
            return {"inner.weight": sharded("outer.kernel", (4, 3), 0, ProcessGroups.single())}

    model = nn.Sequential(Renamed())
    (found,) = sharded_parameters(model, ProcessGroups.single())
    assert found.name == "0.inner.weight"
    assert found.spec.regions[0].name == "0.outer.kernel"


def test_a_tied_parameter_may_be_declared_under_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def shard_specs(self) -> dict[str, ShardSpec]:
            return {"second.weight": sharded("tied", (3, 3), 0, ProcessGroups.single())}

    (found,) = sharded_parameters(Tied(), ProcessGroups.single())
    assert (found.name, found.spec.regions[0].name, found.is_declared) == ("first.weight", "tied", True)


def test_a_child_that_is_not_there_is_refused_with_those_that_are() -> None:
    expert = Expert(ProcessGroups.single())
    expert.shard_specs = lambda: {"w3.weight": ShardSpec(())}  # type: ignore[method-assign]
    message = "shard_specs of the model names ['w3.weight']; legal: ['inner.w2.bias', 'inner.w2.weight', 'w1.weight']"
    with pytest.raises(LayoutError) as refused:
        sharded_parameters(expert, ProcessGroups.single())
    assert str(refused.value) == message


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
def test_sharded_is_an_even_cut_of_any_dimension(dim: int) -> None:
    whole = torch.arange(4 * 8 * 12).view(4, 8, 12)
    for rank in range(4):
        (region,) = sharded("w", whole.shape, dim, as_rank(rank, 4)).regions
        assert torch.equal(whole[region.whole_index], whole.chunk(4, dim)[rank])
        assert (region.holders, region.local_start, region.partial_gradient) == ((rank,), (0, 0, 0), False)


def test_a_cut_that_cannot_be_is_refused() -> None:
    with pytest.raises(LayoutError, match=r"dimension 1 of w=6 is not divisible by tensor_parallel=4; legal sizes"):
        sharded("w", (4, 6), 1, as_rank(0, 4))
    with pytest.raises(LayoutError, match=r"dim=2 of sharded\('w'\) is none of \[4, 6\]; legal: 0 to 1"):
        sharded("w", (4, 6), 2, as_rank(0, 4))


class Conv1D(RowParallelLinear):
    """GPT-2's output projection: the checkpoint has ``[in, out]``."""

    def shard_specs(self) -> dict[str, ShardSpec]:
        specs = super().shard_specs()
        return specs | {"weight": transposed(specs["weight"])}


class FusedConv1D(nn.Module):
    """GPT-2's ``c_attn``: queries, keys and values are columns of one ``[in, 3 * out]``; a rank has some of each."""

    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.groups, self.size = groups, groups.tensor.size
        self.linear = nn.Linear(8, 24 // self.size, bias=False)

    def shard_specs(self) -> dict[str, ShardSpec]:
        each, rank = 8 // self.size, self.groups.tensor.rank
        regions = tuple(
            Region("weight", (8, 24), (0, 8 * n + rank * each), (8, each), (n * each, 0), (rank,), transposed=True)
            for n in range(3)
        )
        return {"linear.weight": ShardSpec(regions, Normal(0.2))}


class Attention(nn.Module):
    def __init__(self, groups: ProcessGroups) -> None:
        super().__init__()
        self.c_attn = FusedConv1D(groups)
        self.c_proj = Conv1D(8, 8, groups, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_attn.linear(x).chunk(3, dim=-1)
        return self.c_proj(q.sigmoid() * k * v)


def opened(groups: ProcessGroups, directory: str, kind: str) -> tuple[Parts, Parts, float, Tensor]:
    """The weights of ``directory``; then the gradients of one step, their norm and the output; saved again there."""
    model = Attention(groups)
    strategy = data_parallel(model, groups, kind)  # type: ignore[arg-type]
    with torch.no_grad():
        load_pieces(Path(directory), weight_pieces(strategy.parameters))
    strategy.publish()
    strategy.begin(1)
    y = model(values(6, 8, kind="normal", seed=3).float())
    (y.square().sum() / groups.replicas.size).backward()
    strategy.complete()
    norm = global_gradient_norm(strategy.parameters, groups).item()
    save_checkpoint(Path(directory) / "saved", 1, weight_pieces(strategy.parameters), [], lambda path: None, groups)
    held = [
        [
            (r, r.part_of(tensor.detach()).clone())
            for s in strategy.parameters
            for r in s.spec.regions
            for tensor in (of(s),)
        ]
        for of in (lambda s: s.parameter, lambda s: s.parameter.grad)
    ]
    return held[0], held[1], norm, y.detach()


@pytest.mark.parametrize("kind", ["replicate", "zero1"])
@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(tensor=2, data=2), Layout(tensor=4)], ids=str)
def test_transposed_tensors_are_loaded_trained_and_saved_as_they_are(
    ranks: RankPool, layout: Layout, kind: str, tmp_path: Path
) -> None:
    wholes = {
        "c_attn.weight": values(8, 24, kind="normal", seed=1).float(),
        "c_proj.weight": values(8, 8, kind="normal", seed=2).float(),  # square: nothing shows that it is transposed
        "c_proj.bias": values(8, kind="normal", seed=5).float(),
    }
    save_file(wholes, tmp_path / "model.safetensors")
    results = ranks.run(layout, opened, str(tmp_path), kind)
    leaves = {name: whole.clone().requires_grad_() for name, whole in wholes.items()}
    q, k, v = (values(6, 8, kind="normal", seed=3).float() @ leaves["c_attn.weight"]).chunk(3, dim=-1)
    expected = F.linear(q.sigmoid() * k * v, leaves["c_proj.weight"].t(), leaves["c_proj.bias"])
    expected.square().sum().backward()
    weights, gradients = (assemble(result[n] for result in results) for n in (0, 1))
    for name, whole in wholes.items():
        assert torch.equal(weights[name], whole), name
        gradient = leaves[name].grad
        assert gradient is not None
        assert_close(gradients[name], gradient, 1e-5, f"gradient of {name}")
    norm = torch.cat([leaf.grad.flatten() for leaf in leaves.values() if leaf.grad is not None]).norm().item()
    for *_, found, y in results:
        assert found == pytest.approx(norm, rel=1e-5)
        assert_close(y, expected.detach(), 1e-5, "output")
    (file,) = (tmp_path / "saved").glob("*/model-*.safetensors")
    saved = load_file(file)
    assert saved.keys() == wholes.keys()
    assert all(torch.equal(saved[name], whole) for name, whole in wholes.items())


def begun(groups: ProcessGroups) -> Parts:
    model = Attention(groups)
    initialise(sharded_parameters(model, groups), seed=6)
    return [
        (r, r.part_of(s.parameter.detach()).clone()) for s in sharded_parameters(model, groups) for r in s.spec.regions
    ]


def test_transposed_tensors_begin_with_the_values_of_their_whole(ranks: RankPool) -> None:
    found = assemble(ranks.run(Layout(tensor=2), begun))
    for name, std in {"c_attn.weight": 0.2, "c_proj.weight": 8**-0.5}.items():
        whole = torch.empty_like(found[name])
        Normal(std).fill(whole, 6, name, whole.shape, (0, 0))
        assert torch.equal(found[name], whole), name


def shared_transposed(groups: ProcessGroups) -> tuple[list[list[float]], str]:
    """A transposed parameter that every rank holds and has a part of the gradient of."""
    holder = nn.ParameterDict({"w": nn.Parameter(torch.zeros(2, 3))})
    spec = transposed(replicated("w", (2, 3), groups, Normal(1.0), used="inside"))
    holder.shard_specs = lambda: {"w": spec}  # type: ignore[operator]
    parameters = sharded_parameters(holder, groups)
    check_declarations(parameters, groups)
    holder["w"].grad = torch.arange(6.0).view(2, 3) * 10**groups.tensor.rank
    complete_gradients(parameters, groups)
    return holder["w"].grad.tolist(), str(spec.regions[0].whole_shape)


def test_partial_gradients_of_transposed_parameters_are_summed(ranks: RankPool) -> None:
    for gradient, whole in ranks.run(Layout(tensor=2), shared_transposed):
        assert gradient == [[0.0, 11.0, 22.0], [33.0, 44.0, 55.0]]
        assert whole == "(3, 2)"


def without(groups: ProcessGroups) -> tuple[bool, bool, bool]:
    plain = groups.without_sequence_parallel()
    head = ColumnParallelLinear(3, 4, plain, gather_output=True)
    return groups.sequence_parallel, plain.sequence_parallel, head(torch.ones(1, 3)).shape == (1, 4)


def test_groups_without_sequence_parallelism_are_the_same_processes(ranks: RankPool) -> None:
    assert ranks.run(Layout(tensor=2, sequence_parallel=True), without) == [(True, False, True)] * 2
