"""Layouts are pure arithmetic: sizes, places, and refusals that name what would be legal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from argonne.parallel import (
    AXES,
    ArgonneError,
    Layout,
    LayoutError,
    ProcessGroups,
    choose_device,
    process_groups,
)
from argonne.parallel.communication.groups import JOINT_AXES
from argonne.parallel.communication.layout import divisors, require_divisible
from tests.pool import RankPool

LAYOUTS = st.builds(Layout, st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))


def test_default_layout_is_one_process() -> None:
    assert Layout().world_size == 1
    assert Layout().sizes == (1, 1, 1, 1)


@given(LAYOUTS)
def test_coordinates_number_every_place_once_with_the_tensor_axis_fastest(layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    # Ascending tuples, outermost axis first: the order of nested loops, with no place left out.
    assert places == sorted(places)
    assert len(set(places)) == layout.world_size
    assert all(0 <= at < size for place in places for at, size in zip(place, layout.sizes, strict=True))
    assert AXES[-1] == "tensor"


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("size", [0, -2, 1.5, "2", None])
def test_a_size_that_is_no_number_of_processes_is_refused(axis: str, size: object) -> None:
    with pytest.raises(LayoutError) as refusal:
        Layout(**{axis: size})
    assert str(refusal.value) == f"{axis}_parallel={size!r} is not a number of processes; legal: 1 or more"


def test_a_world_of_another_size_is_refused_with_what_the_layout_needs() -> None:
    Layout(tensor=2, data=3).require_world_size(6)
    with pytest.raises(LayoutError) as refusal:
        Layout(tensor=2, data=3).require_world_size(4)
    assert str(refusal.value) == (
        "world size 4 does not match the layout data=3 x tensor=2, which needs 6 "
        "(--nproc 6, or axis sizes whose product is 4)"
    )


def test_a_layout_prints_the_axes_that_are_shared() -> None:
    assert str(Layout()) == "tensor=1"
    assert str(Layout(tensor=4, pipeline=2)) == "pipeline=2 x tensor=4"


@given(st.integers(1, 500), st.integers(1, 40))
def test_divisibility_is_refused_with_every_legal_size(value: int, size: int) -> None:
    legal = divisors(value)
    assert legal == [d for d in range(1, value + 1) if d * (value // d) == value]
    if size in legal:
        require_divisible("field", value, "by", size)
        return
    with pytest.raises(LayoutError) as refusal:
        require_divisible("field", value, "by", size)
    listed = ", ".join(map(str, legal))
    assert str(refusal.value) == f"field={value} is not divisible by by={size}; legal sizes: {listed}"


def test_a_layout_error_is_an_argonne_error() -> None:
    assert issubclass(LayoutError, ArgonneError)
    assert issubclass(ArgonneError, ValueError)


def describe(groups: ProcessGroups) -> tuple[dict[str, int], dict[str, tuple[int, int, tuple[int, ...]]], bool]:
    axes = {name: getattr(groups, name) for name in (*AXES, "world")}
    return groups.coordinates, {n: (a.size, a.rank, a.ranks) for n, a in axes.items()}, groups.is_first


@pytest.mark.parametrize("layout", [Layout(), Layout(tensor=2), Layout(data=2, tensor=2), Layout(pipeline=2, tensor=2)])
def test_process_groups_are_what_the_layout_says(ranks: RankPool, layout: Layout) -> None:
    places = [layout.coordinates(rank) for rank in range(layout.world_size)]
    for rank, (coordinates, axes, is_first) in enumerate(ranks.run(layout, describe)):
        assert tuple(coordinates[axis] for axis in AXES) == places[rank]
        assert axes["world"] == (layout.world_size, rank, tuple(range(layout.world_size)))
        assert is_first == (rank == 0)
        for i, axis in enumerate(AXES):
            # The peers along an axis: the places that differ from this one in that coordinate only.
            peers = [r for r, p in enumerate(places) if p[:i] + p[i + 1 :] == places[rank][:i] + places[rank][i + 1 :]]
            assert axes[axis] == (layout.sizes[i], places[rank][i], tuple(peers)), f"{axis} axis of rank {rank}"


@pytest.mark.parametrize(
    "layout", [Layout(sequence_parallel=True), Layout(uneven_shards=True), Layout(1, 1, 1, 1, True, True)]
)
def test_a_lone_process_keeps_all_that_its_layout_says(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(variable, raising=False)
    with process_groups(layout, torch.device("cpu")) as groups:
        assert groups.layout == layout
        assert not groups.sequence_parallel, "there is nobody to share the tokens with"
    assert ProcessGroups.single("cpu", layout).layout == layout
    monkeypatch.setenv("WORLD_SIZE", "1")
    with process_groups(layout, torch.device("cpu")) as groups:
        assert groups.layout == layout
    with pytest.raises(LayoutError, match="world size 1 does not match the layout data=2"):
        ProcessGroups.single("cpu", Layout(data=2))


def join_with_another_layout(groups: ProcessGroups) -> str:
    with pytest.raises(LayoutError) as refusal:
        ProcessGroups.from_world(Layout(tensor=3), "cpu")
    return str(refusal.value)


def test_process_groups_refuse_a_layout_of_another_size(ranks: RankPool) -> None:
    for message in ranks.run(Layout(tensor=2), join_with_another_layout):
        assert message.startswith("world size 2 does not match the layout tensor=3")


@given(st.integers(1, 96), st.integers(1, 12))
def test_canonical_blocks_are_refused_unless_each_rank_has_a_subtree_or_all(blocks: int, tensor: int) -> None:
    legal = [size for size in range(1, blocks + 1) if size == 1 or blocks in [size * 2**k for k in range(7)]]
    groups = ProcessGroups.of_rank(Layout(tensor=tensor, data=2), tensor - 1)
    assert not groups.reproducible
    if tensor in legal:
        found = groups.in_blocks(blocks)
        assert found.reproducible
        assert (found.tensor.blocks, found.tensor.own_blocks * tensor) == (blocks, blocks)
        for name in ("world", *AXES, *JOINT_AXES):
            before, after = getattr(groups, name), getattr(found, name)
            assert replace(before, summation="tree", blocks=after.blocks) == after
            assert name == "tensor" or (after.blocks, after.own_blocks) == (None, 1)
        assert (found.layout, found.device, found.mesh) == (groups.layout, groups.device, groups.mesh)
        return
    with pytest.raises(LayoutError) as refusal:
        groups.in_blocks(blocks)
    assert str(refusal.value) == (
        f"tensor_parallel={tensor} does not share out {blocks} canonical blocks in subtrees of one size; "
        f"legal sizes: {', '.join(map(str, legal))}"
    )


@pytest.mark.parametrize("blocks", [0, -4])
def test_a_number_of_canonical_blocks_below_one_is_refused(blocks: int) -> None:
    with pytest.raises(LayoutError, match=rf"^canonical blocks={blocks} are no number of blocks; legal: 1 or more$"):
        ProcessGroups.single().in_blocks(blocks)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(LayoutError, match="device='tpu' is not known; legal: cpu, cuda, auto"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(LayoutError, match="has no CUDA device; legal: cpu, auto"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device("auto") == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(LayoutError, match="LOCAL_RANK=2 has no GPU of its own; this machine has 2"):
        choose_device("cuda")
