"""What ``BaseModel`` makes of a forward pass and a head equals plain torch, at every layout that it allows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from argonne.models import Batch, CrossEntropyLoss, Execution
from argonne.models.recompute import Recompute
from argonne.parallel import (
    Layout,
    LayoutError,
    Precision,
    ProcessGroups,
    check_gradients,
    complete_gradients,
    initialise,
)
from tests.models.own import VOCABULARY, Small, dense_logits
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
SEQUENCE, DIVISOR = 8, 29.0


def batch_of(weighted: bool) -> Batch:
    """Two micro-batches of three sequences, some positions without loss."""
    draw = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCABULARY, (2, 3, SEQUENCE + 1), generator=draw)
    targets = tokens[..., 1:].masked_fill(torch.rand((2, 3, SEQUENCE), generator=draw) < 0.2, -100)
    weights = torch.rand((2, 3, SEQUENCE), generator=draw) * 2 if weighted else None
    return Batch(tokens[..., :-1], targets, weights=weights, divisor=DIVISOR)


def small(groups: ProcessGroups, recompute: Recompute = Recompute.NONE) -> Small:
    model = Small(Execution(groups, DOUBLE, recompute=recompute))
    initialise(model.sharded_parameters(), seed=3)
    return model


def gradient(parameter: torch.nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def work(groups: ProcessGroups, weighted: bool, recompute: Recompute) -> tuple[float, float, Tensor, int, Parts]:
    """The loss of a step, that of an evaluation, the last logits, the size, and every gradient."""
    model, batch = small(groups, recompute), batch_of(weighted)
    loss = model.forward_backward(batch, CrossEntropyLoss())
    parameters = model.sharded_parameters()
    complete_gradients(parameters, groups)
    check_gradients(parameters, groups)
    evaluated = model.evaluate(batch.micro_batch(1), CrossEntropyLoss())
    assert not loss.requires_grad
    assert not evaluated.requires_grad
    # Of a length that no number of ranks divides, too: the last positions are then padding.
    logits = torch.stack([model.next_token_logits(batch.ids[0, :, :length]) for length in (1, 5, SEQUENCE)])
    count = model.parameter_count
    return loss.item(), evaluated.item(), logits, count, parts_of(model, groups, gradient)


@cache
def dense(weighted: bool) -> tuple[float, float, Tensor, int, dict[str, Tensor]]:
    """The same of plain torch."""
    model, batch = small(ProcessGroups.single()), batch_of(weighted)
    weights = assemble([parts_of(model, model.groups, lambda parameter: parameter)])
    for value in weights.values():
        value.requires_grad_()

    def loss_of(part: Batch) -> Tensor:
        logits = dense_logits(weights, part.ids)
        losses = F.cross_entropy(logits.flatten(0, 1), part.targets.flatten(), reduction="none")
        return (losses if part.weights is None else losses * part.weights.flatten()).sum()

    loss = torch.stack([loss_of(part) for part in batch.micro_batches()]).sum() / DIVISOR
    loss.backward()
    with torch.no_grad():
        evaluated = loss_of(batch.micro_batch(1))
        logits = torch.stack([dense_logits(weights, batch.ids[0, :, :length])[:, -1] for length in (1, 5, SEQUENCE)])
    grads = {name: gradient(value) for name, value in weights.items()}  # type: ignore[arg-type]
    return loss.item(), evaluated.item(), logits, sum(value.numel() for value in weights.values()), grads


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tensor=2), Layout(tensor=2, sequence_parallel=True), Layout(tensor=4)], ids=str
)
@pytest.mark.parametrize(("weighted", "recompute"), [(False, Recompute.SELECTIVE), (True, Recompute.FULL)])
def test_losses_gradients_and_logits_equal_plain_torch(
    ranks: RankPool, layout: Layout, weighted: bool, recompute: Recompute
) -> None:
    loss, evaluated, logits, count, grads = dense(weighted)
    results = ranks.run(layout, work, weighted, recompute)
    for found in results:
        assert found[0] == pytest.approx(loss, rel=1e-12)
        assert found[1] == pytest.approx(evaluated, rel=1e-12)
        assert_close(found[2], logits, 1e-12, "logits")
    assert results[0][3] == count
    found_grads = assemble(found[4] for found in results)
    assert found_grads.keys() == grads.keys()
    for name, value in grads.items():
        assert_close(found_grads[name], value, 1e-11, name)


def test_a_weight_of_zero_is_a_target_that_is_ignored() -> None:
    """And weights of one are none."""
    groups, batch = ProcessGroups.single(), batch_of(False)
    kept = torch.rand(batch.targets.shape) < 0.5
    ignored = Batch(batch.ids, batch.targets.masked_fill(~kept, -100))
    weighted = Batch(batch.ids, batch.targets, weights=kept.double())
    losses: list[Any] = [small(groups).forward_backward(each, CrossEntropyLoss()) for each in (ignored, weighted)]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    ones = Batch(batch.ids, batch.targets, weights=torch.ones_like(kept, dtype=torch.float64))
    losses = [small(groups).forward_backward(each, CrossEntropyLoss()) for each in (batch, ones)]
    assert losses[0].item() == pytest.approx(losses[1].item() / DIVISOR, rel=1e-12)


@pytest.mark.parametrize("axis", ["pipeline", "context"])
def test_an_axis_that_the_model_does_not_know_of_is_refused(axis: str) -> None:
    with pytest.raises(LayoutError, match=rf"^{axis}_parallel=2 is not offered by model=Small; legal: 1 \(or a model"):
        small(ProcessGroups.single()).check_layout(Layout(**{axis: 2}))


def test_what_it_says_of_itself() -> None:
    model = small(ProcessGroups.single())
    assert model.flops_per_token(16) == 6 * model.parameter_count
    assert model.facts(1, 2, 3) == []
    written = model.config_json(16, {"eos_token_id": 3, "bos_token_id": None, "pad_token_id": None}, "float32")
    assert written["architectures"] == ["Small"]
    assert {name: written[name] for name in model.shape} == dict(model.shape)
    assert (written["max_position_embeddings"], written["dtype"], written["eos_token_id"]) == (16, "float32", 3)
