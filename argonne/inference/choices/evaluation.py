"""All questions of all subjects put to a model, batch after batch, those left out that were answered before."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from argonne.inference.choices.answers import Answer, KeptAnswers
from argonne.inference.choices.collection import Subject
from argonne.inference.choices.prompts import Asked, Encoding, Score, answers, asked, introduction
from argonne.inference.choices.scoring import Beginning, Scorer
from argonne.parallel.communication.collectives import collectively, gather_objects


@dataclass(frozen=True)
class Evaluation:
    """How questions are put to a model; every rank has the same."""

    scorer: Scorer
    encoding: Encoding
    score: Score

    def run(
        self, subjects: Sequence[Subject], kept: KeptAnswers | None, told: Callable[[str, list[Answer]], None]
    ) -> list[Answer]:
        """The answers to all questions, the same on every rank (collective).

        Batches are the same whether some are left out or not, so that what is answered later has the same bits.

        Args:
            subjects: what is asked.
            kept: on the first rank, where answers are kept; None: nowhere.
            told: is called after each subject with its name and its answers.

        Raises:
            ArgonneError: a question cannot be put as tokens, answers cannot be kept, or the model has diverged.
        """
        world = self.scorer.groups.world
        before = gather_objects({} if kept is None else kept.found, world)[0]
        found: list[Answer] = []
        for subject in subjects:
            start, context = len(found), introduction(subject, self.score)
            questions = [self.encoding.of(context, question, self.score) for question in subject.asked]
            beginning: Beginning | None = None
            for first in range(0, len(questions), self.scorer.batch):
                numbers = range(first, min(first + self.scorer.batch, len(questions)))
                own = [before[subject.name, number] for number in numbers if (subject.name, number) in before]
                if len(own) < len(numbers):
                    beginning = beginning or self.scorer.begin(questions)
                    own = self._answers(subject, questions, numbers, beginning)
                    new = [answer for answer in own if (subject.name, answer.number) not in before]
                    collectively(partial(_keep, kept, new), world)
                found += own
            told(subject.name, found[start:])
        return found

    def _answers(
        self, subject: Subject, questions: Sequence[Asked], numbers: range, beginning: Beginning
    ) -> list[Answer]:
        likelihoods = self.scorer.score([questions[number] for number in numbers], beginning)
        return [
            Answer(
                subject.name,
                number,
                subject.asked[number].answer,
                likelihoods[number - numbers.start],
                tuple(len(choice) for choice in subject.asked[number].choices),
                questions[number].truncated,
            )
            for number in numbers
        ]


def _keep(kept: KeptAnswers | None, answers: Sequence[Answer]) -> None:
    if kept is not None:
        kept.add(answers)


def questions_fingerprint(subjects: Sequence[Subject], score: Score) -> str:
    """A SHA-256 (hex) of every text that a model is shown, and of the answers."""
    digest = hashlib.sha256()
    for subject in subjects:
        digest.update(repr((subject.name, introduction(subject, score))).encode())
        for one in subject.asked:
            digest.update(repr((asked(one, score), answers(one, score), one.choices, one.answer)).encode())
    return digest.hexdigest()
