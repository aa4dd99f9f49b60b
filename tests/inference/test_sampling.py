"""Penalty, temperature, top-k and top-p are those of ``transformers``; ties and splits over ranks change no draw."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from argonne.inference.sampling import NOT_FINITE, Sampling, candidates, draw, penalised, uniform
from argonne.models import Scores
from argonne.parallel import Layout, ProcessGroups, VocabParallelHead
from argonne.parallel.communication.groups import Axis
from tests.pool import RankPool

VOCABULARY = 41


def scores_of(logits: Tensor) -> Scores:
    return Scores(logits, logits.shape[1], 0, Axis("tensor"))


@given(
    st.integers(0, 1 << 30),
    st.sampled_from([1.0, 0.6, 1.7]),
    st.sampled_from([0, 1, 5, 40, 100]),
    st.sampled_from([1.0, 0.31, 0.83]),
    st.sampled_from([1.0, 1.4, 0.7]),
)
def test_candidates_and_their_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, penalty: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, VOCABULARY, generator=generator, dtype=torch.float64) * 2
    seen = torch.randint(0, VOCABULARY, (3, 7), generator=generator)
    processors = LogitsProcessorList([RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)])
    if top_k:
        processors.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    expected = processors(seen, logits.clone()).softmax(-1)
    sampling = Sampling(1, temperature, top_k, top_p, penalty)
    # Numbers just inside both ends of each token's stretch of [0, 1), most likely first, draw that token.
    for row, probabilities in enumerate(expected):
        ordered, order = probabilities.sort(descending=True, stable=True)
        ends = ordered.cumsum(0)
        for token, begin, end in zip(order.tolist(), (ends - ordered).tolist(), ends.tolist(), strict=True):
            if end - begin < 1e-9:
                continue
            for number in (begin + 1e-10, end - 1e-10):
                taken = draw(scores_of(logits[row : row + 1]), sampling, [seen[row].tolist()], [number])
                assert taken.tolist() == [token]


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_the_penalty_counts_a_token_once_and_leaves_the_others(penalty: float) -> None:
    logits = torch.tensor([[1.0, -2.0, 0.0, 3.0, -1.0]], dtype=torch.float64)
    found = penalised(scores_of(logits), penalty, [[1, 3, 3, 1]]).values
    assert found.tolist() == [[1.0, -2.0 * penalty, 0.0, 3.0 / penalty, -1.0]]
    assert draw(scores_of(logits), Sampling(1, 0.0, repetition_penalty=4.0), [[3]], [0.0]).tolist() == [0]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.integers(0, 13))
def test_what_is_equally_likely_comes_in_the_order_of_ids(values: list[int], count: int) -> None:
    logits = torch.tensor([values], dtype=torch.float32)
    found = candidates(scores_of(logits), count)
    order = sorted(range(len(values)), key=lambda token: (-values[token], token))
    assert found.ids.tolist() == [order[: count or None]]


@given(st.integers(0, 1 << 62), st.integers(0, 9), st.integers(0, 9))
def test_the_number_of_a_draw_is_its_own(seed: int, prompt: int, position: int) -> None:
    number = uniform(seed, prompt, position)
    assert 0 <= number < 1
    assert number == uniform(seed, prompt, position)
    others = {uniform(seed + 1, prompt, position), uniform(seed, prompt + 1, position), uniform(seed, prompt, 10)}
    assert number not in others


def test_numbers_are_even() -> None:
    numbers = torch.tensor([uniform(5, 0, position) for position in range(4000)])
    # Of 4,000 in 10 bins, a bin has 400 +- 19; 4.5 of these.
    assert ((numbers * 10).long().bincount(minlength=10) - 400).abs().max() < 86


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_told_row_by_row(bad: float, temperature: float) -> None:
    logits = torch.randn(3, 8)
    logits[1, 5] = bad
    tokens = draw(scores_of(logits), Sampling(1, temperature, top_k=3), [[]] * 3, [0.5] * 3).tolist()
    assert tokens[1] == NOT_FINITE
    assert NOT_FINITE not in (tokens[0], tokens[2])


CASES = [
    Sampling(1, 0.0),
    Sampling(1, 0.0, repetition_penalty=1.5),
    Sampling(1, 1.1, top_k=3),
    Sampling(1, 1.1, top_k=0, top_p=0.9, repetition_penalty=0.8),
    Sampling(1, 1.1, top_k=39),
]


def drawn(groups: ProcessGroups, vocabulary: int, bad: int | None) -> list[list[int]]:
    """Draws from logits with ties that the ranks share out."""
    head = VocabParallelHead(vocabulary, 4, groups)
    logits = torch.randn(6, vocabulary, generator=torch.Generator().manual_seed(1)).mul(3).round()
    if bad is not None:
        logits[2, bad] = float("nan")
    own = torch.full((6, head.range.rows), 9e9)
    own[:, : head.range.tokens] = logits[:, head.range.start : head.range.stop]
    seen = [[row, 3 * row % vocabulary] for row in range(6)]
    numbers = [uniform(1, row, 0) for row in range(6)]
    scores = Scores.of(own, head.range, groups.tensor)
    return [draw(scores, replace(case, top_k=min(case.top_k, vocabulary)), seen, numbers).tolist() for case in CASES]


@pytest.mark.parametrize(("size", "vocabulary", "bad"), [(2, 41, None), (2, 41, 40), (3, 17, 0), (3, 5, None)])
def test_a_shared_out_vocabulary_draws_what_a_whole_one_draws(
    ranks: RankPool, size: int, vocabulary: int, bad: int | None
) -> None:
    expected = drawn(ProcessGroups.single(), vocabulary, bad)
    for found in ranks.run(Layout(tensor=size), drawn, vocabulary, bad):
        assert found == expected
