"""What the layers declare: together the ranks' regions are every whole tensor, each element accounted for."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import (
    Axis,
    ColumnParallelLinear,
    Constant,
    Layout,
    Normal,
    Partition,
    ProcessGroups,
    Region,
    RowParallelLinear,
    ShardedParameter,
    initialise,
    regions_of,
    replicated,
    sharded_parameters,
)
from tests.parallel.operands import SEEDS, fused_parts, unshared_part
from tests.whole import assemble, parts_of


def as_rank(rank: int, size: int, sequence: bool = False, uneven: bool = False) -> ProcessGroups:
    """The groups of one of ``size`` ranks, for declarations only: nothing can be communicated."""
    axis = Axis("tensor", size, rank, None, tuple(range(size)))
    return replace(
        ProcessGroups.single(),
        layout=Layout(tensor=size, sequence_parallel=sequence, uneven_shards=uneven),
        tensor=axis,
    )


def box(index: tuple[slice, ...], shape: tuple[int, ...]) -> torch.Tensor:
    found = torch.zeros(shape, dtype=torch.bool)
    found[index] = True
    return found


def check_declarations(ranks: list[list[ShardedParameter]]) -> dict[str, tuple[int, ...]]:
    """That the ranks' regions make up whole tensors, and tell the truth of each other; returns the shapes."""
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, Region]]]] = {}
    for rank, parameters in enumerate(ranks):
        for sharded in parameters:
            filled = torch.zeros(sharded.parameter.shape, dtype=torch.int)
            for region in sharded.spec.regions:
                assert shapes.setdefault(region.name, region.whole_shape) == region.whole_shape
                assert math.prod(region.shape) > 0
                filled[region.local_index] += 1
                boxes.setdefault(region.name, {}).setdefault((region.start, region.shape), []).append((rank, region))
            assert (filled <= 1).all(), f"regions overlap within {sharded.name} of rank {rank}"
    for name, found in boxes.items():
        covered = torch.zeros(shapes[name], dtype=torch.int)
        for (start, shape), held in found.items():
            covered[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] += 1
            holders = tuple(rank for rank, _ in held)
            for _, region in held:
                assert region.holders == holders, f"holders of {name} from {start}"
        # Identical or disjoint, and together the whole.
        assert (covered == 1).all(), f"{name}: covered {covered.min()} to {covered.max()} times"
    return shapes


@st.composite
def models(draw: st.DrawFn) -> tuple[ArgonneConfig, int, bool]:
    """A shape, a number of ranks, and whether the heads and features may be unequal on them."""
    size = draw(st.sampled_from([1, 2, 3, 4, 5, 6, 8]))
    uneven = draw(st.booleans())
    kv = draw(st.integers(1, 8))
    fits = (lambda g: size <= kv * g <= 48) if uneven else (lambda g: kv * g % size == 0 and kv * g <= 48)
    group = draw(st.integers(1, 12).filter(fits))
    config = ArgonneConfig(
        hidden_size=draw(st.integers(1, 9)),
        num_hidden_layers=1,
        num_attention_heads=kv * group,
        num_key_value_heads=kv,
        head_dim=2 * draw(st.integers(1, 3)),
        vocab_size=draw(st.integers(1, 120)),
        intermediate_size=draw(st.integers(size, 4 * size)) if uneven else size * draw(st.integers(1, 4)),
        tie_word_embeddings=draw(st.booleans()),
        max_position_embeddings=4,
    )
    return config, size, uneven


