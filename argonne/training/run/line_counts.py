"""The rows of JSON lines, which have no index: each file is counted by one rank, which tells the others."""

from __future__ import annotations

from argonne.data import DataError, Location, find_shards, open_shard, parse_globs
from argonne.data.corpus.formats import COMPRESSIONS
from argonne.data.corpus.line_files import remember
from argonne.data.corpus.location import Url
from argonne.parallel import ProcessGroups
from argonne.parallel.communication.collectives import gather_objects
from argonne.training.config import DataFlags


def share_counts(flags: DataFlags, groups: ProcessGroups) -> None:
    """Have every rank know the rows of all JSON lines that it reads, each having read a part of them (collective).

    What cannot be counted is left for whoever opens it, and refused there.
    """
    if groups.world.size == 1:
        return
    found = {}
    for path in _local_lines(flags)[groups.world.rank :: groups.world.size]:
        try:
            shard = open_shard(path, flags.source.column)
        except DataError:
            continue
        if shard.format in COMPRESSIONS:
            found[path] = shard.size, shard.rows
    for told in gather_objects(found, groups.world):
        for path, (size, rows) in told.items():
            remember(path, size, rows)


def _local_lines(flags: DataFlags) -> list[Location]:
    """The shards that may be JSON lines."""
    globs = [glob for each in parse_globs(flags.data_glob or ()) for glob in each.globs]
    found: set[Location] = set()
    for glob in (*(flags.validation_glob or ()), *flags.named_globs.values(), *globs):
        try:
            found |= set(find_shards([glob]))
        except DataError:
            continue
    names = (".parquet", ".arrow")
    return sorted((path for path in found if not isinstance(path, Url) and not path.name.endswith(names)), key=str)
