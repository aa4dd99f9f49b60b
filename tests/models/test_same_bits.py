"""Reproducible training has the bits of one process at every layout: losses, norms, weights and moments."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor

from argonne.models import ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import ProcessGroups, initialise
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from argonne.training.step import StepResult
from tests.models.same_bits import (
    ALONE,
    SHARED_HEADS,
    VOCABULARY,
    Options,
    Place,
    every_case,
    few_cases,
    long_cases,
    shared_heads_cases,
    train,
)
from tests.pool import RankPool
from tests.whole import assemble


@cache
def alone(options: Options, micro_batches: int, steps: int) -> tuple[list[StepResult], dict[str, Tensor]]:
    """The run in one process that keeps its activations."""
    told, parts = train(ProcessGroups.single(), ALONE, options, micro_batches, steps)
    assert len({result.loss for result in told}) == steps, "nothing happened"
    assert all(torch.tensor(result.loss).item() == result.loss for result in told), "a loss is told in float32"
    return told, assemble([parts])


def compare(ranks: RankPool, place: Place, options: Options, steps: int) -> None:
    """Fail unless every bit at ``place`` is that of one process."""
    micro_batches = place.micro_batches(options)
    told, tensors = alone(replace(options, recompute=Recompute.NONE), micro_batches, steps)
    results = ranks.run(place.layout, train, place, options, micro_batches, steps)
    for rank, (found, _) in enumerate(results):
        assert found == told, f"losses and norms of rank {rank}"
    assembled = assemble(parts for _, parts in results)
    assert assembled.keys() == tensors.keys()
    unequal = [name for name, value in tensors.items() if not torch.equal(assembled[name], value)]
    assert not unequal, f"after equal losses and norms: {len(unequal)} of {len(tensors)} tensors, {unequal[:4]} first"


@pytest.mark.parametrize(("place", "options"), few_cases(), ids=str)
def test_three_steps_have_the_bits_of_one_process(ranks: RankPool, place: Place, options: Options) -> None:
    compare(ranks, place, options, steps=3)


@pytest.mark.parametrize("options", [Options(), *SHARED_HEADS], ids=str)
def test_in_float64_canonical_blocks_change_nothing_but_the_order_of_sums(options: Options) -> None:
    options = replace(options, precision="fp64", recompute=Recompute.NONE)
    config, ids = options.config, torch.randint(VOCABULARY, (2, 1, 2, 16), generator=torch.Generator().manual_seed(5))
    batch = Batch(ids[0], ids[1])
    gradients = []
    for blocks in (None, options.blocks or options.key_values):
        execution = Execution(ProcessGroups.single(), PRECISIONS["fp64"], reproducible=blocks)
        model, replicas = build_replicas(partial(ArgonneModel, config), execution, "replicate")
        initialise(replicas.parameters, seed=2)
        replicas.begin(1)
        model.forward_backward(batch, CrossEntropyLoss())
        replicas.complete()
        gradients.append({sharded.name: sharded.parameter.grad for sharded in replicas.parameters})
    fast, in_blocks = gradients
    for name, gradient in fast.items():
        found = in_blocks[name]
        assert gradient is not None
        assert found is not None
        rows = min(len(found), len(gradient))  # without what pads the vocabulary
        torch.testing.assert_close(
            found[:rows], gradient[:rows], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.bits
@pytest.mark.parametrize(("place", "options"), list(shared_heads_cases()), ids=str)
def test_steps_in_which_blocks_share_key_value_heads_have_the_bits_of_one_process(
    ranks: RankPool, place: Place, options: Options
) -> None:
    compare(ranks, place, options, steps=4)


@pytest.mark.bits
@pytest.mark.parametrize(("place", "options"), list(every_case()), ids=str)
def test_eight_steps_with_each_option_have_the_bits_of_one_process(
    ranks: RankPool, place: Place, options: Options
) -> None:
    compare(ranks, place, options, steps=8)


@pytest.mark.bits
@pytest.mark.parametrize("muon", ["float32", "bfloat16"])
@pytest.mark.parametrize(("place", "options"), list(long_cases()), ids=str)
def test_eight_steps_of_muon_have_the_bits_of_one_process(
    ranks: RankPool, place: Place, options: Options, muon: str
) -> None:
    compare(ranks, place, replace(options, muon=muon), steps=8)


@pytest.mark.bits
@pytest.mark.parametrize(("place", "options"), list(long_cases()), ids=str)
def test_fifty_steps_have_the_bits_of_one_process(ranks: RankPool, place: Place, options: Options) -> None:
    compare(ranks, place, options, steps=50)
