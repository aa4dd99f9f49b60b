"""The texts of files, one after the other: of a shard every row, of a plain text file all of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from argonne.data.corpus.formats import TEXT
from argonne.data.corpus.location import LINES, SUFFIXES, is_url
from argonne.data.corpus.shards import find_shards, open_shards, read_texts
from argonne.data.errors import DataError


def read_documents(patterns: Sequence[str], column: str = TEXT) -> Iterator[str | None]:
    """The texts of all files that ``patterns`` name, in their order; None for a row without a readable one.

    A local file is a shard if its name ends in .parquet or .arrow, or as those of JSON lines do, and else UTF-8 text.
    What is no such file may be anything that ``find_shards`` takes: a glob, a directory or a URL of shards.

    Raises:
        DataError: nothing is named, or a file cannot be read.
    """
    endings = tuple(f".{suffix}" for suffix in (*SUFFIXES, *LINES))
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if not is_url(pattern) and path.is_file() and not path.name.endswith(endings):
            yield _plain(path)
            continue
        for shard in open_shards(find_shards([pattern]), column=column):
            for row_group in range(len(shard.rows)):
                for text in read_texts(shard, row_group):
                    yield text if isinstance(text, str) else None


def _plain(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line ends as they are
    except OSError as error:
        raise DataError(f"{str(path)!r} cannot be read: {error}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{str(path)!r} is no text in UTF-8 (byte {error.start} cannot be); legal: UTF-8, or a Parquet, Arrow or "
            "JSONL file named so"
        ) from error
