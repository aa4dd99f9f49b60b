"""What each rank holds, in closed form: along the tensor and pipeline axes, and of the largest preset."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.models import ArgonneConfig, ArgonneModel, Execution, preset
from argonne.models.stages import cut
from argonne.parallel import Layout, ProcessGroups
from argonne.parallel.pipeline_parallel.plan import SCHEDULES, PipelinePlan


def held(config: ArgonneConfig, layout: Layout, rank: int, plan: PipelinePlan) -> dict[str, int]:
    """Elements of each parameter that a rank allocates."""
    groups = ProcessGroups.of_rank(layout, rank)
    with torch.device("meta"):
        model = ArgonneModel(config, Execution(groups, plan=plan))
    return {sharded.name: sharded.parameter.numel() for sharded in model.sharded_parameters()}


def test_at_the_largest_dense_preset_tensor_8_holds_an_eighth() -> None:
    config = preset("argonne-2.0-4.9b")
    plan = PipelinePlan(1)
    whole, part = held(config, Layout(), 0, plan), held(config, Layout(tensor=8), 3, plan)
    matrices = [name for name in whole if ".layers." in name and "norm" not in name]
    assert len(matrices) == 4 * config.num_hidden_layers
    assert 8 * sum(part[name] for name in matrices) == sum(whole[name] for name in matrices)
    # 151,665 tokens are 18,958.1 a rank, in rows padded to a multiple of 8.
    assert part["model.embed_tokens.weight"] == 18_960 * config.hidden_size
    for name in whole:
        if "norm" in name:
            assert part[name] == whole[name] == config.hidden_size
    assert sum(part.values()) == (18_960 + 49) * 4080 + sum(whole[name] for name in matrices) // 8


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(
    ranks=st.integers(1, 4),
    tensor=st.sampled_from([1, 2, 4]),
    layers=st.integers(8, 13),
    tied=st.booleans(),
    vocabulary=st.integers(30, 200),
)
def test_every_rank_of_every_pipeline_holds_its_closed_form(
    schedule: str, ranks: int, tensor: int, layers: int, tied: bool, vocabulary: int
) -> None:
    config = ArgonneConfig(16, layers, 4, 2, vocabulary, tie_word_embeddings=tied)
    layout = Layout(pipeline=ranks, tensor=tensor)
    plan = PipelinePlan.of(schedule, ranks)  # type: ignore[arg-type]
    _, spans = cut(config, plan.stages)
    rows = 8 * math.ceil(math.ceil(vocabulary / tensor) / 8)
    key_value_heads = max(1, config.num_key_value_heads // tensor)
    block = (
        (config.num_attention_heads // tensor + 2 * key_value_heads) * config.head_dim * 16
        + config.num_attention_heads // tensor * config.head_dim * 16
        + 3 * config.intermediate_size // tensor * 16
        + 2 * 16
    )
    total = 0
    for rank in range(layout.world_size):
        groups = ProcessGroups.of_rank(layout, rank)
        stages = [spans[stage] for stage in plan.held(groups.pipeline.rank)]
        ends = sum(span.is_first for span in stages), sum(span.is_last for span in stages)
        embeddings = min(1, sum(ends)) if tied else sum(ends)  # both ends on one rank share a tied one
        expected = block * sum(len(span.layers) for span in stages) + embeddings * rows * 16 + ends[1] * 16
        found = sum(held(config, layout, rank, plan).values())
        assert found == expected, f"rank {rank} of {layout}"
        total += found
    assert total >= config.parameter_count


def test_ranks_see_what_the_layout_says() -> None:
    layout = Layout(pipeline=2, data=3, context=2, tensor=2)
    for rank in range(layout.world_size):
        groups = ProcessGroups.of_rank(layout, rank)
        assert tuple(groups.coordinates.values()) == layout.coordinates(rank)
        assert groups.world.rank == rank
        assert (groups.replicas.size, groups.stage.size, groups.model.size) == (6, 12, 8)
        assert groups.stage.rank == rank % 12
    assert replace(layout, data=1).world_size == 8
