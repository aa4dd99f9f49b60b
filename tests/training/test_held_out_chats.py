"""Held-out conversations: which sequences they come in, and the loss of their weighed tokens at any layout."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from argonne.data import open_shards
from argonne.data.chat.rows import CONVERSATION
from argonne.data.chat.source import Conversations
from argonne.data.chat.tokens import ChatEncoder
from argonne.models import ArgonneModel, CrossEntropyLoss, Execution, build_replicas
from argonne.parallel import ArgonneError, Layout, PipelinePlan, ProcessGroups, initialise
from argonne.training.evaluation import held_out_loss
from argonne.training.named_sets import NamedSet, NamedSets, announced, read_named
from tests import dense
from tests.data.chats import CHATML, CHATML_TOKENS, byte_level, messages, write_chats
from tests.pool import RankPool
from tests.training.test_evaluation import CONFIG, DOUBLE, MICRO_BATCH, held_out
from tests.whole import assemble, parts_of


def weighed() -> Tensor:
    """Five sequences with very unequal numbers of weighed tokens: the second of two replicas has none."""
    sequences = held_out(5)
    weights = torch.zeros_like(sequences[0])
    weights[0], weights[2, 5], weights[:, 0] = 1, 1, 1  # what nothing foretells does not count
    return torch.cat([sequences, weights[None]])


def losses(groups: ProcessGroups) -> tuple[float, float, Any]:
    """The loss; the same by way of ``NamedSets``; and this rank's part of the weights."""
    plan = PipelinePlan.of("1f1b", groups.layout.pipeline)
    model, replicas = build_replicas(partial(ArgonneModel, CONFIG), Execution(groups, DOUBLE, plan=plan), "replicate")
    initialise(replicas.parameters, seed=3)
    replicas.publish()
    alone = held_out_loss(model, weighed(), MICRO_BATCH, CrossEntropyLoss(), True)
    measured, _ = NamedSets({"own": NamedSet(weighed())}, 1, 1).measure(model, MICRO_BATCH, CrossEntropyLoss(), True)
    assert measured["own"]["bits_per_byte"] is None
    own = parts_of(model, groups, lambda parameter: parameter.detach()) if groups.world.size == 1 else None
    return alone, float(measured["own"]["loss"] or 0), own


def test_the_loss_of_weighed_tokens_is_that_of_a_plain_model_at_every_layout(ranks: RankPool) -> None:
    ((found, _, parts),) = ranks.run(Layout(), losses)
    ids, documents, weights = weighed()
    scores = dense.logits(assemble([parts]), CONFIG, ids[:, :-1], documents[:, :-1]).log_softmax(-1)
    each = -scores.gather(-1, ids[:, 1:, None])[..., 0]
    expected = ((each * weights[:, 1:]).sum() / weights[:, 1:].sum()).item()
    assert found == pytest.approx(expected, rel=1e-12)
    for layout in (Layout(data=2), Layout(tensor=2), Layout(pipeline=2), Layout(context=2)):
        for rank, (alone, measured, _) in enumerate(ranks.run(layout, losses)):
            assert (alone, measured) == (pytest.approx(expected, rel=1e-12),) * 2, f"rank {rank} of {layout}"


ANSWERS = ["Yes.", "No, not today.", "A small model.", "Why?", "Nobody knows, alas. " * 9, "But when?"] * 3
ROWS = [messages(("user", f"{number}?"), ("assistant", answer)) for number, answer in enumerate(ANSWERS)]
BLOCK = 39


def chats(groups: ProcessGroups, path: Path, limit: int | None) -> dict[str, NamedSet]:
    tokenizer = byte_level(CHATML, *CHATML_TOKENS) if groups.is_first else None
    shards = {"own": open_shards([path], column=CONVERSATION)}
    return read_named(shards, {"own": str(path)}, tokenizer, BLOCK, None, limit, groups, Conversations())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Conversations, and before, between and behind them what cannot be used."""
    useless = messages(("user", "Why?"))
    return write_chats(tmp_path / "held.parquet", [useless, *ROWS[:7], useless, *ROWS[7:], useless, useless])


def test_a_set_has_every_conversation_of_one_pass_once_and_whole_on_every_rank(ranks: RankPool, path: Path) -> None:
    found = chats(ProcessGroups.single(), path, None)
    ids, documents, weights = found["own"].sequences
    wanted = ChatEncoder(byte_level(CHATML, *CHATML_TOKENS), BLOCK + 1)(ROWS)
    usable = [each.tolist() for each in wanted if not isinstance(each, str)]
    assert 0 < len(usable) < len(ROWS), "some are too long"
    held = []
    for tokens, numbers, counts in zip(ids, documents, weights, strict=True):
        for number in range(int(numbers.max()) + 1):
            own = numbers == number
            if counts[own].any():  # what fills the sequence up weighs nothing
                held.append([tokens[own].tolist(), counts[own].tolist()])
    assert sorted(held) == sorted(usable)
    assert found["own"].tokens == sum(sum(counts) for _, counts in usable)
    first, second = announced(found, 3)
    assert first.startswith(f"eval own: {len(ids)} sequences, {found['own'].tokens} tokens that count, after every 3 ")
    assert second.startswith(f"eval own: {len(usable)} conversations of 22 rows (dropped: no_assistant 4, too_long 3)")
    for limit in (None, 2, len(ids) + 5):
        for each in ranks.run(Layout(data=2), chats, path, limit):
            assert torch.equal(each["own"].sequences, found["own"].sequences[:, :limit])


def test_a_set_without_a_usable_conversation_is_refused_by_its_name(tmp_path: Path) -> None:
    path = write_chats(tmp_path / "none.parquet", [messages(("user", "Why?"))] * 2)
    with pytest.raises(ArgonneError) as refused:
        chats(ProcessGroups.single(), path, None)
    line = f"eval='own={path}': no usable conversations in the data; rows dropped: no_assistant 2"
    assert str(refused.value) == line
