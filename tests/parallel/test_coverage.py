"""Whether the regions of all ranks make up whole tensors, where replicas share out the rows of what is held twice."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import Layout, ProcessGroups, narrow_rows
from argonne.parallel.data_parallel.strategy import rows_of_rank
from argonne.parallel.sharding.coverage import Claim, Ranks, fault_of_tensor
from argonne.parallel.sharding.region import holding_axes

KEYS = "model.layers.0.self_attn.k_proj.weight"


def claims_of(layout: Layout, config: ArgonneConfig) -> tuple[dict[str, list[tuple[int, Claim]]], Ranks]:
    """What every rank claims of each tensor when the replicas share out rows, and where the ranks stand."""
    found: dict[str, list[tuple[int, Claim]]] = {}
    places = []
    for rank in range(layout.world_size):
        groups = ProcessGroups.of_rank(layout, rank)
        places.append(tuple(axis.rank for axis in holding_axes(groups)))
        with torch.device("meta"):
            model = ArgonneModel(config, Execution(groups))
        for sharded in model.sharded_parameters():
            rows = rows_of_rank(len(sharded.parameter), groups.replicas)
            own = narrow_rows(sharded, rows, sharded.parameter, (groups.replicas.rank,))
            for region in own.spec.regions:
                found.setdefault(region.name, []).append((rank, Claim((region.name,), ("float32",), region)))
    return found, Ranks(places)


@given(
    tensor=st.sampled_from([2, 3, 4, 5, 8]),
    data=st.integers(2, 4),
    key_values=st.integers(1, 4),
    group=st.integers(1, 4),
    features=st.integers(8, 30),
)
def test_no_layout_of_unequal_shards_is_a_false_alarm(
    tensor: int, data: int, key_values: int, group: int, features: int
) -> None:
    heads = key_values * group
    if heads < tensor:
        return
    config = ArgonneConfig(8, 1, heads, key_values, 41, features, head_dim=2)
    found, ranks = claims_of(Layout(tensor=tensor, data=data, uneven_shards=True), config)
    for name, claims in found.items():
        assert fault_of_tensor(claims, ranks) is None, name


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_copy_that_holds_something_else_is_named(shift: int) -> None:
    config = ArgonneConfig(16, 1, 9, 3, 53, 25, head_dim=2)
    found, ranks = claims_of(Layout(tensor=4, context=2, uneven_shards=True), config)
    claims = found[KEYS]
    number, (rank, claim) = next(
        (number, (rank, claim))
        for number, (rank, claim) in enumerate(claims)
        if ranks.places[rank][0] in claim.region.holders[1:] and claim.region.shape[0] > 1
    )
    region = claim.region
    start, shape = list(region.start), list(region.shape)
    start[0], shape[0] = start[0] + max(shift, 0), shape[0] - 1
    wrong = replace(claim, region=replace(region, start=tuple(start), shape=tuple(shape)))
    fault = fault_of_tensor([*claims[:number], (rank, wrong), *claims[number + 1 :]], ranks)
    assert fault is not None
    assert f"{KEYS!r} [6, 16]: " in fault
    assert f"rank {rank}" in fault or f"{rank}" in fault.split(" and ")[0]
    assert "are to hold the same and do not" in fault
