"""Generated tokens: greedy is the dense argmax, draws keep to their support, every rank has the same text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from argonne.inference import Sampling, generate
from argonne.inference.sampling import draw, uniform
from argonne.models import ArgonneConfig, ArgonneModel, Execution, Scores
from argonne.parallel import ArgonneError, Layout, Precision, ProcessGroups
from argonne.parallel.communication.groups import Axis
from argonne.parallel.pipeline_parallel.plan import PipelinePlan
from tests import dense
from tests.pool import RankPool
from tests.whole import Parts, assemble, parts_of

SIZES = [1, 2, 4]  # at module scope: pytest then runs each size in one go, and ranks join a job once
CONFIG = ArgonneConfig(24, 2, 4, 2, 29, 12, 6, max_position_embeddings=12, initializer_range=0.5)
GREEDY = Sampling(max_new_tokens=9, temperature=0.0)
PROMPT = [3, 1, 4, 1, 5]


def continue_prompt(
    groups: ProcessGroups,
    config: ArgonneConfig,
    prompt: list[int],
    sampling: Sampling,
    seed: int,
    stop: int | set[int] | None,
) -> tuple[list[int], Parts]:
    model = ArgonneModel(config, Execution(groups, Precision(torch.float64, torch.float64)))
    model.initialise(seed=2)
    tokens = generate(model, prompt, sampling, seed, stop)
    return tokens, parts_of(model, groups, lambda p: p)


def dense_greedy(weights: dict[str, Tensor], config: ArgonneConfig, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        context = torch.tensor([ids[-config.max_position_embeddings :]])
        ids.append(int(dense.logits(weights, config, context)[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("size", SIZES, scope="module")
@pytest.mark.parametrize("vocabulary", [29, 5])
def test_greedy_tokens_are_the_argmax_of_the_dense_forward_on_every_rank(
    ranks: RankPool, size: int, vocabulary: int
) -> None:
    config = replace(CONFIG, vocab_size=vocabulary)
    prompt = [token % vocabulary for token in PROMPT]
    results = ranks.run(Layout(tensor=size), continue_prompt, config, prompt, GREEDY, 0, None)
    weights = assemble(parts for _, parts in results)
    # 5 + 9 tokens in a window of 12: the last ones are drawn from what the window still shows.
    expected = dense_greedy(weights, config, prompt, 9)
    assert len(set(expected)) > 1
    for rank, (tokens, _) in enumerate(results):
        assert tokens == expected, f"rank {rank}"


@pytest.mark.parametrize("layout", [Layout(tensor=2), Layout(tensor=4), Layout(data=2, tensor=2)], ids=str)
def test_drawn_tokens_are_the_same_on_every_rank_and_for_every_layout(ranks: RankPool, layout: Layout) -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.0, top_k=0, top_p=1.0)
    ((alone, _),) = ranks.run(Layout(), continue_prompt, CONFIG, PROMPT, sampling, 7, None)
    for rank, (tokens, _) in enumerate(ranks.run(layout, continue_prompt, CONFIG, PROMPT, sampling, 7, None)):
        assert tokens == alone, f"rank {rank}"


def single(prompt: list[int], sampling: Sampling, seed: int, stop: int | set[int] | None) -> list[int]:
    return continue_prompt(ProcessGroups.single(), CONFIG, prompt, sampling, seed, stop)[0]


def test_a_seed_gives_its_text_again_and_another_gives_another() -> None:
    sampling = Sampling(max_new_tokens=20, temperature=1.0)
    assert single(PROMPT, sampling, 1, None) == single(PROMPT, sampling, 1, None)
    assert single(PROMPT, sampling, 1, None) != single(PROMPT, sampling, 2, None)


@pytest.mark.parametrize("size", [1, 2], scope="module")
def test_a_stop_token_ends_the_text_and_is_not_returned(ranks: RankPool, size: int) -> None:
    whole = single(PROMPT, GREEDY, 0, None)
    stop = next(token for token in whole if token != whole[0])
    for tokens, _ in ranks.run(Layout(tensor=size), continue_prompt, CONFIG, PROMPT, GREEDY, 0, stop):
        assert tokens == whole[: whole.index(stop)]
    assert single(PROMPT, GREEDY, 0, whole[0]) == []
    assert single(PROMPT, GREEDY, 0, {stop, 10_000}) == whole[: whole.index(stop)]
    assert single(PROMPT, GREEDY, 0, {stop, whole[0]}) == []
    # A stop token within the prompt stops nothing.
    unseen = next(token for token in range(29) if token not in whole)
    assert single([unseen], GREEDY, 0, unseen) == single([unseen], GREEDY, 0, None)


def test_no_new_tokens_is_the_empty_text() -> None:
    assert single(PROMPT, Sampling(max_new_tokens=0), 0, None) == []


def test_a_prompt_longer_than_the_window_is_seen_from_its_end() -> None:
    window = CONFIG.max_position_embeddings
    prompt = [(7 * i) % 29 for i in range(window + 8)]
    assert single(prompt, GREEDY, 0, None) == single(prompt[-window:], GREEDY, 0, None)


def drawn_tokens(logits: Tensor, sampling: Sampling, draws: int) -> list[int]:
    scores = Scores(logits.repeat(draws, 1), len(logits), 0, Axis("tensor"))
    return draw(scores, sampling, [[]] * draws, [uniform(0, 0, number) for number in range(draws)]).tolist()


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    """Logits that all differ, in any order."""
    count = draw(st.integers(1, 9))
    order = draw(st.permutations(range(count)))
    return torch.tensor([0.31 * place + 0.01 * place**2 for place in order])


@given(scores(), st.integers(0, 12), st.floats(0.01, 1.0), st.floats(0.2, 3.0))
def test_draws_keep_to_the_top_k_and_the_fewest_tokens_of_top_p(
    logits: Tensor, top_k: int, top_p: float, temperature: float
) -> None:
    order = sorted(range(len(logits)), key=lambda token: -logits[token].item())
    kept = order[:top_k] if top_k else order
    weights = (logits[kept].double() / temperature).softmax(0).tolist()
    support: set[int] = set()
    total = 0.0
    for token, probability in zip(kept, weights, strict=True):
        if abs(total - top_p) < 1e-5:
            return  # at the edge, rounding decides
        if total < top_p:
            support.add(token)
        total += probability
    found = set(drawn_tokens(logits, Sampling(1, temperature, top_k, top_p), 60))
    assert found <= support
    assert order[0] in support


def test_every_token_of_the_support_is_drawn_as_often_as_it_is_likely() -> None:
    logits, temperature = torch.tensor([0.5, 2.0, -1.0, 1.0, 1.5]), 1.7
    draws = 4000
    tokens = drawn_tokens(logits, Sampling(1, temperature, top_k=4, top_p=0.9), draws)
    # Four of five by top_k; of their 0.36, 0.27, 0.20, 0.15 the last begins before 0.9 and stays.
    kept = torch.tensor([0, 1, 3, 4])
    expected = torch.zeros(5).index_put((kept,), (logits[kept] / temperature).softmax(0))
    found = torch.bincount(torch.tensor(tokens), minlength=5) / draws
    assert found[2] == 0
    slack = 4.5 * (expected * (1 - expected) / draws).sqrt()
    assert ((found - expected).abs() <= slack).all(), f"{found.tolist()} is not {expected.tolist()}"


def test_a_top_p_below_the_first_token_leaves_that_one_only() -> None:
    logits = torch.tensor([0.0, 0.1, 3.0, 0.2])
    assert set(drawn_tokens(logits, Sampling(1, 1.0, 0, 1e-6), 50)) == {2}
    assert set(drawn_tokens(logits, Sampling(1, 1.0, 1, 1.0), 50)) == {2}


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 1e-38])
def test_a_temperature_near_zero_takes_the_most_likely_token(temperature: float) -> None:
    logits = torch.tensor([-20.0, 30.0, 29.0, -50.0])
    assert set(drawn_tokens(logits, Sampling(1, temperature, 0, 1.0), 20)) == {1}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens=-1 is not legal; legal: 0 or more"),
        ({"temperature": -0.5}, "temperature=-0.5 is not legal; legal: 0 or more"),
        ({"temperature": float("nan")}, "temperature=nan is not legal; legal: 0 or more"),
        ({"top_k": -1}, "top_k=-1 is not legal; legal: 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 is not legal; legal: more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 is not legal; legal: more than 0, at most 1"),
    ],
)
def test_impossible_sampling_is_refused_with_what_is_legal(changed: dict[str, float], message: str) -> None:
    with pytest.raises(ArgonneError) as refusal:
        Sampling(**changed)
    assert str(refusal.value) == message


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ArgonneError) as refusal:
        single([], GREEDY, 0, None)
    assert str(refusal.value) == "the prompt has no tokens; legal: at least one"


def continued(groups: ProcessGroups, schedule: str) -> list[int]:
    plan = PipelinePlan.of(schedule, groups.pipeline.size)  # type: ignore[arg-type]
    model = ArgonneModel(CONFIG, Execution(groups, Precision(torch.float64, torch.float64), plan=plan))
    model.initialise(seed=2)
    return generate(model, PROMPT, Sampling(max_new_tokens=9), seed=8, stop=None)


@pytest.mark.parametrize(
    ("layout", "schedule"),
    [
        (Layout(pipeline=2), "1f1b"),
        (Layout(context=2), "1f1b"),
        (Layout(pipeline=2, tensor=2, sequence_parallel=True), "1f1b"),
        (Layout(pipeline=2, context=2), "gpipe"),
    ],
    ids=str,
)
def test_pipelines_and_shared_sequences_draw_what_one_process_draws(
    ranks: RankPool, layout: Layout, schedule: str
) -> None:
    expected = continued(ProcessGroups.single(), schedule)
    for rank, tokens in enumerate(ranks.run(layout, continued, schedule)):
        assert tokens == expected, f"rank {rank}"
