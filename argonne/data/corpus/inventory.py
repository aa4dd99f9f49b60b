"""What a checkpoint keeps of the corpus, and what became of the corpus since."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from argonne.data.corpus.formats import TEXT
from argonne.data.corpus.lines import Column
from argonne.data.corpus.location import Location
from argonne.data.corpus.shards import OnBad, Shard, canonical, open_or_quarantine, open_shard, require_rows
from argonne.data.errors import DataError

Listing = list[dict[str, Any]]
MOST_CHANGES = 5


def describe(shards: Sequence[Shard]) -> Listing:
    """The shards as JSON-able values: row counts in runs, so that 250 shards of 100 row groups take some 20 kB.

    A shard that was quarantined without its row counts being known is listed with the reason.
    """
    return [
        {
            "name": shard.path.name,
            "size": shard.size,
            "rows": [[rows, len(list(run))] for rows, run in itertools.groupby(shard.rows)],
            **({} if shard.rows else {"unreadable": shard.unreadable}),
        }
        for shard in shards
    ]


def changes(listing: Sequence[Mapping[str, Any]], now_listed: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each shard that was added, removed or changed between two listings; empty if there is none.

    Directories do not count: a copy of the corpus is the same corpus. After the first lines comes a count.

    Raises:
        DataError: a listing is not what `describe` makes.
    """
    saved, now = _numbered(_parse(listing)), _numbered(_parse(now_listed))
    lines = []
    for key, entry in saved.items():
        if key not in now:
            lines.append(f"shard {entry.name} was removed ({entry})")
        elif entry != now[key]:
            lines.append(f"shard {entry.name}: {_difference(entry, now[key])}")
    lines += [f"shard {entry.name} was added ({entry})" for key, entry in now.items() if key not in saved]
    before, after = [key for key in saved if key in now], [key for key in now if key in saved]
    if before != after:
        first, second = next((new, old) for old, new in zip(before, after, strict=True) if old != new)
        lines.append(f"the shards come in another order: {first[0]} before {second[0]}")
    if len(lines) > MOST_CHANGES:
        lines[MOST_CHANGES:] = [f"and {len(lines) - MOST_CHANGES:,} more changes"]
    return lines


def restore(
    listing: Sequence[Mapping[str, Any]],
    paths: Sequence[Location],
    on_bad: OnBad = "raise",
    column: Column = TEXT,
    whole: bool = True,
) -> tuple[Shard, ...]:
    """The shards of a run that goes on, in the order of its `listing`; those it does not list come after them, sorted.

    With `on_bad="skip"` a listed shard that is missing, or cannot be opened any more, stays with the rows it is
    known to have, all unreadable: the lanes keep their ways. One that was quarantined from the start stays so.
    `changes` tells what else is different. ``whole`` is as of `open_shards`.

    Raises:
        DataError: `listing` is not what `describe` makes; with "raise", a listed shard is missing or a shard
            cannot be opened; with "skip", none can.
    """
    found = _numbered_paths(paths)
    shards = []
    for key, entry in _numbered(_parse(listing)).items():
        path = found.pop(key, None)
        if not entry.rows:
            shards.append(Shard(path or Path(entry.name), (), entry.size, None, entry.unreadable, column))
        elif path is None and on_bad == "raise":
            raise DataError(f"shard {entry.name} is missing ({entry}); legal: all the data that the run began with")
        elif path is None:
            shards.append(Shard(Path(entry.name), entry.rows, entry.size, None, "is missing", column))
        elif on_bad == "raise":
            shards.append(open_shard(path, column, whole))
        else:
            shard = open_or_quarantine(path, column, whole)
            shards.append(replace(shard, rows=entry.rows, size=entry.size) if shard.unreadable else shard)
    others = sorted(found.values(), key=canonical)
    opened = open_shard if on_bad == "raise" else open_or_quarantine
    return require_rows([*shards, *(opened(path, column, whole) for path in others)])


@dataclass(frozen=True)
class _Entry:
    """One shard of a listing."""

    name: str
    size: int
    rows: tuple[int, ...]
    unreadable: str = ""

    def __str__(self) -> str:
        if not self.rows:
            return "quarantined"
        plural = "s" if len(self.rows) > 1 else ""
        return f"{sum(self.rows):,} rows in {len(self.rows):,} row group{plural}"


def _parse(listing: Sequence[Mapping[str, Any]]) -> list[_Entry]:
    try:
        entries = [
            _Entry(
                each["name"],
                each["size"],
                tuple(rows for rows, count in each["rows"] for _ in range(count)),
                each.get("unreadable", ""),
            )
            for each in listing
        ]
        if all(type(number) is int and number >= 0 for entry in entries for number in (entry.size, *entry.rows)):
            return entries
    except (KeyError, TypeError, ValueError, AttributeError):
        pass
    raise DataError("the saved listing of the data shards is damaged: it is not one of names, sizes and row counts")


def _numbered(entries: Sequence[_Entry]) -> dict[tuple[str, int], _Entry]:
    """By name, those of equal names (in other directories) told apart by their order."""
    return dict(zip(told_apart([entry.name for entry in entries]), entries, strict=True))


def _numbered_paths(paths: Sequence[Location]) -> dict[tuple[str, int], Location]:
    return dict(zip(told_apart([path.name for path in paths]), paths, strict=True))


def told_apart(names: Sequence[str]) -> list[tuple[str, int]]:
    """Each name, and how many equal ones come before it."""
    seen: Counter[str] = Counter()
    keys = []
    for name in names:
        keys.append((name, seen[name]))
        seen[name] += 1
    return keys


def _difference(old: _Entry, new: _Entry) -> str:
    if str(old) != str(new):
        return f"{old} -> {new}"
    if old.rows != new.rows:
        return f"{old}, cut in other places"
    return f"{old.size:,} bytes -> {new.size:,} bytes" if old.size != new.size else "quarantined for another reason"
