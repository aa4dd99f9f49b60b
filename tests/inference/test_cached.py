"""Text from kept keys and values is the text without them: in any batch, at any layout, token for token."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from argonne.inference import Sampling, cache_line, continue_all
from argonne.models import (
    Argonne1Config,
    ArgonneConfig,
    ArgonneModel,
    CachingModel,
    Execution,
    RopeScaling,
    build_model,
    build_replicas,
)
from argonne.parallel import Layout, Precision, ProcessGroups, initialise
from tests.pool import RankPool

CONFIG = ArgonneConfig(24, 3, 6, 3, 29, 12, 4, max_position_embeddings=18, initializer_range=0.5)
GREEDY = Sampling(max_new_tokens=7, temperature=0.0, repetition_penalty=1.3)
DRAWN = Sampling(max_new_tokens=7, temperature=1.2, top_k=11, top_p=0.95)
LENGTHS = (4, 1, 13, 7, 18, 23)
"""Of the longest prompts, one slides from its first token on, and two before they end."""

LAYOUTS = [
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True),
    Layout(pipeline=2),
    Layout(tensor=3),
    Layout(tensor=2, pipeline=2),
    *(
        pytest.param(layout, marks=pytest.mark.exhaustive)
        for layout in (
            Layout(context=2),
            Layout(tensor=3, sequence_parallel=True),
            Layout(tensor=4, uneven_shards=True),
            Layout(data=2, tensor=2),
        )
    ),
]
CASES = [
    (torch.float64, True, GREEDY),
    (torch.float32, True, GREEDY),
    (torch.float64, False, DRAWN),
    (torch.float32, False, DRAWN),
]


def prompts(lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    return [[(11 * place + 5 * number + place * place) % 29 for place in range(n)] for number, n in enumerate(lengths)]


def model_of(groups: ProcessGroups, dtype: torch.dtype, tied: bool, blocks: int | None = None) -> ArgonneModel:
    config = replace(CONFIG, tie_word_embeddings=tied)
    model = ArgonneModel(config, Execution(groups, Precision(dtype, dtype), reproducible=blocks))
    model.initialise(seed=2)
    return model


def written(groups: ProcessGroups, cached: bool = True, batch: int | None = None, blocks: int | None = None) -> Any:
    """Greedy and drawn texts of all prompts, by dtype and by whether embeddings are tied."""
    return {
        (dtype, tied, kind.temperature): continue_all(
            model_of(groups, dtype, tied, blocks), prompts(), kind, 7, batch=batch, cached=cached
        )
        for dtype, tied, kind in CASES
    }


@pytest.fixture(scope="module")
def alone() -> Any:
    """Of one process that keeps nothing, one prompt at a time."""
    return written(ProcessGroups.single(), cached=False)


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_kept_keys_and_values_change_no_token_in_any_batch(alone: Any, batch: int | None) -> None:
    found = written(ProcessGroups.single(), batch=batch)
    assert found == alone
    assert all(len(set(text)) > 2 for texts in found.values() for text in texts), "these say nothing"
    for _, tied, temperature in found:
        assert found[torch.float32, tied, temperature] == found[torch.float64, tied, temperature]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_every_layout_writes_what_one_process_writes(ranks: RankPool, layout: Layout, alone: Any) -> None:
    for rank, found in enumerate(ranks.run(layout, written)):
        assert found == alone, f"rank {rank}"


def test_a_reproducible_model_writes_the_same_at_every_layout(ranks: RankPool) -> None:
    expected = written(ProcessGroups.single(), blocks=3)
    for rank, found in enumerate(ranks.run(Layout(tensor=3), written, True, None, 3)):
        assert found == expected, f"rank {rank}"


def from_shared_rows(groups: ProcessGroups) -> list[list[int]]:
    execution = Execution(groups, Precision(torch.float64, torch.float64))
    model, strategy = build_replicas(partial(ArgonneModel, CONFIG), execution, "fsdp")
    initialise(strategy.parameters, seed=2)
    return continue_all(model, prompts(), DRAWN, 7)


def test_a_model_whose_rows_are_shared_out_writes_the_same(ranks: RankPool) -> None:
    expected = continue_all(SHARED, prompts(), DRAWN, 7)
    for rank, found in enumerate(ranks.run(Layout(data=2), from_shared_rows)):
        assert found == expected, f"rank {rank}"


@given(
    st.lists(st.integers(1, 22), min_size=1, max_size=5),
    st.integers(0, 12),
    st.sampled_from([GREEDY, DRAWN]),
    st.integers(1, 5),
)
@settings(max_examples=12)
def test_prompts_of_any_lengths_do_not_disturb_each_other(
    lengths: list[int], new: int, kind: Sampling, batch: int
) -> None:
    kind, given_prompts = replace(kind, max_new_tokens=new), prompts(tuple(lengths))
    together = continue_all(SHARED, given_prompts, kind, 3, batch=batch)
    for number, prompt in enumerate(given_prompts):
        assert continue_all(SHARED, [prompt], kind, 3, cached=False, first=number) == [together[number]]


def test_texts_that_end_early_leave_the_others_as_they_were() -> None:
    whole = continue_all(SHARED, prompts(), DRAWN, 7)
    for stop in (whole[0][3], whole[3][0], whole[2][1]):
        ends = [text[: text.index(stop)] if stop in text else text for text in whole]
        assert continue_all(SHARED, prompts(), DRAWN, 7, stop) == ends


def test_the_tokens_of_a_prompt_depend_on_its_number_alone() -> None:
    same = [prompts()[0]] * 3
    texts = continue_all(SHARED, same, DRAWN, 7)
    assert len(set(map(tuple, texts))) == 3
    assert continue_all(SHARED, same[:2], DRAWN, 7, first=1) == texts[1:]
    assert continue_all(SHARED, same, DRAWN, 8) != texts


OTHERS = {
    "qwen2": replace(CONFIG, family="qwen2", attention_bias=True),
    "qwen3": replace(CONFIG, family="qwen3", qk_norm=True),
    "yarn": replace(CONFIG, rope_scaling=RopeScaling("yarn", 4.0, 9)),
    "argonne1": Argonne1Config(24, 3, 6, 29, 40, max_position_embeddings=18, initializer_range=0.5),
}


def written_by(groups: ProcessGroups, name: str, cached: bool = True) -> list[list[int]]:
    model = build_model(OTHERS[name], Execution(groups, Precision(torch.float64, torch.float64)))
    model.initialise(seed=2)
    assert isinstance(model, CachingModel)
    return continue_all(model, prompts(), DRAWN, 7, cached=cached)


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_keeps_what_it_needs(ranks: RankPool, name: str) -> None:
    expected = written_by(ProcessGroups.single(), name, cached=False)
    assert written_by(ProcessGroups.single(), name) == expected
    for found in ranks.run(Layout(tensor=2, pipeline=2, sequence_parallel=True), written_by, name):
        assert found == expected


class Bare:
    """A model that has what generation cannot do without, and no more."""

    def __init__(self, model: ArgonneModel) -> None:
        self.groups, self.longest_sequence = model.groups, model.longest_sequence
        self.next_token_logits = model.next_token_logits


def test_a_model_without_a_cache_writes_too_and_says_so() -> None:
    bare: Any = Bare(SHARED)
    assert not isinstance(bare, CachingModel)
    assert continue_all(bare, prompts(), DRAWN, 7) == continue_all(SHARED, prompts(), DRAWN, 7)
    assert cache_line(bare, prompts(), DRAWN, 2) == "no cache: model=Bare computes the whole context for every token"


def test_the_memory_of_the_largest_cache_is_told_before_it_is_taken() -> None:
    # Batches of prompts of 4 and 1, of 13 and 7, of 18 and 23: 17 of the third are all that a row can keep.
    line = cache_line(SHARED, prompts(), replace(DRAWN, max_new_tokens=4), 2)
    assert line == "cache: 0.000 GiB on this rank, 2 x 18 positions, 3 layers of 3 key-value heads in float64"
    assert SHARED.cache_shape().bytes(2, 18) == 2 * 3 * 2 * 3 * 18 * 4 * 8


def kept_heads(groups: ProcessGroups) -> int:
    return model_of(groups, torch.float32, True).cache_shape().heads


@pytest.mark.parametrize(("size", "heads"), [(2, 2), (3, 1)])
def test_a_rank_keeps_the_heads_that_its_queries_use_each_once(ranks: RankPool, size: int, heads: int) -> None:
    """Of 3 that 6 query heads share in pairs; two ranks cut the second pair."""
    assert ranks.run(Layout(tensor=size), kept_heads) == [heads] * size


SHARED = model_of(ProcessGroups.single(), torch.float64, True)
