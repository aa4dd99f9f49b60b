"""The errors of the data pipeline, and what stands in place of a row that cannot be had."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from argonne.parallel.errors import ArgonneError


class DataError(ArgonneError):
    """A shard, tokenizer, position or batch that cannot be used, named in one line."""


class Unusable(enum.Enum):
    """What stands in place of a row that cannot be had."""

    BROKEN = "broken"
    """No JSON, no object, or no valid Unicode."""


BROKEN = Unusable.BROKEN


def one_line(error: BaseException) -> str:
    """The first line of another library's error, fit to end a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def naming(flag: str, globs: Sequence[str] | None) -> Iterator[None]:
    """Whatever is wrong with the data within, the message begins with the flag, and the globs, that named it."""
    try:
        yield
    except DataError as error:
        value = f"={' '.join(globs)!r}" if globs else ""
        raise DataError(f"{flag}{value}: {error}") from error
