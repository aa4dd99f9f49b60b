"""Questions of multiple choice as files have them: MMLU's CSV and Parquet forms, and JSON lines."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from argonne.data.corpus.formats import reading
from argonne.data.errors import DataError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLUMNS = ("question", "choices", "answer")
"""What a row of Parquet or a JSON object has; ``subject`` may be beside them."""
_CSV = "question, A, B, C, D and the letter of the answer"


@dataclass(frozen=True)
class Question:
    """A question, and what may be its answer."""

    text: str
    choices: tuple[str, ...]
    answer: int
    """The right one's place among them."""
    subject: str | None
    """None where neither the row nor the file's name says."""
    source: str
    """Where it is, for a person."""

    @property
    def letter(self) -> str:
        """The right answer's."""
        return LETTERS[self.answer]


def read_questions(path: Path, subject: str | None = None) -> list[Question]:
    """The questions of a file, by the ending of its name: .csv, .parquet or .jsonl.

    Args:
        path: the file.
        subject: of the questions that do not say.

    Raises:
        DataError: naming the line or the row, for what is no question; the file cannot be read, or has none.
    """
    found = list(READERS[path.suffix](path, subject)) if path.suffix in READERS else None
    if found is None:
        raise DataError(f"{str(path)!r} is no file of questions; legal: a name that ends in {', '.join(READERS)}")
    if not found:
        raise DataError(f"{str(path)!r} has no questions; legal: at least one")
    return found


def _read_csv(path: Path, subject: str | None) -> Iterator[Question]:
    lines = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    begins = 1
    while True:
        try:
            row = next(lines, None)
        except csv.Error as error:
            raise DataError(f"line {begins} of {str(path)!r} is no CSV: {error}") from error
        if row is None:
            return
        source, begins = f"line {begins} of {str(path)!r}", lines.line_num + 1
        if not row:  # an empty line
            continue
        if len(row) != 6:
            raise DataError(f"{source} has {len(row)} columns; legal: 6, {_CSV}")
        text, *choices, letter = row
        if letter.strip() not in tuple(LETTERS[:4]):
            raise DataError(f"{source} has answer={letter!r}; legal: A, B, C or D")
        place = LETTERS.index(letter.strip())
        yield _question({"question": text, "choices": choices, "answer": place}, subject, source)


def _read_parquet(path: Path, subject: str | None) -> Iterator[Question]:
    with reading(f"{str(path)!r}"):
        with path.open("rb") as file:
            table = pq.read_table(file)
        missing = [name for name in COLUMNS if name not in table.column_names]
        rows = [] if missing else table.to_pylist()
    if missing:
        raise DataError(f"{str(path)!r} has no column {', '.join(missing)}; legal: {', '.join(COLUMNS)}")
    for number, row in enumerate(rows, 1):
        yield _question(row, subject, f"row {number} of {str(path)!r}")


def _read_json_lines(path: Path, subject: str | None) -> Iterator[Question]:
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        source = f"line {number} of {str(path)!r}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{source} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{source} is no JSON object; legal: one with {', '.join(COLUMNS)}")
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise DataError(f"{source} has no {', '.join(missing)}; legal: an object with {', '.join(COLUMNS)}")
        yield _question(row, subject, source)


READERS = {".csv": _read_csv, ".parquet": _read_parquet, ".jsonl": _read_json_lines}
"""By the ending of a file's name."""


def _question(row: dict[str, Any], subject: str | None, source: str) -> Question:
    text, choices, named = row["question"], row["choices"], row.get("subject")
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{source} has question={text!r}; legal: a text")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise DataError(f"{source} has choices={choices!r:.60}; legal: a list of texts")
    if not 2 <= len(choices) <= len(LETTERS):
        raise DataError(f"{source} has {len(choices)} choices; legal: 2 to {len(LETTERS)}")
    if named is not None and (not isinstance(named, str) or not named.strip()):
        raise DataError(f"{source} has subject={named!r}; legal: a text")
    return Question(text, tuple(choices), _place(row["answer"], choices, source), named or subject, source)


def _place(answer: Any, choices: list[str], source: str) -> int:
    """Which choice an answer is: its place from 0 on, its letter, or its text."""
    letters = LETTERS[: len(choices)]
    legal = f"0 to {len(choices) - 1}, {letters[0]} to {letters[-1]}, or the text of one choice"
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        return answer
    if isinstance(answer, str) and answer:
        meant = {place for place, choice in enumerate(choices) if choice == answer}
        meant |= {letters.index(answer)} if len(answer) == 1 and answer in letters else set()
        if len(meant) == 1:
            return meant.pop()
        if meant:
            which = " and ".join(letters[place] for place in sorted(meant))
            raise DataError(f"{source} has answer={answer!r}, which may be {which}; legal: a place, 0 or more")
    raise DataError(f"{source} has answer={answer!r:.60}; legal: {legal}")


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{str(path)!r} is no text in UTF-8 (byte {error.start} cannot be)") from error
