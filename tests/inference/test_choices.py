"""Every choice has the log-likelihood that it has by itself, at every layout and in every batch."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from argonne.data import load_tokenizer, train_tokenizer
from argonne.data.errors import DataError
from argonne.inference.choices.answers import ANSWERS, Answer, KeptAnswers
from argonne.inference.choices.collection import Subject
from argonne.inference.choices.evaluation import Evaluation, questions_fingerprint
from argonne.inference.choices.prompts import Encoding, Score, answers, asked, introduction
from argonne.inference.choices.questions import Question
from argonne.inference.choices.results import Results
from argonne.inference.choices.scoring import Scorer, common
from argonne.inference.opening import open_model
from argonne.models import Argonne1Config, ArgonneConfig, CachingModel, Execution, build_model, from_huggingface
from argonne.parallel import ArgonneError, Layout, Precision, ProcessGroups
from argonne.parallel.tensor_parallel.precision import PRECISIONS
from tests import dense
from tests.pool import RankPool

LONGEST = 200
SHOWN = (
    Question(" Which of these is red? \n", ("grass", "blood", "snow", "the sky"), 1, None, "shown 1"),
    Question("What is two plus two?", ("three", "five", "four", "a dozen"), 2, None, "shown 2"),
)
ASKED = {
    "plain_facts": [
        ("What do cows drink?", ("milk", "water", "red wine from a glass", "snow"), 1),
        ("What falls in winter, and melts in the sun?", ("snow", "a red sky ☃", "grass", "five"), 0),
        ("How many are two and two, " + "and two " * 9 + "and none?", ("four", "twenty", "two dozen", "ten"), 1),
        ("Is it?", ("yes", "no"), 1),
    ],
    "sums": [("What is one plus two?", ("three", "five", "two plus two", "twenty"), 0)],
}
SUBJECTS = [
    Subject(name, (), tuple(Question(*row, name, f"{name} {n}") for n, row in enumerate(rows)))
    for name, rows in ASKED.items()
]
CASES: list[tuple[Score, int, int]] = [("letter", 2, LONGEST), ("text", 0, LONGEST), ("text", 1, 64)]
"""What is scored, the questions shown, and the window: of the last, some do not fit into it."""


def subjects(shots: int) -> list[Subject]:
    return [replace(subject, shown=SHOWN[:shots]) for subject in SUBJECTS]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("choices")
    texts = [introduction(subject, score) for subject in subjects(2) for score in ("letter", "text")]
    tokenizer = train_tokenizer([*texts, *(q[0] for rows in ASKED.values() for q in rows)], 420)
    tokenizer.save_pretrained(path)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=4,
        max_position_embeddings=LONGEST,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def evaluation(groups: ProcessGroups, directory: Path, case: tuple[Score, int, int], batch: int) -> Evaluation:
    opened = open_model(directory, groups, PRECISIONS["fp64"])
    encoding = Encoding(opened.tokenizer, opened.model.shape["vocab_size"], case[2], None)
    return Evaluation(Scorer(opened.model, batch), encoding, case[0])


@torch.inference_mode()
def found(groups: ProcessGroups, directory: Path, batch: int) -> list[list[Answer]]:
    return [evaluation(groups, directory, case, batch).run(subjects(case[1]), None, lambda *_: None) for case in CASES]


@functools.cache
def expected(directory: Path, case: tuple[Score, int, int]) -> list[tuple[tuple[float, ...], bool]]:
    """Of each choice by itself, in float64, from a plain model; and whether a question was too long."""
    (score, shots, window), tokenizer = case, load_tokenizer(directory)
    weights = {name: tensor.double() for name, tensor in load_file(directory / "model.safetensors").items()}
    config = from_huggingface(directory)
    assert isinstance(config, ArgonneConfig)
    told = []
    for subject in subjects(shots):
        for question in subject.asked:
            context = introduction(subject, score) + asked(question, score)
            begin, values, cut = tokenizer(context).input_ids, [], False
            for end in answers(question, score):
                behind = tokenizer(context + end).input_ids[len(begin) :]
                ids = torch.tensor([*begin, *behind][-(window + 1) :])
                likely = dense.logits(weights, config, ids[None, :-1])[0].log_softmax(-1)[-len(behind) :]
                values.append(likely.gather(1, ids[-len(behind) :, None]).sum().item())
                cut |= len(begin) + len(behind) > window + 1
            told.append((tuple(values), cut))
    return told


def require_expected(directory: Path, answered: Sequence[Sequence[Answer]]) -> None:
    for case, own in zip(CASES, answered, strict=True):
        wanted = expected(directory, case)
        assert [answer.truncated for answer in own] == [cut for _, cut in wanted]
        assert any(cut for _, cut in wanted) == (case[2] < LONGEST), "these say nothing"
        for answer, (values, _) in zip(own, wanted, strict=True):
            assert answer.log_likelihoods == pytest.approx(values, abs=1e-10), (case, answer)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_each_choice_has_its_likelihood_by_itself_in_any_batch(directory: Path, batch: int) -> None:
    require_expected(directory, found(ProcessGroups.single(), directory, batch))


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tensor=3),
        Layout(tensor=2, pipeline=2, sequence_parallel=True),
        *(
            pytest.param(layout, marks=pytest.mark.exhaustive)
            for layout in (Layout(tensor=2), Layout(pipeline=2), Layout(tensor=3, sequence_parallel=True))
        ),
    ],
    ids=str,
)
def test_every_layout_finds_the_same(ranks: RankPool, directory: Path, layout: Layout) -> None:
    for answered in ranks.run(layout, found, directory, 3):
        require_expected(directory, answered)


SHAPE = ArgonneConfig(24, 2, 6, 3, 420, 12, 4, max_position_embeddings=LONGEST, initializer_range=0.5)
OTHERS = {
    "qwen3": replace(SHAPE, family="qwen3", qk_norm=True),
    "argonne1": Argonne1Config(24, 2, 6, 420, 40, max_position_embeddings=LONGEST, initializer_range=0.5),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_family_goes_on_from_what_it_has_seen(directory: Path, name: str) -> None:
    model = build_model(OTHERS[name], Execution(ProcessGroups.single(), Precision(torch.float64, torch.float64)))
    model.initialise(seed=2)
    encoding = Encoding(load_tokenizer(directory), 420, LONGEST, None)
    questions = [encoding.of(introduction(SUBJECTS[0], "text"), each, "text") for each in SUBJECTS[0].asked]
    scorer = Scorer(model, 3)
    for question, values in zip(questions, scorer.score(questions, scorer.begin(questions)), strict=True):
        for continuation, value in zip(question.continuations, values, strict=True):
            ids, total = list(continuation.context), 0.0
            for token in continuation.tokens:
                total += model.next_token_logits(torch.tensor([ids]))[0].log_softmax(0)[token].item()
                ids.append(token)
            assert value == pytest.approx(total, abs=1e-10)


@torch.inference_mode()
def test_what_questions_have_in_common_is_computed_once(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = evaluation(ProcessGroups.single(), directory, ("text", 2, LONGEST), 2)
    model, computed = one.scorer.caching, []
    assert isinstance(model, CachingModel)
    whole = model.log_likelihoods
    monkeypatch.setattr(
        model,
        "log_likelihoods",
        lambda ids, counts, *rest: (computed.append(sum(counts)), whole(ids, counts, *rest))[1],
    )
    subject = replace(SUBJECTS[0], shown=SHOWN)
    one.run([subject], None, lambda *_: None)
    context = introduction(subject, "text")
    questions = [one.encoding.of(context, question, "text") for question in subject.asked]
    contexts = [question.continuations[0].context for question in questions]
    choices = [len(each.tokens) - 1 for question in questions for each in question.continuations]
    begin = len(common(contexts))
    assert begin > 40
    assert sum(computed) == begin + sum(len(each) - begin for each in contexts) + sum(choices)


def test_prompts_are_these_to_the_byte() -> None:
    subject = replace(SUBJECTS[0], shown=SHOWN[:1])
    question = subject.asked[3]
    assert introduction(subject, "letter") + asked(question, "letter") == (
        "The following are multiple choice questions (with answers) about plain facts.\n\n"
        "Which of these is red?\nA. grass\nB. blood\nC. snow\nD. the sky\nAnswer: B\n\n"
        "Is it?\nA. yes\nB. no\nAnswer:"
    )
    assert introduction(subject, "text") + asked(question, "text") == (
        "The following are questions (with answers) about plain facts.\n\n"
        "Question: Which of these is red?\nAnswer: blood\n\n"
        "Question: Is it?\nAnswer:"
    )
    assert (answers(question, "letter"), answers(question, "text")) == ([" A", " B"], [" yes", " no"])


def test_a_text_begins_with_a_bos_where_the_tokenizer_or_the_user_says(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    plain = Encoding(tokenizer, 420, LONGEST, None).of("", SHOWN[0], "letter")
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    for put, choice, expected_bos in (
        (f"{bos} $A", None, True),
        (f"{bos} $A {eos}", None, True),
        (f"$A {eos}", None, False),
        (f"{bos} $A", False, False),
        ("$A", True, True),
    ):
        other = load_tokenizer(directory)
        special = [(token, other.convert_tokens_to_ids(token)) for token in (bos, eos)]
        other.backend_tokenizer.post_processor = TemplateProcessing(single=put, special_tokens=special)
        found = Encoding(other, 420, LONGEST, choice).of("", SHOWN[0], "letter")
        for mine, before in zip(found.continuations, plain.continuations, strict=True):
            begin = (tokenizer.bos_token_id,) if expected_bos else ()
            assert (mine.context, mine.tokens) == ((*begin, *before.context), before.tokens)


def test_texts_that_a_model_cannot_be_asked_are_refused(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    with pytest.raises(DataError, match=r"choice A of plain_facts 0 has \d+ tokens; legal: 2, which"):
        Encoding(tokenizer, 420, 2, None).of("", SUBJECTS[0].asked[0], "text")
    with pytest.raises(DataError, match=r"gives id \d+, which the model of vocab_size=9 has not"):
        Encoding(tokenizer, 9, 64, None).of("", SUBJECTS[0].asked[0], "text")
    tokenizer.bos_token = None
    with pytest.raises(DataError, match="the tokenizer has no BOS; legal: False"):
        Encoding(tokenizer, 420, 64, True)


def test_a_model_that_has_diverged_is_refused(directory: Path) -> None:
    one = evaluation(ProcessGroups.single(), directory, CASES[0], 2)
    with torch.no_grad():
        next(one.scorer.caching.parameters()).fill_(torch.inf)  # type: ignore[attr-defined]
    with pytest.raises(ArgonneError, match="not finite"):
        one.run(subjects(0), None, lambda *_: None)


@given(st.data())
@settings(max_examples=6)
def test_an_evaluation_that_was_killed_goes_on_to_the_same_bits(
    directory: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    home, identity, case = tmp_path_factory.mktemp("kept"), {"score": "text"}, CASES[1]
    one = evaluation(ProcessGroups.single(), directory, case, 3)
    with torch.inference_mode():
        whole = one.run(SUBJECTS, KeptAnswers(home, identity), lambda *_: None)
        file = home / ANSWERS
        lines = file.read_bytes()
        file.write_bytes(lines[: data.draw(st.integers(0, len(lines)))])
        assert one.run(SUBJECTS, KeptAnswers(home, identity), lambda *_: None) == whole
    assert sorted(file.read_bytes().splitlines()) == sorted(lines.splitlines())
    with pytest.raises(
        ArgonneError, match=r"another evaluation: score is 'text' there and 'letter' here; legal: a new"
    ):
        KeptAnswers(home, {"score": "letter"})


def answer(subject: str, number: int, right: int, values: tuple[float, ...], characters: tuple[int, ...]) -> Answer:
    return Answer(subject, number, right, values, characters, truncated=number == 0)


def test_accuracies_and_their_errors_are_those_of_the_textbook() -> None:
    rows = [
        answer("a|b", 0, 1, (-3.0, -2.0), (1, 1)),
        answer("a|b", 1, 0, (-3.0, -3.0), (1, 9)),  # the first of equals; for its length the second
        answer("a|b", 2, 0, (-3.0, -1.0), (9, 1)),
        answer("other", 0, 1, (-3.0, -2.0), (1, 1)),
        answer("other", 1, 1, (-2.0, -3.0), (1, 1)),
    ]
    told = json.loads(json.dumps(Results(rows, normalised=True).as_json()))
    right = {"a|b": [1, 1, 0], "other": [1, 0]}
    errors = {name: statistics.stdev(own) / len(own) ** 0.5 for name, own in right.items()}
    every = [each for own in right.values() for each in own]
    assert (told["questions"], told["truncated"]) == (5, 2)
    assert told["accuracy"]["micro"] == {
        "accuracy": 0.6,
        "standard_error": pytest.approx(statistics.stdev(every) / 5**0.5),
        "correct": 3,
        "questions": 5,
    }
    assert told["accuracy"]["macro"]["accuracy"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert told["accuracy"]["macro"]["standard_error"] == pytest.approx(sum(e**2 for e in errors.values()) ** 0.5 / 2)
    assert told["accuracy"]["subjects"]["other"]["standard_error"] == pytest.approx(errors["other"])
    assert told["accuracy_normalised"]["micro"]["correct"] == 3
    assert told["accuracy_normalised"]["subjects"]["a|b"]["correct"] == 2
    lines = list(Results(rows, normalised=False).as_markdown("MMLU (0-Shot)"))
    assert lines[0] == "### MMLU (0-Shot) Evaluation Results"
    assert lines[2].startswith("**Overall Accuracy**: **0.6000 (3/5)**, standard error 0.24")
    assert lines[4] == "| Subject | Accuracy (Correct/Total) | Standard Error |"
    assert lines[6] == "| a\\|b | 0.6667 (2/3) | 0.3333 |"
    single = list(Results(rows[:1], normalised=False).as_markdown("T"))
    assert single[-1] == "| **Mean of 1 subjects** | **1.0000** | - |"


def test_the_fingerprint_is_of_every_text(directory: Path) -> None:
    def of(changed: Any) -> str:
        return questions_fingerprint([changed, SUBJECTS[1]], "text")

    first, others = SUBJECTS[0], []
    for question in (
        replace(first.asked[0], text="?"),
        replace(first.asked[0], choices=("milk",) * 4),
        replace(first.asked[0], answer=0),
    ):
        others.append(of(replace(first, asked=(question, *first.asked[1:]))))
    others += [of(first), of(replace(first, shown=SHOWN)), of(replace(first, name="facts"))]
    assert len(set(others)) == 6
