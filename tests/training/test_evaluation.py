"""What a save shows: the held-out loss, which is a plain model's however the sequences fall to replicas, and text."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from argonne.data import open_shards, train_tokenizer
from argonne.models import ArgonneConfig, ArgonneModel, CrossEntropyLoss, Execution, LanguageModel, build_replicas
from argonne.parallel import Layout, PipelinePlan, Precision, ProcessGroups, initialise
from argonne.training.evaluation import PROMPT, held_out_loss, held_out_sequences, sample_text
from tests import dense
from tests.pool import RankPool
from tests.whole import assemble, parts_of

CONFIG = ArgonneConfig(16, 5, 4, 2, 53, 24, 16, initializer_range=0.3)
DOUBLE = Precision(torch.float64, torch.float64)
MICRO_BATCH, BLOCK = 2, 16
COUNTS = (1, 2, 5, 7)


def held_out(count: int) -> Tensor:
    """``[2, count, block + 1]``: ids, and the numbers of their documents."""
    draw = torch.Generator().manual_seed(count)
    ids = torch.randint(CONFIG.vocab_size, (count, BLOCK + 1), generator=draw)
    return torch.stack([ids, torch.randint(2, ids.shape, generator=draw).cumsum(1)])


def losses(groups: ProcessGroups, kind: str, schedule: str) -> list[float]:
    plan = PipelinePlan.of(schedule, groups.layout.pipeline)  # type: ignore[arg-type]
    build = partial(ArgonneModel, CONFIG)
    model, replicas = build_replicas(build, Execution(groups, DOUBLE, plan=plan), kind)  # type: ignore[arg-type]
    initialise(replicas.parameters, seed=3)
    replicas.publish()
    return [
        held_out_loss(model, held_out(count), MICRO_BATCH, CrossEntropyLoss(), mask)
        for count in COUNTS
        for mask in (False, True)
    ]


@pytest.fixture(scope="module")
def alone(ranks: RankPool) -> list[float]:
    return ranks.run(Layout(), losses, "replicate", "1f1b")[0]


@pytest.mark.parametrize("kind", ["replicate", "zero1", "fsdp"])
@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(data=2), "1f1b"),
        (Layout(data=3), "1f1b"),
        (Layout(data=2, pipeline=2), "interleaved"),
        (Layout(data=3, pipeline=2), "1f1b"),
        (Layout(data=2, context=2), "1f1b"),
        (Layout(data=3, context=2), "1f1b"),
        (Layout(data=3, tensor=2), "1f1b"),
    ],
    ids=str,
)
def test_held_out_loss_equals_that_of_one_process_where_replicas_have_unequal_shares(
    ranks: RankPool, alone: list[float], layout: Layout, schedule: str, kind: str
) -> None:
    for rank, found in enumerate(ranks.run(layout, losses, kind, schedule)):
        assert found == pytest.approx(alone, rel=1e-12), f"rank {rank}"


def reproducible_losses(groups: ProcessGroups, kind: str) -> list[float]:
    """In float32, where another cut of the same sequences has other last bits."""
    model, replicas = build_replicas(partial(ArgonneModel, CONFIG), Execution(groups, Precision()), kind)  # type: ignore[arg-type]
    initialise(replicas.parameters, seed=3)
    replicas.publish()
    leaves = SimpleNamespace(reproducible=True, data=groups.data, context=groups.context)
    evaluated = cast(LanguageModel, SimpleNamespace(groups=leaves, evaluate=model.evaluate))
    return [
        held_out_loss(evaluated, held_out(count), micro_batch, CrossEntropyLoss(), mask)
        for count in (*COUNTS, 24)
        for micro_batch in (1, 2, 3)
        for mask in (False, True)
    ]


@pytest.mark.parametrize("kind", ["replicate", "zero1", "fsdp"])
def test_the_held_out_loss_of_a_reproducible_run_is_the_same_bits_however_many_replicas_share_it(
    ranks: RankPool, alone: list[float], kind: str
) -> None:
    expected = ranks.run(Layout(), reproducible_losses, kind)[0]
    assert expected[2:4] == pytest.approx(alone[:2], rel=1e-5), "one sequence, in micro-batches of two"
    for size in (2, 3, 4):
        for rank, found in enumerate(ranks.run(Layout(data=size), reproducible_losses, kind)):
            assert found == expected, f"rank {rank} of {size}"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("apart", [True, False], ids=["documents apart", "documents together"])
def test_held_out_loss_is_the_mean_over_all_tokens_of_a_plain_model(tied: bool, apart: bool) -> None:
    groups, config = ProcessGroups.single(), replace(CONFIG, tie_word_embeddings=tied)
    model = ArgonneModel(config, Execution(groups, DOUBLE))
    initialise(model.sharded_parameters(), seed=3)
    weights = assemble([parts_of(model, groups, lambda parameter: parameter)])
    for count in COUNTS:
        ids, documents = sequences = held_out(count)
        own = documents[:, :-1] if apart else None
        expected = dense.loss(weights, config, ids[:, :-1], ids[:, 1:], own).item()
        found = held_out_loss(model, sequences, MICRO_BATCH, CrossEntropyLoss(), apart)
        assert found == pytest.approx(expected, rel=1e-12), f"{count} sequences"


ROWS = [[3, 1], [2, 2, 1]]
"""Rows of each row group of each shard."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], list[str]]:
    """Shards of held-out text, and their rows in their order."""
    folder, draw = tmp_path_factory.mktemp("held-out"), random.Random(4)
    paths, texts = [], []
    for number, groups in enumerate(ROWS):
        paths.append(folder / f"part-{number}.parquet")
        with pq.ParquetWriter(paths[-1], pa.schema([("text", pa.string())])) as file:
            for count in groups:
                rows = ["".join(draw.choices("abcdefgh ij", k=draw.randint(30, 90))) for _ in range(count)]
                file.write_table(pa.table({"text": rows}))
                texts += rows
    return paths, texts


