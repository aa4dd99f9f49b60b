"""Tensors without numbers are counted as those with numbers would be, up to a limit, and leave nothing behind."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from argonne.models import ArgonneConfig, ArgonneModel, Batch, CrossEntropyLoss, Execution, build_replicas
from argonne.models.recompute import Recompute
from argonne.parallel import ProcessGroups
from argonne.parallel.tensor_parallel import linear_cross_entropy
from argonne.parallel.tensor_parallel.linear_cross_entropy import _logits
from argonne.training.counting import Count, counted
from argonne.training.optimizer import build_optimizer
from argonne.training.step import Learner, train_step


def a_step(size: int, recompute: Recompute) -> Any:
    """A training step of a small model that exists for it alone."""
    config, groups = ArgonneConfig(32, 2, 4, 2, 300), ProcessGroups.single()
    model, replicas = build_replicas(
        lambda e: ArgonneModel(config, e), Execution(groups, recompute=recompute), "replicate"
    )
    learner = Learner(model=model, replicas=replicas, optimizer=build_optimizer(replicas.parameters, 0.1))
    learner.initialise(0)
    ids = torch.zeros(2, size, 33, dtype=torch.int64)
    return train_step(learner, Batch(ids[..., :-1], ids[..., 1:], divisor=64.0 * size), CrossEntropyLoss(), 0.1, 1.0)


def test_a_step_that_is_counted_takes_what_one_that_is_computed_does() -> None:
    peaks = []
    for recompute in (Recompute.FULL, Recompute.SELECTIVE, Recompute.NONE):
        with Count() as computed:
            a_step(8, recompute)
        with counted() as alone:
            assert a_step(8, recompute).loss == 1.0, "a number that is asked for is made up"
        assert alone.peak == computed.peak
        peaks.append(alone.peak)
    # Of each of 512 tokens, in two blocks: what recomputation does not keep.
    assert peaks[0] < peaks[1]


def test_a_long_loop_is_counted_in_few_turns_and_to_the_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 256 tokens the head takes 32 at a time, or 37 and at last 34."""
    monkeypatch.setattr(linear_cross_entropy, "_CHUNK", {"cpu": 1})
    for fewest, turns in ((32, 8), (37, 7)):
        monkeypatch.setattr(linear_cross_entropy, "_FEWEST", fewest)
        with Count() as computed:
            a_step(8, Recompute.FULL)
        chunks: list[int] = []

        def logits(x: torch.Tensor, *rest: Any, chunks: list[int] = chunks) -> torch.Tensor:
            chunks.append(len(x))
            return _logits(x, *rest)

        with counted() as alone, mock.patch.object(linear_cross_entropy, "_logits", logits):
            a_step(8, Recompute.FULL)
        assert alone.peak == computed.peak
        assert chunks == 2 * [fewest, fewest, 256 - (turns - 1) * fewest]


def test_more_than_the_limit_is_refused_before_there_is_any() -> None:
    """A tebibyte, which no machine of these tests has."""
    weights = nn.Linear(4, 4)
    with pytest.raises(torch.OutOfMemoryError, match="bytes of tensors are more than 1,000,000"), counted(1e6):
        torch.empty(2**38)
    with counted() as count:
        kept = torch.empty(2**38)
        assert (count.live, count.peak) == (2**40, 2**40)
        del kept
        assert (count.live, count.peak) == (0, 2**40)
        storage = torch.empty(1000).untyped_storage()
        storage.resize_(0)
        assert count.live == 0, "FSDP2 frees what it has gathered so"
        storage.resize_(2000)
        assert count.live == 2000
        weights(torch.ones(3, 4)).sum()
    assert weights(torch.ones(3, 4)).shape == (3, 4)
    assert type(torch.ones(1) + weights.weight) is torch.Tensor
