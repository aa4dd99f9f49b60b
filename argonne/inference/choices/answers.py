"""What was found of each question, and the file that keeps it: an evaluation that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from argonne.files import make_directory, named
from argonne.parallel.errors import ArgonneError

ANSWERS = "answers.jsonl"
Place = tuple[str, int]
"""A subject, and the number of a question among those that are asked of it."""


@dataclass(frozen=True)
class Answer:
    """What a model makes of one question."""

    subject: str
    number: int
    """Among those that are asked of the subject, from 0 on."""
    answer: int
    """The right choice's place."""
    log_likelihoods: tuple[float, ...]
    """Of each choice, in nats."""
    characters: tuple[int, ...]
    """Of each choice's text."""
    truncated: bool
    """Whether the model could not see all of it."""

    @property
    def is_right(self) -> bool:
        """Whether the right choice is the most likely one (the first of several)."""
        return _first_highest(self.log_likelihoods) == self.answer

    @property
    def is_right_normalised(self) -> bool:
        """Whether it is, for its length in characters."""
        pairs = zip(self.log_likelihoods, self.characters, strict=True)
        return _first_highest([value / max(1, length) for value, length in pairs]) == self.answer


def _first_highest(values: Iterable[float]) -> int:
    found = list(values)
    return found.index(max(found))


class KeptAnswers:
    """A file that grows by some answers at a time, behind a line that says what they are answers to."""

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        """
        Args:
            directory: is made where it is missing.
            identity: what makes an evaluation this one, as JSON values.

        Raises:
            ArgonneError: the directory has answers of another evaluation.
            OSError: the file cannot be read or written.
        """
        self.path = directory / ANSWERS
        self.found: dict[Place, Answer] = {}
        """What it has."""
        make_directory(directory)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        if not lines or not lines[0].endswith(b"\n"):  # killed before it was whole
            self._write(json.dumps(identity).encode() + b"\n", "wb")
            return
        _require_same(_object(lines[0]) or {}, identity, directory)
        whole = len(lines[0])
        for line in lines[1:]:
            row = _object(line) if line.endswith(b"\n") else None
            if row is None or row.keys() != {field.name for field in fields(Answer)}:
                break  # where a killed process, or a machine that went down, has left off
            values: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in row.items()}
            answer = Answer(**values)
            self.found[answer.subject, answer.number] = answer
            whole += len(line)
        if whole < sum(map(len, lines)):
            os.truncate(self.path, whole)

    def add(self, answers: Iterable[Answer]) -> None:
        """Append ``answers`` at one blow. Raises ``OSError`` when they cannot be written."""
        self._write(b"".join(json.dumps(asdict(answer)).encode() + b"\n" for answer in answers), "ab")

    def _write(self, data: bytes, mode: str) -> None:
        with named(self.path), self.path.open(mode) as file:
            file.write(data)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _require_same(there: Mapping[str, Any], identity: Mapping[str, Any], directory: Path) -> None:
    for name, value in identity.items():
        if there.get(name) != value:
            was = f"{there[name]!r:.20} there and {value!r:.20} here" if name in there else "not told there"
            raise ArgonneError(
                f"output_dir={str(directory)!r} has answers of another evaluation: {name} is {was}; legal: a new "
                "directory, or the same weights, questions and flags"
            )
