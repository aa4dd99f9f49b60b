"""Which questions are asked, and which are shown first: files or a directory, its splits, subjects and limits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from argonne.data.errors import DataError
from argonne.inference.choices.questions import READERS, Question, read_questions

SPLITS = ("test", "dev", "val", "validation", "train")
SHOWN = "dev"
"""The split whose questions are shown before one that is asked."""
_MOST_NAMED = 8


@dataclass(frozen=True)
class Subject:
    """The questions of one subject."""

    name: str
    shown: tuple[Question, ...]
    """Those that the model is shown with their answers before each of the others."""
    asked: tuple[Question, ...]


@dataclass(frozen=True)
class Selection:
    """What is taken of the files."""

    split: str = "test"
    """Of a directory: the split that is asked."""
    subjects: tuple[str, ...] = ()
    """The names of those that are asked; none: all."""
    shots: int = 0
    """How many questions are shown before each."""
    limit: int | None = None
    """The most that are asked of a subject; None: all."""


def collect(data: Sequence[Path], shots_from: Path | None, selection: Selection) -> list[Subject]:
    """The subjects that are asked, in the order of their names.

    Args:
        data: files of questions, or directories that have them by their split.
        shots_from: a file or a directory of the questions that are shown; None: the dev split of ``data``.
        selection: what is taken.

    Raises:
        DataError: a file is not what it should be, or what is asked for is not there.
    """
    asked: dict[str, list[Question]] = {}
    for path in data:
        for question in _questions(path, selection.split, path.stem):
            asked.setdefault(question.subject or path.stem, []).append(question)
    if missing := [name for name in selection.subjects if name not in asked]:
        raise DataError(f"subjects={missing[0]!r} is not among those of the data; legal: {_some(sorted(asked))}")
    names = sorted(set(selection.subjects) or asked)
    shown: list[Question] = []
    if selection.shots:
        sources = data if shots_from is None else [shots_from]
        if shots_from is None and not any(path.is_dir() for path in data):
            raise DataError(f"shots={selection.shots} needs questions to show; legal: 0, or with --shots-from")
        shown = [question for path in sources if path.is_dir() or shots_from for question in _questions(path, SHOWN)]
    return [
        Subject(name, _shown(name, shown, selection.shots), tuple(asked[name][: selection.limit])) for name in names
    ]


def _shown(subject: str, shown: Sequence[Question], shots: int) -> tuple[Question, ...]:
    """The first that are of the subject, or of none."""
    own = [question for question in shown if question.subject in (subject, None)]
    if shots > len(own):
        where = f", from {own[0].source} on" if own else ""
        raise DataError(
            f"shots={shots} is more than there are to show of {subject}{where}; legal: 0 to {len(own)}, or more "
            "questions in the dev split or --shots-from"
        )
    return tuple(own[:shots])


def _questions(path: Path, split: str, subject: str | None = None) -> list[Question]:
    """Of a file, all, whose ``subject`` is told where nothing else says; of a directory, those of a split."""
    if not path.exists():
        raise DataError(f"{str(path)!r} does not exist; legal: a file of questions, or a directory of them")
    if not path.is_dir():
        return read_questions(path, _subject_of(path) if _split_of(path, path.parent) else subject)
    files = [file for file in sorted(path.rglob("*")) if file.suffix in READERS and file.is_file()]
    splits = {file: _split_of(file, path) for file in files}
    own = [file for file in files if splits[file] == split]
    whole = [file for file in own if file.parent.name == "all"]
    if whole and len(whole) < len(own):  # MMLU's Parquet form has every subject twice: by itself, and in all/
        own = whole
    if not own:
        there = ", ".join(sorted({found for found in splits.values() if found}))
        named = f"one of {there}" if there else f"a directory with {', '.join(READERS)} files in or named by a split"
        raise DataError(f"{str(path)!r} has no files of the split {split!r}; legal: {named}")
    return [question for file in own for question in read_questions(file, _subject_of(file))]


_NAME = re.compile(rf"(?:(?P<subject>.+)_)?(?P<split>{'|'.join(SPLITS)})(?:-\d+-of-\d+)?")


def _split_of(file: Path, root: Path) -> str | None:
    """Of ``anatomy_test.csv`` and ``anatomy/test-00000-of-00001.parquet``, and of files in a folder ``test``."""
    if match := _NAME.fullmatch(file.stem):
        return match["split"]
    return file.parent.name if file.parent != root and file.parent.name in SPLITS else None


def _subject_of(file: Path) -> str:
    match = _NAME.fullmatch(file.stem)
    if match is None:
        return file.stem
    return match["subject"] or file.resolve().parent.name


def _some(names: Sequence[str]) -> str:
    rest = len(names) - _MOST_NAMED
    return ", ".join(names[:_MOST_NAMED]) + (f" and {rest} more" if rest > 0 else "")