@pytest.fixture(scope="module")
def tokenizer(text: tuple[list[Path], list[str]]) -> PreTrainedTokenizerFast:
    return train_tokenizer(text[1], 300)


@pytest.mark.parametrize("boundary", [None, (1, 2)])
def test_held_out_sequences_are_the_whole_ones_of_one_pass_over_the_text(
    text: tuple[list[Path], list[str]], tokenizer: PreTrainedTokenizerFast, boundary: tuple[int, int] | None
) -> None:
    paths, texts = text
    first, last = ([], []) if boundary is None else ([boundary[0]], [boundary[1]])
    documents = [[*first, *tokenizer.encode(row, add_special_tokens=False), *last] for row in texts]
    stream = torch.tensor([token for document in documents for token in document])
    starts = torch.tensor([number for number, document in enumerate(documents) for _ in document])
    shards, groups = open_shards(paths), ProcessGroups.single()
    # That all fits exactly, and that it just does not.
    for length in (len(stream), len(stream) - 1, len(stream) // 2, len(stream) // 2 + 1, 7):
        whole = len(stream) // length
        for limit in (1, whole, whole + 3):
            ids, numbers = held_out_sequences(shards, tokenizer, length - 1, boundary, limit, groups)
            count = min(limit, whole)
            assert torch.equal(ids, stream[: count * length].view(count, length)), f"{limit} sequences of {length}"
            expected = starts[: count * length].view(count, length)
            # Numbers of documents count from any number in a sequence; what matters is where they change.
            assert torch.equal(numbers.diff() != 0, expected.diff() != 0)


def what_is_held_out(
    groups: ProcessGroups, paths: list[Path], tokenizer: PreTrainedTokenizerFast, limit: int
) -> Tensor:
    own = tokenizer if groups.is_first else None
    return held_out_sequences(open_shards(paths), own, 9, None, limit, groups)


def test_the_first_rank_reads_the_held_out_text_for_all(
    ranks: RankPool, text: tuple[list[Path], list[str]], tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = what_is_held_out(ProcessGroups.single(), text[0], tokenizer, 5)
    assert alone.shape == (2, 5, 10)
    for found in ranks.run(Layout(data=2, tensor=2), what_is_held_out, text[0], tokenizer, 5):
        assert torch.equal(found, alone)


def written(groups: ProcessGroups, tokenizer: PreTrainedTokenizerFast, tokens: int, seed: int) -> str | None:
    model = ArgonneModel(replace(CONFIG, vocab_size=300, max_position_embeddings=64), Execution(groups, DOUBLE))
    initialise(model.sharded_parameters(), seed=3)
    return sample_text(model, tokenizer if groups.is_first else None, tokens, seed)


def test_the_sample_is_the_prompt_and_what_the_model_adds_by_the_seed_alone(
    ranks: RankPool, tokenizer: PreTrainedTokenizerFast
) -> None:
    alone = ProcessGroups.single()
    assert written(alone, tokenizer, 0, 1) == tokenizer.decode(tokenizer.encode(PROMPT, add_special_tokens=False))
    first = written(alone, tokenizer, 12, 1)
    assert first is not None
    assert first.startswith(PROMPT)
    assert written(alone, tokenizer, 12, 1) == first != written(alone, tokenizer, 12, 2)
    assert ranks.run(Layout(tensor=2), written, tokenizer, 12, 1) == [first, None]
