"""Argonne 1.x is GPT-2, at every layout; and it drops the same elements in all of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from argonne.checkpoint import load_tensors, weight_pieces
from argonne.models import Argonne1Config, Argonne1Model, Batch, CrossEntropyLoss, Execution
from argonne.models.recompute import Recompute
from argonne.parallel import ArgonneError, Dropout, Layout, LayoutError, Precision, ProcessGroups
from argonne.parallel.sharding.dropout import row_keys
from tests.models.argonne1_runs import (
    DOUBLE,
    DROPPING,
    GLOBAL_BATCH,
    PLAIN,
    SEQUENCE,
    STEPS,
    TIED,
    Case,
    batch_of,
    gradients,
    ids_of,
    their_model,
    train,
    whole_masks,
)
from tests.pool import RankPool
from tests.whole import assemble, assert_close

SHARES = Layout(tensor=2, sequence_parallel=True)


def theirs_of(config: Argonne1Config) -> tuple[Tensor, float, dict[str, Tensor]]:
    """Logits, loss and gradients of ``transformers``."""
    model, ids = their_model(config), ids_of(0)
    logits = model.eval()(ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    return logits.detach(), loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("config", "layout", "schedule"),
    [
        (PLAIN, Layout(), "1f1b"),
        (TIED, Layout(), "1f1b"),
        (PLAIN, Layout(tensor=2), "1f1b"),
        (PLAIN, SHARES, "1f1b"),
        (PLAIN, Layout(tensor=3, uneven_shards=True), "1f1b"),
        (PLAIN, Layout(pipeline=2), "zb"),
        (TIED, Layout(pipeline=2), "1f1b"),
    ],
    ids=["dense", "dense, tied", "tensor 2", "sequence", "tensor 3, uneven", "pipeline 2, zb", "pipeline 2, tied"],
)
def test_without_dropout_it_is_gpt2(ranks: RankPool, config: Argonne1Config, layout: Layout, schedule: str) -> None:
    logits, loss, expected = theirs_of(config)
    results = ranks.run(layout, gradients, config, schedule)
    for rank, (found, own_loss, _) in enumerate(results):
        assert_close(found[0], logits[:, -1], 1e-10, f"the last logits on rank {rank}")
        assert own_loss == pytest.approx(loss, rel=1e-10)
    if layout.pipeline == 1:
        assert_close(torch.cat([found[1] for found, _, _ in results], -1), logits, 1e-10, "logits")
    assembled = assemble(parts for _, _, parts in results)
    assert assembled.keys() == expected.keys()
    for name, value in expected.items():
        assert_close(assembled[name], value, 1e-10, f"gradient of {name}", scale=1e-3)


class Dropping(nn.Module):
    """One of their dropouts, which drops what ours does."""

    def __init__(self, ours: Dropout, keys: Tensor) -> None:
        super().__init__()
        self.ours, self.keys, self.p = ours, keys, ours.probability

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 4:
            return self.ours.of_heads(x, self.keys, range(x.shape[1]))
        return self.ours(x, self.keys)


def test_it_drops_where_gpt2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = their_model(DROPPING).train()
    batch = batch_of(ProcessGroups.single(), 0, 1)
    draws = batch.draws
    assert draws is not None
    keys = row_keys(draws.key, draws.samples[0], torch.arange(SEQUENCE))
    theirs.transformer.drop = Dropping(Dropout(DROPPING.embedding_dropout, "transformer.drop"), keys)
    for number, block in enumerate(theirs.transformer.h):
        site = f"transformer.h.{number}"
        attention = Dropout(DROPPING.attention_dropout, f"{site}.attn.attn_dropout")
        block.attn.attn_dropout = Dropping(attention, keys)
        block.attn.resid_dropout = Dropping(Dropout(0.2, f"{site}.attn.resid_dropout"), keys)
        block.mlp.dropout = Dropping(Dropout(0.2, f"{site}.mlp.dropout"), keys)
    # Some versions of theirs only look what share that module drops.
    attention = iter([block.attn.attn_dropout for block in theirs.transformer.h])
    monkeypatch.setattr(F, "dropout", lambda x, **_: next(attention)(x))
    loss = F.cross_entropy(theirs(batch.ids[0]).logits.flatten(0, 1), batch.targets.flatten())
    loss.backward()

    ours = Argonne1Model(DROPPING, Execution(ProcessGroups.single(), DOUBLE))
    parameters = ours.sharded_parameters()
    ours.initialise(0)
    load_tensors(their_model(DROPPING).state_dict(), weight_pieces(parameters))
    found = ours.forward_backward(batch, CrossEntropyLoss())
    assert found.item() == pytest.approx(loss.item(), rel=1e-10)
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    for sharded in parameters:
        whole = torch.zeros_like(expected[sharded.spec.regions[0].name])
        for region in sharded.spec.regions:
            whole[region.whole_index] = region.part_of(sharded.parameter.grad)
        name = sharded.spec.regions[0].name
        assert_close(whole, expected[name], 1e-10, name, scale=1e-3)
    evaluated = ours.evaluate(batch.micro_batch(0), CrossEntropyLoss())
    plain = ours.evaluate(Batch(batch.ids[0], batch.targets[0]), CrossEntropyLoss())
    assert torch.equal(evaluated, plain), "evaluation dropped something"


@cache
def alone(documents: bool = False) -> tuple[list[float], dict[str, Tensor], dict[tuple[str, int, int], Tensor]]:
    """The run in one process, in one micro-batch a step."""
    losses, parts, masks = train(ProcessGroups.single(), Case(documents=documents))
    return losses, assemble([parts]), whole_masks([masks])


CASES = [
    Case(accumulation=4, recompute=Recompute.SELECTIVE),
    Case(Layout(tensor=2), accumulation=2, recompute=Recompute.SELECTIVE),
    Case(SHARES, accumulation=2, documents=True),
    Case(Layout(pipeline=2), "1f1b", accumulation=4, recompute=Recompute.SELECTIVE),
    Case(Layout(pipeline=2), "zb", accumulation=2),
    Case(Layout(data=2), accumulation=2),
    Case(Layout(data=2), kind="fsdp", accumulation=1, recompute=Recompute.SELECTIVE),
    Case(Layout(data=2, tensor=2, sequence_parallel=True), kind="zero1", accumulation=2),
]
MORE = [
    Case(Layout(pipeline=2), "gpipe", accumulation=4),
    Case(Layout(pipeline=2), "interleaved", accumulation=4, documents=True, recompute=Recompute.FULL),
    Case(Layout(pipeline=2, data=2), "1f1b", "fsdp", accumulation=2),
    Case(Layout(pipeline=2, tensor=2, sequence_parallel=True), "zb", accumulation=2, recompute=Recompute.SELECTIVE),
    Case(Layout(tensor=3, uneven_shards=True), accumulation=1),
    Case(Layout(data=2, pipeline=2, tensor=2, sequence_parallel=True), "1f1b", "zero1", accumulation=2),
]


@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.exhaustive) for case in MORE)], ids=str
)
def test_training_with_dropout_is_that_of_one_process(ranks: RankPool, case: Case) -> None:
    losses, weights, masks = alone(case.documents)
    assert len(set(losses)) == STEPS, "nothing happened"
    results = ranks.run(case.layout, train, case)
    for rank, (found, _, _) in enumerate(results):
        assert found == pytest.approx(losses, rel=1e-9), f"{case}: losses of rank {rank}"
    assembled = assemble(parts for _, parts, _ in results)
    assert assembled.keys() == weights.keys()
    for name, value in weights.items():
        assert_close(assembled[name], value, 1e-8, f"{case}: {name}")
    same(whole_masks([found for _, _, found in results]), masks)


def same(found: dict[tuple[str, int, int], Tensor], expected: dict[tuple[str, int, int], Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), f"{key}: {int((found[key] != value).sum())} elements were dropped unlike"


def test_a_run_that_goes_on_in_another_layout_drops_what_it_would_have(ranks: RankPool, tmp_path: Path) -> None:
    losses, weights, masks = alone()
    first = ranks.run(Layout(tensor=2), train, Case(Layout(tensor=2), accumulation=2), 0, 2, tmp_path)
    then = Case(Layout(pipeline=2), "zb", accumulation=4)
    second = ranks.run(then.layout, train, then, 2, STEPS, tmp_path)
    assert first[0][0] + second[0][0] == pytest.approx(losses, rel=1e-9)
    assembled = assemble(parts for _, parts, _ in second)
    for name, value in weights.items():
        assert_close(assembled[name], value, 1e-8, name)
    found = whole_masks([masks for _, _, masks in first]) | whole_masks([masks for _, _, masks in second])
    same(found, masks)


def test_what_is_dropped_is_as_much_as_was_asked_and_new_at_every_site_and_step() -> None:
    _, _, masks = alone()
    expected = {"drop": 0.1, "attn_dropout": 0.3, "resid_dropout": 0.2, "dropout": 0.2}
    sites = {site for site, _, _ in masks}
    assert len(sites) == 1 + 3 * DROPPING.num_hidden_layers
    assert len(masks) == len(sites) * STEPS * GLOBAL_BATCH
    for name, share in expected.items():
        found = [mask for (site, _, _), mask in masks.items() if site.rpartition(".")[2] == name]
        seen = [mask.tril() if "attn" in name else mask for mask in found]
        possible = sum(torch.ones_like(mask).tril().sum() if "attn" in name else mask.numel() for mask in found)
        dropped = sum(mask.sum() for mask in seen) / possible
        assert abs(dropped - share) < 5 * (share * (1 - share) / possible) ** 0.5, name
        assert len({mask.numpy().tobytes() for mask in found}) == len(found), f"{name}: two masks are the same"


def test_mixed_precision_drops_the_same_elements() -> None:
    model = Argonne1Model(DROPPING, Execution(ProcessGroups.single(), Precision(torch.float32, torch.bfloat16)))
    model.initialise(3)
    double = Argonne1Model(DROPPING, Execution(ProcessGroups.single(), DOUBLE))
    double.initialise(3)
    batch = batch_of(ProcessGroups.single(), 0, 2)
    losses = [each.forward_backward(batch, CrossEntropyLoss()).item() for each in (model, double)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    for one, other in zip(model.parameters(), double.parameters(), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert_close(one.grad.double(), other.grad, 0.05, "gradient in bfloat16", scale=1e-3)


def test_what_it_does_not_have_is_refused() -> None:
    with pytest.raises(LayoutError, match="context_parallel=2 is not offered by Argonne 1.x"):
        DROPPING.check_layout(Layout(context=2))
    with pytest.raises(LayoutError, match="num_attention_heads=6 is not divisible by tensor_parallel=4"):
        DROPPING.check_layout(Layout(tensor=4))
    with pytest.raises(ArgonneError, match="reproducible=True is not offered by Argonne 1.x"):
        Argonne1Model(PLAIN, Execution(ProcessGroups.single(), DOUBLE, reproducible=2))
    model = Argonne1Model(DROPPING, Execution(ProcessGroups.single(), DOUBLE))
    ids = ids_of(0)[None]
    with pytest.raises(ArgonneError, match="draws=None of a batch does not say what embedding_dropout=0.1"):
        model.forward_backward(Batch(ids[..., :-1], ids[..., 1:]), CrossEntropyLoss())
