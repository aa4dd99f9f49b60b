"""Accuracies with their standard errors: of each subject, of all questions, and the mean of the subjects."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from argonne.inference.choices.answers import Answer


@dataclass(frozen=True)
class Accuracy:
    """How many of so many."""

    correct: int
    questions: int

    @classmethod
    def of(cls, answers: Sequence[Answer], is_right: Callable[[Answer], bool]) -> Accuracy:
        """Of ``answers``, those that are right."""
        return cls(sum(map(is_right, answers)), len(answers))

    @property
    def share(self) -> float:
        """0 to 1."""
        return self.correct / self.questions

    @property
    def standard_error(self) -> float | None:
        """The sample standard deviation over the root of their number; None of a single question."""
        if self.questions < 2:
            return None
        return math.sqrt(self.share * (1 - self.share) / (self.questions - 1))


@dataclass(frozen=True)
class Macro:
    """The mean over subjects, each of which counts once."""

    subjects: Sequence[Accuracy]

    @property
    def share(self) -> float:
        """0 to 1."""
        return sum(each.share for each in self.subjects) / len(self.subjects)

    @property
    def standard_error(self) -> float | None:
        """As the subjects' are independent; None where one has none."""
        errors = [each.standard_error for each in self.subjects]
        known = [error for error in errors if error is not None]
        return math.sqrt(sum(error**2 for error in known)) / len(errors) if len(known) == len(errors) else None


@dataclass(frozen=True)
class Results:
    """What an evaluation has found."""

    answers: Sequence[Answer]
    normalised: bool
    """Whether choices are also compared for their length in characters."""

    @property
    def by_subject(self) -> dict[str, list[Answer]]:
        """In the order in which they were asked."""
        found: dict[str, list[Answer]] = {}
        for answer in self.answers:
            found.setdefault(answer.subject, []).append(answer)
        return found

    @property
    def kinds(self) -> dict[str, Callable[[Answer], bool]]:
        """What counts as right, by the name of the accuracy."""
        found: dict[str, Callable[[Answer], bool]] = {"accuracy": lambda answer: answer.is_right}
        return found | ({"accuracy_normalised": lambda answer: answer.is_right_normalised} if self.normalised else {})

    def as_json(self) -> dict[str, Any]:
        """``micro`` counts every question once, ``macro`` every subject."""
        subjects, kinds = self.by_subject, self.kinds
        told: dict[str, Any] = {
            "questions": len(self.answers),
            "truncated": sum(answer.truncated for answer in self.answers),
        }
        for name, is_right in kinds.items():
            every = [Accuracy.of(own, is_right) for own in subjects.values()]
            micro, macro = Accuracy.of(self.answers, is_right), Macro(every)
            told[name] = {
                "micro": _told(micro),
                "macro": {"accuracy": macro.share, "standard_error": macro.standard_error},
                "subjects": {subject: _told(each) for subject, each in zip(subjects, every, strict=True)},
            }
        return told

    def as_markdown(self, title: str) -> Iterator[str]:
        """The lines of the table: of each subject a row, and above it all questions."""
        subjects = self.by_subject
        yield f"### {title} Evaluation Results"
        for name, is_right in self.kinds.items():
            every = [Accuracy.of(own, is_right) for own in subjects.values()]
            micro, macro = Accuracy.of(self.answers, is_right), Macro(every)
            kind = "Accuracy" if name == "accuracy" else "Accuracy by Length"
            yield ""
            counts = f"{micro.share:.4f} ({micro.correct}/{micro.questions})"
            yield f"**Overall {kind}**: **{counts}**, standard error {_error(micro)}"
            yield ""
            yield f"| Subject | {kind} (Correct/Total) | Standard Error |"
            yield "|------------------------------|----------------------|----------------|"
            for subject, own in zip(subjects, every, strict=True):
                yield f"| {_cell(subject)} | {own.share:.4f} ({own.correct}/{own.questions}) | {_error(own)} |"
            yield f"| **Mean of {len(every)} subjects** | **{macro.share:.4f}** | {_error(macro)} |"


def _told(found: Accuracy) -> dict[str, Any]:
    return {
        "accuracy": found.share,
        "standard_error": found.standard_error,
        "correct": found.correct,
        "questions": found.questions,
    }


def _error(found: Accuracy | Macro) -> str:
    error = found.standard_error
    return "-" if error is None else f"{error:.4f}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