@given(models())
def test_the_regions_of_any_model_at_any_size_make_up_the_llama_tensors(drawn: tuple[ArgonneConfig, int, bool]) -> None:
    config, size, uneven = drawn
    with torch.device("meta"):
        built = [ArgonneModel(config, Execution(as_rank(rank, size, uneven=uneven))) for rank in range(size)]
    shapes = check_declarations([model.sharded_parameters() for model in built])
    hidden, ffn, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    query, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    expected = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        **{
            f"model.layers.0.{name}.weight": shape
            for name, shape in {
                "input_layernorm": (hidden,),
                "self_attn.q_proj": (query, hidden),
                "self_attn.k_proj": (key_value, hidden),
                "self_attn.v_proj": (key_value, hidden),
                "self_attn.o_proj": (hidden, query),
                "post_attention_layernorm": (hidden,),
                "mlp.gate_proj": (ffn, hidden),
                "mlp.up_proj": (ffn, hidden),
                "mlp.down_proj": (hidden, ffn),
            }.items()
        },
    }
    if not config.tie_word_embeddings:
        expected["lm_head.weight"] = (vocabulary, hidden)
    assert shapes == expected
    assert sum(map(math.prod, shapes.values())) == config.parameter_count


@given(models())
def test_only_tensors_with_shared_blocks_have_partial_gradients(drawn: tuple[ArgonneConfig, int, bool]) -> None:
    config, size, uneven = drawn
    # A key-value head is shared where a rank's first query head is not the first of its group.
    group = config.num_attention_heads // config.num_key_value_heads
    shared = any((rank * config.num_attention_heads // size) % group for rank in range(size))
    for rank in range(size):
        with torch.device("meta"):
            parameters = ArgonneModel(config, Execution(as_rank(rank, size, uneven=uneven))).sharded_parameters()
        partial = {r.name for sharded in parameters for r in sharded.spec.regions if r.partial_gradient}
        names = {f"model.layers.0.self_attn.{name}_proj.weight" for name in "kv"}
        assert partial == (names if shared else set())


@given(st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_the_regions_of_linear_layers_with_bias_make_up_their_tensors(size: int, local: int, bias: bool) -> None:
    pairs = [
        nn.ModuleDict(
            {
                "up": ColumnParallelLinear(3, size * local, as_rank(rank, size), bias=bias),
                "down": RowParallelLinear(size * local, 3, as_rank(rank, size), bias=bias),
            }
        )
        for rank in range(size)
    ]
    shapes = check_declarations([sharded_parameters(pair, as_rank(0, size)) for pair in pairs])
    expected = {"up.weight": (size * local, 3), "down.weight": (3, size * local)}
    if bias:
        expected |= {"up.bias": (size * local,), "down.bias": (3,)}
    assert shapes == expected


@st.composite
def pairs(draw: st.DrawFn) -> tuple[int, tuple[Partition, ...], Partition, bool]:
    """A number of ranks, what a column-parallel and a row-parallel layer share out there, and a flag."""
    size = draw(st.integers(1, 8))
    return size, draw(fused_parts(size)), draw(unshared_part(size)), draw(st.booleans())


@given(pairs(), st.booleans())
def test_the_regions_of_linear_layers_make_up_their_tensors_however_unequal(
    drawn: tuple[int, tuple[Partition, ...], Partition, bool], sequence: bool
) -> None:
    size, fused, row, bias = drawn
    ranks = []
    for rank in range(size):
        groups = as_rank(rank, size, sequence)
        up, down = ColumnParallelLinear(3, fused, groups, bias=bias), RowParallelLinear(row, 3, groups, bias=bias)
        ranks.append(sharded_parameters(nn.ModuleDict({"up": up, "down": down}), groups))
    shapes = check_declarations(ranks)
    expected = {f"{part.name}.weight": (part.features, 3) for part in fused} | {"down.weight": (3, row.features)}
    if bias:
        expected |= {f"{part.name}.bias": (part.features,) for part in fused} | {"down.bias": (3,)}
    assert shapes == expected
    # Of a whole tensor, every rank says the same; a shared block's uses are on several ranks, and so are the
    # tokens that a bias is added to under sequence parallelism.
    partial = {f"{part.name}.{kind}" for part in fused if part.is_shared for kind in ("weight", "bias")}
    partial |= {"down.bias"} if sequence and size > 1 else set()
    for region in (r for parameters in ranks for sharded in parameters for r in sharded.spec.regions):
        assert region.partial_gradient == (region.name in partial), region


@given(pairs(), SEEDS)
def test_linear_layers_begin_as_the_same_whole_tensors_however_they_are_shared_out(
    drawn: tuple[int, tuple[Partition, ...], Partition, bool], seed: int
) -> None:
    size, fused, row, _ = drawn
    ranks = []
    for rank in range(size):
        groups = as_rank(rank, size)
        pair = nn.ModuleDict({"up": ColumnParallelLinear(3, fused, groups), "down": RowParallelLinear(row, 3, groups)})
        initialise(sharded_parameters(pair, groups), seed)
        ranks.append(parts_of(pair, groups, lambda p: p))
    # The standard deviation follows from the width of the whole input; neither it nor a value from the rank.
    expected = {f"{part.name}.weight": ((part.features, 3), 3) for part in fused}
    expected["down.weight"] = ((3, row.features), row.features)
    found = assemble(ranks)
    assert set(found) == set(expected)
    for name, (shape, fan_in) in expected.items():
        whole = torch.empty(shape)
        Normal(fan_in**-0.5).fill(whole, seed, name, shape, (0, 0))
        assert torch.equal(found[name], whole), f"{name} is off by {(found[name] - whole).abs().max()}"


def test_names_are_absolute_and_those_of_siblings_climb() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [Partition.split(name, 2, 1) for name in ("q_proj", "k_proj")]
            self.qk_proj = ColumnParallelLinear(3, parts, ProcessGroups.single(), bias=True)

    model = nn.ModuleDict({"layers": nn.ModuleList([Attention(), Attention()])})
    found = {
        s.name: [region.name for region in s.spec.regions] for s in sharded_parameters(model, ProcessGroups.single())
    }
    assert found == {
        f"layers.{i}.qk_proj.{kind}": [f"layers.{i}.q_proj.{kind}", f"layers.{i}.k_proj.{kind}"]
        for i in range(2)
        for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("sequence", [False, True])
def test_a_parameter_that_nothing_is_declared_of_is_replicated(sequence: bool) -> None:
    model = nn.Sequential(nn.LayerNorm(5), nn.RMSNorm(5) if sequence else nn.Linear(5, 2, bias=False))
    found = sharded_parameters(model, as_rank(0, 4, sequence))
    assert [s.name for s in found] == ["0.weight", "0.bias", "1.weight"]
    for sharded in found:
        (region,) = sharded.spec.regions
        assert region.name == sharded.name
        assert region.whole_shape == region.shape == tuple(sharded.parameter.shape)
        assert region.holders == (0, 1, 2, 3)
        assert sharded.spec.initialiser is None
        assert region.partial_gradient == sequence


def test_a_parameter_in_two_places_is_found_once_under_its_first_name() -> None:
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    other.weight = one.weight
    both = nn.ModuleDict({"one": one, "other": other})
    assert [s.name for s in sharded_parameters(both, ProcessGroups.single())] == ["one.weight"]


def test_regions_are_views_of_the_parameter() -> None:
    layer = ColumnParallelLinear(2, [Partition.split(n, 3, 1) for n in ("a", "b")], ProcessGroups.single())
    for number, (_, part) in enumerate(regions_of(sharded_parameters(layer, ProcessGroups.single()))):
        part.fill_(number)
    assert layer.weight.detach()[:, 0].tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("partial", [False, True])
def test_replicated_spec_is_one_region_held_by_all(partial: bool) -> None:
    spec = replicated("weight", (3, 4), as_rank(1, 2), Constant(1.0), partial)
    (region,) = spec.regions
    assert region == Region("weight", (3, 4), (0, 0), (3, 4), (0, 0), (0, 1), partial)
    assert torch.equal(box(region.whole_index, (3, 4)), torch.ones(3, 4, dtype=torch.bool))
