"""Micro-batches as leaves of one tree: the sum of their gradients does not depend on which replica has which."""

from __future__ import annotations

import gc

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from argonne.parallel import ArgonneError, ProcessGroups, ShardedParameter, ShardSpec
from argonne.parallel.communication.tree import tree_sum
from argonne.parallel.data_parallel.leaves import LeafSums
from argonne.parallel.sharding.gradients import sum_partial_gradients


def parameter_of(name: str, *shape: int, aliases: int = 0) -> ShardedParameter:
    parameter = nn.Parameter(torch.ones(shape))
    return ShardedParameter(
        name, parameter, ShardSpec(()), True, tuple(nn.Parameter(parameter.data) for _ in range(aliases))
    )


def gradients(count: int, *shape: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10 ** (number % 5) for number in range(count)]


def backward(parameter: nn.Parameter, gradient: Tensor) -> None:
    (parameter * gradient).sum().backward()


def summed(leaves: list[Tensor], sharded: ShardedParameter, sums: LeafSums) -> Tensor:
    sums.begin(len(leaves))
    sharded.parameter.grad = None
    for number, leaf in enumerate(leaves):
        backward(sharded.parameter, leaf)
        assert (sharded.parameter.grad is None) == (number < len(leaves) - 1), "the sum comes after the last"
    sums.finish()
    return sharded.parameter.grad


@given(st.integers(1, 9), st.integers(0, 3), st.integers(0, 2**31))
def test_the_sum_is_that_of_the_tree_whichever_replicas_have_the_leaves(own: int, level: int, seed: int) -> None:
    """Replicas with a power of two each are subtrees; any number of leaves is one tree where one replica has all."""
    leaves = gradients(own << level, 3, 5, seed=seed)
    sharded = parameter_of("weight", 3, 5)
    sums = LeafSums.of([sharded])
    whole = summed(leaves, sharded, sums)
    assert torch.equal(whole, tree_sum([leaf.clone() for leaf in leaves]))
    each = 1 << level
    replicas = [summed(leaves[number * each : (number + 1) * each], sharded, sums) for number in range(own)]
    assert torch.equal(whole, tree_sum(replicas))


def test_a_chain_would_be_another_sum() -> None:
    leaves = gradients(8, 100, seed=1)
    sharded = parameter_of("weight", 100)
    assert not torch.equal(summed(leaves, sharded, LeafSums.of([sharded])), sum(leaves))


@pytest.mark.parametrize("idle", [[0], [2], [0, 1]])
def test_a_parameter_that_is_idle_in_some_micro_batches_is_refused_by_name(idle: list[int]) -> None:
    one, other = parameter_of("experts.0.weight", 4), parameter_of("head.weight", 4)
    sums = LeafSums.of([one, other])
    sums.begin(3)
    for number, leaf in enumerate(gradients(3, 4, seed=2)):
        backward(other.parameter, leaf)
        if number not in idle:
            backward(one.parameter, leaf)
    with pytest.raises(ArgonneError) as refused:
        sums.finish()
    message = f"experts.0.weight had a gradient in {3 - len(idle)} of 3 micro-batches, which a reproducible sum cannot "
    assert str(refused.value) == message + "place; legal: a gradient in each, or in none"
    # The next step begins anew.
    sums.begin(1)
    one.parameter.grad = other.parameter.grad = None
    leaf = torch.full((4,), 3.0)
    backward(one.parameter, leaf)
    sums.finish()
    assert torch.equal(one.parameter.grad, leaf)
    assert other.parameter.grad is None, "idle in all is legal"


def test_outside_a_step_and_once_forgotten_gradients_are_left_alone() -> None:
    sharded = parameter_of("weight", 4)
    sums = LeafSums.of([sharded])
    for _ in range(2):
        backward(sharded.parameter, torch.ones(4))
    assert torch.equal(sharded.parameter.grad, torch.full((4,), 2.0))
    sums.begin(5)
    del sums
    gc.collect()
    backward(sharded.parameter, torch.ones(4))
    assert torch.equal(sharded.parameter.grad, torch.full((4,), 3.0))


def test_what_is_frozen_has_no_sum() -> None:
    sharded = parameter_of("weight", 4)
    sharded.parameter.requires_grad_(False)
    sums = LeafSums.of([sharded])
    sums.begin(2)
    sums.finish()
    assert sharded.parameter.grad is None


@given(st.integers(1, 5), st.booleans(), st.integers(0, 2**31))
def test_aliases_are_added_last_in_the_order_of_their_blocks(aliases: int, used_itself: bool, seed: int) -> None:
    sharded = parameter_of("norm.weight", 6, aliases=aliases)
    sums = LeafSums.of([sharded])
    users = [*sharded.aliases, *([sharded.parameter] if used_itself else [])]
    leaves = [gradients(3, 6, seed=seed + number) for number in range(len(users))]
    sums.begin(3)
    for number in range(3):
        for user, own in zip(users, leaves, strict=True):
            backward(user, own[number])
    sums.finish()
    sum_partial_gradients([sharded], ProcessGroups.single())
    of_users = [tree_sum([leaf.clone() for leaf in own]) for own in leaves]
    expected = tree_sum(of_users[:aliases])
    if used_itself:
        expected = of_users[-1] + expected
    assert torch.equal(sharded.parameter.grad, expected)
    assert all(alias.grad is None for alias in sharded.aliases)
