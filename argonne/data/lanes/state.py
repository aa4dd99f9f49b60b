"""Where a lane stands in the corpus, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from argonne.data.errors import DataError


@dataclass(frozen=True)
class DataPosition:
    """The next token that a lane delivers; on resuming, the document it is in is tokenised again."""

    epoch: int
    """Passes over the corpus that are complete."""
    shard: int
    """Index into the shards, in their canonical order."""
    row_group: int
    """Index of the Parquet row group or Arrow record batch within the shard."""
    row: int
    """Row within the row group."""
    token: int = 0
    """Offset within the encoded document, BOS and EOS counted."""

    def to_dict(self) -> dict[str, int]:
        """The position as JSON-able values."""
        return dict(vars(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataPosition:
        """The inverse of `to_dict`; raises DataError for anything else."""
        _check_fields(cls, values)
        _check_counts(values, values.values())
        return cls(**values)


@dataclass(frozen=True)
class LaneState:
    """All that a lane needs to go on exactly: its position, and what it consumed to get there."""

    position: DataPosition
    documents: int = 0
    """Documents delivered to their last token."""
    tokens: int = 0
    """Tokens delivered."""
    dropped: Mapping[str, int] = field(default_factory=dict)
    """Rows passed over before the position, by reason."""
    unreadable: tuple[tuple[int, int], ...] = ()
    """The (shard, row group) of each row group that this lane could not read, sorted: it stays quarantined."""

    def to_dict(self) -> dict[str, Any]:
        """The state as JSON-able values."""
        return {**vars(self), "position": self.position.to_dict(), "dropped": dict(self.dropped)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LaneState:
        """The inverse of `to_dict`; raises DataError for anything else."""
        if isinstance(values, Mapping):
            values = {"unreadable": (), **values}  # states from before there was a quarantine
        _check_fields(cls, values)
        if not isinstance(values["dropped"], Mapping):
            raise DataError(f"dropped={values['dropped']!r} of a lane state is not a count for each reason")
        _check_counts(values, [values["documents"], values["tokens"], *values["dropped"].values()])
        position = DataPosition.from_dict(values["position"])
        return cls(**{**values, "position": position, "unreadable": _row_groups(values)})


def _check_fields(kind: type[DataPosition] | type[LaneState], values: object) -> None:
    names = [each.name for each in fields(kind)]
    if not isinstance(values, Mapping) or set(values) != set(names):
        raise DataError(f"saved data position {values!r} does not have the fields {', '.join(names)}")


def _row_groups(values: Mapping[str, Any]) -> tuple[tuple[int, int], ...]:
    pairs = values["unreadable"]
    if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
        raise DataError(f"unreadable={pairs!r} of a lane state is not a list of (shard, row group)")
    _check_counts(values, [number for pair in pairs for number in pair])
    return tuple(sorted({(shard, row_group) for shard, row_group in pairs}))


def _check_counts(values: Mapping[str, Any], counts: Iterable[object]) -> None:
    if not all(type(count) is int and count >= 0 for count in counts):
        raise DataError(f"saved data position {dict(values)} has a value that is not a whole number")
