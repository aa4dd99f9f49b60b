"""The errors of the data pipeline."""

from __future__ import annotations

from argonne.parallel.errors import ArgonneError


class DataError(ArgonneError):
    """A shard, tokenizer, position or batch that cannot be used, named in one line."""


def one_line(error: BaseException) -> str:
    """The first line of another library's error, fit to end a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__
