"""Partitions are pure arithmetic: every block has a holder, and each rank knows which of its features are whose."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from argonne.parallel import LayoutError, Partition, share
from argonne.parallel.sharding.partition import check_partition
from tests.parallel.operands import attention_parts, fused_parts, unshared_part

RANKS = st.integers(1, 8)
PARTITIONS = RANKS.flatmap(lambda size: st.one_of(fused_parts(size), unshared_part(size).map(lambda part: (part,))))


@given(st.integers(0, 200), st.integers(1, 40))
def test_shares_are_everything_once_in_order_and_differ_by_one_at_most(count: int, ranks: int) -> None:
    shares = [share(count, ranks, rank) for rank in range(ranks)]
    assert [thing for held in shares for thing in held] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.integers(1, 200), st.integers(1, 40))
def test_a_split_is_equal_where_it_can_be_and_otherwise_refused_or_nearly_equal(features: int, ranks: int) -> None:
    uneven = Partition.split("", features, ranks, uneven=True)
    counts = [uneven.local_features(rank) for rank in range(ranks)]
    assert sum(counts) == uneven.features == features
    assert max(counts) - min(counts) == (features % ranks > 0)
    assert uneven.is_even == (features % ranks == 0)
    if features % ranks:
        with pytest.raises(LayoutError, match=f"up_proj={features} is not divisible by tensor_parallel={ranks}; legal"):
            Partition.split("up_proj", features, ranks)
    else:
        assert Partition.split("", features, ranks) == uneven


@given(PARTITIONS)
def test_runs_say_which_features_a_rank_holds_with_whom(parts: tuple[Partition, ...]) -> None:
    for part in parts:
        holders: dict[int, set[int]] = {}
        for rank, held in enumerate(part.held):
            local = 0
            for who, whole, own in part.runs(rank):
                assert own.start == local, "the runs of a rank follow each other"
                assert len(own) == len(whole) > 0
                assert rank in who
                local = own.stop
                for feature in whole:
                    holders.setdefault(feature, set()).add(rank)
                    assert feature // part.block in held
                    assert part.holders(feature // part.block) == who
            assert local == part.local_features(rank) == part.block * len(held)
        assert set(holders) == set(range(part.features)), "a feature that no rank holds"
        assert part.is_shared == any(len(who) > 1 for who in holders.values())


@given(RANKS, st.integers(1, 8), st.integers(1, 12))
def test_a_rank_has_the_key_value_heads_of_its_query_heads_and_no_others(size: int, kv: int, group: int) -> None:
    if kv * group < size:
        return
    queries, keys, _ = attention_parts(kv * group, kv, 2, size)
    for own, used in zip(queries.held, keys.held, strict=True):
        assert {head // group for head in own} == set(used)


@given(RANKS, st.integers(1, 20), st.integers(1, 4))
def test_whole_blocks_are_shared_out_and_some_ranks_may_have_none(ranks: int, count: int, block: int) -> None:
    part = Partition.blocks("", block, count, ranks)
    assert part.features == count * block
    assert [head for held in part.held for head in held] == list(range(count))
    check_partition(part, ranks)


REFUSED = [
    (
        Partition("k_proj", 2, (range(0, 1), range(0, 1), range(0, 0))),
        "k_proj has shared blocks and a rank without any; legal: at least one for each rank",
    ),
    (
        Partition("", 2, (range(0, 1), range(2, 3), range(4, 5))),
        "no rank holds blocks [1, 3] of features; legal: every block has a holder",
    ),
    (
        Partition("k_proj", 2, (range(0, 1), range(1, 2))),
        "k_proj is a partition for 2 ranks; legal: tensor_parallel=3",
    ),
]


@pytest.mark.parametrize(("part", "message"), REFUSED)
def test_a_partition_that_loses_something_is_refused(part: Partition, message: str) -> None:
    with pytest.raises(LayoutError) as refusal:
        check_partition(part, 3)
    assert str(refusal.value) == message


@given(PARTITIONS)
def test_every_partition_that_the_tests_draw_is_legal(parts: tuple[Partition, ...]) -> None:
    for part in parts:
        check_partition(part, len(part.held))
