"""Document masks: a model says of packed documents what it says of each alone, however sequences are shared out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from argonne.models import ArgonneConfig, ArgonneModel, Execution
from argonne.parallel import Layout, Precision, ProcessGroups, complete_gradients, context_positions
from argonne.parallel.tensor_parallel.embedding import VocabularyRange
from tests.losses import losses
from tests.pool import RankPool
from tests.whole import Parts, assemble, assert_close, parts_of

DOUBLE = Precision(torch.float64, torch.float64)
LENGTHS = (5, 1, 7, 3)


def packed(
    groups: ProcessGroups, config: ArgonneConfig, ids: Tensor, documents: Tensor
) -> tuple[Tensor, Tensor, Parts]:
    """Each of this rank's logits and losses, and the gradients of the losses' sum."""
    model = ArgonneModel(config, Execution(groups, DOUBLE))
    model.initialise(seed=4)
    with torch.no_grad():
        logits = model.logits(ids[:, :-1], documents)
    each = losses(model, ids[:, :-1], ids[:, 1:], documents)
    each.sum().backward()
    complete_gradients(model.sharded_parameters(), groups)
    return logits, each.detach(), parts_of(model, groups, lambda parameter: parameter.grad)


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(tensor=2), Layout(context=2), Layout(context=2, tensor=2, sequence_parallel=True)],
    ids=str,
)
def test_packed_documents_have_the_losses_and_gradients_of_each_alone(ranks: RankPool, layout: Layout) -> None:
    config = ArgonneConfig(16, 2, 4, 2, 50, 24, 32, initializer_range=0.4)
    generator = torch.Generator().manual_seed(6)
    texts = [torch.randint(0, 50, (2, length + 1), generator=generator) for length in LENGTHS]
    ids, targets = torch.cat([t[:, :-1] for t in texts], 1), torch.cat([t[:, 1:] for t in texts], 1)
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).expand(2, -1)
    # A target at the end of a document is its own next token, not the first of the document behind it.
    whole = torch.cat([ids, targets[:, -1:]], 1)
    own = whole[:, 1:] == targets

    alone = ArgonneModel(config, Execution(ProcessGroups.single(), DOUBLE))
    alone.initialise(seed=4)
    expected = torch.cat([losses(alone, t[:, :-1], t[:, 1:]) for t in texts], 1)
    every_logit = torch.cat([alone.logits(t[:, :-1]) for t in texts], 1)
    results = ranks.run(layout, packed, config, whole, numbers)
    for rank, (logits, each, _) in enumerate(results):
        groups = ProcessGroups.of_rank(layout, rank)
        places = context_positions(ids.shape[1], groups.context)
        held = VocabularyRange.of_rank(config.vocab_size, layout.tensor, groups.tensor.rank)
        own_logits = every_logit[:, places, held.start : held.stop]
        assert_close(logits, own_logits, 1e-10, f"logits of rank {rank}")
        same = own[:, places]
        assert_close(each[same], expected[:, places][same], 1e-10, f"losses of rank {rank}")

    # Gradients of the packed targets, document by document.
    total = torch.zeros((), dtype=torch.float64)
    begin = 0
    for length in LENGTHS:
        end = begin + length
        total = total + losses(alone, whole[:, begin:end], whole[:, begin + 1 : end + 1]).sum()
        begin = end
    total.backward()
    gradients = assemble(parts for *_, parts in results)
    for region, value in parts_of(alone, ProcessGroups.single(), lambda parameter: parameter.grad):
        assert_close(gradients[region.name], value, 1e-10, region.name)
